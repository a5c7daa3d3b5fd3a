"""Models written as classes of transformers: folder, card, push, and no remote code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_in_process import run_here
from helpers.local_hub import LocalHub
from helpers.photo_folders import get_file_names
from helpers.tiny_models import (
    KINDS,
    build_random,
    build_tiny_config,
    edit_config,
    raises_one_line,
    save_with_processor,
)
from huggingface_hub import ModelCard
from pytest import MonkeyPatch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.conversion.convert import convert_to_native, copy_results
from modeling_vitcls.hub.model_files import hash_settings, hash_weights
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing.push import push_folder
from modeling_vitcls.publishing.verify import verify
from modeling_vitcls.runtime.files import read_json, write_json


DEMO = {"num_register_tokens": 2, "intermediate_size": 64, "id2label": {0: "a", 1: "b", 2: "c"}}


def save(folder: Path, kind: str = "classifier", **fields: Any) -> Path:
    model_class, needed, _ = KINDS[kind]
    needed = needed if kind != "classifier" else {}
    model = model_class(build_tiny_config(**needed | fields))
    processor = ViTCLSImageProcessor(size=[32, 32], resample=2, image_mean=[0.5] * 3)
    save_with_processor(model, folder, processor)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    return folder


@pytest.mark.parametrize("kind", ["model", "masked", "backbone"])
def test_only_the_encoder_of_other_models_is_written(tmp_path: Path, kind: str) -> None:
    report = convert_to_native(str(save(tmp_path / "mine", kind)), tmp_path / "native")
    assert report["model_class"] == "ViTModel"
    assert report["classifier"] == "none"


def test_the_demo_model_is_compared_at_its_native_size_and_requires_no_remote_code(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_here("convert", save(Path("mine"), **DEMO), "native", "--to", "transformers") == 0

    native = AutoModelForImageClassification.from_pretrained("native")
    assert native.config.id2label == DEMO["id2label"]
    assert not list((tmp_path / "native").glob("*.py"))

    card = ModelCard.load(tmp_path / "native/README.md")
    assert card.data.license == "mit"
    assert card.data.tags == ["vision", "vit"]
    assert card.data.pipeline_tag == "image-classification"
    report = read_json(tmp_path / "native/parity_report.json")
    assert report["model_class"] == "Dinov2WithRegistersForImageClassification"
    assert [comparison["image_size"] for comparison in report["comparisons"]] == [[32, 32]]
    assert "resample position embeddings differently" in str(report["not_compared"])
    assert report["source"] == "path/to/mine"
    assert report["source_class"] == "ViTCLSForImageClassification"
    assert report["source_revision"] is None
    assert "has the same outputs for images of 32 x 32 pixels" in card.text
    assert "trust_remote_code" not in card.text
    assert str(tmp_path) not in str(card)


def test_a_model_without_an_image_processor_is_written_without_one(tmp_path: Path) -> None:
    folder = save(tmp_path / "mine")
    (folder / "preprocessor_config.json").unlink()
    assert convert_to_native(str(folder), tmp_path / "native")["notes"] == [
        "neither model has an image processor"
    ]
    assert not (tmp_path / "native/preprocessor_config.json").exists()


def test_a_model_without_labels_keeps_its_half_precision(tmp_path: Path) -> None:
    model = build_random(ViTCLSForImageClassification, num_labels=0).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "mine")
    report = convert_to_native(str(tmp_path / "mine"), tmp_path / "native")
    assert report["model_class"] == "ViTForImageClassification"
    assert report["classifier"] == "none"
    assert [set(comparison["differences"]) for comparison in report["comparisons"]] == [
        {"cls", "patches", "logits"}
    ] * 2
    weights = load_file(tmp_path / "native/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_wrong_sources_and_outputs_are_errors(tmp_path: Path) -> None:
    folder = save(tmp_path / "mine")
    (tmp_path / "native").mkdir()
    (tmp_path / "native/notes.txt").touch()
    with raises_one_line("not empty"):
        convert_to_native(str(folder), tmp_path / "native")

    crop = {
        "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32},
        "crop_rounding": "even",
    }
    ViTCLSImageProcessor(size={"height": 35, "width": 35}, **crop).save_pretrained(folder)
    with raises_one_line(
        "the converted processor differs from ViTCLSImageProcessor by", "gray levels"
    ):
        convert_to_native(str(folder), tmp_path / "other")

    assert not (tmp_path / "other").exists()
    assert get_file_names(tmp_path / "native") == {"notes.txt"}


@pytest.mark.slow
def test_a_native_model_is_pushed_and_verified_without_remote_code(
    hub: LocalHub, tmp_path: Path
) -> None:
    convert_to_native(str(save(tmp_path / "mine", **DEMO)), tmp_path / "native")
    pushed = push_folder(ModelFolder(tmp_path / "native"), "ann/native")

    assert not [name for name in hub.files("ann/native") if name.endswith(".py")]
    assert "CODE_LICENSE" not in hub.files("ann/native")
    report = verify(pushed, ModelFolder(tmp_path / "native"))
    assert "equal the outputs of" in report
    assert "trust_remote_code" not in report


def test_code_in_a_native_repository_is_not_run(hub: LocalHub, tmp_path: Path) -> None:
    convert_to_native(str(save(tmp_path / "mine", **DEMO)), tmp_path / "native")
    edit_config(tmp_path / "native", auto_map={"AutoConfig": "other.Config"})
    with raises_one_line("is not a vitcls model"):
        push_folder(ModelFolder(tmp_path / "native"), "ann/native")


def test_results_of_the_same_weights_are_kept(tmp_path: Path) -> None:
    """The card of the native model has the results of the run, with the hash of the new weights."""
    folder = save(tmp_path / "mine")
    results = {"accuracy": 0.5, "weights_sha256": hash_weights(folder)}
    write_json(folder / "results.json", results)
    (folder / "config.resolved.yaml").write_text("dataset: digits\n")

    convert_to_native(str(folder), tmp_path / "native")
    kept = read_json(tmp_path / "native/results.json")
    assert kept == {
        "accuracy": 0.5,
        "weights_sha256": hash_weights(tmp_path / "native"),
        "settings_sha256": hash_settings(tmp_path / "native"),
    }
    assert (tmp_path / "native/config.resolved.yaml").is_file()

    (tmp_path / "native/results.json").unlink()
    others = {"weights_sha256": {"model.safetensors": "other"}}
    write_json(folder / "results.json", results | others)
    copy_results(ModelFolder(folder), tmp_path / "native")
    assert not (tmp_path / "native/results.json").exists()
