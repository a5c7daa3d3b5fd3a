"""Verdicts in words about planted faults: each is found, with its number, and healthy tokens are not accused."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import TASKS, filled, images, tiny_config
from varied_models import with_varied_answers

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification, ViTCLSModel
from modeling_vitcls.analysis.ablation import collect_predictions, compute_ablation_effects
from modeling_vitcls.analysis.diagnosis import MIN_IMAGES, Verdict, describe_artifacts, describe_depth, diagnose_tokens
from modeling_vitcls.analysis.maps import get_token_names
from modeling_vitcls.analysis.report import SIGNS
from modeling_vitcls.analysis.token_statistics import Findings, TokenStatistics
from modeling_vitcls.training.token_monitor import TokenMonitor


PIXELS = images(MIN_IMAGES)
TOKENS: dict[str, Any] = {"num_distillation_tokens": 1, "num_register_tokens": 3}
KEYS = ["cls[0]", "distillation[0]", "registers[0]", "registers[1]", "registers[2]"]
NAMES = ["CLS", "distillation", "register 1", "register 2", "register 3"]


def classifier(**fields: Any) -> ViTCLSForImageClassification:
    config = tiny_config(num_labels=8, **{"num_hidden_layers": 3, **TOKENS, **fields})
    return with_varied_answers(ViTCLSForImageClassification(config), PIXELS)


def findings_of(model: Any, pixels: torch.Tensor = PIXELS) -> Findings:
    collected = TokenStatistics(model)
    collected.update(pixels)
    return collected.compute()


def judged(
    model: Any,
    movement: dict[str, float] | None = None,
    pixels: torch.Tensor = PIXELS,
    right: torch.Tensor | None = None,
) -> dict[str, Verdict]:
    """By the names of the tokens; without right answers, all images are of the first class."""

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield pixels, torch.zeros(len(pixels), dtype=torch.long) if right is None else right

    findings, answers = findings_of(model, pixels), collect_predictions(model, batches)
    effects = compute_ablation_effects(model, batches, findings.mean_states, answers)
    found = diagnose_tokens(model.config, findings, effects, movement, None if right is None else answers)
    assert [verdict.token for verdict in found] == get_token_names(model.config)
    for verdict in found:
        assert verdict.reason.endswith(".") and "\n" not in verdict.reason and any(map(str.isdigit, verdict.reason))
        assert (verdict.word, verdict.meaning) in SIGNS  # the page has a sign for it
    return {verdict.token: verdict for verdict in found}


def words(found: dict[str, Verdict]) -> dict[str, str]:
    return {name: verdict.word for name, verdict in found.items()}


def moved_by(value: float) -> dict[str, float]:
    """All tokens, by times their norm."""
    norms = findings_of(classifier()).token_norms[0].tolist()
    return dict(zip(KEYS, [value * norm for norm in norms], strict=True))


def test_a_healthy_model() -> None:
    """Training moved each token, and the answers need it."""
    model = classifier()
    found = judged(model, moved_by(0.5))
    assert words(found) == dict.fromkeys(NAMES, "learned")
    assert {verdict.meaning for verdict in found.values()} == {"good"}
    assert "accuracy" in found["CLS"].reason and "(0.5 times its norm)" in found["CLS"].reason
    assert (
        "of 16 images" in found["CLS"].reason and "times their standard deviation over images" in found["CLS"].reason
    )
    assert describe_artifacts(model.config, findings_of(model)).startswith("No artifacts")


def test_an_untrained_model_has_learned_nothing() -> None:
    """Random weights: its answers need each token, but nothing says that any was taught."""
    fresh = ViTCLSForImageClassification(tiny_config(num_labels=8, num_hidden_layers=3, **TOKENS)).eval()
    for model in (classifier(), fresh):
        for movement in (None, {}, moved_by(1e-5)):
            found = judged(model, movement)
            assert "learned" not in words(found).values() and "good" not in {one.meaning for one in found.values()}
    found = judged(classifier())
    assert words(found) == dict.fromkeys(NAMES, "in use") and found["CLS"].meaning == "neutral"
    assert "unknown" in found["CLS"].reason


def test_answers_no_better_than_chance_are_worth_little() -> None:
    model = classifier()
    with torch.no_grad():
        own = model(PIXELS).logits.argmax(dim=-1)
    assert len(own.unique()) > 2
    assert "chance" not in judged(model, moved_by(1), right=own)["CLS"].reason
    reason = judged(model, moved_by(1), right=(own + 1) % 8)["CLS"].reason
    assert "not better than chance (0.0% on 16 images" in reason


@pytest.mark.parametrize("token", ["cls", "distillation", "registers"])
def test_a_frozen_token_did_not_move(token: str) -> None:
    """Trained for some steps, with one token frozen: what training records of movement is enough. Frozen on purpose,
    and in use, that is no illness."""
    model = classifier().train()
    monitor = TokenMonitor(model)
    monitor.parameters[token].requires_grad_(False)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        model(PIXELS, labels=torch.arange(len(PIXELS)) % 8).loss.backward()
        optimizer.step()
    found = judged(model, monitor.compute_movement())
    frozen = {"cls": NAMES[:1], "distillation": NAMES[1:2], "registers": NAMES[2:]}[token]
    assert {name for name, word in words(found).items() if word == "not moved"} == set(frozen)
    assert set(words(found).values()) == {"not moved", "learned"}
    for name in frozen:
        assert found[name].meaning == "neutral" and "not moved in this run (by 0), but in use" in found[name].reason


def test_a_token_that_did_not_move_and_has_no_effect() -> None:
    """That is the illness; but of few images its effect is not known."""
    model = classifier(gated_tokens={"registers": 1})
    with torch.no_grad():
        model.vitcls.gates.gates.zero_()
    movement = moved_by(1) | {"registers[2]": 0.0}
    found = judged(model, movement)["register 3"]
    assert (found.word, found.meaning) == ("not moved", "bad") and "(by 0)" in found.reason
    few = judged(model, movement, PIXELS[:3])["register 3"]
    assert (few.word, few.meaning) == ("not moved", "neutral") and "there are 3" in few.reason
    encoder = filled(ViTCLSModel(tiny_config()))
    (frozen,) = diagnose_tokens(encoder.config, findings_of(encoder), None, {"cls[0]": 0.0})
    assert (frozen.word, frozen.meaning) == ("not moved", "neutral") and "Without a classifier" in frozen.reason


def test_a_token_that_is_the_same_for_all_images() -> None:
    """Attention adds nothing: no special token learns anything of the image."""
    model = classifier(num_distillation_tokens=0, num_register_tokens=0)
    with torch.no_grad():
        for layer in model.vitcls.layers:
            layer.attention.o_proj.weight.zero_()
    found = judged(model)["CLS"]
    assert (found.word, found.meaning) == ("same for all images", "bad") and "same for every image" in found.reason
    assert "times the norm of its mean state" in found.reason
    moved = judged(model, {"cls[0]": 1.25})["CLS"]
    assert moved.word == "same for all images"
    assert "same for every image" in moved.reason and "training moved it by 1.25" in moved.reason
    unmoved = judged(model, {"cls[0]": 0.0}, PIXELS[:2])["CLS"]  # two images are enough for this
    assert (unmoved.word, unmoved.meaning) == ("not moved", "bad") and "same for every image" in unmoved.reason


def test_two_identical_registers() -> None:
    """They start alike, without positions, so they stay alike; the third is another."""
    model = classifier()
    with torch.no_grad():
        registers = model.vitcls.embeddings.register_tokens
        registers[:, 2] = registers[:, 0]
    found = judged(model)
    assert words(found) == dict(zip(NAMES, ["in use", "in use", "collapsed", "in use", "collapsed"], strict=True))
    assert "register 3" in found["register 1"].reason and "register 1" in found["register 3"].reason
    assert "cosine 1.0000, distance 0)" in found["register 1"].reason
    assert judged(model, pixels=PIXELS[:1])["register 1"].word == "collapsed"  # one image is enough
    with torch.no_grad():
        for layer in model.vitcls.layers:
            layer.attention.o_proj.weight.zero_()
    found = judged(model, moved_by(1))  # also where nothing varies
    bad = ["same for all images", "same for all images", "collapsed", "same for all images", "collapsed"]
    assert words(found) == dict(zip(NAMES, bad, strict=True))


@pytest.mark.parametrize("is_encoder", [False, True])
def test_a_huge_channel_that_all_share_makes_no_two_tokens_one(is_encoder: bool) -> None:
    """Nor one token the same for all images."""
    model = classifier() if not is_encoder else filled(ViTCLSModel(tiny_config(**TOKENS)))

    def shift(mlp: torch.nn.Module, args: tuple, added: torch.Tensor) -> torch.Tensor:
        return added + size * torch.eye(added.shape[-1])[3]

    size = 2e3 * findings_of(model).mean_states[-1].norm(dim=-1).max()
    with model.base_model.layers[-1].mlp.register_forward_hook(shift):
        findings = findings_of(model)
        found = diagnose_tokens(model.config, findings) if is_encoder else judged(model).values()
    assert findings.between_tokens[-1].min() > 0.999 and findings.variation[-1].max() < 1e-3
    assert {verdict.word for verdict in found} <= {"in use", "ignored by the head", "not judged"}


def test_two_identical_cls_tokens_of_tasks() -> None:
    config = tiny_config(num_cls_tokens=2, tasks=TASKS, num_hidden_layers=3)
    model = with_varied_answers(ViTCLSForMultiTaskClassification(config), PIXELS)
    with torch.no_grad():
        embeddings = model.vitcls.embeddings
        for tokens in (embeddings.cls_token, embeddings.position_embeddings.cls):
            tokens[:, 1] = tokens[:, 0]
    findings = findings_of(model)
    found = diagnose_tokens(model.config, findings)
    assert [verdict.word for verdict in found] == ["collapsed", "collapsed"]
    assert "CLS species" in found[0].reason and "CLS age" in found[1].reason


def test_a_register_without_effect() -> None:
    """Nobody attends to the last one; it still reads the image."""
    model = classifier(gated_tokens={"registers": 2})
    with torch.no_grad():
        model.vitcls.gates.gates.copy_(torch.tensor([model.vitcls.gates.OPEN, 0.0]))
    found = judged(model, moved_by(1))
    assert words(found) == dict(zip(NAMES, [*["learned"] * 4, "ignored by the head"], strict=True))
    assert "the predictions of 0 of 16 images (0.0%" in found["register 3"].reason


def test_without_a_classifier_the_worth_is_not_judged() -> None:
    """But what the states show is."""
    model = filled(ViTCLSModel(tiny_config(num_register_tokens=2)))
    assert {verdict.word for verdict in diagnose_tokens(model.config, findings_of(model))} == {"not judged"}
    with torch.no_grad():
        model.embeddings.register_tokens[:, 1] = model.embeddings.register_tokens[:, 0]
    found = [verdict.word for verdict in diagnose_tokens(model.config, findings_of(model))]
    assert found == ["not judged", "collapsed", "collapsed"]
    none = filled(ViTCLSModel(tiny_config(num_cls_tokens=0, pooling="mean")))
    assert diagnose_tokens(none.config, findings_of(none)) == [] == describe_depth(none.config, findings_of(none))


@pytest.mark.parametrize("number", [1, 2, MIN_IMAGES - 1])
def test_few_images_are_no_basis(number: int) -> None:
    found = judged(classifier(), moved_by(1), PIXELS[:number])
    assert words(found) == dict.fromkeys(NAMES, "not judged")
    assert (
        f"there {'are' if number > 1 else 'is'} {number}" in found["CLS"].reason
        and "16 or more images" in found["CLS"].reason
    )


# Artifacts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_registers", [0, 2])
def test_planted_artifacts(num_registers: int) -> None:
    """One patch of sixteen has a huge norm in every image, from its position on."""
    model = classifier(num_distillation_tokens=0, num_register_tokens=num_registers)
    assert describe_artifacts(model.config, findings_of(model)).startswith("No artifacts")
    with torch.no_grad():
        model.vitcls.embeddings.position_embeddings.patches[:, 5] += 200
    found = describe_artifacts(model.config, findings_of(model))
    assert found.startswith("Artifacts") and "6.25%" in found and "3 times" in found
    assert ("more registers may" in found) == ("The registers" in found) == bool(num_registers)


def with_patch(findings: Findings, shares: list[float], without: list[float] | None = None) -> Findings:
    """With these shares of outliers, of the embeddings and after each layer."""
    hidden = None if without is None else torch.tensor(without)
    return dataclasses.replace(findings, outliers=torch.tensor(shares), outliers_without_registers=hidden)


def test_the_last_layers_decide() -> None:
    """Darcet et al. look at the output; what stands out on the way is named as such."""
    model = classifier(num_hidden_layers=8, num_register_tokens=0)
    findings = findings_of(model)
    bump = describe_artifacts(model.config, with_patch(findings, [0, 0, 0, 0.02, 0.01, 0, 0, 0.004, 0]))
    assert bump.startswith("No artifacts: after the last layers at most 0.40%")
    assert "Maximum in earlier layers: 2.00%, after layer 3, but not in the last layers" in bump
    through = describe_artifacts(model.config, with_patch(findings, [0, 0, 0, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02]))
    assert through.startswith("Artifacts: after layer 7, 2.00%") and "earlier layers" not in through
    both = describe_artifacts(model.config, with_patch(findings, [0, 0, 0, 0.02, 0, 0, 0, 0, 0.01]))
    assert (
        both.startswith("Artifacts: after layer 8, 1.00%")
        and "Maximum in earlier layers: 2.00%, after layer 3." in both
    )
    clean = describe_artifacts(model.config, with_patch(findings, [0.0] * 9))
    assert "earlier layers" not in clean and "register" not in clean
    last = describe_artifacts(model.config, with_patch(findings, [0, 0, 0, 0, 0, 0, 0, 0.01, 0]))
    assert last.startswith("Artifacts: after layer 7")  # of 8 layers, 2 are the last


def test_registers_stand_out_instead_or_not() -> None:
    model = classifier(num_distillation_tokens=0, num_register_tokens=2)
    findings = with_patch(findings_of(model), [0.0] * 4, [0, 0, 0.01, 0.03])
    plain = describe_artifacts(model.config, findings)
    assert "The registers are not outliers" in plain
    assert "outliers after layer 3: 0.00%, with the registers hidden from attention 3.00%" in plain
    with torch.no_grad():
        model.vitcls.embeddings.register_tokens[:, 1] += 200
    findings = findings_of(model)
    ratio = findings.token_norms[-1, 2] / findings.patch_norms[-1].median()
    found = describe_artifacts(model.config, findings)
    assert ratio > 10 and f"are outliers instead (at most {ratio:.1f} times the median norm of the patches)" in found


# Depth ---------------------------------------------------------------------------------------------------------------


def test_the_story_over_depth() -> None:
    """Uniform attention in the first layer, that to one token alone in the last."""
    model = classifier(num_distillation_tokens=0, num_register_tokens=0)
    with torch.no_grad():
        first, _, last = model.vitcls.layers
        first.attention.q_proj.weight.zero_()
        first.attention.q_proj.bias.zero_()
        last.attention.q_proj.weight *= 1000
    (story,) = describe_depth(model.config, findings_of(model))
    assert story.startswith("CLS attends to 100%, ") and "most selective in layer 3: 1 token. " in story


@pytest.mark.parametrize(
    ("selective", "end"),
    [
        ([1], "As expected: near uniform early, selective in the middle."),
        ([1, 2], "As expected: near uniform early, selective in the middle."),
        ([0], "Not as expected (near uniform early, selective in the middle)."),
        ([0, 1, 2], "Not as expected (near uniform early, selective in the middle)."),
        ([2], "Not as expected (near uniform early, selective in the middle)."),
        ([], "Uniform in every layer: it selects no patches."),
    ],
)
def test_whether_the_story_holds(selective: list[int], end: str) -> None:
    model = classifier(num_distillation_tokens=0, num_register_tokens=0)
    with torch.no_grad():
        for index, layer in enumerate(model.vitcls.layers):
            layer.attention.q_proj.weight *= 1000 if index in selective else 0
            layer.attention.q_proj.bias *= index in selective
    (story,) = describe_depth(model.config, findings_of(model))
    assert story.endswith(end)


def test_the_story_is_about_tokens_that_answer() -> None:
    model = classifier()
    stories = describe_depth(model.config, findings_of(model))
    assert ["expected" in one or "every layer" in one for one in stories] == [True, True, False, False, False]


def test_two_layers_are_too_few_for_the_story() -> None:
    model = classifier(num_hidden_layers=2, num_distillation_tokens=0, num_register_tokens=0)
    with torch.no_grad():
        model.vitcls.layers[0].attention.q_proj.weight *= 1000
    (story,) = describe_depth(model.config, findings_of(model))
    assert "too few layers" in story and "layer by layer" in story


def test_a_token_that_sees_a_part_is_measured_by_that_part() -> None:
    """All attention is uniform over what there is to see, of which the second CLS token has a quarter."""
    scopes = {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]}
    model = classifier(num_distillation_tokens=0, num_register_tokens=0, **scopes)
    with torch.no_grad():
        for layer in model.vitcls.layers:
            layer.attention.q_proj.weight.zero_()
            layer.attention.q_proj.bias.zero_()
    for story in describe_depth(model.config, findings_of(model)):
        assert "attends to 100%, 100%, 100% of the visible tokens" in story and story.endswith("selects no patches.")
