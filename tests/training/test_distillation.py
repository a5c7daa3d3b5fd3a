"""Distillation without labels: loss, standardized targets, and runs with two teachers."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.tiny_models import (
    build_images,
    build_tiny_config,
    get_largest_difference,
    raises_one_line,
    randomize,
)
from helpers.tiny_options import TINY as TINY_FINETUNING
from helpers.tiny_options import build_tiny_options, prepare_setup, run_to_folder, run_training
from safetensors.torch import load_file
from torchvision.transforms.v2.functional import resize
from transformers import ViTConfig, ViTImageProcessor, ViTModel

from modeling_vitcls import ViTCLSConfig, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.training.distillation import (
    Distillation,
    build_hadamard_matrix,
    compute_feature_loss,
    fit_phi_s,
)
from modeling_vitcls.training.options import PretrainOptions
from modeling_vitcls.training.pretrain import FeatureTeachers, compute_features
from modeling_vitcls.training.teacher import load_feature_teacher


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate", "few_digits")]

TINY = replace(TINY_FINETUNING, patch_size=8)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cache converted teachers in a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache") / "hub")
        )
        yield


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return two teachers of other widths and sizes: a ViTCLS model, a ViT of transformers."""
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = ViTCLSConfig(
        hidden_size=24, image_size=48, patch_size=8, pooling="mean", num_register_tokens=1, **sizes
    )
    randomize(ViTCLSModel(config)).save_pretrained(folder / "ours")
    ViTCLSImageProcessor(size=48).save_pretrained(folder / "ours")
    (folder / "ours" / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    theirs = ViTModel(ViTConfig(hidden_size=16, image_size=32, patch_size=16, **sizes))
    randomize(theirs).save_pretrained(folder / "theirs")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "theirs")
    return str(folder / "ours"), str(folder / "theirs")


def tiny_options(folder: Path, teachers: tuple[str, ...], **flags: Any) -> PretrainOptions:
    """Return options of a short run on digits."""
    settings = vars(TINY) | {
        "teachers": teachers,
        "max_steps": 40,
        "batch_size": 32,
        "learning_rate": 4e-3,
    }
    return build_tiny_options(
        folder, "digits", PretrainOptions, **settings | {"log_every": 10, "select": None} | flags
    )


# Loss and targets ---------------------------------------------------------------------------------


def test_the_loss_is_that_of_unic() -> None:
    """Compare with the paper's formula in numpy, for a token and for patches."""
    generator = np.random.default_rng(0)
    predictions, targets = (
        [generator.normal(size=(5, 8)), generator.normal(size=(5, 3, 8)) * 2] for _ in range(2)
    )
    losses = []
    for x, y in zip(predictions, targets, strict=True):
        cosines = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        distances = np.abs(x - y)
        smooth = np.where(distances < 1, distances**2 / 2, distances - 0.5)
        losses.append(0.5 * (1 - cosines).mean() + 0.5 * smooth.mean())
    found = compute_feature_loss(
        *([torch.from_numpy(each).float() for each in x] for x in (predictions, targets))
    )

    assert float(found) == pytest.approx(np.mean(losses), abs=1e-6)


@pytest.mark.parametrize("width", [16, 12])
def test_the_targets_are_those_of_phi_s(width: int) -> None:
    """Compare with numpy and scipy's Hadamard matrix.

    Eigenvectors have no sign, so covariances are compared.
    """
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, width)) @ generator.normal(size=(width, width)) + 3
    mean, matrix = fit_phi_s(torch.from_numpy(features))
    targets = ((torch.from_numpy(features) - mean) @ matrix).numpy()
    covariance = np.cov(features.T, bias=True)
    eigenvalues = np.linalg.eigvalsh(covariance)
    scale = 1 / np.sqrt(eigenvalues.mean())
    np.testing.assert_allclose(targets.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(targets.var(axis=0), 1, atol=1e-6)
    distances = [np.linalg.norm(each[:100] - each[100:], axis=1) for each in (features, targets)]
    np.testing.assert_allclose(distances[1], scale * distances[0], atol=1e-6)
    assert fit_phi_s(torch.ones(3, width))[1].isfinite().all()  # equal images
    if width == 16:
        hadamard = scipy.linalg.hadamard(width) / np.sqrt(width)
        expected = scale**2 * hadamard @ np.diag(eigenvalues) @ hadamard.T
        np.testing.assert_allclose(np.cov(targets.T, bias=True), expected, atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 12, 20, 44, 96, 1152])
