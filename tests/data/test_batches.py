"""Batches: the order of images, their distribution to processes and views, and substitutes of unreadable images."""

import multiprocessing
import subprocess
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_vitcls import ViTCLSImageProcessor
from modeling_vitcls.data import batches as batches_module
from modeling_vitcls.data.augmentation import build_augmentation
from modeling_vitcls.data.batches import Batch, Normalizer, TrainingImages, iterate_training_batches
from modeling_vitcls.data.images import ArrayImages, FileImages, LabeledImages
from modeling_vitcls.data.sampling import BatchPlan, compute_class_weights, derive_seed, draw_random_bits
from modeling_vitcls.data.streaming import TrainingStream, build_training_dataset
from modeling_vitcls.options import AugmentationOptions, TrainingOptions


def build_plan(num_images: int, num_processes: int = 1, **options: Any) -> BatchPlan:
    data = {name: options.pop(name) for name in ("labels", "num_copies") if name in options}
    return BatchPlan.from_options(num_images, TrainingOptions(**options), num_processes, **data)


def list_keys(plan: BatchPlan, process: int = 0) -> list[tuple[int, int]]:
    return [key for batch in plan.iterate_keys(process) for key in batch]


def build_images(
    source: LabeledImages, seed: int = 0, num_views: int = 0, **options: Any
) -> TrainingImages | TrainingStream:
    options = {"crop_scale": 1.0, "flip": False, "shift": 0.0} | options
    augmentation = build_augmentation(AugmentationOptions(**options), (16, 16), 3)
    return build_training_dataset(source, augmentation, to_rgb=True, seed=seed, num_views=num_views)


def build_noise_images(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)) for _ in range(count)]


def are_equal(first: Batch, second: Batch) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# The plan ------------------------------------------------------------------------------------------------------------


def test_every_epoch_contains_each_image_once() -> None:
    plan = build_plan(10, epochs=3, batch_size=4)
    keys = list_keys(plan)
    assert plan.num_steps == 8  # 3 x 10 images in batches of 4, rounded up
    for epoch in range(3):
        assert sorted(index for at, index in keys if at == epoch) == list(range(10))
    assert [index for at, index in keys if at == 0] != [index for at, index in keys if at == 1]
    shared = build_plan(10, epochs=3, batch_size=2, gradient_accumulation_steps=2, num_processes=2)
    assert shared.num_steps == 4 and shared.count_epochs(2) == 1.6  # 8 images per step


@pytest.mark.parametrize("extra", [{}, {"num_copies": 2}, {"class_balance": "sampling", "labels": [0] * 8 + [1, 1]}])
def test_batches_do_not_depend_on_their_division(extra: dict[str, Any]) -> None:
    whole = build_plan(10, max_steps=7, batch_size=8, **extra)
    shared = build_plan(10, max_steps=7, batch_size=1, gradient_accumulation_steps=4, num_processes=2, **extra)
    parts = [list(shared.iterate_keys(process)) for process in (0, 1)]
    for step, batch in enumerate(whole.iterate_keys(process_index=0)):
        pieces = [key for part in parts for piece in part[4 * step : 4 * step + 4] for key in piece]
        assert sorted(pieces) == sorted(batch)


@pytest.mark.parametrize("extra", [{}, {"num_copies": 3}, {"class_balance": "sampling", "labels": [0] * 8 + [1, 1]}])
def test_batches_can_start_at_any_step(extra: dict[str, Any]) -> None:
    plan, again = (build_plan(10, max_steps=9, batch_size=3, **extra) for _ in range(2))
    assert list(plan.iterate_keys(process_index=0, first_step=4)) == list(again.iterate_keys(process_index=0))[4:]


