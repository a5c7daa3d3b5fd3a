"""Prediction: scripts/predict.py and its modules.

Most runs use the test process. Slow tests start real processes: a run that is killed and resumed by
two processes.
"""

import csv
import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn.datasets
import torch
from helpers import prediction_photos
from helpers.accelerate_state import reset_accelerate
from helpers.prediction_photos import predict, sorted_photos
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import build_tiny_config, raises_one_line, randomize
from helpers.warm_processes import OFFLINE, READY, run_script, run_together
from PIL import Image
from transformers import pipeline

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.cli import functions
from modeling_vitcls.inference import predict as predict_module
from modeling_vitcls.inference.options import PredictOptions
from modeling_vitcls.inference.predict import PredictionCounts, compute_model_digest, predict_images
from modeling_vitcls.inference.shards import merge_shards
from modeling_vitcls.runtime import distributed
from modeling_vitcls.runtime.distributed import build_accelerator


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

NAMES = ["ant", "bee", "cat"]
LABELS = {
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: index for index, name in enumerate(NAMES)},
}
TOKENS = {"num_cls_tokens": 1, "num_distillation_tokens": 2, "num_register_tokens": 3}
TASKS = {"species": ["ash", "elm", "fir", "oak"], "age": ["young", "old"]}
KINDS = {
    "one_label": lambda: ViTCLSForImageClassification(build_tiny_config(**TOKENS, **LABELS)),
    "several_labels": lambda: ViTCLSForImageClassification(
        build_tiny_config(problem_type="multi_label_classification", **LABELS)
    ),
    "several_tasks": lambda: ViTCLSForMultiTaskClassification(
        build_tiny_config(num_cls_tokens=2, tasks=TASKS)
    ),
    "encoder": lambda: ViTCLSModel(build_tiny_config(**TOKENS)),
    "masked": lambda: ViTCLSForMaskedImageModeling(build_tiny_config()),
}
NUM_STREAMED = 1000
photos = prediction_photos.photos  # a fixture


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of small models with random weights, one of each kind."""
    folder = tmp_path_factory.mktemp("models")
    for name, build in KINDS.items():
        randomize(build()).save_pretrained(folder / name)
        ViTCLSImageProcessor(size=32).save_pretrained(folder / name)
    return folder


@pytest.fixture
def unreadable(tmp_path: Path, photos: Path) -> Path:
    """Return a folder with one readable image, a truncated image and a text file."""
    folder = tmp_path / "broken"
    folder.mkdir()
    whole = (photos / "a.jpg").read_bytes()
    (folder / "1-whole.jpg").write_bytes(whole)
    (folder / "2-cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "3-text.png").write_text("no image", encoding="utf-8")
    return folder


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def read_shards(folder: Path) -> list[dict[str, Any]]:
    """Return all rows of a folder, in the order of its files."""
    return [
        row
        for file in sorted(folder.glob("shard-*.parquet"))
        for row in pq.read_table(file).to_pylist()
    ]


def pixel_values(photos: Path) -> torch.Tensor:
    """Return the preprocessed photographs, [9, 3, 32, 32]."""
    return ViTCLSImageProcessor(size=32)(sorted_photos(photos), return_tensors="pt")["pixel_values"]


# Labels -------------------------------------------------------------------------------------------


def test_the_table_contains_images_labels_and_errors(
    models: Path, unreadable: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_in_process("predict.py", "--model", models / "one_label", unreadable) == 0
    printed = capsys.readouterr()
    first, second, third = [line for line in printed.out.splitlines() if str(unreadable) in line]
    assert f"{unreadable}/1-whole.jpg" in first
    assert any(name in first for name in NAMES)
    assert "2-cut.jpg" in second
    assert "truncated" in second.lower()
    assert "3-text.png" in third
    assert "not an image in a supported format" in third
    assert not printed.err


def test_without_any_prediction_the_status_is_1(
    models: Path, unreadable: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = [unreadable / name for name in ("2-cut.jpg", "3-text.png", "absent.jpg")]
    flags = ["--model", models / "one_label", *images, "--output", tmp_path / "out.json"]
    assert run_in_process("predict.py", *flags) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert (
        last == "error: none of the 3 images has a prediction. See the column `error` in the output"
    )
    rows = read_json(tmp_path / "out.json")
    assert [row["label"] for row in rows] == [None] * 3
    assert "No such file" in rows[2]["error"]


def test_labels_equal_those_of_the_model_and_the_pipeline(
    models: Path, photos: Path, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "folder" / "out.JSON"
    predict_images(
        PredictOptions(
            str(models / "one_label"), (str(photos),), output=output, top_k=2, batch_size=4
        )
    )
    rows = read_json(output)

    assert [row["image"] for row in rows] == sorted_photos(photos)
    assert [row["index"] for row in rows] == list(range(9))

    expected = pipeline("image-classification", str(models / "one_label"), top_k=2)(
        sorted_photos(photos)
    )
    for row, answer in zip(rows, expected, strict=True):
        assert [row["label"], row["label_2"]] == [one["label"] for one in answer]
        assert [row["probability"], row["probability_2"]] == pytest.approx(
            [one["score"] for one in answer], abs=1e-5
        )
        assert row["error"] is None


def test_there_are_columns_for_the_three_labels_of_the_model(
    models: Path, unreadable: Path, tmp_path: Path
) -> None:
    options = PredictOptions(
        str(models / "one_label"), (str(unreadable),), output=tmp_path / "out.json", top_k=7
    )
    assert predict_images(options) == PredictionCounts(num_images=3, num_failed=2)
    assert list(read_json(tmp_path / "out.json")[0]) == [
        *(
            "index",
            "image",
            "label",
            "probability",
            "label_2",
            "probability_2",
            "label_3",
            "probability_3",
            "error",
        )
    ]

    output = tmp_path / "a.parquet"
    encoder = str(models / "encoder")
    predict_images(
        PredictOptions(encoder, (str(unreadable),), output=output, features=("registers",))
    )
    assert [row is None for row in pq.read_table(output)["features"].to_pylist()] == [
        False,
        True,
        True,
    ]


def test_several_tasks_have_separate_columns(models: Path, photos: Path, tmp_path: Path) -> None:
    options = PredictOptions(
        str(models / "several_tasks"),
        (str(photos),),
        output=tmp_path / "out.parquet",
        top_k=3,
        batch_size=5,
    )
    predict_images(options)

    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names[2:6] == [
        "age_label",
        "age_probability",
        "age_label_2",
        "age_probability_2",
    ]
    assert table.column_names[6:-1:2] == ["species_label", "species_label_2", "species_label_3"]

    model = ViTCLSForMultiTaskClassification.from_pretrained(models / "several_tasks")
    with torch.no_grad():
        logits = model(pixel_values(photos)).logits
    for task, names in TASKS.items():
        probability, index = logits[task].softmax(dim=1).max(dim=1)
        assert table[f"{task}_label"].to_pylist() == [names[one] for one in index]
        np.testing.assert_allclose(table[f"{task}_probability"], probability, atol=1e-6)


def test_several_labels_are_predicted_from_the_threshold(
    models: Path, photos: Path, tmp_path: Path
) -> None:
    model = ViTCLSForImageClassification.from_pretrained(models / "several_labels")
    with torch.no_grad():
        probabilities = model(pixel_values(photos)).logits.sigmoid()
    threshold = probabilities.median().item()
    rows = predict(model, ViTCLSImageProcessor(size=32), photos, threshold=threshold)

    assert [set(row["labels"]) for row in rows] == [
        {NAMES[label] for label in range(3) if image[label] >= threshold} for image in probabilities
    ]
    assert {len(row["labels"]) for row in rows} != {3}
    assert all(row["probabilities"] == sorted(row["probabilities"], reverse=True) for row in rows)

    best = predict(model, ViTCLSImageProcessor(size=32), photos, threshold=0, top_k=1)
    assert [row["labels"] for row in best] == [
        [NAMES[label]] for label in probabilities.argmax(dim=1)
    ]

    options = PredictOptions(
        str(models / "several_labels"), (str(photos),), output=tmp_path / "a.csv", threshold=1
    )
    predict_images(options)
    assert [row["labels"] for row in csv.DictReader((tmp_path / "a.csv").open())] == [""] * 9


# Features -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "kind"), [("one_label", "cls"), ("encoder", "mean"), ("encoder", "registers")]
)
def test_features_equal_the_tokens_of_the_model(
    models: Path, photos: Path, tmp_path: Path, source: str, kind: str
) -> None:
    output = tmp_path / ("out.parquet" if source == "encoder" else "out.json")
    predict_images(
        PredictOptions(
            str(models / source), (str(photos),), output=output, features=(kind,), batch_size=9
        )
    )
    rows = read_json(output) if output.suffix == ".json" else pq.read_table(output).to_pylist()
    model = ViTCLSModel.from_pretrained(models / source)
    # The last layer computes only the special tokens up to those of the feature.
    num_tokens = None if kind == "mean" else getattr(model.config.token_layout, kind).stop
    with torch.no_grad():
        tokens = model(pixel_values(photos), num_output_tokens=num_tokens).tokens
    group = tokens["patches"].mean(dim=1) if kind == "mean" else tokens[kind]
    expected = group[:, 0] if kind == "cls" else group
    measured = np.array([row["features"] for row in rows], dtype=np.float32)

    # A classifier computes fewer tokens in its last layer, which changes the order of sums.
    np.testing.assert_allclose(measured, expected.numpy(), rtol=0, atol=1e-6)
    assert rows[0].keys() == {"index", "image", "features", "error"}


def test_features_of_any_layer_are_those_after_the_final_norm(
    models: Path, photos: Path, tmp_path: Path
) -> None:
    """Layers are outputs after the final norm, if there is one. The last layer is the default."""
    names = ("cls", "cls@1", "mean@2", "patches")
    options = PredictOptions(
        str(models / "encoder"),
        (str(photos),),
        features=names,
        feature_dtype="float16",
        output=tmp_path / "out.parquet",
        batch_size=9,
    )
    predict_images(options)
    table = pq.read_table(options.output)
    model = ViTCLSModel.from_pretrained(models / "encoder")
    with torch.no_grad():
        outputs = model(pixel_values(photos), output_hidden_states=True)
        first = model.layernorm(outputs.hidden_states[1])
    last = outputs.tokens["patches"]

    for name, values in zip(
        names, (outputs.tokens["cls"][:, 0], first[:, 0], last.mean(1), last), strict=True
    ):
        found = np.array(table[name].to_pylist())
        assert found.dtype == np.float16 or str(table.schema.field(name).type).count("halffloat")
        np.testing.assert_array_equal(found.astype(np.float16), values.half().numpy())
    for wrong in ("cls@0", "cls@3"):
        with raises_one_line(f"`features={wrong!r}`", "cls@2"):
            predict(model, ViTCLSImageProcessor(size=32), photos, features=wrong)

    model = ViTCLSModel(build_tiny_config(final_norm=False))
    (row,) = predict(
        model, ViTCLSImageProcessor(size=32), photos / "a.jpg", features=["cls", "cls@2"]
    )
    np.testing.assert_array_equal(row["cls"], row["cls@2"])
    with raises_one_line("`features='registers'`", "cls, mean"):
        predict(model, ViTCLSImageProcessor(size=32), photos, features="registers")


# Inputs -------------------------------------------------------------------------------------------


def test_datasets_are_read_like_files(models: Path, photos: Path, tmp_path: Path) -> None:
    """Check a CSV file of relative paths, and Parquet with embedded images, also as a stream."""
    paths = sorted_photos(photos)
    lines = [str(Path(path).relative_to(photos)) for path in paths]
    (photos / "list.csv").write_text("\n".join(["file_name", *lines]), encoding="utf-8")
    encoded = [{"bytes": Path(path).read_bytes(), "path": None} for path in paths]
    table = datasets.Dataset.from_dict({"other": [b"x"] * 9, "photo": encoded})
    table.cast_column("photo", datasets.Image()).to_parquet(tmp_path / "images.parquet")
    expected = None

    for given in (
        {"paths": (str(photos),)},
        {"dataset": str(photos / "list.csv")},
        {"dataset": str(tmp_path / "images.parquet"), "image_column": "photo"},
        {"dataset": str(tmp_path / "images.parquet"), "image_column": "photo", "streaming": True},
    ):
        output = tmp_path / "out.json"
        predict_images(
            PredictOptions(str(models / "one_label"), output=output, batch_size=4, **given)
        )
        reset_accelerate()
        answers = [(row["index"], row["label"], row["probability"]) for row in read_json(output)]
        expected = expected or answers
        assert answers == expected
    assert len(expected or []) == 9

    options = PredictOptions("model", **given)  # the stream
    source = predict_module.open_input(options)
    with raises_one_line("`streaming=True`", "`output`"):
        predict_module.predict_to_file(options, SimpleNamespace(num_processes=2), source, None)


# Folders of shards --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Parquet file of a thousand digits, of which every hundredth is unreadable."""
    values = []
    for index, image in enumerate(sklearn.datasets.load_digits().images[:NUM_STREAMED]):
        encoded = io.BytesIO()
        Image.fromarray((image * 15).astype(np.uint8)).save(encoded, format="PNG")
        values.append(
            {"bytes": encoded.getvalue() if index % 100 else b"broken", "path": f"{index}.png"}
        )
    file = tmp_path_factory.mktemp("streamed") / "digits.parquet"
    datasets.Dataset.from_dict({"image": values}).cast_column("image", datasets.Image()).to_parquet(
        file
    )
    return file


