"""Held-out images: stable if datasets grow or move, with copies on one side."""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.photo_folders import write_photos
from helpers.read_datasets import read_training_data
from helpers.tiny_models import build_tiny_config, raises_one_line
from helpers.tiny_options import build_tiny_options, run_training
from pytest import CaptureFixture, LogCaptureFixture, approx

from modeling_vitcls import evaluate
from modeling_vitcls.data.evaluation_data import load_evaluation_data
from modeling_vitcls.data.in_memory import add_dataset
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import describe_divided_groups, describe_leaks
from modeling_vitcls.data.splits_table import read_splits, select_task
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.model.modeling_vitcls import ViTCLSModel


def get_names(part: Any) -> set[str]:
    return set(part.images.get_names())


def write_rows(folder: Path, *rows: str) -> Path:
    """Write a table: its header, and a row for each image."""
    table = folder / "table.csv"
    table.write_text("\n".join(rows))
    return table


def run(output: Path, dataset: Path, **flags: Any) -> dict[str, Any]:
    """Fine-tune for two steps and return the contents of results.json."""
    return run_training(build_tiny_options(output, dataset, max_steps=2, batch_size=8, **flags))


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.95])
def test_the_split_is_stratified(fraction: float, tmp_path: Path) -> None:
    """Each class with two or more images has held-out images in proportion to its size."""
    sizes = {"ant": 1, "bee": 2, "cat": 3, "dog": 40, "elk": 7}
    for name, size in sizes.items():
        write_photos(tmp_path / "photos", range(size), name)
    data = read_training_data(tmp_path / "photos", held_out_fraction=fraction)
    names = data.label_space.names
    counts = [
        Counter(names[label] for label in part.labels) for part in (data.train, data.held_out)
    ]
    expected = {
        name: 0 if size == 1 else min(max(round(fraction * size), 1), size - 1)
        for name, size in sizes.items()
    }

    assert counts[1] == Counter(expected)
    assert counts[0] + counts[1] == Counter(sizes)
    assert "stratified" in data.held_out_name
    assert data.train.class_ratio == max(counts[0].values()) / min(counts[0].values())


def test_the_split_depends_only_on_the_content_of_the_images(tmp_path: Path) -> None:
    """It does not depend on their order, on their names or on the type of the dataset."""
    folder = write_photos(tmp_path / "here", range(40))
    names = get_names(read_training_data(folder).held_out)
    contents = {(folder / name).read_bytes() for name in names}

    paths = sorted(folder.glob("*/*.png"))
    rows = [f"here/{path.relative_to(folder)},{path.parent.name}" for path in paths]
    table = write_rows(tmp_path, "image,label", *rows[::-1])
    listed = read_training_data(table).held_out
    assert {(tmp_path / name).read_bytes() for name in listed.images.get_names()} == contents

    pairs = [(path.read_bytes(), path.parent.name) for path in paths]
    in_memory = read_training_data(add_dataset(pairs)).held_out
    rows_held_out = map(int, in_memory.images.get_names())
    assert {pairs[row][0] for row in rows_held_out} == contents

    for path in paths:
        path.rename(path.with_stem(f"photo {path.stem}"))
    renamed = get_names(read_training_data(folder).held_out)
    assert {(folder / name).read_bytes() for name in renamed} == contents


def test_copies_of_an_image_are_on_the_same_side(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, range(30))
    before = get_names(read_training_data(folder).held_out)
    for path in sorted(folder.glob("cat/*.png")):
        shutil.copyfile(path, path.with_name(f"copy {path.name}"))
    held_out = get_names(read_training_data(folder).held_out)
    assert {name for name in held_out if "copy" not in name} == before
    assert len(held_out) == 18


