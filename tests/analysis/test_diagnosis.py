"""Verdicts about planted faults: each fault is found with its measurements, and healthy tokens have no fault."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from helpers.digits_models import HELD_OUT, train_digits_model
from helpers.tiny_models import TASKS, build_images, build_tiny_config, randomize
from helpers.varied_models import center_logits, collect_findings
from torch import nn

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification, ViTCLSModel
from modeling_vitcls.analysis.ablation import (
    NUM_NULL_DRAWS,
    Ablation,
    Ablations,
    compute_ablations,
)
from modeling_vitcls.analysis.artifacts import diagnose_patches
from modeling_vitcls.analysis.diagnosis import (
    Verdict,
    describe_depth,
    diagnose_groups,
    diagnose_tokens,
    summarize_diagnosis,
)
from modeling_vitcls.analysis.effects import AblationEffect, FeatureEffect
from modeling_vitcls.analysis.inspection import MIN_NULL_IMAGES, select_evenly_spaced
from modeling_vitcls.analysis.model_outputs import MIN_IMAGES, Predictions, collect_outputs
from modeling_vitcls.analysis.model_utils import is_classifier
from modeling_vitcls.analysis.report import VERDICT_SYMBOLS
from modeling_vitcls.analysis.token_statistics import Findings
from modeling_vitcls.token_names import get_token_names
from modeling_vitcls.training.token_monitor import TokenMonitor


PIXELS = build_images(MIN_IMAGES)
TOKENS: dict[str, Any] = {"num_distillation_tokens": 1, "num_register_tokens": 3}
KEYS = ["cls[0]", "distillation[0]", "registers[0]", "registers[1]", "registers[2]"]
NAMES = ["CLS", "distillation", "register 1", "register 2", "register 3"]
EFFECTS = {"effect beyond the null", "no measurable effect"}


def build_classifier(seed: int = 0, **fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(num_labels=8, **{"num_hidden_layers": 3, **TOKENS, **fields})
    torch.manual_seed(seed)
    return center_logits(ViTCLSForImageClassification(config), PIXELS)


def findings_of(model: Any, pixels: torch.Tensor = PIXELS) -> Findings:
    return collect_findings(model, pixels)


def judge_tokens(
    model: Any,
    movement: dict[str, float] | None = None,
    pixels: torch.Tensor = PIXELS,
    labels: torch.Tensor | None = None,
    num_null_images: int | None = None,
    num_draws: int = 2,
) -> dict[str, Verdict]:
    """Return the verdicts on tokens and groups by name. Without labels, all images have the first class. Two draws per
    null distribution are fast, but only NUM_NULL_DRAWS draws show whether an effect is beyond the null."""
    has_head = is_classifier(model)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        yield pixels, torch.zeros(len(pixels), dtype=torch.long) if labels is None and has_head else labels

    findings, before = findings_of(model, pixels), collect_outputs(model, batches)
    sampled = select_evenly_spaced(range(len(pixels)), num_null_images or len(pixels))
    sample = (lambda: [(pixels[sampled], None)], sampled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_vitcls.analysis.ablation.NUM_NULL_DRAWS", num_draws)
        ablations = compute_ablations(model, batches, findings.mean_states, before, sample)
    predictions = None if labels is None else before
    found = diagnose_tokens(model.config, findings, ablations, movement, predictions, has_head)
    assert [verdict.token for verdict in found] == get_token_names(model.config)
    found += diagnose_groups(model.config, ablations, predictions)
    for verdict in found:
        assert verdict.reason.endswith(".") and "\n" not in verdict.reason and any(map(str.isdigit, verdict.reason))
        assert (verdict.word, verdict.rating) in VERDICT_SYMBOLS  # the page has a symbol for it
    return {verdict.token: verdict for verdict in found}


def get_words(found: dict[str, Verdict]) -> dict[str, str]:
    """Return the words of the tokens, without groups."""
    return {name: verdict.word for name, verdict in found.items() if not name.startswith("all ")}


def build_movement(value: float) -> dict[str, float]:
    """Return the same movement for all tokens, as a multiple of the norm."""
    norms = findings_of(build_classifier()).token_norms[0].tolist()
    return dict(zip(KEYS, [value * norm for norm in norms], strict=True))


# A trained model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 1])
def trained(request: pytest.FixtureRequest) -> ViTCLSForImageClassification:
    """Return a small model of scikit-learn's digits for a seed. Tests that change it restore its weights."""
    return train_digits_model(seed=request.param)


@pytest.fixture
def model(trained: ViTCLSForImageClassification) -> Iterator[ViTCLSForImageClassification]:
    weights = {name: value.clone() for name, value in trained.state_dict().items()}
    yield trained
    trained.load_state_dict(weights)


def judged_digits(model: Any, movement: dict[str, float] | None = None) -> dict[str, Verdict]:
    return judge_tokens(model, movement, *HELD_OUT, num_draws=NUM_NULL_DRAWS)


