"""Added tokens change no output before training, and training passes make ordinary tokens of them."""

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adaptation_cases import adapt_with_loader, get_logged_lines
from helpers.digits_models import LABELS, NUM_TRAINED, PIXELS, train_digits_model
from helpers.tiny_models import (
    IMAGE_LABELS,
    IMAGES,
    assert_same_outputs,
    build_random,
    edit_config,
    edit_weights,
    get_largest_difference,
    raises_one_line,
)
from pytest import LogCaptureFixture, approx
from torch import nn
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.conversion.weight_rules import Fields


ADDED = [{"num_register_tokens": 4}, {"num_cls_tokens": 3}, {"num_distillation_tokens": 1}]
HELD_OUT = PIXELS[NUM_TRAINED:]


@pytest.fixture
def faded() -> ViTCLSForImageClassification:
    """Return a classifier with four new registers."""
    return build_random(ViTCLSForImageClassification).adapt(num_register_tokens=4)


def run_passes(model: Any, number: int) -> Any:
    """Run training passes, without steps of an optimizer."""
    model.train()
    for _ in range(number):
        model(IMAGES, labels=IMAGE_LABELS).loss.backward()
    model.zero_grad()
    return model.eval()


def read_values(model: Any) -> list[float]:
    """Return how far each token is faded in."""
    values: list[float] = model.base_model.fade_in.get_values().tolist()
    return values


def get_mask_of_layers(model: Any) -> Any:
    """Return the mask that the first layer gets."""
    found: list[Any] = []

    def record(_layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.append(arguments[1])

    with model.base_model.layers[0].register_forward_pre_hook(record):
        model(IMAGES)
    return found[0]


# Before training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("added", ADDED, ids=str)
@torch.no_grad()
def test_a_hidden_token_stays_hidden_from_the_largest_scores(added: dict[str, int]) -> None:
    """Trained weights give a random token scores far above all others in images of one color."""
    model = build_random(ViTCLSForImageClassification)
    for layer in model.vitcls.layers:
        layer.attention.k_proj.weight *= 60
    model = model.double()  # The exact effect, without rounding
    images = torch.ones_like(IMAGES).double()
    adapted = model.adapt(**added)
    assert get_largest_difference(adapted(images).logits, model(images).logits) < 1e-12


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("added", ADDED, ids=str)
@torch.no_grad()
def test_logits_stay_until_training(
    added: dict[str, int],
    dtype: torch.dtype,
    tolerance: float,
    implementation: str,
    has_mask: bool,
) -> None:
    model = build_random(ViTCLSForImageClassification, attn_implementation=implementation)
    model = model.to(dtype)
    masks: list[Any] = [None, None]
    adapted = model.adapt(**added)
    if has_mask:  # hides the last patches
        counts = [each.config.token_layout.get_num_tokens(4, 4) for each in (model, adapted)]
        masks = [torch.ones(2, count, dtype=torch.long) for count in counts]
        for mask in masks:
            mask[:, -5:] = 0
    expected, found = (
        each(IMAGES, attention_mask=mask).logits
        for each, mask in zip((model, adapted), masks, strict=True)
    )
    assert get_largest_difference(found.float(), expected.float()) <= tolerance


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
@pytest.mark.parametrize(
    "fields", [{"fading_tokens": {"cls": 1}}, {"relative_position_bias": "layer"}]
)
def test_attention_without_bias_support_is_an_error(implementation: str, fields: Fields) -> None:
    model = build_random(ViTCLSModel, **fields)
    # the package of flash attention need not be installed
    model.config._attn_implementation_internal = implementation
    name = "token_fade_in_steps=0" if "fading_tokens" in fields else "relative_position_bias"
    with raises_one_line(name, implementation, "sdpa"), torch.no_grad():
        model(IMAGES)


@torch.no_grad()
def test_without_steps_added_tokens_act_at_once() -> None:
    model = build_random(ViTCLSForImageClassification)
    adapted = model.adapt(num_register_tokens=4, token_fade_in_steps=0)
    assert adapted.vitcls.fade_in is None
    assert get_largest_difference(adapted(IMAGES).logits, model(IMAGES).logits) > 1e-3


@torch.no_grad()
def test_a_choice_of_no_steps_is_not_kept_for_tokens_of_others(tmp_path: Path) -> None:
    model = build_random(ViTCLSForImageClassification)
    model.adapt(num_register_tokens=2, token_fade_in_steps=0).save_pretrained(tmp_path)
    loaded = ViTCLSForImageClassification.from_pretrained(tmp_path)
    more = ViTCLSForImageClassification.from_pretrained(tmp_path, num_register_tokens=4)
    assert get_largest_difference(more(IMAGES).logits, loaded(IMAGES).logits) < 1e-5


# What counts --------------------------------------------------------------------------------------


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "AdamW": torch.optim.AdamW,
}


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_any_optimizer_fades_tokens_in_by_passes(
    faded: ViTCLSForImageClassification, optimizer_class: Any
) -> None:
    optimizer = optimizer_class(faded.parameters(), lr=1e-5)
    faded.train()
    for number in range(1, 4):
        optimizer.zero_grad()
        faded(IMAGES, labels=IMAGE_LABELS).loss.backward()
        optimizer.step()
        assert read_values(faded) == approx([number / 100] * 4)


