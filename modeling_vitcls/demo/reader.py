"""Model of the demo page: predictions for an image, and the attention of the special tokens.

    demo_model = DemoModel.load("someone/model", revision)
    result = demo_model.predict("cat.jpg")
    result.predictions                                    # {"Label": {"cat": 0.9, ...}}
    result.draw_attention(token=0, layer=2, head=None)    # the image overlaid with the attention map

Models are loaded with the Auto classes, which may execute code from the repository of the checkpoint.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import cached_file

from ..adaptation_vitcls import load_checkpoint
from ..analysis.attribution import trace_attention
from ..analysis.maps import (
    count_used_layers,
    extract_patch_maps,
    get_head_names,
    overlay,
    resize_with_region,
)
from ..analysis.patch_features import (
    arrange_patch_features,
    compute_patch_colors,
    compute_patch_similarity,
    draw_patch_colors,
)
from ..data.fit import VisibleRegion, get_visible_region
from ..token_names import get_token_names


MODEL_TYPE = "vitcls"
MAX_IMAGE_SIDE = 1024  # maximum length of the longer side of a displayed image, in pixels
MIN_IMAGE_SIDE = 384  # minimum length of the longer side of a displayed image, in pixels
THUMBNAIL_SIDE = 320  # maximum length of the longer side of a small map, in pixels

EMPTY = torch.empty(0)
Prediction = dict[str, float] | str  # label -> probability, or regression values as text


@dataclass(frozen=True)
class DemoResult:
    """Output of a model for one image. gh and gw are the height and width of the patch grid."""

    image: Image.Image  # upright, at most MAX_IMAGE_SIDE pixels per side
    visible_region: VisibleRegion  # region of the image that the patches cover
    predictions: dict[str, Prediction]  # output name -> prediction; empty for an encoder
    token_attention: torch.Tensor = EMPTY  # [layer, head, special token, key], attention of special tokens, float32
    attention_maps: torch.Tensor = EMPTY  # [layer, head, special token, gh, gw], attention to patches
    rollout: torch.Tensor = EMPTY  # [special token, gh, gw], attention rollout over all layers
    # Most probable label of each output -> attribution of each patch [gh, gw].
    attributions: dict[str, torch.Tensor] = field(default_factory=dict)
    patch_features: torch.Tensor = EMPTY  # [layer, gh, gw, channel], after each layer, float16

    def draw_attention(self, token: int, layer: int, head: int | None) -> Image.Image:
        """Draw the attention map of a token in a layer over the image. If `head` is None, draw the mean over heads."""
        values = select_head(self.attention_maps[layer], head)[token]
        return overlay(self.image, values, self.visible_region, min_side=MIN_IMAGE_SIDE)

    def draw_all_layers(self, token: int, head: int | None) -> list[Image.Image]:
        """Draw a small attention map for each layer. Each map has its own color scale."""
        size_limits: dict[str, Any] = {"max_side": THUMBNAIL_SIDE, "min_side": THUMBNAIL_SIDE // 2}
        layer_maps = [select_head(maps, head)[token] for maps in self.attention_maps]
        return [overlay(self.image, values, self.visible_region, **size_limits) for values in layer_maps]

    def draw_rollout_and_attributions(self, token: int) -> list[tuple[Image.Image, str]]:
        """Draw the rollout of a token and the attribution of each prediction. Return (image, name) pairs."""
        maps = {"rollout through all layers": self.rollout[token]}
        maps |= {f"attribution of {label}": values for label, values in self.attributions.items()}
        size_limits: dict[str, Any] = {"max_side": MAX_IMAGE_SIDE, "min_side": MIN_IMAGE_SIDE}
        return [
            (overlay(self.image, values, self.visible_region, **size_limits), name) for name, values in maps.items()
        ]

    def draw_principal_components(self, layer: int, foreground_only: bool = False) -> Image.Image:
        """Draw the principal components of the patch features after a layer as colors."""
        (colors,) = compute_patch_colors([self.patch_features[layer].float()], foreground_only)
        return draw_patch_colors(self.image, colors, self.visible_region, min_side=MIN_IMAGE_SIDE)

    def draw_similarity(self, layer: int, row: int, column: int) -> Image.Image:
        """Draw the cosine similarity of all patches to one patch, based on the features after a layer. Values of 0 or
        less are dark."""
        similarity = compute_patch_similarity(self.patch_features[layer].float(), row, column).clamp(min=0)
        return overlay(self.image, similarity, self.visible_region, max_value=1, min_side=MIN_IMAGE_SIDE)

    def find_patch(self, x: float, y: float, width: int, height: int) -> tuple[int, int] | None:
        """Return the row and column of the patch at pixel (x, y) of the image, which is displayed at `width` x
        `height` pixels. Return None if the pixel is outside the visible region."""
        left, top, right, bottom = self.visible_region
        x_fraction = (x / width * self.image.width - left) / (right - left)
        y_fraction = (y / height * self.image.height - top) / (bottom - top)
        if not (0 <= x_fraction < 1 and 0 <= y_fraction < 1):
            return None
        rows, columns = self.patch_features.shape[1:3]
        return int(y_fraction * rows), int(x_fraction * columns)

    def compute_attention_fractions(self, token: int, layer: int, head: int | None) -> list[float]:
        """Return the fraction of a token's attention to each special token and, as the last element, to all patches.
        The fractions sum to 1."""
        fractions = select_head(self.token_attention[layer], head)[token]  # [key]
        special_token_fractions = fractions[: self.token_attention.shape[2]]
        return [*special_token_fractions.tolist(), 1 - special_token_fractions.sum().item()]


def select_head(attention: torch.Tensor, head: int | None) -> torch.Tensor:
    """Return the attention of one head from a tensor [head, ...], or the mean over heads if `head` is None."""
    return attention.mean(dim=0) if head is None else attention[head]


@dataclass(frozen=True)
class DemoModel:
    """Model with its image processor and provenance."""

    model: Any
    processor: Any
    source: str  # folder or Hub id
    commit: str | None  # commit hash of the repository; None for a folder
    code_revision: str | None  # requested revision of the code, if the code is in a separate repository
    is_classifier: bool

    @classmethod
    def load(cls, source: str, revision: str | None = None, code_revision: str | None = None) -> "DemoModel":
        """Load a vitcls checkpoint: a classifier if the checkpoint contains a classifier, otherwise the encoder.

        If this package is not installed, the code in the repository is executed. For safety, set `revision` to a
        commit hash. `code_revision` is the revision of the code, if the code is in a separate repository. Raise
        ValueError or OSError with a one-line message if the checkpoint cannot be read, or if the demo does not support
        the model.
        """
        commit = resolve_commit(source, revision)
        config_dict = load_checkpoint(PreTrainedConfig.get_config_dict, source, revision=commit)[0]
        if (model_type := config_dict.get("model_type")) != MODEL_TYPE:
            raise ValueError(
                f"The demo requires a {MODEL_TYPE!r} checkpoint, but {source} has model type {model_type!r}. Convert "
                "the checkpoint with `vitcls convert`."
            )
        load_options: dict[str, Any] = {"revision": commit, "trust_remote_code": True}
        load_options |= {"code_revision": code_revision} if code_revision else {}
        is_classifier = any("Classification" in name for name in config_dict.get("architectures") or ())
        auto_class: Any = AutoModelForImageClassification if is_classifier else AutoModel
        encoder_options = {} if is_classifier else {"add_pooling_layer": False}
        model, loading_info = load_checkpoint(
            auto_class.from_pretrained, source, output_loading_info=True, **load_options, **encoder_options
        )
        if loading_info["missing_keys"]:
            raise ValueError(
                f"The checkpoint {source} has no weights for {min(loading_info['missing_keys'])}. Train the model "
                "first."
            )
        processor = load_checkpoint(AutoImageProcessor.from_pretrained, source, **load_options)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        demo_model = cls(model.eval().to(device), processor, source, commit, code_revision, is_classifier)
        demo_model.check_is_supported()
        return demo_model

    def check_is_supported(self) -> None:
        """Raise ValueError if the demo does not support the model."""
        if self.config.num_channels not in (1, 3):
            raise ValueError(
                f"The demo requires images with 1 or 3 channels, but {self.source} requires images "
                f"with {self.config.num_channels} channels."
            )

    @property
    def config(self) -> Any:
        """Return the configuration of the model."""
        return self.model.config

    @property
    def has_labels(self) -> bool:
        """Return whether the model predicts labels or regression values."""
        return self.is_classifier and bool(self.config.tasks or self.config.num_labels)

    @property
    def token_names(self) -> list[str]:
        """Return the names of the special tokens."""
        return get_token_names(self.config)

    @property
    def head_names(self) -> list[str]:
        """Return the names of the attention heads of a layer."""
        return get_head_names(self.config)

    @property
    def output_names(self) -> list[str]:
        """Return the names of the outputs: one name per task, or a single name if there are no tasks."""
        if not self.has_labels:
            return []
        return list(self.config.task_labels()) or [PREDICTION_TITLES[get_problem_type(self.config)]]

    @property
    def has_top_label(self) -> bool:
        """Return whether each prediction has a heading: its most probable label, or its regression values."""
        return bool(self.config.tasks) or get_problem_type(self.config) != "multi_label_classification"

    def predict(self, file: str | Path) -> DemoResult:
        """Run the model on an image file. Raise ValueError if the file is not a supported image."""
        image = self.processor.fetch_images(str(file))  # upright
        if self.config.num_channels == 1:
            image = to_grayscale(image)
        pixel_values = self.processor(image, return_tensors="pt")["pixel_values"].to(self.model.device)
        visible_region = get_visible_region(self.processor, image.size[::-1], self.config.patch_height_width)
        image_and_region = resize_with_region(image, visible_region, MAX_IMAGE_SIDE, min_side=None)
        return DemoResult(*image_and_region, **self.run_model(pixel_values))

    def run_model(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        """Run the model on an image [1, C, H, W]. Return the fields of `DemoResult` except `image` and
        `visible_region`."""
        config = self.config

        def extract_maps(attention: torch.Tensor) -> torch.Tensor:
            return extract_patch_maps(attention, config, (pixel_values.shape[-2], pixel_values.shape[-1]))

        trace = trace_attention(self.model, pixel_values, needs_gradients=self.has_labels)
        predictions, attributions = {}, {}
        if self.has_labels:
            predictions = format_predictions(trace.outputs.logits, config)
            for task, logits in trace.outputs.logits.items() if config.tasks else [(None, trace.outputs.logits)]:
                best_index = int(logits[0].argmax())
                label = f"{task}: {config.task_labels()[task][best_index]}" if task else config.id2label[best_index]
                attributions[label] = extract_maps(trace.compute_attribution(best_index, task)[0].float().cpu())
        token_attention = trace.compute_token_attention()[0].float().cpu()
        patch_features = arrange_patch_features(trace.outputs.hidden_states, self.model.base_model, pixel_values)[0]
        return {
            "predictions": predictions,
            "token_attention": token_attention,
            "attention_maps": extract_maps(token_attention),
            "rollout": extract_maps(trace.compute_rollout()[0].float().cpu()),
            "attributions": attributions,
            "patch_features": patch_features.detach().half(),
        }

    def is_token_output_used(self, token: int, layer: int) -> bool:
        """Return whether the model uses the output of a special token in a layer."""
        return layer < count_used_layers(self.config, self.has_labels)[token]


def resolve_commit(source: str, revision: str | None) -> str | None:
    """Return the commit hash of a revision of a Hub repository; None for a folder."""
    if Path(source).is_dir():
        return None
    file = load_checkpoint(cached_file, source, "config.json", revision=revision)
    return Path(file).parent.name  # the cache has one folder per commit


def to_grayscale(image: Image.Image) -> Image.Image:
    """Convert an image to grayscale, keeping transparency. Grayscale images are returned unchanged."""
    if image.mode != "P" and len(image.getbands()) < 3:
        return image
    return image.convert("LA" if image.has_transparency_data else "L")


# Predictions ---------------------------------------------------------------------------------------------------------


# Problem type -> title of the predictions.
PREDICTION_TITLES = {
    None: "Label",
    "single_label_classification": "Label",
    "multi_label_classification": "Labels with independent probabilities",
    "regression": "Regression values",
}


def get_problem_type(config: Any) -> str | None:
    """Return the problem type of a single-task model. A classifier with one label is treated as a multi-label
    classifier (sigmoid), as in transformers' pipelines."""
    is_binary = config.num_labels == 1 and config.problem_type != "regression"
    return "multi_label_classification" if is_binary else config.problem_type


def format_predictions(logits: Any, config: Any) -> dict[str, Prediction]:
    """Convert logits [1, labels] or {task: [1, labels]} to a dict that maps output names to predictions."""
    if config.tasks:
        return {task: format_prediction(logits[task], names, None) for task, names in config.task_labels().items()}
    label_names = [config.id2label[index] for index in range(config.num_labels)]
    problem_type = get_problem_type(config)
    return {PREDICTION_TITLES[problem_type]: format_prediction(logits, label_names, problem_type)}


def format_prediction(logits: torch.Tensor, names: list[str], problem_type: str | None) -> Prediction:
    """Convert logits [1, labels] to a dict that maps labels to probabilities, or format regression values as text."""
    values = logits[0].float().cpu()
    if problem_type == "regression":
        return ", ".join(f"{name}: {value:.4g}" for name, value in zip(names, values.tolist(), strict=True))
    probabilities = values.sigmoid() if problem_type == "multi_label_classification" else values.softmax(dim=0)
    return dict(zip(names, probabilities.tolist(), strict=True))