def test_hadamard_matrices_are_orthogonal_with_entries_of_plus_or_minus_one(width: int) -> None:
    matrix = build_hadamard_matrix(width)
    assert set(np.unique(matrix)) <= {-1, 1}
    # exact, and much faster than integers
    product = matrix.astype(np.float32) @ matrix.T.astype(np.float32)
    assert np.array_equal(product, width * np.eye(width))


def test_a_width_without_hadamard_matrix_is_an_error() -> None:
    with raises_one_line("width 36"):
        build_hadamard_matrix(36)


def test_a_teacher_returns_its_pooled_vector_and_its_patches(
    teachers: tuple[str, str], tmp_path: Path
) -> None:
    """The pixels have the teacher's size; the patches are resampled from 6 x 6 to 3 x 3."""
    student = build_tiny_config(image_size=48, patch_size=16)
    teacher = load_feature_teacher(teachers[0], student, True, torch.device("cpu"))
    pixels = (build_images(3, 48, 48) * 255).clamp(0, 255).to(torch.uint8)
    model = ViTCLSModel.from_pretrained(teachers[0]).eval()
    processor = ViTCLSImageProcessor.from_pretrained(teachers[0])
    with torch.no_grad():
        outputs = model(processor(list(pixels), return_tensors="pt")["pixel_values"])
    features = teacher(pixels)

    ViTCLSModel(
        ViTCLSConfig.from_pretrained(teachers[0], num_hidden_layers=3)
    ).config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").symlink_to(Path(teachers[0]) / "model.safetensors")
    with raises_one_line(f"the checkpoint {tmp_path} does not contain the weight layers.2."):
        load_feature_teacher(str(tmp_path), student, True, torch.device("cpu"))
    assert get_largest_difference(features[:, :24], outputs.pooler_output) <= 1e-5

    # [3, 9, 24]
    patches = (
        resize(outputs.last_hidden_state[:, -36:].mT.unflatten(2, (6, 6)), [3, 3]).flatten(2).mT
    )
    assert get_largest_difference(features[:, 24:], patches.flatten(1)) <= 1e-5

    autocast = MagicMock()
    standardized = FeatureTeachers([teacher], True, autocast)
    # one patch of each image
    standardized.fit([{"pixels": image[None]} for image in pixels], num_images=2)
    num_fitted = autocast.return_value.__enter__.call_count

    first, second = standardized.compute_targets({"pixels": pixels[:2]})[1][[0, 1], [0, 1]]
    assert 0 < num_fitted < autocast.return_value.__enter__.call_count
    # two vectors with the variance 1
    torch.testing.assert_close(first.abs(), torch.ones(24), atol=1e-3, rtol=0)
    torch.testing.assert_close(second, -first, atol=1e-3, rtol=0)


# Runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(teachers: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = tiny_options(tmp_path_factory.mktemp("run") / "out", teachers, distill_patches=True)
    return run_to_folder(options)


def test_each_token_follows_its_teacher(pretrained: Path) -> None:
    results = read_json(pretrained / "results.json")
    before, after = (results["features"][name]["teacher_cosines"] for name in ("before", "after"))
    assert len(before) == len(after) == 2
    assert all(abs(cosine) < 0.2 for cosine in before)
    assert all(cosine > 0.4 for cosine in after)
    assert f"teacher 1 {before[1]:.3f} -> {after[1]:.3f}" in results["features"]["summary"]
    assert results["selection_metric"] == "teacher_cosine"
    assert results["method"] == "distillation"
    assert results["token_layout"]["distillation"] == 2


def test_the_folder_contains_the_encoder_and_the_names_of_the_teachers(
    pretrained: Path, teachers: tuple[str, str]
) -> None:
    model, info = ViTCLSModel.from_pretrained(pretrained, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]  # no linear layers
    names = [f"path/to/{Path(name).name}" for name in teachers]
    results = read_json(pretrained / "results.json")

    assert model.config.distillation_teachers == names == results["teachers"]
    assert results["teacher_licenses"] == ["mit", None]
    assert model.adapt(num_distillation_tokens=1).config.distillation_teachers == names[:1]
    assert (
        ViTCLSModel.from_pretrained(
            pretrained, num_distillation_tokens=3
        ).config.distillation_teachers
        == names
    )
    assert any(
        name.startswith("patch_projectors.1.")
        for name in load_file(max(pretrained.glob("*/step*/model.s*")))
    )


