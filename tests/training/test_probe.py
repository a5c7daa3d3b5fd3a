"""Probe of the frozen encoder: the classifier equals scikit-learn's regression, and fine-tuning is never worse."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers.tiny_options import build_tiny_options, prepare_task, read_metrics, run_dry, run_training
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.checkpoints import CheckpointStore, format_state, read_state
from modeling_vitcls.training import probe as probe_module
from modeling_vitcls.training.probe import describe_probe, explain_missing_probe, fold_standardization


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
    run_dry(build_options(tmp_path / "last", encoder, held_out_fraction=0.02, select="last"))
    printed = capsys.readouterr().out
    assert "ran 3 steps" in printed and "frozen" not in printed


def test_fine_tuning_starts_from_the_regression(
    encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The frozen model takes part in the selection, with just enough images. A resumed run does not evaluate the step
    after which it starts: here step 1, because the checkpoint of step 2 is damaged."""
    flags = {"max_steps": 2, "learning_rate": 1e-6, "log_every": 1, "save_every": 1, "keep_checkpoints": 3}
    options = build_options(tmp_path / "run", encoder, **flags)
    results = run_training(options)
    printed, frozen = capsys.readouterr().out, results["frozen"]
    best = {kind: max(frozen[kind].values()) for kind in ("knn", "logreg")}
    assert f"k-NN {best['knn']:.1%} (" in printed and f"logistic regression {best['logreg']:.1%} (" in printed
    assert f"on CLS + mean ({frozen['logreg']['CLS + mean']:.1%})" in printed
    assert "selection: accuracy" in printed and "selected  the frozen model" in printed
    assert "selected on 50 separate images" in printed and results["selection"]["num_images"] == 50
    assert read_metrics(tmp_path / "run")[0]["loss"] < 0.6 * math.log(10)  # the loss of a random classifier
    (tmp_path / "run" / "results.json").unlink()
    weights = tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    file = tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json"
    state = read_state(file.parent)
    state["metadata"] |= {"best_score": 0.0, "margin": 0.0}  # any evaluation is better
    file.write_text(format_state(state), encoding="utf-8")
    resumed = run_training(replace(options, run=replace(options.run, resume=True)))
    assert resumed["frozen"] == frozen and resumed["selection"]["step"] == 2
    printed = capsys.readouterr().out
    assert f"WARNING: the checkpoint {weights.parent} is damaged: model.safetensors" in printed
    assert "resumed   after step 1 of 2" in printed and "selected  the checkpoint of step 2" in printed


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"num_cls_tokens": 0, "pooling": "mean"}, ["mean of the patches"]),
        ({"pooling": "max"}, ["CLS", "mean of the patches", "CLS + mean", "pooling max"]),
    ],
)
def test_the_probe_measures_the_features_of_the_model(
    encoder: Path, tmp_path: Path, flags: dict[str, Any], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unreadable images are named, except for training images, which training names."""
    evaluators = Mock(wraps=probe_module.ProbeEvaluator)
    monkeypatch.setattr(probe_module, "ProbeEvaluator", evaluators)
    run = prepare_task(build_options(tmp_path / "run", encoder, **flags))
    probe_model = replace(run.task.probe, max_images=64).run
    probe = probe_model(run.data, run.reporter)
    assert list(probe["logreg"]) == list(probe["knn"]) == names
    assert (run.task.probe.max_images, probe["num_training_images"], probe["features"]) == (10_000, 64, names[-1])
    assert [call.kwargs["warn"] == run.reporter.warn for call in evaluators.call_args_list] == [False, True]
    unmeasured = probe_model(replace(run.data, selection=None, held_out=run.data.held_out.select([])), run.reporter)
    assert unmeasured == {"num_training_images": 64, "features": names[-1]}
    assert describe_probe(unmeasured).endswith(names[-1])


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"probe": False}, "--no-probe is set"),
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
    for options, names, kind, reason in (
        (stream, {"classifier.weight"}, "single_label_classification", "stream"),
        (run.options, {"classifier.weight"}, "multi_task", "label"),
        (run.options, set(), "single_label_classification", "checkpoint has a classifier"),
    ):
        assert reason in str(explain_missing_probe(options, run.task.model, names, kind))


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
