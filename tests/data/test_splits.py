"""`--resume` with other data than at the start of the run is an error that names the change."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from accelerate_state import reset_accelerate
from photo_folders import write_photos
from tiny_models import raises_one_line
from tiny_options import build_tiny_options

from modeling_vitcls.data.splits import compute_fingerprint, describe_change
from modeling_vitcls.options import (
    FinetuneOptions,
    PretrainOptions,
)
from modeling_vitcls.training.finetune import FinetuneTask
from modeling_vitcls.training.pretrain import PretrainTask
from modeling_vitcls.training.task import run_task


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def get_options(dataset: Path, streaming: bool = False) -> FinetuneOptions:
    """Return options of a run of two steps for any number of images."""
    names = ("cat", "dog") if dataset.suffix else None
    flags = {"streaming": streaming, "label_names": names, "max_steps": 2, "batch_size": 8}
    return build_tiny_options(dataset.parent / "run", dataset, **flags)


def start(options: FinetuneOptions) -> FinetuneOptions:
    """Start a run that does not finish, and return the options to resume it."""
    run_task(FinetuneTask(options))
    (options.output_dir / "results.json").unlink()
    reset_accelerate()
    return replace(options, run=replace(options.run, resume=True))


def swap_classes(photos: Path) -> None:
    (photos / "cat").rename(photos / "other")
    (photos / "dog").rename(photos / "cat")
    (photos / "other").rename(photos / "dog")


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "grown": (lambda photos: write_photos(photos, range(20, 60), "cat"), "training images, but there are"),
    "shrunk": (lambda photos: [path.unlink() for path in photos.glob("*/1*.png")], "training images, but there are"),
    "class added": (
        lambda photos: write_photos(photos, range(20), "ant"),
        "the classes of 'label' were 2 (cat, dog), but are 3 (ant, cat, dog) now",
    ),
    "classes swapped": (swap_classes, "the names of the images are the same, but the contents differ"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES)
def test_a_changed_folder_is_an_error(tmp_path: Path, change: Callable[[Path], object], reason: str) -> None:
    photos = write_photos(tmp_path / "photos", range(20), "cat", "dog")
    options = start(get_options(photos))
    FinetuneTask(options)  # with the same data
    reset_accelerate()
    change(photos)
    with raises_one_line("--resume: the dataset has changed since the run in", reason, "Restore the dataset"):
        FinetuneTask(options)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_changed_table_is_an_error(tmp_path: Path, streaming: bool) -> None:
    """Check names, order and labels, stored and streamed."""
    photos = write_photos(tmp_path / "photos", range(60), "cat", "dog")
    rows = [f"photos/{path.parent.name}/{path.name},{path.parent.name}" for path in sorted(photos.glob("*/*.png"))]
    table = tmp_path / "list.csv"

    def write(lines: list[str]) -> None:
        table.write_text("\n".join(["image,label", *lines]), encoding="utf-8")

    write(rows)
    options = start(get_options(table, streaming))
    for lines, reason in (
        (rows[::-1], "the images are the same, but the order of the images differs"),
        ([row.replace(",cat", ",dog") for row in rows], "the images are the same, but some labels differ"),
    ):
        write(lines)
        with raises_one_line("--resume: the dataset has changed", reason):
            FinetuneTask(options)
        reset_accelerate()
    write(rows)
    assert FinetuneTask(options).runner.facts is not None


def test_other_names_and_other_held_out_images_have_different_errors() -> None:
    names, labels = [f"{number}.png" for number in range(100)], [number % 2 for number in range(100)]
    counts = {"classes": {"label": ["a", "b"]}, "num_training_images": 100, "num_held_out_images": 9, "held_out": 1}
    before = counts | compute_fingerprint(names, labels, lambda index: b"")
    renamed = counts | compute_fingerprint([*names[:-1], "new.png"], labels, lambda index: b"")
    assert describe_change(before, before) is None
    assert describe_change(before, renamed) == "the number of images is the same, but the names of the images differ"
    assert describe_change(before, before | {"held_out": 2}) == "different images are held out"


def test_pre_training_is_checked_too(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", range(20), "cat", "dog")
    options = build_tiny_options(tmp_path / "run", photos, PretrainOptions, max_steps=2, batch_size=8)
    run_task(PretrainTask(options))
    (tmp_path / "run" / "results.json").unlink()
    reset_accelerate()
    write_photos(photos, range(20, 60), "cat")
    with raises_one_line("--resume: the dataset has changed", "training images, but there are"):
        PretrainTask(replace(options, run=replace(options.run, resume=True)))
