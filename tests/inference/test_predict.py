"""Prediction: scripts/predict.py and its modules.

Most runs use the test process. Two start real processes: a run that is killed and resumed by two processes, and a
mistyped flag.
"""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.datasets
import torch
from accelerate_state import reset_accelerate
from fresh_processes import SCRIPT_ENVIRONMENT
from PIL import Image
from scripts_in_process import SCRIPTS, run_in_process
from tiny_models import build_tiny_config, raises_one_line, randomize
from transformers import pipeline
from warm_processes import OFFLINE, READY, run_script, run_together

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.data.images import ArrayImages
from modeling_vitcls.inference import outputs
from modeling_vitcls.inference import predict as predict_module
from modeling_vitcls.inference.inputs import (
    DatasetInput,
    FetchError,
    ImageRecord,
    ListInput,
    PreparedImage,
    StreamInput,
    build_record,
    open_input,
    prepare_image,
)
from modeling_vitcls.inference.outputs import (
    ShardFolder,
    get_output_columns,
    iterate_shards,
    print_table,
    write_rows,
)
from modeling_vitcls.inference.predict import (
    PredictionCounts,
    compute_model_digest,
    iterate_batches,
    predict,
    predict_images,
)
from modeling_vitcls.options import PredictOptions


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

ENVIRONMENT = os.environ | SCRIPT_ENVIRONMENT
NAMES = ["ant", "bee", "cat"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: index for index, name in enumerate(NAMES)}}
TOKENS = {"num_cls_tokens": 1, "num_distillation_tokens": 2, "num_register_tokens": 3}
TASKS = {"species": ["ash", "elm", "fir", "oak"], "age": ["young", "old"]}
KINDS = {
    "one_label": lambda: ViTCLSForImageClassification(build_tiny_config(**TOKENS, **LABELS)),
    "several_labels": lambda: ViTCLSForImageClassification(
        build_tiny_config(problem_type="multi_label_classification", **LABELS)
    ),
    "several_tasks": lambda: ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS)),
    "encoder": lambda: ViTCLSModel(build_tiny_config(**TOKENS)),
    "masked": lambda: ViTCLSForMaskedImageModeling(build_tiny_config()),
}
NUM_STREAMED = 1000


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of small models with random weights, one of each kind."""
    folder = tmp_path_factory.mktemp("models")
    for name, build in KINDS.items():
        randomize(build()).save_pretrained(folder / name)
        ViTCLSImageProcessor(size=32).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of nine photographs of many kinds, with sub-folders and files that are not images."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "inner").mkdir()
    (folder / ".hidden").mkdir()
    photograph = Image.fromarray(sklearn.datasets.load_sample_images().images[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "a.jpg": ("RGB", {"quality": 60}),
        "b.JPEG": ("RGB", {"quality": 95, "subsampling": 0, "progressive": True}),
        "c.png": ("RGBA", {}),
        "inner/d.jpg": ("L", {}),
        "inner/e.jpg": ("CMYK", {}),
        "inner/f.jpg": ("RGB", {"exif": turned}),
        "inner/g.webp": ("RGB", {}),
        "inner/h.jpg": ("RGB", {"quality": 20, "subsampling": 1}),
        "inner/i.gif": ("P", {}),
    }
    for place, (name, (mode, settings)) in enumerate(kinds.items()):
        left = 40 * place
        crop = photograph.crop((left, 100, left + 101 - place, 177 + place))
        crop.convert(mode).save(folder / name, **settings)
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    photograph.crop((0, 0, 9, 9)).save(folder / ".hidden" / "z.jpg")
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
    return [row for file in sorted(folder.glob("shard-*.parquet")) for row in pq.read_table(file).to_pylist()]


def sorted_photos(photos: Path) -> list[str]:
    return [str(photos / name) for name in ("a.jpg", "b.JPEG", "c.png")] + [
        str(photos / "inner" / name) for name in ("d.jpg", "e.jpg", "f.jpg", "g.webp", "h.jpg", "i.gif")
    ]


def pixel_values(photos: Path) -> torch.Tensor:
    """Return the preprocessed photographs, [9, 3, 32, 32]."""
    return ViTCLSImageProcessor(size=32)(sorted_photos(photos), return_tensors="pt")["pixel_values"]


# Labels --------------------------------------------------------------------------------------------------------------


def test_the_table_contains_images_labels_and_errors(
    models: Path, unreadable: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run_in_process("predict.py", "--model", models / "one_label", unreadable) == 0
    printed = capsys.readouterr()
    first, second, third = [line for line in printed.out.splitlines() if str(unreadable) in line]
    assert f"{unreadable}/1-whole.jpg" in first and any(name in first for name in NAMES)
    assert "2-cut.jpg" in second and "truncated" in second.lower()
    assert "3-text.png" in third and "not an image in a supported format" in third
    assert "3 of 3 images" in printed.err and "2 without a prediction" in printed.err


def test_without_any_prediction_the_status_is_1(
    models: Path, unreadable: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = [unreadable / name for name in ("2-cut.jpg", "3-text.png", "absent.jpg")]
    flags = ["--model", models / "one_label", *images, "--output", tmp_path / "out.json"]
    assert run_in_process("predict.py", *flags) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "error: none of the 3 images has a prediction. See the column `error` in the output"
    rows = read_json(tmp_path / "out.json")
    assert [row["label"] for row in rows] == [None] * 3
    assert "No such file" in rows[2]["error"]


def test_labels_equal_those_of_the_model_and_the_pipeline(models: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "folder" / "out.JSON"
    predict_images(PredictOptions(str(models / "one_label"), (str(photos),), output=output, top_k=2, batch_size=4))
    rows = read_json(output)
    assert [row["image"] for row in rows] == sorted_photos(photos)
    assert [row["index"] for row in rows] == list(range(9))
    expected = pipeline("image-classification", str(models / "one_label"), top_k=2)(sorted_photos(photos))
    for row, answer in zip(rows, expected, strict=True):
        assert [row["label"], row["label_2"]] == [one["label"] for one in answer]
        assert [row["probability"], row["probability_2"]] == pytest.approx([one["score"] for one in answer], abs=1e-5)
        assert row["error"] is None


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_all_formats_have_the_same_contents(models: Path, unreadable: Path, tmp_path: Path, suffix: str) -> None:
    for file in (tmp_path / "out.json", tmp_path / f"out{suffix}"):
        options = PredictOptions(
            str(models / "one_label"), (str(unreadable),), output=file, top_k=7
        )  # of three labels
        assert predict_images(options) == PredictionCounts(num_images=3, num_failed=2)
        reset_accelerate()
    file = tmp_path / f"out{suffix}"
    rows: list[dict[str, Any]]
    if suffix == ".csv":
        rows = [{name: value or None for name, value in row.items()} for row in csv.DictReader(file.open())]
        for row in rows:
            row["index"] = int(row["index"])
            row |= {name: float(value) for name, value in row.items() if value and name.startswith("probability")}
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    else:
        rows = pq.read_table(file).to_pylist()
    assert rows == read_json(tmp_path / "out.json")
    assert list(rows[0]) == [
        *("index", "image", "label", "probability", "label_2", "probability_2", "label_3", "probability_3", "error")
    ]


def test_several_tasks_have_separate_columns(models: Path, photos: Path, tmp_path: Path) -> None:
    options = PredictOptions(
        str(models / "several_tasks"), (str(photos),), output=tmp_path / "out.parquet", top_k=3, batch_size=5
    )
    predict_images(options)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.column_names[2:6] == ["age_label", "age_probability", "age_label_2", "age_probability_2"]
    assert table.column_names[6:-1:2] == ["species_label", "species_label_2", "species_label_3"]
    model = ViTCLSForMultiTaskClassification.from_pretrained(models / "several_tasks")
    with torch.no_grad():
        logits = model(pixel_values(photos)).logits
    for task, names in TASKS.items():
        probability, index = logits[task].softmax(dim=1).max(dim=1)
        assert table[f"{task}_label"].to_pylist() == [names[one] for one in index]
        np.testing.assert_allclose(table[f"{task}_probability"], probability, atol=1e-6)


def test_several_labels_are_predicted_from_the_threshold(models: Path, photos: Path, tmp_path: Path) -> None:
    model = ViTCLSForImageClassification.from_pretrained(models / "several_labels")
    with torch.no_grad():
        probabilities = model(pixel_values(photos)).logits.sigmoid()
    threshold = probabilities.median().item()
    rows = predict(model, ViTCLSImageProcessor(size=32), photos, threshold=threshold)
    assert [set(row["labels"]) for row in rows] == [
        {NAMES[label] for label in range(3) if image[label] >= threshold} for image in probabilities
    ]
    assert {len(row["labels"]) for row in rows} != {3}
    default, explicit = (
        predict(model, ViTCLSImageProcessor(size=32), photos, **flags) for flags in ({}, {"threshold": 0.5})
    )
    assert default == explicit and not model.training
    assert all(row["probabilities"] == sorted(row["probabilities"], reverse=True) for row in rows)
    best = predict(model, ViTCLSImageProcessor(size=32), photos, threshold=0, top_k=1)
    assert [row["labels"] for row in best] == [[NAMES[label]] for label in probabilities.argmax(dim=1)]
    options = PredictOptions(str(models / "several_labels"), (str(photos),), output=tmp_path / "a.csv", threshold=0)
    predict_images(options)
    cells = [row["labels"] for row in csv.DictReader((tmp_path / "a.csv").open())]
    assert all(sorted(cell.split("|")) == NAMES for cell in cells)


def test_a_non_finite_output_is_an_error(photos: Path) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    model.classifier.bias.data[1] = float("nan")
    rows = predict(model, ViTCLSImageProcessor(size=32), [photos / "a.jpg"])
    assert rows[0]["label"] is None and "not finite" in rows[0]["error"]


# Features ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["one_label", "encoder"])
@pytest.mark.parametrize("kind", ["cls", "mean", "registers", "distillation"])
def test_features_equal_the_tokens_of_the_model(
    models: Path, photos: Path, tmp_path: Path, source: str, kind: str
) -> None:
    output = tmp_path / ("out.parquet" if source == "encoder" else "out.json")
    predict_images(
        PredictOptions(str(models / source), (str(photos),), output=output, features=kind, batch_size=9)  # type: ignore
    )
    rows = read_json(output) if output.suffix == ".json" else pq.read_table(output).to_pylist()
    with torch.no_grad():
        tokens = ViTCLSModel.from_pretrained(models / source)(pixel_values(photos)).tokens
    group = tokens["patches"].mean(dim=1) if kind == "mean" else tokens[kind]
    expected = group[:, 0] if kind == "cls" else group
    measured = np.array([row["features"] for row in rows], dtype=np.float32)
    np.testing.assert_array_equal(measured, expected.numpy())
    assert rows[0].keys() == {"index", "image", "features", "error"}


def test_an_unreadable_image_has_no_features(models: Path, unreadable: Path, tmp_path: Path) -> None:
    for kind in ("cls", "registers"):
        file = tmp_path / f"{kind}.parquet"
        options = PredictOptions(str(models / "encoder"), (str(unreadable),), output=file, features=kind)  # type: ignore
        predict_images(options)
        reset_accelerate()
        features = pq.read_table(file)["features"].to_pylist()
        assert features[0] is not None and features[1:] == [None, None]


@pytest.mark.parametrize("kind", ["cls", "mean", "registers"])
def test_features_of_a_model_in_half_precision(kind: str, photos: Path) -> None:
    model = randomize(ViTCLSModel(build_tiny_config(**TOKENS))).bfloat16()
    processor = ViTCLSImageProcessor(size=32)
    (row,) = predict(model, processor, photos / "a.jpg", features=kind)
    (expected,) = predict(model.float(), processor, photos / "a.jpg", features=kind)
    np.testing.assert_allclose(row["features"], expected["features"], atol=0.1)


def test_features_require_no_weights_of_a_pooling_layer(photos: Path, tmp_path: Path) -> None:
    model = randomize(ViTCLSModel(build_tiny_config(pooling="attention"), add_pooling_layer=False))
    model.save_pretrained(tmp_path)
    ViTCLSImageProcessor(size=32).save_pretrained(tmp_path)
    options = PredictOptions(str(tmp_path), (str(photos),), features="mean", output=tmp_path / "out.json")
    assert predict_images(options) == PredictionCounts(9, 0)


def test_missing_tokens_are_errors() -> None:
    with raises_one_line("--features registers requires tokens of this kind", "--features to cls or mean"):
        predict(ViTCLSModel(build_tiny_config()), ViTCLSImageProcessor(size=32), ["a.jpg"], features="registers")


# Inputs --------------------------------------------------------------------------------------------------------------


def test_a_list_contains_files_and_folders(photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_bytes(f"\ufeff{photos / 'c.png'}\r\n\n{photos / 'inner'}\n".encode() + b"odd-\xff.png\n")
    source = open_input(PredictOptions("model", list=file))
    names = [record.name for record in source.read_records([range(source.num_images)])]
    assert names == [*sorted_photos(photos)[2:], "odd-\ufffd.png"]
    file.write_text("\n \n", encoding="utf-8")
    with raises_one_line(f"the list {file} is empty"):
        open_input(PredictOptions("model", list=file))


def test_images_of_folders_are_sorted_whatever_the_file_system_lists_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b/2.PNG", "b/1.png", "a/3.jpg", ".c/4.png", "a/.5.png", "a/6.txt", "0.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    walk = os.walk

    def walk_backwards(folder: Any) -> Iterator[Any]:
        for parent, folders, files in walk(folder):
            folders.sort(reverse=True)
            yield parent, folders, sorted(files, reverse=True)

    monkeypatch.setattr(os, "walk", walk_backwards)
    source = open_input(PredictOptions("model", (str(tmp_path),)))
    assert isinstance(source, ListInput)
    names = [str(Path(name).relative_to(tmp_path)) for name in source.names]
    assert names == ["0.png", "a/3.jpg", "b/1.png", "b/2.PNG"]


def test_rows_of_a_dataset_keep_their_index_in_any_ranges(tmp_path: Path) -> None:
    """More than 64 rows are read in several parts. Missing images have no content."""
    values = [None if index == 2 else f"{index}.png" for index in range(150)]
    dataset = datasets.Dataset.from_dict({"image": values})
    source = DatasetInput(dataset, "image", tmp_path, {})
    ranges = [range(1, 3), range(60, 150)]
    records = list(source.read_records(ranges))
    assert [record.index for record in records] == [1, 2, *range(60, 150)] and source.num_images == 150
    for record in records:
        path = str(tmp_path / f"{record.index}.png")
        assert (record.name, record.content) == (("2", None) if record.index == 2 else (f"{record.index}.png", path))


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
        predict_images(PredictOptions(str(models / "one_label"), output=output, batch_size=4, **given))
        reset_accelerate()
        answers = [(row["index"], row["label"], row["probability"]) for row in read_json(output)]
        expected = expected or answers
        assert answers == expected
    assert len(expected or []) == 9


def test_an_input_is_identified_by_its_content(photos: Path, tmp_path: Path) -> None:
    """Check inputs of equal names and sizes: files, a folder as a dataset, a table, also as a stream."""
    folder, table = tmp_path / "data" / "x", tmp_path / "table.csv"
    folder.mkdir(parents=True)
    table.write_text("image\nb.png\n", encoding="utf-8")
    for shade in (10, 20):
        Image.new("L", (8, 8), shade).save(folder / f"{shade}.bmp")
    given: list[dict[str, Any]] = [
        {"paths": (str(folder),)},
        {"dataset": str(folder.parent)},
        {"dataset": str(table)},
        {"dataset": str(table), "streaming": True},
    ]

    def identities() -> list[dict[str, Any]]:
        return [open_input(PredictOptions("model", **options)).compute_fingerprint() for options in given]

    first = identities()
    assert identities() == first
    Image.new("L", (8, 8), 30).save(folder / "10.bmp")
    table.write_text("image\nc.png\n", encoding="utf-8")
    assert all(now != then for now, then in zip(identities(), first, strict=True))
    assert json.loads(json.dumps(first)) == first  # as stored in the output


def test_arrays_are_identified_by_their_pixels() -> None:
    pixels = np.zeros((2, 4, 4), np.uint8)
    first = ListInput(["0", "1"], ArrayImages(pixels)).compute_fingerprint()
    assert ListInput(["0", "1"], ArrayImages(pixels.copy())).compute_fingerprint() == first
    assert ListInput(["0", "2"], ArrayImages(pixels)).compute_fingerprint() != first
    pixels[1, 3, 3] = 1
    assert ListInput(["0", "1"], ArrayImages(pixels)).compute_fingerprint() != first


def test_files_are_identified_by_their_size_and_time(tmp_path: Path) -> None:
    file, digests = tmp_path / "a.png", []
    for content, seconds in ((b"1", 1), (b"22", 1), (b"22", 2), (b"22", 2)):
        file.write_bytes(content)
        os.utime(file, (seconds, seconds))
        digests.append(ListInput([file.name], [str(file)]).compute_fingerprint()["sha256"])
    assert len(set(digests)) == 3 and digests[2] == digests[3]
    urls = [ListInput([url], [url]).compute_fingerprint() for url in ("https://host/a.png", "https://host/b.png")]
    assert urls[0] != urls[1]


def test_streams_are_identified_by_split_and_column(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "data" / split / "cat").mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "data" / split / "cat" / "1.png")
    table = tmp_path / "table.csv"
    table.write_text("first,second\na.png,b.png\n", encoding="utf-8")
    for dataset, changes in (
        (tmp_path / "data", [{"split": "train"}, {"split": "test"}]),
        (table, [{"image_column": "first"}, {"image_column": "second"}]),
    ):
        first, second = (
            open_input(PredictOptions("model", dataset=str(dataset), streaming=True, **change)).compute_fingerprint()
            for change in changes
        )
        assert first != second
    source = open_input(PredictOptions("model", dataset=str(table), split="train", image_column="first"))
    identity = source.compute_fingerprint()
    assert identity.pop("fingerprint") and identity == {
        "dataset": str(table),
        "split": "train",
        "column": "first",
        "bytes and time": [table.stat().st_size, table.stat().st_mtime_ns],
        "images": 1,
    }


def test_values_of_a_column_are_paths_bytes_or_images(tmp_path: Path) -> None:
    image = Image.new("L", (4, 4))
    for value, name, content in (
        ("a.png", "a.png", str(tmp_path / "a.png")),
        ("a\udcff.png", "a\ufffd.png", str(tmp_path / "a\udcff.png")),
        ({"path": "a.png", "bytes": None}, "a.png", "a.png"),
        ({"path": "a.png", "bytes": b"encoded"}, "a.png", b"encoded"),
        ({"path": None, "bytes": b"encoded"}, "7", b"encoded"),
        (image, "7", image),
        (None, "7", None),
    ):
        assert build_record(7, value, tmp_path) == ImageRecord(7, name, content)


def test_files_of_other_file_systems_are_fetched() -> None:
    """The image processor reads files, and URLs of web servers."""
    with fsspec.open("memory://fetched.png", "wb") as file:
        file.write(b"encoded")
    contents = []

    def process(content: Any, return_tensors: str) -> dict[str, torch.Tensor]:
        contents.append(content)
        return {"pixel_values": torch.zeros(1, 3, 4, 4)}

    given = ["a.png", "http://host/a.png", "https://host/a.png", "memory://fetched.png", b"bytes"]
    for content in given:
        prepared = prepare_image(process, ImageRecord(0, "name", content))
        assert prepared.error is None and prepared.pixels is not None and prepared.pixels.shape == (3, 4, 4)
    assert contents == [*given[:3], b"encoded", b"bytes"]

    def fail(content: Any, return_tensors: str) -> None:
        raise OSError("connection lost")

    assert prepare_image(fail, ImageRecord(0, "name", "https://host/a.png")).error == "connection lost"


def test_digits_are_read() -> None:
    source = open_input(PredictOptions("model", dataset="digits"))
    assert source.num_images == 1797
    (record,) = source.read_records([range(1796, 1797)])
    assert record.content.size == (8, 8) and record.name == "digits/1796"


def test_idx_files_are_read(tmp_path: Path) -> None:
    pixels = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    for name, header, values in (
        ("train-images-idx3-ubyte", [0x803, 2, 4, 4], pixels),
        ("train-labels-idx1-ubyte", [0x801, 2], np.zeros(2, dtype=np.uint8)),
    ):
        (tmp_path / name).write_bytes(np.array(header, dtype=">i4").tobytes() + values.tobytes())
    source = open_input(PredictOptions("model", dataset=str(tmp_path)))
    (record,) = source.read_records([range(1, 2)])
    assert source.num_images == 2 and record.name == f"{tmp_path.name}/1"
    np.testing.assert_array_equal(np.asarray(record.content), pixels[1])


def test_datasets_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    with raises_one_line("cannot identify the image column", "--image-column"):
        open_input(PredictOptions("model", dataset=str(tmp_path / "table.csv")))
    with raises_one_line("has no column 'c'. Choose one of a, b"):
        open_input(PredictOptions("model", dataset=str(tmp_path / "table.csv"), image_column="c"))
    with raises_one_line("has no split 'test'", "train"):
        open_input(PredictOptions("model", dataset=str(tmp_path / "table.csv"), split="test"))
    with raises_one_line("there are no images in"):
        open_input(PredictOptions("model", (str(tmp_path),)))


def test_one_of_several_splits_has_to_be_named(tmp_path: Path) -> None:
    for split, number in (("train", 2), ("test", 1)):
        for index in range(number):
            (tmp_path / split / "cat").mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4)).save(tmp_path / split / "cat" / f"{index}.png")
    with raises_one_line("has several splits. Set --split to one of", "train", "test"):
        open_input(PredictOptions("model", dataset=str(tmp_path)))
    for split, number in (("train", 2), ("test", 1)):
        assert open_input(PredictOptions("model", dataset=str(tmp_path), split=split)).num_images == number


def test_a_row_without_an_image_has_an_error(models: Path, photos: Path, tmp_path: Path) -> None:
    values = [{"bytes": (photos / "a.jpg").read_bytes(), "path": None}, None]
    table = datasets.Dataset.from_dict({"image": values}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "images.parquet")
    options = PredictOptions(
        str(models / "one_label"), dataset=str(tmp_path / "images.parquet"), output=tmp_path / "out.json"
    )
    assert predict_images(options) == PredictionCounts(2, 1)
    assert [row["error"] for row in read_json(tmp_path / "out.json")] == [None, "row 1 has no image"]


def test_skipped_images_of_a_stream_are_not_decoded(photos: Path, tmp_path: Path) -> None:
    good = (photos / "a.jpg").read_bytes()
    values = [{"bytes": b"broken" if index < 6 else good, "path": None} for index in range(10)]
    table = datasets.Dataset.from_dict({"image": values}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "images.parquet")
    source = open_input(PredictOptions("model", dataset=str(tmp_path / "images.parquet"), streaming=True))
    assert isinstance(source, StreamInput) and source.num_images is None
    assert [(record.index, record.content) for record in source.read_records([range(6, 8)])] == [(6, good), (7, good)]
    assert source.num_images is None
    ranges = islice(iterate_shards(None, 4), 1, None, 2)  # 4 to 7, then beyond the end
    assert [record.index for record in source.read_records(ranges)] == [4, 5, 6, 7]
    assert source.num_images == 10


def test_a_network_failure_is_not_an_unreadable_image(models: Path, tmp_path: Path, photos: Path) -> None:
    (tmp_path / "table.csv").write_text("image\nmemory://absent.jpg\n", encoding="utf-8")
    output = tmp_path / "out.csv"
    options = PredictOptions(str(models / "one_label"), dataset=str(tmp_path / "table.csv"), output=output)
    with raises_one_line("cannot fetch memory://absent.jpg", error=FetchError):
        predict_images(options)
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]


# Folders of shards ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Parquet file of a thousand digits, of which every hundredth is unreadable."""
    values = []
    for index, image in enumerate(sklearn.datasets.load_digits().images[:NUM_STREAMED]):
        encoded = io.BytesIO()
        Image.fromarray((image * 15).astype(np.uint8)).save(encoded, format="PNG")
        values.append({"bytes": encoded.getvalue() if index % 100 else b"broken", "path": f"{index}.png"})
    file = tmp_path_factory.mktemp("streamed") / "digits.parquet"
    datasets.Dataset.from_dict({"image": values}).cast_column("image", datasets.Image()).to_parquet(file)
    return file


