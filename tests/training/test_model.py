"""The initial model of training, invalid flags, what is trained, and merged LoRA models."""

import re
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    IMAGES,
    assert_same_bits,
    build_random,
    build_tiny_config,
    get_largest_difference,
    raises_one_line,
    randomize,
    save_classifier,
    save_with_processor,
)
from helpers.tiny_options import build_initial_model
from pytest import MonkeyPatch
from torch import nn

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.data.labels import LabelSpace, OneLabel, PerTask, SeveralLabels
from modeling_vitcls.training.defaults import choose_image_size
from modeling_vitcls.training.model import (
    check_model_flags,
    merge_lora,
    resolve_initial_model,
    set_train_mode,
    set_trainable_parameters,
)


@pytest.fixture(scope="module")
def two_tasks(module_path: Path) -> Path:
    """Return a checkpoint with two tasks."""
    config = build_tiny_config(num_cls_tokens=2, tasks={"age": 2, "kind": 3})
    return save_with_processor(ViTCLSForMultiTaskClassification(config), module_path)


@pytest.mark.parametrize("labels", [["LABEL_0", "LABEL_1", "LABEL_2"], ["no", "yes"]])
def test_extra_heads_are_dropped_because_fine_tuning_changes_their_features(
    labels: list[str], tmp_path: Path
) -> None:
    save_classifier(tmp_path, extra_heads={"weather": {"labels": ["rain", "sun"]}})
    label_space = OneLabel({"label": labels})
    model, _, new_names = build_initial_model(tmp_path, label_space)
    assert model.config.extra_heads is None
    assert not model.extra_heads
    assert ("classifier.weight" in new_names) == (labels == ["no", "yes"])


@pytest.mark.parametrize(
    "label_space",
    [
        PerTask({"age": ["old", "young"], "kind": ["a", "b"], "size": ["s", "m", "l"]}),
        PerTask({"colour": ["red", "green"]}),
        OneLabel({"label": ["yes", "no"]}),
    ],
)
def test_a_checkpoint_of_several_tasks_is_trained_on_other_labels(
    two_tasks: Path, label_space: LabelSpace
) -> None:
    saved = ViTCLSForMultiTaskClassification.from_pretrained(two_tasks)
    model, _, new_names = build_initial_model(two_tasks, label_space)
    heads = {name for name, _ in model.named_parameters() if not name.startswith("vitcls.")}
    assert heads <= new_names
    kept = saved.vitcls.layers[0].mlp.fc1.weight
    assert torch.equal(model.vitcls.layers[0].mlp.fc1.weight, kept)
    logits = model(torch.zeros(1, 3, *model.config.image_height_width)).logits

    if label_space.kind == "multi_task":
        assert {task: answer.shape[1] for task, answer in logits.items()} == {
            task: len(names) for task, names in label_space.columns.items()
        }
        assert model.config.num_cls_tokens == len(label_space.columns)
    else:
        assert logits.shape == (1, 2)
        assert model.config.tasks is None


@pytest.mark.parametrize(
    ("stored_kind", "build", "names", "is_same"),
    [
        ("multi_label_classification", OneLabel, ["ant", "bee", "café"], False),
        ("multi_label_classification", SeveralLabels, ["ant", "bee", "café"], True),
        (None, OneLabel, ["ant", "bee", "café"], True),
        (None, SeveralLabels, ["ant", "bee", "café"], False),
        (None, OneLabel, ["ant", "café", "bee"], False),
    ],
)
def test_a_classifier_is_kept_only_for_the_same_labels(
    stored_kind: str | None, build: Any, names: list[str], is_same: bool, tmp_path: Path
) -> None:
    fields = {
        "id2label": {0: "ant", 1: "bee", 2: unicodedata.normalize("NFD", "café")},
        "problem_type": stored_kind,
        "distance_threshold": 2.0,
    }
    saved = ViTCLSForImageClassification(build_tiny_config(**fields))
    save_with_processor(saved, tmp_path)
    model, _, new_names = build_initial_model(tmp_path, build({"label": names}))

    assert new_names == (set() if is_same else {"classifier.weight", "classifier.bias"})
    assert torch.equal(model.classifier.weight, saved.classifier.weight) is is_same
    assert model.config.problem_type == (stored_kind if is_same else build.kind)
    assert model.config.pooling == "cls"
    # They were fitted to the old classifier.
    assert model.config.distance_threshold is None


