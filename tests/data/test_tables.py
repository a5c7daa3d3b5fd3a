"""Tables as people have them: spelled labels, separators, lists, columns of splits and groups."""

import base64
import json
import os
import unicodedata
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from helpers.photo_folders import draw_noise, encode_image, get_unicode_forms, write_files
from helpers.read_datasets import read_splits_of, read_training_data, read_undivided
from helpers.tiny_models import raises_one_line
from PIL import Image
from pytest import LogCaptureFixture, MonkeyPatch

from modeling_vitcls.data.in_memory import add_dataset
from modeling_vitcls.data.labels import SeveralLabels
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import load_undivided_images
from modeling_vitcls.data.tables import read_table


NUM_IMAGES = 12
FILES = [f"{index}.png" for index in range(NUM_IMAGES)]


@pytest.fixture(scope="module")
def photos(module_path: Path) -> Path:
    """Return a folder with different images 0.png, 1.png, ..."""
    for index, name in enumerate(FILES):
        Image.new("RGB", (8, 8), (20 * index, 10, 200)).save(module_path / name)
    return module_path


def write_table(file: Path, **columns: Any) -> Path:
    """Write a table in the format of the suffix."""
    table = pd.DataFrame(columns)
    if file.suffix == ".parquet":
        table.to_parquet(file)
    elif file.suffix == ".jsonl":
        table.to_json(file, orient="records", lines=True)
    else:
        table.to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")
    return file


def write_csv(photos: Path, labels: list[str], **columns: Any) -> str:
    """Write a table of the first images and their labels, with more columns."""
    columns = {"file_name": FILES[: len(labels)], "label": labels} | columns
    return str(write_table(photos / "table.csv", **columns))


def read_labels(dataset: Any, split: str = "train", **options: Any) -> list[str | None]:
    """Return the labels of a split as text."""
    splits = read_splits_of(dataset, **options)
    labels = splits.images_by_split[split].labels
    return [splits.label_space.format(label) for label in labels]


# Text ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        ["001", "002", "1"],
        ["1e3", "1000", "1E3"],
        ["true", "True", "false"],
        ["None", "NA", "null"],
        ["nan", "n/a", "cat"],
        ["01067", "9007199254740993", "9007199254740992"],
        ["1.0", "1", "C#"],
        ["2024-01-02", "12:30", " cat"],
    ],
)
@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "metadata.csv", "train.csv"]
)
def test_text_labels_keep_their_spelling(
    labels: list[str], name: str, photos: Path, tmp_path: Path
) -> None:
    files = FILES[: len(labels)]
    if name == "metadata.csv":  # which is beside the images
        for file in files:
            os.link(photos / file, tmp_path / file)
    else:
        files = [str(photos / file) for file in files]
    table = write_table(tmp_path / name, file_name=files, label=labels)
    is_folder = name in ("metadata.csv", "train.csv")  # the second is a split
    assert read_labels(tmp_path if is_folder else table) == labels


@pytest.mark.parametrize(
    ("values", "names"),
    [([1, "1", "a"], ["1", "1", "a"]), ([True, "x", 2.0], ["True", "x", "2"])],
)
def test_numbers_and_text_in_one_json_column_are_text(
    values: list[Any], names: list[str], photos: Path
) -> None:
    table = write_table(photos / "mixed.jsonl", file_name=FILES[:3], label=values)
    assert read_labels(table) == names


def test_numbers_of_a_parquet_column_have_one_spelling(photos: Path) -> None:
    for name, labels in (
        ("int", pd.array([1, None, 10], dtype="Int64")),
        ("float", [1.0, None, 10.0]),
        ("category", pd.Categorical(["1", None, "10"])),
    ):
        file = write_table(photos / f"{name}.parquet", file_name=FILES[:3], label=labels)
        assert read_labels(file) == ["1", "10"]


