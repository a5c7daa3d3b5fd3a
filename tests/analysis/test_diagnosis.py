"""Verdicts about planted faults: each fault is found with its measurements, and healthy tokens have no fault."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from digits_models import HELD_OUT, train_digits_model
from tiny_models import TASKS, build_images, build_tiny_config, randomize
from varied_models import center_logits, collect_findings

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification, ViTCLSModel
from modeling_vitcls.analysis.ablation import NUM_NULL_DRAWS, compute_ablations, compute_null_limit
from modeling_vitcls.analysis.artifacts import diagnose_patches
from modeling_vitcls.analysis.diagnosis import (
    Verdict,
    describe_depth,
    diagnose_groups,
    diagnose_tokens,
    summarize_diagnosis,
)
from modeling_vitcls.analysis.effects import compute_binomial_interval
from modeling_vitcls.analysis.inspection import MIN_NULL_IMAGES, select_evenly_spaced
from modeling_vitcls.analysis.model_outputs import MIN_IMAGES, collect_outputs
from modeling_vitcls.analysis.model_utils import is_classifier
from modeling_vitcls.analysis.report import VERDICT_SIGNS
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
) -> dict[str, Verdict]:
    """Return the verdicts on tokens and groups by name. Without labels, all images have the first class."""
    has_head = is_classifier(model)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        yield pixels, torch.zeros(len(pixels), dtype=torch.long) if labels is None and has_head else labels

    findings, before = findings_of(model, pixels), collect_outputs(model, batches)
    sampled = select_evenly_spaced(range(len(pixels)), num_null_images or len(pixels))
    sample = (lambda: [(pixels[sampled], None)], sampled)
    ablations = compute_ablations(model, batches, findings.mean_states, before, sample)
    predictions = None if labels is None else before
    found = diagnose_tokens(model.config, findings, ablations, movement, predictions, has_head)
    assert [verdict.token for verdict in found] == get_token_names(model.config)
    found += diagnose_groups(model.config, ablations, predictions)
    for verdict in found:
        assert verdict.reason.endswith(".") and "\n" not in verdict.reason and any(map(str.isdigit, verdict.reason))
        assert (verdict.word, verdict.rating) in VERDICT_SIGNS  # the page has a symbol for it
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
    return judge_tokens(model, movement, *HELD_OUT)


@pytest.mark.slow_cases
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


@pytest.mark.slow_cases
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


@pytest.mark.slow_cases
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


@pytest.mark.slow
def test_duplicated_registers(model: Any) -> None:
    with torch.no_grad():
        registers = model.vitcls.embeddings.register_tokens
        registers[:, 1] = registers[:, 0]
    found = judged_digits(model)
    assert found["register 1"].word == found["register 2"].word == "collapsed"
    assert found["CLS"].word == "effect beyond the null"


@pytest.mark.slow
def test_a_frozen_token_while_others_moved(model: Any) -> None:
    movement = {"cls[0]": 0.5, "registers[0]": 0.2, "registers[1]": 0.0}
    found = judged_digits(model, movement)
    assert found["register 2"].word == "not moved" and "did not move in this run" in found["register 2"].reason
    assert found["register 1"].word != "not moved"
    all_frozen = judged_digits(model, dict.fromkeys(movement, 0.0))
    assert {all_frozen[name].rating for name in ("CLS", "register 1", "register 2")} == {"neutral"}


@pytest.mark.slow_cases
def test_an_encoder_is_diagnosed_by_its_features(model: Any) -> None:
    found = judge_tokens(model.vitcls, pixels=HELD_OUT[0])
    cls = found["CLS"]
    assert cls.word == "effect beyond the null" and "nearest images stay the same" in cls.reason
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
        for found in [judge_tokens(build_random_model(seed), pixels=pixels, num_null_images=num_null_images)]
        for name in NAMES[2:]
    ]
    beyond = [verdict.word for verdict in verdicts if verdict.word == "effect beyond the null"]
    assert len(beyond) <= 0.05 * len(verdicts), f"{len(beyond)} of {len(verdicts)}"
    assert {verdict.word for verdict in verdicts} <= EFFECTS


def build_random_model(seed: int) -> Any:
    """Return a model with random weights, and registers in random directions."""
    return randomize(build_classifier(), seed)


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
    found = judge_tokens(model, monitor.compute_movement())
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
    assert "did not move in this run (movement 0), but" in found.reason
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
    """In the last layer, two registers are equal and do not depend on the image, but the head reads only CLS."""
    model = build_classifier(num_distillation_tokens=0)
    findings = findings_of(model)

    def judge(layer: int, has_head: bool = True) -> list[str]:
        planted = dataclasses.replace(
            findings,
            **{name: getattr(findings, name).clone() for name in ("between_tokens", "state_distance", "variation")},
            channel_variation=findings.channel_variation.clone(),
        )
        planted.between_tokens[layer, 1, 2] = planted.between_tokens[layer, 2, 1] = 1
        planted.state_distance[layer, 1, 2] = planted.state_distance[layer, 2, 1] = 0
        planted.variation[layer, 3] = planted.channel_variation[layer, 3] = 0
        found = diagnose_tokens(model.config, planted, has_head=has_head)
        where = "after layer 2, the last layer whose output is read,"
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
    assert "0 of 16 (at most 17.1%) predictions change" in found.reason
    assert found.numbers["information"]["changed_answers_interval"] == pytest.approx([0, 1 - 0.05 ** (1 / 16)])


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


def test_intervals_and_limits() -> None:
    assert compute_binomial_interval(0, 256)[1] == pytest.approx(0.0116, abs=1e-4)
    assert compute_binomial_interval(256, 256)[0] == pytest.approx(0.9884, abs=1e-4)
    low, high = compute_binomial_interval(5, 50)
    assert (low, high) == (pytest.approx(0.0333, abs=1e-3), pytest.approx(0.2181, abs=1e-3))
    assert compute_null_limit([0.1] * 8) == pytest.approx(0.1)
    assert compute_null_limit([0.1] * 7 + [0.5]) > 0.45


def test_the_summary_is_one_line() -> None:
    model = build_classifier()
    found = judge_tokens(model)
    verdicts = [found[name] for name in NAMES]
    summary = summarize_diagnosis(
        verdicts, [found["all 3 registers"]], diagnose_patches(model.config, findings_of(model))
    )
    assert "\n" not in summary and all(verdict.word in summary for verdict in verdicts)
    assert summary.endswith("patches: no artifacts")


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


@pytest.mark.parametrize(
    ("selective", "end"),
    [
        ([1], "This is the expected pattern: nearly uniform in early layers, selective in middle layers."),
        ([1, 2], "This is the expected pattern: nearly uniform in early layers, selective in middle layers."),
        ([0], "This is not the expected pattern (nearly uniform in early layers, selective in middle layers)."),
        (
            [0, 1, 2],
            "This is not the expected pattern (nearly uniform in early layers, selective in middle layers).",
        ),
        ([2], "This is not the expected pattern (nearly uniform in early layers, selective in middle layers)."),
        ([], "Attention is uniform in every layer, so the token selects no patches."),
    ],
)
def test_whether_the_description_applies(selective: list[int], end: str) -> None:
    model = build_classifier(num_distillation_tokens=0, num_register_tokens=0)
    with torch.no_grad():
        for index, layer in enumerate(model.vitcls.layers):
            layer.attention.q_proj.weight *= 1000 if index in selective else 0
            layer.attention.q_proj.bias *= index in selective
    (story,) = describe_depth(model.config, findings_of(model))
    assert story.endswith(end)


def test_the_description_uses_the_tokens_of_the_head() -> None:
    model = build_classifier()
    stories = describe_depth(model.config, findings_of(model))
    assert ["expected" in one or "every layer" in one for one in stories] == [True, True, False, False, False]


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
    _, unread = describe_depth(model.config, findings_of(model))  # the head does not read the second token
    assert "attends to 100%, 100% of the visible tokens layer by layer" in unread