@pytest.mark.slow
def test_a_killed_run_is_resumed_by_two_processes(models: Path, streamed: Path, tmp_path: Path) -> None:
    """The result must equal that of one uninterrupted run."""
    flags = ["--model", models / "encoder", "--dataset", streamed, "--streaming", "--features", "cls"]
    flags += ["--shard-size", 30, "--batch-size", 8]
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
    (folder / ".shard-000031.parquet.1.unfinished").write_bytes(b"half a file")

    printed = run_together("predict.py", *flags, "--output", folder, log=tmp_path / "log", environment=OFFLINE)
    assert printed == f"{folder}: 1,000 images, 10 without a prediction\n"
    assert all((folder / name).stat().st_mtime_ns == written for name, written in before.items())
    assert sorted(file.name for file in folder.iterdir()) == [
        ".manifest.json",
        *(f"shard-{number:06}.parquet" for number in range(34)),
    ]

    whole = tmp_path / "whole"
    predict_images(
        PredictOptions(
            str(models / "encoder"),
            dataset=str(streamed),
            features="cls",
            output=whole,
            shard_size=30,
            batch_size=8,
        )
    )
    rows, expected = read_shards(folder), read_shards(whole)
    assert [row["index"] for row in rows] == list(range(NUM_STREAMED))
    assert [row["image"] for row in rows] == [f"{index}.png" for index in range(NUM_STREAMED)]
    for row, other in zip(rows, expected, strict=True):
        assert (row["features"] is None) == (row["index"] % 100 == 0) == (row["error"] is not None)
        assert row["error"] == other["error"] and "0x" not in str(row["error"])
        assert row["features"] is None or np.allclose(row["features"], other["features"], atol=1e-6)


