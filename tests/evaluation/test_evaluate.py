"""Evaluation of saved models: their results, progress, and runs of two processes.

The real `accelerate launch` starts evaluation_worker.py once on two processes. Its results must
equal those of one process.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.accelerate_state import reset_accelerate
from helpers.evaluation_results import close
from helpers.evaluation_worker import (
    CLASSES,
    CONFIGS,
    NUM_IMAGES,
    SIZES,
    SPACES,
    UNREADABLE,
    build_classifier,
    build_labeled_images,
)
from helpers.photo_folders import write_photos
from helpers.tiny_models import raises_one_line, randomize, save_both, save_with_processor
from helpers.warm_processes import run_together
from PIL import Image
from pytest import CaptureFixture, MonkeyPatch
from torch.nn import functional

from modeling_vitcls import (
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    predict,
)
from modeling_vitcls.data.labels import OneLabel, SeveralLabels
from modeling_vitcls.evaluation import evaluate as evaluate_module
from modeling_vitcls.evaluation.evaluate import build_predictions_by_scene, evaluate_checkpoint
from modeling_vitcls.inference.features import FeatureLayout, Features
from modeling_vitcls.inference.metrics import measure
from modeling_vitcls.inference.options import EvaluateOptions
from modeling_vitcls.runtime.files import read_json, write_json


WORKER = Path(__file__).parents[1] / "helpers/evaluation_worker.py"
# Flags that read the labels of a scenario from its table
COLUMNS = {
    "single": {},
    "multi_label": {"label_column": ("tags",), "label_separator": "|"},
    "multi_task": {},
}


@pytest.fixture(scope="module")
def two_process_folder(module_path: Path) -> Path:
    """Run evaluation_worker.py on two processes, and return its folder.

    The folder contains the printed text in `stdout`.
    """
    run_together(WORKER, module_path, log=module_path / "stdout")
    return module_path


# Two processes ------------------------------------------------------------------------------------


def test_two_processes_equal_one(by_one_process: dict[str, Any], two_process_folder: Path) -> None:
    expected = dict(flatten(by_one_process))
    measured = dict(flatten(read_json(two_process_folder / "scenarios.json")))
    assert list(measured) == list(expected)
    for names, value in expected.items():  # the losses depend on the batches' rounding
        assert measured[names] == (close(value) if isinstance(value, float) else value), names


def flatten(values: dict[str, Any], *names: str) -> Iterator[Any]:
    """List the values of nested dicts, with the names that lead to them."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, *names, name)
        else:
            yield (*names, name), value


def test_only_the_main_process_prints(two_process_folder: Path) -> None:
    printed = (two_process_folder / "stdout").read_text()
    assert re.findall(r"'(\d+)\.png'", printed) == [*map(str, UNREADABLE)] * 2  # two evaluators


# Saved models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(module_path: Path) -> Path:
    """Return a folder with a saved model of each kind."""
    for name in SPACES:
        save_both(build_classifier(name), module_path / name, ViTCLSImageProcessor(size=16))
    return module_path


def describe(name: str, label: Any) -> dict[str, str]:
    """Return the columns of an image with this label. Names are in another order than in the model."""
    if name == "single":
        return {"label": CLASSES[label]}
    if name == "multi_label":
        return {"tags": "|".join(CLASSES[index] for index in reversed(label))}
    columns = SPACES[name].columns
    return {
        task: "" if label[task] is None else columns[task][label[task]]
        for task in ("species", "age")
    }


def write_table(folder: Path, name: str, **columns: Any) -> Path:
    """Write the images of a scenario and a CSV file of their labels, with more columns.

    Each image has two rows, and counts once.
    """
    pictures = build_labeled_images(name)
    table = pd.DataFrame([describe(name, label) for label in pictures.labels]).assign(**columns)
    table["path"] = [f"{name}{index}.png" for index in range(NUM_IMAGES)]
    for file, image in zip(table["path"], pictures.images, strict=True):
        image.save(folder / file)
    pd.concat([table, table]).to_csv(folder / f"{name}.csv", index=False)
    return folder / f"{name}.csv"


def evaluate(model: Path, dataset: object, **data: Any) -> dict[str, Any]:
    """Evaluate all images of a table."""
    reset_accelerate()
    options = {"dataset": str(dataset), "num_workers": 0, "batch_size": 4, **data}
    return evaluate_checkpoint(EvaluateOptions(model=str(model), **options))


