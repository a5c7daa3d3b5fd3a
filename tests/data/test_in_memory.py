"""Datasets in memory: all kinds have the same images and labels as files on disk."""

import base64
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
from helpers.photo_folders import draw_noise, encode_image
from helpers.read_datasets import read_splits_of, read_training_data
from helpers.tiny_models import raises_one_line
from PIL import Image
from pytest import CaptureFixture, MonkeyPatch
from torch.utils.data import ConcatDataset, Dataset, random_split

from modeling_vitcls import ViTCLSImageProcessor
from modeling_vitcls.data.in_memory import add_dataset, get_dataset


NUM_IMAGES = 40


def make_image(index: int) -> Image.Image:
    """Return a random color image that depends only on the index."""
    return draw_noise((8, 10), seed=index)[0]


def name_class(index: int) -> str:
    """Return the class of an image."""
    return ("cat", "dog")[index % 2]


class TorchDataset(Dataset):
    """A dataset like those of torchvision: items (tensor, class index), and class names."""

    classes = ["cat", "dog"]

    def __len__(self) -> int:
        return NUM_IMAGES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = torch.from_numpy(np.array(make_image(index))).permute(2, 0, 1)
        return pixels / 255.3, index % 2  # Floats are rounded to 256 levels


def build(kind: str, folder: Path) -> Any:
    """Return the same images and labels as a dataset of one kind."""
    images = [make_image(index) for index in range(NUM_IMAGES)]
    labels = [name_class(index) for index in range(NUM_IMAGES)]
    files = [encode_image(image) for image in images]
    if kind == "torch":
        return TorchDataset()
    if kind == "parts of a torch dataset":  # whose class names are those of the dataset
        return ConcatDataset(random_split(TorchDataset(), [30, 10]))
    if kind == "datasets":
        rows = [{"bytes": file, "path": None} for file in files]
        data = datasets.Dataset.from_dict({"image": rows, "label": labels})
        return data.cast_column("image", datasets.Image())
    if kind in ("large_binary", "binary_view"):  # as polars writes Parquet
        column = pyarrow.array(files, pyarrow.type_for_alias(kind))
        return datasets.Dataset(pyarrow.table({"image": column, "label": labels}))
    if kind == "datasets in another format":
        declared = datasets.ClassLabel(names=["cat", "dog"])
        return build("datasets", folder).cast_column("label", declared).with_format("torch")
    paths = [folder / f"{index}.png" for index in range(NUM_IMAGES)]
    for path, file in zip(paths, files, strict=True):
        path.write_bytes(file)
    columns: dict[str, Any] = {
        "images": images,
        "paths": paths,
        "arrays": map(np.array, images),
        "bytes": files,
        "base64": [base64.b64encode(file).decode() for file in files],
        "splits": images,
    }
    pairs = list(zip(columns[kind], labels, strict=True))
    return {"train": pairs[:30], "test": pairs[30:]} if kind == "splits" else pairs