@pytest.mark.slow
def test_two_processes_write_the_same_file_as_one(models: Path, streamed: Path, tmp_path: Path) -> None:
    flags = ["--model", models / "one_label", "--dataset", streamed, "--batch-size", 30]
    for processes, name in ((1, "one.csv"), (2, "two.csv")):
        how = {"log": tmp_path / f"{name}.log", "environment": OFFLINE, "processes": processes}
        printed = run_together("predict.py", *flags, "--output", tmp_path / name, **how)
        assert printed == f"{tmp_path / name}: 1,000 images, 10 without a prediction\n"
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()


WORKER = Path(__file__).parents[1] / "helpers" / "slow_prediction.py"


@pytest.mark.slow
def test_the_main_process_awaits_the_last_shard_of_a_slow_process(models: Path, photos: Path, tmp_path: Path) -> None:
    """The last shard is smaller than the others."""
    flags = ["--model", models / "one_label", photos, "--output", tmp_path / "labels", "--shard-size", 5]
    environment = OFFLINE | {"LAST_SHARD": "slow"}
    printed = run_together(WORKER, *flags, log=tmp_path / "log", environment=environment)
    assert printed == f"{tmp_path / 'labels'}: 9 images, 0 without a prediction\n"
    assert [row["index"] for row in read_shards(tmp_path / "labels")] == list(range(9))