def test_new_tokens_learn_from_the_first_pass_on(faded: ViTCLSForImageClassification) -> None:
    faded.train()
    faded(IMAGES, labels=IMAGE_LABELS).loss.backward()
    gradient = faded.vitcls.embeddings.register_tokens.grad
    assert gradient is not None
    assert gradient.any(dim=-1).all()


@torch.no_grad()
def test_only_training_passes_with_gradients_count(faded: ViTCLSForImageClassification) -> None:
    faded(IMAGES)
    faded.train()(IMAGES)
    assert read_values(faded) == [0.0] * 4


def test_training_in_evaluation_mode_is_named(
    faded: ViTCLSForImageClassification, caplog: LogCaptureFixture
) -> None:
    """`from_pretrained` returns this mode, and a loop may forget `model.train()`."""
    transformers_logger = logging.getLogger("modeling_vitcls.model.attention_masks_vitcls")
    transformers_logger.warning_once.cache_clear()
    loss = faded(IMAGES, labels=IMAGE_LABELS).loss
    assert "evaluation mode" not in caplog.text
    loss.backward()
    assert "Call model.train()" in caplog.text


def test_gradient_checkpointing_counts_a_pass_once(faded: ViTCLSForImageClassification) -> None:
    faded.gradient_checkpointing_enable()
    assert read_values(run_passes(faded, 3)) == approx([0.03] * 4)


def test_evaluation_during_training_uses_the_present_value(
    faded: ViTCLSForImageClassification,
) -> None:
    """Weights of g exp(s), as a mask of the caller computes them from ordinary tokens."""
    run_passes(faded, 30)
    ordinary = faded.adapt(token_fade_in_steps=0)
    assert ordinary.vitcls.fade_in is None
    mask = torch.zeros(1, 1, 1, 1 + 4 + 16)
    mask[..., 1:5] = torch.tensor(0.3).log()
    expected = ordinary(IMAGES, attention_mask=mask.expand(2, 1, 21, 21)).logits
    assert get_largest_difference(faded(IMAGES).logits, expected) < 1e-5


@torch.no_grad()
def test_the_number_of_passes_can_be_set(tmp_path: Path) -> None:
    build_random(ViTCLSModel).save_pretrained(tmp_path)
    for loader in (ViTCLSModel, AutoModel):
        model = loader.from_pretrained(tmp_path, num_register_tokens=1, token_fade_in_steps=3)
        model.train()
        for expected in (1 / 3, 2 / 3, 1.0):
            with torch.enable_grad():
                model(IMAGES)
            assert read_values(model) == approx([expected])


@torch.no_grad()
def test_half_precision_counts_every_pass() -> None:
    model = build_random(ViTCLSModel).adapt(num_register_tokens=1, token_fade_in_steps=3000)
    model.to(torch.bfloat16)
    model.fade_in.progress[:] = 0
    for _ in range(400):
        with torch.enable_grad():
            model.fade_in.train()(torch.zeros(1, 18, 1, dtype=torch.bfloat16), None)
    assert read_values(model) == approx([400 / 3000], rel=1e-5)


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again_in_each_pass(
    faded: ViTCLSForImageClassification,
) -> None:
    """The first graph has the mask, and the one after the last pass has none."""
    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    faded.vitcls.fade_in.config.token_fade_in_steps = 5
    compiled = torch.compile(faded, backend=count, fullgraph=True)
    for _ in range(5):
        compiled.train()
        compiled(IMAGES, labels=IMAGE_LABELS).loss.backward()
    assert read_values(faded) == [1.0] * 4
    assert len(graphs) == 1
    for _ in range(2):
        compiled.train()
        compiled(IMAGES, labels=IMAGE_LABELS).loss.backward()
    assert len(graphs) == 2
    assert get_mask_of_layers(faded) is None
    torch._dynamo.reset()


