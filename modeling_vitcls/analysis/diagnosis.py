"""Diagnosis with measured values: tokens, groups of tokens, and patches.

    diagnose_tokens(use, findings, ablations)     one Verdict per special token, then one per group of several tokens
    diagnose_patches(use, findings)               one Verdict on the norms of the patches

A verdict is an `Outcome`, the `Fault`s that were found, and numbers. verdict_texts.py writes the
sentence.

A token's output in the last layer is used only if the head uses the token (`TokenUse`), so states
and attention are judged in the last layer whose output is used.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Literal, Self

import torch

from ..inference.token_names import SINGLE_TOKEN_NAMES, get_token_names
from .ablation import MIN_IMAGES, Ablations, Effect, get_ablation_targets
from .register_neurons import OUTLIER_RATIO
from .token_statistics import Findings
from .token_use import TokenUse


Rating = Literal["good", "neutral", "doubtful", "bad"]


class RatedText(StrEnum):
    """A text with a rating."""

    rating: Rating

    def __new__(cls, text: str, rating: Rating) -> Self:
        member = str.__new__(cls, text)
        member._value_ = text
        member.rating = rating
        return member


class Outcome(RatedText):
    """What the measurements of a token or of the patches show."""

    # the token alone feeds a head: every replacement has an effect, so there is no test
    READ = "read by the classifier", "good"
    OUTPUT = "an output of the encoder", "good"
    # outputs depend on the token more than on a random token in its place, or a head reads it
    # together with other tokens
    EFFECT = "has an effect", "good"
    # outputs depend on the token, but a random token in its place does as well
    REPLACEABLE = "replaceable", "neutral"
    # the interval of the effect includes no change
    NO_EFFECT = "no measurable effect", "neutral"
    # fewer than MIN_IMAGES images
    FEW_IMAGES = "too few images to tell", "neutral"
    NOT_MEASURED = "not measured", "neutral"

    ONE_MODE = "no artifacts", "good"
    ARTIFACTS = "artifacts", "bad"
    FEW_PATCHES = "too few patches to tell", "neutral"


class Fault(RatedText):
    """What is wrong with a token, the most important fault first."""

    HARMFUL = "harmful", "bad"
    IDENTICAL = "identical", "bad"
    SAME_STATE = "same for all images", "bad"
    NOT_MOVED = "not moved", "bad"
    SAME_ATTENTION = "same attention in every image", "doubtful"


MIN_IMAGE_VARIATION = 1e-3  # minimum variation of a token whose state depends on the image
# maximum distance between identical tokens, relative to their variation over images
MAX_IDENTICAL_DISTANCE = 0.01
# The attention is the same in every image in layers whose `map_variation` is below MAX_MAP_VARIATION
# and whose `map_selectivity` is at least MIN_SELECTIVITY: uniform attention is the same, too
MAX_MAP_VARIATION = 0.3
MIN_SELECTIVITY = 0.1
MIN_COMPARED_IMAGES = 5  # minimum number of images for this statement
ROUNDING_ERROR = 1e-6  # rounding error of a state as a fraction of its norm
# significance level of "harmful"; divided by the number of ablations (Bonferroni)
MAX_HARM_P_VALUE = 0.05

# Bin width in the histogram of norm ratios (natural logarithms), and widths of the compared
# windows, in bins
BIN_WIDTH = 0.05
WINDOW_WIDTHS = (5, 9, 17)
# maximum logarithm of the ratio of a norm to the median; the last bin includes larger norms
MAX_LOG_RATIO = 5.0
MIN_VALLEY_LOG_RATIO = 0.25  # minimum logarithm of the ratio of the valley to the median
MIN_MODE_SCORE = 4.0  # minimum `SecondMode.score`
MODE_FRACTION_RANGE = 0.001, 0.45  # range of the fraction of patches in a second mode
# A mode with a larger fraction may be the foreground, unless its norms are OUTLIER_RATIO times the
# median
MAX_OUTLIER_FRACTION = 0.2
MIN_PATCHES = 1000  # minimum number of patches that show a mode of 2% of the patches

Faults = dict[Fault, dict[str, Any]]  # fault -> values of its sentence


@dataclass(frozen=True)
class Verdict:
    """Verdict on a token, a group of tokens or the patches.

    Attributes:
        token: name of the token, such as "register 1", or of the group, such as "all 4 registers".
        outcome: what the measurements show.
        numbers: measured values by name.
        faults: faults of a token.
        is_group: whether the verdict is on several tokens.
    """

    token: str
    outcome: Outcome
    numbers: dict[str, Any] = field(default_factory=dict)
    faults: Faults = field(default_factory=dict)
    is_group: bool = False

    @property
    def headline(self) -> Outcome | Fault:
        """Return the most important fault or, without faults, the outcome."""
        return next((fault for fault in Fault if fault in self.faults), self.outcome)

    @property
    def rating(self) -> Rating:
        """Return the rating of the headline.

        A token that is read without a measurable effect is doubtful.
        """
        is_read = self.headline in (Outcome.READ, Outcome.OUTPUT)
        return "doubtful" if is_read and not self.numbers["is_measurable"] else self.headline.rating


def diagnose_tokens(
    use: TokenUse,
    findings: Findings,
    ablations: Ablations | None = None,
    token_movement: Mapping[str, float] | None = None,
) -> list[Verdict]:
    """Return one verdict per special token, in sequence order, and one per group of several tokens.

    A register can be redundant even if all registers together have an effect.

    Args:
        use: the tokens that the outputs of the model read.
        findings: statistics over images.
        ablations: output of `compute_ablations`; if None, effects are not judged.
        token_movement: distance by which training moved each token, with keys such as `cls[0]`
            (`token_movement` in results.json); None if unknown.
    """
    *used_layers, _ = use.num_layers
    names = get_token_names(use.config)
    movement = token_movement or {}
    verdicts = []

    for key, indices in get_ablation_targets(use.config.token_layout).items():
        effects = (ablations or {}).get(key, {})
        is_group = "[" not in key
        group_name = "CLS token" if key == "cls" else SINGLE_TOKEN_NAMES.get(key)
        outcome, numbers = judge_effects(use, indices, effects)
        faults = find_harm(effects, len(ablations or {}))

        if not is_group:
            moved = movement.get(key)
            numbers |= {"movement": moved, **collect_numbers(used_layers, findings, indices[0])}
            faults |= find_faults(use, findings, indices[0], names, numbers)
            is_unimportant = outcome in (Outcome.REPLACEABLE, Outcome.NO_EFFECT)
            if moved == 0 and is_unimportant and any(movement.values()):
                faults[Fault.NOT_MOVED] = {}

        name = f"all {len(indices)} {group_name}s" if is_group else names[indices[0]]
        verdicts.append(Verdict(name, outcome, numbers, faults, is_group))
    return verdicts


# Effects ------------------------------------------------------------------------------------------


def judge_effects(
    use: TokenUse, indices: Sequence[int], effects: dict[str, Effect]
) -> tuple[Outcome, dict[str, Any]]:
    """Return the outcome for the tokens at sequence indices `indices`, and the measured values.

    `effects` maps the name of each output to an effect.
    """
    if not effects:
        return Outcome.NOT_MEASURED, {}

    heads = use.find_heads_of(indices)
    is_read = not use.read_tokens.isdisjoint(indices)

    # The effect with the largest ratio to its limit decides; without limits, the largest effect.
    name = max(
        [head for head in heads if head in effects] or effects,
        key=lambda name: (
            effects[name].is_beyond_limit,
            effects[name].is_measurable,
            effects[name].size / (effects[name].limit or 1),
        ),
    )
    effect = effects[name]

    if effect.num_images < MIN_IMAGES:
        outcome = Outcome.FEW_IMAGES
    elif heads:
        outcome = Outcome.READ if use.has_head else Outcome.OUTPUT
    elif not effect.is_measurable:
        outcome = Outcome.NO_EFFECT
    elif is_read or effect.is_beyond_limit:
        outcome = Outcome.EFFECT
    else:
        outcome = Outcome.REPLACEABLE

    return outcome, {
        "is_measurable": effect.is_measurable,
        "decided_by": name,
        "heads": heads,
        "num_images": effect.num_images,
        "effects": {key: asdict(value) | {"limit": value.limit} for key, value in effects.items()},
    }


def find_harm(effects: dict[str, Effect], num_tests: int) -> Faults:
    """Return the fault "harmful" if predictions are significantly more accurate after an ablation.

    They must also be better than a constant prediction.
    """
    for name, effect in effects.items():
        limit = MAX_HARM_P_VALUE / (num_tests * len(effects))
        if (
            effect.improvement is not None
            and effect.improvement < limit
            and effect.is_better_than_chance
        ):
            return {Fault.HARMFUL: {"output": name}}
    return {}


# Faults -------------------------------------------------------------------------------------------


def find_faults(
    use: TokenUse,
    findings: Findings,
    index: int,
    names: Sequence[str],
    numbers: Mapping[str, Any],
) -> Faults:
    """Return the faults of the token at sequence index `index`.

    `numbers` are the values of `collect_numbers`.
    """
    last = numbers["read_layers"]
    faults: Faults = {}
    identical = find_identical_token(use.num_layers[:-1], findings, index)
    if identical is not None:
        other, shared = identical
        faults[Fault.IDENTICAL] = {"other": names[other], "layer": shared}

    if last > 0 and findings.num_images > 1 and numbers["variation"] < MIN_IMAGE_VARIATION:
        faults[Fault.SAME_STATE] = {"is_last_layer": last == len(findings.entropy)}

    # People take the maps of the tokens that a head reads for an explanation
    is_same = findings.map_variation[:last, index] < MAX_MAP_VARIATION  # [used layers]
    is_same &= findings.map_selectivity[:last, index] >= MIN_SELECTIVITY
    has_enough_images = findings.num_images >= MIN_COMPARED_IMAGES
    if index in use.read_tokens and has_enough_images and int(is_same.sum()) > last / 2:
        faults[Fault.SAME_ATTENTION] = {"layers": (is_same.nonzero().flatten() + 1).tolist()}
    return faults


def collect_numbers(used_layers: Sequence[int], findings: Findings, index: int) -> dict[str, Any]:
    """Return the measured values of the token at sequence index `index` by name.

    The smaller variation of one very large channel does not hide the variation of the other
    channels.
    """
    last = used_layers[index]
    variation = torch.max(findings.variation[last, index], findings.channel_variation[last, index])
    return {"read_layers": last, "variation": variation.item()}


def find_identical_token(
    used_layers: Sequence[int], findings: Findings, index: int
) -> tuple[int, int] | None:
    """Return the index of the nearest token with the same state, and a layer, or None.

    The layer is the last in which both tokens are used, where their states are compared.
    """
    candidates = []
    for other in range(len(used_layers)):
        last = min(used_layers[index], used_layers[other])
        norms = findings.mean_states[last].norm(dim=-1)  # [S]
        variation = findings.variation[last] * norms  # [S], in the unit of `state_distance`
        max_distance = MAX_IDENTICAL_DISTANCE * variation[[index, other]].min()
        limit = max_distance + ROUNDING_ERROR * norms[index]

        distance = findings.state_distance[last, index, other]
        if other != index and distance <= limit:
            candidates.append((distance.item(), other, last))

    return min(candidates)[1:] if candidates else None


# Patches ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SecondMode:
    """A second, higher mode in the distribution of the logarithms of patch norms.

    Attributes:
        threshold: norm above which a patch is in the mode, as a multiple of the median norm of the
            image.
        ratio: median norm of the patches in the mode; each norm is divided by the median norm of
            its image.
        fraction: fraction of all patches that are in the mode.
        score: number of patches in the window of the mode minus number of patches in the valley, in
            standard deviations (Poisson distribution).
    """

    threshold: float
    ratio: float
    fraction: float
    score: float


def find_second_mode(ratios: torch.Tensor) -> SecondMode | None:
    """Return the second mode of the patch norms, or None if the norm distribution has one mode.

    Artifacts form a separate mode (Darcet et al. 2023, arXiv 2309.16588, figure 3). A fixed limit
    on the norm cannot detect artifacts, because a wide distribution with one mode also has patches
    above the limit. In the histogram of logarithms, a second mode is a window with significantly
    more patches than the valley, which is a window between this mode and the median.

    Args:
        ratios: [n], norms divided by the median norm of the image (`Findings.patch_ratios` of one
            layer).
    """
    log_ratios = ratios.float().clamp(min=1e-12).log().clamp(max=MAX_LOG_RATIO)
    num_bins = round(MAX_LOG_RATIO / BIN_WIDTH)
    counts = log_ratios[log_ratios > 0].histc(num_bins, min=0, max=MAX_LOG_RATIO)

    best_mode: SecondMode | None = None
    for width in WINDOW_WIDTHS:
        windows = counts.unfold(0, width, 1).sum(dim=-1)  # [num_bins - width + 1]
        valley = windows[:, None]
        peak = windows[None, :]
        scores = (peak - valley) / (peak + valley).clamp(min=1).sqrt()  # [valleys, peaks]
        window_starts = torch.arange(len(windows))
        can_be_valley = window_starts >= math.ceil(MIN_VALLEY_LOG_RATIO / BIN_WIDTH)
        is_valid_pair = can_be_valley[:, None] & (window_starts >= window_starts[:, None] + width)
        scores = scores.where(is_valid_pair, -torch.inf)

        score = scores.max().item()
        valley_indices = (scores >= score).any(dim=1).nonzero().flatten()
        threshold = math.exp((valley_indices.float().mean().item() + width / 2) * BIN_WIDTH)

        is_in_mode = ratios > threshold
        fraction = is_in_mode.float().mean().item()
        is_second_mode = (
            score >= MIN_MODE_SCORE and MODE_FRACTION_RANGE[0] <= fraction <= MODE_FRACTION_RANGE[1]
        )
        if is_second_mode and (best_mode is None or score > best_mode.score):
            ratio = ratios[is_in_mode].median().item()
            if fraction <= MAX_OUTLIER_FRACTION or ratio >= OUTLIER_RATIO:
                best_mode = SecondMode(threshold, ratio, fraction, score)

    return best_mode


def diagnose_patches(use: TokenUse, findings: Findings) -> Verdict:
    """Determine whether the patch norms have a second mode ("artifacts").

    It applies to the last quarter of the layers whose output is used; Darcet et al. (2023, arXiv
    2309.16588) measure only the last layer.
    `numbers["layer"]` is the layer with the largest mode, or the last layer that is used if there
    is no second mode; 0 means the embeddings.
    """
    last_layer = use.num_layers[-1]
    layers = range(last_layer - max(last_layer // 4, 1) + 1, last_layer + 1)
    modes = {layer: find_second_mode(findings.patch_ratios[layer]) for layer in layers}
    fractions = {layer: mode.fraction for layer, mode in modes.items() if mode is not None}
    layer = max(fractions, key=fractions.__getitem__, default=last_layer)
    mode = modes[layer]
    ratios = findings.patch_ratios[layer]

    outcome = Outcome.ONE_MODE
    if mode is not None:
        outcome = Outcome.ARTIFACTS
    elif len(ratios) < MIN_PATCHES:
        outcome = Outcome.FEW_PATCHES

    numbers = {
        "layer": layer,
        "num_patches": len(ratios),
        "largest_ratio": ratios.max().item(),
        "second_mode": None if mode is None else asdict(mode),
        "has_registers": use.config.num_register_tokens > 0,
    }
    return Verdict("patches", outcome, numbers)


def summarize_diagnosis(verdicts: Sequence[Verdict]) -> str:
    """Return one line with the headlines of all verdicts and the tokens of each headline."""
    tokens_by_headline: dict[str, list[str]] = {}
    for verdict in verdicts:
        tokens_by_headline.setdefault(verdict.headline, []).append(verdict.token)
    return "; ".join(
        f"{', '.join(tokens)}: {headline}" for headline, tokens in tokens_by_headline.items()
    )
