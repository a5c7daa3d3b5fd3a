"""Models loaded for export: their named outputs, the attention of CLS tokens, and presets."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import (
    build_images,
    build_tiny_config,
    raises_one_line,
    randomize,
    save_with_processor,
)

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import load_training_data
from modeling_vitcls.data.splits_table import write_splits
from modeling_vitcls.export.exportable import (
    NamedOutputsModel,
    load_exportable_model,
)
from modeling_vitcls.export.measurement import compare_labels, load_export_images
from modeling_vitcls.export.quantization import check_drop
from modeling_vitcls.inference.image_pass import ImageOutput
from modeling_vitcls.inference.intervals import compute_proportion_interval


pytestmark = pytest.mark.integration


def test_an_encoder_in_half_precision_is_exported_in_float32(tmp_path: Path) -> None:
    model = randomize(ViTCLSModel(build_tiny_config())).bfloat16()
    model.save_pretrained(tmp_path)
    model, processor, _ = load_exportable_model(str(tmp_path))
    assert processor is None
    outputs = NamedOutputsModel(model)(build_images())
    assert list(outputs) == ["last_hidden_state", "pooler_output"]
    assert torch.equal(
        outputs["last_hidden_state"], model.float()(build_images()).last_hidden_state
    )


def test_an_encoder_without_a_pooler_has_one_output() -> None:
    model = ViTCLSModel(build_tiny_config(), add_pooling_layer=False)
    assert list(NamedOutputsModel(model)(build_images())) == ["last_hidden_state"]


def test_labels_of_model_and_file_are_compared_image_by_image() -> None:
    """Among 100 images, the file loses three and gains one. One image has no label."""

    def build_rows(predictions: dict[int, int]) -> list[ImageOutput]:
        logits = np.eye(2, dtype=np.float32)
        labels = [torch.tensor(-100 if index == 100 else 0) for index in range(101)]
        return [
            ImageOutput(index, label, logits[predictions.get(index, 0)], "")
            for index, label in enumerate(labels)
        ]

    compared = compare_labels(build_rows({0: 1, 100: 1}), build_rows({1: 1, 2: 1, 3: 1}))
    assert compared["num_equal_labels"] == 96
    assert compared["interval"] == compute_proportion_interval(97, 100)
    low, high = compute_proportion_interval(3, 4)
    assert compared["drop_interval"] == pytest.approx([(2 * low - 1) * 0.04, (2 * high - 1) * 0.04])


def test_a_loss_that_a_few_images_cannot_show_is_accepted() -> None:
    """One image of 49 is two points."""
    right = np.array([1.0, 0.0], np.float32)
    wrong = np.array([0.0, 1.0], np.float32)
    rows = [ImageOutput(index, torch.tensor(0), right, "") for index in range(49)]
    report = {"evaluation": compare_labels(rows, [replace(rows[0], values=wrong), *rows[1:]])}
    check_drop(report, 0.5, None, torch.empty(0))


def test_calibration_uses_the_training_images_of_the_run(tmp_path: Path) -> None:
    config = build_tiny_config(num_labels=10, id2label={label: str(label) for label in range(10)})
    save_with_processor(ViTCLSForImageClassification(config), tmp_path)
    data = load_training_data(DataOptions(dataset="digits", held_out_fraction=0.3))
    write_splits(data.build_splits_table(), tmp_path)
    images = load_export_images(*load_exportable_model(str(tmp_path)), "digits")
    training, held_out = (
        set(part.compute_content_keys().tolist()) for part in (images.training, images.held_out)
    )
    assert len(held_out) == 539
    assert not training & held_out


def test_images_of_an_encoder_need_no_labels(tmp_path: Path) -> None:
    save_with_processor(ViTCLSModel(build_tiny_config()), tmp_path)
    unlabeled = load_export_images(*load_exportable_model(str(tmp_path)), "digits")
    assert len(unlabeled.training) > len(unlabeled.held_out) > 300
    assert unlabeled.evaluator is None


def test_labels_of_a_requested_split_are_required(tmp_path: Path) -> None:
    save_with_processor(ViTCLSForImageClassification(build_tiny_config(num_labels=3)), tmp_path)
    with raises_one_line("LABEL_0"):
        load_export_images(*load_exportable_model(str(tmp_path)), "digits", split="train")
