"""Batches: their contents, views, substitutes of unreadable images, and workers."""

import multiprocessing
import subprocess
import time
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.batch_plans import build_plan
from helpers.photo_folders import CountedImages, draw_noise
from helpers.tiny_models import raises_one_line
from pytest import MonkeyPatch
from torch.testing import assert_close

from modeling_vitcls import ViTCLSImageProcessor
from modeling_vitcls.data import batches as batches_module
from modeling_vitcls.data.augmentation import build_augmentation
from modeling_vitcls.data.batches import (
    Batch,
    Normalizer,
    TrainingImages,
    iterate_training_batches,
)
from modeling_vitcls.data.images import DatasetImages, LabeledImages
from modeling_vitcls.data.labels import LabelSpace, OneLabel, SeveralLabels
from modeling_vitcls.data.options import AugmentationOptions


LABELS = OneLabel({"label": list("abcde")})
NOISE = draw_noise(*[(12, 10)] * 9)


def build_images(
    source: LabeledImages,
    seed: int = 0,
    label_space: LabelSpace = LABELS,
    **options: Any,
) -> TrainingImages:
    options = {"crop_scale": 1.0, "flip": False} | options
    augmentation = build_augmentation(
        AugmentationOptions(**options), ViTCLSImageProcessor(size=[16, 16])
    )
    return TrainingImages(
        source,
        *augmentation,
        label_space=label_space,
        to_rgb=True,
        seed=seed,
        bit_depth=16,
        num_channels=3,
    )


def are_equal(first: Batch, second: Batch) -> bool:
    return all(torch.equal(first[name], second[name]) for name in ("pixels", "labels", "index"))


# Images -------------------------------------------------------------------------------------------


def test_several_labels_become_zeros_and_ones() -> None:
    labeled = LabeledImages(NOISE[:2], [[1], [0, 1]])
    images = build_images(labeled, label_space=SeveralLabels({"tags": ["a", "b"]}))
    assert images[[(0, 0), (0, 1)]]["labels"].tolist() == [[0.0, 1.0], [1.0, 1.0]]


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
    images = NOISE
    images[0] = images[0].convert("L")
    prepared = build_images(LabeledImages(images, [0] * 9))
    keys = [(0, index) for index in range(9)]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    pixels = prepared[keys]["pixels"]
    normalizer = Normalizer(processor, torch.device("cpu"))
    assert_close(normalizer(pixels), expected, atol=1e-5, rtol=0)


def test_only_small_datasets_are_decoded_once(monkeypatch: MonkeyPatch) -> None:
    keys = [(5, 0), (5, 1), (5, 2)]
    num_bytes = 3 * 12 * 10 * 3  # three images before the random crop
    for limit, num_reads in ((num_bytes, 3), (num_bytes - 1, 6)):
        monkeypatch.setattr(batches_module, "MAX_CACHE_BYTES", limit)
        counted = CountedImages(NOISE[:3])
        images = build_images(LabeledImages(counted, [0, 1, 2]), crop_scale=0.5)
        assert are_equal(images[keys], images[keys])
        assert counted.num_reads == num_reads


# Unreadable images --------------------------------------------------------------------------------


def test_the_next_image_replaces_an_unreadable_one(tmp_path: Path) -> None:
    """The batches are the same with and without workers, and from any step."""
    replacements = {1: 3, 2: 3, 5: 0}
    files = [tmp_path / f"{index}.png" for index in range(6)]
    for index, file in enumerate(files):
        if index in replacements:
            file.write_bytes(b"no image")
        else:
            NOISE[index].save(file)
    images = LabeledImages(DatasetImages.from_list(list(map(str, files))), list(range(6)))
    options = {
        "crop_scale": 0.5,
        "flip": True,
        "auto_augment": "trivial",
        "augment": {"random_erasing": 0.5, "rotation": 20},
    }
    plan = build_plan(6, epochs=3, batch_size=3)

    batches = list(
        iterate_training_batches(build_images(images, **options), plan, 0, num_workers=2)
    )
    assert len(batches) == 6

    for keys, batch in zip(plan.iterate_keys(0), batches, strict=True):
        wanted = [index for _, index in keys]
        assert (
            batch["index"].tolist()
            == batch["labels"].tolist()
            == [replacements.get(at, at) for at in wanted]
        )
        assert set(batch["errors"]) == replacements.keys() & set(wanted)
        assert all(f"{index}.png" in message for index, message in batch["errors"].items())

    resumed = iterate_training_batches(build_images(images, **options), plan, 0, 0, first_step=1)
    assert all(are_equal(*pair) for pair in zip(resumed, batches[1:], strict=True))


@pytest.mark.parametrize(("num_workers", "is_daemon"), [(0, False), (1, False), (1, True)])
def test_a_dataset_without_any_readable_image_is_a_one_line_error(
    tmp_path: Path, num_workers: int, is_daemon: bool, monkeypatch: MonkeyPatch
) -> None:
    """Also in a process of a `Pool`, which must not start others."""
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", is_daemon)
    source = LabeledImages(
        DatasetImages.from_list([str(tmp_path / f"{index}.png") for index in range(3)]), [0, 1, 2]
    )

    with raises_one_line("none of the 3 images can be read. First error: ", ".png"):
        next(
            iterate_training_batches(
                build_images(source), build_plan(3, batch_size=2, max_steps=2), 0, num_workers
            )
        )


# Workers ------------------------------------------------------------------------------------------


def test_workers_ignore_the_signals_that_stop_a_run() -> None:
    """Ctrl-C and a cluster's SIGTERM reach all processes, but the main process has to save."""
    source = LabeledImages(NOISE[:4], [0] * 4)
    batches = iterate_training_batches(
        build_images(source), build_plan(4, max_steps=60, batch_size=2), 0, num_workers=2
    )
    before = multiprocessing.active_children()
    for _ in range(2):
        next(batches)  # one batch from each worker: both have started
    workers = [child for child in multiprocessing.active_children() if child not in before]
    assert len(workers) == 2
    for name in ("INT", "TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(0.2)
    assert len(list(islice(batches, 50))) == 50

    for worker in workers:
        for _ in range(10):  # on a busy machine, one is lost while the other signal is pending
            worker.terminate()  # a SIGTERM from this process, as at exit
            worker.join(timeout=1)
        assert worker.exitcode == 0