def test_numeric_image_ids_are_names_of_files(tmp_path: Path) -> None:
    write_files(tmp_path, "1000", "00012", content=encode_image(Image.new("RGB", (8, 8))))
    for ids in (["1000", "00012"], [1000, 1000]):
        table = write_table(tmp_path / "table.parquet", id=ids, label="a")
        images = read_splits_of(table, image_column="id").train.images
        assert images[0].size == images[1].size == (8, 8)


def test_a_split_whose_labels_may_have_another_name_is_named(photos: Path, tmp_path: Path) -> None:
    paths = [photos / name for name in FILES]
    (tmp_path / "train.csv").write_text(f"file,label\n{paths[0]},cat\n")
    (tmp_path / "test.csv").write_text(f"file,kind\n{paths[1]},cat\n")
    with raises_one_line("split 'test' has no column 'label'", "Choose one of file, kind"):
        read_labels(tmp_path)


def test_truth_values_are_names_and_never_indices(photos: Path) -> None:
    values = [True, False, True]
    file = write_table(photos / "truth.parquet", file_name=FILES[:3], label=values)
    texts = write_csv(photos, [str(value) for value in values])
    pairs = [(str(photos / name), value) for name, value in zip(FILES, values, strict=False)]
    for dataset in (file, texts, add_dataset(pairs)):
        assert read_labels(dataset) == ["True", "False", "True"]
        assert read_labels(dataset, label_names=("True", "False")) == ["True", "False", "True"]
        with raises_one_line("not one of the 2 classes"):
            read_labels(dataset, label_names=("no", "yes"))


def test_a_label_name_that_is_given_twice_is_refused(photos: Path) -> None:
    table = write_csv(photos, ["0", "1", "2"])
    with raises_one_line("`label_names=", "twice"):
        read_labels(table, label_names=("cat", "cat", "dog"))


def test_the_unicode_forms_of_a_name_are_one_class(photos: Path) -> None:
    forms = get_unicode_forms("café")
    assert read_labels(write_csv(photos, [*forms, "tea"])) == ["café", "café", "tea"]


def test_labels_that_look_alike_are_named(photos: Path, caplog: LogCaptureFixture) -> None:
    table = write_csv(photos, ["cat", "cat\u200b", "Dog", "dog ", "owl"])
    assert len(set(read_labels(table))) == 5
    for name in ("'cat\\u200b'", "'dog '", "separate names"):
        assert name in caplog.text


# Dialects -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        b"file_name;label;note\n0.png;cat;a,b\n",
        b"file_name\tlabel\tnote\n0.png\tcat\ta,b\n",
        b"file_name|label|note\n0.png|cat|a,b\n",
        b"sep=;\nfile_name;label\n0.png;cat\n",
        b"# made by a tool, version 2\n\nfile_name,label\n0.png,cat\n",
        b"\xef\xbb\xbffile_name,label\r\n0.png,cat\r\n",
        b"file_name,label\r0.png,cat\r",
        b"file_name,label,\n0.png,cat,\n",
        b"file_name,label\n0.png,cat,\n",
        b",file_name,label\n0,0.png,cat\n",
        b"label, file_name\ncat, 0.png\n",
        b' file_name , Label\n"0.png","cat"\n\n,\n',
        "file_name;label\n0.png;cat\n".encode("utf-16"),
        "file_name,label\n0.png,cat\n".encode("utf-16-le"),
    ],
)
def test_dialects_of_spreadsheets_are_read(content: bytes, photos: Path) -> None:
    (photos / "dialect.csv").write_bytes(content)
    assert read_labels(photos / "dialect.csv") == ["cat"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("file_name,label\n0.png,Smith, John\n", ["line 2, saw 3", "separated by ','"]),
        (
            'file_name,label\n0.png,"cat\n1.png,dog\n',
            ["string starting at row 1", "Check the quotes"],
        ),
        ("file_name,label,label\n0.png,a,b\n", ["two columns with the same name"]),
        ("file_name label\n0.png cat\n", ["separated by commas, semicolons, tabs or bars"]),
        ("file_name,label\n", ["is empty"]),
        ("", ["is empty"]),
        ("0.png;a\n1.png;b\n", ["no header", "'0.png'", "file_name;label"]),
        ("image,label\n0.png,a\nimage,label\n1.png,b\n", ["row 1 repeats the header"]),
        ("#file_name,label\n0.png,a\n1.png,b\n", ["'#file_name,label' is a comment", "Remove #"]),
        ("Photos of 2024\nimage,label\n0.png,a\n", ["'Photos of 2024' is no header"]),
        ("Photos, 2024\nfile_name,label\n0.png,a\n", ["'Photos, 2024' is no header"]),
        ("file_name,label\n0.PNG,a\n", ["no file '0.PNG', but 0.png"]),
        ("image;tags\n0.png;['a']\n1.png;['a']\n2.png;['a']\n", ["the same labels (a)"]),
        (
            "image,label\nhttps://a.org/1.png,cat\n",
            ["the column 'image' has no names of files", "`img2dataset`"],
        ),
        ("file,label\n1,a\n2,b\n", ["the column 'file' has no names of files", "such as '1'"]),
    ],
)
def test_tables_that_cannot_be_used_are_named(content: str, words: list[str], photos: Path) -> None:
    (photos / "damaged.csv").write_text(content)
    with raises_one_line("damaged.csv", *words):
        read_undivided(photos / "damaged.csv")