# After training -----------------------------------------------------------------------------------


def test_a_token_has_no_mask_after_the_last_pass(faded: ViTCLSForImageClassification) -> None:
    run_passes(faded, 99)
    assert get_mask_of_layers(faded) is not None
    faded.train()
    faded(IMAGES)
    assert get_mask_of_layers(faded) is None


@pytest.mark.parametrize("loader", [ViTCLSForImageClassification, AutoModelForImageClassification])
def test_a_folder_saved_after_fading_has_ordinary_tokens(
    faded: ViTCLSForImageClassification, loader: Any, tmp_path: Path
) -> None:
    run_passes(faded, 100).save_pretrained(tmp_path)
    with edit_weights(tmp_path) as weights:
        assert not [name for name in weights if "fade_in" in name]
    loaded = loader.from_pretrained(tmp_path)
    assert loaded.config.fading_tokens is None
    assert loaded.vitcls.fade_in is None
    assert_same_outputs(loaded(IMAGES), faded(IMAGES))


def test_saving_leaves_a_model_in_training_as_it_is(
    faded: ViTCLSForImageClassification, tmp_path: Path
) -> None:
    """The other processes of a run have the same keys as the one that saves."""
    keys = run_passes(faded, 100).state_dict().keys()
    faded.save_pretrained(tmp_path, state_dict=faded.state_dict())
    assert faded.state_dict().keys() == keys
    assert faded.config.fading_tokens == {"registers": 4}
    assert ViTCLSForImageClassification.from_pretrained(tmp_path).config.fading_tokens is None


def test_a_folder_saved_during_fading_continues(
    faded: ViTCLSForImageClassification, tmp_path: Path
) -> None:
    run_passes(faded, 40).save_pretrained(tmp_path)
    loaded = ViTCLSForImageClassification.from_pretrained(tmp_path)
    assert_same_outputs(loaded(IMAGES), faded(IMAGES))
    assert read_values(run_passes(loaded, 1)) == approx([0.41] * 4)


def test_a_state_dict_continues_too(faded: ViTCLSForImageClassification) -> None:
    other = copy.deepcopy(faded)
    other.load_state_dict(run_passes(faded, 40).state_dict())
    assert read_values(other) == approx([0.4] * 4)


def test_weights_that_were_saved_after_fading_are_not_faded_in_again(
    faded: ViTCLSForImageClassification, tmp_path: Path
) -> None:
    """As Trainer does: the model of step 0, then the weights of a checkpoint."""
    other = copy.deepcopy(faded)
    run_passes(faded, 100).save_pretrained(tmp_path)
    trained = ViTCLSForImageClassification.from_pretrained(tmp_path)
    other.load_state_dict(trained.state_dict())
    assert_same_outputs(other(IMAGES), trained(IMAGES))


class Digits(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The digits that train."""

    def __len__(self) -> int:
        return NUM_TRAINED

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": PIXELS[index], "labels": LABELS[index]}


@pytest.mark.slow
def test_registers_of_a_run_with_the_defaults_of_trainer_are_in_use(tmp_path: Path) -> None:
    """Also under Trainer's learning rate of 5e-5; learned gates stayed closed with it."""
    train_digits_model(num_register_tokens=0).save_pretrained(tmp_path / "start")
    model = ViTCLSForImageClassification.from_pretrained(tmp_path / "start", num_register_tokens=4)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=100, use_cpu=True, report_to=[], disable_tqdm=True
    )
    trainer = Trainer(model, arguments, train_dataset=Digits())
    trainer.train()
    trainer.save_model()

    trained = ViTCLSForImageClassification.from_pretrained(tmp_path / "run")
    without = ViTCLSForImageClassification.from_pretrained(tmp_path / "run", num_register_tokens=0)
    assert trained.config.fading_tokens is None
    assert without.vitcls.embeddings.register_tokens is None
    with torch.no_grad():
        logits, found = trained(HELD_OUT).logits, without(HELD_OUT).logits
    assert (found - logits).abs().mean() > 0.02 * logits.std()


