"""Artifacts: a second mode in the distribution of patch norms, planted in samples, statistics and models."""

import dataclasses
from typing import Any

import pytest
import torch
from tiny_models import build_images, build_tiny_config
from varied_models import center_logits, collect_findings

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.analysis.artifacts import diagnose_patches, find_second_mode
from modeling_vitcls.analysis.token_statistics import Findings


PIXELS = build_images(16)


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(num_labels=8, **{"num_hidden_layers": 3, **fields})
    return center_logits(ViTCLSForImageClassification(config), PIXELS)


def collect_planted_findings(model: Any) -> Findings:
    return collect_findings(model, PIXELS)


def sample_norms(
    seed: int, sigma: float, fraction: float = 0.0, ratio: float = 1.0, count: int = 4096
) -> torch.Tensor:
    """Return log-normal norms as multiples of their median; a fraction has a second mode at a ratio."""
    generator = torch.Generator().manual_seed(seed)
    norms = (sigma * torch.randn(count, generator=generator)).exp()
    outliers = round(fraction * count)
    norms[:outliers] = ratio * (0.1 * torch.randn(outliers, generator=generator)).exp()
    return norms / norms.median()


@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.45])
@pytest.mark.parametrize("count", [512, 4096, 50_000])
def test_one_mode_has_no_artifacts(sigma: float, count: int) -> None:
    """Check any width: no false alarm in 50 samples each, 450 in total."""
    assert not any(find_second_mode(sample_norms(seed, sigma, count=count)) for seed in range(50))


@pytest.mark.parametrize(("fraction", "ratio", "sigma"), [(0.02, 2.5, 0.15), (0.02, 5, 0.3), (0.06, 20, 0.3)])
def test_a_second_mode_is_found_at_any_distance(fraction: float, ratio: float, sigma: float) -> None:
    """Check ratios below three times the median, 20 samples each."""
    for seed in range(20):
        mode = find_second_mode(sample_norms(seed, sigma, fraction, ratio))
        assert mode is not None and mode.fraction == pytest.approx(fraction, rel=0.2)
        assert mode.ratio == pytest.approx(ratio, rel=0.1) and 1.2 < mode.threshold < ratio


def replace_ratios(
    findings: Findings, by_layer: dict[int, float], without: dict[int, float] | None = None
) -> Findings:
    """Return findings with a fraction of the patches in a second mode after some layers, also without registers."""
    count = len(findings.patch_norms)

    def draw(fractions: dict[int, float]) -> torch.Tensor:
        return torch.stack([sample_norms(layer, 0.2, fractions.get(layer, 0.0), 6.0) for layer in range(count)])

    hidden = None if without is None else draw(without)
    return dataclasses.replace(findings, patch_ratios=draw(by_layer), patch_ratios_without_registers=hidden)


def test_the_last_layers_that_are_read_are_decisive() -> None:
    """Darcet et al. use the output. Second modes in earlier layers are reported as such."""
    # the head does not read the patches of layer 9
    model = build_classifier(num_hidden_layers=9, num_register_tokens=0)
    findings = collect_planted_findings(model)
    unread = diagnose_patches(model.config, replace_ratios(findings, {9: 0.02}))
    assert unread.word == "no artifacts" and unread.layer <= 8
    earlier = diagnose_patches(model.config, replace_ratios(findings, {3: 0.02}))
    assert earlier.word == "no artifacts"
    assert (
        "The largest second mode in earlier layers contains 2.00% of the patches (after layer 3); the patch norms"
        " have no second mode in the last layers whose output is used." in earlier.reason
    )
    through = diagnose_patches(model.config, replace_ratios(findings, dict.fromkeys(range(3, 10), 0.02)))
    assert (through.word, through.rating, through.layer) == ("artifacts", "bad", 7)
    assert (
        through.reason.startswith("Artifacts: after layer 7, 2.00% of the patches") and "earlier" not in through.reason
    )
    assert through.mode is not None and through.mode.ratio == pytest.approx(6, rel=0.05)
    encoder = diagnose_patches(model.config, replace_ratios(findings, {9: 0.02}), has_head=False)
    assert encoder.word == "artifacts" and encoder.layer == 9


@pytest.mark.parametrize("num_registers", [0, 2])
def test_planted_artifacts(num_registers: int) -> None:
    """One patch of sixteen has a large norm in every image, caused by its position embedding."""
    model = build_classifier(num_register_tokens=num_registers)
    assert diagnose_patches(model.config, collect_planted_findings(model)).reason.startswith("No artifacts")
    with torch.no_grad():
        model.vitcls.embeddings.position_embeddings.patches[:, 5] += 200
    found = diagnose_patches(model.config, collect_planted_findings(model))
    assert found.reason.startswith("Artifacts") and "6.25%" in found.reason
    assert ("more registers may" in found.reason) == bool(num_registers)


def test_registers_absorb_outliers_only_if_outliers_increase_without_them() -> None:
    model = build_classifier(num_register_tokens=2)
    findings = collect_planted_findings(model)
    absorbed = diagnose_patches(model.config, replace_ratios(findings, {}, {2: 0.03})).reason
    assert "The registers absorb outliers" in absorbed and "from 0.00% to 3.00%" in absorbed
    for without in ({}, {2: 0.03}):
        same = diagnose_patches(model.config, replace_ratios(findings, {2: 0.03} if without else {}, without)).reason
        assert "absorb outliers" not in same