def test_names_of_predict_are_read_from_the_working_folder(
    photos: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(photos.parent)
    names = [f"{photos.name}/{name}" for name in FILES[:2]]
    images = read_splits_of(write_csv(tmp_path, ["a", "b"], file_name=names))
    assert images.train.images[1].size


@pytest.mark.parametrize(
    ("labels", "flags", "words"),
    [
        (["cat", "nan", "dog"], {}, "has the class 'nan'. If it means"),
        (["1", "2", "1"], {"label_names": ("cat", "dog", "owl")}, "no image has a label of cat"),
        (["p1", "P1", "p2"], {"group_column": "patient"}, "'patient': separate names differ only"),
    ],
)
def test_labels_and_groups_that_may_be_a_mistake_are_asked_about(
    labels: list[str], flags: Any, words: str, photos: Path, caplog: LogCaptureFixture
) -> None:
    read_undivided(write_csv(photos, labels, patient=labels), **flags)
    assert words in caplog.text


def test_the_name_of_a_task_that_cannot_be_one_is_named_before_the_run(photos: Path) -> None:
    table = write_csv(photos, ["a", "b"], **{"main color": ["red", "blue"]})
    with raises_one_line("'main color'", "Rename this column"):
        read_splits_of(table, label_column=("label", "main color"))


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        (["1.png", "2.png"], datasets.List(datasets.Value("string"))),
        (np.zeros((8, 8, 3)), datasets.Array3D((8, 8, 3), "uint8")),
    ],
)
def test_a_column_of_lists_or_arrays_is_one_line(cell: Any, kind: Any) -> None:
    features = datasets.Features(images=kind, label=datasets.Value("string"))
    table = datasets.Dataset.from_dict({"images": [cell], "label": ["a"]}, features)
    with raises_one_line("the column 'images' has lists or objects"):
        read_splits_of(add_dataset(table))