KINDS = (
    "images",
    "arrays",
    "bytes",
    "paths",
    "torch",
    "parts of a torch dataset",
    "datasets",
    "datasets in another format",
    "base64",
    "large_binary",
    "binary_view",
    "splits",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_same_images_and_labels(kind: str, tmp_path: Path) -> None:
    data = read_training_data(add_dataset(build(kind, tmp_path)))
    assert data.label_space.names == ["cat", "dog"]
    assert len(data.train) + len(data.held_out) == NUM_IMAGES

    expected = {encode_image(make_image(index)): name_class(index) for index in range(NUM_IMAGES)}
    found = {}
    for part in (data.train, data.held_out):
        for image, label in zip(part.images, part.labels, strict=True):
            found[encode_image(image)] = data.label_space.names[label]
    assert found == expected

    assert (kind == "splits") == (data.held_out_name == "split 'test'")


@pytest.mark.parametrize("build_table", [pd.DataFrame, datasets.Dataset.from_dict, list])
def test_paths_are_relative_to_the_working_folder(
    build_table: Any, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    build("paths", tmp_path)
    monkeypatch.chdir(tmp_path)
    names = [f"{index}.png" for index in range(4)]
    columns = {"image": names, "label": list("abab")}
    data = build_table(
        list(zip(*columns.values(), strict=True)) if build_table is list else columns
    )
    splits = read_splits_of(add_dataset(data))
    assert [image.size for image in splits.train.images] == [make_image(0).size] * 4
    assert splits.train.images.get_names() == names


def test_a_table_has_paths_as_objects_and_is_named_as_in_python(
    tmp_path: Path, capfd: CaptureFixture
) -> None:
    files = [path for path, _ in build("paths", tmp_path)][:3]
    table = pd.DataFrame({"image": [*files[:2], None], "label": list("aba")}, index=[5, 1, 3])
    assert "image" in get_dataset(add_dataset(table.set_index("image")))["train"].features
    splits = read_splits_of(add_dataset(table))
    assert splits.name == "the DataFrame"
    assert not capfd.readouterr().err  # no progress bar
    assert splits.train.images[1].tobytes() == make_image(1).tobytes()
    mixed = table.assign(note=[1, "x", None]).set_index("label", drop=False)
    columns = get_dataset(add_dataset(mixed))["train"]
    assert (columns["note"][:], columns["label"][:]) == (["1", "x", None], list("aba"))
    for data, title in ((table, "the DataFrame"), ({"train": table}, "the dict")):
        with raises_one_line(f"{title}, split 'train' has no column 'tags'"):
            read_splits_of(add_dataset(data), label_column=("tags",))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("the DataFrame", "is empty"),
        ("the list", "is empty"),
        ("table.parquet", "is empty"),
        ("the dict", "has no splits"),
        ("saved", "has no splits"),
    ],
)
def test_an_empty_table_is_an_error(kind: str, problem: str, tmp_path: Path) -> None:
    table = pd.DataFrame({"image": [], "label": []})
    table.to_parquet(tmp_path / "table.parquet")
    datasets.DatasetDict().save_to_disk(tmp_path / "saved")
    data = {f"the {type(each).__name__}": each for each in (table, [], {})}
    dataset = add_dataset(data[kind]) if kind in data else str(tmp_path / kind)
    with raises_one_line(f"{kind} {problem}. Add"):
        read_splits_of(dataset)


def test_the_name_identifies_the_data(tmp_path: Path) -> None:
    """--resume compares the names."""
    name = add_dataset(build("images", tmp_path))
    assert add_dataset(build("images", tmp_path)) == name
    assert add_dataset(build("images", tmp_path)[:-1]) != name
    split = get_dataset(name)["train"]
    other_names = [add_dataset(data) for data in ({"test": split}, build("images", tmp_path)[::-1])]
    assert len({name, *other_names}) == 3
    assert add_dataset({"train": split}) == name
    assert name.startswith("memory:")
    assert len(get_dataset(name)["train"]) == NUM_IMAGES


def test_dicts_are_tasks_and_lists_are_several_labels() -> None:
    image = make_image(0)
    tasks = add_dataset(
        [(image, {"animal": name_class(index), "age": index}) for index in range(12)]
    )
    splits = read_splits_of(tasks, label_column=("animal", "age"))

    assert splits.label_space.kind == "multi_task"
    assert splits.train.labels[3] == {"animal": 1, "age": 3}

    names = ["a", "b"]
    for convert in (list, np.array):
        tags = add_dataset([(image, convert(names[: index % 3])) for index in range(12)])
        splits = read_splits_of(tags)
        assert splits.label_space.kind == "multi_label_classification"
        assert splits.label_space.names == names
        assert splits.train.labels[:3] == [[], [0], [0, 1]]


def test_integers_from_0_to_1_are_not_scaled() -> None:
    pixels = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    for image in read_splits_of(add_dataset([(torch.tensor(pixels), 0), (pixels, 0)])).train.images:
        assert np.array_equal(image, pixels)


