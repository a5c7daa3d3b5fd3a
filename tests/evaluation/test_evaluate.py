"""Evaluation of saved models: their results, progress, and runs of two processes.

The real `accelerate launch` starts evaluation_worker.py once on two processes. Its results must
equal those of one process.
"""

import csv
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
    NUM_IMAGES,
    SIZES,
    SPACES,
    UNREADABLE,
    build_classifier,
    build_labeled_images,
    evaluate_digits,
)
from helpers.tiny_models import raises_one_line, randomize, save_both, save_with_processor
from helpers.warm_processes import run_together
from PIL import Image
from torch.nn import functional

from modeling_vitcls import (
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    predict,
)
from modeling_vitcls.data.labels import OneLabel, PerTask, SeveralLabels
from modeling_vitcls.evaluation import evaluate as evaluate_module
from modeling_vitcls.evaluation.evaluate import evaluate_checkpoint
from modeling_vitcls.inference.options import EvaluateOptions
from modeling_vitcls.runtime.files import read_json, write_json


NUM_DIGITS = 1797
WORKER = Path(__file__).parents[1] / "helpers" / "evaluation_worker.py"
MEASURED = ("images_per_second", "seconds", "num_processes", "device")  # differ from run to run


@pytest.fixture(scope="module")
def two_process_folder(module_path: Path) -> Path:
    """Run evaluation_worker.py on two processes, and return its folder.

    The folder contains the printed text in `stdout`.
    """
    folder = module_path / "two"
    labels = OneLabel({"label": list("9876543210")})
    model = build_classifier("single")
    config = ViTCLSConfig(**model.config.to_diff_dict() | labels.to_config_values())
    save_both(type(model)(config), folder, ViTCLSImageProcessor(size=16))
    run_together(WORKER, folder, log=folder / "stdout")
    return folder


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
    printed = (two_process_folder / "stdout").read_text(encoding="utf-8")
    assert re.findall(r"'(\d+)\.png'", printed) == [*map(str, UNREADABLE)] * 2  # two evaluators
    assert printed.count("Each class") == 1
    results = read_json(two_process_folder / "new" / "digits.json")
    assert f"{results['num_right']} of {results['num_images']:,} right" in printed


# Saved models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(module_path: Path) -> Path:
    """Return a folder with a saved model of each kind."""
    for name in SPACES:
        save_both(build_classifier(name), module_path / name, ViTCLSImageProcessor(size=16))
    return module_path


def write_table(folder: Path, name: str, header: list[str], text: Any) -> Path:
    """Write the images of a scenario and a CSV file with `text(label)` for each label.

    Each image has two rows, and counts once.
    """
    pictures = build_labeled_images(name)
    with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", *header])
        for index, label in enumerate(pictures.labels):
            pictures.images[index].save(folder / f"{name}{index}.png")
            writer.writerows([[f"{name}{index}.png", *text(label)]] * 2)
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
    table = write_table(
        tmp_path, "single", ["label", "animal"], lambda label: [CLASSES[label], CLASSES[0]]
    )
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

    def text(label: list[int]) -> list[str]:
        return ["|".join(CLASSES[index] for index in reversed(label))]

    table = write_table(tmp_path, "multi_label", ["tags"], text)
    data = {"label_column": ("tags",), "label_separator": "|"}
    per_image = tmp_path / "new" / "rows.parquet"
    found = evaluate(
        models / "multi_label", table, per_image=per_image, threshold=threshold, **data
    )
    assert found["num_images"] == NUM_IMAGES
    assert found["loss"] == close(by_one_process["multi_label"]["loss"])
    assert [row["name"] for row in found["per_class"]] == CLASSES

    rows = pd.read_parquet(tmp_path / "new" / "rows.parquet")
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

    def text(label: dict[str, int]) -> list[str]:
        columns = SPACES["multi_task"].columns
        return [
            "" if label[task] is None else columns[task][label[task]] for task in ("species", "age")
        ]

    table = write_table(tmp_path, "multi_task", ["species", "age"], text)
    found = evaluate(models / "multi_task", table)  # the columns of the model
    expected = by_one_process["multi_task"]
    assert found["num_images"] == NUM_IMAGES
    assert found["loss"] == close(expected["loss"])
    assert found["accuracy"] == close(expected["accuracy"])
    for task in ("species", "age"):
        own, alone = found["tasks"][task], expected["tasks"][task]
        assert own["num_images"] == alone["num_images"]
        assert own["loss"] == close(alone["loss"])
    with raises_one_line("multi_task", "a column for each task, empty"):
        evaluate(models / "multi_task", table, label_column=("age",))
    with raises_one_line("`per_image`"):
        evaluate(models / "multi_task", table, per_image=tmp_path / "rows.parquet")