@pytest.mark.parametrize("name", ["t.xlsx", "t.json", "t.zip", "t", "t.csv.txt"])
def test_files_of_other_types_have_a_remedy(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("{}")
    with raises_one_line("is not a table that can be read", "suffix", ".jsonl", "archive"):
        read_labels(tmp_path / name)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_table_that_changed_at_the_same_time_is_read_again(suffix: str, photos: Path) -> None:
    for labels in (["cat", "dog"], ["dog", "cat"], ["dog"]):
        file = photos / f"changed{suffix}"
        write_table(file, file_name=FILES[: len(labels)], label=labels)
        os.utime(file, (1_700_000_000, 1_700_000_000))
        assert read_labels(file) == labels


def test_brackets_in_the_name_of_a_table_are_no_pattern(photos: Path) -> None:
    for name, label in (("copy1.parquet", "other"), ("copy[1].parquet", "own")):
        file = write_table(photos / name, file_name=FILES[:1], label=[label])
    assert read_labels(file) == ["own"]


# Lists --------------------------------------------------------------------------------------------


def test_vectors_of_a_declared_or_torch_dataset_have_its_names(photos: Path) -> None:
    vectors = [[1, 0, 0], [0, 1, 1]]
    paths = [str(photos / name) for name in FILES[:2]]
    names = ["cat", "dog", "owl"]
    feature = datasets.List(datasets.ClassLabel(names=names))
    declared = datasets.Dataset.from_dict({"image": paths, "label": vectors}).cast_column(
        "label", feature
    )

    class Tags(list[Any]):
        classes = names

    for data in (declared, Tags(zip(paths, vectors, strict=True))):
        assert read_labels(add_dataset(data)) == ["cat", "dog, owl"]


@pytest.mark.parametrize("bits", [["0", "1"], ["False", "True"], ["0.0", "1.0"]])
def test_one_column_of_bits_per_class_is_multi_label(bits: list[str], photos: Path) -> None:
    no, yes = bits
    table = write_csv(photos, [no, yes, no], dog=[no, yes, yes])
    splits = read_splits_of(table, label_column=("label", "dog"))
    assert splits.label_space == SeveralLabels({"labels": ["label", "dog"]})
    assert list(splits.train.labels) == [[], [0, 1], [1]]
    gaps = write_csv(photos, [no, "", no], dog=[no, yes, yes])
    assert read_labels(gaps, label_column=("label", "dog")) == ["no label", "dog"]
    for mark in (yes, "x"):
        marks = write_csv(photos, ["", mark, ""], dog=["", mark, mark])
        labels = read_labels(marks, label_column=("label", "dog"))
        assert labels == ["no label", "label, dog", "dog"]


def test_large_photos_in_a_csv_file_may_be_base64_beside_files(photos: Path) -> None:
    (photo,) = draw_noise((200, 200))
    texts = [
        encode(encode_image(photo)).decode() for encode in (base64.b64encode, base64.encodebytes)
    ]
    table = write_table(photos / "large.csv", image=[*texts, FILES[1]], label=[*"abb"])
    images = read_splits_of(table).train.images
    assert images[0].tobytes() == images[1].tobytes() == photo.tobytes()
    assert images[2].getpixel((0, 0)) == (20, 10, 200)
    assert images.get_names() == ["0", "1", FILES[1]]


def test_the_name_of_a_column_has_two_unicode_forms(photos: Path) -> None:
    column, name = get_unicode_forms("catégorie")
    file = write_table(
        photos / "forms.csv", file_name=FILES[:2], **{name: ["cat", "dog"]}, other=[1, 2]
    )
    assert read_labels(file, label_column=(column,)) == ["cat", "dog"]


# Splits -------------------------------------------------------------------------------------------


def build_split(photos: Path, order: str, labels: str, start: int = 0) -> datasets.Dataset:
    """Return images from `start` on, whose class indices refer to the names in `order`."""
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(order))}
    )
    paths = [str(photos / name) for name in FILES[start : start + len(labels)]]
    rows = {"image": paths, "label": [order.index(label) for label in labels]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize(("order", "labels"), [("cab", "abc"), ("bc", "bcb"), ("dab", "bda")])
@pytest.mark.parametrize("is_saved", [False, True])
def test_the_labels_of_each_split_are_matched_by_name(
    order: str, labels: str, is_saved: bool, photos: Path, tmp_path: Path
) -> None:
    splits = datasets.DatasetDict(
        train=build_split(photos, "abc", "abc"), test=build_split(photos, order, labels, start=3)
    )
    dataset = add_dataset(splits)
    if is_saved:
        splits.save_to_disk(tmp_path / "saved")
        dataset = str(tmp_path / "saved")
    assert read_labels(dataset, "train") == list("abc")
    assert read_labels(dataset, "test") == list(labels)


def test_a_split_may_have_the_names_that_another_declares(photos: Path) -> None:
    paths = [str(photos / name) for name in FILES[:2]]
    texts = datasets.Dataset.from_dict({"image": paths, "label": ["c", "a"]})
    dataset = add_dataset({"train": build_split(photos, "abc", "abc"), "test": texts})
    assert read_labels(dataset, "test") == ["c", "a"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_field_of_objects_and_of_lists_of_them_is_a_label_column(
    suffix: str, photos: Path
) -> None:
    objects = [{"title": "ab"[index % 2], "id": index} for index in range(4)]
    lists = [[each] for each in objects]
    table = write_table(photos / f"objects{suffix}", file_name=FILES[:4], meta=objects, a=lists)
    numbers = ["0", "1", "2", "3"]
    for column, classes in (("meta.title", ["a", "b"]), ("meta.id", numbers), ("a.id", numbers)):
        assert read_splits_of(table, label_column=(column,)).label_space.names == classes


def test_a_field_with_the_name_of_a_label_is_found(photos: Path) -> None:
    """WebDataset shards have one column of objects, `json`."""
    objects = [{"caption": FILES[index], "label": "ab"[index % 2]} for index in range(4)]
    table = write_table(photos / "json.jsonl", file_name=FILES[:4], json=objects, key=range(4))
    assert read_splits_of(table).label_space.columns == {"json.label": ["a", "b"]}


@pytest.mark.parametrize(
    ("name", "spellings", "flags"),
    [
        ("split", ["Train", "TEST", "valid"], {}),
        ("Subset", ["training", "testing", "val"], {}),
        ("Usage", ["Training", "Private Test", "Public"], {"split_column": "Usage"}),
    ],
)
def test_a_column_of_splits_is_used(
    name: str, spellings: list[str], flags: Any, photos: Path
) -> None:
    table = write_csv(photos, ["a", "b", "a", "b"] * 3, **{name: spellings * 4})
    images = load_undivided_images(DataOptions(dataset=table, **flags), reads_all=True)
    for split, first in (("train", 0), ("test", 1), ("validation", 2)):
        assert images.images_by_split[split].images.get_names() == FILES[first::3]
    assert images.facts["splits"] == f"column {name!r}: train 4, validation 4, test 4 rows"


def test_the_own_division_of_a_dataset_is_named_and_can_be_set(photos: Path) -> None:
    table = write_csv(photos, ["a", "b", "b", "a"] * 3, is_train=[1, 0] * 6)
    assert "`split_column='is_train'`" in read_undivided(table).facts["groups"]
    facts = read_undivided(table, split_column="is_train").facts
    assert facts["splits"] == "column 'is_train': train 6, test 6 rows"
    assert "groups" not in facts


def test_tables_of_splits_beside_images_are_read(tmp_path: Path) -> None:
    write_files(tmp_path, "images/1.png", "images/2.png")
    write_table(tmp_path / "test.jsonl", file_name=["images/1.png"], label=["a"])
    assert read_splits_of(tmp_path).images_by_split["test"].images.get_names() == ["images/1.png"]


def test_partitions_are_splits_and_columns(photos: Path, tmp_path: Path) -> None:
    files = [str(photos / name) for name in FILES[:2]]
    table = pd.DataFrame({"image": files, "label": ["a b", "c"], "split": ["train", "test"]})
    table.to_parquet(tmp_path, partition_cols=["split", "label"])
    images = read_splits_of(tmp_path)
    assert images.label_space.names == ["a b", "c"]
    assert images.images_by_split["test"].labels == [1]


def test_a_column_with_other_values_than_splits_is_named(photos: Path) -> None:
    colors = ["red", "blue"] * 6
    table = write_csv(photos, ["a", "b", "b", "a"] * 3, set=colors)
    assert "'set' is not used" in read_undivided(table).facts["splits"]
    with raises_one_line("'set' contains 'blue', 'red'"):
        read_training_data(table, split_column="set")
    some = write_csv(photos, ["a", "b", "b", "a"] * 3, split=["train", ""] * 6)
    with raises_one_line("'split' contains ''", "train, validation or test"):
        read_training_data(some)


def test_the_images_of_a_group_are_on_one_side(photos: Path) -> None:
    patients = [f"p{index // 2}" for index in range(NUM_IMAGES)]
    labels = ["a", "b"] * 5 + ["", ""]  # Rows without a label are skipped, also the last patient
    table = write_csv(photos, labels, patient=patients)
    data = read_training_data(table, group_column="patient")
    held_out, train = (
        {patients[FILES.index(name)] for name in part.images.get_names()}
        for part in (data.held_out, data.train)
    )
    assert len(held_out) in (1, 2)
    assert not held_out & train


@pytest.mark.parametrize("name", ["Objekt", "specimen", "nr"])
def test_a_column_with_the_shape_of_groups_is_named(name: str, photos: Path) -> None:
    """Its values have a few rows of one class; those of other columns have not, or are classes."""
    labels = [*"aaaaaabbbbbb"]
    weather = ["sun", "rain", "fog", "sun"] * 3
    objects = [f"{label}{index // 2}" for index, label in enumerate(labels)]
    columns = {"note": range(12), "weather": weather, "shape": [*"xxxxxxyyyyyy"], name: objects}
    table = write_csv(photos, labels, **columns)
    fact = read_undivided(table).facts["groups"]
    assert f"`group_column={name!r}`" in fact


def test_the_largest_group_is_named(photos: Path) -> None:
    """Unknown patients that a table calls NA are one group."""
    table = write_csv(photos, ["a", "b"] * 6, patient=["p", "NA", "NA"] * 4)
    fact = read_undivided(table, group_column="patient").facts["groups"]
    assert fact.endswith("2 groups; the largest is 'NA' with 8 images")


@pytest.mark.parametrize("camera", ["Canon", None])
def test_a_column_of_one_group_or_none_is_an_error(camera: str | None, photos: Path) -> None:
    table = write_csv(photos, ["a", "b"] * 6, camera=camera)
    with raises_one_line(f"'camera' has {camera!r} in all 12 rows", "`group_column`"):
        read_undivided(table, group_column="camera")


@pytest.mark.parametrize("name", ["patient", "Patient_ID", "camera", "video id"])
def test_a_column_of_groups_that_is_not_used_is_named(name: str, photos: Path) -> None:
    table = write_csv(photos, ["a", "b"] * 6, **{name: ["p", "q", "q"] * 4})
    fact = read_undivided(table).facts["groups"]
    assert fact.startswith(f"the column {name!r} is not used")
    table = write_csv(photos, ["a", "b"] * 6, **{name: range(NUM_IMAGES)}, note="")
    assert "groups" not in read_undivided(table).facts


def test_a_table_of_windows_names_files_with_backslashes(photos: Path) -> None:
    names = [f"{photos.name}\\{file}" for file in FILES[:3]]
    table = write_table(photos.parent / "windows.csv", file_name=names, label=[*"abc"])
    images = read_splits_of(table).train.images
    assert [image.getpixel((0, 0))[0] for image in images] == [0, 20, 40]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("name", ["table.csv", "metadata.csv"])
def test_files_are_found_in_both_unicode_forms(form: str, name: str, tmp_path: Path) -> None:
    """macOS writes é as two characters, other systems as one."""
    folder = tmp_path / unicodedata.normalize("NFC" if form == "NFD" else "NFD", "été")
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / unicodedata.normalize(form, "é.png"))
    names = get_unicode_forms("été/é.png")
    table = write_table(tmp_path / name, file_name=names, label=["a", "b"])
    dataset = tmp_path if name == "metadata.csv" else table
    splits = read_splits_of(dataset)
    assert [image.size for image in splits.train.images] == [(8, 8)] * 2


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_table_with_too_many_columns_is_an_error(suffix: str, tmp_path: Path) -> None:
    row = {"file_name": "1.png", "label": "cat"} | {f"c{number}": "1" for number in range(10_000)}
    text = f"{','.join(row)}\n{','.join(row.values())}" if suffix == ".csv" else json.dumps(row)
    (tmp_path / f"table{suffix}").write_text(text)
    with raises_one_line("has 10,002 columns, but at most 10,000 are read"):
        read_table(tmp_path / f"table{suffix}", tmp_path)


# Rows of types, and tags between blanks -----------------------------------------------------------
@pytest.mark.parametrize(
    "types",
    ["[t]\t[t]", "string\tcategorical", "VARCHAR(20)\tint", "string\td\n\tclass", "---\t:---:"],
)
def test_rows_of_types_below_the_header_are_left_out_with_a_line(
    types: str, photos: Path, caplog: LogCaptureFixture
) -> None:
    table = photos / "types.tsv"
    rows = [f"{file}\t{label}" for file, label in zip(FILES[:4], "cdcd", strict=True)]
    table.write_text("\n".join(["file_name\tlabel", types, *rows]))
    assert read_labels(table) == ["c", "d", "c", "d"]
    assert "skipped the row below the header" in caplog.text


def test_a_row_whose_label_is_the_name_of_a_type_is_no_row_of_types(photos: Path) -> None:
    assert read_labels(write_csv(photos, ["text", "image", "text"])) == ["text", "image", "text"]


TAGS = ["haze primary", "clear primary water", "clear", "clear agriculture primary"]


def test_a_line_asks_about_tags_between_blanks(photos: Path, caplog: LogCaptureFixture) -> None:
    assert read_labels(write_csv(photos, TAGS)) == TAGS
    assert (
        "4 classes of 5 words, such as 'haze primary'. If these are several labels" in caplog.text
    )


def test_numbers_between_blanks_are_several_labels(photos: Path) -> None:
    assert read_labels(write_csv(photos, ["16 0", "25", "0 25", "16"])) == [
        "0, 16",
        "25",
        "0, 25",
        "16",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["Quercus robur", "Quercus petraea", "Quercus rubra", "Quercus cerris"],
        ["golden retriever", "labrador retriever", "poodle", "toy poodle"],
    ],
)
def test_names_of_several_words_are_not_asked_about(
    names: list[str], photos: Path, caplog: LogCaptureFixture
) -> None:
    assert read_labels(write_csv(photos, names)) == names
    assert "several labels" not in caplog.text


