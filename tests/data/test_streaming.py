"""Streamed datasets: order, division among processes, restarts, and the held-out part.

The order is reproducible. Every image is read once per pass on any number of processes, also after
a restart at any step. The held-out part is not used for training.
"""

import io
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers.tiny_models import raises_one_line
from PIL import Image

from modeling_vitcls import ViTCLSImageProcessor
from modeling_vitcls.data import splits as training_data
from modeling_vitcls.data import streaming
from modeling_vitcls.data.augmentation import build_augmentation
from modeling_vitcls.data.batches import Batch, BatchBuilder, iterate_training_batches
from modeling_vitcls.data.labels import LabelSpace
from modeling_vitcls.data.options import AugmentationOptions, DataOptions
from modeling_vitcls.data.sampling import BatchPlan
from modeling_vitcls.data.splits import TrainingData, load_training_data
from modeling_vitcls.data.streaming import StreamedImages, TrainingStream
from modeling_vitcls.training.loop import build_batch_plan
from modeling_vitcls.training.options import TrainingOptions


NUM_IMAGES = 60
CLASSES = datasets.ClassLabel(names=["a", "b", "c"])
LABELS = LabelSpace("single_label_classification", {"label": CLASSES.names})


def encode_example(index: int) -> bytes:
    """Return a small PNG whose corner pixel is its index, with the index modulo 3 as its label."""
    values = np.full((8, 8, 3), index, dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def write_shards(
    folder: Path, num_shards: int, labels: Any = CLASSES, broken: tuple[int, ...] = ()
) -> Path:
    """Write a folder of Parquet files of equal size."""
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    names = labels.names if isinstance(labels, datasets.ClassLabel) else ["a", "b", "c"]
    for shard in range(num_shards):
        indices = range(shard, NUM_IMAGES, num_shards)
        rows = {
            "image": [
                {
                    "bytes": b"no image" + bytes([index])
                    if index in broken
                    else encode_example(index),
                    "path": None,
                }
                for index in indices
            ],
            "label": [names[index % 3] for index in indices],
        }
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(
            folder / f"train-{shard}.parquet"
        )
    return folder


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the delay of 5 seconds that `datasets` adds after each pass over Parquet files."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture(scope="module", params=[1, 2, 4])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "data"
    return write_shards(folder, request.param)


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("two") / "data", 2)


def read(folder: Path, **options: Any) -> TrainingData:
    return load_training_data(
        DataOptions(dataset=str(folder), streaming=True, shuffle_buffer=8, **options)
    )


def build_plan(num_processes: int = 1, **options: Any) -> BatchPlan:
    return build_batch_plan(None, TrainingOptions(**options), num_processes)


def build_batches(
    source: Any, plan: BatchPlan, process: int = 0, num_workers: int = 0, first_step: int = 0
) -> list[Batch]:
    augmentation = build_augmentation(
        AugmentationOptions(crop_scale=0.5, rotation=10, shift=0.0),
        ViTCLSImageProcessor(size=[8, 8]),
    )
    images = TrainingStream(source, BatchBuilder(augmentation, LABELS, True, plan.seed))
    return list(iterate_training_batches(images, plan, process, num_workers, first_step))


def get_indices(examples: Any) -> list[int]:
    """Return the indices of the images."""
    return [
        Image.open(io.BytesIO(example.encoded_image["bytes"])).getpixel((0, 0))[0]
        for example in examples
    ]


def get_held_out(data: TrainingData) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in data.held_out.images]


def are_equal(first: Batch, second: Batch) -> bool:
    return all(
        torch.equal(first[name], second[name]) for name in ("pixels", "labels", "index", "epoch")
    )


def test_every_pass_contains_each_image_once_in_another_order(shards: Path) -> None:
    data = read(shards)
    assert isinstance(data.train, StreamedImages)
    assert data.num_training_images is None
    assert data.label_space.columns == {"label": ["a", "b", "c"]}

    held_out = get_held_out(data)
    length = NUM_IMAGES - len(held_out)
    examples = list(islice(data.train.iterate_examples(0, 0, 1), 3 * length))
    passes = [get_indices(examples[start : start + length]) for start in (0, length, 2 * length)]
    for number, order in enumerate(passes):
        assert sorted([*order, *held_out]) == list(range(NUM_IMAGES))
        assert {example.epoch for example in examples[number * length : (number + 1) * length]} == {
            number
        }
    assert passes[0] != passes[1] != passes[2]
    assert all(
        example.label == number % 3
        for example, number in zip(examples, get_indices(examples), strict=True)
    )
    assert get_indices(islice(data.train.iterate_examples(1, 0, 1), length)) != passes[0]


