"""What a model predicts for one photo and from where, what its tokens attend to, and its patches.

    measurements = measure_photo(model, processor, photo, find_token_use(model))
    build_sheet(measurements)               # texts and pictures (sheet.py)
    measurements.maps                       # [layer, head, token, row, column]
    halves = draw_halves(grid_size)         # random halves, each followed by the other half
    scores = compute_scores(logits, kind)   # [2 + M, labels] of the photo, of nothing and of the halves
    effects, errors = fit_effects(...)      # [parts]: the score with a part minus without it

Patches of one object have similar features and thus similar colors (Oquab et al. 2023, arXiv
2304.07193, figure 1). Features are hidden states before the final norm.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.linalg import orthogonal_procrustes
from sklearn.decomposition import PCA
from sklearn.linear_model import BayesianRidge
from torch import Tensor, nn

from ..data.aspect_ratio import VisibleRegion, get_visible_region
from ..data.labels import get_heads
from ..inference.interventions import continue_from
from ..inference.prediction_rows import Label, build_task_columns, get_logits_by_task
from ..inference.token_names import get_token_names
from ..model.attention_masks_vitcls import compute_attention_rows, record_attention
from ..model.configuration_vitcls import ExtraHead, ViTCLSConfig
from ..model.field_checks_vitcls import Size
from ..runtime.distributed import build_autocast
from .maps import extract_patch_maps, to_upright_rgb
from .token_use import TokenUse


MAX_LABELS = 3  # Labels shown per prediction
NUM_COLOR_CHANNELS = 3  # Red, green and blue
# Quantiles of a component that are drawn in the darkest and the brightest color; values beyond
# these quantiles are clipped.
COLOR_QUANTILES = 0.02, 0.98
# Minimum norm of an outlier, as a multiple of the median norm of the patches of the image. Darcet et
# al. choose an absolute norm for each model.
OUTLIER_RATIO = 3.0


@dataclass(frozen=True)
class Attribution:
    """What the score of a label loses without each part of the photo.

    Attributes:
        task: name of the task; None for the classifier itself.
        label: name and probability of the label.
        values: [gh, gw], for each patch the change of the log odds without the part to which it belongs:
            positive where the score falls.
        errors: standard errors of the values.
    """

    task: str | None
    label: Label
    values: Tensor
    errors: Tensor

    @property
    def caption(self) -> str:
        """The largest and the smallest value."""
        return f"log odds: red {self.values.max():+.2g}, blue {self.values.min():+.2g}"


@dataclass(frozen=True)
class ShownToken:
    """A token whose attention is shown.

    Attributes:
        name: of the token.
        group: its group in `config.token_layout`.
        layer: last layer in which it is used, numbered from 1.
        is_read: whether a head reads it; always, in an encoder without heads.
    """

    name: str
    group: str
    layer: int
    is_read: bool


@dataclass(frozen=True)
class PhotoMeasurements:
    """Predictions, attention and patch features of one photo.

    Shapes: L layers, H heads, S tokens, N keys, gh x gw patches.

    Attributes:
        config: configuration of the model.
        image: the photo, upright and in RGB.
        visible_region: the region of the photo that the patches cover.
        input_size: height and width of the preprocessed photo, in pixels.
        predictions: labels by task, in order of decreasing probability: of the model (None), or of
            each of its tasks, and of each added task. A task with several labels per image may have
            none. Empty for an encoder without tasks.
        is_unknown: whether the photo resembles none of the classes, as in `predict`; False at another image
            size than the model's.
        attributions: for at most MAX_LABELS of each task; none if the photo has one part or one color.
        tokens: [S], the special tokens. In a model without CLS tokens, the mean over the patches comes
            first, because the features of an image are the mean of its patches.
        maps: [L, H, S, gh, gw], attention of each token to the patches; the rest is on special
            tokens.
        patch_layer: last layer in which the patches are used, numbered from 1.
        norms: [L, gh, gw], norms of the patches after each layer, before the final norm.
        colors: [L, gh, gw, 3], the first three principal components of the patches after each
            layer, 0 to 1.
        explained_variance: [L], fraction of the variance that these components explain.
    """

    config: ViTCLSConfig
    image: Image.Image
    visible_region: VisibleRegion
    input_size: Size
    predictions: dict[str | None, list[Label]]
    is_unknown: bool
    attributions: list[Attribution]
    tokens: list[ShownToken]
    maps: Tensor
    patch_layer: int
    norms: Tensor
    colors: Tensor
    explained_variance: list[float]


def measure_photo(
    model: Any, processor: Any, image: Image.Image, use: TokenUse
) -> PhotoMeasurements:
    """Run the model on a photo and, if it has labels, again with parts of the photo hidden.

    Args:
        model: any ViTCLS classifier or encoder, with or without special tokens, in evaluation mode
            and without wrappers of PEFT or torch.compile.
        processor: the image processor of the model.
        image: the photo.
        use: the tokens that the outputs of the model read (`find_token_use`).

    Raises:
        ValueError: if the processor or the model does not accept the photo, or the features are not
            finite.
    """
    config = use.config
    # [1, C, H, W]
    pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
    heads = get_heads(config) if use.has_head else config.get_added_tasks()
    outputs, attention = trace_shown_tokens(model, pixel_values)

    # [L, N, D]
    states = torch.stack([state[0].detach().float().cpu() for state in outputs.hidden_states[1:]])
    if not states.isfinite().all():
        raise ValueError(
            "the features of the model are not finite. Load the model in float32, or train it again"
        )
    predictions, attributions = predict_photo(model, pixel_values, outputs, heads)
    distance = getattr(outputs, "distance", None)
    input_size = tuple(pixel_values.shape[-2:])
    # The threshold is one of the features at the size of the training
    threshold = config.distance_threshold if input_size == config.image_height_width else None
    is_unknown = distance is not None and threshold is not None and distance.item() > threshold

    # In a model of one layer, a token that no head reads is used in none. Its row shows this layer.
    *layers, patch_layer = [max(number, 1) for number in use.num_layers]
    tokens = []
    if not config.num_cls_tokens:
        tokens.append(ShownToken("patch mean", "patches", patch_layer, is_read=True))
    names = get_token_names(config)
    for group, members in use.groups.items():
        for index in members:
            is_read = index in use.read_tokens
            tokens.append(ShownToken(names[index], group, layers[index], is_read))

    features = extract_patch_maps(states.mT, config, input_size).movedim(1, -1)  # [L, gh, gw, D]
    maps = extract_patch_maps(attention[0].cpu(), config, input_size)
    colors, explained_variance = color_patches(features, patch_layer - 1)

    upright_image = to_upright_rgb(image, processor.bit_depth)
    image_size = (upright_image.height, upright_image.width)
    return PhotoMeasurements(
        config=config,
        image=upright_image,
        visible_region=get_visible_region(processor, image_size, config.patch_height_width),
        input_size=input_size,
        predictions=predictions,
        is_unknown=is_unknown,
        attributions=attributions,
        tokens=tokens,
        maps=maps,
        patch_layer=patch_layer,
        norms=features.norm(dim=-1),
        colors=colors,
        explained_variance=explained_variance,
    )


def predict_photo(
    model: Any, pixel_values: Tensor, outputs: Any, heads: dict[str, ExtraHead]
) -> tuple[dict[str | None, list[Label]], list[Attribution]]:
    """Predict the labels of one photo by task, and measure what the most probable lose without its parts.

    Args:
        pixel_values: the photo [1, C, H, W].
        outputs: of the model for it.
        heads: labels by task; without them, the model is an encoder.
    """
    predictions: dict[str | None, list[Label]] = {}
    attributions: list[Attribution] = []
    halves = draw_halves(model.config.get_grid_size(pixel_values.shape[-2:]))
    has_parts = halves.shares.shape[1] > 1 and bool(
        (pixel_values != pixel_values[..., :1, :1]).any()
    )
    all_logits = get_logits_by_task(outputs)
    hidden_logits = {}
    if heads and has_parts:
        hidden_logits = hide_parts(model, pixel_values, outputs, halves.patches)
    for task, task_columns in build_task_columns(heads, MAX_LABELS).items():
        logits = all_logits[task]
        (labels,) = task_columns.select(logits)
        predictions[task or None] = labels
        order = logits[0].float().sort(descending=True, stable=True).indices.tolist()
        if task not in hidden_logits:
            continue
        has_one_label = heads[task].problem_type == "single_label_classification"
        scores = compute_scores(hidden_logits[task], has_one_label)
        for label, index in zip(labels[:MAX_LABELS], order, strict=False):
            effects = fit_effects(halves.shares, scores[:, index])[:, halves.parts]  # [2, gh, gw]
            attributions.append(Attribution(task or None, label, *effects))
    return predictions, attributions


def color_patches(features: Tensor, reference: int) -> tuple[Tensor, list[float]]:
    """Color the patches of each layer by their first three principal components.

    The order and the signs of components differ between layers. Those of each layer are rotated, so that
    they are as similar as possible to those of layer `reference` (orthogonal Procrustes problem).

    Args:
        features: [L, gh, gw, D].

    Returns:
        Colors [L, gh, gw, 3], values from 0 to 1, and the fraction of the variance of each layer that its
        components explain.
    """
    rows = features.flatten(1, 2).numpy()  # [L, patches, D]
    num_components = min(NUM_COLOR_CHANNELS, *rows.shape[1:])
    pca = PCA(num_components, svd_solver="randomized", random_state=0)
    components, shares = [], []
    for layer in rows:
        with np.errstate(invalid="ignore"):  # The variance of equal patches is 0
            components.append(pca.fit_transform(layer))
        shares.append(float(np.nan_to_num(pca.explained_variance_ratio_).sum()))

    # 0.5 is the value of missing components if there are fewer than three components.
    colors = torch.full((*rows.shape[:2], NUM_COLOR_CHANNELS), 0.5)
    for index, layer in enumerate(components):
        rotated = layer @ orthogonal_procrustes(layer, components[reference])[0]
        low, high = np.quantile(rotated, COLOR_QUANTILES, axis=0)
        scaled = ((rotated - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
        colors[index, :, :num_components] = torch.from_numpy(scaled)
    return colors.unflatten(1, features.shape[1:3]), shares


def describe_outliers(shares: Sequence[float]) -> str:
    """Say whether patches have outlier norms, given the share of them after each layer."""
    layer, share = max(enumerate(shares, start=1), key=lambda pair: pair[1])
    if not share:
        return (
            f"outliers: after no layer has a patch more than {OUTLIER_RATIO:g} times the median norm, so registers "
            "have nothing to take over"
        )
    return (
        f"outliers: {share:.1%} of the patches after layer {layer} have more than {OUTLIER_RATIO:g} times the "
        "median norm. `find_register_neurons` finds what writes them"
    )


# Attention ----------------------------------------------------------------------------------------


@torch.no_grad()
def trace_attention(
    model: Any,
    pixel_values: Tensor,
    reduce: Callable[[Tensor], Tensor],
    num_rows: int | None = None,
) -> tuple[Any, list[Tensor]]:
    """Run a model on images, and compute the attention in each layer, in float32.

    Args:
        model: any ViTCLS model without wrappers, in evaluation mode.
        pixel_values: [B, C, H, W].
        reduce: function of the attention [B, maps, num_rows, N] of a layer. Each head has one map, or
            two with differential attention.
        num_rows: number of tokens whose attention is computed. Default: all.

    Returns:
        The outputs of the model, with hidden states, and what `reduce` returns for each layer.
    """
    layers: list[Tensor] = []

    # Only one layer has full maps at a time: all of them may not fit into memory.
    def record(_: int, query: Tensor, key: Tensor, mask: Any, scaling: float) -> None:
        query = query[:, :, :num_rows].float()
        layers.append(reduce(compute_attention_rows(query, key.float(), mask, scaling)))

    with record_attention(model, range(len(model.base_model.layers)), record):
        # Accelerate replaces `forward` of a model by one in the precision of a run
        outputs = type(model).forward(model, pixel_values, output_hidden_states=True)
    return outputs, layers


def trace_shown_tokens(model: Any, pixel_values: Tensor) -> tuple[Any, Tensor]:
    """Run a model on images, and compute the attention [B, L, maps, S, N] of each special token.

    In a model without CLS tokens, the mean over the patches comes first.
    """
    layout = model.config.token_layout
    has_cls = model.config.num_cls_tokens > 0

    def select(weights: Tensor) -> Tensor:
        if has_cls:
            return weights
        patches = weights[:, :, layout.patches].mean(dim=2, keepdim=True)
        return torch.cat([patches, weights[:, :, : layout.num_prefix_tokens]], dim=2)

    num_rows = layout.num_prefix_tokens if has_cls else None
    outputs, layers = trace_attention(model, pixel_values, select, num_rows)
    return outputs, torch.stack(layers, dim=1)


# What a score loses without a part ----------------------------------------------------------------

# A token has seen the whole photo, so a sum over tokens and attention can both miss what decides. Hiding
# parts at random and fitting the score follows RISE (Petsiuk et al. 2018, arXiv 1806.07421) and LIME
# (Ribeiro et al. 2016, arXiv 1602.04938).


MAX_PARTS = 6  # per side; with smaller parts, a pass says less about each of them
# A half and the other half: their difference cancels what two parts do only together. With 24 pairs, maps are
# less sharp (model_cards/studies/maps.md).
NUM_PAIRS = 32
BATCH_SIZE = 8  # On a CPU, 16 take 8% longer


@dataclass(frozen=True)
class Halves:
    """Halves of the patches of a photo, each followed by the other half.

    Attributes:
        parts: the part of each patch, [gh, gw].
        patches: of each half, [2 * NUM_PAIRS, n].
        shares: how much of each part a half has, from 0 to 1, [2 * NUM_PAIRS, parts].
    """

    parts: Tensor
    patches: Tensor
    shares: Tensor


def draw_halves(grid_size: Size) -> Halves:
    """Draw random halves of the patches of a photo, each followed by the other half.

    They have equally many patches, so one part may be divided, and both have the middle one of an odd number.
    """
    rows, columns = (torch.arange(side) * min(side, MAX_PARTS) // side for side in grid_size)
    parts = rows[:, None] * (columns[-1] + 1) + columns
    is_part = nn.functional.one_hot(parts.flatten()).double()  # [patches, parts]
    draws = torch.from_numpy(np.random.default_rng(0).random((NUM_PAIRS, is_part.shape[1])))
    order = draws[:, parts.flatten()].argsort(dim=1, stable=True)
    num_shown = (parts.numel() + 1) // 2
    halves = torch.stack([order[:, :num_shown], order[:, -num_shown:]], dim=1).flatten(0, 1)
    return Halves(parts, halves, is_part[halves].sum(dim=1) / is_part.sum(dim=0))


@torch.no_grad()
def hide_parts(model: Any, pixel_values: Tensor, outputs: Any, halves: Tensor) -> dict[str, Tensor]:
    """Compute the logits [2 + M, labels] by task of a photo, of nothing, and of halves [M, n] of its patches.

    Nothing is the mean color of the photo. The patches of the other half are left out of the sequence
    after a third of the layers or, if the others have read them by then, before the first layer: if so late,
    the first pairs differ by less than half of what they do so early (model_cards/studies/maps.md), for any task.

    Args:
        pixel_values: the photo [1, C, H, W].
        outputs: of the model for the photo, with hidden states.
    """
    gray = pixel_values.mean(dim=(2, 3), keepdim=True).expand_as(pixel_values)
    first, *others = halves.to(pixel_values.device).split(BATCH_SIZE)

    def leave_out(num_layers: int, batch: Tensor) -> dict[str, Tensor]:
        passed = outputs.hidden_states[: 1 + num_layers]
        return get_logits_by_task(continue_from(model, pixel_values, passed, batch))

    def sum_differences(logits: dict[str, Tensor], task: str) -> float:
        return (logits[task][::2] - logits[task][1::2]).abs().sum().item()

    # Rounded to bf16, effects of up to 0.54 differed by 0.01, a tenth of their standard errors.
    with build_autocast("auto", pixel_values.device, model.config)():
        num_layers = model.config.num_hidden_layers // 3
        early, late = leave_out(0, first), leave_out(num_layers, first)
        if any(sum_differences(late, task) < sum_differences(early, task) / 2 for task in late):
            num_layers, late = 0, early
        logits = [get_logits_by_task(each) for each in (outputs, model(gray))]
        logits += [late, *(leave_out(num_layers, batch) for batch in others)]
    return {task: torch.cat([each[task] for each in logits]).cpu().double() for task in logits[0]}


def compute_scores(logits: Tensor, has_one_label: bool) -> Tensor:
    """Compute the log odds [M, labels] of labels: of each against all others, or against its absence."""
    if not has_one_label or logits.shape[1] == 1:
        return logits
    others = ~torch.eye(logits.shape[1], dtype=torch.bool)
    return logits - torch.stack([logits[:, row].logsumexp(dim=1) for row in others], dim=1)


def fit_effects(shares: Tensor, scores: Tensor) -> Tensor:
    """Fit what a score loses if a part is hidden, and the standard errors, [2, parts].

    The fit is Bayesian ridge regression on the differences within pairs. Halves alone do not tell what all
    parts do together, which the photo and nothing do.

    Args:
        shares: how much of each part M halves have, [M, parts].
        scores: [2 + M] of the photo, of nothing and of the halves.
    """
    pairs = torch.cat([torch.ones_like(shares[:1]), shares[::2] - shares[1::2]]).numpy()
    differences = (scores[::2] - scores[1::2]).numpy()
    if not np.isfinite(differences).all():
        raise ValueError("the outputs of the model are not finite. Check its weights and precision")
    regression = BayesianRidge(fit_intercept=False).fit(pairs, differences)
    effects = np.stack([regression.coef_, np.sqrt(regression.sigma_.diagonal())])
    return torch.from_numpy(effects).float()
