"""Verdicts on single measurements.

Planted truths in trained and random models are in test_planted_truths.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, randomize
from helpers.varied_models import center_logits, collect_findings

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.analysis.ablation import (
    MIN_IMAGES,
    Effect,
    compute_ablations,
    get_ablation_targets,
)
from modeling_vitcls.analysis.diagnosis import (
    diagnose_patches,
    diagnose_tokens,
    find_second_mode,
)
from modeling_vitcls.analysis.report import build_effect_rows
from modeling_vitcls.analysis.token_statistics import Findings
from modeling_vitcls.analysis.token_use import TokenUse
from modeling_vitcls.analysis.verdict_texts import describe_verdict
from modeling_vitcls.inference.image_pass import ImageBatch


PIXELS = build_images(MIN_IMAGES)
TOKENS: dict[str, Any] = {"num_distillation_tokens": 1, "num_register_tokens": 3}
ALL = slice(None)


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(**{"num_labels": 8, "num_hidden_layers": 3, **TOKENS, **fields})
    return center_logits(ViTCLSForImageClassification(config), PIXELS)


def plant(findings: Findings, **values: Callable[[torch.Tensor], Any]) -> Findings:
    """Return findings with other values; each is a function that changes a copy of a tensor."""
    changed = {name: getattr(findings, name).clone() for name in values}
    for name, change in values.items():
        change(changed[name])
    return dataclasses.replace(findings, **changed)


def fill(value: Any, *place: Any) -> Callable[[torch.Tensor], None]:
    """Return a function that sets the values at a place of a tensor, or all values."""
    return lambda values: values.__setitem__(place or ..., value)


def judge(model: Any, findings: Findings) -> list[str]:
    """Return the words of the verdicts on tokens, without effects."""
    return [verdict.headline for verdict in diagnose_tokens(TokenUse(model.config), findings)][
        : len(findings.token_norms[0])
    ]


def test_states_that_are_not_used_are_not_judged() -> None:
    """In the last layer, two registers are equal for all images, but the head uses only CLS."""
    model = build_classifier(num_distillation_tokens=0)
    findings = collect_findings(model, PIXELS)

    def plant_layer(layer: int, *pair: int) -> Any:
        return plant(
            findings,
            state_distance=fill(0.0, layer, pair, pair[::-1]),
            variation=fill(0.0, layer, slice(3, None)),
            channel_variation=fill(0.0, layer, slice(3, None)),
        )

    for pair in ((1, 2), (0, 2)):
        assert judge(model, plant_layer(3, *pair)) == ["not measured"] * 4
    assert judge(model, plant_layer(2, 1, 2)) == [
        "not measured",
        "identical",
        "identical",
        "same for all images",
    ]
    equal = plant_layer(2, 0, 2)  # CLS is used in three layers
    assert judge(model, equal) == ["identical", "not measured", "identical", "same for all images"]
    assert "After layer 2," in describe_verdict(diagnose_tokens(TokenUse(model.config), equal)[0])


SAME = {"map_selectivity": fill(0.3), "map_variation": fill(0.2, slice(2), 0)}
DISTANCES = torch.tensor([0.0, 3e-7, 2e-7, 1e-7, 2e-7])  # between CLS and each token
REASONS = {
    "identical": "register 2",
    "same attention in every image": "layers 1 to 2,",
    "same for all images": "layer 2",
}
STILL = {"variation": fill(0.0, ALL, 3)}


@pytest.mark.parametrize(
    ("token", "planted", "word"),
    [
        (0, {"variation": fill(0.0, ALL, 0)}, "not measured"),  # only one channel does not vary
        (
            2,
            {"variation": fill(0.0, 2, 2), "channel_variation": fill(0.0, 2, 2)},
            "same for all images",
        ),
        (0, SAME, "same attention in every image"),
        (2, {"map_selectivity": fill(0.3), "map_variation": fill(0.2)}, "not measured"),  # not read
        (0, SAME | {"map_selectivity": fill(0.05)}, "not measured"),  # uniform attention
        (0, SAME | {"map_variation": fill(0.05, 0, 0)}, "not measured"),  # in one of three layers
        (
            0,
            STILL | {"state_distance": fill(3e-7, ALL, 0, 3)},
            "identical",
        ),  # within the rounding error
        (
            0,
            {"state_distance": fill(DISTANCES, ALL, 0)},
            "identical",
        ),  # the nearest
        (
            0,
            STILL | {"state_distance": fill(1e-4, ALL, 0, 3)},
            "not measured",
        ),  # one of them varies less
    ],
)
def test_single_measurements_are_judged_by_their_limits(
    token: int, planted: dict[str, Any], word: str
) -> None:
    model = build_classifier()
    findings = plant(collect_findings(model, PIXELS), map_variation=fill(1.0))
    found = diagnose_tokens(TokenUse(model.config), plant(findings, **planted))[token]
    assert found.headline == word
    assert REASONS.get(word, "") in describe_verdict(found)


def test_the_effect_beyond_its_limit_decides_the_verdict() -> None:
    """An effect beyond its limit decides, then a measurable one, then the largest ratio.

    Ratios are those to the limit. For a token that alone feeds a head, its own output decides.
    Harm is significant for all 8 tests together. Other tokens are read in part.
    """
    tokens = {"num_distillation_tokens": 0, "num_register_tokens": 2}
    model = build_classifier(**tokens)
    mixed = build_classifier(**tokens, pooling="cls_mean")
    findings = plant(collect_findings(model, PIXELS), map_variation=fill(1.0))
    change = dataclasses.replace
    # equals its limit
    effect = Effect(0.5, (0.4, 0.6), MIN_IMAGES, 0.2, (0.1, 0.3), 0.1, null_sizes=(0.5,) * 8)
    unmeasurable = change(effect, size=0.9, changed=0.0)

    def judge_effects(own: Effect, other: Effect, judged: Any = model, **moved: float) -> Any:
        keys = get_ablation_targets(model.config.token_layout)
        effects = {key: {"": own, "other": other} for key in keys}
        movement = {f"{key}[0]": value for key, value in moved.items()}
        return diagnose_tokens(TokenUse(judged.config), findings, effects, movement)

    for own, other, outcome in (
        (effect, change(effect, size=0.4, redraw_drop=(0.2, 0.3)), "has an effect"),
        (
            change(effect, size=0.9),
            change(effect, size=0.4, null_sizes=(0.1,) * 8),
            "has an effect",
        ),
        (unmeasurable, effect, "replaceable"),
        (unmeasurable, change(unmeasurable, size=1.0), "no measurable effect"),
    ):
        cls, register, *_ = judge_effects(own, other)
        assert (register.headline, register.numbers["decided_by"]) == (outcome, "other")
        assert (register.rating == "good") == (outcome == "has an effect")
        assert (cls.headline, cls.numbers["decided_by"]) == ("read by the classifier", "")

    assert judge_effects(effect, unmeasurable, mixed)[0].headline == "has an effect"
    _, register, _, group = judge_effects(effect, unmeasurable, cls=1.0, registers=0.0)
    assert register.headline == "not moved"
    assert (register.is_group, group.is_group) == (False, True)
    moved = {"cls": 1.0, "registers": 0.0}
    strong = judge_effects(change(effect, size=0.9), unmeasurable, **moved)[1]
    assert strong.headline == "has an effect"
    nothing = judge_effects(effect, unmeasurable, cls=0.0, registers=0.0)[1]
    assert nothing.headline == "replaceable"

    for p_value, is_better in ((0.0, True), (0.04 / 8, True), (0.06 / 8, True), (0.04 / 8, False)):
        harm = change(effect, improvement=p_value, is_better_than_chance=is_better)
        found = judge_effects(harm, unmeasurable)[1]
        is_harmful = is_better and p_value < 0.05 / 8
        assert (found.headline == "harmful") == is_harmful
        assert ("+10.0" in describe_verdict(found)) == is_harmful


def test_encoders_are_judged_by_their_features() -> None:
    model = randomize(ViTCLSModel(build_tiny_config(num_register_tokens=2, num_hidden_layers=3)))
    use = TokenUse(model.config, has_head=False)
    effects = compute_ablations(model, use, [ImageBatch(PIXELS)])
    found = diagnose_tokens(use, collect_findings(model, PIXELS), effects)
    cls, *registers, group = found

    assert cls.headline == "an output of the encoder"
    assert set(cls.numbers["effects"]) == {"cls", "pooled", "patches"}
    assert group.token == "all 2 registers"
    assert {row["changed predictions"] for row in build_effect_rows(found)} == {"–"}
    for verdict in registers:
        assert verdict.headline in ("has an effect", "replaceable", "no measurable effect")
        effect = verdict.numbers["effects"][verdict.numbers["decided_by"]]
        assert f"{effect['size']:.2g}" in describe_verdict(verdict)


# Patches ------------------------------------------------------------------------------------------


def sample_norms(
    seed: int, sigma: float, fraction: float = 0.0, ratio: float = 1.0, count: int = 4096
) -> torch.Tensor:
    """Return log-normal norms as multiples of their median, with a second mode at a ratio."""
    generator = torch.Generator().manual_seed(seed)
    norms = (sigma * torch.randn(count, generator=generator)).exp()
    outliers = round(fraction * count)
    norms[:outliers] = ratio * (0.1 * torch.randn(outliers, generator=generator)).exp()
    return norms / norms.median()


@pytest.mark.parametrize(("sigma", "count"), [(0.1, 512), (0.25, 4096), (0.45, 50_000)])
def test_one_mode_has_no_artifacts(sigma: float, count: int) -> None:
    """No false alarm in 50 samples of each width."""
    assert not any(find_second_mode(sample_norms(seed, sigma, count=count)) for seed in range(50))


@pytest.mark.parametrize(
    ("fraction", "ratio", "sigma"), [(0.02, 2.5, 0.15), (0.02, 5, 0.3), (0.06, 20, 0.3)]
)
def test_a_second_mode_is_found_from_2_5_times_the_median(
    fraction: float, ratio: float, sigma: float
) -> None:
    """Check ratios below three times the median, 20 samples each."""
    for seed in range(20):
        mode = find_second_mode(sample_norms(seed, sigma, fraction, ratio))
        assert mode is not None
        assert mode.fraction == pytest.approx(fraction, rel=0.2)
        assert mode.ratio == pytest.approx(ratio, rel=0.1)
        assert 1.2 < mode.threshold < ratio


def replace_ratios(findings: Findings, by_layer: dict[int, float]) -> Findings:
    """Return findings with a second mode after some layers."""
    ratios = [
        sample_norms(layer, 0.2, by_layer.get(layer, 0.0), 6.0)
        for layer in range(len(findings.patch_norms))
    ]
    return dataclasses.replace(findings, patch_ratios=torch.stack(ratios))


def test_the_last_layers_that_are_used_are_decisive() -> None:
    """The head uses the patches of 8 layers, whose last quarter begins with layer 7."""
    model = build_classifier(num_hidden_layers=9, num_register_tokens=0)
    findings = collect_findings(model, PIXELS)
    for layers, word in (
        ([9], "no artifacts"),
        ([3], "no artifacts"),
        ([6], "no artifacts"),
        ([7], "artifacts"),
    ):
        found = diagnose_patches(
            TokenUse(model.config), replace_ratios(findings, dict.fromkeys(layers, 0.02))
        )
        assert found.headline == word, layers

    assert found.numbers["second_mode"]["ratio"] == pytest.approx(6, rel=0.05)
    assert not found.numbers["has_registers"]
    assert (found.rating, found.numbers["layer"], found.numbers["num_patches"]) == ("bad", 7, 4096)

    encoder = diagnose_patches(
        TokenUse(model.config, has_head=False), replace_ratios(findings, {9: 0.02})
    )
    assert (encoder.headline, encoder.numbers["layer"]) == ("artifacts", 9)
    larger = replace_ratios(findings, {7: 0.02, 8: 0.03})
    assert diagnose_patches(TokenUse(model.config), larger).numbers["layer"] == 8
