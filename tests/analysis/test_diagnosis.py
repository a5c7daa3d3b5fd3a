"""Verdicts on single measurements. Planted truths in trained and random models are in test_planted_truths.py."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_models import TASKS, build_images, build_tiny_config, randomize
from helpers.varied_models import center_logits, collect_findings

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification, ViTCLSModel
from modeling_vitcls.analysis.ablation import compute_ablations
from modeling_vitcls.analysis.diagnosis import Verdict, diagnose_heads, diagnose_tokens, summarize_diagnosis
from modeling_vitcls.analysis.model_outputs import MIN_IMAGES
from modeling_vitcls.analysis.token_statistics import Findings
from modeling_vitcls.training.token_monitor import TokenMonitor


PIXELS = build_images(MIN_IMAGES)
TOKENS: dict[str, Any] = {"num_distillation_tokens": 1, "num_register_tokens": 3}
NAMES = ["CLS", "distillation", "register 1", "register 2", "register 3"]


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(**{"num_labels": 8, "num_hidden_layers": 3, **TOKENS, **fields})
    return center_logits(ViTCLSForImageClassification(config), PIXELS)


def plant(findings: Findings, **values: Callable[[torch.Tensor], Any]) -> Findings:
    """Return findings with other values; each value is a function that changes a copy of a tensor."""
    changed = {name: getattr(findings, name).clone() for name in values}
    for name, change in values.items():
        change(changed[name])
    return dataclasses.replace(findings, **changed)


def judge(model: Any, findings: Findings) -> list[str]:
    """Return the words of the verdicts on tokens, without effects."""
    return [verdict.word for verdict in diagnose_tokens(model, findings)][: len(findings.token_norms[0])]


@pytest.mark.parametrize("token", ["cls", "distillation", "registers"])
def test_a_frozen_token_did_not_move(token: str) -> None:
    """Train for some steps with one token frozen; only tokens that do not matter are faulty."""
    model = build_classifier().train()
    monitor = TokenMonitor(model)
    monitor.parameters[token].requires_grad_(False)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        model(PIXELS, labels=torch.arange(len(PIXELS)) % 8).loss.backward()
        optimizer.step()
    movement = monitor.compute_token_movement()
    findings = collect_findings(model, PIXELS)
    ablations = compute_ablations(model, lambda: [(PIXELS, None)])
    found = diagnose_tokens(model, findings, ablations, movement)
    frozen = {"cls": NAMES[:1], "distillation": NAMES[1:2], "registers": NAMES[2:]}[token]
    assert {verdict.token for verdict in found if verdict.numbers.get("movement") == 0} == set(frozen)
    unmoved = {verdict.token for verdict in found if verdict.word == "not moved"}
    assert unmoved == (set(frozen) if token == "registers" else set())


def test_states_that_are_not_used_are_not_judged() -> None:
    """In the last layer, two registers are equal and do not depend on the image, but the head uses only CLS."""
    model = build_classifier(num_distillation_tokens=0)
    findings = collect_findings(model, PIXELS)

    def set_pair(layer: int, value: float) -> Callable[[torch.Tensor], None]:
        def change(values: torch.Tensor) -> None:
            values[layer, 1, 2] = values[layer, 2, 1] = value

        return change

    def plant_layer(layer: int) -> list[str]:
        planted = plant(
            findings,
            between_tokens=set_pair(layer, 1.0),
            state_distance=set_pair(layer, 0.0),
            variation=lambda values: values[layer, 3:].fill_(0),
            channel_variation=lambda values: values[layer, 3:].fill_(0),
        )
        return judge(model, planted)

    assert plant_layer(3) == ["not measured"] * 4
    assert plant_layer(2) == ["not measured", "identical", "identical", "same for all images"]


def test_one_large_channel_hides_nothing() -> None:
    """It does not make tokens identical or equal for all images."""
    model = build_classifier()
    size = 2e3 * collect_findings(model, PIXELS).mean_states[-1].norm(dim=-1).max()
    shift = lambda mlp, args, added: added + size * torch.eye(added.shape[-1])[3]  # noqa: E731
    with model.vitcls.layers[-1].mlp.register_forward_hook(shift):
        findings = collect_findings(model, PIXELS)
    assert findings.between_tokens[-1].min() > 0.999 and findings.variation[-1].max() < 1e-3
    assert set(judge(model, findings)) == {"not measured"}


def test_identical_cls_tokens_of_tasks() -> None:
    config = build_tiny_config(num_cls_tokens=2, tasks=TASKS, num_hidden_layers=3)
    model = center_logits(ViTCLSForMultiTaskClassification(config), PIXELS)
    with torch.no_grad():
        embeddings = model.vitcls.embeddings
        for tokens in (embeddings.cls_token, embeddings.position_embeddings.cls):
            tokens[:, 1] = tokens[:, 0]
    found = diagnose_tokens(model, collect_findings(model, PIXELS))
    assert [verdict.word for verdict in found[:2]] == ["identical", "identical"]
    assert "CLS species" in found[0].reason and "CLS age" in found[1].reason


@pytest.mark.parametrize(
    ("planted", "word"),
    [
        ({"attention_fractions": lambda values: values[:, :, 0, 3].fill_(0.009)}, "cut off from the patches"),
        ({"attention_fractions": lambda values: values[:, :, 0, 3].fill_(0.011)}, "not measured"),
        ({"map_selectivity": lambda values: values[:, 0].fill_(0.3)}, "not measured"),
        (
            {
                "map_selectivity": lambda values: values[:, 0].fill_(0.3),
                "map_variation": lambda values: values[:, 0].fill_(0.05),
            },
            "same attention for all images",
        ),
        (
            {
                "token_norms": lambda values: values[0, 0].fill_(1e3),
                "embedding_similarity": lambda values: values[:, 0].fill_(0.9),
            },
            "norm too large",
        ),
        ({"token_norms": lambda values: values[0, 0].fill_(1e3)}, "not measured"),
        ({"map_distance": lambda values: values[:, 0, 2].fill_(0.0)}, "equal attention"),
    ],
)
def test_limits_of_single_measurements(planted: dict[str, Any], word: str) -> None:
    model = build_classifier()
    assert judge(model, plant(collect_findings(model, PIXELS), **planted))[0] == word


def test_encoders_are_judged_by_their_features() -> None:
    model = randomize(ViTCLSModel(build_tiny_config(num_register_tokens=2, num_hidden_layers=3)))
    found = diagnose_tokens(model, collect_findings(model, PIXELS), compute_ablations(model, lambda: [(PIXELS, None)]))
    cls, *registers, group = found
    assert cls.word == "an output of the encoder" and set(cls.numbers["information"]) == {"cls", "pooled", "patches"}
    assert group.token == "all 2 registers"
    for verdict in registers:
        assert verdict.word in ("has an effect", "replaceable", "no measurable effect")


def test_a_model_without_special_tokens_has_no_verdicts() -> None:
    none = randomize(ViTCLSModel(build_tiny_config(num_cls_tokens=0, pooling="mean")))
    findings = collect_findings(none, PIXELS)
    assert diagnose_tokens(none, findings, compute_ablations(none, lambda: [(PIXELS, None)])) == []
    assert diagnose_heads(findings).rating == "good"


def test_all_uniform_heads_are_named() -> None:
    model = build_classifier()
    with torch.no_grad():
        for layer in model.vitcls.layers:
            layer.attention.q_proj.weight.zero_()
            layer.attention.q_proj.bias.zero_()
    findings = collect_findings(model, PIXELS)
    assert len(diagnose_heads(findings).numbers["uniform"]) == findings.head_selectivity.numel()


def test_the_summary_is_one_line() -> None:
    verdicts = [Verdict("CLS", "has an effect", "good", "A.\nB"), Verdict("heads", "dead heads", "bad", "C")]
    summary = summarize_diagnosis([*verdicts, Verdict("register", "has an effect", "good", "D")])
    assert summary == "CLS, register: has an effect; heads: dead heads"
