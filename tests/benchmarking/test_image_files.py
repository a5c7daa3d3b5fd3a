"""Comparisons that begin with image files: pixel values, and `vitcls predict` against the pipeline."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny_models import raises_one_line
from PIL import Image

from modeling_vitcls.benchmarking import image_files
from modeling_vitcls.benchmarking.comparison import BenchmarkSettings
from modeling_vitcls.benchmarking.image_files import (
    PIXEL_ROWS,
    PREDICTION_ROWS,
    PredictionProcess,
    build_image_processors,
    build_pipeline_predictor,
    compare_processors,
    write_benchmark_files,
    write_photographs,
)
from modeling_vitcls.benchmarking.peers import TOY_SIZE
from modeling_vitcls.benchmarking.work import run_benchmarks


TOY_SETTINGS = BenchmarkSettings(("timm",), 1, is_toy=True)


def test_a_process_replies_to_each_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One JSON line per request: the labels of all files, and the images per second."""
    batch_sizes = []

    def predict(batch_size: int) -> list[tuple[str, float]]:
        batch_sizes.append(batch_size)
        return [("cat", 0.5), ("dog", 0.25)]

    write_benchmark_files(tmp_path, is_toy=True)
    monkeypatch.setitem(image_files.PREDICTORS, "theirs", lambda size, folder: predict)
    measured = []

    def measure(run: Any, *arguments: Any) -> float:
        measured.append((run(), *arguments))
        return 7.5

    monkeypatch.setattr(image_files, "measure_throughput", measure)
    monkeypatch.setattr(sys, "argv", ["image_files", "theirs", str(tmp_path), "--toy"])
    monkeypatch.setattr(sys, "stdin", ["labels 16\n", "speed 4\n"])
    image_files.main()
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert replies == [[["cat", 0.5], ["dog", 0.25]], 7.5]
    assert batch_sizes == [16, 4] and measured[0][1:] == (4, 0.0)  # 4 files, and a single call


def test_pixels_that_differ_are_not_compared(tmp_path: Path) -> None:
    files = write_benchmark_files(tmp_path, is_toy=True)
    ours, theirs = build_image_processors(TOY_SIZE, tmp_path)
    name, row = next(iter(PIXEL_ROWS.items()))
    ours.resample = 3
    with raises_one_line(name, "the pixel values differ"):
        compare_processors(name, row, files, ours, theirs, TOY_SETTINGS)


@pytest.mark.parametrize("name", ["one file", "lists of 16 files, as paths for both image processors"])
def test_each_call_processes_all_files_in_batches(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = PIXEL_ROWS[name]
    files = write_benchmark_files(tmp_path, is_toy=True) * (5 if row.num_files == 16 else 1)
    assert len(files) == (20 if row.num_files == 16 else 4)
    ours, theirs = build_image_processors(TOY_SIZE, tmp_path)
    calls: dict[str, list[Any]] = {"ours": [], "theirs": []}

    def record(side: str, processor: Any) -> Any:
        def process(batch: list[Any], **kwargs: Any) -> Any:
            calls[side].append([getattr(image, "filename", image) for image in batch])
            return processor(batch, **kwargs)

        return process

    sides = record("ours", ours), record("theirs", theirs)
    found = compare_processors(name, row, files, *sides, TOY_SETTINGS)
    batches = [files[:16], files[16:]] if row.num_files == 16 else [[file] for file in files]
    num_calls = 2 + 2  # two checks, a warm-up and a measurement
    assert calls == {"ours": batches * num_calls, "theirs": batches * num_calls}
    assert found.details["num_files"] == len(files)

    def compare_sides(ours: Any, theirs: Any, num_images: int, settings: BenchmarkSettings) -> Any:
        assert num_images == len(files)
        for run, expected in ((ours, {"ours": batches, "theirs": []}), (theirs, {"ours": [], "theirs": batches})):
            calls.update(ours=[], theirs=[])
            run()
            assert calls == expected
        return [3.0], [2.0]

    monkeypatch.setattr(image_files, "compare_throughput", compare_sides)
    assert compare_processors(name, row, files, *sides, TOY_SETTINGS).ratios == [1.5]


def test_the_pipeline_predicts_sorted_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both programs must return the labels in the same order, whatever the file system lists first."""
    write_benchmark_files(tmp_path, is_toy=True)
    list_files = Path.rglob
    predictions = []
    for is_reversed in (False, True):
        monkeypatch.setattr(
            Path, "rglob", lambda *arguments, reverse=is_reversed: sorted(list_files(*arguments), reverse=reverse)
        )
        predictions.append(build_pipeline_predictor(TOY_SIZE, tmp_path)(2))
    assert predictions[0] == predictions[1] and len({score for _, score in predictions[0]}) == 4


def test_vitcls_predict_is_compared_with_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two processes are replaced by their functions in this process, and the speeds by constants."""
    requests: list[tuple[Any, ...]] = []
    predictors: list[Any] = []

    class Process:
        def __init__(self, program: str, folder: str, settings: BenchmarkSettings) -> None:
            self.program = program
            self.predict = image_files.PREDICTORS[program](TOY_SIZE, Path(folder))

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

        def request(self, request_kind: str, batch_size: int) -> Any:
            requests.append((self.program, request_kind, batch_size))
            return self.predict(batch_size) if request_kind == "labels" else {"ours": 3.0, "theirs": 2.0}[self.program]

    monkeypatch.setattr(image_files, "PredictionProcess", Process)
    monkeypatch.setattr(image_files, "get_num_workers", lambda: 3)
    build = image_files.Predictor
    monkeypatch.setattr(
        image_files, "Predictor", lambda *arguments: predictors.append(build(*arguments)) or predictors[-1]
    )
    results = list(run_benchmarks(("prediction",), (), TOY_SETTINGS))
    assert [(predictor.batch_size, predictor.num_workers) for predictor in predictors] == [(16, 3), (1, 3)]
    assert [result.name for result in results] == list(PREDICTION_ROWS)
    for result in results:
        assert result.ratios == [1.5] and 0 < result.difference < 1e-4
        assert result.details == {"num_files": 4, "size": vars(TOY_SIZE)}
    kinds = [("ours", "labels"), ("theirs", "labels"), ("ours", "speed"), ("theirs", "speed")]
    assert requests == [(*kind, batch_size) for batch_size in (16, 1) for kind in kinds]


@pytest.mark.slow
def test_the_error_of_a_failed_process_is_reported(tmp_path: Path) -> None:
    with (
        PredictionProcess("nobody's", str(tmp_path), TOY_SETTINGS) as process,
        raises_one_line("nobody's failed", "choose from"),
    ):
        process.request("labels", 1)


def test_photographs_are_a_folder_per_label(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path / "photographs", num_images_per_class=4)
    files = sorted(folder.rglob("*.jpg"))
    assert [str(file.relative_to(folder)) for file in files] == [
        f"{name}/00{index}.jpg" for name in ("china", "flower") for index in range(4)
    ]
    pixels = []
    for index, file in enumerate(files):
        with Image.open(file) as image:
            assert (image.format, image.size) == ("JPEG", (500, 375))
            assert ("progressive" in image.info) is (index % 4 == 3)
            pixels.append(np.asarray(image, dtype=int))
    differences = [np.abs(pixels[index] - pixels[index + 1]).mean() for index in range(7)]
    # Other crops, and another photograph
    assert all(difference > (50 if index == 3 else 5) for index, difference in enumerate(differences))
