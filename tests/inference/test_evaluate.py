"""Evaluation of saved models: their results, progress, and runs of two processes.

The real `accelerate launch` starts evaluation_worker.py once on two processes. Its results must
equal those of one process.
"""

import csv
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import evaluation_results
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
from helpers.tiny_models import raises_one_line
from helpers.warm_processes import OFFLINE, run_together
from PIL import Image

from modeling_vitcls import ViTCLSConfig, ViTCLSImageProcessor
from modeling_vitcls.data.aspect_ratio import set_resize
from modeling_vitcls.data.labels import LabelSpace
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference import evaluate as evaluate_module
from modeling_vitcls.inference.evaluate import (
    evaluate_checkpoint,
    set_label_columns,
)
from modeling_vitcls.inference.options import EvaluateOptions
from modeling_vitcls.runtime.distributed import build_accelerator
from modeling_vitcls.runtime.files import read_json, write_json
from modeling_vitcls.runtime.system import describe_device, get_versions


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

NUM_DIGITS = 1797
WORKER = Path(__file__).parents[1] / "helpers" / "evaluation_worker.py"
MEASURED = ("images_per_second", "seconds", "num_processes", "device")  # differ from run to run
by_one_process = evaluation_results.by_one_process  # a fixture


@pytest.fixture(scope="module")
def two_process_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run evaluation_worker.py on two processes, and return its folder.

    The folder contains the printed text in `stdout`.
    """
    folder = tmp_path_factory.mktemp("two")
    labels = LabelSpace("single_label_classification", {"label": list("9876543210")})
    model = build_classifier("single")
    config = ViTCLSConfig(**model.config.to_diff_dict() | labels.to_config_values())
    type(model)(config).save_pretrained(folder)
    ViTCLSImageProcessor(size=16).save_pretrained(folder)
    run_together(WORKER, folder, log=folder / "stdout", environment=OFFLINE)
    return folder


# Two processes ------------------------------------------------------------------------------------


def test_two_processes_equal_one(by_one_process: dict[str, Any], two_process_folder: Path) -> None:
    measured = read_json(two_process_folder / "scenarios.json")
    assert measured.keys() == by_one_process.keys()
    for name, metrics in by_one_process.items():
        assert list(measured[name]) == list(metrics), name
        for key, value in metrics.items():  # the losses depend on the batches' rounding
            assert measured[name][key] == (close(value) if isinstance(value, float) else value), (
                name,
                key,
            )


def test_only_the_main_process_prints(two_process_folder: Path) -> None:
    printed = (two_process_folder / "stdout").read_text(encoding="utf-8")
    assert printed.count("each counted once") == 1
    # in order, by two evaluators
    assert re.findall(r"'(\d+)\.png'", printed) == [*map(str, UNREADABLE)] * 2


# Saved models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a saved model of each kind."""
    folder = tmp_path_factory.mktemp("models")
    for name in SPACES:
        build_classifier(name).save_pretrained(folder / name)
        ViTCLSImageProcessor(size=16).save_pretrained(folder / name)
    return folder


