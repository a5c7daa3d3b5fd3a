"""Demo page, built with gradio: an image, its predictions, and the attention of each special token.

    serve_demo(model, processor, "runs/mine")       # serves the page until the process is stopped
    serve_demo(*load_from_hub("someone/model", COMMIT), "someone/model")    # in a Space

The page shows the image as the model sees it, after resizing and cropping. A Space contains this file and
inference/token_names.py; the model's own code computes the attention (`model.token_attention`).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification

from ..inference.token_names import get_token_names


# Disable usage statistics and the run history, which browsers store. gradio reads these variables on import or launch.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_RUN_HISTORY"] = "False"

import gradio as gr


UPLOAD_REQUIRED = "upload an image to this page, or select an example"
CACHE_SECONDS = 3600  # time until uploaded images are deleted
MIN_SIDE = 320  # minimum length of the longer side of a displayed image, in pixels
COLORMAP = "inferno"
OPACITY = 0.6  # largest opacity of the map over the image
# The page loads no fonts from other hosts.
FONTS: dict[str, Any] = {
    "font": ("system-ui", "sans-serif"),
    "font_mono": ("ui-monospace", "monospace"),
}

Prediction = dict[str, float] | str  # label -> probability, or regression values as text


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
        host: Host name of the server. Default: the environment variable GRADIO_SERVER_NAME, or localhost.
        port: Port of the server. Default: GRADIO_SERVER_PORT, or the first free port from 7860 upward.

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
    options |= {"theme": gr.themes.Default(**FONTS), "footer_links": ["gradio"]}
    try:
        _, address, _ = page.launch(server_name=host, server_port=port, **options)
    except OSError as error:  # gradio's message does not mention --port
        raise OSError(
            f"Cannot open port {port or '7860 or above'}. Set --port to a free port."
        ) from error
    print(f"{title}: {address}", flush=True)
    page.block_thread()


def load_from_hub(source: str, revision: str) -> tuple[Any, Any]:
    """Load the classifier or the encoder of a repository, and its image processor, with the code in the repository."""
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
    has_labels = "Classification" in (model.config.architectures or [type(model).__name__])[0]
    names = get_token_names(model.config) if hasattr(model, "token_attention") else []
    num_layers = model.config.num_hidden_layers
    with gr.Blocks(
        title=title, analytics_enabled=False, delete_cache=(CACHE_SECONDS, CACHE_SECONDS)
    ) as page:
        tokens_text = (
            f"with the special tokens {', '.join(names)}" if names else "without attention maps"
        )
        gr.Markdown(f"# {title}\nA Vision Transformer with {num_layers} layers, {tokens_text}.")
        with gr.Row():
            image_input = build_image_input()
            with gr.Column():
                output_names = (
                    (list(model.config.task_labels()) or ["Prediction"]) if has_labels else []
                )
                labels = [gr.Label(label=name, num_top_classes=5) for name in output_names]
        layer = gr.Slider(
            1, num_layers, value=num_layers, step=1, label="Layer", visible=bool(names)
        )
        gallery = gr.Gallery(
            label="Attention of the special tokens", visible=bool(names), elem_id="maps"
        )

        def predict(file: dict[str, Any] | None, layer_number: float) -> list[Any]:
            if file is None:
                return [None] * len(labels) + [[]]
            image = read_uploaded_image(processor, file, examples, image_input.GRADIO_CACHE)
            pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
            predictions = compute_predictions(model, pixel_values) if has_labels else []
            maps = (
                draw_attention(model, processor, pixel_values, int(layer_number) - 1)
                if names
                else []
            )
            return [*predictions, list(zip(maps, names, strict=True))]

        outputs = [*labels, gallery]
        if examples:
            gr.Examples([[str(file)] for file in examples], [image_input])
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


def build_image_input() -> gr.Image:
    """Build the image input. A client can send any path or URL: URLs, which gradio would download to the server, are
    rejected here, and paths in `read_uploaded_image`."""
    image_input = gr.Image(
        label="Image", type="filepath", sources=["upload", "clipboard"], height=360
    )
    cache_file = image_input.async_move_resource_to_block_cache

    async def cache_uploaded_file(path_or_url: str | Path | None) -> str | None:
        if str(path_or_url).startswith(("http:", "https:")):
            raise gr.Error(UPLOAD_REQUIRED)
        return await cache_file(path_or_url)

    # The method is replaced on the instance, because gradio writes a .pyi file for each subclass of gr.Image.
    image_input.async_move_resource_to_block_cache = cache_uploaded_file  # type: ignore[method-assign,assignment]
    return image_input


def read_uploaded_image(
    processor: Any, file: dict[str, Any], examples: Sequence[str | Path], cache: str
) -> Any:
    """Read an image that was uploaded to this page, or an example. Raise gr.Error for all other files, and for files
    that are not images."""
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
    """Return the prediction of each task (one if the model has no tasks) for an image [1, C, H, W]."""
    config, logits = model.config, model(pixel_values).logits
    if config.tasks:
        return [
            format_prediction(logits[task], labels, None)
            for task, labels in config.task_labels().items()
        ]
    labels = [config.id2label[index] for index in range(config.num_labels)]
    # as in transformers' pipelines
    is_binary = config.num_labels == 1 and config.problem_type != "regression"
    return [
        format_prediction(
            logits, labels, "multi_label_classification" if is_binary else config.problem_type
        )
    ]


def format_prediction(
    logits: torch.Tensor, labels: list[str], problem_type: str | None
) -> Prediction:
    """Convert logits [1, labels] to a dict that maps labels to probabilities, or format regression values as text."""
    values = logits[0].float().cpu()
    if problem_type == "regression":
        return ", ".join(
            f"{label}: {value:.4g}" for label, value in zip(labels, values.tolist(), strict=True)
        )
    probabilities = (
        values.sigmoid() if problem_type == "multi_label_classification" else values.softmax(dim=0)
    )
    return dict(zip(labels, probabilities.tolist(), strict=True))


@torch.no_grad()
def draw_attention(
    model: Any, processor: Any, pixel_values: torch.Tensor, layer: int
) -> list[Image.Image]:
    """Draw the attention of each special token in a layer, averaged over heads, over the image [1, C, H, W]."""
    # [token, key]
    (attention,) = model.token_attention(pixel_values, layers=[layer])[0].float().mean(1).cpu()
    height, width = pixel_values.shape[-2:]
    patch_height, patch_width = model.config.patch_height_width
    patches = attention[:, model.config.token_layout.num_prefix_tokens :]
    maps = patches.reshape(len(patches), height // patch_height, width // patch_width)
    picture = undo_normalization(processor, pixel_values)
    scale = max(1, round(MIN_SIDE / max(height, width)))
    size = (width * scale, height * scale)
    return [overlay_map(picture.resize(size), each / each.max().clamp(min=1e-12)) for each in maps]


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
