"""Diagnosis as text, with measured values: the effect of each special token and each group, and the selectivity of
each token's attention over depth.

    diagnose_tokens(config, findings, ablations, ...)   one Verdict per special token
    diagnose_groups(config, ablations, ...)             one Verdict per group of several tokens
    describe_depth(config, findings)                    one text per special token

Each statement about an effect compares the effect with null distributions on the same images (ablation.py). A token's
output in the last layer is used only if the head uses the token (`count_used_layers`), so states and attention are
judged in the last layer whose output is used.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..configuration_vitcls import ViTCLSConfig
from ..token_names import SINGLE_TOKEN_NAMES, get_token_names
from .ablation import Ablation, Ablations, get_group_indices, get_token_keys
from .artifacts import PatchDiagnosis
from .effects import AblationEffect
from .maps import count_used_layers
from .model_outputs import MIN_IMAGES, Predictions
from .token_statistics import Findings


Rating = Literal["good", "neutral", "doubtful", "bad"]

MIN_IMAGE_VARIATION = 1e-3  # minimum variation of a token whose state depends on the image
MIN_IDENTICAL_SIMILARITY = 0.999  # minimum cosine similarity between tokens that are considered identical
MAX_IDENTICAL_DISTANCE = 0.01  # maximum distance between identical tokens, relative to their variation over images
MAX_MAP_DISTANCE = 0.1  # maximum distance between equal maps, relative to their distance from uniform attention
MIN_PATCH_MASS = 0.01  # minimum `patch_mass` of a token that is not cut off from the patches
MAX_NORM_RATIO = 3.0  # maximum norm of a token's embedding, as a multiple of the median norm of embedded patches
# Maximum cosine similarity between the embedding and the last state of a token that the layers change.
MAX_EMBEDDING_SIMILARITY = 0.9
ROUNDING_ERROR = 1e-6  # rounding error of a state as a fraction of its norm
MAX_HARM_P_VALUE = 0.05  # significance level of the verdict "harmful"; divided by the number of ablations (Bonferroni)
# Expected attention over depth: minimum fraction of tokens attended to in the first third of the layers, and maximum
# ratio of the middle third to the first third.
MIN_EARLY_FRACTION, MAX_MIDDLE_RATIO = 0.75, 2 / 3
MIN_UNIFORM_FRACTION = 0.9  # minimum fraction of tokens attended to in each layer if attention is uniform

ABLATION_TERMS = {"information": "replaced with {}", "presence": "hidden from attention"}


@dataclass(frozen=True)
class Verdict:
    """Verdict on one special token, or on a group of special tokens.

    Attributes:
        token: name of the token, such as "register 1", or of the group, such as "all 4 registers".
        word: "effect beyond the null" (predictions or features depend on the token more than on random tokens and
            patches), "no measurable effect", "harmful" (the accuracy rises without the token), "norm too large" (the
            embedding dominates the state), "not moved" (by training), "same for all images", "cut off from the
            patches", "collapsed" (identical to another token), "equal attention" (nearly the same attention maps as
            another token), or "not judged".
        rating: "good", "neutral", "doubtful" or "bad".
        reason: one sentence with the measured values.
        numbers: measured values by name.
    """

    token: str
    word: str
    rating: Rating
    reason: str
    numbers: dict[str, Any] = field(default_factory=dict)


def diagnose_tokens(
    config: ViTCLSConfig,
    findings: Findings,
    ablations: Ablations | None = None,
    token_movement: Mapping[str, float] | None = None,
    predictions: Predictions | None = None,
    has_head: bool = True,
) -> list[Verdict]:
    """Return one verdict per special token, in sequence order.

    Args:
        config: configuration of the model.
        findings: statistics over a few dozen images or more; with fewer than MIN_IMAGES images, effects are
            not judged.
        ablations: output of `compute_ablations`; if None, effects are not judged.
        token_movement: distance by which training moved each token, with keys such as `cls[0]` (`token_movement` in
            results.json); None if unknown.
        predictions: predictions with known labels (`collect_predictions`). If the accuracy is not better than chance,
            the verdicts state this, because effects on such predictions are not meaningful.
        has_head: whether the model is a classifier.
    """
    names, movement, ablations = get_token_names(config), token_movement or {}, ablations or {}
    verdicts = []
    for index, key in enumerate(get_token_keys(config.token_layout)):
        evidence = TokenEvidence(
            findings=findings,
            index=index,
            names=names,
            num_used_layers=count_used_layers(config, has_head),
            ablations={kind: ablations_by_key[key] for kind, ablations_by_key in ablations.items()},
            num_tests=sum(map(len, ablations.values())),
            movement=movement.get(key),
            has_moved_tokens=any(movement.values()),
            caveat=describe_chance_accuracy(predictions),
        )
        verdicts.append(Verdict(names[index], *judge_token(evidence), numbers=evidence.collect_numbers()))
    return verdicts


@dataclass(frozen=True)
class TokenEvidence:
    """Measurements of one special token."""

    findings: Findings
    index: int  # sequence index of the token
    names: list[str]  # names of all special tokens
    num_used_layers: list[int]  # number of layers whose output is used, for each special token and for the patches
    ablations: dict[str, Ablation]  # ablations of the token by kind; empty if not measured
    num_tests: int  # number of ablations of all tokens and groups
    movement: float | None  # distance by which training moved the token; None if unknown
    has_moved_tokens: bool  # whether training moved any token
    caveat: str  # note if the accuracy is not better than chance; otherwise empty

    @property
    def last_state_index(self) -> int:
        """Return the index of the last state that is used; 0 means the embedding."""
        return self.num_used_layers[self.index]

    @property
    def is_same_for_all_images(self) -> bool:
        """Return whether the last state that is used is the same for all images. The median variation of the channels
        is also checked, because one channel of large magnitude can hide the variation of the other channels."""
        position = self.last_state_index, self.index
        variation = torch.max(self.findings.variation[position], self.findings.channel_variation[position]).item()
        return self.last_state_index > 0 and self.findings.num_images > 1 and variation < MIN_IMAGE_VARIATION

    @property
    def identical_token_and_state(self) -> tuple[int, int] | None:
        """Return the index of an identical token and the index of the last state in which both tokens are used, or
        None if no token is identical."""
        findings, index = self.findings, self.index
        candidates = []
        for other_index in range(len(self.names)):
            state_index = min(self.last_state_index, self.num_used_layers[other_index])
            norms = findings.mean_states[state_index].norm(dim=-1)  # [S]
            variation = findings.variation[state_index] * norms  # [S], in the unit of `state_distance`
            limit = MAX_IDENTICAL_DISTANCE * variation[[index, other_index]].min() + ROUNDING_ERROR * norms[index]
            distance = findings.state_distance[state_index, index, other_index]
            is_similar = findings.between_tokens[state_index, index, other_index] >= MIN_IDENTICAL_SIMILARITY
            if other_index != index and is_similar and distance <= limit:
                candidates.append((distance.item(), other_index, state_index))
        return min(candidates)[1:] if candidates else None

    @property
    def equal_attention_token_and_distance(self) -> tuple[int, float] | None:
        """Return the index of another token with nearly the same attention maps, and the distance between the maps of
        both tokens, relative to the mean distance of these maps from uniform attention. Return None if there is no
        such token."""
        findings, index = self.findings, self.index
        candidates = []
        for other_index in range(len(self.names)):
            layer_slice = slice(0, min(self.last_state_index, self.num_used_layers[other_index]))
            distance = findings.map_distance[layer_slice, index, other_index].sum().item()
            selectivity = findings.map_selectivity[layer_slice][:, [index, other_index]].mean(dim=1).sum().item()
            if other_index != index and selectivity > 0:
                candidates.append((distance / selectivity, other_index))
        distance, other_index = min(candidates, default=(math.inf, index))
        return None if distance > MAX_MAP_DISTANCE else (other_index, distance)

    @property
    def patch_mass(self) -> float:
        """Return the maximum fraction of the token's attention to patches, over all heads of the layers in which this
        attention is used, or 1 if there are no such layers."""
        fractions = self.findings.attention_fractions[: self.last_state_index, :, self.index, -1]  # [layers, H]
        return fractions.max().item() if fractions.numel() else 1.0

    @property
    def norm_ratio(self) -> float:
        """Return the norm of the token's embedding as a multiple of the median norm of embedded patches."""
        norms = self.findings.patch_norms[0]
        return (self.findings.token_norms[0, self.index] / norms.median().clamp(min=1e-12)).item()

    @property
    def embedding_similarity(self) -> float:
        """Return the cosine similarity between the token's embedding and the last state that is used."""
        return self.findings.across_layers[self.index, 0, self.last_state_index].item()

    def describe_movement(self) -> str:
        """Describe how far training moved the token."""
        if self.movement is None:
            return "the movement of the token in training is unknown"
        ratio = self.movement / max(self.findings.token_norms[0, self.index].item(), 1e-12)
        return f"training moved the token by {self.movement:.3g} ({ratio:.2g} times the norm of its embedding)"

    def collect_numbers(self) -> dict[str, Any]:
        """Return the measured values by name."""
        identical_match, attention_match = self.identical_token_and_state, self.equal_attention_token_and_distance
        return summarize_ablations(self.ablations) | {
            "movement": self.movement,
            "read_layers": self.last_state_index,
            "variation": self.findings.variation[self.last_state_index, self.index].item(),
            "patch_mass": self.patch_mass,
            "norm_ratio": self.norm_ratio,
            "embedding_similarity": self.embedding_similarity,
            "identical_token": None if identical_match is None else self.names[identical_match[0]],
            "equal_attention_token": None if attention_match is None else self.names[attention_match[0]],
            "equal_attention_distance": None if attention_match is None else attention_match[1],
        }