def test_a_healthy_model(model: Any) -> None:
    """The CLS token has an effect, and no register has a fault."""
    found = judged_digits(model)
    cls = found["CLS"]
    assert (cls.word, cls.rating) == ("effect beyond the null", "good")
    assert cls.numbers["effect"] > cls.numbers["null"][1] and not cls.numbers["information"]["null_redrawn"]
    low, high = cls.numbers["interval"]
    assert low < cls.numbers["effect"] < high
    for name in ("register 1", "register 2", "all 2 registers"):
        assert found[name].word in EFFECTS and found[name].rating in ("good", "neutral")
        assert len(found[name].numbers["presence"]["null_redrawn"]) == NUM_NULL_DRAWS
    assert diagnose_patches(model.config, findings_of(model, HELD_OUT[0])).word == "no artifacts"


def test_random_registers_have_no_measurable_effect(model: Any) -> None:
    with torch.no_grad():
        registers = model.vitcls.embeddings.register_tokens
        registers.copy_(torch.randn(registers.shape) * registers.std())
    found = judged_digits(model)
    assert {found[name].word for name in ("register 1", "register 2")} == {"no measurable effect"}
    assert {found[name].rating for name in ("register 1", "register 2")} == {"neutral"}
    changed = found["register 1"].numbers["information"]["changed_answers_interval"]
    assert changed[1] > 0  # 0 changed predictions of n mean a rate of at most 3 / n


@pytest.mark.slow
def test_a_cls_token_of_100_times_its_norm(model: Any) -> None:
    with torch.no_grad():
        model.vitcls.embeddings.cls_token *= 100
    found = judged_digits(model)["CLS"]
    assert (found.word, found.rating) == ("norm too large", "bad")
    assert found.numbers["norm_ratio"] > 3 and found.numbers["embedding_similarity"] > 0.9


@pytest.mark.slow
def test_a_cls_token_without_attention_to_patches(model: Any) -> None:
    with mask_cls_attention(model):
        found = judged_digits(model)["CLS"]
    assert (found.word, found.rating) == ("cut off from the patches", "bad")
    assert "attention head, at most 0.00% of the token's attention goes to patches" in found.reason