def test_repeated_augmentation_puts_copies_into_the_same_step() -> None:
    plan = build_plan(10, epochs=6, batch_size=12, num_copies=3)
    assert plan.num_steps == 5
    for batch in plan.iterate_keys(process_index=0):
        assert set(Counter(index for _, index in batch).values()) == {3}
        assert len(set(batch)) == 12  # copies have different epochs, and therefore different augmentation
        assert all(first[1] != second[1] for first, second in pairwise(batch))  # mixing combines neighbors
    assert sorted(list_keys(plan)) == [(epoch, index) for epoch in range(6) for index in range(10)]


def test_copies_do_not_have_to_divide_the_batch() -> None:
    """--repeated-augmentation 3 is valid with the default batch of 64 images."""
    plan = build_plan(100, epochs=2, batch_size=64, num_copies=3)
    batches = list(plan.iterate_keys(process_index=0))
    for batch in batches:
        assert len(set(batch)) == 64
        assert sorted(Counter(index for _, index in batch).values()) == [2, 2] + [3] * 20
    first_images = [index for batch in batches for _, index in batch[:22]]
    assert len(set(first_images[:88])) == 88  # the next step continues with other images


def test_balanced_sampling_draws_classes_equally_often() -> None:
    labels = [0] * 30 + [2] * 6 + [5] * 3
    keys = list_keys(build_plan(39, epochs=40, batch_size=39, class_balance="sampling", labels=labels))
    for epoch in range(40):
        shown = Counter(labels[index] for _, index in keys[epoch * 39 : (epoch + 1) * 39])
        assert shown == {0: 13, 2: 13, 5: 13}
    assert len(set(keys)) == len(keys)  # repeated images are augmented differently
    for label, members in ((0, range(30)), (2, range(30, 36)), (5, range(36, 39))):
        times = Counter(index for _, index in keys if labels[index] == label)
        assert times.keys() == set(members)
        assert max(times.values()) - min(times.values()) <= 1
    orders = [tuple(index for _, index in keys[start : start + 39]) for start in (0, 39)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("class_balance", ["none", "sampling"])
def test_the_order_of_images_never_changes(class_balance: str) -> None:
    """A run that is resumed with a later version of the package uses the same images."""
    labels, seed = [4, 0, 4, 4, 0, 4, 9, 4], 3
    options = {"epochs": 5, "batch_size": 8, "seed": seed, "class_balance": class_balance}
    members = [[1, 4], [0, 2, 3, 5, 7], [6]] if class_balance == "sampling" else [range(8)]
    expected = []
    for epoch in range(5):
        keys: list[tuple[int, int]] = []
        for position in range(8 * epoch, 8 * epoch + 8):
            class_index, use = position % len(members), position // len(members)
            cycle, offset = divmod(use, len(members[class_index]))
            if class_balance == "sampling":
                seeds = np.array([derive_seed(seed, class_index, 8)], dtype=np.uint64)
                bits = draw_random_bits(seeds, np.array([cycle], dtype=np.uint64), len(members[class_index]))
                offset = sorted(range(bits.size), key=bits[0].tolist().__getitem__)[offset]
            keys.append((cycle, members[class_index][offset]))
        generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
        expected.append([keys[position] for position in torch.randperm(8, generator=generator)])
    assert list(build_plan(8, labels=labels, **options).iterate_keys(0)) == expected


def test_weights_are_inverse_to_frequency_with_mean_one() -> None:
    labels = [0] * 6 + [1] * 3 + [3] + [-100] * 5
    weights = compute_class_weights(labels, 5)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 0, 10 / 3, 0])
    assert sum(weights[label].item() for label in labels[:10]) / 10 == pytest.approx(1)


def test_streams_require_a_number_of_steps() -> None:
    with pytest.raises(ValueError, match=r"requires a number of steps.*Set --max-steps"):
        BatchPlan.from_options(None, TrainingOptions(batch_size=64), 1)
    with pytest.raises(ValueError, match="--class-balance sampling requires one known label per image"):
        BatchPlan.from_options(None, TrainingOptions(max_steps=3, batch_size=64, class_balance="sampling"), 1)
    assert BatchPlan.from_options(None, TrainingOptions(max_steps=3, batch_size=64), 1).count_epochs(2) == 0


