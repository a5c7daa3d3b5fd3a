"""Steps from trained weights end at the mean of the start and the end."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.accelerate_state import reset_accelerate
from helpers.tiny_models import save_encoder
from helpers.tiny_options import build_tiny_options, forget_end, run_to_folder
from numpy.testing import assert_allclose
from pytest import CaptureFixture, approx
from safetensors.torch import load_file
from torch.testing import assert_close

from modeling_vitcls import ViTCLSForImageClassification, evaluate
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing.report import finish_run
from modeling_vitcls.runtime.files import read_json


LAST = "checkpoints/step-00000004"


@pytest.fixture(scope="module")
def encoder(module_path: Path) -> Path:
    """Return the folder of an encoder."""
    return save_encoder(module_path / "encoder")


def build_options(folder: Path, encoder: Path, **flags: Any) -> Any:
    """Return the options of a run of four steps."""
    settings = {"model": str(encoder), "probe": True, "max_steps": 4}
    return build_tiny_options(folder, "digits", **settings | {"learning_rate": 1e-2} | flags)


def load_encoder_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the encoder in a model folder."""
    weights = load_file(folder / "model.safetensors")
    return {
        name.removeprefix("vitcls."): weights[name]
        for name in weights
        if not name.startswith(("class_distance", "classifier"))
    }


def train(folder: Path, encoder: Path, **flags: Any) -> Path:
    """Train, and keep the weights of steps 2 and 4, without the mean."""
    kept = {"save_every": 2, "keep_checkpoints": 2}
    return run_to_folder(build_options(folder / "run", encoder, **kept | flags))


@pytest.fixture(scope="module")
def whole(encoder: Path, module_path: Path) -> Path:
    """Return the folder of a run that trains all weights."""
    return train(module_path, encoder)


@pytest.mark.parametrize("trainable", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_saved_weights_are_the_mean_of_start_and_end(
    trainable: str, encoder: Path, whole: Path, tmp_path: Path
) -> None:
    if trainable == "full":
        folders = [whole / LAST, whole, encoder]
    else:
        flags = {"trainable": trainable}
        end = build_options(tmp_path / "end", encoder, average_with_start=0.0, **flags)
        folders = [run_to_folder(end), train(tmp_path, encoder, **flags), encoder]
    last, mean, start = map(load_encoder_weights, folders)

    assert last.keys() == mean.keys() == start.keys()
    assert any(not torch.equal(last[name], start[name]) for name in start)
    for name in start:
        assert_close(mean[name], (start[name] + last[name]) / 2)


def test_an_interrupted_run_ends_at_the_same_mean_to_the_bit(
    encoder: Path, whole: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    forget_end(folder, 4)
    train(tmp_path, encoder, resume=True)
    weights = [(each / "model.safetensors").read_bytes() for each in (folder, whole)]
    assert weights[0] == weights[1]


def test_new_tokens_are_not_averaged(encoder: Path, tmp_path: Path) -> None:
    run = train(tmp_path, encoder, num_cls_tokens=2, num_register_tokens=3)
    last, mean, start = map(load_encoder_weights, (run / LAST, run, encoder))

    for name in ("embeddings.cls_token", "embeddings.register_tokens"):
        assert torch.equal(mean[name], last[name])
    # The token of the checkpoint stays beside the new one; the layers are averaged.
    assert torch.equal(mean["embeddings.cls_token"][:, :1], start["embeddings.cls_token"])
    weight = "layers.0.mlp.fc1.weight"
    assert_close(mean[weight], (start[weight] + last[weight]) / 2)


def evaluate_with(folder: Path, tmp_path: Path, **counts: int) -> dict[str, Any]:
    """Evaluate the model of a run with other numbers of tokens."""
    adapted = shutil.copytree(folder, tmp_path / "adapted")
    model = ViTCLSForImageClassification.from_pretrained(folder)
    model.adapt(**counts).save_pretrained(adapted)
    reset_accelerate()
    return evaluate(adapted, "digits", per_image=tmp_path / "rows.parquet")


def test_a_short_run_ends_with_ordinary_tokens_and_says_what_they_are_worth(
    encoder: Path, tmp_path: Path
) -> None:
    flags = {"num_register_tokens": 8, "trainable": "tokens"}
    folder = run_to_folder(build_options(tmp_path / "run", encoder, **flags, max_steps=8))
    assert not [name for name in load_encoder_weights(folder) if name.startswith("fade_in")]
    results = read_json(folder / "results.json")
    assert "fade_in" not in results
    assert results["tokens"]["registers"]["hidden"]["loss_change"] != approx(0, abs=1e-6)
    found = results["tokens"]["registers"]
    # The same images, with the same model without these tokens
    measured = evaluate_with(folder, tmp_path, num_register_tokens=0)
    hidden = found["hidden"]
    assert hidden["num_images"] == measured["num_images"]
    assert hidden["accuracy"] == approx(measured["accuracy"], abs=1e-6)
    assert hidden["loss"] == approx(measured["loss"], abs=1e-5)
    assert hidden["loss_change"] == approx(hidden["loss"] - results["loss"], abs=1e-5)
    own, of_model = map(
        pd.read_parquet, (folder / "predictions.parquet", tmp_path / "rows.parquet")
    )
    assert_allclose(own["loss_hidden_registers"], of_model["loss"], atol=1e-4)
    assert own["loss_content_registers"].notna().all()

    finish_run(ModelFolder(folder))
    for file in ("report.html", "README.md"):
        text = (folder / file).read_text()
        assert f"log loss {hidden['loss_change']:+.3f}" in text
        assert found["verdict"] in text


@pytest.mark.slow
def test_without_distillation_tokens_the_model_is_that_of_adapt(
    encoder: Path, tmp_path: Path
) -> None:
    flags = {"num_distillation_tokens": 1, "model_config": {"distillation_inference": "mean"}}
    folder = train(tmp_path, encoder, **flags)
    found = read_json(folder / "results.json")["tokens"]["distillation"]
    measured = evaluate_with(folder, tmp_path, num_distillation_tokens=0)
    assert found["without"]["loss"] == approx(measured["loss"], abs=1e-5)
    assert found["without"]["loss"] != approx(found["hidden"]["loss"], abs=1e-4)


@pytest.mark.slow
def test_a_run_that_is_shorter_than_asked_for_says_how_far_the_tokens_are(
    encoder: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    flags = {"num_register_tokens": 2, "token_fade_in_steps": 10, "max_steps": 4}
    folder = run_to_folder(build_options(tmp_path / "run", encoder, **flags))
    assert "0.40 of the weight of ordinary ones" in " ".join(capsys.readouterr().out.split())
    assert read_json(folder / "results.json")["fade_in"] == {"register 1": 0.4, "register 2": 0.4}
    assert load_encoder_weights(folder)["fade_in.progress"].tolist() == [400_000_000] * 2


def test_an_interrupted_run_continues_to_fade_tokens_in(encoder: Path, tmp_path: Path) -> None:
    flags = {"num_register_tokens": 2, "token_fade_in_steps": 3}
    whole = train(tmp_path / "whole", encoder, **flags)
    folder = shutil.copytree(whole, tmp_path / "run")
    forget_end(folder, 4)
    train(tmp_path, encoder, **flags, resume=True)
    weights = [(each / "model.safetensors").read_bytes() for each in (folder, whole)]
    assert weights[0] == weights[1]
