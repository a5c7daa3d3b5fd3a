"""Diagnosis in words, with measured values: did each special token learn, do patches hold artifacts, and how selective
is attention over depth.

diagnose_tokens(config, findings, effects, token_movement, predictions)   one Verdict per special token
describe_artifacts(config, findings)                                      sentences about patches with large norms
describe_depth(config, findings)                                          sentences per special token
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from ..configuration_vitcls import ViTCLSConfig
from .ablation import AblationEffect, Predictions, get_token_keys
from .maps import get_token_names
from .test_time_registers import OUTLIER_RATIO
from .token_statistics import Findings


Word = Literal[
    "learned", "in use", "not moved", "same for all images", "collapsed", "ignored by the head", "not judged"
]
Meaning = Literal["good", "neutral", "doubtful", "bad"]

MIN_IMAGES = 16  # minimum number of images to judge the effect of a token
MIN_MOVEMENT = 1e-3  # minimum movement in training of a token that learned, as a fraction of its norm
MIN_IMAGE_VARIATION = 1e-3  # minimum variation of a token whose state depends on the image
MIN_TWIN_SIMILARITY = 0.999  # minimum cosine similarity of identical tokens
MAX_TWIN_DISTANCE = 0.01  # maximum distance of identical tokens, as a fraction of their variation over images
ROUNDING_ERROR = 1e-6  # as a fraction of the norm of a state
MIN_EFFECT = 1e-3  # minimum logit change of a token in use, as a fraction of the standard deviation of the logits
MANY_OUTLIERS = 0.005  # fraction of patches; Darcet et al. 2023 find about 0.02 in DINOv2 without registers
# Expected attention over depth: minimum fraction of tokens attended to in the first third of the layers, and maximum
# ratio of the middle third to the first third.
MIN_EARLY_FRACTION, MAX_MIDDLE_RATIO = 0.75, 2 / 3
MIN_UNIFORM_FRACTION = 0.9  # minimum fraction of tokens attended to in every layer by uniform attention


@dataclass(frozen=True)
class Verdict:
    """Verdict on one special token.

    Attributes:
        token: name of the token, such as "register 1".
        word: "collapsed" (identical to another token), "same for all images", "not moved" (by training), "ignored by
            the head", "learned" (training moved it, and predictions depend on it), "in use" (predictions depend on it;
            its movement is unknown or small), or "not judged".
        meaning: "good", "neutral", "doubtful" or "bad".
        reason: one sentence with the measured value.
    """

    token: str
    word: Word
    meaning: Meaning
    reason: str


def diagnose_tokens(
    config: ViTCLSConfig,
    findings: Findings,
    effects: Mapping[str, AblationEffect] | None = None,
    token_movement: Mapping[str, float] | None = None,
    predictions: Predictions | None = None,
) -> list[Verdict]:
    """Return one verdict per special token, in sequence order.

    Args:
        config: configuration of the model.
        findings: statistics over a few dozen images or more; with fewer than MIN_IMAGES, effects are not judged.
        effects: `compute_ablation_effects`; None for a model without a classifier.
        token_movement: distance that training moved each token, with keys such as `cls[0]` (`token_movement` in
            results.json); None if unknown.
        predictions: predictions with known labels (`collect_predictions`). If their accuracy is not better than
            chance, the verdicts state this, since effects on such predictions have little meaning.
    """
    names = get_token_names(config)
    verdicts = []
    for index, key in enumerate(get_token_keys(config.token_layout)):
        evidence = TokenEvidence(
            findings=findings,
            index=index,
            names=names,
            effect=None if effects is None else effects[key],
            movement=None if token_movement is None else token_movement.get(key),
            caveat=describe_chance_accuracy(predictions),
        )
        verdicts.append(Verdict(names[index], *judge_token(evidence)))
    return verdicts


@dataclass(frozen=True)
class TokenEvidence:
    """Measurements of the token at one sequence index; `names` are the names of all special tokens."""

    findings: Findings
    index: int
    names: list[str]
    effect: AblationEffect | None
    movement: float | None
    caveat: str

    @property
    def has_effect(self) -> bool:
        """Return whether replacing the token by its mean changes logits or predictions."""
        return self.effect is not None and (self.effect.logit_change >= MIN_EFFECT or self.effect.changed_answers > 0)

    @property
    def is_same_for_all_images(self) -> bool:
        """Return whether the state after the last layer is the same for all images. Both the variation of the whole
        state and the median over channels must be small, so that one channel of large magnitude cannot hide variation.
        """
        findings, index = self.findings, self.index
        variation = torch.stack([findings.variation[-1, index], findings.channel_variation[-1, index]]).max()
        return findings.num_images > 1 and variation.item() < MIN_IMAGE_VARIATION

    @property
    def twin(self) -> int | None:
        """Return the index of an identical token after the last layer, or None."""
        findings, index = self.findings, self.index
        norms = findings.mean_states[-1].norm(dim=-1)  # [S]
        variation = findings.variation[-1] * norms  # [S], in the unit of `apart`
        limit = MAX_TWIN_DISTANCE * variation.minimum(variation[index]) + ROUNDING_ERROR * norms
        is_twin = (findings.between_tokens[-1, index] >= MIN_TWIN_SIMILARITY) & (findings.apart[-1, index] <= limit)
        is_twin[index] = False
        return int(findings.apart[-1, index].where(is_twin, torch.inf).argmin()) if bool(is_twin.any()) else None

    def describe_movement(self) -> str:
        """Describe how far training moved the token."""
        if self.movement is None:
            return "its movement in training is unknown"
        norm = self.findings.token_norms[0, self.index].item()
        return f"training moved it by {self.movement:.3g} ({self.movement / max(norm, 1e-12):.2g} times its norm)"

    @property
    def has_moved(self) -> bool:
        """Return whether training is known to have moved the token."""
        norm = self.findings.token_norms[0, self.index].item()
        return self.movement is not None and self.movement >= MIN_MOVEMENT * norm


def judge_token(token: TokenEvidence) -> tuple[Word, Meaning, str]:
    """Return word, meaning and reason of a verdict. The first condition that holds decides."""
    findings, effect = token.findings, token.effect
    if token.twin is not None:
        similarity = findings.between_tokens[-1, token.index, token.twin].item()
        distance = findings.apart[-1, token.index, token.twin].item()
        twin = f"{token.names[token.twin]} (cosine {similarity:.4f}, distance {distance:.2g})"
        return "collapsed", "bad", f"after the last layer it is identical to {twin}."
    if token.is_same_for_all_images:
        variation = findings.variation[-1, token.index].item()
        same = f"it is the same for every image (it varies by {variation:.1g} times the norm of its mean state)"
        word: Word = "not moved" if token.movement == 0 else "same for all images"
        return word, "bad", f"after the last layer {same}; {token.describe_movement()}."
    if token.movement == 0:
        return "not moved", *judge_unmoved_token(token)
    if effect is None:
        return (
            "not judged",
            "neutral",
            "the effect of replacing 1 token by its mean cannot be measured without a classifier.",
        )
    if findings.num_images < MIN_IMAGES:
        return "not judged", "neutral", f"{describe_missing_images(findings.num_images)}."
    if not token.has_effect:
        return "ignored by the head", "doubtful", f"{describe_effect(effect)}."
    reason = f"{describe_effect(effect)}; {token.describe_movement()}{token.caveat}."
    return ("learned", "good", reason) if token.has_moved else ("in use", "neutral", reason)


def judge_unmoved_token(token: TokenEvidence) -> tuple[Meaning, str]:
    """Return meaning and reason for a token with a movement of 0, which may be frozen or already trained."""
    if token.effect is None:
        return (
            "neutral",
            "not moved in this run (by 0): it is frozen or receives no gradient. Without a classifier, its effect "
            "cannot be measured.",
        )
    effect = describe_effect(token.effect)
    if token.has_effect:
        return (
            "neutral",
            f"frozen or already trained: not moved in this run (by 0), but in use: {effect}{token.caveat}.",
        )
    if token.findings.num_images < MIN_IMAGES:
        missing = describe_missing_images(token.findings.num_images)
        return "neutral", f"not moved in this run (by 0); its effect is unknown: {missing}."
    return "bad", f"training did not move it (by 0), and it has no effect: {effect}."


def describe_missing_images(num_images: int) -> str:
    """Describe that more images are required to judge effects."""
    return (
        f"the effect requires {MIN_IMAGES} or more images, but there {'are' if num_images > 1 else 'is'} {num_images}"
    )


def describe_effect(effect: AblationEffect) -> str:
    """Describe the change in predictions when the token is replaced by its mean."""
    accuracy = ""
    if effect.accuracy_change is not None:
        accuracy = f", accuracy {effect.accuracy_change * 100:+.1f} points"
    return (
        "replacing it by its mean changes the predictions of "
        f"{format_count(effect.changed_answers, effect.num_images)} images ({effect.changed_answers:.1%}{accuracy}), "
        f"and the logits by {effect.logit_change:.2g} times their standard deviation over images"
    )


def format_count(fraction: float, num_images: int) -> str:
    """Return a fraction of images as text, such as `3 of 64`."""
    return f"{round(fraction * num_images):,} of {num_images:,}"


def describe_chance_accuracy(predictions: Predictions | None) -> str:
    """Return a clause that the accuracy is not better than chance; empty if it is better or unknown."""
    if predictions is None or predictions.is_better_than_chance() is not False:
        return ""
    return (
        f"; but the accuracy of the model is not better than chance ({predictions.accuracy():.1%} on "
        f"{len(predictions.predicted):,} images; with the most frequent label always {predictions.chance():.1%})"
    )


# Artifacts -----------------------------------------------------------------------------------------------------------


def describe_artifacts(config: ViTCLSConfig, findings: Findings) -> str:
    """Describe artifacts in the last quarter of the layers, registers that absorb them (Darcet et al. 2023, arXiv
    2309.16588, measure the output), and outliers in earlier layers."""
    outliers = findings.outliers[1:]  # [L], after each layer
    first_of_last = len(outliers) - max(len(outliers) // 4, 1)
    layer = first_of_last + int(outliers[first_of_last:].argmax())
    fraction = outliers[layer].item()
    limit = f"above {OUTLIER_RATIO:g} times the median of their image"
    parts = [f"No artifacts: after the last layers at most {fraction:.2%} of the patches have a norm {limit}"]
    if fraction >= MANY_OUTLIERS:
        more = "more registers" if config.num_register_tokens else "registers"
        advice = f"{more} may absorb them (train with --num-register-tokens, or see analysis.test_time_registers)"
        parts = [f"Artifacts: after layer {layer + 1}, {fraction:.2%} of the patches have a norm {limit}; {advice}"]
    earlier = outliers[:first_of_last]
    if len(earlier) and (maximum := earlier.max().item()) >= max(MANY_OUTLIERS, 1.01 * fraction):
        gone = "" if fraction >= MANY_OUTLIERS else ", but not in the last layers"
        parts.append(f"Maximum in earlier layers: {maximum:.2%}, after layer {int(earlier.argmax()) + 1}{gone}")
    parts += describe_registers(config, findings, layer)
    return ". ".join(parts) + "."


def describe_registers(config: ViTCLSConfig, findings: Findings, layer: int) -> list[str]:
    """Describe whether registers are outliers, and the outliers with registers hidden; empty without registers.

    Args:
        layer: index of the layer after which outliers are counted.
    """
    norms = findings.token_norms[-1, config.token_layout.registers]  # [registers]
    if not len(norms) or findings.outliers_without_registers is None:
        return []
    ratio = norms.max().item() / findings.patch_norms[-1].median().clamp(min=1e-12).item()
    times = f"at most {ratio:.1f} times the median norm of the patches"
    registers = f"The registers are not outliers ({times})"
    if ratio > OUTLIER_RATIO:
        instead = "instead" if findings.outliers[layer + 1] < MANY_OUTLIERS else "as well"
        registers = f"The registers are outliers {instead} ({times})"
    with_registers, without = (
        fractions[layer + 1].item() for fractions in (findings.outliers, findings.outliers_without_registers)
    )
    hidden = "with the registers hidden from attention"
    return [f"{registers}; outliers after layer {layer + 1}: {with_registers:.2%}, {hidden} {without:.2%}"]


# Depth ---------------------------------------------------------------------------------------------------------------


def describe_depth(config: ViTCLSConfig, findings: Findings) -> list[str]:
    """Describe the selectivity of each special token in the first, middle and last third of the layers. For CLS and
    distillation tokens, compare it with the expected pattern: near uniform early, selective in the middle.

    The number of tokens attended to is the exponential of the entropy; 100% are all visible tokens.
    """
    widths = findings.entropy.mean(dim=1).exp()  # [L, S], number of tokens attended to, mean over heads
    fractions = widths / findings.uniform_by_token["entropy"].exp()  # [L, S]
    thirds = torch.stack([part.mean(dim=0) for part in fractions.tensor_split(3) if len(part)])  # [3 or fewer, S]
    where = "in the first, middle and last layers" if len(thirds) == 3 else "layer by layer"
    texts = []
    for index, name in enumerate(get_token_names(config)):
        narrowest = int(widths[:, index].argmin())
        width = round(widths[narrowest, index].item())
        is_register = index >= config.token_layout.registers.start
        pattern = "" if is_register else f" {describe_depth_pattern(fractions[:, index], thirds[:, index])}"
        texts.append(
            f"{name} attends to {', '.join(f'{third:.0%}' for third in thirds[:, index].tolist())} of the visible "
            f"tokens {where} (100% is uniform), most selective in layer {narrowest + 1}: {width} "
            f"token{'s' if width != 1 else ''}.{pattern}"
        )
    return texts


def describe_depth_pattern(fractions: torch.Tensor, thirds: torch.Tensor) -> str:
    """Compare the fractions of tokens attended to, per layer [L] and averaged over thirds [3], with the expected
    pattern."""
    if bool((fractions >= MIN_UNIFORM_FRACTION).all()):
        return "Uniform in every layer: it selects no patches."
    if len(thirds) < 3:
        return "There are too few layers to compare early and middle layers."
    early, middle, _ = thirds.tolist()
    if early >= MIN_EARLY_FRACTION and middle <= MAX_MIDDLE_RATIO * early:
        return "As expected: near uniform early, selective in the middle."
    return "Not as expected (near uniform early, selective in the middle)."