@pytest.mark.slow
def test_a_process_that_dies_leaves_the_folder_incomplete(models: Path, photos: Path, tmp_path: Path) -> None:
    """The main process raises an error; a new start computes the missing shard."""
    folder = tmp_path / "labels"
    flags = ["--model", models / "one_label", photos, "--output", folder, "--shard-size", 5]
    environment = OFFLINE | {"LAST_SHARD": "die"}
    log = tmp_path / "log"
    assert run_together(WORKER, *flags, log=log, environment=environment, may_fail=True) == ""
    assert "lacks shards of a process that has ended" in log.with_name("log.errors").read_text()
    assert [file.name for file in sorted(folder.glob("shard-*"))] == ["shard-000000.parquet"]
    assert predict_images(PredictOptions(str(models / "one_label"), (str(photos),), output=folder, shard_size=5)) == (
        PredictionCounts(9, 0)
    )
    assert [row["index"] for row in read_shards(folder)] == list(range(9))


def test_a_stream_is_written_to_a_folder(models: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    """The number of images is known at the end of the stream, and recorded for the next start."""
    values = [{"bytes": (photos / "a.jpg").read_bytes() if index else b"broken", "path": None} for index in range(5)]
    table = datasets.Dataset.from_dict({"image": values}).cast_column("image", datasets.Image())
    table.to_parquet(tmp_path / "images.parquet")
    options = PredictOptions(
        str(models / "one_label"),
        dataset=str(tmp_path / "images.parquet"),
        streaming=True,
        output=tmp_path / "labels",
        shard_size=2,
    )
    for progress in ("5 images", "0 of 0 images"):
        assert predict_images(options) == PredictionCounts(5, 1)
        assert capsys.readouterr().err.splitlines()[-1].startswith(progress)
        assert [(row["index"], row["error"] is None) for row in read_shards(tmp_path / "labels")] == [
            (index, index > 0) for index in range(5)
        ]
        assert read_json(tmp_path / "labels" / ".manifest.json")["num_images"] == 5
        reset_accelerate()


def test_rows_of_all_processes_are_in_the_order_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 0 has the chunks 0, 2 and 4 of two images; the last chunk of process 1 is smaller."""
    others = iter([[{"index": 2}, {"index": 3}], [{"index": 6}], [], []])
    monkeypatch.setattr(predict_module, "gather_object", lambda own: [*own, next(others)])
    rows: Any = ({"index": index} for index in (0, 1, 4, 5))
    gathered = predict_module.gather_rows(rows, 2, SimpleNamespace(num_processes=2))
    assert [row["index"] for row in gathered] == list(range(7))


@pytest.mark.parametrize(
    ("num_cores", "num_processes", "expected"), [(4, "1", 4), (32, "1", 8), (32, "16", 2), (2, "4", 1), (None, "1", 1)]
)
def test_threads_are_divided_among_the_processes(
    num_cores: int | None, num_processes: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", num_processes)
    assert predict_module.get_num_workers() == expected


def test_a_folder_is_complete_if_every_shard_has_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "ROWS_PER_GROUP", 3)
    folder = ShardFolder(tmp_path, shard_size=4)
    rows = [{"index": index, "image": str(index), "error": None if index else "unreadable"} for index in range(9)]
    for number in range(3):
        assert not folder.is_complete(9)
        write_rows(rows[number * 4 : number * 4 + 4], get_output_columns({}), folder.get_shard_file(number))
    assert folder.is_complete(9) and not folder.is_complete(13)
    assert folder.count_rows(9) == (9, 1)
    for number, kept in ((1, rows[4:7]), (2, [])):
        write_rows(kept, get_output_columns({}), folder.get_shard_file(number))
        with raises_one_line(
            f"shard-00000{number}.parquet must have", f"but has {len(kept)}. Delete the file and repeat the command"
        ):
            folder.count_rows(9)
        write_rows(rows[number * 4 : number * 4 + 4], get_output_columns({}), folder.get_shard_file(number))


def test_a_second_start_must_have_the_same_options(
    models: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "labels"

    def again(model: str = "one_label", path: Path = photos, **others: Any) -> PredictionCounts:
        reset_accelerate()
        options: dict[str, Any] = {"shard_size": 4, **others}
        return predict_images(PredictOptions(str(models / model), (str(path),), output=folder, **options))

    assert again() == PredictionCounts(9, 0)
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert len(written) == 4
    for change, words in {
        "shard_size": ("--shard-size 4, not 5", {"shard_size": 5}),
        "top_k": ("--top-k None, not 2", {"top_k": 2}),
        "threshold": ("--threshold 0.5, not 0.6", {"threshold": 0.6}),
        "features": ("--features None, not mean", {"features": "mean"}),
        "mixed_precision": ("--mixed-precision no, not bf16", {"mixed_precision": "bf16"}),
        "model": ("another model", {"model": "several_labels"}),
        "input": ("another input", {"path": photos / "inner"}),
    }.values():
        with raises_one_line(f"--output {folder} was written with {change}"):
            again(**words)
    assert again(batch_size=3, num_workers=1) == PredictionCounts(9, 0)  # may change
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written

    (folder / "shard-000001.parquet").unlink()
    capsys.readouterr()
    assert again() == PredictionCounts(9, 0)
    assert capsys.readouterr().err.splitlines()[-1].startswith("4 of 4 images")  # only the missing shard
    assert [row["index"] for row in read_shards(folder)] == list(range(9))
    with monkeypatch.context() as patch, raises_one_line("the images differ. Copy the images to all machines again"):
        patch.setattr(predict_module, "gather_object", lambda objects: [*objects, {"images": 9}])
        again()
    (folder / "shard-000002.parquet").write_bytes(b"half")
    with raises_one_line("shard-000002.parquet is damaged", "Delete the file and repeat the command"):
        again()
    flags = ["--model", models / "one_label", photos, "--output", folder, "--top-k", 3]
    assert run_in_process("predict.py", *flags) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --output")


def test_a_model_is_identified_by_everything_that_affects_predictions() -> None:
    """Otherwise, a folder could contain predictions of different models."""

    def build(processor_size: int = 32, **fields: Any) -> str:
        model = randomize(ViTCLSForImageClassification(build_tiny_config(**LABELS | fields)))
        return compute_model_digest(model.train("training" in fields), ViTCLSImageProcessor(size=processor_size))

    digest = build()
    assert build() == digest
    renamed = {"id2label": {0: "bee", 1: "ant", 2: "cat"}, "label2id": {"bee": 0, "ant": 1, "cat": 2}}
    assert digest not in {build(processor_size=48), build(**renamed), build(num_register_tokens=1)}
    tasks = [{"age": ["old", "young"]}, {"age": ["young", "old"]}]
    models = [randomize(ViTCLSForMultiTaskClassification(build_tiny_config(tasks=names))) for names in tasks]
    assert len({compute_model_digest(model, ViTCLSImageProcessor(size=32)) for model in models}) == 2
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**LABELS)))
    model.classifier.bias.data[2] += 1e-6
    assert compute_model_digest(model, ViTCLSImageProcessor(size=32)) != digest


def test_a_folder_with_other_files_is_an_error(models: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("", encoding="utf-8")
    with raises_one_line("contains other files"):
        predict_images(PredictOptions(str(models / "one_label"), (str(photos),), output=tmp_path))


@pytest.mark.parametrize("num_images", [1, 7, 8, 9])
def test_each_image_is_in_one_shard(num_images: int) -> None:
    shards = list(iterate_shards(num_images, 4))
    assert [index for indices in shards for index in indices] == list(range(num_images))


def test_batches_do_not_cross_shards() -> None:
    images = (PreparedImage(ImageRecord(index, str(index), None)) for index in (0, 1, 2, 3, 4, 10, 11, 12))
    sizes = [[image.record.index for image in batch] for batch in iterate_batches(images, batch_size=3, chunk_size=5)]
    assert sizes == [[0, 1, 2], [3, 4], [10, 11, 12]]


# Files ---------------------------------------------------------------------------------------------------------------


def test_files_are_written_atomically(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"index": 0, "image": "a", "error": None}
        raise ValueError("the input ends early")

    for suffix in (".csv", ".json", ".jsonl", ".parquet"):
        file = tmp_path / f"out{suffix}"
        file.write_text("from before", encoding="utf-8")
        with pytest.raises(ValueError, match="ends early"):
            write_rows(rows(), get_output_columns({}), file)
        assert file.read_text(encoding="utf-8") == "from before"
    assert len(list(tmp_path.iterdir())) == 4


FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"]


def test_text_in_csv_files_is_not_a_formula(tmp_path: Path) -> None:
    """Spreadsheets evaluate cells that start with these characters. Other formats keep the text."""
    columns = get_output_columns({"labels": pa.list_(pa.string()), "=task_label": pa.string(), "p": pa.float32()})
    rows = [
        {"index": -1, "image": text, "labels": [text, "b"], "=task_label": text, "p": -0.5, "error": None}
        for text in FORMULAS
    ]
    write_rows(rows, columns, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        header, *found = csv.reader(file)
    assert header == ["index", "image", "labels", "'=task_label", "p", "error"]
    assert found == [["-1", f"'{text}", f"'{text}|b", f"'{text}", "-0.5", ""] for text in FORMULAS]
    write_rows(rows, columns, tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["image"] for line in lines[:-1]] == FORMULAS


def test_tables_show_errors_only_if_there_are_any_and_no_index(capsys: pytest.CaptureFixture) -> None:
    columns = {"index": pa.int64(), "image": pa.string(), "error": pa.string()}
    for error, header in ((None, ["image"]), ("damaged", ["image", "error"])):
        print_table(
            [{"index": 0, "image": "1.png", "error": None}, {"index": 1, "image": "2.png", "error": error}], columns
        )
        assert [cell.strip() for cell in capsys.readouterr().out.splitlines()[1].strip("┃ ").split("┃")] == header


def test_tables_show_numbers_with_four_decimals_and_lists_in_one_cell(capsys: pytest.CaptureFixture) -> None:
    columns = get_output_columns(
        {"labels": pa.list_(pa.string()), "probabilities": pa.list_(pa.float32()), "probability": pa.float32()}
    )
    row = {"index": 0, "image": "1.png", "labels": ["ant", "bee"], "probabilities": [0.75, 0.5], "error": None}
    print_table(
        [row | {"probability": 0.123456}, row | {"labels": [], "probabilities": [], "probability": None}], columns
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if "1.png" in line]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert cells == [["1.png", "ant, bee", "0.7500, 0.5000", "0.1235"], ["1.png", "", "", ""]]


def test_progress_counts_images_and_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is simulated. Without a terminal, a line is printed every ten seconds and at the end."""
    clock = [0.0]
    monkeypatch.setattr(outputs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    rows = [{"error": "unreadable" if index % 3 == 0 else None} for index in range(10)]

    def read_rows(seconds: float) -> Iterator[dict[str, Any]]:
        for row in rows:
            clock[0] += seconds
            yield row

    for seconds, total, is_shown, counts, images_per_second in (
        (0.004, 2000, True, [(10, 4)], 250),
        (0.004, None, True, [(10, 4)], 250),
        (4.0, 2000, True, [(3, 1), (6, 2), (9, 3), (10, 4)], 0),
        (4.0, 2000, False, [], 0),
    ):
        with outputs.Progress(total, is_shown) as progress:
            assert list(progress.track_rows(read_rows(seconds))) == rows
        assert (progress.num_images, progress.num_failed) == (10, 4)
        assert capsys.readouterr().err.splitlines() == [
            f"{num_images}{' of 2,000' if total else ''} images, {images_per_second} images/s, "
            f"{num_failed} without a prediction (see the column `error`)"
            for num_images, num_failed in counts
        ]
    with pytest.raises(ValueError, match="an error"), outputs.Progress(2000, is_shown=True):
        raise ValueError("an error")
    assert not capsys.readouterr().err


def test_tables_show_no_control_characters(capsys: pytest.CaptureFixture) -> None:
    """A terminal would interpret escape sequences in names of files and classes."""
    name = "\x1b]0;title\x07\x1b[31m[bold]red\u202e\n\r2"
    print_table(
        [{"image": name, name: name, "error": None}], {"image": pa.string(), name: pa.string(), "error": pa.string()}
    )
    printed = capsys.readouterr().out
    assert not [character for character in printed if not character.isprintable() and character != "\n"]
    assert printed.count("[bold]red") == 3


@pytest.mark.skipif(sys.platform == "win32", reason="requires named pipes")
def test_pipes_sockets_and_devices_in_a_folder_are_rows_with_an_error(
    models: Path, photos: Path, tmp_path: Path
) -> None:
    """Reading a pipe would block. `.ico` and `.mpo` are read, and unsupported formats are named."""
    folder = tmp_path / "odd"
    folder.mkdir()
    os.mkfifo(folder / "1.png")
    (folder / "2.jpg").symlink_to("/dev/zero")
    (folder / "3.bmp").symlink_to(folder / "1.png")
    photo = Image.open(photos / "a.jpg")
    photo.save(folder / "4.ico")
    photo.save(folder / "5.mpo", save_all=True, append_images=[photo])
    photo.save(folder / "6.tga")
    flags = ["--model", models / "one_label", folder, "--output", tmp_path / "out.jsonl"]
    run_together("predict.py", *flags, log=tmp_path / "log", environment=OFFLINE, processes=1)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["1.png", "2.jpg", "3.bmp", "4.ico", "5.mpo", "6.tga"]
    errors = ["not a regular file"] * 3 + [None, None, "not an image in a supported format"]
    for row, words in zip(rows, errors, strict=True):
        assert (row["error"] is None and row["label"] in NAMES) if words is None else words in row["error"]


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "out.json").mkdir()
    with raises_one_line(f"cannot write {tmp_path / 'out.json'}", error=OSError):
        write_rows([], get_output_columns({}), tmp_path / "out.json")


HEARTBEAT = """
import sys, time
from pathlib import Path
from modeling_vitcls.inference import outputs
outputs.SECONDS_BETWEEN_HEARTBEATS = 0.05
with outputs.send_heartbeats(outputs.ShardFolder(Path(sys.argv[1]), 4).get_heartbeat_file(1)):
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_killed_processes_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "SECONDS_BETWEEN_HEARTBEATS", 0.05)
    monkeypatch.setattr(outputs, "MAX_HEARTBEAT_AGE", 2.0)
    folder = outputs.ShardFolder(tmp_path, 4)
    command = [sys.executable, "-c", HEARTBEAT, tmp_path]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, env=SCRIPT_ENVIRONMENT) as other,
        outputs.send_heartbeats(folder.get_heartbeat_file(0)),
    ):
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        last = folder.get_heartbeat_file(1).stat().st_mtime_ns
        while folder.get_heartbeat_file(1).stat().st_mtime_ns == last:
            time.sleep(0.01)
        other.kill()
        with raises_one_line("lacks shards of a process that has ended. Repeat the command", error=OSError):
            folder.wait_for_shards(4, 2)
        folder.get_heartbeat_file(1).unlink()  # as after an error
        with raises_one_line("lacks shards of a process that has ended. Repeat the command", error=OSError):
            folder.wait_for_shards(4, 2)
        folder.get_shard_file(0).touch()
        folder.wait_for_shards(4, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["shard-000000.parquet"]


def test_shards_are_awaited_while_other_processes_are_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats that are too old or missing are those of processes that have ended."""
    folder = ShardFolder(tmp_path, shard_size=4)
    other = folder.get_heartbeat_file(1)
    other.touch()
    waits = []

    def wait(seconds: float) -> None:
        """Write the last shard, as the other process does."""
        waits.append(seconds)
        folder.get_shard_file(len(waits) - 1).touch()

    monkeypatch.setattr(outputs.time, "sleep", wait)
    folder.wait_for_shards(8, 2)
    assert len(waits) == 2
    for age, has_ended in ((outputs.MAX_HEARTBEAT_AGE / 2, False), (outputs.MAX_HEARTBEAT_AGE * 2, True)):
        os.utime(other, (time.time() - age,) * 2)
        folder.get_shard_file(1).unlink()
        waits = [0.0]
        if has_ended:
            folder.get_heartbeat_file(2).touch()  # of a third process, which is running
            for num_processes in (2, 3):
                with raises_one_line("lacks shards of a process that has ended", error=OSError):
                    folder.wait_for_shards(8, num_processes)
            folder.wait_for_shards(4, 2)
        else:
            folder.wait_for_shards(8, 2)
    other.unlink()
    with raises_one_line("lacks shards of a process that has ended", error=OSError):
        folder.wait_for_shards(8, 2)


def test_a_heartbeat_is_removed_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "SECONDS_BETWEEN_HEARTBEATS", 0.001)
    file = tmp_path / "heartbeat"
    with pytest.raises(ValueError, match="an error"), outputs.send_heartbeats(file):
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 60
        while file.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        raise ValueError("an error")
    assert not file.exists()