# Other tokens -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [None, ViTCLSModel, AutoModel])
@torch.no_grad()
def test_tokens_that_are_kept_go_on_where_they_were(
    loader: Any, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    """Two ordinary registers precede two fading ones, and one CLS token a fading one."""
    model = build_random(ViTCLSModel, num_register_tokens=2)
    fading = model.adapt(num_cls_tokens=2, num_register_tokens=4)
    full = fading.fade_in.FULL
    fading.fade_in.progress.copy_((torch.tensor([5, 2, 3]) * full) // 10)

    for change, fading_tokens, values, logged in (  # numbers of kept, dropped and hidden tokens
        (
            {"num_register_tokens": 5},
            {"cls": 1, "registers": 3},
            [0.5, 0.2, 0.3, 0.0],
            ["3", "0", "1"],
        ),
        ({"num_register_tokens": 3}, {"cls": 1, "registers": 1}, [0.5, 0.2], ["2", "1", "0"]),
        ({"num_register_tokens": 2}, {"cls": 1}, [0.5], ["1", "2", "0"]),
        ({"num_cls_tokens": 1}, {"registers": 2}, [0.2, 0.3], ["2", "1", "0"]),
    ):
        caplog.clear()
        changed = adapt_with_loader(fading, loader, tmp_path, **change)
        assert changed.config.fading_tokens == fading_tokens
        notes = [line for line in get_logged_lines(caplog) if line.startswith("fade_in.progress")]
        assert re.findall(r"\d+", " ".join(notes)) == logged
        assert read_values(changed) == approx(values)

    opened = adapt_with_loader(fading, loader, tmp_path, token_fade_in_steps=0)
    assert opened.fade_in is None


# Folders with learned gates -----------------------------------------------------------------------


def save_with_gates(folder: Path, gates: list[float]) -> ViTCLSForImageClassification:
    """Save a model as versions with learned gates did, and return it without gates.

    Its last registers are gated; g is 50 times the magnitude of the parameter, and at most 1.
    """
    model = build_random(ViTCLSForImageClassification, num_register_tokens=3)
    model.save_pretrained(folder)
    edit_config(folder, gated_tokens={"registers": len(gates)}, fading_tokens=None)
    with edit_weights(folder) as weights:
        weights["vitcls.gates.gates"] = torch.tensor(gates) / 50
    return model


@pytest.mark.parametrize("loader", [ViTCLSForImageClassification, AutoModelForImageClassification])
@torch.no_grad()
def test_learned_gates_of_old_folders_are_read(loader: Any, tmp_path: Path) -> None:
    model = save_with_gates(tmp_path, [0.25, -0.6])
    mask = torch.zeros(2, 1, 20, 20)
    mask[..., 2:4] = torch.tensor([0.25, 0.6]).log()
    expected = model(IMAGES, attention_mask=mask).logits
    loaded = loader.from_pretrained(tmp_path)
    assert get_largest_difference(loaded(IMAGES).logits, expected) < 1e-6
    assert read_values(loaded) == approx([0.25, 0.6])


@torch.no_grad()
def test_open_gates_of_old_folders_are_ordinary_tokens(tmp_path: Path) -> None:
    model = save_with_gates(tmp_path, [1.2, -1.0])
    loaded = ViTCLSForImageClassification.from_pretrained(tmp_path)
    assert loaded.config.gated_tokens is None
    assert loaded.config.fading_tokens is None
    assert_same_outputs(loaded(IMAGES), model(IMAGES))


@torch.no_grad()
def test_an_old_folder_is_saved_without_gates_and_can_be_adapted(tmp_path: Path) -> None:
    save_with_gates(tmp_path / "old", [0.25, 0.6])
    loaded = ViTCLSForImageClassification.from_pretrained(tmp_path / "old")
    loaded.save_pretrained(tmp_path / "new")
    again = ViTCLSForImageClassification.from_pretrained(tmp_path / "new")
    assert_same_outputs(again(IMAGES), loaded(IMAGES))
    for source in ("old", "new"):
        load = ViTCLSForImageClassification.from_pretrained
        assert read_values(load(tmp_path / source, num_register_tokens=2)) == approx([0.25])
        more = load(tmp_path / source, num_register_tokens=4)
        assert read_values(more) == approx([0.25, 0.6, 0.0])


def test_training_opens_the_gates_of_old_folders(tmp_path: Path) -> None:
    save_with_gates(tmp_path, [0.25, 0.6])
    loaded = ViTCLSForImageClassification.from_pretrained(tmp_path)
    assert read_values(run_passes(loaded, 50)) == approx([0.75, 1.0])
