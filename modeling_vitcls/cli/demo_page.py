"""Demo page, built with gradio: an image, its predictions, and the attention of each special token.

    serve_demo(model, processor, "mine")            # serves the page until the process is stopped
    serve_demo(*load_from_hub("someone/model", COMMIT), "someone/model")    # in a Space

    photo, examples | one panel per classifier: the predicted label and the probabilities
    layer
    the image as the model sees it, after resizing and cropping | the attention of each token over it

A Space contains this file and inference/token_names.py; the model's own code computes the attention
(`model.token_attention`).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from ..inference.token_names import get_token_names


# Disable usage statistics and the run history, which browsers store. gradio reads these variables
# on import or launch.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr
from gradio.components.label import LabelConfidence, LabelData


UPLOAD_REQUIRED = "upload an image to this page, or select an example"
CACHE_SECONDS = 3600  # time until uploaded images are deleted
NONE_OF_THESE = "none of these"  # answer for an image that shows none of the labels
NUM_LABELS = 5  # maximum number of labels in a panel
MIN_PROBABILITY = 0.5  # default probability from which one of several labels is predicted
IMAGE_CAPTION = "image"  # of the image without attention
MIN_SIDE = 320  # minimum length of the longer side of a displayed image, in pixels
COLORMAP = "inferno"
OPACITY = 0.6  # largest opacity of the map over the image
# The page loads no fonts from other hosts.
FONTS: dict[str, Any] = {
    "font": ("system-ui", "sans-serif"),
    "font_mono": ("ui-monospace", "monospace"),
}

# Small images are enlarged. Up to four images in a row, two on a phone, below the label of the
# gallery, which grows with its rows instead of scrolling.
CSS = """
#photo .image-frame, #photo .image-frame img { width: 100%; height: 100%; object-fit: contain }
#maps .grid-container { grid-template-columns: repeat(auto-fill, minmax(min(17rem, 45%), 1fr)) }
#maps .grid-wrap { max-height: none; min-height: 0; overflow: visible; padding-top: 2.5rem }
"""


@dataclass(frozen=True)
class Prediction:
    """Prediction of one classifier for an image."""

    answer: str  # a label, several labels, NONE_OF_THESE, or regression values
    probabilities: dict[str, float]  # of all labels; empty for regression


def serve_demo(
    model: Any,
    processor: Any,
    title: str,
    examples: Sequence[str | Path] = (),
    host: str | None = None,
    port: int | None = None,
) -> None:
    """Serve the page of a model until the process is stopped.

    Args:
        model: A vitcls classifier or encoder, or an exported classifier, which has no attention.
        processor: The image processor of the model.
        title: Title of the page.
        examples: Image files to show as examples.
        host: Host name of the server. Default: the environment variable GRADIO_SERVER_NAME, or
            localhost.
        port: Port of the server. Default: GRADIO_SERVER_PORT, or the first free port from 7860
            upward.

    Raises:
        OSError: If the port is in use.
    """
    page = build_page(model, processor, title, examples)
    options: dict[str, Any] = {
        "share": False,
        "ssr_mode": False,
        "prevent_thread_lock": True,
        "quiet": True,
    }
    options |= {"theme": gr.themes.Default(**FONTS), "css": CSS, "footer_links": ["gradio"]}
    try:
        _, address, _ = page.launch(server_name=host, server_port=port, **options)
    except OSError as error:  # gradio's message does not mention --port
        raise OSError(
            f"Cannot open port {port or '7860 or above'}. Set --port to a free port."
        ) from error
    print(f"{title}: {address}", flush=True)
    page.block_thread()


def load_from_hub(source: str, revision: str) -> tuple[Any, Any]:
    """Load the model and the image processor of a repository, with its code.

    The model is a classifier or an encoder.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": True}
    architectures = AutoConfig.from_pretrained(source, **options).architectures or []
    is_classifier = any("Classification" in name for name in architectures)
    auto_class: Any = AutoModelForImageClassification if is_classifier else AutoModel
    model = auto_class.from_pretrained(
        source, **options, **({} if is_classifier else {"add_pooling_layer": False})
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.eval().to(device), AutoImageProcessor.from_pretrained(source, **options)


def build_page(
    model: Any, processor: Any, title: str, examples: Sequence[str | Path] = ()
) -> gr.Blocks:
    """Build the page of a model."""
    classifiers = list_classifiers(model)
    names = get_token_names(model.config) if hasattr(model, "token_attention") else []
    num_layers = model.config.num_hidden_layers
    with gr.Blocks(
        title=title, analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as page:
        tokens_text = f"special tokens: {', '.join(names)}" if names else "without attention maps"
        gr.Markdown(f"# {title}\nA Vision Transformer with {num_layers} layers; {tokens_text}.")
        with gr.Row():
            with gr.Column():
                image_input = build_image_input()
                if examples:
                    gr.Examples([[str(file)] for file in examples], [image_input])
            with gr.Column(visible=bool(classifiers)):
                panels = [build_panel(name) for name in classifiers]
        layer = gr.Slider(
            1, num_layers, value=num_layers, step=1, label="Layer", visible=bool(names)
        )
        gallery = gr.Gallery(
            label="Attention of the special tokens",
            height="auto",
            object_fit="contain",
            format="png",
            buttons=["download", "fullscreen"],
            visible=bool(names),
            elem_id="maps",
        )

        def predict(file: dict[str, Any] | None, layer_number: float) -> list[Any]:
            if file is None:
                return [None] * len(panels) + [[]]
            layer_index = read_layer(layer_number, num_layers) if names else 0
            image = read_uploaded_image(processor, file, examples, image_input.GRADIO_CACHE)
            pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
            predictions = compute_predictions(model, pixel_values) if panels else []
            pictures = []
            if names:
                pictures = draw_attention(model, processor, pixel_values, layer_index)
            captions = [IMAGE_CAPTION, *names][: len(pictures)]
            return [*predictions, list(zip(pictures, captions, strict=True))]

        outputs = [*panels, gallery]
        for name, event in (("predict", image_input.change), (None, layer.release)):
            visibility = "public" if name else "private"
            event(
                predict,
                [image_input, layer],
                outputs,
                api_name=name,
                api_visibility=visibility,
                preprocess=False,
            )
    return page


def list_classifiers(model: Any) -> list[str]:
    """Return the names of a model's classifiers, in the order of `compute_predictions`.

    An encoder has none.
    """
    config = model.config
    if "Classification" not in (config.architectures or [type(model).__name__])[0]:
        return []
    names = list(config.task_labels())
    if not names and config.num_labels:
        names = ["Prediction"]
    return [*names, *config.get_added_tasks()]


def build_panel(name: str) -> gr.Label:
    """Build the panel of a classifier, which shows a `Prediction`."""
    panel = gr.Label(label=name, num_top_classes=NUM_LABELS)
    # As in `build_image_input`. Without it, gr.Label would always show the most probable label as
    # the result.
    panel.postprocess = show_prediction  # type: ignore[method-assign,assignment]
    return panel


def show_prediction(prediction: Prediction | None) -> LabelData | dict[str, Any]:
    """Return the contents of a panel."""
    if prediction is None:
        return {}
    probabilities = prediction.probabilities
    most_probable = sorted(probabilities, key=lambda name: probabilities[name], reverse=True)
    confidences = [
        LabelConfidence(label=name, confidence=probabilities[name])
        for name in most_probable[:NUM_LABELS]
    ]
    return LabelData(label=prediction.answer, confidences=confidences or None)


def read_layer(number: Any, num_layers: int) -> int:
    """Return the index of the layer with a number from 1. Raise gr.Error for any other value."""
    if number not in range(1, num_layers + 1):
        message = f"the layer must be a whole number from 1 to {num_layers}, not {number!r:.20}"
        raise gr.Error(message, print_exception=False)
    return int(number) - 1


def build_image_input() -> gr.Image:
    """Build the image input.

    A client can send any path or URL: URLs, which gradio would download to the server, are rejected
    here, and paths in `read_uploaded_image`.
    """
    image_input = gr.Image(
        label="Image",
        type="filepath",
        sources=["upload", "clipboard"],
        height=360,
        elem_id="photo",
    )
    cache_file = image_input.async_move_resource_to_block_cache

    async def cache_uploaded_file(path_or_url: str | Path | None) -> str | None:
        if str(path_or_url).startswith(("http:", "https:")):
            raise gr.Error(UPLOAD_REQUIRED, print_exception=False)
        return await cache_file(path_or_url)

    # The method is replaced on the instance, because gradio writes a .pyi file for each subclass of
    # gr.Image.
    image_input.async_move_resource_to_block_cache = cache_uploaded_file  # type: ignore[method-assign,assignment]
    return image_input


def read_uploaded_image(
    processor: Any, file: dict[str, Any], examples: Sequence[str | Path], cache: str
) -> Any:
    """Read an image that was uploaded to this page, or an example.

    Raise gr.Error for all other files, and for files that are not images.
    """
    path = file.get("path")
    resolved = os.path.realpath(path) if isinstance(path, str) and "\0" not in path else ""
    is_allowed = resolved in map(os.path.realpath, examples) or Path(resolved).is_relative_to(
        os.path.realpath(cache)
    )
    if not (resolved and is_allowed and Path(resolved).is_file()):
        raise gr.Error(UPLOAD_REQUIRED, print_exception=False)
    try:
        return processor.fetch_images(resolved)
    except ValueError as error:
        message = str(error).replace(resolved, file.get("orig_name") or "the file")
        raise gr.Error(message, print_exception=False) from None


@torch.no_grad()
def compute_predictions(model: Any, pixel_values: torch.Tensor) -> list[Prediction]:
    """Return the prediction of each classifier (`list_classifiers`) for an image [1, C, H, W]."""
    config = model.config
    outputs = model(pixel_values)
    predictions = []
    for task, labels in config.task_labels().items():
        predictions.append(build_prediction(outputs.logits[task], labels))
    if not config.tasks and config.num_labels:
        labels = [config.id2label[index] for index in range(config.num_labels)]
        problem_type = config.problem_type
        if config.num_labels == 1 and problem_type != "regression":  # as in transformers' pipelines
            problem_type = "multi_label_classification"
        threshold = (
            None if problem_type == "multi_label_classification" else config.energy_threshold
        )
        predictions.append(build_prediction(outputs.logits, labels, problem_type, threshold))
    for name, head in config.get_added_tasks().items():
        logits = outputs.task_logits[name]
        predictions.append(build_prediction(logits, head.labels, head.problem_type, head.threshold))
    return predictions


def build_prediction(
    logits: torch.Tensor,
    labels: list[str],
    problem_type: str | None = None,
    threshold: float | None = None,
) -> Prediction:
    """Build the prediction of a classifier.

    Args:
        logits: The logits [1, labels], which the model has divided by its temperature.
        labels: The label names.
        problem_type: As in the configuration. Default: one label per image.
        threshold: The energy above which an image shows none of the labels; for several labels per
            image, the probability from which a label is predicted.
    """
    values = logits[0].float().cpu()
    if problem_type == "regression":
        pairs = zip(labels, values.tolist(), strict=True)
        return Prediction(", ".join(f"{label}: {value:.4g}" for label, value in pairs), {})
    if problem_type == "multi_label_classification":
        probabilities = dict(zip(labels, values.sigmoid().tolist(), strict=True))
        minimum = MIN_PROBABILITY if threshold is None else threshold
        predicted = [label for label in labels if probabilities[label] >= minimum]
        return Prediction(", ".join(predicted) or NONE_OF_THESE, probabilities)
    probabilities = dict(zip(labels, values.softmax(dim=0).tolist(), strict=True))
    energy = -values.logsumexp(dim=0).item()
    if threshold is not None and energy > threshold:
        return Prediction(NONE_OF_THESE, probabilities)
    return Prediction(max(probabilities, key=lambda label: probabilities[label]), probabilities)


@torch.no_grad()
def draw_attention(
    model: Any, processor: Any, pixel_values: torch.Tensor, layer: int
) -> list[Image.Image]:
    """Draw the image [1, C, H, W], and the attention of each special token in a layer over it.

    Layers are counted from 0, and attention is averaged over heads. All images have the same
    size.
    """
    attention = model.token_attention(pixel_values, layers=[layer])[0, 0]  # [head, token, key]
    attention = attention.float().mean(0).cpu()
    height, width = pixel_values.shape[-2:]
    patches = attention[:, model.config.token_layout.patches]
    maps = patches.unflatten(1, model.config.get_grid_size((height, width)))
    scale = max(1, round(MIN_SIDE / max(height, width)))
    picture = undo_normalization(processor, pixel_values).resize((width * scale, height * scale))
    return [picture, *(overlay_map(picture, each / each.max().clamp(min=1e-12)) for each in maps)]


def undo_normalization(processor: Any, pixel_values: torch.Tensor) -> Image.Image:
    """Return the preprocessed image [1, C, H, W] as an RGB image."""
    pixels = pixel_values[0].float().cpu()
    if processor.do_normalize:
        mean, std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (processor.image_mean, processor.image_std)
        )
        pixels = pixels * std + mean
    pixels = (pixels if processor.do_rescale else pixels / 255).clamp(0, 1).expand(3, -1, -1)
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def overlay_map(picture: Image.Image, values: torch.Tensor) -> Image.Image:
    """Draw a map [rows, columns] of values from 0 to 1 over an image. Each patch has one color."""
    colors = colormaps[COLORMAP](values.numpy())[..., :3]
    heat = Image.fromarray((colors * 255).round().astype(np.uint8)).resize(
        picture.size, Image.Resampling.NEAREST
    )
    return Image.blend(picture, heat, OPACITY)