@pytest.mark.parametrize("flags", [{"pooled_layers": (-1,)}, {"pooling": "cls"}])
def test_a_classifier_of_other_layers_or_pooling_is_replaced(
    flags: dict[str, Any], tmp_path: Path
) -> None:
    names = ["ant", "bee"]
    save_classifier(tmp_path, *names, pooling="cls_mean", pooled_layers=[-2, -1])
    model, _, new_names = build_initial_model(tmp_path, OneLabel({"label": names}), **flags)

    assert new_names == {"classifier.weight", "classifier.bias"}
    assert model.classifier.in_features == 2 * model.config.hidden_size


@pytest.mark.parametrize("stored", [{}, {"pooled_norm": True}, {"pooling": "mean"}])
def test_a_new_classifier_keeps_the_pooling_of_the_encoder(stored: Fields, tmp_path: Path) -> None:
    encoder = ViTCLSModel(build_tiny_config(num_distillation_tokens=0, **stored))
    save_with_processor(encoder, tmp_path)
    labels = OneLabel({"label": ["ant", "bee"]})
    model, _, _ = build_initial_model(tmp_path, labels)
    assert model.config.pooling == encoder.config.pooling
    assert_same_bits(model.vitcls.state_dict(), encoder.state_dict())


@pytest.mark.parametrize(
    "names", [["ant", "bee", "cat"], ["bee", "cat"]], ids=["same labels", "other labels"]
)
def test_checkpoints_in_bfloat16_are_trained_in_float32(names: list[str], tmp_path: Path) -> None:
    """Parameters that the checkpoint lacks are new, and the mask token is frozen.

    DDP would wait for a gradient of the mask token.
    """
    config = build_tiny_config(
        id2label={0: "ant", 1: "bee", 2: "cat"}, num_register_tokens=2, use_mask_token=True
    )
    save_with_processor(ViTCLSForImageClassification(config).bfloat16(), tmp_path)
    flags = {"num_distillation_tokens": 1, "num_register_tokens": 1, "pooling": "attention"}
    model, _, new_names = build_initial_model(tmp_path, OneLabel({"label": names}), **flags)
    vit = model.vitcls
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float32}
    frozen = [name for name, parameter in vit.named_parameters() if not parameter.requires_grad]
    assert frozen == ["embeddings.mask_token"]
    # A classifier of the same labels was fitted to another pooling
    heads = ("classifier", "distillation_classifier")
    new = {f"{head}.{name}" for head in heads for name in ("weight", "bias")}
    new |= {name for name, _ in model.named_parameters() if name.startswith("vitcls.pooler.")}

    assert new_names == new | {"vitcls.embeddings.distillation_token"}