def write_table(folder: Path, name: str, header: list[str], text: Any) -> Path:
    """Write the images of a scenario and a CSV file with `text(label)` for each label.

    Each image occurs twice.
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
    options = DataOptions(dataset=str(dataset), num_workers=0, **data)
    return evaluate_checkpoint(EvaluateOptions(model=str(model), **vars(options), batch_size=4))


def test_several_labels_per_image_are_matched_by_name_and_scored_per_image(
    models: Path, tmp_path: Path, by_one_process: dict[str, Any]
) -> None:
    """The names are in another order, and one class is not in the data."""

    def text(label: list[float]) -> list[str]:
        return [
            "|".join(name for name, value in reversed([*zip(CLASSES, label, strict=True)]) if value)
        ]

    table = write_table(tmp_path, "multi_label", ["tags"], text)
    found = evaluate(models / "multi_label", table, label_column=("tags",), label_separator="|")
    expected = by_one_process["multi_label"]
    assert found["num_images"] == 2 * NUM_IMAGES
    assert found["loss"] == close(expected["loss"])
    assert [row["name"] for row in found["per_class"]] == CLASSES
    reset_accelerate()
    data = DataOptions(dataset=str(table), label_column=("tags",), label_separator="|")
    options = EvaluateOptions(
        model=str(models / "multi_label"), **vars(data), per_image=tmp_path / "new" / "rows.parquet"
    )
    results = evaluate_checkpoint(options)
    rows = pd.read_parquet(options.per_image)
    is_predicted = np.stack(rows["probabilities"]) > 0.5
    assert [list(names) for names in rows["prediction"]] == [
        list(np.array(CLASSES)[row]) for row in is_predicted
    ]
    is_exact = [
        list(one) == list(other)
        for one, other in zip(rows["label"], rows["prediction"], strict=True)
    ]
    assert (np.mean(is_exact), rows["loss"].mean()) == (
        close(results["exact_match"]),
        close(results["loss"]),
    )


def test_tasks_are_matched_by_name_and_missing_labels_are_not_counted(
    models: Path, tmp_path: Path, by_one_process: dict[str, Any]
) -> None:
    """The columns are in another order, and some labels are missing."""

    def text(label: dict[str, int]) -> list[str]:
        columns = SPACES["multi_task"].columns
        return [
            columns[task][label[task]] if label[task] >= 0 else "" for task in ("species", "age")
        ]

    table = write_table(tmp_path, "multi_task", ["species", "age"], text)
    found = evaluate(models / "multi_task", table)  # the columns of the model
    expected = by_one_process["multi_task"]
    assert found["num_images"] == 2 * NUM_IMAGES
    for task in ("species", "age"):
        assert found[f"{task}_num_images"] == 2 * expected[f"{task}_num_images"]
        assert found[f"{task}_loss"] == close(expected[f"{task}_loss"])
    with raises_one_line("multi_task", "`label_column`"):
        evaluate(models / "multi_task", table, label_column=("age",))
    reset_accelerate()
    options = EvaluateOptions(
        model=str(models / "multi_task"), dataset=str(table), per_image=tmp_path / "rows.parquet"
    )
    with raises_one_line("`per_image`"):
        evaluate_checkpoint(options)


def test_a_table_has_the_metrics_of_the_same_images_in_memory(
    models: Path, tmp_path: Path, by_one_process: dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    table = write_table(tmp_path, "single", ["animal"], lambda label: [CLASSES[label]])
    found = evaluate(models / "single", table, label_column=("animal",))
    assert found["num_images"] == 2 * NUM_IMAGES
    for name in ("accuracy", "cls_accuracy", "loss"):
        assert found[name] == close(by_one_process["single"][name])
    printed = capsys.readouterr().out
    assert "100%" not in printed  # progress is shown on terminals only


def test_the_files_are_written_before_the_table_is_printed(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`vitcls evaluate ... | head` ends when it prints more than is read."""

    def fail(*args: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(evaluate_module, "print_results", fail)
    table = write_table(tmp_path, "single", ["animal"], lambda label: [CLASSES[label]])
    options = EvaluateOptions(
        model=str(models / "single"),
        dataset=str(table),
        label_column=("animal",),
        num_workers=0,
        output=tmp_path / "results.json",
        per_image=tmp_path / "images.parquet",
    )
    with pytest.raises(BrokenPipeError):
        evaluate_checkpoint(options)
    assert (tmp_path / "results.json").exists()
    assert (tmp_path / "images.parquet").exists()


def test_the_results_describe_the_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A gray model classifies gray images of shade 40 * index.

    A color image is unreadable for this model.
    """
    names = ["[b]dark", "light"]
    labels = LabelSpace("single_label_classification", {"label": names})
    fields = SIZES | {"image_size": (16, 24), "num_channels": 1} | labels.to_config_values()
    model = type(build_classifier("single"))(ViTCLSConfig(**fields)).eval()
    model.save_pretrained(tmp_path / "model")
    processor = ViTCLSImageProcessor(
        size={"height": 16, "width": 24}, do_convert_rgb=False, image_mean=0.5, image_std=0.5
    )
    processor.save_pretrained(tmp_path / "model")
    set_resize(processor, "pad", (16, 24))
    images = [Image.new("L", (32, 16), 40 * index) for index in range(6)]
    data = tmp_path / "data"
    output = tmp_path / "results.json"
    for index, image in enumerate([*images, Image.new("RGB", (16, 16))]):
        folder = data / ("validation" if index else "train") / names[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{index}.png")
    options = EvaluateOptions(
        model=str(tmp_path / "model"),
        dataset=str(data),
        num_workers=0,
        max_unreadable_images=1,
        split="validation",
        resize="pad",
        batch_size=4,
        mixed_precision="bf16",
        output=output,
        per_image=tmp_path / "rows.parquet",
    )
    clock = SimpleNamespace(perf_counter=iter([10.0, 10.0043] * 2).__next__)
    monkeypatch.setattr(evaluate_module, "time", clock)
    results = evaluate_checkpoint(options)
    assert json.loads(output.read_text(encoding="utf-8")) == results

    accelerator = build_accelerator(mixed_precision="bf16")
    pixel_values = processor(images[1:], return_tensors="pt")["pixel_values"].to(accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        logits = model.to(accelerator.device)(pixel_values).logits.cpu()
    targets = torch.tensor([1, 0, 1, 0, 1])
    is_correct = (logits.argmax(1) == targets).tolist()
    assert 0 < sum(is_correct) < 5

    expected = {
        "model": options.model,
        "dataset": str(data),
        "split": "validation",
        "num_left_out_images": 0,
        "images_per_second": 1162.8,
        "seconds": 0.0,
        "device": describe_device(accelerator),
        "mixed_precision": "bf16",
        "num_processes": 1,
        "versions": get_versions(),
        "accuracy": np.mean(is_correct),
        "loss": close(torch.nn.functional.cross_entropy(logits.float(), targets).item()),
        "num_images": 5,
        "num_unreadable_images": 1,
    }
    assert results | expected == results

    printed = capsys.readouterr().out
    (warning,) = (line for line in printed.splitlines() if line.startswith("WARNING: "))
    assert "[b]dark/6.png' has 3 channels, but the model requires 1" in warning


def test_two_processes_evaluate_a_saved_model(
    two_process_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    two = read_json(two_process_folder / "new" / "digits.json")
    one = evaluate_digits(two_process_folder)
    assert (two["num_processes"], one["num_processes"]) == (2, 1)
    assert two["num_images"] == NUM_DIGITS
    assert "100%" in capsys.readouterr().out
    # depends on the batches' rounding
    for key in ("calibration_error", "calibration_error_by_chance"):
        assert two.pop(key) == close(one.pop(key))
    assert {**two, **dict.fromkeys(MEASURED)} == {**one, **dict.fromkeys(MEASURED)}
    assert two.keys() >= {
        "model",
        "dataset",
        "split",
        "images_per_second",
        "versions",
        "per_class",
        "accuracy",
    }

    printed = (two_process_folder / "stdout").read_text(encoding="utf-8")
    assert f"{two['accuracy']:.2%}" in printed
    assert "digits.json" in printed
    # no partial file
    assert [file.name for file in (two_process_folder / "new").iterdir()] == ["digits.json"]


def test_an_unfinished_run_names_resume(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with raises_one_line("vitcls finetune ... --resume"):
        evaluate_checkpoint(EvaluateOptions(model=str(tmp_path), dataset="digits"))


def test_a_regression_is_an_error(tmp_path: Path) -> None:
    config = ViTCLSConfig(**SIZES, problem_type="regression", num_labels=1)
    type(build_classifier("single"))(config).save_pretrained(tmp_path)
    ViTCLSImageProcessor(size=16).save_pretrained(tmp_path)
    with raises_one_line("regression"):
        evaluate_checkpoint(EvaluateOptions(model=str(tmp_path), dataset="digits"))


def test_only_models_of_several_labels_use_the_columns_in_their_results(tmp_path: Path) -> None:
    options = DataOptions(dataset="data")
    tags = ViTCLSConfig(problem_type="multi_label_classification")
    tags.save_pretrained(tmp_path)

    assert set_label_columns(options, tags, ModelFolder(tmp_path)) == options  # no results.json

    for columns, expected in ((["tags"], ("tags",)), (None, None)):
        write_json(tmp_path / "results.json", {"label_column": columns, "label_separator": ";"})
        found = set_label_columns(options, tags, ModelFolder(tmp_path))
        assert (found.label_column, found.label_separator) == (expected, ";")

    folder = ModelFolder(tmp_path)
    assert set_label_columns(options, ViTCLSConfig(), folder) == options

    given = DataOptions(dataset="data", label_column=("other",))
    assert set_label_columns(given, tags, folder) == given