def test_unfinished_files_of_a_killed_start_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".shard-000000.parquet.77.unfinished").write_bytes(b"half")
    folder = ShardFolder(tmp_path, shard_size=2)
    assert folder.open({"input": "this"}) is None
    assert [file.name for file in tmp_path.iterdir()] == [".manifest.json"]
    folder.record_num_images(5)
    assert folder.open({"input": "this"}) == 5
    assert not folder.is_complete(5)
    manifest = read_json(tmp_path / ".manifest.json")
    for change, words in (({"format": 0}, "another format"), ({"old": 7}, "--old 7, not None")):
        (tmp_path / ".manifest.json").write_text(json.dumps(manifest | change), encoding="utf-8")
        with raises_one_line(f"was written with {words}. Use the same flags"):
            folder.open({"input": "this"})


# Models --------------------------------------------------------------------------------------------------------------


def test_models_without_labels_are_a_one_line_error(models: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    lost = tmp_path / "lost"
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    weights = {name: value for name, value in model.state_dict().items() if "classifier" not in name}
    model.save_pretrained(lost, state_dict=weights)
    for source, words in {
        models / "encoder": "contains ViTCLSModel. Fine-tune the model first",
        models / "masked": "contains ViTCLSForMaskedImageModeling",
        lost: "does not contain the weight classifier.bias",
        tmp_path: "no file named model.safetensors",
        "vitcls-tiny": "is a preset",
        tmp_path / "absent": "is not a folder",
    }.items():
        with raises_one_line(words, error=(ValueError, OSError)):
            predict_images(PredictOptions(str(source), (str(photos),)))
        reset_accelerate()
    for fields, problem in (
        ({"num_labels": 0}, "has no classifier"),
        ({"num_labels": 1, "problem_type": "regression"}, "was trained for regression"),
    ):
        with raises_one_line(
            f"label prediction requires a classifier, but the model {problem}. Fine-tune a classifier"
        ):
            predict(ViTCLSForImageClassification(build_tiny_config(**fields)), ViTCLSImageProcessor(size=32), photos)


def test_a_config_may_lack_its_architecture(models: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "one_label", tmp_path / "model")
    config = read_json(tmp_path / "model" / "config.json")
    del config["architectures"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    options = PredictOptions(str(tmp_path / "model"), (str(photos / "a.jpg"),), output=tmp_path / "out.json")
    assert predict_images(options) == PredictionCounts(1, 0)


def test_mixed_precision_is_close(models: Path, photos: Path, tmp_path: Path) -> None:
    features = {}
    for precision in ("no", "bf16"):
        output = tmp_path / f"{precision}.parquet"
        flags: dict[str, Any] = {"features": "mean", "mixed_precision": precision, "output": output}
        predict_images(PredictOptions(str(models / "encoder"), (str(photos),), **flags))
        reset_accelerate()
        features[precision] = np.array(pq.read_table(output)["features"].to_pylist())
    difference = np.abs(features["no"] - features["bf16"]).max()
    assert 0 < difference < 0.1


# Python function, and flags ------------------------------------------------------------------------------------------


def test_predict_accepts_images_of_any_kind(photos: Path) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**LABELS, hidden_dropout_prob=0.9))).train()
    picture = photos / "a.jpg"
    given = [str(picture), picture, picture.read_bytes(), Image.open(picture), np.asarray(Image.open(picture))]
    rows = predict(model, ViTCLSImageProcessor(size=32), [*given, b"broken", photos / "inner"], top_k=2)
    assert [row["image"] for row in rows][:6] == [str(picture), str(picture), "2", "3", "4", "5"]
    assert len({(row["label"], row["probability"], row["label_2"]) for row in rows[:5]}) == 1
    assert "cannot read an image" in rows[5]["error"]
    assert len(rows) == 12
    assert model.training
    (alone,) = predict(model, ViTCLSImageProcessor(size=32), picture)
    assert alone["image"] == str(picture) and alone["label"] == rows[0]["label"]
    with raises_one_line("the list is empty"):
        predict(model, ViTCLSImageProcessor(size=32), [])