@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_each_pass(shards: Path, num_processes: int) -> None:
    data = read(shards)
    parts = [
        get_indices(
            example
            for example in islice(
                data.train.iterate_examples(0, process, num_processes), NUM_IMAGES
            )
            if example.epoch == 0
        )
        for process in range(num_processes)
    ]
    assert sorted([*chain.from_iterable(parts), *get_held_out(data)]) == list(range(NUM_IMAGES))

    if len(list(shards.iterdir())) % num_processes:  # otherwise, each process reads its own shards
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("size", [1, 8])
def test_the_size_of_the_shuffle_buffer_limits_the_change_of_the_order(
    size: int, tmp_path: Path
) -> None:
    folder = write_shards(tmp_path / "data", 1)
    options = DataOptions(
        dataset=str(folder), held_out_fraction=0.0, streaming=True, shuffle_buffer=size
    )
    order = get_indices(
        islice(load_training_data(options).train.iterate_examples(0, 0, 1), NUM_IMAGES)
    )
    assert (order == list(range(NUM_IMAGES))) == (size == 1)
    assert all(index < position + size for position, index in enumerate(order))


def test_two_processes_have_the_same_images_per_step_as_one(tmp_path: Path) -> None:
    """The number of shards is not a multiple of the number of processes."""
    source = read(write_shards(tmp_path / "data", 1)).train
    whole = build_batches(source, build_plan(max_steps=9, batch_size=8))
    shared = build_plan(num_processes=2, max_steps=9, batch_size=2, gradient_accumulation_steps=2)
    parts = [build_batches(source, shared, process) for process in (0, 1)]
    for step, batch in enumerate(whole[:5]):  # within the first pass
        pieces = torch.cat(
            [piece["index"] for part in parts for piece in part[2 * step : 2 * step + 2]]
        )
        assert sorted(pieces.tolist()) == sorted(batch["index"].tolist())


def test_a_restart_continues_with_the_same_batches(two_shards: Path) -> None:
    """Check the first pass, the second, and the fourth or later."""
    source = read(two_shards).train
    plan = build_plan(max_steps=44, batch_size=2, gradient_accumulation_steps=2, num_processes=2)
    whole = build_batches(source, plan, process=1)
    assert len(whole) == 2 * 44
    assert whole[-1]["epoch"].max() >= 3
    for first_step, num_workers in ((2, 0), (17, 0), (40, 2)):
        resumed = build_batches(source, plan, 1, num_workers, first_step)
        assert all(are_equal(*pair) for pair in zip(whole[2 * first_step :], resumed, strict=True))


def test_the_next_image_of_the_batch_replaces_an_unreadable_one(tmp_path: Path) -> None:
    broken = (3, 4, 5, 30, 31, 32, 33, 34)
    folder = write_shards(tmp_path / "data", 2, broken=broken)
    source = read(folder).train
    plan = build_plan(max_steps=10, batch_size=8)
    batches = build_batches(source, plan, num_workers=2)
    examples = source.iterate_examples(plan.seed, 0, 1)
    found = 0

    for batch in batches:
        chosen = list(islice(examples, 8))
        is_broken = [example.encoded_image["bytes"].startswith(b"no image") for example in chosen]
        found += sum(is_broken)
        for place, example in enumerate(chosen):
            replacement = next(at % 8 for at in range(place, place + 8) if not is_broken[at % 8])
            assert batch["index"][place] == chosen[replacement].index
            assert batch["labels"][place] == chosen[replacement].label
            assert (f"{example.index:x}" in batch["errors"].get(example.index, "")) is is_broken[
                place
            ]
    assert found > 4


def test_a_batch_of_unreadable_images_is_an_error(tmp_path: Path, two_shards: Path) -> None:
    folder = write_shards(
        tmp_path / "data",
        1,
        broken=tuple(range(NUM_IMAGES)),
    )
    message = "data: none of the 4 images of a batch can be read"
    with raises_one_line(message):
        build_batches(read(folder).train, build_plan(max_steps=1, batch_size=4))

    augmentation = build_augmentation(
        AugmentationOptions(crop_scale=0.5, shift=0.0), ViTCLSImageProcessor(size=[8, 8])
    )
    for num_channels in (1, 3):  # of the model; the images are color images
        source = TrainingStream(
            read(two_shards).train,
            BatchBuilder(augmentation, LABELS, False, 0, num_channels=num_channels),
        )
        batches = iterate_training_batches(source, build_plan(max_steps=1, batch_size=4), 0, 0)
        with raises_one_line(message) if num_channels == 1 else nullcontext():
            assert next(batches)["pixels"].shape == (4, 3, 8, 8)


def test_a_process_without_images_is_an_error(two_shards: Path) -> None:
    source = read(two_shards).train
    with raises_one_line("has no training image for process 63 of 64"):
        next(source.iterate_examples(0, 63, 64))


