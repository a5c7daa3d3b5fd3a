"""Detection of artifacts (patches whose norms form a second, higher mode) and of registers that absorb artifacts.

find_second_mode(findings.patch_ratios[layer])    a SecondMode, or None
diagnose_patches(config, findings, has_head)      a PatchDiagnosis
"""

import math
from dataclasses import dataclass

import torch

from ..configuration_vitcls import ViTCLSConfig
from .maps import count_used_layers
from .test_time_registers import OUTLIER_RATIO
from .token_statistics import Findings


# Bin width in the histogram of norm ratios (natural logarithms), and widths of the compared windows, in bins
BIN_WIDTH, WINDOW_WIDTHS = 0.05, (5, 9, 17)
MAX_LOG_RATIO = 5.0  # maximum logarithm of the ratio of a norm to the median; the last bin includes larger norms
MIN_VALLEY_LOG_RATIO = 0.25  # minimum logarithm of the ratio of the valley to the median
MIN_MODE_SCORE = 4.0  # minimum `SecondMode.score`
MODE_FRACTION_RANGE = 0.001, 0.45  # range of the fraction of patches in a second mode
# A mode with a larger fraction may be the foreground, unless its norms are OUTLIER_RATIO times the median
MAX_OUTLIER_FRACTION = 0.2
MIN_PATCHES = 1000  # minimum number of patches that show a mode of 2% of the patches
MIN_RISE_SCORE = 4.0  # minimum increase in the outlier fraction, in standard errors, if registers are hidden


@dataclass(frozen=True)
class SecondMode:
    """A second, higher mode in the distribution of the logarithms of patch norms.

    Attributes:
        threshold: norm above which a patch is in the mode, as a multiple of the median norm of the image.
        ratio: median norm of the patches in the mode; each norm is divided by the median norm of its image.
        fraction: fraction of all patches that are in the mode.
        score: number of patches in the window of the mode minus number of patches in the valley, in standard
            deviations (Poisson distribution).
    """

    threshold: float
    ratio: float
    fraction: float
    score: float


@dataclass(frozen=True)
class PatchDiagnosis:
    """Diagnosis of the patch norms.

    Attributes:
        word: "artifacts" if the norms have a second mode in the last layers whose output is used; otherwise
            "no artifacts", or "too few patches to tell" if there are fewer than MIN_PATCHES patches.
        rating: "bad", "good" or "neutral".
        reason: sentences with the measured values.
        layer: the layer after which the values were measured; 0 means the embeddings.
        num_patches: number of patches.
        second_mode: the second mode after this layer; None if there is no second mode.
        second_mode_without_registers: the second mode with the registers hidden from attention; None if there is no
            such mode.
    """

    word: str
    rating: str
    reason: str
    layer: int
    num_patches: int
    second_mode: SecondMode | None
    second_mode_without_registers: SecondMode | None
    token: str = "patches"


def find_second_mode(ratios: torch.Tensor) -> SecondMode | None:
    """Return the second mode of the patch norms, or None if the norm distribution has one mode.

    Artifacts form a separate mode (Darcet et al. 2023, arXiv 2309.16588, figure 3). A fixed limit on the norm cannot
    detect artifacts, because a wide distribution with one mode also has patches above the limit. In the histogram of
    logarithms, a second mode is a window with significantly more patches than the valley, which is a window between
    this mode and the median.

    Args:
        ratios: [n], norms divided by the median norm of the image (`Findings.patch_ratios` of one layer).
    """
    log_ratios = ratios.float().clamp(min=1e-12).log().clamp(max=MAX_LOG_RATIO)
    num_bins = round(MAX_LOG_RATIO / BIN_WIDTH)
    counts = log_ratios[log_ratios > 0].histc(num_bins, min=0, max=MAX_LOG_RATIO)
    best_mode: SecondMode | None = None
    for width in WINDOW_WIDTHS:
        windows = counts.unfold(0, width, 1).sum(dim=-1)  # [num_bins - width + 1]
        valley, peak = windows[:, None], windows[None, :]
        scores = (peak - valley) / (peak + valley).clamp(min=1).sqrt()
        window_starts = torch.arange(len(windows))
        can_be_valley = window_starts >= math.ceil(MIN_VALLEY_LOG_RATIO / BIN_WIDTH)
        is_valid_pair = can_be_valley[:, None] & (window_starts >= window_starts[:, None] + width)
        scores = scores.where(is_valid_pair, -torch.inf)
        score = scores.max().item()
        valley_indices = (scores >= score).any(dim=1).nonzero().flatten()
        threshold = math.exp((valley_indices.float().mean().item() + width / 2) * BIN_WIDTH)
        is_in_mode = ratios > threshold
        fraction = is_in_mode.float().mean().item()
        is_second_mode = score >= MIN_MODE_SCORE and MODE_FRACTION_RANGE[0] <= fraction <= MODE_FRACTION_RANGE[1]
        if is_second_mode and (best_mode is None or score > best_mode.score):
            ratio = ratios[is_in_mode].median().item()
            if fraction <= MAX_OUTLIER_FRACTION or ratio >= OUTLIER_RATIO:
                best_mode = SecondMode(threshold, ratio, fraction, score)
    return best_mode