def test_a_class_that_shares_its_only_group_with_another_class_is_named(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos", range(6))
    rows = [f"photos/cat/{index}.png,cat,farm" for index in range(6)]
    rows += [f"photos/dog/{index}.png,dog,{('farm', 'town')[index % 2]}" for index in range(6)]
    table = write_rows(tmp_path, "image,label,place", *rows)
    data = read_training_data(table, group_column="place", held_out_fraction=0.0)
    (line,) = describe_divided_groups(data)
    assert line.startswith("all images of cat are in one group with images of other classes")


def test_copies_join_the_groups_of_a_table(tmp_path: Path) -> None:
    folder = write_photos(tmp_path / "photos", range(6), "cat", "dog")
    shutil.copyfile(folder / "cat/0.png", folder / "cat/5.png")
    rows = [
        f"{path},{path.parent.name},{path.parent.name}{int(path.stem) // 2}"
        for path in sorted(folder.glob("*/*.png"))
    ]
    table = write_rows(tmp_path, "image,label,animal", *rows)
    data = read_training_data(table, group_column="animal")
    groups = [set(part.groups.tolist()) for part in (data.train, data.held_out)]
    assert len(groups[0] | groups[1]) == 5  # cat0 and cat2 are one
    assert not groups[0] & groups[1]


def test_an_image_with_two_labels_is_an_error(tmp_path: Path) -> None:
    """They are one file in two rows, or one content in two splits."""
    write_photos(tmp_path / "train", range(4))
    rows = [f"train/{name}/{index}.png,{name}" for name in ("cat", "dog") for index in range(4)]
    table = write_rows(tmp_path, "image,label", *rows, "train/cat/3.png,dog")
    with raises_one_line("have several labels", "train/cat/3.png is 'dog'"):
        read_training_data(table)

    table.unlink()
    write_photos(tmp_path / "test", range(20, 22))
    shutil.copyfile(tmp_path / "train/cat/3.png", tmp_path / "test/dog/also 3.png")
    with raises_one_line("train/cat/3.png is 'cat', test/dog/also 3.png is 'dog'"):
        read_training_data(tmp_path)


@pytest.mark.parametrize(
    ("columns", "rows", "second", "words"),
    [
        ("tags", ("a;b", "a;c"), "a;c", ("is 'a, b'", "is 'a, c'")),
        ("color,size", ("red,big", "blue,small"), "red,small", ("is 'big'", "is 'small'")),
    ],
)
def test_an_image_with_two_labels_among_tags_and_tasks_is_an_error(
    columns: str, rows: tuple[str, str], second: str, words: tuple[str, str], tmp_path: Path
) -> None:
    write_photos(tmp_path, range(4), "cat")
    lines = [f"cat/{index}.png,{rows[index % 2]}" for index in range(4)]
    table = write_rows(tmp_path, f"image,{columns}", *lines, f"cat/2.png,{second}")
    flags = {"label_separator": ";"} if columns == "tags" else {}
    with raises_one_line("cat/2.png", *words):
        read_training_data(table, label_column=tuple(columns.split(",")), **flags)


def test_rows_of_one_image_count_once(tmp_path: Path, caplog: LogCaptureFixture) -> None:
    """There is one row for each annotator, or for each task."""
    write_photos(tmp_path, range(4))
    files = [f"{name}/{number}.png" for number in range(4) for name in ("cat", "dog")]
    rows = [f"{file},{person},{file[:3]}" for person in ("ann", "bob", "eva") for file in files]
    table = write_rows(tmp_path, "image,annotator,label", *rows)
    data = read_training_data(table, held_out_fraction=0.25)
    assert (len(data.train), len(data.held_out)) == (6, 2)
    assert "24 rows name 8 images" in caplog.text
    assert len(load_evaluation_data(DataOptions(dataset=str(table)), None).images) == 8

    rows = [f"{file},{file[:3]},\n{file},,{'xy'[index // 4]}" for index, file in enumerate(files)]
    write_rows(tmp_path, "image,kind,place", *rows)
    tasks = read_training_data(table, label_column=("kind", "place"), held_out_fraction=0)
    assert tasks.label_space.format(tasks.train.labels[0]) == "kind cat, place x"
    assert len(tasks.train) == 8


def test_copies_in_the_held_out_split_are_reported(tmp_path: Path) -> None:
    write_photos(tmp_path / "train", range(10))
    write_photos(tmp_path / "test", range(8, 13))
    (warning,) = describe_leaks(read_training_data(tmp_path), None)
    assert "4 of the 10 held-out images" in warning
    shutil.rmtree(tmp_path / "test")
    write_photos(tmp_path / "test", range(20, 25))
    assert describe_leaks(read_training_data(tmp_path), None) == []


def test_empty_parts_are_errors(tmp_path: Path) -> None:
    folder = write_photos(tmp_path, range(1))
    with raises_one_line("each class has a single image", "`held_out_fraction=0`"):
        read_training_data(folder)


# In runs ------------------------------------------------------------------------------------------


def test_the_label_columns_of_a_run_are_used_in_its_evaluation(
    tmp_path: Path, capsys: CaptureFixture
) -> None:
    """A model has the names of its tasks; results.json has the column and the separator of tags."""
    paths = sorted(write_photos(tmp_path / "photos", range(10)).glob("*/*.png"))
    rows = [
        f"{path},{path.parent.name}|all,{'old' if index % 2 else 'new'}"
        for index, path in enumerate(paths)
    ]
    table = write_rows(tmp_path, "image,tags,age", *rows)

    for name, flags in (
        ("tags", {"label_column": "tags", "label_separator": "|"}),
        ("tasks", {"label_column": ["age", "tags"]}),
    ):
        reset_accelerate()
        results = run(tmp_path / name, table, **flags)
        metric = results["selection_metric"]
        evaluated = evaluate(tmp_path / name, table, num_workers=0)
        assert evaluated[metric] == approx(results[metric], abs=1e-5)
    assert re.search(r"age: \d of \d right .*\s+tags: \d of \d right", capsys.readouterr().out)
    with raises_one_line("`label_column`"):  # the flags are used as a whole
        evaluate(tmp_path / "tags", table, label_separator="|")


def test_rare_classes_are_reported(tmp_path: Path, capsys: CaptureFixture) -> None:
    """With a ratio above 3, a line of the result has balanced accuracy and the lowest recall."""
    for num_dogs, is_rare in ((16, True), (13, False)):
        folder = tmp_path / f"{num_dogs}"
        # 4 training images of cats; 14 or 12 of dogs
        for name, numbers in (("cat", range(5)), ("dog", range(5, 5 + num_dogs))):
            write_photos(folder / "photos", numbers, name)
        reset_accelerate()
        capsys.readouterr()
        run(folder / "run", folder / "photos", held_out_fraction=0.1)
        assert ("lowest recall" in capsys.readouterr().out) is is_rare


def test_damaged_splits_are_named(tmp_path: Path) -> None:
    ViTCLSModel(build_tiny_config()).save_pretrained(tmp_path)
    assert not len(read_splits(ModelFolder(tmp_path)))
    file = tmp_path / "splits.parquet"
    file.write_text("{")
    with raises_one_line("splits.parquet", "Remove it"):
        read_splits(ModelFolder(tmp_path))
    pd.DataFrame({"key": ["1"], "split": "train", "task": ""}).to_parquet(file)
    with raises_one_line("splits.parquet", "column key"):
        read_splits(ModelFolder(tmp_path))


def test_splits_that_were_a_csv_file_are_those_of_the_model() -> None:
    assert len(select_task(pd.DataFrame({"key": [1], "split": "train", "task": [None]}), None)) == 1