def test_rows_of_options_have_the_settings_of_the_options(models: Path, photos: Path, tmp_path: Path) -> None:
    source, processor = str(models / "several_labels"), ViTCLSImageProcessor(size=32)
    model = ViTCLSForImageClassification.from_pretrained(source)
    with torch.no_grad():
        threshold = model(pixel_values(photos)).logits.sigmoid().median().item()
    flags: dict[str, Any] = {"threshold": threshold, "top_k": 2}
    options = PredictOptions(source, (str(photos),), mixed_precision="bf16", num_workers=1, **flags)
    with torch.autocast("cpu", torch.bfloat16):
        expected = predict(model, processor, photos, **flags)
    assert predict_module.predict_from_options(options, []) == expected
    assert expected != predict(model, processor, photos, **flags)
    table = tmp_path / "table.csv"
    table.write_text("image\na.png\n", encoding="utf-8")
    with raises_one_line("cannot return the rows of a stream, because its length is unknown. Disable streaming"):
        predict_module.predict_from_options(PredictOptions(source, dataset=str(table), streaming=True), [])


def test_images_of_several_shapes_share_a_batch(photos: Path) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**LABELS)))
    processor = ViTCLSImageProcessor(size={"shortest_edge": 16})
    together = predict(model, processor, photos, batch_size=9)
    for path, row in zip(sorted_photos(photos), together, strict=True):
        (alone,) = predict(model, processor, path)
        assert alone["label"] == row["label"]
        assert alone["probability"] == pytest.approx(row["probability"], abs=1e-5)
    small = predict(model, ViTCLSImageProcessor(do_resize=False), [np.zeros((4, 4, 3), np.uint8)])
    assert small[0]["error"]  # smaller than a patch


