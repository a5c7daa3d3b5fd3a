"""Checks of maps: whether attention rollout and attribution show what predictions depend on.

Deletion replaces the patches that have the highest values with the mean color; insertion replaces
all other patches (Petsiuk et al. 2018, arXiv 1806.07421). With a faithful map, deletion lowers the
probability of the predicted class faster than with a random order of patches, and insertion raises
this probability faster. The randomized-weights check (Adebayo et al. 2018, arXiv 1810.03292)
shuffles the values of each parameter, which changes a map that depends on the weights.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from .attribution import trace_attention
from .maps import extract_patch_maps
from .model_utils import evaluation_mode, unwrap_model
from .token_use import PATCHES, TokenUse


# fractions of the patches that deletion replaces and insertion keeps
FRACTIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
MAX_CORRELATION = 0.5  # maximum `weight_correlation` of a map that depends on the weights
MAX_P_VALUE = 0.05  # maximum `p_value` of a map that is significantly better than a random order


@dataclass(frozen=True)
class MapCheck:
    """Checks of one kind of map. Curves and correlations are means over images.

    Attributes:
        num_images: number of images.
        deletion: probability of the predicted class if the patches with the highest values are
            replaced; one value per fraction in FRACTIONS.
        insertion: probability of the predicted class if only the patches with the highest values
            are kept; one value per fraction in FRACTIONS.
        random_deletion, random_insertion: `deletion` and `insertion` for a random order of patches.
        weight_correlation: rank correlation (Spearman) between the map of the model and the map of
            a copy with shuffled weights.
        p_value: p-value under the null hypothesis that the map is not better than a random order,
            for both curves together (one-sided Wilcoxon test over images).
    """

    num_images: int
    deletion: list[float]
    insertion: list[float]
    random_deletion: list[float]
    random_insertion: list[float]
    weight_correlation: float
    p_value: float

    @property
    def is_faithful(self) -> bool:
        """Return whether the map is better than a random order and depends on the weights."""
        return self.p_value <= MAX_P_VALUE and self.weight_correlation <= MAX_CORRELATION

    def describe(self, name: str) -> str:
        """Describe the results of the checks."""
        curves = torch.tensor(
            [self.deletion, self.random_deletion, self.insertion, self.random_insertion]
        )
        areas = torch.trapezoid(curves, torch.tensor(FRACTIONS)).tolist()
        verdict = "shows what predictions depend on"
        if self.p_value > MAX_P_VALUE:
            verdict = "is not measurably better than a random order of patches"
        elif not self.is_faithful:
            verdict = "depends little on the weights of the model"
        return (
            f"{name.capitalize()} {verdict} ({self.num_images} images). The area under the "
            f"deletion curve is {areas[0]:.2f} (random order: {areas[1]:.2f}; lower is better), "
            f"and that under the insertion curve is {areas[2]:.2f} (random order: {areas[3]:.2f}; "
            f"higher is better); p = {self.p_value:.2g}; rank correlation with the map of shuffled "
            f"weights {self.weight_correlation:.2f}."
        )


def check_maps(model: Any, images: Iterable[torch.Tensor], seed: int = 0) -> dict[str, MapCheck]:
    """Check the rollout and the attribution of the predicted class.

    The rollout is that of the first special token that the head uses.

    Args:
        model: a single-label classifier.
        images: [1, C, H, W] each, on the model's device.
        seed: seed of the random orders and of the shuffled weights.

    Returns:
        Dictionary that maps the name of each map to its check. If the head uses no special token,
        only the attribution is checked.
    """
    model = unwrap_model(model)
    generator = torch.Generator().manual_seed(seed)
    shuffled_model = copy_with_shuffled_weights(model, generator)
    curves: dict[str, list[torch.Tensor]] = {}
    correlations: dict[str, list[float]] = {}

    for pixel_values in images:
        maps, probabilities = compute_maps(model, pixel_values)
        shuffled_maps, _ = compute_maps(shuffled_model, pixel_values, probabilities.argmax())
        random_order = torch.rand(next(iter(maps.values())).shape, generator=generator)
        for name, values in (maps | {"random": random_order}).items():
            # [2, fractions]
            curve = measure_curves(model, pixel_values, values, int(probabilities.argmax()))
            curves.setdefault(name, []).append(curve)
        for name, values in maps.items():
            correlation = stats.spearmanr(values.flatten(), shuffled_maps[name].flatten()).statistic
            correlations.setdefault(name, []).append(float(np.nan_to_num(correlation)))

    # [images, 2, fractions]
    curves_by_map = {name: torch.stack(map_curves) for name, map_curves in curves.items()}
    random_curves = curves_by_map.pop("random")
    means = {name: map_curves.mean(dim=0).tolist() for name, map_curves in curves_by_map.items()}
    random_means = random_curves.mean(dim=0).tolist()

    return {
        name: MapCheck(
            num_images=len(map_curves),
            deletion=means[name][0],
            insertion=means[name][1],
            random_deletion=random_means[0],
            random_insertion=random_means[1],
            weight_correlation=sum(correlations[name]) / len(map_curves),
            p_value=compute_p_value(map_curves, random_curves),
        )
        for name, map_curves in curves_by_map.items()
    }


def compute_p_value(curves: torch.Tensor, random_curves: torch.Tensor) -> float:
    """Return the p-value of the null hypothesis that `curves` are not better than random ones.

    Curves are [images, 2, fractions]. The test is a one-sided Wilcoxon test over images, for
    deletion and insertion together.
    """
    deletion, insertion = (curves - random_curves).mean(dim=-1).double().unbind(dim=1)
    gains = (insertion - deletion).numpy()  # [images]
    return float(stats.wilcoxon(gains, alternative="greater").pvalue) if gains.any() else 1.0


def compute_maps(
    model: Any, pixel_values: torch.Tensor, target: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the maps [gh, gw] of one image by name, and the class probabilities [labels]."""
    trace = trace_attention(model, pixel_values, needs_gradients=True)
    config = model.config
    logits = trace.outputs.logits  # [1, labels]
    rows = {"attribution": trace.compute_attribution(target)[0]}
    special_tokens = TokenUse(config).read_tokens - {PATCHES}
    if special_tokens:
        rows["rollout"] = trace.compute_rollout()[0, min(special_tokens)]

    image_size = (pixel_values.shape[-2], pixel_values.shape[-1])
    maps = {
        name: extract_patch_maps(row.float().cpu(), config, image_size)
        for name, row in rows.items()
    }
    return maps, logits.detach()[0].float().softmax(dim=0).cpu()


