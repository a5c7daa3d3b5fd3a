"""The model that training starts from: checkpoints of several tasks for other labels than their own; flags refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from modeling_vitcls import ViTCLSForMultiTaskClassification, ViTCLSImageProcessor
from modeling_vitcls.training.labels import LabelSpace
from modeling_vitcls.training.model import build_model
from modeling_vitcls.training.options import (
    DataOptions,
    DistillationOptions,
    FinetuneOptions,
    ModelOptions,
    TrainingOptions,
)
from modeling_vitcls.training.run import check_combinations


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
    assert heads <= built.fresh
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


def test_flags_that_contradict_each_other_are_refused() -> None:
    options = FinetuneOptions(Path("out"), DataOptions("digits"), ModelOptions("some/checkpoint"))
    check_combinations(options)
    refused = {
        "--teacher needs a distillation token": {
            "distillation": DistillationOptions(teacher="t"),
            "model": ModelOptions("vitcls-tiny", num_distillation_tokens=0),
        },
        "--feature-views is for --trainable head": {"training": TrainingOptions(feature_views=2)},
        "--class-balance needs to know all labels": {
            "data": DataOptions("digits", streaming=True),
            "training": TrainingOptions(class_balance="weights"),
        },
    }
    for message, changes in refused.items():
        with pytest.raises(ValueError, match=message):
            check_combinations(replace(options, **changes))