def judge_token(evidence: TokenEvidence) -> tuple[str, Rating, str]:
    """Return the word, rating and reason of the verdict on a token: the first verdict whose condition is true."""
    findings, num_layers = evidence.findings, len(evidence.findings.entropy)
    other_index, state_index = evidence.identical_token_and_state or (None, evidence.last_state_index)
    layer_name = "after the last layer"
    if state_index < num_layers:
        layer_name = f"after layer {state_index}, the last layer whose output is used"
    if other_index is not None:
        cosine = findings.between_tokens[state_index, evidence.index, other_index]
        distance = findings.state_distance[state_index, evidence.index, other_index]
        reason = (
            f"{layer_name}, the token is identical to {evidence.names[other_index]} (cosine {cosine:.4f}, "
            f"distance {distance:.2g})."
        )
        return "collapsed", "bad", reason
    if evidence.last_state_index == num_layers and evidence.patch_mass < MIN_PATCH_MASS:
        reason = (
            f"in each layer and attention head, at most {evidence.patch_mass:.2%} of the token's attention goes to "
            "patches, although the output of the token is used."
        )
        return "cut off from the patches", "bad", reason
    if evidence.is_same_for_all_images:
        variation = findings.variation[evidence.last_state_index, evidence.index]
        reason = (
            f"{layer_name}, the state is the same for every image (it varies by {variation:.1g} times the norm of the "
            f"mean state); {evidence.describe_movement()}."
        )
        return "not moved" if evidence.movement == 0 else "same for all images", "bad", reason
    if (harm := describe_harm(evidence.ablations, evidence.num_tests)) is not None:
        return "harmful", "bad", f"{harm}; {evidence.describe_movement()}."
    if evidence.norm_ratio > MAX_NORM_RATIO and evidence.embedding_similarity > MAX_EMBEDDING_SIMILARITY:
        reason = (
            f"the norm of the embedding is {evidence.norm_ratio:.3g} times the median norm of the patches, so layers "
            f"hardly change the token (cosine {evidence.embedding_similarity:.3f} between embedding and last state)"
            f"{evidence.caveat}."
        )
        return "norm too large", "bad", reason
    if evidence.equal_attention_token_and_distance is not None:
        other_index, map_distance = evidence.equal_attention_token_and_distance
        reason = (
            f"the attention maps are nearly equal to the maps of {evidence.names[other_index]} in all layers whose "
            f"output is used (the distance between the maps is {map_distance:.2g} times their distance from uniform "
            "attention)."
        )
        return "equal attention", "doubtful", reason
    if evidence.movement == 0:
        return "not moved", *judge_unmoved_token(evidence)
    if not evidence.ablations:
        return "not judged", "neutral", "the effects of ablating the token were not measured."
    if findings.num_images < MIN_IMAGES:
        return "not judged", "neutral", f"{describe_missing_images(findings.num_images)}."
    reason = f"{describe_comparison(evidence.ablations)}; {evidence.describe_movement()}{evidence.caveat}."
    return judge_effect(evidence.ablations, evidence.caveat, reason)