@pytest.mark.parametrize("missing", [pd.NA, pd.NaT])
def test_a_missing_label_of_pandas_is_no_class(missing: Any) -> None:
    splits = read_splits_of(add_dataset([(make_image(0), label) for label in ("a", missing, "b")]))
    assert splits.train.labels == [0, 1]


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "RGBa", "PA"])
def test_a_converted_phone_photo_is_trained_as_it_is_predicted(mode: str) -> None:
    """torchvision's ImageFolder converts photos, which keeps their EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = 6  # Turned
    photo = Image.open(io.BytesIO(encode_image(make_image(0), "JPEG", exif=exif)))
    image = photo.convert("RGBA").convert(mode)
    (stored,) = read_splits_of(add_dataset([(image, 0)])).train.images
    processor = ViTCLSImageProcessor()
    trained, predicted = (processor(each)["pixel_values"] for each in (stored, image))
    assert np.array_equal(trained, predicted)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            [make_image(0)],
            r"item 0 of the dataset is of type Image and not an \(image, label\) pair",
        ),
        (
            [(make_image(0), 1), (make_image(0), 1, 2)],
            r"item 1 of the dataset is of type tuple and not an \(image, label\) pair",
        ),
        ([{"image": "0.png", "label": "cat"}], "of type dict .*or a DataFrame or datasets.Dataset"),
        ([("\udce9.png", "cat")], "Pass images as paths in UTF-8"),
        (
            pd.DataFrame({"image": ["0.png"] * 2, "label": ["a", ["b"]]}, dtype=object),
            "of one type",
        ),
        (pd.DataFrame({"image": [make_image(0)]}), "column image.* Pass images as paths"),
        ({1, 2}, "the data is a set.* Pass a path"),
        (Dataset(), "the data is a Dataset.* Pass a path"),
        (ConcatDataset([TorchDataset(), [(make_image(0), 0)]]), "different classes"),
        (iter([(make_image(0), 1)]), "the data is a list_iterator.* Pass a path"),
        (
            datasets.Dataset.from_dict({"image": [1]}).with_transform(lambda batch: batch),
            "with_format",
        ),
        ([(np.zeros((2, 2, 7)), 1)], "item 0 of the dataset has no valid image"),
        (
            [(np.full((2, 2), 0.5), 0), (np.full((2, 2), 1.02), 0)],
            "item 1 .*floats must be from 0 to 1",
        ),
        (
            [(Image.open(io.BytesIO(encode_image(make_image(0))[:-100])), 1)],
            "item 0 of the dataset has no valid image",
        ),
    ],
)
def test_unusable_data_is_an_error(data: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        add_dataset(data)


def test_the_mode_of_an_image_column_is_an_error() -> None:
    """It would be ignored, because the encoded images are read."""
    features = datasets.Features(image=datasets.Image(mode="L"))
    data = datasets.Dataset.from_dict({"image": ["0.png"]}, features)
    with raises_one_line("the mode 'L', which would be ignored"):
        read_splits_of(add_dataset(data))


def test_data_of_another_process_is_an_error() -> None:
    with raises_one_line("memory:0123456789abcdef"):
        read_splits_of("memory:0123456789abcdef")


# Files of the same contents -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_photo_has_one_key_as_a_file_as_bytes_and_as_an_image_until_it_is_changed(
    name: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    make_image(0).resize((40, 30)).save(file)
    with Image.open(file) as image:
        pairs = [(image, 0), (file, 0), (file.read_bytes(), 0)]
        images = read_splits_of(add_dataset(pairs)).train.images
        image.putpixel((0, 0), (9, 9, 9))
        (changed,) = read_splits_of(add_dataset([(image, 0)])).train.images
    assert len(set(images.compute_content_keys().tolist())) == 1
    assert changed.tobytes() == image.tobytes()