def test_the_label_column_of_the_training_is_read_if_the_table_has_it(
    models: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(models / "single", tmp_path / "model")
    write_json(model / "results.json", {"label_column": ["animal"]})
    table = write_table(tmp_path, "single", animal=CLASSES[0])
    first_class = evaluate(model, table)["per_class"][0]
    assert first_class["images"] == NUM_IMAGES

    without_it = pd.read_csv(table).drop(columns="animal")
    without_it.to_csv(tmp_path / "other.csv", index=False)
    first_class = evaluate(model, tmp_path / "other.csv")["per_class"][0]
    assert 0 < first_class["images"] < NUM_IMAGES


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_several_labels_per_image_are_matched_by_name_and_scored_per_image(
    threshold: float | None, models: Path, tmp_path: Path, by_one_process: dict[str, Any]
) -> None:
    """The names are in another order, and one class is not in the data."""
    table = write_table(tmp_path, "multi_label")
    files = {"per_image": tmp_path / "new/rows.parquet"}
    data = COLUMNS["multi_label"] | files
    found = evaluate(models / "multi_label", table, threshold=threshold, **data)
    assert found["num_images"] == NUM_IMAGES
    assert found["loss"] == close(by_one_process["multi_label"]["loss"])
    assert [row["name"] for row in found["per_class"]] == CLASSES

    rows = pd.read_parquet(tmp_path / "new/rows.parquet")
    is_exact = [
        list(one) == list(other)
        for one, other in zip(rows["label"], rows["prediction"], strict=True)
    ]
    assert len(rows) == NUM_IMAGES
    assert np.mean(is_exact) == close(found["exact_match"])
    is_predicted = np.stack(rows["probabilities"]) >= (threshold or 0.5)
    assert rows["prediction"].map(len).tolist() == is_predicted.sum(axis=1).tolist()
    assert rows["loss"].mean() == close(found["loss"])


def test_a_threshold_requires_several_labels_per_image(models: Path, tmp_path: Path) -> None:
    for name in ("single", "multi_task"):
        with raises_one_line("`threshold=0.3`"):
            evaluate(models / name, tmp_path, threshold=0.3)
        with raises_one_line("`threshold=0.3`"):
            predict(models / name, tmp_path / "photo.png", threshold=0.3)


def test_tasks_are_matched_by_name_and_missing_labels_are_not_counted(
    models: Path, tmp_path: Path, by_one_process: dict[str, Any]
) -> None:
    """The columns are in another order, and some labels are missing."""
    table = write_table(tmp_path, "multi_task")
    found = evaluate(models / "multi_task", table)  # the columns of the model
    expected = by_one_process["multi_task"]
    assert found["num_images"] == NUM_IMAGES
    assert found["loss"] == close(expected["loss"])
    assert found["accuracy"] == close(expected["accuracy"])
    for task in ("species", "age"):
        own, alone = found["tasks"][task], expected["tasks"][task]
        assert own["num_images"] == alone["num_images"]
        assert own["loss"] == close(alone["loss"])
    with raises_one_line("multi_task", "one for each task, empty"):
        evaluate(models / "multi_task", table, label_column=("age",))
    with raises_one_line("`per_image`"):
        evaluate(models / "multi_task", table, per_image=tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("kind", "num_added"),
    [("single", 0), ("single", 1), ("single", 3), ("multi_label", 0), ("multi_task", 0)],
)
@torch.no_grad()
def test_metrics_are_of_the_models_own_logits_whatever_else_it_returns(
    kind: str, num_added: int, tmp_path: Path
) -> None:
    """Added classes, and a distillation head and an added task, have columns of their own."""
    own_labels = OneLabel({"label": CLASSES[:-num_added]}) if num_added else SPACES[kind]
    fields = CONFIGS[kind] | {"num_distillation_tokens": 1}
    config = ViTCLSConfig(**SIZES | fields | own_labels.to_config_values())
    weather_names = ["rain", "snow", "sun"]
    heads = {"weather": {"labels": weather_names, "pooling": "cls"}}
    if num_added:
        heads["more"] = {"labels": CLASSES[-num_added:], "pooling": "mean", "adds_classes": True}
        config.id2label = dict(enumerate(CLASSES))
        config.label2id = {name: index for index, name in enumerate(CLASSES)}
    config.extra_heads = heads
    model = randomize(type(build_classifier(kind))(config))
    folder = save_both(model, tmp_path / "model", ViTCLSImageProcessor(size=16))
    weather = torch.arange(NUM_IMAGES) % 3
    table = write_table(tmp_path, kind, weather=[weather_names[index] for index in weather])

    images = build_labeled_images(kind)
    inputs = ViTCLSImageProcessor(size=16)(list(images.images), return_tensors="pt")
    outputs = model(**inputs)
    logits = outputs.logits
    if kind == "multi_task":
        logits = torch.cat(list(logits.values()), dim=1)
    labels = SPACES[kind].collate(images.labels)
    expected = measure(SPACES[kind], logits.numpy(), labels.numpy())
    found = evaluate(folder, table, **COLUMNS[kind])
    for metric in ("loss", "exact_match" if kind == "multi_label" else "accuracy"):
        assert found[metric] == close(expected[metric])
    found = evaluate(folder, table, label_column=("weather",), task="weather")
    loss = functional.cross_entropy(outputs.task_logits["weather"], weather)
    assert found["loss"] == close(loss.item())


def test_the_files_are_written_before_the_table_is_printed(
    models: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """`vitcls evaluate ... | head` ends when it prints more than is read."""

    def fail(*args: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(evaluate_module, "print_results", fail)
    table = write_table(tmp_path, "single")
    files = {"output": tmp_path / "results.json", "per_image": tmp_path / "images.parquet"}
    with pytest.raises(BrokenPipeError):
        evaluate(models / "single", table, **files)
    assert read_json(files["output"])["num_images"] == NUM_IMAGES
    assert len(pd.read_parquet(files["per_image"])) == NUM_IMAGES


def test_an_image_of_other_channels_is_named_and_counted_as_unreadable(
    tmp_path: Path, capsys: CaptureFixture
) -> None:
    labels = {0: "[b]dark", 1: "light"}
    config = ViTCLSConfig(**SIZES, num_channels=1, id2label=labels)
    gray = ViTCLSImageProcessor(size=16, do_convert_rgb=False, image_mean=0.5, image_std=0.5)
    save_with_processor(ViTCLSForImageClassification(config), tmp_path / "model", gray)
    write_photos(tmp_path / "data", range(1), "light", "[b]dark")
    for file in tmp_path.glob("data/*/*"):
        Image.open(file).convert("L").save(file)
    Image.new("RGB", (16, 16)).save(tmp_path / "data/[b]dark/6.png")
    results = evaluate(tmp_path / "model", tmp_path / "data")
    assert results["num_images"] == 2
    assert results["num_unreadable_images"] == 1
    (warning,) = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: ")
    )
    assert "[b]dark/6.png' has 3 channel(s), but the model requires 1" in warning


def test_an_unfinished_run_names_resume(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with raises_one_line("vitcls finetune ... --resume"):
        evaluate_checkpoint(EvaluateOptions(model=str(tmp_path), dataset="digits"))


def test_a_regression_is_an_error(tmp_path: Path) -> None:
    config = ViTCLSConfig(**SIZES, problem_type="regression", num_labels=1)
    save_with_processor(ViTCLSForImageClassification(config), tmp_path)
    with raises_one_line("regression"):
        evaluate_checkpoint(EvaluateOptions(model=str(tmp_path), dataset="digits"))


def measure_tags(labels: np.ndarray) -> dict[str, Any]:
    """Measure noisy logits of 60 images with three tags; labels are [60, 3]."""
    noise = np.random.default_rng(0).normal(0, 1, labels.shape)
    places = np.arange(60)
    features = Features(
        labels=labels.astype(np.float32),
        indices=places,
        names=places.astype(str),
        groups=places,
        logits=(labels + noise).astype(np.float32),
        layout=FeatureLayout(1, {}),
    )
    space = SeveralLabels({"tags": ["a", "b", "c"]})
    return build_predictions_by_scene(space, features, 0.5, None).metrics


def test_the_average_precision_of_an_evaluation_has_the_interval_of_a_run() -> None:
    found = measure_tags(np.random.default_rng(1).random((60, 3)) < 0.5)
    low, high = found["mean_average_precision_interval"]
    assert 0 <= low < found["mean_average_precision"] < high <= 1


def test_images_without_any_label_have_no_average_precision_and_are_evaluated() -> None:
    found = measure_tags(np.zeros((60, 3), bool))
    assert found["mean_average_precision"] is None
    assert "mean_average_precision_interval" not in found