def judge_unmoved_token(evidence: TokenEvidence) -> tuple[Rating, str]:
    """Return the rating and reason for a token with a movement of 0, which may be frozen or already trained."""
    if evidence.findings.num_images < MIN_IMAGES:
        explanation = describe_missing_images(evidence.findings.num_images)
        return "neutral", f"training did not move the token (movement 0), and its effect is unknown: {explanation}."
    if not evidence.ablations:
        return "neutral", "training did not move the token (movement 0): it is frozen or receives no gradient."
    comparison = f"{describe_comparison(evidence.ablations)}{evidence.caveat}."
    if any(ablation.is_beyond_null for ablation in evidence.ablations.values()):
        explanation = "training did not move the token (movement 0): it is frozen or already trained"
        return "neutral", f"{explanation}; {comparison}"
    if evidence.has_moved_tokens:
        return "bad", f"training did not move the token (movement 0), but moved other tokens; {comparison}"
    return "neutral", f"training did not move any special token (movement 0); {comparison}"


# Effects -------------------------------------------------------------------------------------------------------------


def diagnose_groups(
    config: ViTCLSConfig, ablations: Ablations | None, predictions: Predictions | None = None
) -> list[Verdict]:
    """Return one verdict for each group of several special tokens. An individual register can be redundant even if
    all registers together have an effect. The arguments are the same as in `diagnose_tokens`."""
    verdicts = []
    for group, members in get_group_indices(config.token_layout).items():
        if ablations is None or len(members) == 1:
            continue
        group_ablations = {kind: ablations_by_key[group] for kind, ablations_by_key in ablations.items()}
        token_name = "CLS token" if group == "cls" else SINGLE_TOKEN_NAMES[group]
        num_tests = sum(map(len, ablations.values()))
        judgment = judge_group(group_ablations, num_tests, describe_chance_accuracy(predictions))
        numbers = summarize_ablations(group_ablations)
        verdicts.append(Verdict(f"all {len(members)} {token_name}s", *judgment, numbers=numbers))
    return verdicts


