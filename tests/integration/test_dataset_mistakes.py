"""Mistakes in a dataset or its flags, which a command names before it writes a result."""

from pathlib import Path

import pytest
from helpers.command_in_process import run_here
from helpers.photo_folders import write_photos


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate")]

COMMANDS = {
    "finetune": ["--model", "vitcls-tiny"],
    "pretrain": ["--model", "vitcls-tiny"],
    "add-task": ["--model", "m", "--name", "kind"],
    "add-class": ["--model", "m"],
}
TINY = (
    "--model vitcls-tiny --hidden-size 32 --num-hidden-layers 2 --num-attention-heads 2 "
    "--image-size 32 --patch-size 16 --max-steps 1 --num-workers 0 --no-report --no-probe"
).split()


def finetune(output_dir: Path, *flags: str) -> int:
    return run_here("finetune", *TINY, "--output-dir", str(output_dir), *flags)


# The output folder --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_folder_in_the_dataset_is_refused_before_anything_is_written(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of the run would become a class of the next run."""
    photos = write_photos(tmp_path / "photos", range(5))
    files = sorted(tmp_path.rglob("*"))
    output = photos / "runs" / "first"
    flags = ["--dataset", str(photos), "--output-dir", str(output)]

    assert run_here(command, *COMMANDS[command], *flags) == 1

    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"--output-dir {output} is in the folder of the dataset" in error
    assert sorted(tmp_path.rglob("*")) == files


def test_the_folder_of_the_dataset_is_no_output_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = write_photos(tmp_path / "photos", range(5))
    assert finetune(photos, "--dataset", str(photos)) == 1
    assert "is in the folder of the dataset" in capsys.readouterr().err
    assert not (photos / "config.resolved.yaml").exists()


def test_runs_next_to_split_folders_can_be_repeated(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_photos(tmp_path / split, range(4))
    for name in ("first", "second"):
        assert finetune(tmp_path / "runs" / name, "--dataset", str(tmp_path)) == 0
        write_photos(tmp_path / "runs" / name, range(1), "images")


def test_an_output_folder_in_a_split_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_photos(tmp_path / split, range(4))
    assert finetune(tmp_path / "test" / "run", "--dataset", str(tmp_path)) == 1