@pytest.mark.slow
@pytest.mark.parametrize("is_streaming", [False, True])
def test_a_killed_job_is_continued(
    models: Path, streamed: Path, tmp_path: Path, is_streaming: bool
) -> None:
    """The result must equal that of one uninterrupted run.

    A stream continues from the state in its last shard.
    """
    flags = [
        "--model",
        models / "encoder",
        "--dataset",
        streamed,
        "--features",
        "cls",
        "--shard-size",
        30,
    ]
    flags += ["--batch-size", 8, *(["--streaming"] if is_streaming else [])]
    folder = tmp_path / "features"
    log = tmp_path / "killed"
    words = [str(word) for word in (*flags, "--output", folder)]
    process = READY.Process(target=run_script, args=("predict.py", words, log, log, OFFLINE))
    process.start()
    while len(list(folder.glob("shard-*"))) < 3 and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("shard-*")}
    assert 3 <= len(before) < 34, "it was not killed in the middle"
    with raises_one_line(str(folder), "lacks"):
        merge_shards(folder, None)

    processes = 1 if is_streaming else 2
    how = {"log": tmp_path / "log", "environment": OFFLINE, "processes": processes}
    printed = run_together("predict.py", *flags, "--output", folder, **how)
    assert printed == f"{folder}: 1,000 images, 10 without a prediction\n"
    assert all((folder / name).stat().st_mtime_ns == written for name, written in before.items())
    whole = tmp_path / "whole"
    options = {"features": ("cls",), "shard_size": 30, "batch_size": 8, "output": whole}
    predict_images(PredictOptions(str(models / "encoder"), dataset=str(streamed), **options))
    merged = []
    for part in (folder, whole):
        assert "1,000 images" in merge_shards(part, part.with_suffix(".jsonl"))
        merged.append(
            [json.loads(line) for line in part.with_suffix(".jsonl").read_text().splitlines()]
        )
    assert [row["index"] for row in merged[0]] == list(range(NUM_STREAMED))
    assert merged[0] == merged[1]