def judge_group(ablations: dict[str, Ablation], num_tests: int, caveat: str) -> tuple[str, Rating, str]:
    """Return the word, rating and reason of the verdict on a group."""
    num_images = ablations["information"].effect.num_images
    if num_images < MIN_IMAGES:
        return "not judged", "neutral", f"{describe_missing_images(num_images)}."
    if (harm := describe_harm(ablations, num_tests, possessive="their")) is not None:
        return "harmful", "bad", f"{harm}."
    return judge_effect(ablations, caveat, f"{describe_comparison(ablations, possessive='their')}{caveat}.")


def judge_effect(ablations: dict[str, Ablation], caveat: str, reason: str) -> tuple[str, Rating, str]:
    """Return the word, rating and reason of a verdict on measured effects."""
    if not any(ablation.is_beyond_null for ablation in ablations.values()):
        return "no measurable effect", "neutral", reason
    return "effect beyond the null", "neutral" if caveat else "good", reason


def describe_harm(ablations: dict[str, Ablation], num_tests: int, possessive: str = "its") -> str | None:
    """Describe an ablation after which predictions are significantly more accurate, and better than a constant
    prediction. Return None if there is no such ablation."""
    for kind, ablation in ablations.items():
        effect = ablation.effect
        is_measured = isinstance(effect, AblationEffect) and effect.improvement is not None
        if is_measured and effect.is_better_than_chance and effect.improvement < MAX_HARM_P_VALUE / num_tests:
            return (
                f"{describe_condition(kind, possessive)}, the accuracy changes by "
                f"{100 * (effect.accuracy_change or 0):+.1f} percentage points (p = {effect.improvement:.1g}, "
                f"{effect.num_images:,} images)"
            )
    return None


