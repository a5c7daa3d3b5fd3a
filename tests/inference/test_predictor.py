"""`Predictor`: photos of servers, batches of tables, `datasets.map`, Ray and Spark."""

import asyncio
import base64
import io
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from fastapi import UploadFile
from helpers.doc_pages import ROOT, read_blocks
from helpers.photo_folders import draw_pixels
from helpers.prediction_photos import sorted_photos
from helpers.tiny_models import (
    build_tiny_config,
    raises_one_line,
    save_classifier,
    save_encoder,
    save_with_processor,
)
from numpy.testing import assert_allclose
from PIL import Image
from pytest import MonkeyPatch, approx

from modeling_vitcls import Predictor, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.inference import load_model


NAMES = ["cls", "registers@1", "mean", "patches"]


@pytest.fixture(scope="module")
def encoder(module_path: Path) -> Path:
    """Return an encoder with two register tokens."""
    model = ViTCLSModel(build_tiny_config(num_register_tokens=2, image_size=(32, 48)))
    return save_with_processor(model, module_path / "encoder", ViTCLSImageProcessor(size=[32, 48]))


@pytest.fixture(scope="module")
def predictor(module_path: Path) -> Predictor:
    return Predictor(save_classifier(module_path / "classifier"))


def test_half_precision_is_read_as_float32_on_a_cpu_that_emulates_it(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """Each pass of an encoder in bfloat16 would take several times as long."""
    monkeypatch.setattr(load_model, "has_bfloat16", lambda device: False)
    save_with_processor(ViTCLSModel(build_tiny_config()).bfloat16(), tmp_path)
    assert ViTCLSModel.from_pretrained(tmp_path).dtype == torch.bfloat16
    assert Predictor(tmp_path, "cls").model.dtype == torch.float32


def test_a_file_that_is_written_over_the_weights_changes_no_answer(
    photos: Path, tmp_path: Path
) -> None:
    """The weights begin at multiples of 64 bytes: others are copied when they are loaded."""
    save_encoder(tmp_path, intermediate_size=32)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    padding = -start % 64
    header = (start - 8 + padding).to_bytes(8, "little") + content[8:start] + b" " * padding
    file.write_bytes(header + content[start:])

    (expected,) = Predictor(tmp_path, "cls")(photos / "a.jpg")
    predictor = Predictor(tmp_path, "cls")
    file.write_bytes(header + bytes(len(content) - start))
    (row,) = predictor(photos / "a.jpg")
    assert np.array_equal(row["features"], expected["features"])


def test_a_fork_of_a_process_that_has_computed_does_not_wait(predictor: Predictor) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    photo = Image.new("RGB", (2000, 2000))
    predictor(photo)
    child = get_context("fork").Process(target=predictor, args=(photo,))
    child.start()
    torch.set_num_threads(before)
    child.join(20)
    child.kill()
    assert child.exitcode == 0


# Photos -------------------------------------------------------------------------------------------


def write_data_uri(path: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


def read_before(path: Path) -> io.BytesIO:
    """Return a file object whose size another program has checked."""
    file = io.BytesIO(path.read_bytes())
    file.read()
    return file


def list_sources_of_requests(path: Path) -> dict[str, Any]:
    """A photo as programs and servers pass it."""
    return {
        "a path": path,
        "a name": str(path),
        "an opened image": Image.open(path),
        "bytes": path.read_bytes(),
        "a memoryview": memoryview(path.read_bytes()),
        "bytes in an array": np.fromfile(path, np.uint8),
        "a file object": path.open("rb"),
        "a list of file objects": [io.BytesIO(path.read_bytes())],
        "a file that was read": read_before(path),
        "a stream": SimpleNamespace(read=path.read_bytes),
        "an upload of FastAPI": UploadFile(path.open("rb")),
        "a data URI": write_data_uri(path),
        "base64": base64.b64encode(path.read_bytes()).decode(),
        "base64 in lines": base64.encodebytes(path.read_bytes()).decode(),
        "base64 as bytes": base64.b64encode(path.read_bytes()),
        "a data URI as bytes": write_data_uri(path).encode(),
        "base64 of web pages": base64.urlsafe_b64encode(path.read_bytes()).decode().rstrip("="),
        "one array": np.asarray(Image.open(path)),
        "a generator": (each for each in [path]),
    }


def test_a_photo_of_a_request_has_the_label_of_its_file(predictor: Predictor, photos: Path) -> None:
    (expected,) = predictor([photos / "a.jpg"])
    for name, source in list_sources_of_requests(photos / "a.jpg").items():
        (row,) = predictor(source)
        assert row["error"] is None, name
        assert row["label"] == expected["label"], name
        assert row["probability"] == approx(expected["probability"], abs=1e-5), name


def test_images_of_editors_galleries_and_rows_are_predicted(
    predictor: Predictor, photos: Path
) -> None:
    photo = Image.open(photos / "a.jpg").convert("RGB")
    editor = {"background": None, "layers": [], "composite": photo}
    expected = predictor([photo])
    assert predictor(editor) == expected
    assert predictor([editor]) == expected
    assert predictor([{"image": photo, "label": "cat"}]) == expected
    assert len(predictor([(photo, None), (photo, "a caption")])) == 2
    (row,) = predictor([{"b64": "x"}])
    assert row["error"] == "an image is a dict with the keys b64. Pass its image"


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 3), (3, 12, 10)], ids=str)
def test_one_image_is_one_row_and_a_batch_one_row_per_image(
    shape: tuple[int, ...], predictor: Predictor
) -> None:
    pixels = draw_pixels(*shape)
    rows = predictor([pixels])
    assert rows[0]["error"] is None
    assert predictor(pixels) == rows
    assert predictor(torch.from_numpy(pixels)) == rows
    if len(shape) == 3:
        assert len(predictor(np.stack([pixels, pixels]))) == 2
        assert len(predictor([np.stack([pixels, pixels])])) == 2
    if shape[-1] == 3:
        assert predictor(Image.fromarray(pixels)) == rows


