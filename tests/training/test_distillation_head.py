"""A distillation token on a trained encoder: both heads start from the frozen features."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import randomize, save_both
from helpers.tiny_options import (
    build_tiny_options,
    prepare_setup,
    run_to_folder,
    run_training,
    save_digits_encoder,
)
from numpy.testing import assert_allclose
from pytest import CaptureFixture, approx
from scipy.special import softmax

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.frozen.linear_probe import LinearProbe
from modeling_vitcls.runtime.files import read_json


TEACHING = {
    "max_steps": 12,
    "batch_size": 32,
    "held_out_fraction": 0.3,
    "num_distillation_tokens": 1,
}


@pytest.fixture(scope="module")
def encoder(module_path: Path) -> Path:
    """Return a trained encoder of five layers, without a classifier."""
    return save_digits_encoder(module_path, num_hidden_layers=5)


def build_options(folder: Path, model: Path, **flags: Any) -> Any:
    settings = {"model": str(model), "probe": True}
    return build_tiny_options(folder, "digits", **settings | flags)


@pytest.fixture(scope="module")
def frozen(encoder: Path, module_path: Path) -> Path:
    """Return the folder of a frozen run, whose classifier reads four layers and patches."""
    flags = {"pooled_layers": [-4, -3, -2, -1], "pooling": "cls_mean"}
    return run_to_folder(build_options(module_path / "frozen", encoder, **flags))


@pytest.fixture(scope="module")
def taught(frozen: Path, module_path: Path) -> Path:
    """Return the folder of the frozen model, continued with itself as teacher."""
    options = build_options(module_path / "taught", frozen, teacher=str(frozen), **TEACHING)
    return run_to_folder(options)


def test_a_teacher_continues_from_the_frozen_model(taught: Path) -> None:
    results = read_json(taught / "results.json")
    start = results["before_steps"]["accuracy"]
    assert results["steps"] == 12
    assert results["accuracy"] >= start - 0.02
    # Each head is about as good as the frozen classifier: neither started from random weights.
    assert results["cls_accuracy"] >= start - 0.05
    assert results["distillation_accuracy"] >= start - 0.15
    assert results["average_with_start"] == 0.5
    assert results["chosen_flags"]["learning_rate"] <= 4e-4


def test_the_returned_head_has_the_lowest_loss(taught: Path) -> None:
    results = read_json(taught / "results.json")
    losses = {name: results[f"{name}_loss"] for name in ("cls", "distillation", "mean")}
    model = ViTCLSForImageClassification.from_pretrained(taught)
    assert model.config.distillation_inference == min(losses, key=lambda name: losses[name])
    assert results["loss"] == approx(min(losses.values()), abs=1e-5)


@pytest.mark.parametrize("is_trained", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_run_measures_the_teacher_before_the_steps(
    is_trained: bool, frozen: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    """Without a token, the teacher trains the only head, which a useless teacher cannot replace."""
    teacher = frozen
    if not is_trained:
        model = randomize(ViTCLSForImageClassification.from_pretrained(frozen))
        processor = ViTCLSImageProcessor.from_pretrained(frozen)
        teacher = save_both(model, tmp_path / "teacher", processor)
    flags = TEACHING | {"num_distillation_tokens": 0, "max_steps": 1, "crop_scale": 1.0}
    options = build_options(tmp_path / "run", frozen, teacher=str(teacher), **flags)
    results = run_training(options)

    held_out = prepare_setup(options).data.held_out
    processor = ViTCLSImageProcessor.from_pretrained(teacher)
    pixel_values = processor(list(held_out.images), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        model = ViTCLSForImageClassification.from_pretrained(teacher).eval()
        answers = model(pixel_values).logits.argmax(dim=1)
    num_right = int((answers == torch.tensor(held_out.labels)).sum())
    num_frozen = round(results["before_steps"]["accuracy"] * len(held_out))
    has_little_to_teach = "it has little to teach" in capsys.readouterr().out
    assert has_little_to_teach == (num_right <= num_frozen)
    assert (num_right > 0.9 * len(held_out)) == is_trained
    assert results["teacher_accuracy"] == approx(num_right / len(held_out), abs=1e-6)
    assert "distillation_accuracy" not in results


@pytest.mark.parametrize("flags", [{}, {"max_steps": 1}])
@pytest.mark.parametrize("choice", [pytest.param("mean", marks=pytest.mark.slow), "distillation"])
def test_a_head_is_returned_that_was_asked_for(
    choice: str, flags: dict[str, Any], encoder: Path, tmp_path: Path
) -> None:
    fields = {"num_distillation_tokens": 1, "distillation_inference": choice}
    options = build_options(tmp_path / "run", encoder, model_config=fields, **flags)
    results = run_training(options)
    model = ViTCLSForImageClassification.from_pretrained(options.output_dir)
    assert model.config.distillation_inference == choice
    assert results["frozen"]["distillation_losses"].keys() == {choice}


@torch.no_grad()
def test_both_heads_of_a_frozen_run_are_shrinkage_lda(encoder: Path, tmp_path: Path) -> None:
    """The second one reads the distillation token, in the layers of the first."""
    options = build_options(tmp_path / "run", encoder, num_distillation_tokens=1)
    results = run_training(options)
    model = ViTCLSForImageClassification.from_pretrained(options.output_dir)
    frozen = results["frozen"]
    assert results["steps"] == 0
    losses = frozen["distillation_losses"]
    assert set(losses) == {"cls", "distillation", "mean"}
    assert losses[frozen["distillation_inference"]] == min(losses.values())
    assert results["loss"] == approx(min(losses.values()), abs=1e-6)
    assert model.config.distillation_inference == frozen["distillation_inference"]

    data = prepare_setup(options).data.train
    processor = ViTCLSImageProcessor.from_pretrained(options.output_dir)
    pixel_values = processor(list(data.images), return_tensors="pt")["pixel_values"]
    outputs = model.eval()(pixel_values)
    states = model.vitcls(pixel_values, output_hidden_states=True).hidden_states
    index = model.config.token_layout.distillation.start
    tokens = {
        (layer, "cls"): model.vitcls.normalize(states[layer])[:, index].numpy()
        for layer in frozen["layers"]
    }
    expected = LinearProbe(frozen["layers"]).fit(tokens, np.array(data.labels))
    expected.temperature_ = results["calibration"]["temperature"]  # of the returned logits
    found = softmax(outputs.distillation_logits.numpy(), axis=1)
    assert_allclose(found, expected.predict_proba(tokens), atol=5e-3)


def test_images_that_trained_a_kept_classifier_measure_nothing(
    frozen: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    """A frozen run fits its classifier to every label; without a probe, steps continue with it."""
    flags = {"probe": False, "max_steps": 1, "held_out_fraction": 0.2}
    results = run_training(build_options(tmp_path / "next", frozen, **flags))
    assert "accuracy_interval" not in results
    assert results["num_seen_images"] == results["num_images"]
    assert "without an interval" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_ends_below_its_start_says_so(
    frozen: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    flags = {"max_steps": 30, "learning_rate": 0.1, "held_out_fraction": 0.3, "batch_size": 8}
    options = build_options(tmp_path / "run", frozen, average_with_start=0.0, **flags)
    results = run_training(options)
    start = results["before_steps"]["accuracy"]
    assert results["accuracy"] < start
    num_images = results["num_images"]
    (line,) = [each for each in capsys.readouterr().out.splitlines() if each.startswith("result ")]
    assert f"Before the steps: {round(start * num_images)} of {num_images} right" in line
    assert "set `trainable='head'`" in line
    assert "max_steps" not in line


def test_a_random_head_is_not_averaged_with_its_start(frozen: Path, tmp_path: Path) -> None:
    flags = {"probe": False, "num_distillation_tokens": 1, "max_steps": 1}
    options = build_options(tmp_path / "run", frozen, **flags)
    assert not prepare_setup(options).inputs.has_trained_heads
    assert run_training(options).get("average_with_start") is None
