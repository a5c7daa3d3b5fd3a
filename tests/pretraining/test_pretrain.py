"""Pre-training with LeJEPA: features, saved encoder, resumption, any tokens."""

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config
from helpers.tiny_options import TINY as TINY_FINETUNING
from helpers.tiny_options import (
    build_tiny_options,
    forget_end,
    prepare_setup,
    read_metrics,
    run_to_folder,
    run_training,
)
from safetensors.torch import load_file
from sklearn.neighbors import KNeighborsClassifier
from transformers import AutoModel

from modeling_vitcls import ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.inference.speed import count_flops
from modeling_vitcls.pretraining.pretrain import (
    compute_effective_rank,
)
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.training.options import PretrainOptions


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate", "few_digits")]

NUM_HELD_OUT_DIGITS = 60
TINY = replace(TINY_FINETUNING, patch_size=8)


def tiny_options(folder: Path, dataset: object = "digits", **flags: Any) -> PretrainOptions:
    """Return options of six steps on digits, with an evaluation after each epoch of three steps."""
    settings = {
        "max_steps": 6,
        "batch_size": 80,
        "learning_rate": 3e-3,
        "projector_width": 32,
        "local_crops": 2,
        "select": None,
    }
    return build_tiny_options(folder, dataset, PretrainOptions, **vars(TINY) | settings | flags)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a short run."""
    folder = tmp_path_factory.mktemp("run") / "encoder"
    # not in evaluations
    return run_to_folder(tiny_options(folder, model_config={"drop_path_rate": 0.2}))


def test_the_folder_contains_the_encoder_and_the_measured_features(pretrained: Path) -> None:
    weights = load_file(pretrained / "model.safetensors")
    model, info = ViTCLSModel.from_pretrained(pretrained, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert weights.keys() == model.state_dict().keys()
    assert type(AutoModel.from_pretrained(pretrained)) is ViTCLSModel
    results = read_json(pretrained / "results.json")
    assert results["forward_flops_per_image"] == count_flops(model)
    before = results["before_steps"]
    assert before["num_images"] == results["num_images"] == NUM_HELD_OUT_DIGITS
    for name in ("knn_accuracy", "knn_accuracy_of_patches"):
        assert 0.1 < before[name] < 1
        assert 0.1 < results[name] < 1
    assert all(moved > 0 for moved in results["token_movement"].values())
    records = [record for record in read_metrics(pretrained) if "held_out_knn_accuracy" in record]

    assert [record["step"] for record in records] == [3, 6]
    assert 1 < records[-1]["held_out_effective_rank"] < TINY.hidden_size


def test_a_resumed_run_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    """Projector and crops come back to the bit.

    The newest checkpoint is removed.
    """
    flags = {"save_every": 2, "keep_checkpoints": 3, "batch_size": 24}
    whole = run_to_folder(tiny_options(tmp_path / "whole", **flags))
    resumed = shutil.copytree(whole, tmp_path / "resumed")
    forget_end(resumed, 6)
    run_to_folder(tiny_options(resumed, **flags, resume=True))
    for file in ("model.safetensors", "checkpoints/step-00000006/model.safetensors"):
        expected = load_file(whole / file)
        found = load_file(resumed / file)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert any(name.startswith("projector.") for name in found)
    features = [read_json(folder / "results.json")["before_steps"] for folder in (whole, resumed)]
    assert features[0] == features[1]


LAYOUTS: dict[str, dict[str, Any]] = {
    "several tokens": {"num_cls_tokens": 2, "num_register_tokens": 1, "num_distillation_tokens": 1},
    "mean of patches": {
        "num_cls_tokens": 0,
        "pooling": "mean",
        "num_register_tokens": 0,
        "mixed_precision": "bf16",
    },
    "not square": {
        "image_size": [32, 48],
        "patch_size": 16,
        "gradient_accumulation_steps": 2,
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_any_layout_is_trained(name: str, tmp_path: Path) -> None:
    flags = {"max_steps": 2, "batch_size": 24} | LAYOUTS[name]
    results = run_training(tiny_options(tmp_path / "out", **flags))
    assert results["steps"] == 2
    assert results["knn_accuracy"] > 0.2


def test_images_without_labels_are_measured_by_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_photos(tmp_path / "photos", range(24), "photos")
    folder = tmp_path / "photos" / "photos"
    results = run_training(
        tiny_options(tmp_path / "out", folder, max_steps=2, batch_size=8, select="best")
    )
    rank = results["selection"]["effective_rank"]
    printed = capsys.readouterr().out
    assert rank >= 1
    assert f"selection: effective rank {rank:.1f}" in printed
    assert results["selection_metric"] == "effective_rank"
    assert "knn_accuracy" not in results
    before = results["before_steps"]["effective_rank"]
    assert f". Before the steps: effective rank {before:.1f}" in printed
    assert 1 <= results["effective_rank"] <= TINY.hidden_size


def test_a_converted_checkpoint_is_continued(tmp_path: Path) -> None:
    """It is trained in float32, here on all images."""
    encoder = ViTCLSModel(build_tiny_config(num_register_tokens=1)).bfloat16()
    encoder.save_pretrained(tmp_path / "model")
    ViTCLSImageProcessor(size=32).save_pretrained(tmp_path / "model")
    model = {
        "model": str(tmp_path / "model"),
        **dict.fromkeys(vars(TINY).keys() - {"model", "gate_new_tokens"}),
    }
    before = load_file(tmp_path / "model" / "model.safetensors")
    flags = {"max_steps": 1, "learning_rate": 1e-5, "held_out_fraction": 0.0}
    folder = run_to_folder(tiny_options(tmp_path / "out", **model, **flags))

    for name, weight in load_file(folder / "model.safetensors").items():
        assert weight.dtype == torch.float32, name
        assert 0 < (weight - before[name]).abs().max() < 1e-4, name


# Quality of the features --------------------------------------------------------------------------


@torch.no_grad()
def test_the_accuracy_is_that_of_scikit_learn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The token is the first CLS token. The neighbors are some of the training images."""
    monkeypatch.setattr("modeling_vitcls.pretraining.pretrain.MAX_NEIGHBORS", 150)
    prepared = prepare_setup(tiny_options(tmp_path / "out", num_cls_tokens=2, select="best"))
    task, selection = prepared.setup, prepared.data.selection
    train = prepared.data.train.draw(150)
    found = task.build_evaluator(prepared.data, selection)(task.model.eval())

    def encode(images: Any) -> torch.Tensor:
        pixels = task.processor([image.convert("RGB") for image in images], return_tensors="pt")[
            "pixel_values"
        ]
        return task.model.vitcls(pixels).last_hidden_state

    features = [encode(each.images) for each in (train, selection)]
    layout = task.model.vitcls.config.token_layout
    for name, tokens in {
        "knn_accuracy": slice(0, 1),
        "knn_accuracy_of_patches": layout.patches,
    }.items():
        classifier = KNeighborsClassifier(10, weights="distance", metric="cosine")
        neighbors, images = (each[:, tokens].mean(dim=1).numpy() for each in features)
        expected = classifier.fit(neighbors, train.labels).score(images, selection.labels)
        assert found[name] == pytest.approx(expected, abs=1e-6)
    assert found["num_images"] == len(selection)


