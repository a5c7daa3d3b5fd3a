"""Mistakes in a dataset or its flags, which a command names before it writes a result."""

from pathlib import Path

import pytest
from helpers.command_in_process import fail, run_here
from helpers.photo_folders import write_photos
from PIL import Image
from pytest import CaptureFixture

from modeling_vitcls.runtime.files import read_json


TINY = (
    "--model vitcls-tiny --hidden-size 32 --num-hidden-layers 2 --num-attention-heads 2 "
    "--image-size 32 --patch-size 16 --max-steps 1 --num-workers 0 --no-report --no-probe"
).split()


def finetune(output_dir: Path, *flags: str) -> int:
    return run_here("finetune", *TINY, "--output-dir", output_dir, *flags)


# The output folder --------------------------------------------------------------------------------


@pytest.mark.parametrize(("folder", "earlier"), [(".", []), ("cat", []), ("cat", ["digits"])])
def test_an_output_folder_with_images_of_the_dataset_is_refused_before_anything_is_written(
    folder: str, earlier: list[str], tmp_path: Path
) -> None:
    """The next scan would skip them, as figures of the run."""
    photos = write_photos(tmp_path / "photos", range(5))
    files = sorted(tmp_path.rglob("*"))
    flags = ["--dataset", *earlier, photos, "--output-dir", photos / folder]
    assert "contains images of the dataset" in fail("finetune", "--model", "vitcls-tiny", *flags)
    assert sorted(tmp_path.rglob("*")) == files


def test_runs_in_the_folder_of_the_dataset_can_be_repeated(tmp_path: Path) -> None:
    write_photos(tmp_path, range(20))
    for name in ("first", "second"):
        assert finetune(tmp_path / "runs" / name, "--dataset", str(tmp_path)) == 0
        write_photos(tmp_path / "runs" / name, range(1), "images")


# Labels and tables --------------------------------------------------------------------------------


def test_a_table_in_another_encoding_is_named_in_one_line(
    tmp_path: Path, capfd: CaptureFixture
) -> None:
    table = tmp_path / "table.csv"
    table.write_text("file_name,label\n0.png,hüte\n", encoding="latin-1")
    assert finetune(tmp_path / "run", "--dataset", str(table)) == 1
    error = capfd.readouterr().err
    assert f"error: {table} is not encoded as UTF-8" in error
    assert "Failed to read" not in error
    assert "evaluate --help" not in error


def test_label_names_are_refused_if_the_folders_have_other_names(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", range(5))
    command = ["finetune", *TINY, "--output-dir", tmp_path / "run", "--dataset", photos]
    error = fail(*command, "--label-names", "a", "b")
    assert "'cat', 'dog'" in error
    assert "Remove --label-names" in error
    assert run_here(*command, "--label-names", "cat", "dog") == 0


# HEIC ---------------------------------------------------------------------------------------------


def test_heic_photos_are_trained_on_and_predicted(tmp_path: Path, capsys: CaptureFixture) -> None:
    """Worker processes decode them, too."""
    pytest.importorskip("pillow_heif").register_heif_opener()
    photos = write_photos(tmp_path / "photos", range(5))
    for file in photos.glob("cat/*.png"):
        with Image.open(file) as image:
            image.resize((64, 64)).save(file.with_suffix(".HEIC"), "HEIF")
        file.unlink()
    flags = ["2" if flag == "0" else flag for flag in TINY]

    run = tmp_path / "run"
    assert run_here("finetune", *flags, "--output-dir", run, "--dataset", photos) == 0
    assert "cat: 5, dog: 5" in capsys.readouterr().out
    assert read_json(run / "results.json")["num_unreadable_images"] == 0

    assert run_here("predict", "--model", run, photos / "cat", "--num-workers", "1") == 0
    assert capsys.readouterr().out.count(".HEIC") >= 5