def test_processes_take_batches_and_shards_in_turn(
    models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process of three predicts every third batch.

    In the second job of two, it writes every sixth file.
    """
    # processes are not in order
    monkeypatch.setattr(predict_module, "gather_object", lambda rows: rows[::-1])
    options = PredictOptions(
        str(models / "one_label"), (str(photos),), output=tmp_path / "a.jsonl", batch_size=2
    )
    source = predict_module.open_input(options)
    predictor = predict_module.build_predictor(options, build_accelerator())
    for is_main, output in ((True, tmp_path / "a.jsonl"), (False, tmp_path / "b.jsonl")):
        process = SimpleNamespace(
            num_processes=3, process_index=1, is_main_process=is_main, mixed_precision="no"
        )
        predict_module.predict_to_file(replace(options, output=output), process, source, predictor)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()

    assert [json.loads(line)["index"] for line in lines] == [2, 3, 8]
    assert not output.exists()

    process.is_main_process = True  # computes the fingerprint
    folder = replace(options, output=tmp_path / "folder", shard="2/2", shard_size=1)
    assert predict_module.predict_to_folder(folder, process, source, predictor) == PredictionCounts(
        1, 0
    )
    assert [file.name for file in folder.output.iterdir()] == ["shard-000004.parquet"]


@pytest.mark.slow
def test_two_processes_write_the_same_file_as_one(
    models: Path, streamed: Path, tmp_path: Path
) -> None:
    flags = ["--model", models / "one_label", "--dataset", streamed, "--batch-size", 30]
    for processes, name in ((1, "one.csv"), (2, "two.csv")):
        how = {"log": tmp_path / f"{name}.log", "environment": OFFLINE, "processes": processes}
        printed = run_together("predict.py", *flags, "--output", tmp_path / name, **how)
        assert printed == f"{tmp_path / name}: 1,000 images, 10 without a prediction\n"
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


def test_array_jobs_write_every_shard_once(
    models: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Three jobs of one process write the features of one job. Missing shards are named."""
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    rows = {}
    folder = tmp_path / "jobs"

    for output, shards in ((tmp_path / "whole", [None]), (folder, ["1/3", "3/3", "2/3"])):
        for shard in shards:
            if shard == "2/3":
                with raises_one_line(str(folder), "shard-000001.parquet, shard-000004.parquet"):
                    merge_shards(folder, tmp_path / "out.csv")
            options = {"output": output, "shard_size": 2, "shard": shard, "features": ("cls",)}
            predict_images(PredictOptions(str(models / "encoder"), (str(photos),), **options))
            assert "100%" in capsys.readouterr().err
            reset_accelerate()
        assert f"{tmp_path / 'out.jsonl'}: 9 images, 0 without" in merge_shards(
            output, tmp_path / "out.jsonl"
        )
        rows[output] = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    assert rows[folder] == rows[tmp_path / "whole"]

    flags = ["--merge", folder, "--output", tmp_path / "merged.csv"]
    assert run_in_process("predict.py", *flags) == 0
    assert len(list(csv.DictReader((tmp_path / "merged.csv").open()))) == 9
    with raises_one_line("`merge`"):
        merge_shards(tmp_path / "absent", None)


@pytest.mark.parametrize("num_files", [1, 4])
def test_a_stream_is_divided_among_jobs_and_continued(
    models: Path, streamed: Path, tmp_path: Path, num_files: int
) -> None:
    """With four files, two jobs read two files each.

    With one file, each job reads every other row.
    """
    table = datasets.load_dataset("parquet", data_files=str(streamed), split="train").select(
        range(21)
    )
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(num_files):
        table.shard(num_files, index).to_parquet(folder / f"{index}.parquet")
    output = tmp_path / "labels"
    options = {"dataset": str(folder), "streaming": True, "output": output, "shard_size": 4}

    for shard in ("1/2", "2/2"):
        predict_images(PredictOptions(str(models / "one_label"), shard=shard, **options))
        reset_accelerate()
    expected = {row["image"]: (row["index"], row["label"]) for row in read_shards(output)}
    assert len(expected) == 21
    assert len({row["index"] for row in read_shards(output)}) == 21

    files = sorted(output.glob("shard-0001-*"))
    written = set(output.iterdir())
    kept = files[0].read_bytes()

    for file in files[1:]:
        file.unlink()
    with raises_one_line("lacks", "shard-0001-000001.parquet"):
        merge_shards(output, None)

    for shard in ("1/2", "2/2"):  # the first job was finished
        predict_images(PredictOptions(str(models / "one_label"), shard=shard, **options))
        reset_accelerate()
    assert {row["image"]: (row["index"], row["label"]) for row in read_shards(output)} == expected
    assert set(output.iterdir()) == written
    assert files[0].read_bytes() == kept
    assert f"{output}: 21 images, 1 without" in merge_shards(output, None)


@pytest.mark.parametrize(
    ("num_cores", "num_processes", "expected"),
    [(4, "1", 4), (32, "1", 8), (32, "16", 2), (2, "4", 1), (None, "1", 1)],
)
def test_threads_are_divided_among_the_processes(
    num_cores: int | None, num_processes: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", num_processes)
    assert predict_module.get_num_workers() == expected


def test_a_second_start_must_have_the_same_options(
    models: Path, photos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "labels"

    def again(model: str = "one_label", path: Path = photos, **others: Any) -> PredictionCounts:
        reset_accelerate()
        options: dict[str, Any] = {"shard_size": 4, **others}
        return predict_images(
            PredictOptions(str(models / model), (str(path),), output=folder, **options)
        )

    assert again() == PredictionCounts(9, 0)
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(written) == 3
    for change, words in {
        "`shard_size`": {"shard_size": 5},
        "`threshold`": {"threshold": 0.6},
        "`top_k`": {"top_k": 2},
        "`features`": {"features": ("mean",)},
        "`feature_dtype`": {"feature_dtype": "float16"},
        "`mixed_precision`": {"mixed_precision": "bf16"},
        "another model": {"model": "several_labels"},
        "another input": {"path": photos / "inner"},
    }.items():
        with raises_one_line(f"`output='{folder}'`", change):
            again(**words)
    with raises_one_line("another model"):  # other preprocessing
        again(fit="crop")
    assert again(batch_size=3, num_workers=1) == PredictionCounts(9, 0)  # may change
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written

    (folder / "shard-000001.parquet").unlink()
    unfinished = folder / ".shard-000001.parquet.7.unfinished"
    unfinished.write_bytes(b"half a file")
    os.utime(unfinished, (0, 0))  # of a process that was killed long ago
    kept = {file: file.stat().st_mtime_ns for file in folder.glob("shard-*")}
    assert again() == PredictionCounts(9, 0)
    assert {
        file: file.stat().st_mtime_ns for file in kept
    } == kept  # only the missing shard is written
    assert [row["index"] for row in read_shards(folder)] == list(range(9))
    assert len(list(folder.iterdir())) == 3
    shard = folder / "shard-000001.parquet"
    table = pq.read_table(shard)
    fields = json.loads(pq.read_schema(shard).metadata[b"vitcls"])
    assert fields["settings"]["mixed_precision"] == "no"  # of the accelerator
    for change, words in (({"images": 3}, "4 of 3 rows"), ({"settings": {}}, "other flags")):
        pq.write_table(
            table.replace_schema_metadata({"vitcls": json.dumps(fields | change)}), shard
        )
        with raises_one_line(str(shard), words):
            merge_shards(folder, None)
    pq.write_table(table, shard)
    (folder / "shard-000002.parquet").write_bytes(b"half")
    with raises_one_line("shard-000002.parquet", "Delete the file"):
        again()


def test_a_model_is_identified_by_everything_that_affects_predictions() -> None:
    """Otherwise, a folder could contain predictions of different models."""

    def build(processor_size: int = 32, **fields: Any) -> str:
        model = randomize(ViTCLSForImageClassification(build_tiny_config(**LABELS | fields)))
        return compute_model_digest(
            model.train("training" in fields), ViTCLSImageProcessor(size=processor_size)
        )

    digest = build()
    assert build() == digest
    renamed = {
        "id2label": {0: "bee", 1: "ant", 2: "cat"},
        "label2id": {"bee": 0, "ant": 1, "cat": 2},
    }
    assert digest not in {build(processor_size=48), build(**renamed), build(num_register_tokens=1)}
    tasks = [{"age": ["old", "young"]}, {"age": ["young", "old"]}]
    models = [
        randomize(ViTCLSForMultiTaskClassification(build_tiny_config(tasks=names)))
        for names in tasks
    ]
    assert (
        len({compute_model_digest(model, ViTCLSImageProcessor(size=32)) for model in models}) == 2
    )
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**LABELS)))
    model.classifier.bias.data[2] += 1e-6
    assert compute_model_digest(model, ViTCLSImageProcessor(size=32)) != digest