def diagnose_patches(config: ViTCLSConfig, findings: Findings, has_head: bool = True) -> PatchDiagnosis:
    """Determine whether the patch norms have a second mode, and whether registers absorb outliers.

    The verdict applies to the last quarter of the layers whose output is used; Darcet et al. (2023, arXiv 2309.16588)
    measure only the last layer.
    """
    last_layer = count_used_layers(config, has_head)[-1]
    first_layer = last_layer - max(last_layer // 4, 1) + 1
    second_modes = {
        layer: find_second_mode(findings.patch_ratios[layer]) for layer in range(first_layer, last_layer + 1)
    }
    layer = max(second_modes, key=lambda layer: 0.0 if (mode := second_modes[layer]) is None else mode.fraction)
    second_mode, ratios = second_modes[layer], findings.patch_ratios[layer]
    word, rating = "no artifacts", "good"
    if second_mode is not None:
        word, rating = "artifacts", "bad"
        registers_text = "more registers" if config.num_register_tokens else "registers"
        sentence = (
            f"{describe_layer(layer).capitalize()}, {second_mode.fraction:.1%} of the patches have outlier norms, at "
            f"{second_mode.ratio:.1f} times the median norm of the image; {registers_text} may absorb them (train "
            "with --num-register-tokens, or see analysis.test_time_registers)"
        )
    elif len(ratios) < MIN_PATCHES:
        word, rating = "too few patches to tell", "neutral"
        sentence = f"There are {len(ratios):,} patches, but {MIN_PATCHES:,} are needed. Pass more images"
    else:
        sentence = (
            f"The norms of {len(ratios):,} patches have one mode {describe_layer(layer)}; the largest norm is "
            f"{ratios.max():.1f} times the median norm of its image"
        )
    second_mode_without_registers, register_sentences = compare_without_registers(findings, layer)
    return PatchDiagnosis(
        word=word,
        rating=rating,
        reason=". ".join([sentence, *register_sentences]) + ".",
        layer=layer,
        num_patches=len(ratios),
        second_mode=second_mode,
        second_mode_without_registers=second_mode_without_registers,
    )


def describe_layer(layer: int) -> str:
    """Return a layer as text, such as "after layer 3"; 0 means the embeddings."""
    return f"after layer {layer}" if layer else "in the embeddings"


def compare_without_registers(findings: Findings, layer: int) -> tuple[SecondMode | None, list[str]]:
    """Return the second mode (or None) of the norms with the registers hidden from attention, and a list of sentences.
    The list is empty if the registers do not absorb outliers."""
    if findings.patch_ratios_without_registers is None:
        return None, []
    all_ratios = findings.patch_ratios[layer], findings.patch_ratios_without_registers[layer]
    second_mode = find_second_mode(all_ratios[1])
    if second_mode is None:
        return None, []
    before, after = ((ratios > second_mode.threshold).float().mean().item() for ratios in all_ratios)
    mean_fraction = (before + after) / 2
    standard_error = (2 * mean_fraction * (1 - mean_fraction) / len(all_ratios[0])) ** 0.5
    if after - before < MIN_RISE_SCORE * standard_error:
        return second_mode, []
    return second_mode, [
        f"The registers absorb outliers (norms above {second_mode.threshold:.1f} times the median): with the "
        f"registers hidden from attention, the fraction of outliers increases from {before:.2%} to {after:.2%}"
    ]
