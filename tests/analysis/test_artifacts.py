"""Artifacts: a second mode in the distribution of patch norms, planted in samples, statistics and models."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config
from helpers.varied_models import center_logits, collect_findings

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.analysis.artifacts import diagnose_patches, find_second_mode
from modeling_vitcls.analysis.token_statistics import Findings


PIXELS = build_images(16)


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(num_labels=8, **{"num_hidden_layers": 3, **fields})
    return center_logits(ViTCLSForImageClassification(config), PIXELS)


def sample_norms(
    seed: int, sigma: float, fraction: float = 0.0, ratio: float = 1.0, count: int = 4096
) -> torch.Tensor:
    """Return log-normal norms as multiples of their median; a fraction has a second mode at a ratio."""
    generator = torch.Generator().manual_seed(seed)
    norms = (sigma * torch.randn(count, generator=generator)).exp()
    outliers = round(fraction * count)
    norms[:outliers] = ratio * (0.1 * torch.randn(outliers, generator=generator)).exp()
    return norms / norms.median()


@pytest.mark.parametrize(("sigma", "count"), [(0.1, 512), (0.25, 4096), (0.45, 50_000)])
def test_one_mode_has_no_artifacts(sigma: float, count: int) -> None:
    """No false alarm in 50 samples of each width."""
    assert not any(find_second_mode(sample_norms(seed, sigma, count=count)) for seed in range(50))


@pytest.mark.parametrize(("fraction", "ratio", "sigma"), [(0.02, 2.5, 0.15), (0.02, 5, 0.3), (0.06, 20, 0.3)])
def test_a_second_mode_is_found_from_2_5_times_the_median(fraction: float, ratio: float, sigma: float) -> None:
    """Check ratios below three times the median, 20 samples each."""
    for seed in range(20):
        mode = find_second_mode(sample_norms(seed, sigma, fraction, ratio))
        assert mode is not None and mode.fraction == pytest.approx(fraction, rel=0.2)
        assert mode.ratio == pytest.approx(ratio, rel=0.1) and 1.2 < mode.threshold < ratio


def build_ratios(num_outliers: int, logarithm: float, count: int = 4096) -> torch.Tensor:
    """Return norms within 1% of their median, and outliers that all have the same logarithm."""
    ratios = torch.linspace(0.99, 1.01, count)
    ratios[:num_outliers] = math.exp(logarithm)
    return ratios


def test_the_second_mode_in_numbers() -> None:
    """Windows have 5 bins of 0.05. The valley begins at 0.25 or more, and all valleys from 0.25 to 0.75 are empty."""
    mode = find_second_mode(build_ratios(20, 1.02))
    assert mode is not None
    assert mode.score == pytest.approx(20**0.5) and mode.fraction == pytest.approx(20 / 4096)
    assert mode.ratio == pytest.approx(math.exp(1.02)) and mode.threshold == pytest.approx(math.exp(0.5 + 0.125))
    assert find_second_mode(build_ratios(15, 1.02)) is None  # 15 ** 0.5 is less than 4 standard deviations
    assert find_second_mode(build_ratios(20, 0.45)) is None  # too near to the median: no valley from 0.25 to 0.5
    assert find_second_mode(build_ratios(20, 0.52)) is not None
    ratios = build_ratios(20, 1.02)
    ratios[:5] = 4.0
    mode_of_two_norms = find_second_mode(ratios)
    assert mode_of_two_norms is not None and mode_of_two_norms.ratio == pytest.approx(math.exp(1.02))  # the median
    far = find_second_mode(build_ratios(20, 8.0))  # beyond the histogram
    assert far is not None and far.ratio == pytest.approx(math.exp(8)) and far.fraction == mode.fraction


def test_patches_in_the_valley_lower_the_score() -> None:
    """Each bin contains one patch, so windows of 5 bins contain 5 patches in the valley and 45 in the mode."""
    ratios = build_ratios(40, 1.02)
    ratios[40:139] = torch.exp(0.05 * (torch.arange(1, 100) + 0.5))
    mode = find_second_mode(ratios)
    assert mode is not None and mode.score == pytest.approx(40 / 50**0.5)
    assert mode.threshold == pytest.approx(math.exp(0.5 + 0.125))


def test_large_modes_are_outliers_only_at_three_times_the_median() -> None:
    assert find_second_mode(build_ratios(800, 1.02)) is not None
    assert find_second_mode(build_ratios(840, 1.02)) is None  # more than 20%: may be the foreground
    assert find_second_mode(build_ratios(1230, 1.61)) is not None  # 30% at five times the median
    assert find_second_mode(build_ratios(60, 1.02, 50_000)) is not None
    assert find_second_mode(build_ratios(40, 1.02, 50_000)) is None  # less than 0.1%


def test_the_best_window_width_is_used() -> None:
    """A wide mode has few patches in each narrow window, so the widest window of 17 bins has the highest score."""
    for count in (30, 100):  # 100 patches are a mode for all widths
        ratios = build_ratios(count, 0.0)
        ratios[:count] = torch.linspace(1.52, 2.28, count).exp()
        mode = find_second_mode(ratios)
        assert mode is not None and mode.score == pytest.approx(count**0.5)
        assert mode.fraction == pytest.approx(count / 4096)


def replace_ratios(
    findings: Findings, by_layer: dict[int, float], without: dict[int, float] | None = None
) -> Findings:
    """Return findings with a fraction of the patches in a second mode after some layers, also without registers."""
    count = len(findings.patch_norms)

    def draw(fractions: dict[int, float]) -> torch.Tensor:
        return torch.stack([sample_norms(layer, 0.2, fractions.get(layer, 0.0), 6.0) for layer in range(count)])

    hidden = None if without is None else draw(without)
    return dataclasses.replace(findings, patch_ratios=draw(by_layer), patch_ratios_without_registers=hidden)


def test_the_last_layers_that_are_used_are_decisive() -> None:
    """The head does not use the patches of layer 9; the last quarter of 8 layers begins with layer 7."""
    model = build_classifier(num_hidden_layers=9, num_register_tokens=0)
    findings = collect_findings(model, PIXELS)
    for layers, word in (([9], "no artifacts"), ([3], "no artifacts"), ([6], "no artifacts"), ([7], "artifacts")):
        found = diagnose_patches(model.config, replace_ratios(findings, dict.fromkeys(layers, 0.02)))
        assert found.word == word, layers
    assert found.second_mode is not None and found.second_mode.ratio == pytest.approx(6, rel=0.05)
    assert (found.rating, found.layer, found.num_patches) == ("bad", 7, 4096)
    encoder = diagnose_patches(model.config, replace_ratios(findings, {9: 0.02}), has_head=False)
    assert (encoder.word, encoder.layer) == ("artifacts", 9)
    assert diagnose_patches(model.config, replace_ratios(findings, {7: 0.02, 8: 0.03})).layer == 8


def test_the_patches_of_a_single_layer_are_judged_in_the_embeddings() -> None:
    """The head does not use the patches of the last layer."""
    model = build_classifier(num_hidden_layers=1)
    found = diagnose_patches(model.config, replace_ratios(collect_findings(model, PIXELS), {0: 0.02}))
    assert (found.word, found.layer) == ("artifacts", 0)


@pytest.mark.parametrize("num_registers", [0, 2])
def test_planted_artifacts(num_registers: int) -> None:
    """One patch of sixteen has a large norm in every image, caused by its position embedding."""
    model = build_classifier(num_register_tokens=num_registers)
    assert diagnose_patches(model.config, collect_findings(model, PIXELS)).rating == "neutral"  # too few patches
    with torch.no_grad():
        model.vitcls.embeddings.position_embeddings.patches[:, 5] += 200
    found = diagnose_patches(model.config, collect_findings(model, PIXELS))
    assert found.second_mode is not None and found.second_mode.fraction == 1 / 16
    assert found.word == "artifacts"


def test_registers_absorb_outliers_only_if_outliers_increase_without_them() -> None:
    model = build_classifier(num_register_tokens=2)
    findings = collect_findings(model, PIXELS)
    absorbed = diagnose_patches(model.config, replace_ratios(findings, {}, {2: 0.03})).reason
    assert "absorb outliers" in absorbed and "0.00%" in absorbed and "3.00%" in absorbed
    for before, after, is_increase in ((0.02, 0.033, False), (0.02, 0.036, True)):  # 3.7 and 4.4 standard deviations
        found = diagnose_patches(model.config, replace_ratios(findings, {2: before}, {2: after}))
        assert found.second_mode_without_registers is not None
        assert found.second_mode_without_registers.fraction == pytest.approx(after, rel=0.02)
        assert ("absorb outliers" in found.reason) == is_increase
    for by_layer, without in (({2: 0.03}, {}), ({}, {}), ({2: 0.03}, {2: 0.03})):
        same = diagnose_patches(model.config, replace_ratios(findings, by_layer, without))
        assert "absorb outliers" not in same.reason and (same.second_mode_without_registers is None) == (not without)