# Tables without labels ----------------------------------------------------------------------------
def test_a_test_table_without_the_label_column_is_left_out_with_a_line(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    for file, photo in zip(FILES, draw_noise(*[(8, 8)] * 4), strict=False):
        photo.save(tmp_path / file)
    write_table(tmp_path / "train.csv", image=FILES[:4], kind=[*"abab"])
    write_table(tmp_path / "test.csv", image=["0.png"])
    assert list(read_undivided(tmp_path).images_by_split) == ["train"]
    assert "splits without labels (no column kind) are left out: test" in caplog.text


def test_a_table_of_images_alone_names_predict(photos: Path) -> None:
    table = write_table(photos / "images.csv", file_name=FILES)
    with raises_one_line("has no labels: its columns are file_name", "with `predict`"):
        read_splits_of(table)


# Columns of places and batches --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("deploymentID", [*"001122"] * 2),  # Numbers of which the name says what they are
        ("lot", [*"aabb"] * 3),
        ("origin", [*"abcdef"] * 2),  # Texts that repeat, whatever the name is
    ],
)
def test_a_column_of_places_of_any_trade_is_named(
    column: str, values: list[str], photos: Path
) -> None:
    table = write_csv(photos, ["x", "y", "y", "x"] * 3, **{column: values})
    assert f"`group_column='{column}'`" in read_splits_of(table).facts["groups"]