def test_no_photos_have_no_rows(predictor: Predictor) -> None:
    assert predictor([]) == []


def test_what_is_no_photo_is_one_line(predictor: Predictor) -> None:
    with raises_one_line("`images`"):
        predictor(3)


def build_closed_file() -> io.BytesIO:
    file = io.BytesIO(b"closed")
    file.close()
    return file


async def read_later() -> bytes:
    return await asyncio.sleep(0, b"photo")


BAD_PHOTOS = {
    "a path with a null character": (lambda: "a\0.jpg", "null byte"),
    "a closed file": (build_closed_file, "closed file"),
    "a text file": (lambda: io.StringIO("text"), "mode 'rb'"),
    "an empty file": (lambda: io.BytesIO(b""), "empty"),
    "an asynchronous file": (lambda: SimpleNamespace(read=read_later), "pass its bytes"),
    "no image": (lambda: b"text", "4 bytes"),
    "nothing": (lambda: None, "row 1"),
    "a broken data URI": (lambda: "data:image/png;base64,%%%", "data:image"),
    "a data URI of text": (lambda: "data:,text", "data:,text"),
    "an empty data URI": (lambda: "data:", "data:"),
    "an address": (lambda: "https://a.org/1.png", "curl -O https://a.org/1.png"),
    "a URI of Spark": (lambda: "file:/my%20photos/1.png", "Pass the path: '/my photos/1.png'"),
    "a pattern": (lambda: "photos/*.png", "Pass the folder photos"),
    "a folder without images": (lambda: Path(__file__).parent, "no images in"),
    "an array of objects": (lambda: np.zeros((9, 9, 3), dtype=object), "array of object"),
}


@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize(("build", "words"), BAD_PHOTOS.values(), ids=BAD_PHOTOS)
def test_a_bad_photo_of_two_has_the_reason_in_its_row(
    build: Callable[[], Any], words: str, predictor: Predictor, photos: Path
) -> None:
    good, bad = predictor([photos / "a.jpg", build()])
    assert (good["error"], good["label"]) != (None, None)
    assert words in bad["error"]
    assert "\n" not in bad["error"]
    assert bad["label"] is None


# Batches ------------------------------------------------------------------------------------------


