"""Report on one image: predictions, attention maps of the special tokens, and patch features.

Patches of one object have similar features and thus similar colors (Oquab et al. 2023, arXiv
2304.07193, figure 1). Features are hidden states before the final norm; models without special
tokens have patch features too. The sign of a principal component is arbitrary.

Statistics over many images are in token_statistics.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA

from ..data.aspect_ratio import VisibleRegion, get_visible_region
from ..data.labels import get_label_space, is_multi_label
from ..inference.prediction_rows import (
    DEFAULT_THRESHOLD,
    Label,
    select_probable_labels,
    select_top_labels,
)
from ..model.configuration_vitcls import ViTCLSConfig
from .attribution import trace_attention
from .maps import extract_patch_maps, to_upright_rgb
from .model_utils import is_classifier, unwrap_model
from .token_use import TokenUse


MAX_LABELS = 3  # maximum number of labels shown per prediction
NUM_COLOR_CHANNELS = 3  # number of color channels: red, green and blue
# Quantiles of a component that are drawn in the darkest and the brightest color; values beyond
# these quantiles are clipped.
COLOR_QUANTILES = 0.02, 0.98
# Kinds of images and their headings in the report, in display order.
IMAGE_KINDS = {"wrong": "wrong prediction", "uncertain": "least confident", "typical": "typical"}


@dataclass(frozen=True)
class ImagePrediction:
    """Prediction for an image: of a model, of one of its tasks, or of an added task."""

    task: str | None
    # in order of decreasing probability; empty if a multi-label model predicts no label
    labels: list[Label]
    top_label: str  # the most probable label, even if a multi-label model does not predict it


@dataclass(frozen=True)
class ImageReport:
    """Predictions and maps of one image.

    Shapes: L layers, H heads, S special tokens, gh x gw patches.

    Attributes:
        name: name of the image.
        image: the image, upright and in RGB.
        visible_region: the region of the image that the patches cover.
        truth: true label as text; None if unknown.
        predictions: one prediction, or one per task, and one per added task; empty for an encoder
            without tasks.
        attention: [L, H, S, gh, gw], attention of each special token to the patches.
        attributions: [gh, gw] for each prediction, attribution of the most probable label
            (`AttentionTrace`).
        features: [L, gh, gw, D], hidden states of the patches after each layer, before the final
            norm.
        kind: reason why the image is shown, one of IMAGE_KINDS; None if the image was not selected
            by its prediction.
    """

    name: str
    image: Image.Image
    visible_region: VisibleRegion
    truth: str | None
    predictions: list[ImagePrediction]
    attention: torch.Tensor
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
    """Run the model once on an image, and return its predictions, maps and patch features.

    Args:
        name: name of the image in the report.
        truth: true label as text; None if unknown.
        kind: reason why the image is shown, one of IMAGE_KINDS.

    Raises:
        ValueError: if the processor or the model does not accept the image.
    """
    model = unwrap_model(model)
    config: ViTCLSConfig = model.config
    # [1, C, H, W]
    pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
    upright_image = to_upright_rgb(image)
    use = TokenUse(config, is_classifier(model))
    has_predictions = use.has_head or bool(config.extra_heads)
    trace = trace_attention(model, pixel_values, needs_gradients=has_predictions)
    predictions = build_image_predictions(use, trace.outputs)

    def extract_maps(rows: torch.Tensor) -> torch.Tensor:
        return extract_patch_maps(rows.detach().float().cpu(), config, pixel_values.shape[-2:])

    image_size = (upright_image.height, upright_image.width)
    return ImageReport(
        name=name,
        image=upright_image,
        visible_region=get_visible_region(processor, image_size, config.patch_height_width),
        truth=truth,
        predictions=predictions,
        attention=extract_maps(trace.compute_token_attention()[0]),
        attributions=[
            extract_maps(trace.compute_attribution(task=prediction.task)[0])
            for prediction in predictions
        ],
        features=torch.stack(
            [extract_maps(state[0].T) for state in trace.outputs.hidden_states[1:]]
        ).movedim(1, -1),
        kind=kind,
    )


def build_image_predictions(use: TokenUse, outputs: Any) -> list[ImagePrediction]:
    """Return the predictions for the outputs of one image.

    That is the prediction of the classifier, or of each task, and of each added task. Encoders and
    regression models have none of their own.
    """
    config = use.config
    predictions = []

    if use.has_head and config.tasks:
        for task, names in config.task_labels().items():
            predictions.append(build_image_prediction(task, outputs.logits[task], names))
    elif use.has_head:
        names = get_label_space(config).names
        threshold = DEFAULT_THRESHOLD if is_multi_label(config) else None
        predictions.append(build_image_prediction(None, outputs.logits, names, threshold))

    for task, logits in (getattr(outputs, "task_logits", None) or {}).items():
        head = config.get_added_tasks()[task]
        threshold = None
        if head.problem_type == "multi_label_classification":
            threshold = head.threshold or DEFAULT_THRESHOLD
        predictions.append(build_image_prediction(task, logits, head.labels, threshold))
    return predictions


def build_image_prediction(
    task: str | None, logits: torch.Tensor, names: list[str], threshold: float | None = None
) -> ImagePrediction:
    """Return the prediction for logits [1, labels].

    With several labels per image, `threshold` is the probability from which a label is predicted.
    """
    (labels,) = select_top_labels(logits, names, MAX_LABELS)
    top_label = labels[0][0]
    if threshold is not None:
        (labels,) = select_probable_labels(logits, names, threshold)
    return ImagePrediction(task, labels, top_label)


def compute_patch_colors(features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the first three principal components of the patches of one layer as colors.

    The components are computed from all images together, so that equal colors mean similar features
    in all images.

    Args:
        features: [gh, gw, D] for each image; sizes may differ.

    Returns:
        [gh, gw, 3] for each image, values from 0 to 1.
    """
    colors, _ = decompose_patches(features)
    return colors


def decompose_patches(features: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[float]]:
    """Return the colors, and the fraction of the variance that each component explains."""
    rows = torch.cat([image.flatten(0, 1) for image in features]).numpy()  # [patches, D]
    num_components = min(NUM_COLOR_CHANNELS, *rows.shape)
    pca = PCA(num_components, random_state=0)
    with np.errstate(invalid="ignore"):  # the variance of equal patches is 0
        components = pca.fit_transform(rows)  # [patches, components]

    low, high = np.quantile(components, COLOR_QUANTILES, axis=0)
    # 0.5 is the value of missing components if there are fewer than three components.
    colors = np.full((len(rows), NUM_COLOR_CHANNELS), 0.5, dtype=np.float32)
    colors[:, :num_components] = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)

    pixels_by_image = torch.from_numpy(colors).split(
        [image.shape[0] * image.shape[1] for image in features]
    )

    colors_by_image = [
        rows.unflatten(0, image.shape[:2])
        for rows, image in zip(pixels_by_image, features, strict=True)
    ]
    return colors_by_image, np.nan_to_num(pca.explained_variance_ratio_).tolist()