@pytest.mark.parametrize("values", [[*"123456"] * 2, [*"aabb"] * 3, list(map(str, range(12)))])
def test_a_column_of_measurements_or_of_a_few_colors_is_not_named(
    values: list[str], photos: Path
) -> None:
    table = write_csv(photos, ["x", "y", "y", "x"] * 3, weight=values)
    assert "groups" not in read_splits_of(table).facts


# Tables of other programs -------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["red/round", "red+round", "red & round"])
def test_a_line_asks_about_parts_that_are_in_other_labels(
    text: str, photos: Path, caplog: LogCaptureFixture
) -> None:
    read_labels(write_csv(photos, [text, "red", "round", "n/a"]))
    assert f"1 classes such as {text!r}" in caplog.text


def test_one_label_in_each_row_of_several_columns_is_asked_about(
    photos: Path, caplog: LogCaptureFixture
) -> None:
    bits = {"a": [1, 0, 0] * 4, "b": [0, 1, 0] * 4, "c": [0, 0, 1] * 4}
    table = write_table(photos / "one_hot.csv", file_name=FILES, **bits)
    read_labels(table, label_column=("a", "b", "c"))
    assert "a 1 in exactly one of the columns a, b, c" in caplog.text


def test_columns_of_0_and_1_are_named_as_a_remedy(photos: Path) -> None:
    table = write_table(photos / "bits.csv", file_name=FILES[:2], a=[1, 0], b=[0, 1])
    with raises_one_line("the columns a, b have 0 and 1 only", "set `label_column` to all of them"):
        read_labels(table)


