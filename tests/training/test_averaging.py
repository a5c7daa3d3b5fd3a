"""Steps from trained weights end at the mean of the start and the end."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.accelerate_state import reset_accelerate
from helpers.tiny_models import save_encoder
from helpers.tiny_options import build_tiny_options, forget_end, read_metrics, run_to_folder
from numpy.testing import assert_allclose
from pytest import approx
from safetensors.torch import load_file
from torch.testing import assert_close

from modeling_vitcls import ViTCLSForImageClassification, evaluate
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing.report import finish_run
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.training.run_results import describe_gates


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


@pytest.mark.parametrize("trainable", ["full", "lora"])
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


def test_new_tokens_and_their_gates_have_a_rate_of_their_own_and_are_not_averaged(
    encoder: Path, tmp_path: Path
) -> None:
    """Half of a closed gate is lost in a mean, and the rate of the weights would not open it."""
    flags = {"num_cls_tokens": 2, "num_register_tokens": 3, "learning_rate": (1e-5, 1e-3)}
    run = train(tmp_path, encoder, **flags)
    last, mean, start = map(load_encoder_weights, (run / LAST, run, encoder))

    gates = 50 * mean["gates.gates"].abs()
    assert len(gates) == 4
    assert (gates > 4 * 50 * 1e-5).all(), "four steps at the rate of the weights end below this"
    for name in ("gates.gates", "embeddings.cls_token", "embeddings.register_tokens"):
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


def test_the_default_rate_opens_the_gates_of_prompts_and_the_run_says_what_they_are_worth(
    encoder: Path, tmp_path: Path
) -> None:
    flags = {"num_register_tokens": 8, "trainable": "tokens", "learning_rate": None}
    folder = run_to_folder(build_options(tmp_path / "run", encoder, **flags, max_steps=8))
    gates = (50 * load_encoder_weights(folder)["gates.gates"].abs()).clamp(max=1)
    assert gates.max() > 0.1
    found = read_json(folder / "results.json")["gates"]
    assert list(found) == [f"register {number}" for number in range(1, 9)]
    assert_close(torch.tensor([*found.values()]), gates, atol=1e-4, rtol=0)
    last_record = read_metrics(folder)[-1]
    assert {name: last_record[f"gate_{name}"] for name in found} == found

    results = read_json(folder / "results.json")
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


def test_without_distillation_tokens_the_model_is_that_of_adapt(
    encoder: Path, tmp_path: Path
) -> None:
    flags = {"num_distillation_tokens": 1, "model_config": {"distillation_inference": "mean"}}
    folder = train(tmp_path, encoder, **flags)
    found = read_json(folder / "results.json")["tokens"]["distillation"]
    measured = evaluate_with(folder, tmp_path, num_distillation_tokens=0)
    assert found["without"]["loss"] == approx(measured["loss"], abs=1e-5)
    assert found["without"]["loss"] != approx(found["hidden"]["loss"], abs=1e-4)


def test_gates_that_stayed_closed_are_named_with_what_opens_them() -> None:
    text = describe_gates({"registers[0]": 0.002, "registers[1]": 0.04})
    assert text is not None
    assert "0.00 to 0.04" in text
    assert "`gate_new_tokens=False`" in text
    assert describe_gates(None) is None
