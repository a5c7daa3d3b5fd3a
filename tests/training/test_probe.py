"""Probe of the frozen encoder: the classifier equals scikit-learn's regression, and fine-tuning is never worse."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_options import build_tiny_options, prepare_task, read_metrics, run_training
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.checkpoints import CheckpointStore
from modeling_vitcls.training.probe import explain_missing_probe, fold_standardization


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate", "few_digits")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an encoder without a classifier that was trained on digits."""
    folder = tmp_path_factory.mktemp("encoder")
    options = build_tiny_options(folder / "run", "digits", max_steps=60, batch_size=32, learning_rate=3e-3)
    run_training(options)
    ViTCLSModel.from_pretrained(folder / "run").save_pretrained(folder / "encoder")
    ViTCLSImageProcessor.from_pretrained(folder / "run").save_pretrained(folder / "encoder")
    return folder / "encoder"


def build_options(folder: Path, encoder: Path, **flags: Any) -> Any:
    """Return the options of a run with a probe and the default of --select."""
    settings = {"model": encoder, "probe": True, "select": None, "batch_size": 32, "max_steps": 4}
    return build_tiny_options(folder, "digits", **settings | flags)


@torch.no_grad()
def compute_features(encoder: Path, images: Any) -> np.ndarray:
    """Compute CLS and the mean of the patches with the model's public interface."""
    model, processor = ViTCLSModel.from_pretrained(encoder).eval(), ViTCLSImageProcessor.from_pretrained(encoder)
    pixel_values = processor([images[index] for index in range(len(images))], return_tensors="pt")["pixel_values"]
    tokens = model(pixel_values).tokens
    return torch.cat([tokens["cls"][:, 0], tokens["patches"].mean(dim=1)], dim=1).numpy()


def score_regression(encoder: Path, data: Any) -> float:
    """Return the accuracy of scikit-learn's regression that is fitted to the training and selection images."""
    features = [compute_features(encoder, part.images) for part in (data.train, data.selection, data.held_out)]
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    regression.fit(np.concatenate(features[:2]), [*data.train.labels, *data.selection.labels])
    return regression.score(features[2], data.held_out.labels)


def test_the_frozen_model_equals_the_regression_of_scikit_learn(encoder: Path, tmp_path: Path) -> None:
    """`--trainable head` stops after the probe."""
    options = build_options(tmp_path / "head", encoder, trainable="head")
    results = run_training(options)
    prepared = prepare_task(options)
    data = prepared.data
    assert data.selection is None and prepared.task.probe.max_images is None  # all images
    train, held_out = (compute_features(encoder, part.images) for part in (data.train, data.held_out))
    regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(train, data.train.labels)
    assert results["steps"] == results["epochs"] == 0
    assert results["accuracy"] == pytest.approx(regression.score(held_out, data.held_out.labels), abs=1e-6)
    assert results["frozen"]["logreg"]["CLS + mean"] == results["accuracy"]
    assert results["frozen"]["features"] == "CLS + mean"
    neighbors = KNeighborsClassifier(10, weights="distance", metric="cosine").fit(train, data.train.labels)
    assert results["frozen"]["knn"]["CLS + mean"] == pytest.approx(
        neighbors.score(held_out, data.held_out.labels), abs=3e-3
    )
    assert {"CLS", "mean of the patches", "CLS + mean"} == set(results["frozen"]["logreg"])
    model = ViTCLSForImageClassification.from_pretrained(tmp_path / "head")
    probabilities = (torch.from_numpy(held_out) @ model.classifier.weight.T + model.classifier.bias).softmax(-1)
    expected = regression.predict_proba(held_out)
    np.testing.assert_allclose(probabilities.detach().numpy(), expected, atol=1e-4)


