# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""DeiT's loss in the model: labels for CLS, a teacher for the distillation token (arXiv 2012.12877)."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification


IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEACHER = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)) * 3
LABELS = torch.arange(6) % 3


def build(num_distillation_tokens: int = 1) -> Any:
    torch.manual_seed(0)
    config = ViTCLSConfig.from_preset(
        "tiny",
        image_size=32,
        num_hidden_layers=2,
        num_distillation_tokens=num_distillation_tokens,
        num_labels=3,
    )
    model = ViTCLSForImageClassification(config).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_hard_distillation_is_the_mean_of_two_cross_entropies() -> None:
    outputs = build()(IMAGES, labels=LABELS, teacher_logits=TEACHER)
    of_teacher = cross_entropy(outputs.distillation_logits, TEACHER.argmax(dim=1))
    assert_close(outputs.loss, (cross_entropy(outputs.cls_logits, LABELS) + of_teacher) / 2)


def test_soft_distillation_has_deits_temperature() -> None:
    outputs = build()(IMAGES, labels=LABELS, teacher_logits=TEACHER, distillation_loss="soft")
    student = (outputs.distillation_logits / 3).log_softmax(dim=1)
    divergence = kl_div(student, (TEACHER / 3).softmax(dim=1), reduction="batchmean")
    expected = (cross_entropy(outputs.cls_logits, LABELS) + 9 * divergence) / 2
    assert_close(outputs.loss, expected)


def test_without_a_distillation_token_the_classifier_learns_from_both() -> None:
    outputs = build(num_distillation_tokens=0)(IMAGES, labels=LABELS, teacher_logits=TEACHER)
    losses = [cross_entropy(outputs.logits, each) for each in (LABELS, TEACHER.argmax(dim=1))]
    assert_close(outputs.loss, sum(losses) / 2)


def test_the_loss_of_accumulated_batches_is_that_of_one() -> None:
    model = build().eval()
    whole = model(IMAGES, labels=LABELS, teacher_logits=TEACHER).loss
    parts = [
        model(
            IMAGES[part], labels=LABELS[part], teacher_logits=TEACHER[part], num_items_in_batch=6
        ).loss
        for part in (slice(4), slice(4, 6))
    ]
    assert_close(parts[0] + parts[1], whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher_logits": TEACHER[:, :2]}, "take a teacher of the same classes"),
        ({"distillation_loss": "medium"}, 'choose "hard" or "soft"'),
        ({"labels": None}, "label_smoothing_factor of Trainer takes away"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments = {"labels": LABELS, "teacher_logits": TEACHER} | changes
    with pytest.raises(ValueError, match=message):
        build()(IMAGES, **arguments)


def test_the_labels_can_be_smoothed_beside_a_teacher() -> None:
    model = build()

    def compute_smoothed_loss(labels: Any, logits: Any, config: Any, **_: Any) -> Any:
        return cross_entropy(logits, labels, label_smoothing=0.1)

    model.loss_function = compute_smoothed_loss
    outputs = model(IMAGES, labels=LABELS, teacher_logits=TEACHER)
    of_labels = cross_entropy(outputs.cls_logits, LABELS, label_smoothing=0.1)
    of_teacher = cross_entropy(outputs.distillation_logits, TEACHER.argmax(dim=1))
    assert_close(outputs.loss, (of_labels + of_teacher) / 2)


def test_trainer_hands_a_column_of_teacher_logits_to_the_model(tmp_path: Any) -> None:
    rows = [
        {"pixel_values": image, "labels": label, "teacher_logits": logits}
        for image, label, logits in zip(IMAGES, LABELS, TEACHER, strict=True)
    ]
    model = build()
    before = model.vitcls.embeddings.distillation_token.clone()
    arguments = TrainingArguments(
        tmp_path, num_train_epochs=40, learning_rate=1e-3, use_cpu=True, report_to="none"
    )
    Trainer(model, arguments, train_dataset=rows).train()
    with torch.no_grad():
        logits = model.eval()(IMAGES).distillation_logits
    assert torch.equal(logits.argmax(dim=1), TEACHER.argmax(dim=1))
    assert not torch.equal(model.vitcls.embeddings.distillation_token, before)