@pytest.mark.parametrize(
    ("num_tokens", "pooling"),
    [(0, "cls_mean"), (0, "attention"), (1, "attention"), (2, "attention")],
)
def test_the_targets_are_predicted_from_the_tokens(
    num_tokens: int, pooling: str, teachers: tuple[str, str]
) -> None:
    """The projections are initialized as in the encoder.

    The pooler is trained if it is part of the loss.
    """
    config = build_tiny_config(num_distillation_tokens=num_tokens, pooling=pooling)
    loaded = [load_feature_teacher(name, config, True, torch.device("cpu")) for name in teachers]
    model = Distillation(randomize(ViTCLSModel(config)), loaded, True).eval()
    outputs = model(build_images())
    predictions = model(build_images(), project=True)

    tokens = [outputs.pooler_output] * 2
    assert not any(
        projector.bias.any() for projector in (*model.projectors, *model.patch_projectors)
    )

    if pooling == "attention":
        assert {weight.requires_grad for weight in model.vitcls.pooler.parameters()} == {
            not num_tokens
        }

    if num_tokens:
        tokens = list(outputs.tokens["distillation"].unbind(dim=1)) * (2 // num_tokens)
    for prediction, projector, token in zip(predictions[:2], model.projectors, tokens, strict=True):
        torch.testing.assert_close(prediction, projector(token))
    for prediction, projector in zip(predictions[2:], model.patch_projectors, strict=True):
        torch.testing.assert_close(prediction, projector(outputs.tokens["patches"]))

    token = outputs.tokens["distillation"].flatten(1) if num_tokens else outputs.tokens["cls"][:, 0]
    expected = torch.cat([token, outputs.tokens["patches"].mean(dim=1)], dim=1)
    torch.testing.assert_close(compute_features(model, model, build_images()), expected)


@pytest.mark.parametrize(
    ("batch_size", "dry_run", "num_batches", "num_images"),
    [(512, False, 1, 240), (48, True, 2, 64)],
)
def test_targets_are_standardized_with_the_first_images(
    batch_size: int,
    dry_run: bool,
    num_batches: int,
    num_images: int,
    teachers: Any,
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    """Also with fewer images than a batch.

    A dry run uses 64 images. The teachers run in the precision of the run.
    """
    fitted = []

    def fit(fitting: FeatureTeachers, batches: Iterator[Any], count: int) -> None:
        fitted.append((len(list(batches)), count, fitting.autocast))

    monkeypatch.setattr(FeatureTeachers, "fit", fit)
    flags = {"batch_size": batch_size, "dry_run": dry_run, "num_distillation_tokens": 1}
    run = prepare_setup(tiny_options(tmp_path / "out", teachers, **flags))
    assert fitted == [(num_batches, num_images, run.reporter.accelerator.autocast)]
    assert run.setup.summary_lines.keys() == {"method", "teacher 0", "teacher 1"}
    assert run.setup.encoder.config.distillation_teachers is None  # the teachers share a token


def test_cached_vectors_train_the_token(teachers: tuple[str, str], tmp_path: Path) -> None:
    results = run_training(
        tiny_options(tmp_path / "out", teachers[:1], teacher_views=1, crop_scale=0.9, max_steps=15)
    )
    (before,), (after,) = (
        results["features"][name]["teacher_cosines"] for name in ("before", "after")
    )
    assert after > before + 0.2
    assert results["token_layout"]["distillation"] == 1


WRONG: dict[str, dict[str, Any]] = {
    "`teachers`": {"method": "distillation", "teachers": ()},
    "`method='mae'`": {"method": "mae"},
    "`num_distillation_tokens`": {"num_distillation_tokens": 3},
    "`distill_patches=True`": {"teacher_views": 2, "distill_patches": True},
    "vitcls-tiny": {"teachers": ("vitcls-tiny",)},
}


@pytest.mark.parametrize("name", WRONG)
def test_contradicting_flags_are_errors(
    name: str, teachers: tuple[str, str], tmp_path: Path
) -> None:
    with raises_one_line(name):
        run_training(tiny_options(tmp_path / "out", **{"teachers": teachers} | WRONG[name]))
