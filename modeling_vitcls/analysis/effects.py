"""Effects of an ablation: differences between the outputs before and after the ablation, with 95% intervals.

compute_effect(before, after)    AblationEffect for `Predictions`, FeatureEffect for `Features` (model_outputs.py)
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import nn

from ..heads_vitcls import IGNORED_LABEL
from ..intervals import Interval, compute_bootstrap_interval, compute_proportion_interval
from .model_outputs import NUM_NEIGHBORS, Features, Predictions


# Minimum standard deviation of the logits over images, as a fraction of their root mean square
MIN_RELATIVE_DEVIATION = 1e-3
MIN_FEATURE_CHANGE = 1e-3  # minimum cosine distance of changed features; smaller distances count as rounding errors


@dataclass(frozen=True)
class AblationEffect:
    """Effect of an ablation on predictions. Intervals are 95% confidence intervals.

    Attributes:
        changed_answers: fraction of images whose prediction changes.
        logit_change: root mean square change of the logits, divided by the standard deviation of the logits over
            images. The divisor is at least a thousandth of the root mean square of the logits, because smaller
            deviations are rounding errors. With a single image, the mean state is the token's own state, so the
            effect of an "information" ablation is 0 and meaningless.
        accuracy_change: accuracy after the ablation minus accuracy before the ablation; None if no label is known.
        num_images: number of images.
        changed_interval: interval for `changed_answers`.
        logit_interval: interval for `logit_change`, from bootstrap samples of the images.
        improvement: p-value under the null hypothesis that the accuracy does not increase (exact McNemar test); None
            if no label is known.
        is_better_than_chance: whether the accuracy after the ablation is better than chance; None if unknown.
    """

    changed_answers: float
    logit_change: float
    accuracy_change: float | None
    num_images: int
    changed_interval: Interval = (0.0, 1.0)
    logit_interval: Interval = (0.0, math.inf)
    improvement: float | None = None
    is_better_than_chance: bool | None = None

    @property
    def size(self) -> float:
        """Return the value that is compared with null distributions."""
        return self.logit_change

    @property
    def interval(self) -> Interval:
        """Return the 95% confidence interval for `size`."""
        return self.logit_interval

    @property
    def has_changed_outputs(self) -> bool:
        """Return whether the ablation changes the prediction for any image."""
        return self.changed_answers > 0


@dataclass(frozen=True)
class FeatureEffect:
    """Effect of an ablation on the features of an encoder.

    Attributes:
        cosine_change: mean over images of 1 minus the cosine similarity between the features before and after the
            ablation, by feature name (`Features`).
        knn_agreement: mean fraction of the NUM_NEIGHBORS nearest neighbors that stay the same; None for fewer than
            MIN_IMAGES images.
        num_images: number of images.
        interval: 95% confidence interval for `size`, from bootstrap samples of the images.
    """

    cosine_change: dict[str, float]
    knn_agreement: float | None
    num_images: int
    interval: Interval

    @property
    def size(self) -> float:
        """Return the value that is compared with null distributions: the largest cosine distance."""
        return max(self.cosine_change.values())

    @property
    def has_changed_outputs(self) -> bool:
        """Return whether the ablation changes features by more than rounding errors."""
        return self.size > MIN_FEATURE_CHANGE


def compute_effect(before: Any, after: Any) -> Any:
    """Return the effect of an ablation: `AblationEffect` for `Predictions`, `FeatureEffect` for `Features`."""
    return compare_features(before, after) if isinstance(before, Features) else compare_predictions(before, after)


def compare_predictions(before: Predictions, after: Predictions) -> AblationEffect:
    """Return the effect of an ablation on predictions."""
    root_mean_square = before.logits.square().mean().sqrt()
    variances = (before.logits - before.logits.mean(dim=0)).square().mean(dim=1)  # [images]
    scale = variances.mean().sqrt().clamp(min=MIN_RELATIVE_DEVIATION * root_mean_square).clamp(min=1e-12)
    squared_changes = (after.logits - before.logits).square().mean(dim=1) / scale.square()  # [images]
    is_changed = (before.predicted != after.predicted).any(dim=-1)
    accuracy_before, accuracy_after = before.compute_accuracy(), after.compute_accuracy()
    accuracy_change = improvement = None
    if accuracy_before is not None and accuracy_after is not None:
        accuracy_change, improvement = accuracy_after - accuracy_before, compute_improvement_p_value(before, after)
    low, high = compute_bootstrap_interval(squared_changes.tolist())
    change_low, change_high = compute_proportion_interval(int(is_changed.sum()), len(before)) or (0.0, 1.0)
    return AblationEffect(
        changed_answers=is_changed.float().mean().item(),
        logit_change=squared_changes.mean().sqrt().item(),
        accuracy_change=accuracy_change,
        num_images=len(before),
        changed_interval=(change_low, change_high),
        logit_interval=(low**0.5, high**0.5),
        improvement=improvement,
        is_better_than_chance=after.is_better_than_chance(),
    )


def compare_features(before: Features, after: Features) -> FeatureEffect:
    """Return the effect of an ablation on features."""
    cosine_changes = {}  # name -> [images], 1 minus the cosine similarity, mean over vectors
    for name, vectors_before in before.vectors.items():
        pairs = zip(vectors_before, after.vectors[name], strict=True)
        similarities = [nn.functional.cosine_similarity(*pair, dim=-1).mean() for pair in pairs]
        cosine_changes[name] = (1 - torch.stack(similarities)).clamp(min=0)
    neighbors_before, neighbors_after = before.find_neighbors(), after.find_neighbors()
    agreement = None
    if neighbors_before is not None and neighbors_after is not None:
        neighbor_pairs = zip(neighbors_before, neighbors_after, strict=True)
        num_shared = sum(len(indices_before & indices_after) for indices_before, indices_after in neighbor_pairs)
        agreement = num_shared / (NUM_NEIGHBORS * len(before))
    largest_changes = max(cosine_changes.values(), key=lambda changes: changes.mean().item())
    mean_changes = {name: changes.mean().item() for name, changes in cosine_changes.items()}
    return FeatureEffect(mean_changes, agreement, len(before), compute_bootstrap_interval(largest_changes.tolist()))


def compute_improvement_p_value(before: Predictions, after: Predictions) -> float:
    """Return the p-value under the null hypothesis that the accuracy does not increase (exact one-sided test, McNemar
    1947)."""
    assert before.labels is not None
    is_known = before.labels != IGNORED_LABEL
    was_correct, is_correct = ((outputs.predicted == before.labels)[is_known] for outputs in (before, after))
    num_gained, num_lost = int((is_correct & ~was_correct).sum()), int((was_correct & ~is_correct).sum())
    return float(stats.binom.sf(num_gained - 1, num_gained + num_lost, 0.5)) if num_gained else 1.0