def test_a_folder_with_other_files_is_an_error(models: Path, photos: Path, tmp_path: Path) -> None:
    options = PredictOptions(
        str(models / "one_label"), (str(photos / "a.jpg"),), output=tmp_path / "out"
    )
    predict_images(options)  # also next to shards
    for folder, name in ((tmp_path / "empty", "table.parquet"), (tmp_path / "out", "shard-1.tex")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("", encoding="utf-8")
        with raises_one_line("contains other files"):
            predict_images(replace(options, output=folder))


# Models -------------------------------------------------------------------------------------------


def test_models_without_labels_are_a_one_line_error(
    models: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    lost = tmp_path / "lost"
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    weights = {
        name: value for name, value in model.state_dict().items() if "classifier" not in name
    }
    model.save_pretrained(lost, state_dict=weights)
    (lost / "config.json").write_text(
        json.dumps(read_json(lost / "config.json") | {"architectures": None})
    )
    ViTCLSImageProcessor(size=32).save_pretrained(lost)

    for source, words in {
        models / "encoder": "ViTCLSModel",
        models / "masked": "ViTCLSForMaskedImageModeling",
        lost: "classifier.bias",
        tmp_path: "model.safetensors",
        "vitcls-tiny": "preset",
        tmp_path / "absent": "is not a folder",
    }.items():
        with raises_one_line(words, error=(ValueError, OSError)):
            predict_images(PredictOptions(str(source), (str(photos),)))
        reset_accelerate()
    for fields, problem in (
        ({"num_labels": 0}, "has no classifier"),
        ({"num_labels": 1, "problem_type": "regression"}, "was trained for regression"),
    ):
        with raises_one_line(problem, "--features cls"):
            predict(
                ViTCLSForImageClassification(build_tiny_config(**fields)),
                ViTCLSImageProcessor(size=32),
                photos,
            )


# Python function, and flags -----------------------------------------------------------------------


def test_predict_accepts_images_of_any_kind(models: Path, photos: Path) -> None:
    model = models / "one_label"
    picture = photos / "a.jpg"
    given = [
        str(picture),
        picture,
        picture.read_bytes(),
        Image.open(picture),
        np.asarray(Image.open(picture)),
    ]
    rows = functions.predict(model, [*given, b"broken", photos / "inner"], top_k=2)

    assert [row["image"] for row in rows][:6] == [str(picture), str(picture), "2", "3", "4", "5"]
    assert len({(row["label"], row["probability"], row["label_2"]) for row in rows[:5]}) == 1
    assert "cannot read an image" in rows[5]["error"]
    assert len(rows) == 12

    (alone,) = functions.predict(model, picture)
    assert alone["image"] == str(picture)
    assert alone["label"] == rows[0]["label"]


def test_rows_of_options_have_the_settings_of_the_options(models: Path, photos: Path) -> None:
    source = str(models / "several_labels")
    processor = ViTCLSImageProcessor(size=32)
    model = ViTCLSForImageClassification.from_pretrained(source)
    with torch.no_grad():
        threshold = model(pixel_values(photos)).logits.sigmoid().median().item()
    flags: dict[str, Any] = {"threshold": threshold, "top_k": 2}
    options = PredictOptions(
        source, (str(photos),), mixed_precision="bf16", num_workers=1, batch_size=7, **flags
    )
    predictor = predict_module.build_predictor(options, build_accelerator(mixed_precision="bf16"))

    assert (predictor.num_workers, predictor.batch_size) == (1, 7)

    with torch.autocast("cpu", torch.bfloat16):
        expected = predict(model, processor, photos, **flags)
    assert predict_module.predict_from_options(options, []) == expected
    assert expected != predict(model, processor, photos, **flags)


def test_predictions_are_in_bfloat16_where_it_is_faster(
    models: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "has_bfloat16", lambda device: True)
    monkeypatch.setattr(distributed, "MIN_BFLOAT16_WIDTH", 16)
    source = str(models / "one_label")
    rows, in_bfloat16, in_float32 = (
        functions.predict(source, photos, mixed_precision=precision)
        for precision in ("auto", "bf16", "no")
    )
    assert rows == in_bfloat16 != in_float32


def test_images_of_several_shapes_share_a_batch(photos: Path) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**LABELS)))
    processor = ViTCLSImageProcessor(size={"shortest_edge": 16})
    together = predict(model, processor, photos, batch_size=9)
    for path, row in zip(sorted_photos(photos), together, strict=True):
        (alone,) = predict(model, processor, path)
        assert alone["label"] == row["label"]
        assert alone["probability"] == pytest.approx(row["probability"], abs=1e-5)