@pytest.mark.parametrize(("num_distillation_tokens", "has_task"), [(0, False), (1, True)])
@pytest.mark.parametrize(
    ("kind", "num_added"),
    [("single", 0), ("single", 1), ("single", 2), ("single", 3), ("tags", 0), ("tasks", 0)],
)
def test_metrics_are_of_the_models_own_logits_whatever_else_it_returns(
    kind: str, num_added: int, num_distillation_tokens: int, has_task: bool, tmp_path: Path
) -> None:
    """Two heads, added classes and added tasks have columns of their own."""
    names = ["t-shirt", "2-piece", "Größe 40", "coat", "hat"][: 2 + num_added]
    space = {
        "single": OneLabel({"label": names}),
        "tags": SeveralLabels({"label": names}),
        "tasks": PerTask({"kind": names, "size": ["big", "small", "tiny"]}),
    }[kind]
    own_labels = space if kind != "single" else OneLabel({"label": names[:2]})
    fields = own_labels.to_config_values() | {"num_distillation_tokens": num_distillation_tokens}
    fields["num_cls_tokens"] = 2 if kind == "tasks" else 1
    config = ViTCLSConfig(**SIZES | fields)
    if num_added:
        config.extra_heads = {"more": {"labels": names[2:], "pooling": "mean"}}
        config.extra_heads["more"]["adds_classes"] = True
        config.id2label = dict(enumerate(names))
        config.label2id = {name: index for index, name in enumerate(names)}
    if has_task:
        task = {"weather": {"labels": ["sun", "rain", "snow"], "pooling": "cls"}}
        config.extra_heads = (config.extra_heads or {}) | task
    model_class = (
        ViTCLSForMultiTaskClassification if kind == "tasks" else ViTCLSForImageClassification
    )
    model = randomize(model_class(config))
    folder = save_both(model, tmp_path / "model", ViTCLSImageProcessor(size=16))

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (12, 40, 30, 3), dtype=np.uint8)
    table = pd.DataFrame({"path": [f"{index}.png" for index in range(12)]})
    for name, image in zip(table["path"], pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    is_tagged = generator.random((12, len(names))) < 0.5
    is_tagged[:, 0] |= ~is_tagged.any(axis=1)  # An empty cell is an image without labels
    indices = np.arange(12) % len(names)
    table["label"] = table["kind"] = np.array(names)[indices]
    table["size"] = np.array(["big", "small", "tiny"])[np.arange(12) % 3]
    table["weather"] = np.array(["sun", "rain", "snow"])[np.arange(12) % 3]
    table["tags"] = [";".join(np.array(names)[row]) for row in is_tagged]
    table.to_csv(tmp_path / "table.csv", index=False)

    processor = ViTCLSImageProcessor.from_pretrained(folder)
    inputs = processor([Image.fromarray(image) for image in pixels], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    columns = {"single": ("label",), "tags": ("tags",), "tasks": ("kind", "size")}[kind]
    data: dict[str, Any] = {"label_separator": ";"} if kind == "tags" else {}
    found = evaluate(folder, tmp_path / "table.csv", label_column=columns, **data)
    if kind == "tags":
        loss = functional.binary_cross_entropy_with_logits(
            outputs.logits, torch.tensor(is_tagged, dtype=torch.float32)
        )
        assert found["exact_match"] == close(
            float(((outputs.logits > 0).numpy() == is_tagged).all(axis=1).mean())
        )
    else:
        targets = {"kind": indices, "size": np.arange(12) % 3}
        logits = outputs.logits if kind == "tasks" else {"kind": outputs.logits}
        loss = sum(
            functional.cross_entropy(own, torch.tensor(targets[task]))
            for task, own in logits.items()
        )
        is_right = [own.argmax(dim=1).numpy() == targets[task] for task, own in logits.items()]
        assert found["accuracy"] == close(float(np.mean(is_right)))
    assert found["loss"] == close(float(loss))
    if has_task:
        found = evaluate(folder, tmp_path / "table.csv", label_column=("weather",), task="weather")
        own = outputs.task_logits["weather"]
        expected = functional.cross_entropy(own, torch.arange(12) % 3)
        assert found["loss"] == close(float(expected))


def test_the_files_are_written_before_the_table_is_printed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vitcls evaluate ... | head` ends when it prints more than is read."""

    def fail(*args: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(evaluate_module, "print_results", fail)
    table = write_table(tmp_path, "single", ["animal"], lambda label: [CLASSES[label]])
    files = {"output": tmp_path / "results.json", "per_image": tmp_path / "images.parquet"}
    with pytest.raises(BrokenPipeError):
        evaluate(models / "single", table, label_column=("animal",), **files)
    assert read_json(files["output"])["num_images"] == NUM_IMAGES
    assert len(pd.read_parquet(files["per_image"])) == NUM_IMAGES


def test_an_image_of_other_channels_is_named_and_counted_as_unreadable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = OneLabel({"label": ["[b]dark", "light"]})
    config = ViTCLSConfig(**SIZES | {"num_channels": 1} | labels.to_config_values())
    gray = ViTCLSImageProcessor(size=16, do_convert_rgb=False, image_mean=0.5, image_std=0.5)
    save_with_processor(ViTCLSForImageClassification(config), tmp_path / "model", gray)
    for name, mode in (("[b]dark/1", "L"), ("light/2", "L"), ("[b]dark/6", "RGB")):
        file = tmp_path / "data" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (16 + len(name), 16)).save(file)
    dataset = str(tmp_path / "data")
    options = EvaluateOptions(model=str(tmp_path / "model"), dataset=dataset, num_workers=0)
    results = evaluate_checkpoint(options)
    assert results["num_images"] == 2
    assert results["num_unreadable_images"] == 1
    (warning,) = (
        line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: ")
    )
    assert "[b]dark/6.png' has 3 channel(s), but the model requires 1" in warning


def test_two_processes_evaluate_a_saved_model(two_process_folder: Path) -> None:
    two = read_json(two_process_folder / "new" / "digits.json")
    one = evaluate_digits(two_process_folder)
    assert two["num_processes"] == 2
    assert one["num_processes"] == 1
    assert two["num_images"] == NUM_DIGITS
    assert [file.name for file in (two_process_folder / "new").iterdir()] == ["digits.json"]
    # depends on the batches' rounding
    assert two.pop("calibration_error") == close(one.pop("calibration_error"))
    assert {**two, **dict.fromkeys(MEASURED)} == {**one, **dict.fromkeys(MEASURED)}


def test_an_unfinished_run_names_resume(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with raises_one_line("vitcls finetune ... --resume"):
        evaluate_checkpoint(EvaluateOptions(model=str(tmp_path), dataset="digits"))


def test_a_regression_is_an_error(tmp_path: Path) -> None:
    config = ViTCLSConfig(**SIZES, problem_type="regression", num_labels=1)
    save_with_processor(ViTCLSForImageClassification(config), tmp_path)
    with raises_one_line("regression"):
        evaluate_checkpoint(EvaluateOptions(model=str(tmp_path), dataset="digits"))
