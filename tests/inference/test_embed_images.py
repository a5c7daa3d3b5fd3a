"""`EmbedImages` in this process, after pickling, in `datasets.map` and in Ray."""

import pickle
import re
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers.prediction_photos import predict, sorted_photos
from helpers.scripts_in_process import SCRIPTS
from helpers.tiny_models import build_tiny_config, raises_one_line, save_with_processor
from PIL import Image

from modeling_vitcls import EmbedImages, ViTCLSImageProcessor, ViTCLSModel


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an encoder with two register tokens."""
    model = ViTCLSModel(build_tiny_config(num_register_tokens=2, image_size=(32, 48)))
    return save_with_processor(
        model, tmp_path_factory.mktemp("model"), ViTCLSImageProcessor(size=[32, 48])
    )


def test_features_equal_those_of_predict(encoder: Path, photos: Path) -> None:
    """Batches contain paths, bytes or encoded images.

    The other columns are kept. The model is not pickled.
    """
    names = ["cls", "registers@1", "mean", "patches"]
    paths = sorted_photos(photos)
    model = ViTCLSModel.from_pretrained(encoder).eval()
    processor = ViTCLSImageProcessor.from_pretrained(encoder)
    expected = predict(model, processor, paths, features=names)
    embed: Any = EmbedImages(encoder, names, batch_size=4)
    embed({"path": paths[:1]})

    restored = pickle.loads(pickle.dumps(embed))
    assert embed.predictor.batch_size == 4
    assert restored.predictor is None

    contents = [Path(path).read_bytes() for path in paths]
    for batch in (
        {"path": np.array(paths)},
        {"bytes": contents, "path": ["renamed.png"] * 9, "id": list(range(9))},
        {"image": [{"bytes": content, "path": None} for content in contents]},
    ):
        outputs = restored(batch)
        for name in names:
            np.testing.assert_allclose(
                outputs[name], np.array([row[name] for row in expected]), atol=1e-6
            )
        assert outputs["registers@1"].shape == (9, 2, 16)
        assert set(outputs["error"]) == {""}
        assert outputs.get("id", list(range(9))) == list(range(9))


@pytest.mark.parametrize("batch", [{"path": [], "id": []}, {}])
def test_an_empty_batch_has_empty_columns(batch: dict[str, Any], encoder: Path) -> None:
    """Ray and Spark pass empty batches, for example after a filter."""
    outputs = EmbedImages(encoder, ["cls", "registers"])(batch)
    assert outputs["cls"].shape == (0, 16)
    assert outputs["registers"].shape == (0, 2, 16)
    assert len(outputs["error"]) == 0
    assert "path" not in outputs


@pytest.mark.parametrize(
    "image", [np.zeros((12, 10), np.uint8), np.zeros((12, 10, 3), np.uint8), Image.new("L", (9, 9))]
)
def test_one_image_instead_of_a_batch_is_an_error(image: Any, encoder: Path) -> None:
    with raises_one_line("image", "batched=True"):
        EmbedImages(str(encoder))({"image": image})


def test_unreadable_images_have_an_error_and_no_features(encoder: Path, photos: Path) -> None:
    embed = EmbedImages(encoder, image_column="photo", dtype="float16")
    outputs = embed({"path": ["x", "y"], "photo": [b"broken", (photos / "a.jpg").read_bytes()]})
    assert outputs["cls"].dtype == np.float16
    assert np.isnan(outputs["cls"]).all(axis=1).tolist() == [True, False]
    assert list(map(bool, outputs["error"])) == [True, False]
    assert list(outputs) == ["path", "cls", "error"]


@pytest.mark.parametrize("column", [None, "photo"])
def test_a_batch_without_images_is_an_error(column: str | None, encoder: Path) -> None:
    with raises_one_line("image_column", "picture"):
        EmbedImages(encoder, image_column=column)({"picture": []})


def test_datasets_map_adds_features(encoder: Path, photos: Path) -> None:
    table = datasets.Dataset.from_dict({"path": sorted_photos(photos)})
    mapped = table.map(EmbedImages(encoder), batched=True, batch_size=4)
    whole = EmbedImages(encoder)({"path": sorted_photos(photos)})
    np.testing.assert_allclose(np.array(mapped["cls"]), whole["cls"], atol=1e-6)
    assert set(mapped["error"]) == {""}


def test_features_are_those_of_the_files_as_they_are(
    encoder: Path, photos: Path, tmp_path: Path
) -> None:
    """`datasets` takes the result of an equal function from its cache."""
    model = shutil.copytree(encoder, tmp_path / "model")
    datasets.Dataset.from_dict({"path": sorted_photos(photos)}).save_to_disk(tmp_path / "table")
    embed = EmbedImages(model)
    for mean in (0.5, 0.2):
        ViTCLSImageProcessor(size=[32, 48], image_mean=[mean] * 3).save_pretrained(model)
        expected = EmbedImages(model)({"path": sorted_photos(photos)})["cls"]
        for function in (embed, EmbedImages(model)):
            table = datasets.load_from_disk(tmp_path / "table").map(function, batched=True)
            np.testing.assert_allclose(np.array(table["cls"]), expected, atol=1e-6)


@pytest.fixture
def ray() -> Iterator[Any]:
    module = pytest.importorskip("ray")
    module.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield module
    module.shutdown()


@pytest.mark.slow
def test_the_script_for_ray_writes_the_features_of_each_image(
    encoder: Path, photos: Path, tmp_path: Path, ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = sorted_photos(photos)
    contents = {"bytes": [Path(path).read_bytes() for path in paths], "path": paths}
    datasets.Dataset.from_dict(contents).to_parquet(tmp_path / "photos.parquet")
    flags = ["--model", encoder, "--images", tmp_path / "photos.parquet", "--batch-size", 4]
    flags += ["--output", tmp_path / "features"]
    monkeypatch.setattr(sys, "argv", ["ray_features.py", *map(str, flags)])
    runpy.run_path(str(SCRIPTS / "ray_features.py"), run_name="__main__")
    written = ray.data.read_parquet(str(tmp_path / "features")).take_all()
    written.sort(key=lambda row: row["path"])
    assert [row["path"] for row in written] == sorted(paths)
    expected = EmbedImages(encoder)({"path": sorted(paths)})["cls"]
    np.testing.assert_allclose([row["cls"] for row in written], expected, atol=1e-6)


@pytest.mark.slow
def test_the_lines_for_spark_in_the_docs_work(
    encoder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyspark")
    if shutil.which("java") is None:
        pytest.skip("Spark requires Java")
    page = (SCRIPTS.parent / "docs" / "predicting.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"requires Spark -->\n```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.chdir(tmp_path)
    shutil.copy(photos / "a.jpg", "photo.jpg")
    embed = EmbedImages(encoder, ["cls", "mean"])
    found: dict[str, Any] = {"__name__": "__main__", "embed": embed}
    exec(block, found)
    found["spark"].stop()
    (row,) = found["rows"]
    expected = embed({"path": ["photo.jpg"]})
    np.testing.assert_allclose(row["cls"], expected["cls"][0], atol=1e-6)
    np.testing.assert_allclose(row["mean"], expected["mean"][0], atol=1e-6)
    assert (row["path"], row["error"]) == ("photo.jpg", "")
