"""The model of the demo: predictions for an image, and the attention of the special tokens.

    demo_model = DemoModel.load("someone/model", revision)
    result = demo_model.predict("cat.jpg")
    result.predictions                                    # {"Label": {"cat": 0.9, ...}}
    result.draw_attention(token=0, layer=2, head=None)    # the image overlaid with the attention map

Models are loaded with the Auto classes, so the model code may come from the repository of the checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass
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
    VisibleRegion,
    count_used_layers,
    extract_patch_maps,
    get_head_names,
    get_visible_region,
    overlay,
    resize_with_region,
)
from ..analysis.patch_features import (
    arrange_patch_features,
    compute_patch_colors,
    compute_patch_similarity,
    draw_patch_colors,
)
from ..token_names import get_token_names


MODEL_TYPE = "vitcls"
MAX_IMAGE_SIDE = 1024  # maximum length of the longer side of an image in pixels
MIN_IMAGE_SIDE = 384  # minimum length of the longer side of a displayed image in pixels
THUMBNAIL_SIDE = 320  # maximum length of the longer side of a small map in pixels

Prediction = dict[str, float] | str  # label -> probability, or regression values as text


@dataclass(frozen=True)
class DemoResult:
    """Output of a model for one image; gh and gw are the height and width of the patch grid.

    `rows`, `maps` and `features` have 0 layers if the model merges patches.
    """

    image: Image.Image  # upright, at most MAX_IMAGE_SIDE pixels per side
    visible_region: VisibleRegion  # the region of the image that the patches cover
    predictions: dict[str, Prediction]  # output name -> prediction; empty for an encoder
    rows: torch.Tensor  # [layer, head, special token, key], attention of the special tokens, float32
    maps: torch.Tensor  # [layer, head, special token, gh, gw], attention to patches
    rollout: torch.Tensor  # [special token, gh, gw], attention to patches through all layers
    attributions: dict[str, torch.Tensor]  # most probable label of each output -> contribution of each patch [gh, gw]
    features: torch.Tensor  # [layer, gh, gw, channel], patch features after each layer, float16

    def draw_attention(self, token: int, layer: int, head: int | None) -> Image.Image:
        """Draw the attention of a token in a layer over the image. If `head` is None, the mean over heads is drawn."""
        values = select_head(self.maps[layer], head)[token]
        return overlay(self.image, values, self.visible_region, min_side=MIN_IMAGE_SIDE)

    def draw_all_layers(self, token: int, head: int | None) -> list[Image.Image]:
        """Draw small maps of all layers; each map has its own scale."""
        size_limits: dict[str, Any] = {"max_side": THUMBNAIL_SIDE, "min_side": THUMBNAIL_SIDE // 2}
        layer_maps = [select_head(maps, head)[token] for maps in self.maps]
        return [overlay(self.image, values, self.visible_region, **size_limits) for values in layer_maps]

    def draw_through_layers(self, token: int) -> list[tuple[Image.Image, str]]:
        """Return (image, name) pairs for the rollout of a token and the attribution of each prediction."""
        maps = {"rollout through all layers": self.rollout[token]}
        maps |= {f"attribution of {label}": values for label, values in self.attributions.items()}
        size_limits: dict[str, Any] = {"max_side": MAX_IMAGE_SIDE, "min_side": MIN_IMAGE_SIDE}
        return [
            (overlay(self.image, values, self.visible_region, **size_limits), name) for name, values in maps.items()
        ]

    def draw_colors(self, layer: int, foreground_only: bool = False) -> Image.Image:
        """Draw the principal components of the patch features after a layer as colors."""
        (colors,) = compute_patch_colors([self.features[layer].float()], foreground_only)
        return draw_patch_colors(self.image, colors, self.visible_region, min_side=MIN_IMAGE_SIDE)

    def draw_similarity(self, layer: int, row: int, column: int) -> Image.Image:
        """Draw the cosine similarity of all patch features after a layer to the features of one patch. Values of 0 or
        less are dark."""
        similarity = compute_patch_similarity(self.features[layer].float(), row, column).clamp(min=0)
        return overlay(self.image, similarity, self.visible_region, max_value=1, min_side=MIN_IMAGE_SIDE)

    def find_patch(self, x: float, y: float, width: int, height: int) -> tuple[int, int] | None:
        """Return the row and column of the patch at pixel (x, y) of the image, displayed at `width` x `height` pixels;
        None if the pixel is outside the visible region."""
        left, top, right, bottom = self.visible_region
        x_fraction = (x / width * self.image.width - left) / (right - left)
        y_fraction = (y / height * self.image.height - top) / (bottom - top)
        if not (0 <= x_fraction < 1 and 0 <= y_fraction < 1):
            return None
        rows, columns = self.features.shape[1:3]
        return int(y_fraction * rows), int(x_fraction * columns)

    def compute_attention_fractions(self, token: int, layer: int, head: int | None) -> list[float]:
        """Return the fractions of a token's attention to each special token, followed by the fraction to all patches.
        The fractions sum to 1."""
        row = select_head(self.rows[layer], head)[token]  # [key]
        special_fractions = row[: self.rows.shape[2]]
        return [*special_fractions.tolist(), 1 - special_fractions.sum().item()]


def select_head(heads: torch.Tensor, head: int | None) -> torch.Tensor:
    """Return one head of an array [head, ...], or the mean over heads if `head` is None."""
    return heads.mean(dim=0) if head is None else heads[head]


@dataclass(frozen=True)
class DemoModel:
    """A model with its image processor and provenance."""

    model: Any
    processor: Any
    source: str  # folder or Hub id
    commit: str | None  # commit hash of the repository; None for a folder
    code_revision: str | None  # requested revision of the code, if the code is in a separate repository
    is_classifier: bool

    @classmethod
    def load(cls, source: str, revision: str | None = None, code_revision: str | None = None) -> "DemoModel":
        """Load a vitcls checkpoint: a classifier if the checkpoint contains a classifier, otherwise the encoder.

        Args:
            source: a folder or a Hub id. If this package is not installed, the code in the repository is executed. Pin
                a revision for safety.
            revision: commit hash, branch or tag.
            code_revision: commit hash, branch or tag of the code, if the code is in a separate repository.

        Raises:
            ValueError, OSError: if the checkpoint has a different model type, is not found, or cannot be read. The
                message is one line.
        """
        commit = resolve_commit(source, revision)
        config_dict = load_checkpoint(PreTrainedConfig.get_config_dict, source, revision=commit)[0]
        if (model_type := config_dict.get("model_type")) != MODEL_TYPE:
            raise ValueError(
                f"The demo requires a {MODEL_TYPE!r} checkpoint, but {source} has model type {model_type!r}. Convert "
                "the checkpoint with `vitcls convert`."
            )
        options: dict[str, Any] = {"revision": commit, "trust_remote_code": True}
        options |= {"code_revision": code_revision} if code_revision else {}
        is_classifier = any("Classification" in name for name in config_dict.get("architectures") or ())
        auto_class: Any = AutoModelForImageClassification if is_classifier else AutoModel
        encoder_options = {} if is_classifier else {"add_pooling_layer": False}
        model, loading_info = load_checkpoint(
            auto_class.from_pretrained, source, output_loading_info=True, **options, **encoder_options
        )
        if loading_info["missing_keys"]:
            raise ValueError(
                f"The checkpoint {source} has no weights for {min(loading_info['missing_keys'])}. Train the model "
                "first."
            )
        processor = load_checkpoint(AutoImageProcessor.from_pretrained, source, **options)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        demo_model = cls(model.eval().to(device), processor, source, commit, code_revision, is_classifier)
        demo_model.check_is_supported()
        return demo_model

    def check_is_supported(self) -> None:
        """Raise ValueError if the demo does not support the model."""
        if self.model.config.num_channels not in (1, 3):
            raise ValueError(
                f"The demo requires images with 1 or 3 channels, but {self.source} requires images "
                f"with {self.model.config.num_channels} channels."
            )
        if not self.has_labels and self.merges_patches:
            raise ValueError(
                f"The demo requires labels or unmerged patches, but {self.source} has no labels and merges patches. "
                "Set merged_patches_per_layer=0."
            )

    @property
    def has_labels(self) -> bool:
        """Return whether the model predicts labels or regression values."""
        return self.is_classifier and bool(self.model.config.tasks or self.model.config.num_labels)

    @property
    def tokens(self) -> list[str]:
        """Return the names of the special tokens."""
        return get_token_names(self.model.config)

    @property
    def merges_patches(self) -> bool:
        """Return whether the model merges patches, in which case attention is not available."""
        # The field is missing in the configurations of older repositories.
        return bool(getattr(self.model.config, "merged_patches_per_layer", 0))

    @property
    def num_layers(self) -> int:
        """Return the number of layers."""
        return self.model.config.num_hidden_layers

    @property
    def heads(self) -> list[str]:
        """Return the names of the attention maps of a layer."""
        return get_head_names(self.model.config)

    @property
    def output_names(self) -> list[str]:
        """Return the names of the predictions: one name, or one name per task."""
        if not self.has_labels:
            return []
        return list(self.model.config.task_labels()) or [get_prediction_format(self.model.config)[0]]

    @property
    def has_top_label(self) -> bool:
        """Return whether a prediction is displayed with a heading; False for separate probabilities."""
        config = self.model.config
        return bool(config.tasks) or get_prediction_format(config)[1] is not get_sigmoid_scores

    def predict(self, file: str | Path) -> DemoResult:
        """Run the model on an image.

        Raises:
            ValueError: if the file is not an image, or if the model does not accept the image. The message is one
                line.
        """
        config = self.model.config
        image = self.processor.fetch_images(str(file))  # upright
        if config.num_channels == 1:
            image = to_grayscale(image)
        pixel_values = self.processor(image, return_tensors="pt")["pixel_values"].to(self.model.device)
        visible_region = get_visible_region(self.processor, image.size[::-1], config.patch_height_width)
        image_and_region = resize_with_region(image, visible_region, MAX_IMAGE_SIDE, min_side=None)
        return DemoResult(*image_and_region, **self.run_model(pixel_values))

    def run_model(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        """Run the model once on an image [1, C, H, W]; return `predictions` and the subsequent fields of
        `DemoResult`."""
        config, encoder = self.model.config, self.model.base_model
        grid_size = encoder.embeddings.patch_embeddings.get_grid_size(pixel_values)

        def extract_maps(rows: torch.Tensor) -> torch.Tensor:
            return extract_patch_maps(rows, config, (pixel_values.shape[-2], pixel_values.shape[-1]))

        if self.merges_patches:
            with torch.inference_mode():
                predictions = get_predictions(self.model(pixel_values).logits, config)
            rows = torch.empty(0, len(self.heads), len(self.tokens), config.token_layout.get_num_tokens(*grid_size))
            return {
                "predictions": predictions,
                "rows": rows,
                "maps": extract_maps(rows),
                "rollout": torch.empty(0, *grid_size),
                "attributions": {},
                "features": torch.empty(0, *grid_size, config.hidden_size),
            }
        trace = trace_attention(self.model, pixel_values, needs_gradients=self.has_labels)
        predictions, attributions = {}, {}
        if self.has_labels:
            predictions = get_predictions(trace.outputs.logits, config)
            for task, logits in trace.outputs.logits.items() if config.tasks else [(None, trace.outputs.logits)]:
                best_index = int(logits[0].argmax())
                label = (
                    config.id2label[best_index]
                    if task is None
                    else f"{task}: {config.task_labels()[task][best_index]}"
                )
                attributions[label] = extract_maps(trace.compute_attribution(best_index, task)[0].float().cpu())
        rows = trace.compute_token_attention()[0].float().cpu()
        return {
            "predictions": predictions,
            "rows": rows,
            "maps": extract_maps(rows),
            "rollout": extract_maps(trace.compute_rollout()[0].float().cpu()),
            "attributions": attributions,
            "features": arrange_patch_features(trace.outputs.hidden_states, encoder, pixel_values)[0].detach().half(),
        }

    def is_read(self, token: int, layer: int) -> bool:
        """Return whether the model uses the output of a special token in a layer."""
        return layer < count_used_layers(self.model.config, self.has_labels)[token]


def resolve_commit(source: str, revision: str | None) -> str | None:
    """Return the commit hash of a Hub repository at a revision; None for a folder."""
    if Path(source).is_dir():
        return None
    file = load_checkpoint(cached_file, source, "config.json", revision=revision)
    return Path(file).parent.name  # cached files are in one folder per commit


def to_grayscale(image: Image.Image) -> Image.Image:
    """Convert an image to grayscale, keeping transparency. Grayscale images are returned unchanged."""
    if image.mode != "P" and len(image.getbands()) < 3:
        return image
    return image.convert("LA" if image.has_transparency_data else "L")


# Predictions ---------------------------------------------------------------------------------------------------------


def get_softmax_scores(logits: torch.Tensor, names: list[str]) -> Prediction:
    """Return a dict from labels to probabilities for logits [labels]. The probabilities sum to 1."""
    return dict(zip(names, logits.softmax(dim=0).tolist(), strict=True))


def get_sigmoid_scores(logits: torch.Tensor, names: list[str]) -> Prediction:
    """Return a dict from labels to probabilities for logits [labels]. The probabilities are independent."""
    return dict(zip(names, logits.sigmoid().tolist(), strict=True))


def format_values(values: torch.Tensor, names: list[str]) -> Prediction:
    """Return the values [labels] of a regression model as text."""
    return ", ".join(f"{name}: {value:.4g}" for name, value in zip(names, values.tolist(), strict=True))


# Problem type -> title of the predictions, and the function that formats the logits.
PREDICTION_FORMATS: dict[str | None, tuple[str, Callable[[torch.Tensor, list[str]], Prediction]]] = {
    None: ("Label", get_softmax_scores),
    "single_label_classification": ("Label", get_softmax_scores),
    "multi_label_classification": ("Labels with separate probabilities", get_sigmoid_scores),
    "regression": ("Regression values", format_values),
}


def get_prediction_format(config: Any) -> tuple[str, Callable[[torch.Tensor, list[str]], Prediction]]:
    """Return the title and the formatting function for predictions of a model without tasks. A model with a single
    label is treated as a binary classifier, as in transformers' pipelines."""
    if config.num_labels == 1 and config.problem_type != "regression":
        return PREDICTION_FORMATS["multi_label_classification"]
    return PREDICTION_FORMATS[config.problem_type]


def get_predictions(logits: Any, config: Any) -> dict[str, Prediction]:
    """Return a dict from names to predictions for the logits of one image, [1, labels] or {task: [1, labels]}."""
    if config.tasks:
        task_labels = config.task_labels()
        return {task: get_softmax_scores(logits[task][0].float().cpu(), task_labels[task]) for task in task_labels}
    title, format_prediction = get_prediction_format(config)
    names = [config.id2label[index] for index in range(config.num_labels)]
    return {title: format_prediction(logits[0].float().cpu(), names)}