@torch.no_grad()
def measure_curves(
    model: Any, pixel_values: torch.Tensor, values: torch.Tensor, target: int
) -> torch.Tensor:
    """Return the deletion and insertion curves [2, len(FRACTIONS)] of a map [gh, gw].

    A curve is the probability of a class for the image `pixel_values` [1, C, H, W] with replaced
    patches.
    """
    # rank 0 is the highest value
    ranks = values.flatten().argsort(descending=True).argsort().view(values.shape)
    # [fractions, gh, gw]
    masks = torch.stack([ranks < round(fraction * ranks.numel()) for fraction in FRACTIONS])
    # replaced patches in deletion, then in insertion
    masks = torch.cat([masks, ~masks]).to(pixel_values.device)

    patch_height, patch_width = model.config.patch_height_width
    # [2 * fractions, 1, gh * patch height, gw * patch width]
    is_replaced = (
        masks.repeat_interleave(patch_height, dim=1)
        .repeat_interleave(patch_width, dim=2)
        .unsqueeze(1)
    )
    height, width = is_replaced.shape[-2:]
    changed_pixels = pixel_values.repeat(len(masks), 1, 1, 1)  # [2 * fractions, C, H, W]
    mean_color = pixel_values.mean(dim=(-2, -1), keepdim=True)
    changed_pixels[..., :height, :width] = torch.where(
        is_replaced, mean_color, changed_pixels[..., :height, :width]
    )

    with evaluation_mode(model):
        logits = torch.cat([model(batch).logits for batch in changed_pixels.split(len(FRACTIONS))])
    return logits.float().softmax(dim=1)[:, target].cpu().view(2, len(FRACTIONS))


@torch.no_grad()
def copy_with_shuffled_weights(model: Any, generator: torch.Generator) -> Any:
    """Return a copy of the model with the values of each parameter in random order."""
    shuffled_model = copy.deepcopy(model)
    for parameter in shuffled_model.parameters():
        order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
        parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return shuffled_model