# Images --------------------------------------------------------------------------------------------------------------


def test_a_batch_contains_its_keys() -> None:
    source = LabeledImages(build_noise_images(5), [0, 1, 2, 3, 4])
    batch = build_images(source)[[(3, 4), (0, 2)]]
    assert {name: (list(value.shape), value.dtype) for name, value in batch.items()} == {
        "pixels": ([2, 3, 16, 16], torch.uint8),
        "labels": ([2], torch.int64),
        "index": ([2], torch.int64),
        "epoch": ([2], torch.int64),
        "view": ([2], torch.int64),
        "replaced": ([2], torch.int64),
    }
    assert batch["labels"].tolist() == batch["index"].tolist() == [4, 2]
    assert batch["epoch"].tolist() == batch["view"].tolist() == [3, 0]
    assert batch["replaced"].tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([[0.0, 1.0], [1.0, 1.0]], torch.tensor([[0.0, 1.0], [1.0, 1.0]])),
        ([{"a": 1, "b": -100}, {"a": 0, "b": 2}], {"a": torch.tensor([1, 0]), "b": torch.tensor([-100, 2])}),
    ],
)
def test_labels_of_any_kind(labels: list[Any], expected: Any) -> None:
    images = build_images(LabeledImages(build_noise_images(2), labels))
    torch.testing.assert_close(images[[(0, 0), (0, 1)]]["labels"], expected)


@pytest.mark.parametrize("as_arrays", [True, False])
@pytest.mark.parametrize(
    "options", [{"rotation": 20, "shift": 0.1}, {"crop_scale": 0.4}, {"auto_augment": "rand"}, {"random_erasing": 1.0}]
)
def test_pixels_depend_only_on_seed_epoch_and_image(as_arrays: bool, options: dict[str, Any]) -> None:
    values = np.random.default_rng(0).integers(0, 256, (4, 10, 12), dtype=np.uint8)
    arrays = ArrayImages(values)
    source = LabeledImages(arrays if as_arrays else list(arrays), [0] * 4)

    def pixels(seed: int, epoch: int) -> torch.Tensor:
        torch.rand(1)  # the state of the global generator must not matter
        return build_images(source, seed, **options)[[(epoch, 3)]]["pixels"][0]

    assert pixels(0, 0).shape == (3, 16, 16)
    assert torch.equal(pixels(0, 0), pixels(0, 0))
    assert not torch.equal(pixels(0, 0), pixels(0, 1))
    assert not torch.equal(pixels(0, 0), pixels(1, 0))
    whole = build_images(source, **options)[[(1, 2), (0, 3), (2, 0)]]["pixels"]
    assert torch.equal(whole[1], pixels(0, 0))
    other = LabeledImages(list(arrays) if as_arrays else arrays, [0] * 4)
    assert torch.equal(build_images(other, **options)[[(0, 3)]]["pixels"][0], pixels(0, 0))  # for any kind of storage


def test_views_repeat_after_the_last_one() -> None:
    images = build_images(LabeledImages(build_noise_images(3), [0, 1, 2]), num_views=2, rotation=20)
    batch = images[[(0, 1), (1, 1), (2, 1), (7, 1)]]
    assert batch["epoch"].tolist() == [0, 1, 2, 7]
    assert batch["view"].tolist() == [0, 1, 0, 1]
    first, second, third, eighth = batch["pixels"]
    assert torch.equal(first, third) and torch.equal(second, eighth)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 1 / 127},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": 99.0, "image_std": 11.0},
    ],
)
def test_pixels_match_the_image_processor(settings: dict[str, Any]) -> None:
    """Without augmentation, training and evaluation use equal values."""
    processor = ViTCLSImageProcessor(size={"height": 16, "width": 16}, **settings)
    images = build_noise_images(9)
    images[0] = images[0].convert("L")
    prepared = build_images(LabeledImages(images, [0] * 9))
    keys = [(0, index) for index in range(9)]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    measured = Normalizer(processor, torch.device("cpu"))(prepared[keys]["pixels"])
    torch.testing.assert_close(measured, expected, atol=1e-5, rtol=0)


