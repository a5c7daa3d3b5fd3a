"""The second head of a frozen model: a classifier of the distillation tokens.

    distillation tokens, labels -> shrinkage LDA -> head, and which logits the model returns

A new distillation token is a twin of CLS, so its head starts as good as a classifier on CLS. A teacher
then trains it, while the labels train the other head (DeiT, Touvron et al. 2021, arXiv 2012.12877).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..inference.class_statistics import TokenFeatures
from ..inference.intervals import Estimate
from ..inference.linear_probe import LinearProbe, add_classes


KIND = "distillation"  # The kind of these tokens in a `FeatureLayout`


@dataclass(frozen=True)
class DistillationHead:
    """The second classifier of a frozen model, which reads the distillation tokens.

    Attributes:
        probe: the classifier.
        inference: which logits the model returns (`config.distillation_inference`): those with the
            lowest log loss of `losses`.
        losses: log loss out of fold of "cls", "distillation" and "mean"; empty without folds.
        out_of_fold: [N, K] probabilities of the returned logits.
        estimate: accuracy of the returned logits, corrected for the choice; None without folds.
    """

    probe: LinearProbe
    inference: str
    losses: dict[str, float]
    out_of_fold: np.ndarray
    estimate: Estimate | None

    @classmethod
    def fit(
        cls,
        tokens: TokenFeatures,
        first: LinearProbe,
        labels: np.ndarray,
        groups: np.ndarray,
    ) -> "DistillationHead":
        """Fit the head to the distillation tokens of the layers that the first head reads.

        Args:
            tokens: features [N, D] of the distillation tokens of each layer.
            first: the fitted classifier of the same images.
            labels, groups: as in `LinearProbe.fit`.
        """
        layers = first.candidate_.layers
        probe = LinearProbe(layers, class_weight=first.class_weight).fit(tokens, labels, groups)
        known = np.isfinite(first.losses_) & np.isfinite(probe.losses_)
        if not known.any():
            return cls(probe, "cls", {}, first.out_of_fold_, None)

        target = probe.target_
        targets = target.encode(labels)[1][known]
        heads = [target.to_logits(each.out_of_fold_[known]) for each in (first, probe)]
        logits = {"cls": heads[0], KIND: heads[1], "mean": (heads[0] + heads[1]) / 2}
        means = {
            name: float(target.compute_losses(each, targets).mean())
            for name, each in logits.items()
        }
        inference = choose_inference(means)
        if inference == "cls":
            return cls(probe, inference, means, first.out_of_fold_, first.estimate_)

        out_of_fold = np.full_like(first.out_of_fold_, np.nan)
        out_of_fold[known] = target.to_probabilities(logits[inference])
        result = target.estimate([*logits.values()], targets, None, groups[known])
        return cls(probe, inference, means, out_of_fold, result)

    def refit(self, tokens: TokenFeatures, labels: np.ndarray) -> "DistillationHead":
        """Fit the head to all images, also to those that took no part in the choice."""
        chosen_classes = self.probe.classes_
        probe = self.probe.refit(tokens, labels)
        out_of_fold = add_classes(self.out_of_fold, chosen_classes, probe.classes_)
        return replace(self, probe=probe, out_of_fold=out_of_fold)


def choose_inference(losses: Mapping[str, float]) -> str:
    """Choose the logits with the lowest log loss; CLS if they are equal."""
    return min(("cls", KIND, "mean"), key=lambda name: losses[name])


def describe_inference(inference: str, losses: Mapping[str, Any], images: str) -> str:
    """Say which logits the model returns, and why."""
    texts = {"cls": "the CLS head", KIND: "the distillation head", "mean": "the mean of both heads"}
    if not losses:
        return f"the model returns {texts[inference]}"
    values = ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
    return f"the model returns {texts[inference]} (log loss {images}: {values})"


def split_kinds(tokens: TokenFeatures) -> tuple[TokenFeatures, TokenFeatures]:
    """Separate the distillation tokens from the others."""
    others = {token: values for token, values in tokens.items() if token[1] != KIND}
    return others, {token: values for token, values in tokens.items() if token[1] == KIND}
