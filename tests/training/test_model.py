"""The model that training starts from: checkpoints of several tasks for other labels than their own; flags refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate_state import reset_accelerate
from tiny_models import raises_one_line, tiny_config

from modeling_vitcls import ViTCLSForMultiTaskClassification, ViTCLSImageProcessor
from modeling_vitcls.data.labels import LabelSpace
from modeling_vitcls.options import DataOptions, DistillationOptions, FinetuneOptions, ModelOptions, TrainingOptions
from modeling_vitcls.training.model import build_model
from modeling_vitcls.training.setup import check_combinations, prepare


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps its settings in singletons: each test starts without."""
    reset_accelerate()
    yield
    reset_accelerate()


@pytest.fixture(scope="module")
def two_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with two tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)
    config = tiny_config(num_cls_tokens=2, tasks={"age": 2, "kind": 3})
    ViTCLSForMultiTaskClassification(config).save_pretrained(folder)
    ViTCLSImageProcessor(size=32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "label_space",
    [
        LabelSpace("multi_task", {"age": ["old", "young"], "kind": ["a", "b"], "size": ["s", "m", "l"]}),
        LabelSpace("multi_task", {"colour": ["red", "green"]}),
        LabelSpace("single_label_classification", {"label": ["yes", "no"]}),
    ],
    ids=["more tasks", "one task", "no tasks"],
)
def test_a_checkpoint_of_several_tasks_learns_other_labels(two_tasks: Path, label_space: LabelSpace) -> None:
    saved = ViTCLSForMultiTaskClassification.from_pretrained(two_tasks)
    built = build_model(ModelOptions(model=str(two_tasks)), label_space)
    heads = {name for name, _ in built.model.named_parameters() if not name.startswith("vitcls.")}
    assert heads <= built.newly_initialized
    kept = saved.vitcls.layers[0].mlp.fc1.weight
    assert torch.equal(built.model.vitcls.layers[0].mlp.fc1.weight, kept)
    logits = built.model(torch.zeros(1, 3, *built.model.config.image_height_width)).logits
    if label_space.kind == "multi_task":
        assert {task: answer.shape[1] for task, answer in logits.items()} == {
            task: len(names) for task, names in label_space.columns.items()
        }
        assert built.model.config.num_cls_tokens == len(label_space.columns)
    else:
        assert logits.shape == (1, 2) and built.model.config.tasks is None


def test_patches_are_left_out_of_layers_that_learn(two_tasks: Path, tmp_path: Path) -> None:
    """How many layers there are is known once the checkpoint is there."""
    model = ModelOptions(str(two_tasks), patch_drop_rate=0.5)
    options = FinetuneOptions(tmp_path / "out", DataOptions("digits"), model)
    with raises_one_line("--patch-drop-rate", "--trainable last-1 freezes them"):
        prepare(replace(options, training=TrainingOptions(trainable="last-1")))
    assert not (tmp_path / "out").exists()
    reset_accelerate()
    run = prepare(replace(options, training=TrainingOptions(trainable="last-2")))
    assert run.built.model.config.patch_drop_rate == 0.5


def test_flags_that_contradict_each_other_are_refused() -> None:
    options = FinetuneOptions(Path("out"), DataOptions("digits"), ModelOptions("some/checkpoint"))
    check_combinations(options)
    refused = {
        "--teacher requires a distillation token": {
            "distillation": DistillationOptions(teacher="t"),
            "model": ModelOptions("vitcls-tiny", num_distillation_tokens=0),
        },
        "--patch-drop-rate requires trained first layers, but --trainable head": {
            "model": ModelOptions("some/checkpoint", patch_drop_rate=0.5),
            "training": TrainingOptions(trainable="head"),
        },
        "--feature-views requires --trainable head": {"training": TrainingOptions(feature_views=2)},
        "--class-balance requires all labels": {
            "data": DataOptions("digits", streaming=True),
            "training": TrainingOptions(class_balance="weights"),
        },
    }
    for message, changes in refused.items():
        with pytest.raises(ValueError, match=message):
            check_combinations(replace(options, **changes))