def test_only_names_that_look_like_presets_must_be_presets(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vitcls-mine").mkdir()
    for name in ("vitcls-tiny", "vitcls-mine", "vitcls-lab/model", "other-model"):
        check_model_flags(name, (), "full", None)
    with raises_one_line("`model='vitcls-yours'` is not a preset", "vitcls-tiny, vitcls-small"):
        check_model_flags("vitcls-yours", (), "full", None)
    with raises_one_line("`model='tiny'` is not a preset", "vitcls-tiny"):
        check_model_flags("tiny", (), "full", None)


def test_fields_that_follow_from_the_labels_and_unknown_ones_are_errors() -> None:
    with raises_one_line("`model_config` cannot set `num_labels`"):
        check_model_flags("vitcls-tiny", {"num_labels": 7}, "full", None)
    with raises_one_line("'drop_path': did you mean drop_path_rate?"):
        check_model_flags("some/checkpoint", {"drop_path": 0.1}, "full", None)


def test_contradictory_flags_are_errors() -> None:
    with raises_one_line("`token_fade_in_steps`", "checkpoint"):
        check_model_flags("vitcls-tiny", (), "full", 0)
    with raises_one_line("`trainable='last-1'`", "`model`"):
        check_model_flags("vitcls-tiny", (), "last-1", None)
    check_model_flags("some/checkpoint", (), "head", None)


LAYOUT = {"num_distillation_tokens": 1, "num_register_tokens": 2}
TASKS = {"num_cls_tokens": 2, "tasks": {"species": 4, "age": 2}}
MODELS = {
    "two heads": (ViTCLSForImageClassification, LAYOUT),
    "attention pooling": (
        ViTCLSForImageClassification,
        {"pooling": "attention", "num_cls_tokens": 0},
    ),
    "mlp heads": (
        ViTCLSForImageClassification,
        LAYOUT | {"head_type": "mlp", "pooling": "cls_mean"},
    ),
    "several tasks": (ViTCLSForMultiTaskClassification, TASKS),
    "mask token": (ViTCLSForImageClassification, LAYOUT | {"use_mask_token": True}),
    "fading": (ViTCLSForImageClassification, LAYOUT | {"fading_tokens": {"registers": 2}}),
}


def build_random_model(model_class: Any = ViTCLSForImageClassification, **fields: Any) -> Any:
    """Return a model with random weights whose mask token is frozen, as in training."""
    model = build_random(model_class, **fields)
    if model.vitcls.embeddings.mask_token is not None:
        model.vitcls.embeddings.mask_token.requires_grad_(False)
    return model


def group_trainable(model: nn.Module) -> set[str]:
    """Return the groups of trainable parameters: `layers.1`, `lora`, or their module."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = {re.sub(r"^vitcls\.|^embeddings\.", "", name) for name in names}
    groups = {"lora" if "lora_" in name else name for name in groups}
    return {
        re.sub(r"(layers\.\d+|pooler|classifiers?|layernorm|distillation_classifier)\..*", r"\1", n)
        for n in groups
    }


def compute_loss(model: Any) -> torch.Tensor:
    """Return a loss that depends on all outputs of the model."""
    outputs = model(IMAGES)
    if isinstance(outputs.logits, dict):
        heads = list(outputs.logits.values())
    else:
        heads = [outputs.cls_logits, outputs.distillation_logits]
    return torch.stack([logits.square().mean() for logits in heads if logits is not None]).sum()


# Trainable parameters -----------------------------------------------------------------------------


HEADS = {"classifier", "distillation_classifier", "pooler"}
TOKENS = {f"embeddings.{name}" for name in ("cls_token", "distillation_token", "register_tokens")}
EXPECTED = {
    "head": HEADS,
    "last-1": HEADS | {"layernorm", "layers.1"},
    "last-2": HEADS | {"layernorm", "layers.0", "layers.1"},
    "lora": HEADS | TOKENS | {"lora"},
    "tokens": HEADS | TOKENS,
}


@pytest.mark.parametrize(("choice", "expected"), EXPECTED.items())
def test_each_choice_trains_its_parameters(choice: str, expected: set[str]) -> None:
    model = build_random_model(**LAYOUT, pooling="attention")
    assert group_trainable(set_trainable_parameters(model, choice)) == expected


@pytest.mark.parametrize("choice", ["head", "last-1", "lora", "tokens"])
def test_added_tokens_are_trained_with_their_positions(choice: str, tmp_path: Path) -> None:
    """All new tokens of an adapted checkpoint are trained."""
    fields = {
        "position_embedding_tokens": "all",
        "num_register_tokens": 1,
        "fading_tokens": {"registers": 1},
    }
    names = ["ant", "bee", "cat"]
    saved = ViTCLSForImageClassification(
        build_tiny_config(**fields, id2label=dict(enumerate(names)))
    )
    save_with_processor(saved, tmp_path)
    labels = OneLabel({"label": names})
    model, _, new_names = build_initial_model(
        tmp_path, labels, num_distillation_tokens=1, num_register_tokens=3
    )
    found = group_trainable(set_trainable_parameters(model, choice, new_names))
    new = {f"embeddings.{name}" for name in ("distillation_token", "register_tokens")}

    new |= {f"embeddings.position_embeddings.{group}" for group in ("distillation", "registers")}
    assert new <= found
    assert "embeddings.position_embeddings.cls" not in found
    assert ("embeddings.cls_token" in found) == (choice == "lora")


def test_invalid_choices_are_errors(monkeypatch: MonkeyPatch) -> None:
    with raises_one_line("last-3", "2 layers"):
        set_trainable_parameters(build_random_model(), "last-3")
    with raises_one_line("`trainable='tokens'`", "special tokens", "`num_register_tokens=4`"):
        set_trainable_parameters(build_random_model(num_cls_tokens=0, pooling="mean"), "tokens")
    monkeypatch.setitem(sys.modules, "peft", None)
    with raises_one_line("`trainable='lora'` requires PEFT: pip install peft"):
        set_trainable_parameters(build_random_model(), "lora")


# Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "choice"),
    list(zip(MODELS, ["last-1", "head", "lora", "head", "last-2", "lora"], strict=True)),
)
def test_exactly_the_trainable_parameters_change(name: str, choice: str) -> None:
    """With several processes, a trainable parameter without a gradient stops the run."""
    model_class, fields = MODELS[name]
    model = set_trainable_parameters(build_random_model(model_class, **fields), choice)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    set_train_mode(model)
    learns = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learns, lr=0.1)
    for _ in range(2):  # LoRA's A moves from the second step on
        optimizer.zero_grad()
        compute_loss(model).backward()
        assert all(parameter.grad is not None for parameter in learns)
        optimizer.step()
    moved = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}

    assert moved <= wanted
    # key biases do not change the softmax
    assert all("k_proj.bias" in name for name in wanted - moved)


# Modes --------------------------------------------------------------------------------------------


def test_a_frozen_encoder_has_no_dropout() -> None:
    model = build_random_model(
        hidden_dropout_prob=0.5, drop_path_rate=0.5, attention_probs_dropout_prob=0.5
    )
    set_trainable_parameters(model, "head")
    set_train_mode(nn.Sequential(model))  # as wrapped by other code
    first, second = (model(IMAGES).logits for _ in range(2))
    assert torch.equal(first, second)
    model.train()
    assert not torch.equal(model(IMAGES).logits, second)


# LoRA ---------------------------------------------------------------------------------------------


def test_a_merged_model_has_equal_outputs_and_plain_modules() -> None:
    model = randomize(set_trainable_parameters(build_random_model(**LAYOUT), "lora"))
    plain = ViTCLSForImageClassification(build_tiny_config(**LAYOUT)).eval()
    plain.load_state_dict(merge_lora(model.state_dict()))
    expected = model(IMAGES).logits
    assert get_largest_difference(plain(IMAGES).logits, expected) <= 1e-5


@pytest.mark.parametrize(
    ("native", "patch", "expected"),
    [(518, 14, 224), (288, 18, 216), ((16, 576), 16, (16, 224)), (256, 16, None)],
)
def test_large_checkpoints_are_fine_tuned_at_224_pixels(
    native: Any, patch: int, expected: Any, tmp_path: Path
) -> None:
    config = build_tiny_config(
        image_size=native, patch_size=patch, position_embedding_type="sincos_2d"
    )
    save_with_processor(ViTCLSModel(config), tmp_path)
    size, _ = choose_image_size(resolve_initial_model(str(tmp_path)), {})
    assert size == expected