def test_wrong_flags_end_before_torch_is_imported() -> None:
    command = [sys.executable, "-X", "importtime", SCRIPTS / "predict.py", "--model", "m", "a.png", "--tok-k", "3"]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert ran.returncode == 2
    assert "--tok-k" in ran.stderr and "--top-k" in ran.stderr
    imported = {line.rsplit("|", 1)[-1].strip() for line in ran.stderr.splitlines() if line.startswith("import time")}
    assert "tyro" in imported and not imported & {"torch", "transformers", "numpy", "datasets"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["a.png", "--features", "cls", "--output", "o.csv"], "CSV"),
        (["a.png", "--features", "cls"], "a printed table"),
        (["a.png", "--output", "o.txt"], "set a .csv, .json, .jsonl or"),
        (["a.png", "--dataset", "digits"], "Set exactly one of PATHS"),
        ([], "Set exactly one of PATHS"),
        (["a.png", "--streaming"], "require --dataset"),
        (["a.png", "--top-k", "0"], "1 or more"),
        (["a.png", "--threshold", "2"], "0 to 1"),
    ],
)
def test_flags_that_contradict_each_other_exit_with_2(
    flags: list[str], words: str, capsys: pytest.CaptureFixture
) -> None:
    assert run_in_process("predict.py", "--model", "m", *flags) == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())
