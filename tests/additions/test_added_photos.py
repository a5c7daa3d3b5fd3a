"""Photos of added tasks and classes: their scenes, what measures them, and the page about them."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.additions import add_class, add_task
from helpers.command_in_process import finetune
from helpers.photo_folders import write_bursts, write_shots
from pytest import CaptureFixture, LogCaptureFixture, MonkeyPatch

from modeling_vitcls import evaluate
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing.published_files import collect_files
from modeling_vitcls.publishing.report import write_report


@pytest.fixture(scope="module")
def bursts(module_path: Path) -> Path:
    """Write five shots of each of sixteen objects, whose labels mean nothing."""
    write_bursts(module_path / "bursts")
    return module_path / "bursts"


@pytest.fixture(scope="module")
def run(converted_encoder: Path, bursts: Path, module_path: Path) -> Path:
    """Return a frozen run on the objects."""
    return finetune(converted_encoder, bursts, module_path / "run")["folder"]


@pytest.fixture(scope="module")
def with_other_tokens(converted_encoder: Path, bursts: Path, module_path: Path) -> Path:
    """Return a frozen run that reads two layers and a distillation token."""
    flags = "--pooled-layers -5 -1 --model-config num_distillation_tokens=1"
    return finetune(converted_encoder, bursts, module_path / "other", *flags.split())["folder"]


@pytest.fixture(autouse=True)
def no_page(monkeypatch: MonkeyPatch) -> None:
    """Write no report, which takes longer than the addition, except for `with_task`."""
    monkeypatch.setattr("modeling_vitcls.publishing.report.write_report", lambda folder: None)


@pytest.fixture(scope="module", autouse=True)
def one_sheet() -> Iterator[None]:
    """Draw one sheet for each report, instead of six, and certify one image (test_additions.py)."""
    with MonkeyPatch.context() as patch:
        patch.setattr("modeling_vitcls.publishing.report.NUM_SHOWN_IMAGES", 1)
        patch.setattr("modeling_vitcls.additions.certificate.MAX_IMAGES", {1: 1})
        yield


@pytest.mark.slow
def test_shots_of_an_object_do_not_measure_each_other_in_a_task(
    run: Path, bursts: Path, with_task: tuple[Path, Any], tmp_path: Path
) -> None:
    """The run knows how near the shots are, and an encoder that no run has used measures it."""
    for record in (add_task(run, bursts, "kind", tmp_path / "task"), with_task[1]):
        result = record["result"]
        assert record["scenes"]["num_joined"] == result["num_images"] == 80
        assert result["accuracy_interval"][0] < 0.5


def test_shots_of_an_object_are_on_one_side_of_the_held_out_photos_of_a_task(
    converted_encoder: Path, bursts: Path, tmp_path: Path
) -> None:
    record = add_task(converted_encoder, bursts, "kind", tmp_path / "task", held_out_fraction=0.25)
    rows = pd.read_parquet(tmp_path / "task/predictions.parquet")
    objects = rows["image"].str.extract(r"IMG_(\d+)\d.png")[0]
    assert set(objects.value_counts()) == {5}
    assert record["result"]["num_images"] == len(rows)
    assert record["num_training_images"] == 80 - len(rows)
    splits = pd.read_parquet(tmp_path / "task/splits.parquet")
    assert (splits["split"] == "test").sum() == len(rows)


def test_held_out_photos_of_a_dataset_that_repeat_training_photos_are_counted(
    converted_encoder: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    write_bursts(tmp_path / "photos/train")
    write_bursts(tmp_path / "photos/test", [10, 11, 60, 61], [5])
    record = add_task(converted_encoder, tmp_path / "photos", "kind", tmp_path / "task")
    known = record["in_trained_scenes"]["names"]
    assert known == ["test/cups/IMG_105.png", "test/pens/IMG_115.png"]
    assert "2 of 4 photos are of scenes that the model was trained on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "model", ["run", pytest.param("with_other_tokens", marks=pytest.mark.slow)]
)
def test_photos_that_repeat_training_photos_are_known_after_additions(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Photos of the model, of added classes with labels that mean nothing, and of a task."""
    for scene in range(40, 50):
        write_shots(tmp_path / "new" / ("vase", "lamp")[scene % 2], scene)
    source = request.getfixturevalue(model)
    record = add_class(source, tmp_path / "new", tmp_path / "class")
    assert record["scenes"]["num_joined"] == record["result"]["num_images"] == 50
    assert record["result"]["recall"] < 0.5

    write_shots(tmp_path / "task photos/dusk", 50)
    write_shots(tmp_path / "task photos/noon", 51)
    add_task(tmp_path / "class", tmp_path / "task photos", "light", tmp_path / "task")
    for label, scene in (("cups", 10), ("vase", 40), ("vase", 60)):
        write_shots(tmp_path / "more" / label, scene, [5])
    known = evaluate(tmp_path / "task", tmp_path / "more", num_workers=0)["in_trained_scenes"]
    assert known["names"] == ["cups/IMG_105.png", "vase/IMG_405.png"]
    assert known["others"]["num_images"] == 1
    reset_accelerate()
    for label, scene in (("dusk", 50), ("noon", 10)):
        write_shots(tmp_path / "lights" / label, scene, [5])
    results = evaluate(tmp_path / "task", tmp_path / "lights", task="light", num_workers=0)
    assert results["in_trained_scenes"]["names"] == ["dusk/IMG_505.png"]