@contextmanager
def mask_cls_attention(model: Any) -> Iterator[None]:
    """Mask all other tokens for CLS, like a wrong attention mask."""

    def mask_others(attention: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        mask = torch.ones(1, 1, states.shape[1], states.shape[1], dtype=torch.bool)
        mask[:, :, 0, 1:] = False
        return (states, mask, *args[2:]), kwargs

    with ExitStack() as hooks:
        for layer in model.vitcls.layers:
            hooks.enter_context(layer.attention.register_forward_pre_hook(mask_others, with_kwargs=True))
        yield


def test_a_harmful_register(model: Any) -> None:
    """All tokens attend to the register, whose values hide the digits: accuracy is higher without it."""
    pixels, labels = HELD_OUT
    with torch.no_grad():
        model.vitcls.embeddings.register_tokens[:, 1] = find_harmful_token(model, pixels, labels)
        accuracy = (model(pixels).logits.argmax(-1) == labels).float().mean()
    found = judged_digits(model)
    assert accuracy < 0.6
    assert (found["register 2"].word, found["register 2"].rating) == ("harmful", "bad")
    assert "the accuracy changes by +" in found["register 2"].reason and "p = " in found["register 2"].reason


def find_harmful_token(model: Any, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return an embedding that increases the loss, by gradient ascent."""
    tokens = model.vitcls.embeddings.register_tokens
    tokens.requires_grad_()
    with torch.enable_grad():
        for _ in range(60):
            model.zero_grad()
            model(pixels[:64], labels=labels[:64]).loss.backward()
            with torch.no_grad():
                tokens[:, 1] += tokens.grad[:, 1] / tokens.grad[:, 1].norm()
    return tokens[:, 1].detach()


@pytest.mark.slow
def test_registers_with_nearly_equal_attention(model: Any) -> None:
    """Their states differ by more than those of identical tokens."""
    with torch.no_grad():
        registers = model.vitcls.embeddings.register_tokens
        registers[:, 1] = registers[:, 0] + 0.05 * registers[:, 0].norm() * torch.randn(registers.shape[-1]) / 6
    found = judged_digits(model)
    assert found["register 1"].word == found["register 2"].word == "equal attention"
    assert found["register 1"].rating == "doubtful" and "the maps of register 2" in found["register 1"].reason
    assert found["CLS"].word == "effect beyond the null"


def test_an_encoder_is_diagnosed_by_its_features(model: Any) -> None:
    found = judge_tokens(model.vitcls, pixels=HELD_OUT[0], num_draws=NUM_NULL_DRAWS)
    cls = found["CLS"]
    assert cls.word == "effect beyond the null" and "nearest neighbors stay the same" in cls.reason
    assert set(cls.numbers["information"]["cosine_change"]) == {"cls", "pooled", "patches"}
    assert (
        0 <= cls.numbers["information"]["knn_agreement"] < found["register 1"].numbers["information"]["knn_agreement"]
    )
    assert found["register 1"].word in EFFECTS


@pytest.mark.slow
@pytest.mark.parametrize("num_null_images", [MIN_NULL_IMAGES, MIN_IMAGES])
def test_rare_false_alarms_of_random_tokens(num_null_images: int) -> None:
    """Check registers in models with random weights: of 60 tokens, at most 5% have an apparent effect."""
    verdicts = [
        found[name]
        for seed in range(20)
        for pixels in [build_images(MIN_IMAGES, seed=seed)]
        for found in [judge_random_tokens(seed, pixels, num_null_images)]
        for name in NAMES[2:]
    ]
    beyond = [verdict.word for verdict in verdicts if verdict.word == "effect beyond the null"]
    assert len(beyond) <= 0.05 * len(verdicts), f"{len(beyond)} of {len(verdicts)}"
    assert {verdict.word for verdict in verdicts} <= EFFECTS


def judge_random_tokens(seed: int, pixels: torch.Tensor, num_null_images: int) -> dict[str, Verdict]:
    """Return the verdicts on a model with random weights, and registers in random directions."""
    model = randomize(build_classifier(), seed)
    return judge_tokens(model, pixels=pixels, num_null_images=num_null_images, num_draws=NUM_NULL_DRAWS)


# Single faults in models with random weights -------------------------------------------------------------------------


def test_tokens_have_little_effect_if_accuracy_is_at_chance() -> None:
    model = build_classifier()
    with torch.no_grad():
        own = model(PIXELS).logits.argmax(dim=-1)
    assert len(own.unique()) > 2
    assert "chance" not in judge_tokens(model, build_movement(1), labels=own)["CLS"].reason
    found = judge_tokens(model, build_movement(1), labels=(own + 1) % 8)["CLS"]
    assert "not better than chance (0.0% on 16 images" in found.reason and found.rating != "good"


@pytest.mark.parametrize("token", ["cls", "distillation", "registers"])
def test_a_frozen_token_did_not_move(token: str) -> None:
    """Train for some steps with one token frozen. The recorded movement is sufficient."""
    model = build_classifier().train()
    monitor = TokenMonitor(model)
    monitor.parameters[token].requires_grad_(False)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.3)
    for _ in range(2):
        optimizer.zero_grad()
        model(PIXELS, labels=torch.arange(len(PIXELS)) % 8).loss.backward()
        optimizer.step()
    found = judge_tokens(model, monitor.compute_token_movement())
    frozen = {"cls": NAMES[:1], "distillation": NAMES[1:2], "registers": NAMES[2:]}[token]
    assert {name for name, word in get_words(found).items() if word == "not moved"} == set(frozen)


def test_a_token_that_did_not_move_and_has_no_effect() -> None:
    """This is a fault if other tokens moved, but with few images the effect is unknown."""
    model = build_classifier(gated_tokens={"registers": 1})
    with torch.no_grad():
        model.vitcls.gates.gates.zero_()
    movement = build_movement(1) | {"registers[2]": 0.0}
    found = judge_tokens(model, movement)["register 3"]
    assert (found.word, found.rating) == ("not moved", "bad")
    assert "training did not move the token (movement 0), but" in found.reason
    few = judge_tokens(model, movement, PIXELS[:3])["register 3"]
    assert (few.word, few.rating) == ("not moved", "neutral") and "there are 3" in few.reason


def test_a_token_with_equal_states_for_all_images() -> None:
    """Attention adds nothing, so special tokens do not depend on the image."""
    model = build_classifier(num_distillation_tokens=0, num_register_tokens=0)
    with torch.no_grad():
        for layer in model.vitcls.layers:
            layer.attention.o_proj.weight.zero_()
    found = judge_tokens(model)["CLS"]
    assert (found.word, found.rating) == ("same for all images", "bad") and "same for every image" in found.reason
    assert "times the norm of the mean state" in found.reason
    moved = judge_tokens(model, {"cls[0]": 1.25})["CLS"]
    assert moved.word == "same for all images"
    assert "same for every image" in moved.reason and "training moved the token by 1.25" in moved.reason
    unmoved = judge_tokens(model, {"cls[0]": 0.0}, PIXELS[:2])["CLS"]  # two images are sufficient
    assert (unmoved.word, unmoved.rating) == ("not moved", "bad") and "same for every image" in unmoved.reason


def test_states_that_are_not_read_are_not_judged() -> None:
    """In the last layer, two registers are equal and do not depend on the image, but the head uses only CLS."""
    model = build_classifier(num_distillation_tokens=0)
    findings = findings_of(model)

    def judge(layer: int) -> list[str]:
        planted = plant(
            findings,
            between_tokens=set_pairs(layer, {(1, 2): 1.0}),
            state_distance=set_pairs(layer, {(1, 2): 0.0}),
            variation=lambda values: values[layer, 3:].fill_(0),
            channel_variation=lambda values: values[layer, 3:].fill_(0),
        )
        found = diagnose_tokens(model.config, planted)
        where = "after layer 2, the last layer whose output is used,"
        assert (where in found[1].reason) == (found[1].word == "collapsed")
        return [verdict.word for verdict in found]

    assert judge(3) == ["not judged"] * 4
    assert judge(2) == ["not judged", "collapsed", "collapsed", "same for all images"]


def test_two_identical_registers() -> None:
    """They start equal, without positions, so they stay equal; the third differs."""
    model = build_classifier()
    with torch.no_grad():
        registers = model.vitcls.embeddings.register_tokens
        registers[:, 2] = registers[:, 0]
    found = judge_tokens(model)
    assert {name for name, word in get_words(found).items() if word == "collapsed"} == {"register 1", "register 3"}
    assert "register 3" in found["register 1"].reason and "register 1" in found["register 3"].reason
    assert "cosine 1.0000, distance 0)" in found["register 1"].reason
    assert judge_tokens(model, pixels=PIXELS[:1])["register 1"].word == "collapsed"  # one image is sufficient


@pytest.mark.parametrize("is_encoder", [False, True])
def test_a_large_common_channel_does_not_make_tokens_identical(is_encoder: bool) -> None:
    """Nor does it make a token equal for all images."""
    model = build_classifier() if not is_encoder else randomize(ViTCLSModel(build_tiny_config(**TOKENS)))

    def shift(mlp: torch.nn.Module, args: tuple, added: torch.Tensor) -> torch.Tensor:
        return added + size * torch.eye(added.shape[-1])[3]

    size = 2e3 * findings_of(model).mean_states[-1].norm(dim=-1).max()
    with model.base_model.layers[-1].mlp.register_forward_hook(shift):
        findings = findings_of(model)
        found = diagnose_tokens(model.config, findings, has_head=not is_encoder)
    assert findings.between_tokens[-1].min() > 0.999 and findings.variation[-1].max() < 1e-3
    assert {verdict.word for verdict in found} == {"not judged"}


def test_two_identical_cls_tokens_of_tasks() -> None:
    config = build_tiny_config(num_cls_tokens=2, tasks=TASKS, num_hidden_layers=3)
    model = center_logits(ViTCLSForMultiTaskClassification(config), PIXELS)
    with torch.no_grad():
        embeddings = model.vitcls.embeddings
        for tokens in (embeddings.cls_token, embeddings.position_embeddings.cls):
            tokens[:, 1] = tokens[:, 0]
    findings = findings_of(model)
    found = diagnose_tokens(model.config, findings)
    assert [verdict.word for verdict in found] == ["collapsed", "collapsed"]
    assert "CLS species" in found[0].reason and "CLS age" in found[1].reason


def test_a_register_without_effect() -> None:
    """No token attends to the last register, which still reads the image."""
    model = build_classifier(gated_tokens={"registers": 2})
    with torch.no_grad():
        model.vitcls.gates.gates.copy_(torch.tensor([model.vitcls.gates.OPEN, 0.0]))
    found = judge_tokens(model, build_movement(1))["register 3"]
    assert (found.word, found.rating) == ("no measurable effect", "neutral")
    assert "0 of 16 (at most 19.4%) predictions change" in found.reason
    assert found.numbers["information"]["changed_answers_interval"] == pytest.approx([0, 0.1936], abs=1e-4)


@pytest.mark.parametrize("number", [1, 2, MIN_IMAGES - 1])
def test_few_images_are_not_judged(number: int) -> None:
    found = judge_tokens(build_classifier(), build_movement(1), PIXELS[:number])
    assert get_words(found) == dict.fromkeys(NAMES, "not judged")
    assert (
        f"there {'are' if number > 1 else 'is'} {number}" in found["CLS"].reason
        and "16 or more images" in found["CLS"].reason
    )


def test_without_tokens_there_are_no_verdicts() -> None:
    none = randomize(ViTCLSModel(build_tiny_config(num_cls_tokens=0, pooling="mean")))
    assert judge_tokens(none) == {} and describe_depth(none.config, findings_of(none)) == []


def test_the_summary_is_one_line() -> None:
    model = build_classifier()
    found = judge_tokens(model)
    verdicts = [found[name] for name in NAMES]
    summary = summarize_diagnosis(
        verdicts, [found["all 3 registers"]], diagnose_patches(model.config, findings_of(model))
    )
    assert "\n" not in summary and all(verdict.word in summary for verdict in verdicts)
    assert summary.endswith("patches: no artifacts")


# Verdicts on planted measurements ------------------------------------------------------------------------------------


def plant(findings: Findings, **values: Any) -> Findings:
    """Return findings with other values; each value is a function that changes a copy of a tensor."""
    changed = {name: getattr(findings, name).clone() for name in values}
    for name, change in values.items():
        change(changed[name])
    return dataclasses.replace(findings, **changed)


def set_pairs(layer: int, pairs: dict[tuple[int, int], float]) -> Callable[[torch.Tensor], None]:
    """Return a function that sets the values of pairs of tokens in a tensor [L + 1, S, S]."""

    def change(values: torch.Tensor) -> None:
        for (one, other), value in pairs.items():
            values[layer, one, other] = values[layer, other, one] = value

    return change


def test_measured_values_of_each_token() -> None:
    model = build_classifier()
    findings = plant(findings_of(model), attention_fractions=lambda values: values[2, :, :, 3].fill_(0.99))
    found = diagnose_tokens(model.config, findings, None, {"registers[0]": 0.25})
    for index, verdict in enumerate(found):
        last = 3 if index < 2 else 2  # the head uses the CLS and the distillation token
        numbers = verdict.numbers
        assert numbers["read_layers"] == last and numbers["movement"] == (0.25 if index == 2 else None)
        assert numbers["variation"] == pytest.approx(findings.variation[last, index].item())
        ratio = findings.token_norms[0, index] / findings.patch_norms[0].median()
        assert numbers["norm_ratio"] == pytest.approx(ratio.item())
        assert numbers["embedding_similarity"] == pytest.approx(findings.across_layers[index, 0, last].item())
        fractions = findings.attention_fractions[:last, :, index, 3]
        assert numbers["patch_mass"] == pytest.approx(fractions.max().item())
    encoder = build_classifier(num_cls_tokens=2)
    for has_head, num_layers in ((True, [3, 2, 3, 2, 2, 2]), (False, [3, 3, 3, 2, 2, 2])):
        found = diagnose_tokens(encoder.config, findings_of(encoder), has_head=has_head)
        assert [verdict.numbers["read_layers"] for verdict in found] == num_layers


def test_identical_tokens_are_compared_in_the_last_state_in_which_both_are_read() -> None:
    """The distance is at most 1% of the smaller variation over images, plus a rounding error of 1e-6 of the norm."""
    model = build_classifier()
    findings = findings_of(model)

    def judge(
        distances: dict[tuple[int, int], float], variation: float = 0.1, cosine: float = 0.9991
    ) -> list[Verdict]:
        planted = plant(
            findings,
            state_distance=set_pairs(2, distances),
            between_tokens=set_pairs(2, dict.fromkeys(distances, cosine)),
            variation=lambda values: values[2].copy_(variation * torch.tensor([1.0, 1.0, 1.0, 2.0, 2.0])),
            mean_states=lambda states: states[2].copy_(nn.functional.normalize(states[2], dim=-1) * NORMS[:, None]),
        )
        return diagnose_tokens(model.config, planted)

    def list_identical(verdicts: list[Verdict]) -> list[str | None]:
        return [verdict.numbers["identical_token"] for verdict in verdicts]

    # variations in the unit of the distance: 0.2 of register 1, and 0.8 of registers 2 and 3
    assert list_identical(judge({(2, 3): 0.0019})) == [None, None, "register 2", "register 1", None]
    for distance, cosine in ((0.0021, 0.9991), (0.0019, 0.9989)):
        assert list_identical(judge({(2, 3): distance}, cosine=cosine)) == [None] * 5
    assert list_identical(judge({(2, 3): 0.0019, (2, 4): 0.0009}))[2] == "register 3"  # the nearest token
    rounding = judge({(2, 3): 1.5e-6}, variation=0.0)
    assert list_identical(rounding) == [None, None, "register 2", "register 1", None]
    different = judge({(0, 4): 0.0019})  # the head uses CLS after layer 3
    assert list_identical(different) == ["register 3", None, None, None, "CLS"]
    for verdict in (different[0], different[4]):
        assert verdict.reason.startswith("after layer 2, the last layer whose output is used, the token is identical")


NORMS = torch.tensor([2.0, 2.0, 2.0, 4.0, 4.0])


def test_a_token_is_too_large_if_its_norm_is_large_and_layers_hardly_change_it() -> None:
    model = build_classifier()
    findings = findings_of(model)
    median = findings.patch_norms[0].median().item()

    def judge(ratio: float, cosine: float) -> Verdict:
        planted = plant(
            findings,
            token_norms=lambda norms: norms[0, 3:4].fill_(ratio * median),
            across_layers=lambda cosines: cosines[3, 0, 2:3].fill_(cosine),
        )
        return diagnose_tokens(model.config, planted)[3]

    assert judge(3.1, 0.91).word == "norm too large"
    assert judge(3.1, 0.91).reason == (
        "the norm of the embedding is 3.1 times the median norm of the patches, so layers hardly change the token "
        "(cosine 0.910 between embedding and last state)."
    )
    assert judge(2.9, 0.91).word == judge(3.1, 0.89).word == "not judged"


def test_only_tokens_that_the_head_reads_must_attend_to_patches() -> None:
    """One head in one layer is sufficient."""
    model = build_classifier()

    def judge(mass: float) -> list[Verdict]:
        def change(fractions: torch.Tensor) -> None:
            fractions[..., 3] = 0.001
            fractions[1, 1, :, 3] = mass

        return diagnose_tokens(model.config, plant(findings_of(model), attention_fractions=change))

    assert [verdict.word for verdict in judge(0.009)] == ["cut off from the patches"] * 2 + ["not judged"] * 3
    assert "at most 0.90% of the token's attention goes to patches" in judge(0.009)[0].reason
    assert {verdict.word for verdict in judge(0.011)} == {"not judged"}


def test_the_token_with_the_nearest_attention_maps_is_named() -> None:
    """Maps are compared in the layers whose output is read, relative to their distance from uniform maps."""
    model = build_classifier()

    def judge(distance: float) -> list[Verdict]:
        def change(distances: torch.Tensor) -> None:
            distances.fill_(0.5)
            distances[:2, 2, 3], distances[:2, 3, 2] = distance, distance
            distances[:2, 2, 4], distances[:2, 4, 2] = 0.027, 0.027

        selectivity = [0.5, 0.5, 0.2, 0.6, 0.4]
        planted = plant(
            findings_of(model),
            map_distance=change,
            map_selectivity=lambda values: values.copy_(torch.tensor(selectivity).expand_as(values)),
        )
        return diagnose_tokens(model.config, planted)

    found = judge(0.02)
    assert [verdict.word for verdict in found] == ["not judged"] * 2 + ["equal attention"] * 2 + ["equal attention"]
    names = [verdict.numbers["equal_attention_token"] for verdict in found]
    assert names == [None, None, "register 2", "register 1", "register 1"]
    assert found[2].numbers["equal_attention_distance"] == pytest.approx(0.02 / 0.4)
    assert found[4].numbers["equal_attention_distance"] == pytest.approx(0.027 / 0.3)
    assert found[2].reason == (
        "the attention maps are nearly equal to the maps of register 2 in all layers whose output is used "
        "(the distance between the maps is 0.05 times their distance from uniform attention)."
    )
    assert judge(0.041)[3].word == "not judged" and judge(0.041)[3].numbers["equal_attention_token"] is None


def test_attention_is_compared_in_the_layers_in_which_both_tokens_are_read() -> None:
    """The head uses the CLS token after layer 3, but the register only after layer 2."""
    model = build_classifier(num_distillation_tokens=0, num_register_tokens=1)

    def change(distances: torch.Tensor) -> None:
        distances[:2], distances[2] = 0.02, 1.0

    planted = plant(findings_of(model), map_distance=change, map_selectivity=lambda values: values.fill_(0.5))
    found = diagnose_tokens(model.config, planted)
    assert [verdict.numbers["equal_attention_distance"] for verdict in found] == [pytest.approx(0.04)] * 2


def build_ablations(changed: dict[str, Ablation], keys: list[str]) -> Ablations:
    """Return the same ablations for both kinds, without effect except for the changed keys."""
    none = Ablation(build_effect(), 0.0, [0.1] * 8, [0.2] * 8, 0.3)
    return {kind: {key: changed.get(key, none) for key in keys} for kind in ("information", "presence")}


def build_effect(**fields: Any) -> AblationEffect:
    values = {"changed_answers": 0.0, "logit_change": 0.5, "accuracy_change": None, "num_images": 16}
    intervals = {"changed_interval": (0.0, 0.25), "logit_interval": (0.4, 0.6)}
    return AblationEffect(**(values | intervals | fields))  # type: ignore[arg-type]


def test_effects_in_words() -> None:
    """Effects are compared with null distributions on the same images."""
    model = build_classifier()
    beyond = Ablation(build_effect(changed_answers=0.25), 0.5, [0.1, 0.1], [0.2, 0.2])
    below = Ablation(build_effect(changed_answers=0.25), 0.2, [0.1, 0.1], [0.2, 0.2])
    groups = {"registers": beyond, "registers[0]": beyond, "registers[1]": below}
    ablations = build_ablations(groups, [*KEYS, "registers"])
    ablations["presence"]["registers[0]"] = below
    findings = findings_of(model)
    found = diagnose_tokens(model.config, findings, ablations, build_movement(2) | {"cls[0]": 0.0})
    values = "4 of 16 (at most 25.0%) predictions change, and logits change by 0.5 (95% interval 0.4 to 0.6; null: "
    values += "random patches 0.1 to 0.1, random tokens 0.2 to 0.2)"
    moved = f"training moved the token by {2 * findings.token_norms[0, 2]:.3g} (2 times the norm of its embedding)."
    assert (found[2].word, found[2].rating, found[2].reason) == (
        "effect beyond the null",
        "good",
        f"effect beyond the null (information): if the token is replaced with its mean, {values}; "
        f"if the token is hidden from attention, {values}; {moved}",
    )
    assert (found[3].word, found[3].rating) == ("no measurable effect", "neutral")
    assert found[3].reason.startswith("no effect beyond the null: if the token is replaced with its mean, 4 of 16")
    assert (found[0].word, found[0].rating) == ("not moved", "bad")  # no effect, while other tokens moved
    (group,) = diagnose_groups(model.config, ablations)
    assert (group.token, group.word) == ("all 3 registers", "effect beyond the null")
    assert group.reason == (
        "effect beyond the null (information and presence): if the tokens are replaced with their means, "
        f"{values}; if the tokens are hidden from attention, {values}."
    )
    assert group.numbers["effect"] == 0.5 and group.numbers["null"] == [0.1, 0.2]
    summary = summarize_diagnosis(found, [group], diagnose_patches(model.config, findings))
    assert summary == (
        "CLS: not moved; distillation, register 2, register 3: no measurable effect; "
        "register 1, all 3 registers: effect beyond the null; patches: no artifacts"
    )


def test_all_measured_values_of_an_effect() -> None:
    """Summaries contain the values of the information ablation. If the accuracy is at chance, effects are neutral."""
    model = build_classifier(num_cls_tokens=2)
    keys = ["cls[0]", "cls[1]", *KEYS[1:], "cls", "registers"]
    changes = {"changed_answers": 0.29, "num_images": 100, "accuracy_change": 0.125, "improvement": 0.3}
    beyond = Ablation(build_effect(**changes), 0.45, [0.1, 0.1], [0.2, 0.2], 0.6)
    ablations = build_ablations({"cls": beyond}, keys)
    presence = Ablation(build_effect(logit_change=0.7, logit_interval=(0.6, 0.8)), 0.65, [0.15], [0.25, 0.25])
    ablations["presence"]["cls"] = presence
    wrong = Predictions(torch.zeros(16, 8), torch.zeros(16, 1), torch.ones(16, 1))
    good, _ = diagnose_groups(model.config, ablations)
    found, registers = diagnose_groups(model.config, ablations, wrong)
    assert (found.token, good.word, good.rating) == ("all 2 CLS tokens", "effect beyond the null", "good")
    assert (found.word, found.rating) == ("effect beyond the null", "neutral")
    assert "29 of 100" in found.reason
    note = (
        "; however, the accuracy is not better than chance (0.0% on 16 images; most frequent label: 100.0% of the "
        "images)."
    )
    assert found.reason.endswith(note) and registers.reason.endswith(note) and "chance" not in good.reason
    assert found.numbers == {
        "effect": 0.5,
        "interval": [0.4, 0.6],
        "null": [0.1, 0.2],
        "information": {
            "effect": 0.5,
            "interval": [0.4, 0.6],
            "null": [0.1, 0.2],
            "null_patches": [0.1, 0.1],
            "null_redrawn": [0.2, 0.2],
            "effect_on_null_images": 0.45,
            "is_beyond_null": True,
            "redraw_effect": 0.6,
            "num_images": 100,
            "changed_answers": 0.29,
            "changed_answers_interval": [0.0, 0.25],
            "accuracy_change": 0.125,
            "p_value_of_improvement": 0.3,
        },
        "presence": {
            "effect": 0.7,
            "interval": [0.6, 0.8],
            "null": [0.15, 0.25],
            "null_patches": [0.15],
            "null_redrawn": [0.25, 0.25],
            "effect_on_null_images": 0.65,
            "is_beyond_null": False,
            "redraw_effect": None,
            "num_images": 16,
            "changed_answers": 0.0,
            "changed_answers_interval": [0.0, 0.25],
            "accuracy_change": None,
            "p_value_of_improvement": None,
        },
    }


def test_an_unmoved_token_with_an_effect_is_frozen_or_already_trained() -> None:
    model = build_classifier()
    beyond = Ablation(build_effect(changed_answers=0.25), 0.5, [0.1, 0.1], [0.2, 0.2])
    ablations = build_ablations({"registers[0]": beyond}, [*KEYS, "registers"])
    movement = build_movement(1) | {"registers[0]": 0.0}
    found = diagnose_tokens(model.config, findings_of(model), ablations, movement)[2]
    assert (found.word, found.rating) == ("not moved", "neutral") and "frozen or already trained;" in found.reason
    unmeasured = diagnose_tokens(model.config, findings_of(model), None, movement)[2]
    assert (unmeasured.word, unmeasured.rating) == ("not moved", "neutral")
    assert unmeasured.reason.endswith("it is frozen or receives no gradient.")
    all_frozen = diagnose_tokens(model.config, findings_of(model), ablations, dict.fromkeys(KEYS, 0.0))[3]
    assert all_frozen.rating == "neutral" and "training did not move any special token" in all_frozen.reason


@pytest.mark.parametrize(
    ("p_value", "is_better", "is_harmful"),
    [(0.004, True, True), (0.005, True, False), (0.004, False, False), (0.004, None, False), (None, True, False)],
)
def test_a_token_is_harmful_if_the_accuracy_rises_significantly_above_chance(
    p_value: float | None, is_better: bool | None, is_harmful: bool
) -> None:
    """There are 12 tests, 2 for each of 5 tokens and a group, so that the limit of the p-value is 0.05 / 12."""
    model = build_classifier()
    effect = build_effect(accuracy_change=0.125, improvement=p_value, is_better_than_chance=is_better)
    ablations = build_ablations({}, [*KEYS, "registers"])
    for key in ("registers[1]", "registers"):
        ablations["presence"][key] = Ablation(effect, 0.5)
    found = diagnose_tokens(model.config, findings_of(model), ablations, build_movement(1))
    verdicts = {verdict.token: verdict for verdict in [*found, *diagnose_groups(model.config, ablations)]}
    harmful = {name for name, verdict in verdicts.items() if verdict.word == "harmful"}
    assert harmful == ({"register 2", "all 3 registers"} if is_harmful else set())
    if is_harmful:
        text = "the accuracy changes by +12.5 percentage points (p = 0.004, 16 images)"
        assert verdicts["register 2"].reason.startswith(f"if the token is hidden from attention, {text}; training")
        assert verdicts["all 3 registers"].reason == f"if the tokens are hidden from attention, {text}."
        assert verdicts["register 2"].numbers["presence"]["p_value_of_improvement"] == 0.004


def test_effects_on_features_in_words() -> None:
    encoder = randomize(ViTCLSModel(build_tiny_config(num_hidden_layers=3, **TOKENS)))
    effect = FeatureEffect({"cls": 0.25, "patches": 0.125}, 0.8, 16, (0.2, 0.3))
    ablation = Ablation(effect, 0.25, [0.1, 0.1])
    ablations = build_ablations(dict.fromkeys([*KEYS, "registers"], ablation), [*KEYS, "registers"])
    found = diagnose_tokens(encoder.config, findings_of(encoder), ablations, has_head=False)[0]
    text = "the cosine distance between the features before and after the ablation is cls 0.25, patches 0.12, and 80% "
    text += "of the nearest neighbors stay the same (95% interval 0.2 to 0.3; null: random patches 0.1 to 0.1)"
    assert f"if the token is replaced with its mean, {text}; if the token is hidden" in found.reason
    assert found.reason.endswith("; the movement of the token in training is unknown.")
    assert found.numbers["effect"] == 0.25 and found.numbers["presence"]["knn_agreement"] == 0.8
    ablations["presence"]["cls[0]"] = dataclasses.replace(
        ablation, effect=dataclasses.replace(effect, knn_agreement=0)
    )
    found = diagnose_tokens(encoder.config, findings_of(encoder), ablations, has_head=False)[0]
    assert "and 0% of the nearest neighbors stay the same" in found.reason


# Depth ---------------------------------------------------------------------------------------------------------------


def test_the_description_over_depth() -> None:
    """Attention is uniform in the first layer, and to one token in the last."""
    model = build_classifier(num_distillation_tokens=0, num_register_tokens=0)
    with torch.no_grad():
        first, _, last = model.vitcls.layers
        first.attention.q_proj.weight.zero_()
        first.attention.q_proj.bias.zero_()
        last.attention.q_proj.weight *= 1000
    (story,) = describe_depth(model.config, findings_of(model))
    assert story.startswith("CLS attends to 100%, ") and "most selective in layer 3: 1 token. " in story


def describe_planted_depth(counts: list[float], **fields: Any) -> str:
    """Return the description of a CLS token that attends to these numbers of 20 visible tokens in each layer."""
    fields = {"num_distillation_tokens": 0, "num_register_tokens": 0, "num_hidden_layers": len(counts)} | fields
    model = build_classifier(**fields)
    entropies = torch.tensor(counts).log()[:, None, None] + torch.tensor([-0.5, 0.5])[:, None]  # [L, H, 1]
    findings = dataclasses.replace(
        findings_of(model), entropy=entropies, uniform_by_token={"entropy": torch.tensor([math.log(20)])}
    )
    return describe_depth(model.config, findings)[0]


def test_the_description_in_numbers() -> None:
    """The entropy is averaged over heads. Seven layers have thirds of 3, 2 and 2 layers."""
    assert describe_planted_depth([20.0, 18.0, 16.0, 10.0, 6.0, 3.6, 12.0]) == (
        "CLS attends to 90%, 40%, 39% of the visible tokens in the first, middle and last third of the layers (100% "
        "is uniform), and is most selective in layer 6: 4 tokens. This is the expected pattern: nearly uniform in "
        "early layers, selective in middle layers."
    )


@pytest.mark.parametrize(
    ("counts", "pattern"),
    [
        ([15.2, 10.0, 20.0], "expected"),
        ([14.8, 2.0, 20.0], "not expected"),  # 74% in the first layer
        ([18.0, 12.2, 20.0], "not expected"),  # more than 2 / 3 of the first layer
        ([18.0, 11.8, 20.0], "expected"),
        ([18.2, 18.2, 18.2], "uniform"),
        ([17.8, 18.2, 18.2], "not expected"),
        ([17.0, 20.0, 20.0, 20.0, 20.0, 20.0], "not expected"),  # one layer, although all thirds are above 90%
    ],
)
def test_limits_of_the_expected_pattern(counts: list[float], pattern: str) -> None:
    ends = {
        "expected": "This is the expected pattern: nearly uniform in early layers, selective in middle layers.",
        "not expected": "is not the expected pattern (nearly uniform in early layers, selective in middle layers).",
        "uniform": "Attention is nearly uniform in every layer, so the token selects no patches.",
    }
    assert describe_planted_depth(counts).endswith(ends[pattern])


def test_a_register_of_a_single_layer_is_not_read() -> None:
    model = build_classifier(num_hidden_layers=1, num_distillation_tokens=0, num_register_tokens=1)
    _, register = describe_depth(model.config, findings_of(model))
    assert register == "register attends to other tokens only in layer 1, and its output is not used."
    verdict = diagnose_tokens(model.config, findings_of(model))[1]
    numbers = verdict.numbers
    assert verdict.word == "not judged"  # an embedding is the same for all images
    assert numbers["read_layers"] == 0 and numbers["patch_mass"] == numbers["embedding_similarity"] == pytest.approx(1)


def test_the_description_uses_the_tokens_of_the_head() -> None:
    model = build_classifier()
    findings = plant(findings_of(model), entropy=lambda values: values[2].zero_())  # most selective in layer 3
    stories = describe_depth(model.config, findings)
    assert ["expected" in one or "every layer" in one for one in stories] == [True, True, False, False, False]
    assert ["selective in layer 3: 1 token." in one for one in stories] == [True, True, False, False, False]


def test_two_layers_have_no_description() -> None:
    model = build_classifier(num_hidden_layers=2, num_distillation_tokens=0, num_register_tokens=0)
    with torch.no_grad():
        model.vitcls.layers[0].attention.q_proj.weight *= 1000
    (story,) = describe_depth(model.config, findings_of(model))
    assert "too few layers" in story and "layer by layer" in story


def test_scoped_tokens_are_measured_within_their_scope() -> None:
    """Attention is uniform within the scopes; the second CLS token attends to a quarter of the image."""
    scopes = {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]}
    model = build_classifier(num_distillation_tokens=0, num_register_tokens=0, **scopes)
    with torch.no_grad():
        for layer in model.vitcls.layers:
            layer.attention.q_proj.weight.zero_()
            layer.attention.q_proj.bias.zero_()
    for story in describe_depth(model.config, findings_of(model), has_head=False):
        assert "attends to 100%, 100%, 100% of the visible tokens" in story and story.endswith("selects no patches.")
    _, unread = describe_depth(model.config, findings_of(model))  # the head does not use the second token
    assert "attends to 100%, 100% of the visible tokens layer by layer" in unread
