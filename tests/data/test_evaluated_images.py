"""`vitcls evaluate` evaluates all given images, except those that the model was trained on."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.command_in_process import run_here
from helpers.demo_page import open_page
from helpers.photo_folders import write_photos
from helpers.read_datasets import read_training_data
from helpers.tiny_models import raises_one_line
from helpers.tiny_options import build_tiny_options, run_to_folder
from pytest import CaptureFixture, LogCaptureFixture

from modeling_vitcls import evaluate, inspect_tokens
from modeling_vitcls.data.images import DatasetImages
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing.published_files import list_published_files
from modeling_vitcls.runtime.files import read_json


def train(folder: Path, dataset: Path, **flags: Any) -> Path:
    """Fine-tune a tiny model for two steps."""
    return run_to_folder(build_tiny_options(folder, dataset, max_steps=2, batch_size=8, **flags))


@pytest.fixture(scope="module")
def photos(module_path: Path) -> Path:
    """Return a folder with 60 photos without splits, `train`, and a model of them, `run`."""
    write_photos(module_path / "train", range(30))
    train(module_path / "run", module_path / "train")
    return module_path


def run_evaluate(tmp_path: Path, model: Path, dataset: Path, *flags: str) -> dict[str, Any]:
    """Run `vitcls evaluate` and return what it writes."""
    reset_accelerate()
    output = tmp_path / "evaluation.json"
    command = f"evaluate --model {model} --dataset {dataset} --output {output} --num-workers 0"
    assert run_here(*command.split(), *flags) == 0
    return read_json(output)


# Images that the model was not trained on ---------------------------------------------------------


def test_the_test_split_is_evaluated_or_else_the_validation_split(
    photos: Path, tmp_path: Path
) -> None:
    write_photos(tmp_path / "AB/train", range(40, 45))
    for folder, numbers, split in (
        ("val", range(50, 57), "validation"),
        ("test", range(60, 63), "test"),
    ):
        write_photos(tmp_path / "AB" / folder, numbers)
        found = run_evaluate(tmp_path, photos / "run", tmp_path / "AB")
        assert found["split"] == split
        assert found["num_images"] == 2 * len(numbers)


def test_a_training_table_whose_file_is_missing_has_no_other_images(
    photos: Path, tmp_path: Path
) -> None:
    run = train(tmp_path / "run", photos / "train", held_out_fraction=0)
    files = sorted((photos / "train").rglob("*.png"))
    names = [*map(str, files), str(tmp_path / "missing.png")]
    labels = [*(file.parent.name for file in files), files[0].parent.name]
    table = tmp_path / "table.csv"
    pd.DataFrame({"file_name": names, "label": labels}).to_csv(table, index=False)
    with raises_one_line("was trained on all 60 images", "that are there"):
        evaluate(run, str(table), num_workers=0)


def test_a_model_without_splits_is_evaluated_on_all_images_and_a_line_says_so(
    photos: Path, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    shutil.copytree(photos / "run", tmp_path / "run")
    (tmp_path / "run/splits.parquet").unlink()
    assert run_evaluate(tmp_path, tmp_path / "run", photos / "train")["num_images"] == 60
    assert caplog.text.count("splits.parquet") == 1


def test_splits_without_an_evaluation_split_are_an_error(photos: Path) -> None:
    pairs = [(str(path), path.parent.name) for path in (photos / "train").glob("*/1.png")]
    with raises_one_line("split", "a, b"):
        evaluate(photos / "run", {"a": pairs, "b": pairs})


# Images that the model was trained on -------------------------------------------------------------


def test_the_training_folder_is_evaluated_on_the_images_that_training_held_out(
    photos: Path, tmp_path: Path
) -> None:
    trained = read_json(photos / "run/results.json")
    found = run_evaluate(tmp_path, photos / "run", photos / "train")
    for name in ("num_images", "accuracy", "confusion_matrix"):
        assert found[name] == trained[name]
    assert found["num_left_out_images"] == 60 - trained["num_images"]


def test_training_images_are_recognized_in_a_folder_that_was_copied_renamed_and_extended(
    photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(photos / "train", tmp_path / "other")
    for path in (tmp_path / "other").glob("*/*.png"):
        path.rename(path.with_name(f"photo {path.name}"))
    write_photos(tmp_path / "other", range(30, 35))
    for path in (tmp_path / "other").glob("*/3?.png"):
        path.rename(path.with_stem(path.stem[1]))  # the name of a training image
    found = run_evaluate(tmp_path, photos / "run", tmp_path / "other")
    assert (found["num_images"], found["num_left_out_images"]) == (22, 48)


def test_training_images_in_a_test_split_are_left_out(photos: Path, tmp_path: Path) -> None:
    write_photos(tmp_path / "AB/test", range(30, 40))
    trained = read_training_data(photos / "train").train.images.get_names()
    shutil.copy(photos / "train" / trained[0], tmp_path / "AB/test/cat/again.png")
    write_photos(tmp_path / "AB/train", range(50, 55))
    found = run_evaluate(tmp_path, photos / "run", tmp_path / "AB")
    assert (found["num_images"], found["num_left_out_images"]) == (20, 1)


def test_only_training_images_are_an_error(tmp_path: Path) -> None:
    write_photos(tmp_path / "AB/train", range(20))
    write_photos(tmp_path / "AB/val", range(20, 30))
    model = train(tmp_path / "run", tmp_path / "AB")
    assert run_evaluate(tmp_path, model, tmp_path / "AB")["num_images"] == 20
    with raises_one_line("all 40 images", "results.json", "split='train'"):
        evaluate(model, tmp_path / "AB/train")


# Flags --------------------------------------------------------------------------------------------


def test_a_named_split_is_evaluated_whole(
    photos: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    found = run_evaluate(tmp_path, photos / "run", photos / "train", "--split", "train")
    assert (found["num_images"], found["num_left_out_images"]) == (60, 0)
    assert "training used 48" in capsys.readouterr().out
    assert "accuracy_interval" not in found  # training images say nothing of new photos


def test_images_are_drawn_at_random(photos: Path, tmp_path: Path) -> None:
    other = write_photos(tmp_path / "test", range(100, 130))
    flags = ("--max-images", "20", "--per-image", str(tmp_path / "rows.parquet"))
    drawn = run_evaluate(tmp_path, photos / "run", other, *flags)
    assert drawn["num_images"] == 20
    assert {row["images"] for row in drawn["per_class"]} != {0, 20}  # not only the first class


def test_other_photos_are_inspected_whole(photos: Path, tmp_path: Path) -> None:
    other = write_photos(tmp_path / "other", range(100, 110))
    output = tmp_path / "report.html"
    for dataset, count in ((photos / "train", 12), (other, 20)):
        found = inspect_tokens(photos / "run", dataset=dataset, output=output, num_images=1)
        assert found.num_images == count


def test_predictions_of_training_photos_are_said_to_measure_nothing(
    photos: Path, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    """`predict`, `look` and the page recognize them under any name."""
    model = photos / "run"
    data = read_training_data(photos / "train")
    names = [part.images.get_names()[0] for part in (data.train, data.held_out)]
    files = [
        shutil.copy(photos / "train" / name, tmp_path / f"{index}.png")
        for index, name in enumerate(names)
    ]
    run_here("predict", "--model", model, *files)
    assert "the model was trained on 1 of 2 images" in caplog.text
    caplog.clear()
    reset_accelerate()
    shutil.copytree(model, tmp_path / "unlisted").joinpath("splits.parquet").unlink()
    run_here("predict", "--model", tmp_path / "unlisted", *files)
    assert not caplog.text

    ask = open_page(model)
    sheets = []
    for file in files:
        sheets.append(ask(str(file))[-1])
        run_here("look", file, "--model", model, "-o", tmp_path / "sheet.html")
        sheets.append((tmp_path / "sheet.html").read_text(encoding="utf-8"))
    is_said = ["this photo trained the model" in sheet for sheet in sheets]
    assert is_said == [True, True, False, False]


# The table ----------------------------------------------------------------------------------------


def test_the_table_lists_each_image_of_the_run_by_its_content(photos: Path) -> None:
    data = read_training_data(photos / "train")
    table = pd.read_parquet(photos / "run/splits.parquet")
    assert table.groupby("split")["key"].apply(sorted).to_dict() == {
        "train": sorted(data.train.images.compute_content_keys().tolist()),
        "test": sorted(data.held_out.images.compute_content_keys().tolist()),
    }
    assert set(table["task"]) == {""}
    assert "splits.parquet" in list_published_files(ModelFolder(photos / "run"))


def test_images_are_the_same_only_if_every_byte_is(tmp_path: Path) -> None:
    """Files of the same size differ if any of their bytes differs."""
    contents = [bytearray(100_000) for _ in range(4)]
    for content, position in zip(contents[1:], (0, 30_000, 99_999), strict=True):
        content[position] = 1
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    keys = DatasetImages.from_list(list(map(str, paths))).compute_content_keys()

    assert len(set(keys.tolist())) == 4