# What is written ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_task(converted_encoder: Path, bursts: Path, module_path: Path) -> tuple[Path, Any]:
    """Return a folder with an added task, and its record."""
    folder = module_path / "task"
    reset_accelerate()
    return folder, add_task(converted_encoder, bursts, "kind", folder)


def test_the_page_of_an_addition_is_written_again_from_its_folder(
    with_task: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, record = with_task
    shutil.copytree(folder, tmp_path / "task")
    (tmp_path / "task/report.html").unlink()
    write_report(ModelFolder(tmp_path / "task"))
    num_wrong = record["result"]["num_images"] - record["result"]["num_right"]
    text = (tmp_path / "task/report.html").read_text()
    assert f"{num_wrong} of 80 predictions are wrong" in text


def test_a_task_is_measured_by_photos_left_out_and_corrected_for_the_choice_of_its_classifier(
    with_task: tuple[Path, Any],
) -> None:
    folder, record = with_task
    result = record["result"]
    assert result["num_folds"] == record["num_folds"] > 1
    assert result["accuracy"] == record["accuracy"]
    assert result["accuracy"] != result["num_right"] / result["num_images"]
    rows = pd.read_parquet(folder / "predictions.parquet")
    is_right = rows["label"] == rows["prediction"]
    assert is_right.sum() == result["num_right"]


def test_private_photos_of_an_addition_stay_on_the_machine(
    with_task: tuple[Path, Any], tmp_path: Path
) -> None:
    """Also if the run of the model was on public images."""
    folder, _ = with_task
    shutil.copytree(folder, tmp_path / "task")
    (tmp_path / "task/config.resolved.yaml").write_text("dataset: digits\nmodel: vitcls-tiny\n")
    files = collect_files(ModelFolder(tmp_path / "task"), "me/mine")
    assert "results.json" in files
    assert not files.keys() & {"report.html", "predictions.parquet", "addition.resolved.yaml"}


def test_photos_in_a_folder_named_like_a_dataset_on_the_hub_are_private(
    run: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_shots(tmp_path / "ann/new/vase", 40, range(1))
    add_class(run, "ann/new", "class")
    assert "report.html" in ModelFolder(tmp_path / "class").private_files


@pytest.mark.parametrize("shots", [range(1), range(5)], ids=["one photo", "one object"])
def test_a_class_without_a_result_has_a_page(
    shots: range, run: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.undo()  # of `no_page`
    write_shots(tmp_path / "new/vase", 40, shots)
    assert "result" not in add_class(run, tmp_path / "new", tmp_path / "class")
    assert "report.html" in (tmp_path / "class/README.md").read_text()


def test_classes_beside_one_that_has_one_photo_are_measured(
    run: Path, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    write_shots(tmp_path / "new/vase", 40, [0])
    for scene in range(41, 45):
        write_shots(tmp_path / "new/lamp", scene, [0])
    assert add_class(run, tmp_path / "new", tmp_path / "class")["result"]["num_images"] == 4
    assert "no result measures vase" in caplog.text