def build_batches(paths: list[str], contents: list[bytes]) -> dict[str, Any]:
    """A batch as each library passes it."""
    return {
        "arrays": {"path": np.array(paths), "id": np.arange(9)},
        "bytes": {"bytes": contents, "path": ["other"] * 9},
        "encoded": {"image": [{"bytes": content, "path": None} for content in contents]},
        "DataFrame": pd.DataFrame({"path": paths, "id": range(9)}, range(2, 11)),
        "Arrow": pa.table({"bytes": contents, "id": range(9)}),
        "Arrow of Spark": pa.record_batch({"path": pa.array(paths)}),
    }


@pytest.mark.parametrize(
    "kind", ["arrays", "bytes", "encoded", "DataFrame", "Arrow", "Arrow of Spark"]
)
def test_features_of_a_batch_equal_those_of_predict(kind: str, encoder: Path, photos: Path) -> None:
    """The other columns are kept. The model is not pickled."""
    paths = sorted_photos(photos)
    batch = build_batches(paths, [Path(path).read_bytes() for path in paths])[kind]
    expected = Predictor(encoder, NAMES)(paths)
    pickled = pickle.dumps(Predictor(encoder, NAMES, batch_size=4))
    assert len(pickled) < 1000
    outputs = pickle.loads(pickled)(batch)
    for name in NAMES:
        assert_allclose(outputs[name], np.array([row[name] for row in expected]), atol=1e-6)
    assert outputs["registers@1"].shape == (9, 2, 16)
    assert set(outputs["error"]) == {""}
    assert list(outputs.get("id", range(9))) == list(range(9))
    assert outputs.keys() - {"id", "path"} == {*NAMES, "error"}


def test_labels_of_a_batch_equal_those_of_its_photos(predictor: Predictor, photos: Path) -> None:
    paths = sorted_photos(photos)
    outputs = predictor({"path": [*paths, "absent.png"], "id": list(range(10))})
    rows = predictor(paths)
    assert list(outputs) == ["path", "id", "label", "probability", "error"]
    assert outputs["label"].tolist() == [*(row["label"] for row in rows), None]
    probabilities = [*(row["probability"] for row in rows), np.nan]
    assert_allclose(outputs["probability"], probabilities, atol=1e-6)
    assert [bool(error) for error in outputs["error"]] == [False] * 9 + [True]


@pytest.mark.parametrize(
    ("column", "words"),
    [
        ({"label": ["cat"]}, "the predictions would replace. Rename"),  # Such as the true labels
        ({"error": [""]}, "the predictions would replace. Rename"),  # Of another model
        ({"id": [7, 8]}, "the column id of the batch has 2 values, image has 1"),
    ],
)
def test_a_column_of_the_batch_that_does_not_fit_is_named(
    column: Any, words: str, predictor: Predictor
) -> None:
    with raises_one_line(words):
        predictor({"image": [np.zeros((8, 8), np.uint8)], **column})


def test_a_list_in_a_row_is_an_error_and_no_request(predictor: Predictor, photos: Path) -> None:
    photo = str(photos / "a.jpg")
    pair = np.zeros((2, 8, 8, 3), np.uint8)
    outputs = predictor({"path": [photo, [photo], ("https://a.org/1.png",), pair]})
    assert ["one image per row" in error for error in outputs["error"]] == [False, True, True, True]


@pytest.mark.parametrize("batch", [{"path": [], "id": []}, {}, pd.DataFrame()])
def test_an_empty_batch_has_empty_columns(batch: Any, encoder: Path) -> None:
    """Ray and Spark pass empty batches, for example after a filter."""
    outputs = Predictor(encoder, ["cls", "registers"])(batch)
    assert outputs["cls"].shape == (0, 16)
    assert outputs["registers"].shape == (0, 2, 16)
    assert len(outputs["error"]) == 0


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((12, 10), np.uint8),
        np.zeros((12, 10, 3), np.uint8),
        Image.new("L", (9, 9)),
        "a.png",
    ],
)
def test_one_image_instead_of_a_batch_is_an_error(image: Any, predictor: Predictor) -> None:
    with raises_one_line("image", "batched=True"):
        predictor({"image": image})


