"""Losses: their formulas, gradient accumulation, and errors."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    IMAGE_LABELS,
    IMAGES,
    build_images,
    build_random,
    build_tiny_config,
    raises_one_line,
)
from pytest import approx
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.data import default_collate
from transformers import PreTrainedModel, Trainer, TrainingArguments

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
)
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.model.heads_vitcls import compute_masked_pixel_loss


TASKS = {"species": 4, "age": ["young", "old"], "colour": 3}


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    return build_random(ViTCLSForImageClassification, **fields)


def build_multi_task() -> ViTCLSForMultiTaskClassification:
    return build_random(ViTCLSForMultiTaskClassification, num_cls_tokens=3, tasks=TASKS)


# Kinds of labels: fields of the configuration, labels of four images, the formula of the loss.

KINDS = {
    "classes": ({}, torch.tensor([0, 2, 1, 2]), functional.cross_entropy),
    "ignored_int32": (
        {},
        torch.tensor([[0], [1], [-100], [2]], dtype=torch.int32),
        lambda logits, labels: functional.cross_entropy(logits, labels[:, 0].long()),
    ),
    "probabilities": (
        {"problem_type": "single_label_classification"},
        torch.tensor([[0.2, 0.8, 0.0], [1.0, 0.0, 0.0], [0.1, 0.2, 0.7], [0.0, 0.5, 0.5]]),
        functional.cross_entropy,
    ),
    "several_labels": (
        {"problem_type": "multi_label_classification"},
        torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 0]]),
        lambda logits, labels: functional.binary_cross_entropy_with_logits(logits, labels.float()),
    ),
    "one_number": (
        {"num_labels": 1},
        torch.tensor([1, -1, 2, 4]),
        lambda logits, labels: functional.mse_loss(logits[:, 0], labels.float()),
    ),
    "several_numbers": (
        {"problem_type": "regression"},
        torch.tensor([[0.5, -1.0, 2.0], [3.5, 0.0, 1.0], [0.1, 0.2, 0.3], [1.0, 1.0, 1.0]]),
        functional.mse_loss,
    ),
}


@pytest.mark.parametrize(("fields", "labels", "formula"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_losses_equal_their_formulas_in_float32(
    fields: Fields, labels: torch.Tensor, formula: Any, dtype: torch.dtype
) -> None:
    """Unlike the losses of transformers, the losses do not set `problem_type`."""
    model = build_classifier(**fields).to(dtype)
    before = model.config.to_dict()
    output = model(build_images(4), labels=labels)
    assert output.logits.dtype == dtype
    assert output.loss.dtype == torch.float32
    assert_close(output.loss, formula(output.logits.float(), labels))
    assert model.config.to_dict() == before
    assert model.config.problem_type == fields.get("problem_type")


def test_a_batch_without_labels_has_zero_loss_and_gradient() -> None:
    model = build_classifier()
    loss = model(IMAGES, labels=torch.tensor([-100, -100])).loss
    loss.backward()
    assert loss.item() == 0.0
    assert not any(
        parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None
    )


def test_both_heads_are_trained() -> None:
    """In training, the loss is the mean over both heads; then that of the predicting head."""
    for choice in ("mean", "cls", "distillation"):
        model = build_classifier(num_distillation_tokens=1, distillation_inference=choice).train()
        output = model(IMAGES, labels=IMAGE_LABELS)
        losses = [
            functional.cross_entropy(head, IMAGE_LABELS)
            for head in (output.cls_logits, output.distillation_logits)
        ]
        assert_close(output.loss, sum(losses) / 2)
        output.loss.backward()
        assert model.classifier.weight.grad.any()
        assert model.distillation_classifier.weight.grad.any()
        output = model.eval()(IMAGES, labels=IMAGE_LABELS)
        assert choice == "mean" or torch.equal(output.logits, getattr(output, f"{choice}_logits"))
        assert_close(output.loss, functional.cross_entropy(output.logits, IMAGE_LABELS))


def test_a_loss_of_the_logits_trains_both_heads() -> None:
    """Trainer takes labels away for its label smoothing."""
    for choice in ("mean", "cls", "distillation"):
        model = build_classifier(num_distillation_tokens=1, distillation_inference=choice).train()
        functional.cross_entropy(model(IMAGES).logits, IMAGE_LABELS).backward()
        assert model.classifier.weight.grad.any()
        assert model.distillation_classifier.weight.grad.any()


# Labels, and words of the error.
WRONG_LABELS = [
    (
        torch.ones(2, 3, dtype=torch.long),
        ("no indices", "problem_type", "single_label", "multi_label"),
    ),
    (torch.tensor([0, 3]), ("3", "0 to 2")),
    (torch.tensor([0, -1]), ("-1", "0 to 2")),
    (torch.zeros(3, dtype=torch.long), ()),
    ({"size": torch.tensor([0, 0])}, ("'size'", "age, colour, species")),
    ({"age": torch.tensor([0, 2])}, ("'age'", "0 to 1")),
]


@pytest.mark.parametrize(
    "kind", ["regression", "multi_label_classification", "single_label_classification"]
)
def test_float_labels_of_another_shape_are_errors(kind: str) -> None:
    model = build_classifier(problem_type=kind)
    with raises_one_line(kind, "[2, 3]", "[2]"):
        model(IMAGES, labels=torch.zeros(2))


def test_regression_takes_labels_of_any_strides() -> None:
    model = build_classifier(problem_type="regression")
    labels = torch.arange(6.0).view(3, 2).T
    output = model(IMAGES, labels=labels)
    assert_close(output.loss, functional.mse_loss(output.logits, labels))


@pytest.mark.parametrize(("labels", "words"), WRONG_LABELS, ids=str)
def test_wrong_labels_are_errors(labels: Any, words: tuple[str, ...]) -> None:
    model = build_multi_task() if isinstance(labels, dict) else build_classifier()
    with raises_one_line(*words):
        model(IMAGES, labels=labels)


# Several tasks


def test_task_losses_are_summed() -> None:
    labels = {
        "species": torch.tensor([3, 0]),
        "age": torch.tensor([1, -100]),
        "colour": torch.tensor([2, 2]),
    }
    output = build_multi_task()(IMAGES, labels=labels)

    assert list(output.losses) == sorted(TASKS)
    assert [logits.shape for logits in output.logits.values()] == [(2, 2), (2, 3), (2, 4)]
    for name, loss in output.losses.items():
        assert_close(loss, functional.cross_entropy(output.logits[name], labels[name]))
    assert_close(output.loss, sum(output.losses.values()))


def test_missing_tasks_are_ignored() -> None:
    model = build_multi_task()
    output = model(IMAGES, labels={"colour": torch.tensor([2, 0])})
    assert list(output.losses) == ["colour"]
    assert torch.equal(output.loss, output.losses["colour"])
    assert output.logits.keys() == TASKS.keys()
    output.loss.backward()
    trained = [bool(classifier.weight.grad.any()) for classifier in model.classifiers.children()]
    assert trained == [False, True, False]  # age, color, species


# Masked image modeling (test_models.py and test_exactness.py test the values of the loss)


def test_an_empty_mask_has_zero_loss() -> None:
    model = ViTCLSForMaskedImageModeling(build_tiny_config())
    loss = model(IMAGES, bool_masked_pos=torch.zeros(2, 16, dtype=torch.bool)).loss
    assert loss.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"mim_loss": "l2"}, {"norm_pixel_target": True}], ids=str)
def test_pixel_losses_are_computed_in_float32(fields: Fields, dtype: torch.dtype) -> None:
    """bfloat16 counts only to 256 and float16 to 65,504: too few for the pixels of a batch."""
    config = build_tiny_config(**fields)
    exact = build_images(4, seed=1).to(dtype)
    mask = torch.ones(4, 16, dtype=torch.bool)
    loss = compute_masked_pixel_loss(exact, build_images(4), mask, config)
    assert loss.dtype == torch.float32
    assert_close(loss, compute_masked_pixel_loss(exact.float(), build_images(4), mask, config))


def test_normalized_targets_of_a_uniform_patch_are_zero() -> None:
    """The standard deviation of a uniform patch is zero."""
    for patch_size in (8, 1):  # with a single value, the corrected variance is not defined
        config = build_tiny_config(
            norm_pixel_target=True, mim_loss="l2", patch_size=patch_size, num_channels=1
        )
        grey = torch.full((1, 1, 32, 32), 0.7)
        mask = torch.ones(1, (32 // patch_size) ** 2, dtype=torch.bool)
        loss = compute_masked_pixel_loss(torch.zeros(1, 1, 32, 32), grey, mask, config)
        assert loss.item() == approx(0.0, abs=1e-6)


# Trainer: one step on four images, in one batch and in two batches of two


@pytest.mark.parametrize("kind", [*KINDS, "tasks", "masks"])
def test_trainer_accumulates_to_the_same_step(kind: str, tmp_path: Path) -> None:
    build: Callable[[], PreTrainedModel] = {
        "tasks": build_multi_task,
        "masks": partial(build_random, ViTCLSForMaskedImageModeling),
    }.get(kind) or partial(build_classifier, **KINDS[kind][0])

    examples: list[dict[str, Any]] = [{"pixel_values": image} for image in build_images(4)]
    for index, example in enumerate(examples):
        if kind == "tasks":
            example["labels"] = {name: torch.tensor(index % 2) for name in TASKS}
        elif kind == "masks":
            example["bool_masked_pos"] = torch.arange(16) % 4 == index
        else:
            example["labels"] = KINDS[kind][1][index]

    trained = []
    for batch_size, steps in ((4, 1), (2, 2)):
        model = build()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            label_names=["labels"],
        )
        trainer = Trainer(model, arguments, default_collate, train_dataset=examples)
        trainer.train()
        trained.append(model)
    start = build()
    moved = 0
    for first, second, original in zip(
        *(model.parameters() for model in (*trained, start)), strict=True
    ):
        assert torch.allclose(first, second, atol=1e-6, rtol=1e-4)
        moved += int(not torch.equal(first, original))
    assert moved > 10


def test_another_loss_function_is_used() -> None:
    """As in transformers: `model.loss_function = f`."""
    model = ViTCLSForImageClassification(build_tiny_config())
    seen: list[Any] = []

    def compute_loss(labels: Any, logits: Any, config: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((labels, logits.shape, kwargs))
        return logits.sum() * 0 + 42

    model.loss_function = compute_loss
    assert model(IMAGES, labels=IMAGE_LABELS, num_items_in_batch=2).loss.item() == 42
    assert seen == [(IMAGE_LABELS, (2, 3), {"num_items_in_batch": 2})]
    assert model.adapt(num_register_tokens=1).loss_function is compute_loss