def test_the_effective_rank_is_the_exponential_of_the_entropy_of_singular_values() -> None:
    generator = np.random.default_rng(0)
    directions = np.linalg.qr(generator.normal(size=(64, 64)))[0]
    for rank in (1, 3, 20):
        features = generator.normal(size=(4000, rank)) @ directions[:rank] + 5
        assert compute_effective_rank(features) == pytest.approx(rank, rel=0.03)
    shares = np.array([0.75, 0.25])  # of the singular values
    features = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]]) * [3, 1, 1]
    assert compute_effective_rank(features) == pytest.approx(
        math.exp(-(shares * np.log(shares)).sum())
    )
    assert compute_effective_rank(generator.normal(size=(9, 4)) * 1e-9 - 1) == 1


@torch.no_grad()
def test_a_collapse_is_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    prepared = prepare_setup(tiny_options(tmp_path / "out"))
    evaluate = partial(
        prepared.setup.build_evaluator(prepared.data, prepared.data.held_out), warn=warnings.append
    )
    evaluate(prepared.setup.model.eval())
    assert warnings == []
    prepared.setup.model.vitcls.layernorm.weight.zero_()

    assert evaluate(prepared.setup.model)["effective_rank"] == 1
    assert len(warnings) == 1
    assert "1.0 of 32 channels" in warnings[0]