def test_a_learning_rate_that_is_too_large_ends_with_the_frozen_model(encoder: Path, tmp_path: Path) -> None:
    """The default learning rate of this model is 4e-4, and 30 times this value is 1.2e-2. The classifier of the frozen
    model is then the regression on training and selection images."""
    flags = {"learning_rate": 1.2e-2, "warmup": 0.0, "epochs": 1.0, "max_steps": None, "batch_size": 16}
    options = build_options(tmp_path / "run", encoder, **flags, weight_decay=10.0)
    results = run_training(options)
    records = [record for record in read_metrics(tmp_path / "run") if "selection_accuracy" in record]
    assert all(record["selection_accuracy"] <= results["selection"]["accuracy"] for record in records)
    assert results["selection"]["step"] == 0
    assert results["selection"]["accuracy"] == results["frozen"]["logreg"]["CLS + mean"]
    best = CheckpointStore(tmp_path / "run" / "checkpoints", num_kept=9).load_best()
    assert best.step == 0
    assert results["accuracy"] == pytest.approx(score_regression(encoder, prepare_task(options).data), abs=1e-6)


def test_nothing_is_trained_with_too_few_selection_images(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The classifier is the regression on training and selection images."""
    options = build_options(tmp_path / "run", encoder, held_out_fraction=0.02)
    results = run_training(options)
    printed = capsys.readouterr().out
    assert "are too few to compare" in printed and not re.search(
        "^(defaults|batches|selected) ", printed, re.MULTILINE
    )
    data = prepare_task(options).data
    assert len(data.selection) < 50 and results["steps"] == results["selection"]["step"] == 0
    assert results["accuracy"] == pytest.approx(score_regression(encoder, data), abs=1e-6)
    last = run_training(build_options(tmp_path / "last", encoder, held_out_fraction=0.02, select="last"))
    assert last["steps"] == 4


def test_fine_tuning_starts_from_the_regression(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_training(build_options(tmp_path / "run", encoder, max_steps=2, log_every=1))
    printed = capsys.readouterr().out
    assert "frozen    k-NN " in printed and "logistic regression " in printed and "selection: accuracy" in printed
    assert "selected  the " in printed and results["selection"]["num_images"] >= 50
    random = run_training(build_options(tmp_path / "random", encoder, max_steps=2, log_every=1, probe=False, seed=7))
    first, first_random = (read_metrics(tmp_path / name)[0]["loss"] for name in ("run", "random"))
    assert first < 0.6 * first_random and "frozen" in results and "frozen" not in random
    assert "probe     off, because --no-probe is set" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"head_type": "mlp"}, "the head is an MLP"),
        ({"num_distillation_tokens": 1}, "the model has a distillation head"),
        ({"pooling": "attention"}, "the pooler has random weights"),
    ],
)
def test_reasons_for_no_probe(encoder: Path, tmp_path: Path, flags: dict[str, Any], reason: str) -> None:
    task = prepare_task(build_options(tmp_path / "run", encoder, **flags)).task
    assert task.probe is None and task.summary_lines["probe"] == f"off, because {reason}"


def test_random_weights_have_no_probe(tmp_path: Path) -> None:
    run = prepare_task(build_tiny_options(tmp_path / "run", "digits", probe=True, select=None))
    assert run.task.probe is None and run.options.training.select == "last"
    assert run.task.summary_lines["probe"] == "off, because the initial weights are random"
    stream = replace(run.options, data=replace(run.options.data, streaming=True))
    for options, kind, reason in (
        (stream, "single_label_classification", "stream"),
        (run.options, "multi_task", "label"),
    ):
        assert reason in str(explain_missing_probe(options, run.task.model, {"classifier.weight"}, kind))


@pytest.mark.parametrize("classes", [[0, 1], [0, 2], [1, 2, 3]])
def test_the_standardization_is_part_of_the_linear_layer(classes: list[int]) -> None:
    """Two classes have one row of coefficients, and classes without images are never predicted."""
    generator = np.random.default_rng(0)
    labels = generator.choice(classes, 80)
    features = 3 + generator.normal(size=(80, 5)) * [1, 10, 0.1, 2, 1] + labels[:, None] * [1, 0, 0.1, 1, 0]
    pipeline = make_pipeline(StandardScaler(), LogisticRegression()).fit(features, labels)
    weight, bias = fold_standardization(pipeline, 5)
    logits = torch.from_numpy(features @ weight.T + bias)
    np.testing.assert_allclose(logits.softmax(-1).numpy()[:, classes], pipeline.predict_proba(features), atol=1e-5)