def test_only_small_datasets_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{index}.png" for index in range(3)]
    for path, image in zip(paths, build_noise_images(3), strict=True):
        image.save(path)
    source = LabeledImages(FileImages(list(map(str, paths))), [0, 1, 2])
    keys = [(5, 0), (5, 1), (5, 2)]
    num_bytes = 3 * 12 * 10 * 3  # three images before the random crop
    for limit, is_stored in ((num_bytes, True), (num_bytes - 1, False)):
        monkeypatch.setattr(batches_module, "MAX_CACHE_BYTES", limit)
        images = build_images(source, crop_scale=0.5)
        before = images[keys]
        for path in paths:
            path.rename(path.with_suffix(".moved"))
        if is_stored:
            assert are_equal(images[keys], before)
        else:
            with pytest.raises(ValueError, match="none of the 3 images can be read"):
                images[keys]
        for path in paths:
            path.with_suffix(".moved").rename(path)


def test_only_small_arrays_are_resized_in_advance(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 256, (4, 10, 12), dtype=np.uint8)
    source = LabeledImages(ArrayImages(values), [5, 6, 7, 8]).select([3, 1, 0, 2])
    keys = [(0, 2), (1, 3)]
    stored = build_images(source, rotation=20)
    monkeypatch.setattr(batches_module, "MAX_CACHE_BYTES", 4 * 16 * 16 - 1)
    resized_later = build_images(source, rotation=20)
    assert stored.array_pixels is not None and resized_later.array_pixels is None
    assert are_equal(stored[keys], resized_later[keys])
    assert stored[keys]["labels"].tolist() == [5, 7]


# Unreadable images ---------------------------------------------------------------------------------------------------