def summarize_ablations(ablations: dict[str, Ablation]) -> dict[str, Any]:
    """Return the values of the ablations of a token or group by name: `effect`, `interval` and `null` (smallest null
    effect and largest limit) of the information ablation, and all values of each ablation under its kind."""
    summaries = {}
    for kind, ablation in ablations.items():
        effect, null_interval = ablation.effect, ablation.null_interval
        values: dict[str, Any] = {
            "effect": effect.size,
            "interval": list(effect.interval),
            "null": None if null_interval is None else list(null_interval),
            "null_patches": ablation.patch_effects,
            "null_redrawn": ablation.redrawn_effects,
            "effect_on_null_images": ablation.effect_on_null_images,
            "is_beyond_null": ablation.is_beyond_null,
            "redraw_effect": ablation.redraw_effect,
            "num_images": effect.num_images,
        }
        if isinstance(effect, AblationEffect):
            values["changed_answers"] = effect.changed_answers
            values["changed_answers_interval"] = list(effect.changed_interval)
            values["accuracy_change"] = effect.accuracy_change
            values["p_value_of_improvement"] = effect.improvement
        else:
            values |= {"cosine_change": effect.cosine_change, "knn_agreement": effect.knn_agreement}
        summaries[kind] = values
    information = summaries.get("information", {})
    return {name: information.get(name) for name in ("effect", "interval", "null")} | summaries


def describe_missing_images(num_images: int) -> str:
    """Describe how many images are required to judge effects."""
    verb = "are" if num_images > 1 else "is"
    return f"measuring the effect requires {MIN_IMAGES} or more images, but there {verb} {num_images}"


def describe_comparison(ablations: dict[str, Ablation], possessive: str = "its") -> str:
    """Describe the effects of ablations, compared with the null distributions."""
    kinds = [kind for kind, ablation in ablations.items() if ablation.is_beyond_null]
    summary = f"effect beyond the null ({' and '.join(kinds)})" if kinds else "no effect beyond the null"
    effects = [
        f"{describe_condition(kind, possessive)}, {describe_effect(ablation)}" for kind, ablation in ablations.items()
    ]
    return f"{summary}: {'; '.join(effects)}"


def describe_condition(kind: str, possessive: str) -> str:
    """Describe an ablation as a condition, such as `if the token is replaced with its mean`."""
    subject, means_text = ("the token is", "its mean") if possessive == "its" else ("the tokens are", "their means")
    return f"if {subject} {ABLATION_TERMS[kind].format(means_text)}"


def describe_effect(ablation: Ablation) -> str:
    """Describe the effect of an ablation, with its interval and its null distributions."""
    effect = ablation.effect
    low, high = effect.interval
    if isinstance(effect, AblationEffect):
        text = f"{describe_changed_predictions(effect)} predictions change, and logits change by {effect.size:.2g}"
    else:
        changes_text = ", ".join(f"{name} {value:.2g}" for name, value in effect.cosine_change.items())
        text = f"the cosine distance between the features before and after the ablation is {changes_text}"
        if effect.knn_agreement is not None:
            text += f", and {effect.knn_agreement:.0%} of the nearest neighbors stay the same"
    null_effects = {"random patches": ablation.patch_effects, "random tokens": ablation.redrawn_effects}
    range_texts = [f"{name} {min(sizes):.2g} to {max(sizes):.2g}" for name, sizes in null_effects.items() if sizes]
    null_text = f"; null: {', '.join(range_texts)}" if range_texts else ""
    return f"{text} (95% interval {low:.2g} to {high:.2g}{null_text})"


