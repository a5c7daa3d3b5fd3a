"""What a model predicts for one photo, what its tokens attend to, and what its patches contain.

    measurements = measure_photo(model, processor, photo)
    draw_sheet(measurements, "mine")        # a PIL image (sheet.py)
    build_json_record(measurements)         # the numbers

Patches of one object have similar features and thus similar colors (Oquab et al. 2023, arXiv
2304.07193, figure 1). Features are hidden states before the final norm.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA

from ..data.aspect_ratio import Size, VisibleRegion, get_visible_region
from ..data.labels import get_label_space, is_multi_label
from ..inference.prediction_rows import (
    DEFAULT_THRESHOLD,
    Label,
    select_probable_labels,
    select_top_labels,
)
from ..inference.token_names import get_token_names_by_group
from ..model.configuration_vitcls import ViTCLSConfig
from .attribution import AttentionTrace, trace_attention
from .faults import OUTLIER_RATIO
from .maps import extract_patch_maps, get_head_names, to_upright_rgb
from .model_utils import is_classifier, unwrap_model
from .token_use import TokenUse


MAX_LABELS = 3  # maximum number of labels shown per prediction
NUM_COLOR_CHANNELS = 3  # number of color channels: red, green and blue
# Quantiles of a component that are drawn in the darkest and the brightest color; values beyond
# these quantiles are clipped.
COLOR_QUANTILES = 0.02, 0.98


@dataclass(frozen=True)
class ImagePrediction:
    """Prediction for an image: of a model, of one of its tasks, or of an added task."""

    task: str | None
    # in order of decreasing probability; empty if a multi-label model predicts no label
    labels: list[Label]
    indices: list[int]  # class indices of the labels


@dataclass(frozen=True)
class PhotoMeasurements:
    """Predictions, attention and patch features of one photo.

    Shapes: L layers, H heads, S tokens, N keys, gh x gw patches.

    The tokens are the special tokens. In a model without CLS tokens, the mean over the patches
    comes first, because the features of an image are the mean of its patches.

    Attributes:
        config: configuration of the model.
        image: the photo, upright and in RGB.
        visible_region: the region of the photo that the patches cover.
        input_size: height and width of the preprocessed photo, in pixels.
        predictions: one prediction, or one per task, and one per added task; empty for an encoder
            without tasks.
        attributions: task, label, and contribution of each patch to the score of the label [gh, gw]
            (`AttentionTrace.compute_attribution`), for at most MAX_LABELS of each prediction.
        token_names: [S], name of each token.
        token_groups: [S], group of each token in `config.token_layout`.
        token_layers: [S], last layer in which each token is used, numbered from 1.
        attention: [L, H, S, N], attention of each token to all tokens.
        maps: [L, H, S, gh, gw], the part of `attention` on the patches.
        patch_layer: last layer in which the patches are used, numbered from 1.
        norms: [L, gh, gw], norms of the patches after each layer, before the final norm.
        colors: [L, gh, gw, 3], the first three principal components of the patches after each
            layer, 0 to 1.
        explained_variance: [L][3], fraction of the variance that each component explains, in
            descending order.
    """

    config: ViTCLSConfig
    image: Image.Image
    visible_region: VisibleRegion
    input_size: Size
    predictions: list[ImagePrediction]
    attributions: list[tuple[str | None, Label, torch.Tensor]]
    token_names: list[str]
    token_groups: list[str]
    token_layers: list[int]
    attention: torch.Tensor
    maps: torch.Tensor
    patch_layer: int
    norms: torch.Tensor
    colors: torch.Tensor
    explained_variance: list[list[float]]


def measure_photo(model: Any, processor: Any, image: Image.Image) -> PhotoMeasurements:
    """Run the model once on a photo, and return the attention and the features of its tokens.

    Args:
        model: any ViTCLS classifier or encoder, with or without special tokens.
        processor: the image processor of the model.

    Raises:
        ValueError: if the processor or the model does not accept the photo, or the features are not
            finite.
    """
    model = unwrap_model(model)
    config: ViTCLSConfig = model.config
    # [1, C, H, W]
    pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
    input_size = tuple(pixel_values.shape[-2:])
    use = TokenUse(config, is_classifier(model))
    has_predictions = use.has_head or bool(config.extra_heads)
    trace = trace_attention(model, pixel_values, needs_gradients=has_predictions)

    # [L, N, D]
    states = torch.stack(
        [state[0].detach().float().cpu() for state in trace.outputs.hidden_states[1:]]
    )
    if not states.isfinite().all():
        raise ValueError(
            "the features of the model are not finite. Load the model in float32, or train it again"
        )
    features = extract_patch_maps(states.mT, config, input_size).movedim(1, -1)  # [L, gh, gw, D]
    decompositions = [decompose_patches(layer) for layer in features]
    colors = torch.stack([layer_colors for layer_colors, _ in decompositions])  # [L, gh, gw, 3]

    # In a model of one layer, a token that no head reads is used in none. Its row shows this layer.
    *token_layers, patch_layer = [max(number, 1) for number in use.num_layers]
    names_by_group = get_token_names_by_group(config)
    token_names = [name for names in names_by_group.values() for name in names]
    token_groups = [group for group, names in names_by_group.items() for _ in names]
    attention = trace.compute_token_attention()[0].float().cpu()  # [L, H, S, N]
    if not names_by_group["cls"]:
        token_names.insert(0, "patch mean")
        token_groups.insert(0, "patches")
        token_layers.insert(0, patch_layer)
        attention = torch.cat([compute_patch_attention(trace), attention], dim=2)

    predictions = predict_photo(use, trace.outputs)
    attributions = [
        (task, label, extract_patch_maps(rows.float().cpu(), config, input_size))
        for task, label, rows in attribute_predictions(trace, predictions)
    ]

    upright_image = to_upright_rgb(image, processor.bit_depth)
    image_size = (upright_image.height, upright_image.width)
    return PhotoMeasurements(
        config=config,
        image=upright_image,
        visible_region=get_visible_region(processor, image_size, config.patch_height_width),
        input_size=input_size,
        predictions=predictions,
        attributions=attributions,
        token_names=token_names,
        token_groups=token_groups,
        token_layers=token_layers,
        attention=attention,
        maps=extract_patch_maps(attention, config, input_size),
        patch_layer=patch_layer,
        norms=features.norm(dim=-1),
        colors=match_colors(colors, patch_layer - 1),
        explained_variance=[variance for _, variance in decompositions],
    )


def predict_photo(use: TokenUse, outputs: Any) -> list[ImagePrediction]:
    """Collect all predictions from the outputs of one image.

    That is the prediction of the classifier, or of each task, and of each added task. Encoders and
    regression models have none of their own.
    """
    config = use.config
    predictions = []

    if use.has_head and config.tasks:
        for task, names in config.task_labels().items():
            predictions.append(build_prediction(task, outputs.logits[task], names))
    elif use.has_head:
        names = get_label_space(config).names
        threshold = DEFAULT_THRESHOLD if is_multi_label(config) else None
        predictions.append(build_prediction(None, outputs.logits, names, threshold))

    for task, logits in (getattr(outputs, "task_logits", None) or {}).items():
        head = config.get_added_tasks()[task]
        threshold = None
        if head.problem_type == "multi_label_classification":
            threshold = head.threshold or DEFAULT_THRESHOLD
        predictions.append(build_prediction(task, logits, head.labels, threshold))
    return predictions


def build_prediction(
    task: str | None, logits: torch.Tensor, names: list[str], threshold: float | None = None
) -> ImagePrediction:
    """Select the shown labels from logits [1, labels].

    With several labels per image, `threshold` is the probability from which a label is predicted.
    """
    if threshold is None:
        (labels,) = select_top_labels(logits, names, MAX_LABELS)
    else:
        (labels,) = select_probable_labels(logits, names, threshold)
    order = logits[0].float().sort(descending=True, stable=True).indices
    return ImagePrediction(task, labels, order[: len(labels)].tolist())


def attribute_predictions(
    trace: AttentionTrace, predictions: list[ImagePrediction]
) -> Iterator[tuple[str | None, Label, torch.Tensor]]:
    """Yield the task, the label and the attribution [N] of each label that is shown."""
    for prediction in predictions:
        pairs = zip(prediction.labels, prediction.indices, strict=True)
        for label, index in islice(pairs, MAX_LABELS):
            yield prediction.task, label, trace.compute_attribution(index, prediction.task)[0]


def decompose_patches(features: torch.Tensor) -> tuple[torch.Tensor, list[float]]:
    """Color the patches of one layer by their first three principal components.

    The sign of a component is arbitrary.

    Args:
        features: [gh, gw, D].

    Returns:
        Colors [gh, gw, 3], values from 0 to 1, and the fraction of the variance that each component
        explains.
    """
    rows = features.flatten(0, 1).numpy()  # [patches, D]
    num_components = min(NUM_COLOR_CHANNELS, *rows.shape)
    pca = PCA(num_components, random_state=0)
    with np.errstate(invalid="ignore"):  # the variance of equal patches is 0
        components = pca.fit_transform(rows)  # [patches, components]

    low, high = np.quantile(components, COLOR_QUANTILES, axis=0)
    # 0.5 is the value of missing components if there are fewer than three components.
    colors = np.full((len(rows), NUM_COLOR_CHANNELS), 0.5, dtype=np.float32)
    colors[:, :num_components] = ((components - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    shares = np.nan_to_num(pca.explained_variance_ratio_).tolist()
    return torch.from_numpy(colors).unflatten(0, features.shape[:2]), shares


@torch.no_grad()
def compute_patch_attention(trace: AttentionTrace) -> torch.Tensor:
    """Average the attention of the patches over the patches: [L, H, 1, N]."""
    patches = trace.config.token_layout.patches
    rows = [
        layer.compute_weights()[0, :, patches].mean(dim=1, keepdim=True) for layer in trace.layers
    ]
    return torch.stack(rows).cpu()


def match_colors(colors: torch.Tensor, last_layer: int) -> torch.Tensor:
    """Put similar components of all layers [L, gh, gw, 3] into the same color channel.

    The order and the sign of principal components differ between layers. From `last_layer` to the
    first layer, each component gets the channel and the sign of the component of the next layer
    with which it correlates most. Layers after `last_layer` are compared with the previous layer.
    """
    matched = list(colors)
    earlier = [(layer, layer + 1) for layer in reversed(range(last_layer))]
    later = [(layer, layer - 1) for layer in range(last_layer + 1, len(colors))]

    for layer, neighbor in (*earlier, *later):
        # [patches, 6]
        channels = torch.cat([matched[neighbor].flatten(0, 1), matched[layer].flatten(0, 1)], dim=1)
        # [3, 3]; a channel without variation has no correlation
        correlation = channels.T.corrcoef()[:3, 3:].nan_to_num()
        _, order = linear_sum_assignment(correlation.abs(), maximize=True)
        is_opposite = correlation[range(3), order] < 0
        reordered = matched[layer][..., order]
        matched[layer] = torch.where(is_opposite, 1 - reordered, reordered)
    return torch.stack(matched)


# Numbers ------------------------------------------------------------------------------------------


def build_json_record(measurements: PhotoMeasurements) -> dict[str, Any]:
    """Build the numbers of a sheet. Entropies are in nats, and fractions of attention sum to 1."""
    config = measurements.config
    tokens = []
    for index, name in enumerate(measurements.token_names):
        layer = measurements.token_layers[index]
        rows = measurements.attention[:, :, index]  # [L, H, N]
        by_head = [summarize_row(config, row) for row in rows[layer - 1]]
        heads = dict(zip(get_head_names(config), by_head, strict=True))
        by_layer = [summarize_row(config, row) for row in rows.mean(dim=1)]
        tokens.append({"token": name, "layer": layer, "heads": heads, "mean_by_layer": by_layer})

    patches_by_layer = []
    for norms, variance in zip(measurements.norms, measurements.explained_variance, strict=True):
        statistics = {name: getattr(norms, name)().item() for name in ("min", "median", "max")}
        outliers = (norms > OUTLIER_RATIO * norms.median()).float().mean().item()
        patches_by_layer.append(
            {"norm": statistics, "outliers": outliers, "explained_variance": variance}
        )

    return {
        "input_size": list(measurements.input_size),
        "patch_grid": list(measurements.norms.shape[1:]),
        "visible_region": list(measurements.visible_region),
        "predictions": [
            {"task": each.task, "labels": each.labels} for each in measurements.predictions
        ],
        "uniform_entropy": math.log(measurements.attention.shape[-1]),
        "tokens": tokens,
        "patches": {"layer": measurements.patch_layer, "by_layer": patches_by_layer},
    }


def summarize_row(config: ViTCLSConfig, row: torch.Tensor) -> dict[str, float]:
    """Compute the entropy of one row of attention [N], and its fraction on each group of tokens."""
    fractions = {name: row[group].sum().item() for name, group in config.token_layout.items()}
    return {"entropy": torch.special.entr(row).sum().item(), **fractions}