def test_a_field_of_an_object_may_name_the_images(photos: Path) -> None:
    rows = [
        {"source": {"file": file}, "kind": {"name": "ab"[row]}}
        for row, file in enumerate(FILES[:2])
    ]
    table = photos / "objects.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)))
    with raises_one_line("a field of an object (source.file, kind.name)"):
        read_labels(table)
    fields = {"image_column": "source.file", "label_column": ("kind.name",)}
    assert read_labels(table, **fields) == ["a", "b"]


def test_an_address_is_no_name_of_a_column(photos: Path) -> None:
    table = photos / "import.csv"
    table.write_text("gs://bucket/0.png,cat\ngs://bucket/1.png,dog\n")
    with raises_one_line("has no header: its first line names the file 'gs://bucket/0.png'"):
        read_labels(table)


def test_pixels_in_columns_are_loaded_in_python(photos: Path) -> None:
    table = write_table(photos / "mnist.csv", label=["1"], pixel0=[0], pixel1=[255])
    with raises_one_line(
        "the columns pixel0, pixel1 look like the pixels", "finetune(model, list("
    ):
        read_labels(table)


def test_configurations_of_a_copy_from_the_hub_are_named(tmp_path: Path) -> None:
    for name in ("small", "large"):
        (tmp_path / name).mkdir()
        write_table(tmp_path / name / "train.csv", file_name=["0.png"], label=["a"])
    configs = "".join(f"- config_name: {name}\n" for name in ("small", "large"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with raises_one_line("has the configurations small, large"):
        read_labels(tmp_path)


def test_files_without_a_suffix_are_named(tmp_path: Path) -> None:
    write_files(tmp_path, "cat/1", "dog/1")
    with raises_one_line("but cat/1, dog/1. Add the suffix of their format"):
        read_labels(tmp_path)


def test_lines_of_a_cell_are_several_labels(photos: Path) -> None:
    labels = ["sea\nsun", "sea", "sun\ndog", "dog"]
    assert read_labels(write_csv(photos, labels)) == ["sea, sun", "sea", "dog, sun", "dog"]


def test_tabs_between_words_are_part_of_a_label(photos: Path) -> None:
    assert read_labels(write_csv(photos, ["a\tb", "a", "b\ta", "b"])) == ["a\tb", "a", "b\ta", "b"]


def test_prices_are_no_lists(photos: Path) -> None:
    assert read_labels(write_csv(photos, ["99,00 €", "199,00 €"])) == ["99,00 €", "199,00 €"]