# Held-out parts and labels
# -------------------------------------------------------------------------------------------


def test_the_held_out_part_does_not_depend_on_order_or_files(
    shards: Path, two_shards: Path
) -> None:
    data = read(shards)
    assert data.held_out_name == "about 20%, split seed 0"

    held_out = get_held_out(data)
    assert 4 <= len(held_out) <= 24
    assert list(data.held_out.labels) == [number % 3 for number in held_out]
    assert sorted(held_out) == sorted(get_held_out(read(two_shards)))
    assert sorted(get_held_out(read(two_shards, split_seed=1))) != sorted(held_out)


def test_a_stream_without_held_out_images_is_an_error(two_shards: Path) -> None:
    with pytest.raises(ValueError, match="Set a larger `held_out_fraction`"):
        read(two_shards, held_out_fraction=1e-9)


def test_only_the_first_images_of_a_large_held_out_part_are_kept(
    two_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = get_held_out(read(two_shards))
    for module in (streaming, training_data):
        monkeypatch.setattr(module, "MAX_HELD_OUT_IMAGES", 3)
    data = read(two_shards)
    assert get_held_out(data) == whole[:3]
    assert data.held_out_name == "about 20%, split seed 0, of which the first 3 images are read"

    trained = get_indices(islice(data.train.iterate_examples(0, 0, 1), NUM_IMAGES - len(whole)))
    assert sorted([*trained, *whole]) == list(range(NUM_IMAGES))  # no held-out images


def test_undeclared_labels_are_collected(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "data", 2, datasets.Value("string"))
    assert read(folder).label_space.names == ["a", "b", "c"]
    data = read(folder, label_names=("c", "b", "a"))
    assert data.label_space.names == ["c", "b", "a"]
    assert list(data.held_out.labels) == [2 - number % 3 for number in get_held_out(data)]
    with pytest.raises(ValueError, match=r"the image 0x\w+: row 0 has the label 'c'"):
        read(folder, label_names=("a", "b"))


def test_rows_without_a_label_are_skipped(tmp_path: Path) -> None:
    labels = [(0, 1, 2, None)[index % 4] for index in range(40)]
    rows = {
        "image": [{"bytes": encode_example(index), "path": None} for index in range(40)],
        "label": labels,
    }
    features = datasets.Features({"image": datasets.Image(), "label": CLASSES})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table.parquet")
    data = read(tmp_path / "table.parquet")
    held_out = get_held_out(data)

    assert list(data.held_out.labels) == [number % 4 for number in held_out]

    first_pass = list(islice(data.train.iterate_examples(0, 0, 1), 30 - len(held_out)))
    assert sorted([*get_indices(first_pass), *held_out]) == [
        number for number in range(40) if number % 4 != 3
    ]
    assert next(islice(data.train.iterate_examples(0, 0, 1), 30 - len(held_out), None)).epoch == 1


def test_a_streamed_table_of_paths_has_the_labels_of_its_rows(tmp_path: Path) -> None:
    rows = ["file,kind"]
    for index in range(20):
        (tmp_path / f"{index}.png").write_bytes(encode_example(index))
        rows.append(f"{index}.png,{'even' if index % 2 == 0 else 'odd'}")
    (tmp_path / "list.csv").write_text("\n".join(rows), encoding="utf-8")

    data = read(tmp_path / "list.csv", label_names=("even", "odd"), label_column=("kind",))
    assert data.name == "list.csv"
    with raises_one_line(f"list.csv: the image {tmp_path / '1.png'}: row 0 has the label 'odd'"):
        read(
            tmp_path / "list.csv",
            label_names=("even", "none"),
            label_column=("kind",),
            held_out_fraction=0.999,
        )
    assert list(data.held_out.labels) == [number % 2 for number in get_held_out(data)]
    assert data.held_out.images.get_names() == [f"{number}.png" for number in get_held_out(data)]

    tags = read(
        tmp_path / "list.csv",
        label_names=("odd", "even"),
        label_column=("kind",),
        label_separator="|",
    )
    assert list(tags.held_out.labels) == [
        [number % 2, 1 - number % 2] for number in get_held_out(data)
    ]
    for batch in build_batches(data.train, build_plan(max_steps=3, batch_size=4)):
        assert torch.equal(batch["pixels"].amax(dim=(1, 2, 3)) % 2, batch["labels"])


def test_streams_can_be_read_without_labels(two_shards: Path) -> None:
    options = DataOptions(dataset=str(two_shards), streaming=True)
    data = load_training_data(options, use_labels=False)
    assert data.label_space.columns == {}
    (batch,) = build_batches(data.train, build_plan(max_steps=1, batch_size=4))
    assert batch["labels"].tolist() == [-100] * 4