@pytest.fixture
def half_unreadable(tmp_path: Path) -> LabeledImages:
    """Return six images, of which the second, the third and the last are unreadable."""
    for index, image in enumerate(build_noise_images(6)):
        if index in (1, 2, 5):
            (tmp_path / f"{index}.png").write_bytes(b"no image")
        else:
            image.save(tmp_path / f"{index}.png")
    return LabeledImages(FileImages([str(tmp_path / f"{index}.png") for index in range(6)]), list(range(6)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_next_image_replaces_an_unreadable_one(half_unreadable: LabeledImages, num_workers: int) -> None:
    plan = build_plan(6, epochs=3, batch_size=3)
    batches = list(iterate_training_batches(build_images(half_unreadable, rotation=20), plan, 0, num_workers))
    assert len(batches) == 6
    replacements = {1: 3, 2: 3, 5: 0}
    for keys, batch in zip(plan.iterate_keys(0), batches, strict=True):
        wanted = [index for _, index in keys]
        assert batch["index"].tolist() == batch["labels"].tolist() == [replacements.get(at, at) for at in wanted]
        assert batch["replaced"].tolist() == [at if at in replacements else -1 for at in wanted]
    resumed = iterate_training_batches(build_images(half_unreadable, rotation=20), plan, 0, num_workers, first_step=4)
    assert all(are_equal(*pair) for pair in zip(resumed, batches[4:], strict=True))


def test_an_unreadable_image_is_described(half_unreadable: LabeledImages) -> None:
    assert "5.png" in build_images(half_unreadable).describe_unreadable_image(5)
    floats = build_images(LabeledImages([Image.new("F", (9, 9)), *build_noise_images(1)], [0, 1]))
    assert floats[[(0, 0)]]["replaced"].tolist() == [0]  # can be decoded, but not used
    assert "mode F" in floats.describe_unreadable_image(0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_dataset_without_any_readable_image_is_a_one_line_error(tmp_path: Path, num_workers: int) -> None:
    source = LabeledImages(FileImages([str(tmp_path / f"{index}.png") for index in range(3)]), [0, 1, 2])
    with pytest.raises(ValueError, match=r"^none of the 3 images can be read\. First error: .*\.png") as caught:
        next(iterate_training_batches(build_images(source), build_plan(3, batch_size=2, max_steps=2), 0, num_workers))
    assert "\n" not in str(caught.value)


# Workers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_step", [0, 3])
def test_workers_do_not_change_batches(first_step: int) -> None:
    source = LabeledImages(build_noise_images(7), list(range(7)))
    options = {"crop_scale": 0.5, "flip": True, "auto_augment": "trivial", "random_erasing": 0.5}
    plan = build_plan(7, max_steps=6, batch_size=4)
    alone = list(iterate_training_batches(build_images(source, **options), plan, 0, num_workers=0))
    shared = list(iterate_training_batches(build_images(source, **options), plan, 0, 2, first_step=first_step))
    assert len(shared) == 6 - first_step
    assert all(are_equal(*pair) for pair in zip(alone[first_step:], shared, strict=True))


def test_workers_ignore_the_signals_that_stop_a_run() -> None:
    """Ctrl-C and a cluster's SIGTERM reach all processes, but the main process still has to save."""
    source = LabeledImages(build_noise_images(4), [0] * 4)
    batches = iterate_training_batches(
        build_images(source), build_plan(4, max_steps=60, batch_size=2), 0, num_workers=2
    )
    before = multiprocessing.active_children()
    for _ in range(2):
        next(batches)  # one batch from each worker: both have started
    workers = [child for child in multiprocessing.active_children() if child not in before]
    assert len(workers) == 2
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(0.2)
    assert len(list(islice(batches, 50))) == 50
    for worker in workers:
        worker.terminate()  # a SIGTERM from this process, as at exit
        worker.join(timeout=10)
        assert worker.exitcode == 0


def test_a_gray_model_skips_color_images(tmp_path: Path) -> None:
    images = [
        image.convert(mode) for image, mode in zip(build_noise_images(4), ("L", "RGB", "RGBA", "LA"), strict=True)
    ]
    augmentation = build_augmentation(AugmentationOptions(crop_scale=1.0, flip=False, shift=0.0), (16, 16), 3)
    source = LabeledImages(images, [0, 1, 2, 3])
    prepared = build_training_dataset(source, augmentation, to_rgb=False, seed=0, num_channels=1)
    batch = prepared[[(0, 0), (0, 1), (0, 2), (0, 3)]]
    assert batch["pixels"].shape == (4, 1, 16, 16)
    assert (batch["index"].tolist(), batch["replaced"].tolist()) == ([0, 3, 3, 3], [-1, 1, 2, -1])
    assert prepared.describe_unreadable_image(1) == "an image of mode RGB has 3 channels, but the model requires 1"
    arrays = LabeledImages(ArrayImages(np.zeros((2, 12, 10), dtype=np.uint8)), [0, 1])
    for options in ({}, {"auto_augment": "rand"}):
        gray = build_augmentation(AugmentationOptions(crop_scale=1.0, shift=0.0, **options), (16, 16), 3)
        assert build_training_dataset(arrays, gray, to_rgb=False, seed=0)[[(0, 0)]]["pixels"].shape == (1, 1, 16, 16)
    images[1].save(tmp_path / "color.png")
    files = LabeledImages(FileImages([str(tmp_path / "color.png")]), [0])
    named = build_training_dataset(files, augmentation, to_rgb=False, seed=0, num_channels=1)
    assert named.describe_unreadable_image(0).startswith(f"the image '{tmp_path / 'color.png'}' has 3 channels")