def describe_changed_predictions(effect: AblationEffect) -> str:
    """Return text such as `0 of 256 (at most 1.2%)`, with the upper bound of the 95% interval."""
    num_changed = round(effect.changed_answers * effect.num_images)
    return f"{num_changed:,} of {effect.num_images:,} (at most {effect.changed_interval[1]:.1%})"


def describe_chance_accuracy(predictions: Any) -> str:
    """Return a note if the accuracy is not better than chance, and an empty string otherwise."""
    if not isinstance(predictions, Predictions) or predictions.is_better_than_chance() is not False:
        return ""
    accuracy, majority_accuracy = predictions.compute_accuracy(), predictions.compute_majority_accuracy()
    return (
        f"; however, the accuracy is not better than chance ({accuracy:.1%} on {len(predictions.predicted):,} images; "
        f"most frequent label: {majority_accuracy:.1%} of the images)"
    )


# Depth ---------------------------------------------------------------------------------------------------------------


def describe_depth(config: ViTCLSConfig, findings: Findings, has_head: bool = True) -> list[str]:
    """Describe the selectivity of each special token in the first, middle and last third of the layers whose output is
    used. For CLS and distillation tokens, compare the selectivity with the expected pattern: attention is nearly
    uniform in early layers and selective in middle layers.

    The number of tokens attended to is the exponential of the entropy; 100% means all visible tokens.
    """
    num_attended_tokens = findings.entropy.mean(dim=1).exp()  # [L, S], geometric mean over heads
    fractions = num_attended_tokens / findings.uniform_by_token["entropy"].exp()  # [L, S]
    *num_used_layers, _ = count_used_layers(config, has_head)
    descriptions = []
    for index, (name, num_layers) in enumerate(zip(get_token_names(config), num_used_layers, strict=True)):
        if num_layers == 0:
            descriptions.append(f"{name} attends to other tokens only in layer 1, and its output is not used.")
            continue
        read_fractions = fractions[:num_layers, index]
        thirds = torch.stack([third.mean() for third in read_fractions.tensor_split(3) if len(third)])  # [3 or fewer]
        layers_text = "in the first, middle and last third of the layers" if len(thirds) == 3 else "layer by layer"
        selective_layer = int(num_attended_tokens[:num_layers, index].argmin())
        num_tokens = round(num_attended_tokens[selective_layer, index].item())
        is_register = index >= config.token_layout.registers.start
        pattern = "" if is_register else describe_depth_pattern(read_fractions, thirds)
        descriptions.append(
            f"{name} attends to {', '.join(f'{third:.0%}' for third in thirds.tolist())} of the visible tokens "
            f"{layers_text} (100% is uniform), and is most selective in layer {selective_layer + 1}: "
            f"{num_tokens} token{'s' if num_tokens != 1 else ''}.{pattern}"
        )
    return descriptions


def describe_depth_pattern(fractions: torch.Tensor, thirds: torch.Tensor) -> str:
    """Return a sentence that compares the fractions of tokens attended to, in each layer [L] and in each third of the
    layers [3 or fewer], with the expected pattern. The sentence begins with a space."""
    if bool((fractions >= MIN_UNIFORM_FRACTION).all()):
        return " Attention is nearly uniform in every layer, so the token selects no patches."
    if len(thirds) < 3:
        return " There are too few layers to compare early and middle layers."
    early, middle, _ = thirds.tolist()
    if early >= MIN_EARLY_FRACTION and middle <= MAX_MIDDLE_RATIO * early:
        return " This is the expected pattern: nearly uniform in early layers, selective in middle layers."
    return " This is not the expected pattern (nearly uniform in early layers, selective in middle layers)."


def summarize_diagnosis(verdicts: Sequence[Verdict], groups: Sequence[Verdict], patches: PatchDiagnosis) -> str:
    """Return one line with the tokens and groups of each verdict, and whether there are artifacts."""
    tokens_by_word: dict[str, list[str]] = {}
    for verdict in [*verdicts, *groups]:
        tokens_by_word.setdefault(verdict.word, []).append(verdict.token)
    diagnoses = [f"{', '.join(tokens)}: {word}" for word, tokens in tokens_by_word.items()]
    return "; ".join([*diagnoses, f"patches: {patches.word}"])