def test_unreadable_images_have_an_error_and_no_features(encoder: Path, photos: Path) -> None:
    embed = Predictor(encoder, "cls", image_column="photo", feature_dtype="float16")
    outputs = embed({"path": ["x", "y"], "photo": [b"broken", (photos / "a.jpg").read_bytes()]})
    assert outputs["cls"].dtype == np.float16
    assert np.isnan(outputs["cls"]).all(axis=1).tolist() == [True, False]
    assert list(map(bool, outputs["error"])) == [True, False]
    assert list(outputs) == ["path", "cls", "error"]


@pytest.mark.parametrize("column", [None, "photo"])
def test_a_batch_without_images_is_an_error(column: str | None, encoder: Path) -> None:
    with raises_one_line("image_column", "picture"):
        Predictor(encoder, image_column=column, features="cls")({"picture": []})


# datasets, Ray and Spark --------------------------------------------------------------------------


def test_datasets_map_adds_the_features_of_the_files_that_were_loaded(
    encoder: Path, photos: Path, tmp_path: Path
) -> None:
    """`datasets` takes the result of an equal function from its cache."""
    model = shutil.copytree(encoder, tmp_path / "model")
    datasets.Dataset.from_dict({"path": sorted_photos(photos)}).save_to_disk(tmp_path / "table")
    expected: dict[Predictor, np.ndarray] = {}
    for mean in (0.5, 0.2):
        ViTCLSImageProcessor(size=[32, 48], image_mean=[mean] * 3).save_pretrained(model)
        batch = {"path": sorted_photos(photos)}
        expected[Predictor(model, "cls")] = Predictor(model, "cls")(batch)["cls"]
        for predictor, features in expected.items():
            table = datasets.load_from_disk(tmp_path / "table")
            mapped = table.map(predictor, batched=True, batch_size=4)
            assert_allclose(np.array(mapped["cls"]), features, atol=1e-6)
            assert set(mapped["error"]) == {""}


@pytest.fixture
def ray() -> Iterator[Any]:
    module = pytest.importorskip("ray")
    module.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield module
    module.shutdown()


def read_lines(library: str) -> str:
    """Return the lines of docs/predicting.md that require a library."""
    comment = f"not run: requires {library}"
    (block,) = (
        block for block in read_blocks(ROOT / "docs" / "predicting.md") if block.comment == comment
    )
    return block.text


@pytest.mark.slow
def test_the_lines_for_ray_in_the_docs_write_the_features_of_each_image(
    encoder: Path, photos: Path, tmp_path: Path, ray: Any, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(encoder, "runs/photos")
    shutil.copytree(photos, "photos", ignore=shutil.ignore_patterns(".hidden"))
    exec(read_lines("Ray"), {})
    written = ray.data.read_parquet(str(tmp_path / "features")).take_all()
    written.sort(key=lambda row: row["path"])
    assert len(written) == 10
    assert [Path(row["path"]).name for row in written if row["error"]] == ["notes.txt"]
    readable = [row for row in written if not row["error"]]
    expected = Predictor(encoder, "cls")({"path": [row["path"] for row in readable]})["cls"]
    assert_allclose([row["cls"] for row in readable], expected, atol=1e-6)


@pytest.mark.slow
def test_the_lines_for_spark_in_the_docs_work(
    encoder: Path, photos: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    pytest.importorskip("pyspark")
    if shutil.which("java") is None:
        pytest.skip("Spark requires Java")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.chdir(tmp_path)
    shutil.copy(photos / "a.jpg", "photo.jpg")
    predictor = Predictor(encoder, ["cls", "mean"])
    found = {"__name__": "__main__", "predictor": predictor}
    exec(read_lines("Spark"), found)
    found["spark"].stop()
    (row,) = found["rows"]
    expected = predictor({"path": ["photo.jpg"]})
    assert_allclose(row["cls"], expected["cls"][0], atol=1e-6)
    assert_allclose(row["mean"], expected["mean"][0], atol=1e-6)
    assert (row["path"], row["error"]) == ("photo.jpg", "")
