"""Report on one image: predictions of the model, and attention maps of the special tokens.

Statistics over many images are in token_statistics.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..configuration_vitcls import ViTCLSConfig
from ..data.fit import VisibleRegion, get_visible_region
from ..data.labels import get_label_space, is_multi_label
from ..inference.prediction_rows import Label, select_probable_labels, select_top_labels
from .attribution import trace_attention
from .maps import extract_patch_maps, to_upright_rgb
from .model_utils import is_classifier, unwrap_model
from .patch_features import arrange_patch_features


MAX_LABELS = 3  # maximum number of labels shown per prediction
# Kinds of images and their headings in the report, in display order.
IMAGE_KINDS = {"wrong": "wrong predictions", "uncertain": "least confident", "typical": "typical"}


@dataclass(frozen=True)
class ImagePrediction:
    """Prediction of a model, or of one task of a multi-task model, for an image."""

    task: str | None
    labels: list[Label]  # in order of decreasing probability; empty if a multi-label model predicts no label
    top_label: str  # the most probable label, even if a multi-label model does not predict it


@dataclass(frozen=True)
class ImageReport:
    """Predictions and maps of one image. Shapes: L layers, H heads, S special tokens, gh x gw patches.

    Attributes:
        name: name of the image.
        image: the image, upright and in RGB.
        visible_region: the region of the image that the patches cover.
        truth: true label as text; None if unknown.
        predictions: one prediction, or one per task; empty for an encoder.
        attention: [L, H, S, gh, gw], attention of each special token to the patches.
        rollout: [S, gh, gw], attention rollout through all layers (`compute_attention_rollout`).
        attributions: [gh, gw] for each prediction, attribution of the most probable label (`compute_attribution`).
        features: [L, gh, gw, D], hidden states of the patches after each layer, before the final norm.
        kind: reason why the image is shown, one of IMAGE_KINDS; None if the image was not selected by its prediction.
    """

    name: str
    image: Image.Image
    visible_region: VisibleRegion
    truth: str | None
    predictions: list[ImagePrediction]
    attention: torch.Tensor
    rollout: torch.Tensor
    attributions: list[torch.Tensor]
    features: torch.Tensor
    kind: str | None = None


def build_image_report(
    model: Any,
    processor: Any,
    image: Image.Image,
    name: str = "",
    truth: str | None = None,
    kind: str | None = None,
) -> ImageReport:
    """Run the model once on an image, and return the predictions, maps and patch features of the image.

    Args:
        name: name of the image in the report.
        truth: true label as text; None if unknown.
        kind: reason why the image is shown, one of IMAGE_KINDS.

    Raises:
        ValueError: if the processor or the model does not accept the image.
    """
    model = unwrap_model(model)
    config: ViTCLSConfig = model.config
    pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device)  # [1, C, H, W]
    upright_image = to_upright_rgb(image)
    trace = trace_attention(model, pixel_values, needs_gradients=is_classifier(model))
    predictions = build_image_predictions(trace.outputs.logits, config) if is_classifier(model) else []

    def extract_maps(rows: torch.Tensor) -> torch.Tensor:
        return extract_patch_maps(rows.float().cpu(), config, (pixel_values.shape[-2], pixel_values.shape[-1]))

    image_size = (upright_image.height, upright_image.width)
    return ImageReport(
        name=name,
        image=upright_image,
        visible_region=get_visible_region(processor, image_size, config.patch_height_width),
        truth=truth,
        predictions=predictions,
        attention=extract_maps(trace.compute_token_attention()[0]),
        rollout=extract_maps(trace.compute_rollout()[0]),
        attributions=[extract_maps(trace.compute_attribution(task=prediction.task)[0]) for prediction in predictions],
        features=arrange_patch_features(trace.outputs.hidden_states, model.base_model, pixel_values)[0].detach(),
        kind=kind,
    )


def build_image_predictions(logits: Any, config: ViTCLSConfig) -> list[ImagePrediction]:
    """Return the predictions for the logits [1, labels] of one image, or for a dictionary of logits by task."""
    names_by_task = config.task_labels() if config.tasks else {None: get_label_space(config).names}
    predictions = []
    for task, names in names_by_task.items():
        task_logits = logits if task is None else logits[task]
        (most_probable_labels,) = select_top_labels(task_logits, names, MAX_LABELS)
        (labels,) = select_probable_labels(task_logits, names) if is_multi_label(config) else [most_probable_labels]
        predictions.append(ImagePrediction(task, labels, top_label=most_probable_labels[0][0]))
    return predictions
