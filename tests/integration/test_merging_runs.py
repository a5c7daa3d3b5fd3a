"""Training, demo and cards of models that merge patches: attention maps are omitted, the rest works as usual."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import build_tiny_config, raises_one_line, randomize
from PIL import Image
from sklearn.datasets import load_digits

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.demo.page import build_page
from modeling_vitcls.demo.reader import DemoModel
from modeling_vitcls.demo.text import explain_missing_output
from modeling_vitcls.options import (
    AugmentationOptions,
    DataOptions,
    FinetuneOptions,
    ModelOptions,
    PretrainOptions,
    TrainingOptions,
)
from modeling_vitcls.training.finetune import FinetuneTask
from modeling_vitcls.training.pretrain import PretrainTask
from modeling_vitcls.training.task import run_task


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

FIELDS: dict[str, Any] = {"num_cls_tokens": 2, "num_register_tokens": 1, "merged_patches_per_layer": 3}


def save(model: Any, folder: Path) -> Path:
    randomize(model).save_pretrained(folder)
    ViTCLSImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["fine-tuned", "pre-trained"])
def test_a_run_ends_with_a_model_results_and_a_card(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder = save(ViTCLSModel(build_tiny_config(**FIELDS)), tmp_path / "checkpoint"), tmp_path / "out"
    options_class, task_class, model_class = {
        "fine-tuned": (FinetuneOptions, FinetuneTask, ViTCLSForImageClassification),
        "pre-trained": (PretrainOptions, PretrainTask, ViTCLSForMaskedImageModeling),
    }[kind]
    options = options_class(
        output_dir=folder,
        data=DataOptions(dataset="digits", num_workers=0),
        model=ModelOptions(model=str(checkpoint)),
        augmentation=AugmentationOptions(crop_scale=1.0, flip=False, shift=0.0),
        training=TrainingOptions(max_steps=2, batch_size=8, log_every=1, health_every=1),
    )
    results = run_task(task_class(options))
    assert json.loads((folder / "results.json").read_text(encoding="utf-8")) == results
    assert model_class.from_pretrained(folder).config.merged_patches_per_layer == 3
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(records) == 2 and not any("cls_attention_entropy" in record for record in records)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "merges the 3 most similar pairs of patches" in card and "outputs are approximate" in card
    output = capsys.readouterr()
    (warning,) = [line for line in (output.out + output.err).splitlines() if "WARNING" in line]
    assert "report.html" in warning and "merged_patches_per_layer=0" in warning


@pytest.fixture(scope="module")
def digit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image of 8 x 8 pixels."""
    file = tmp_path_factory.mktemp("pictures") / "digit.png"
    Image.fromarray((16 * load_digits().images[0]).clip(0, 255).astype("uint8")).save(file)
    return file


def test_the_demo_predicts_without_maps(digit: Path, tmp_path: Path) -> None:
    folder = save(ViTCLSForImageClassification(build_tiny_config(**FIELDS)), tmp_path)
    reader = DemoModel.load(str(folder))
    reading = reader.predict(digit)
    model = ViTCLSForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        pixels = ViTCLSImageProcessor.from_pretrained(folder)(Image.open(digit), return_tensors="pt")["pixel_values"]
        expected = dict(enumerate(model(pixels).logits[0].softmax(dim=0).tolist()))
    answer = reading.predictions["Label"]
    assert isinstance(answer, dict)
    assert {int(name.removeprefix("LABEL_")): value for name, value in answer.items()} == pytest.approx(expected)
    assert len(reading.token_attention) == len(reading.attention_maps) == 0
    assert reading.draw_all_layers(token=0, head=None) == []
    assert "merges patches" in explain_missing_output(reader)
    kinds = [component["type"] for component in build_page(reader).get_config_file()["components"]]
    assert "label" in kinds and "radio" not in kinds and "gallery" not in kinds


def test_an_encoder_that_merges_patches_has_no_demo(tmp_path: Path) -> None:
    with raises_one_line("has no labels and merges patches"):
        DemoModel.load(str(save(ViTCLSModel(build_tiny_config(**FIELDS), add_pooling_layer=False), tmp_path)))
