"""The evaluator: every image is counted once, and unreadable images are named."""

import io
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import evaluation_results
from helpers.evaluation_results import close, compute_outputs
from helpers.evaluation_worker import (
    NUM_IMAGES,
    SIZES,
    UNREADABLE,
    build_classifier,
    build_evaluator,
    build_labeled_images,
)
from helpers.photo_folders import CountedImages
from helpers.tiny_models import raises_one_line
from PIL import Image

from modeling_vitcls import ViTCLSConfig, ViTCLSImageProcessor
from modeling_vitcls.data.images import DatasetImages, LabeledImages
from modeling_vitcls.data.labels import LabelSpace
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.inference import image_pass
from modeling_vitcls.inference.evaluator import Evaluator
from modeling_vitcls.runtime.distributed import build_accelerator


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CPU = torch.device("cpu")
by_one_process = evaluation_results.by_one_process  # a fixture


def test_a_batch_without_readable_images_has_the_shape_of_the_model() -> None:
    labels = LabelSpace("single_label_classification", {"label": ["a", "b"]})
    sizes = SIZES | {"image_size": (16, 24), "num_channels": 1}
    model = type(build_classifier("single"))(
        ViTCLSConfig(**sizes, **labels.to_config_values())
    ).eval()
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape)))
    file = io.BytesIO()
    Image.new("L", (24, 16)).save(file, "PNG")
    images = DatasetImages.from_list(
        [
            {"path": name, "bytes": file.getvalue()[:end]}
            for name, end in (("a", None), ("b", 40), ("c", 40))
        ]
    )
    processor = ViTCLSImageProcessor(size={"height": 16, "width": 24}, do_convert_rgb=False)
    processor.image_mean = processor.image_std = [0.5]

    evaluator = Evaluator(
        LabeledImages(images, [0, 1, 0]),
        processor,
        labels,
        DataOptions(dataset="", num_workers=0),
        2,
        Accelerator(cpu=True),
    )
    assert evaluator(model)["num_unreadable_images"] == 2
    assert shapes == [(1, 1, 16, 24), (2, 1, 16, 24)]


def test_unreadable_images_are_named_once_and_not_counted(by_one_process: dict[str, Any]) -> None:
    said: list[str] = []
    evaluator = build_evaluator(
        "single",
        build_accelerator(),
        build_labeled_images("single", unreadable=UNREADABLE),
        max_unreadable_images=4,
        warn=said.append,
    )
    model = build_classifier("single")
    metrics = evaluator(model)

    assert (metrics["num_images"], metrics["num_unreadable_images"]) == (NUM_IMAGES - 4, 4)
    assert [f"'{index}.png'" in line for index, line in zip(UNREADABLE, said, strict=True)] == [
        True
    ] * 4
    assert evaluator(model) == metrics == by_one_process["unreadable"]
    assert len(said) == 4

    outputs, labels = compute_outputs("single")
    good = [index for index in range(NUM_IMAGES) if index not in UNREADABLE]
    right = outputs.logits.argmax(1)[good] == torch.tensor(labels)[good]
    assert metrics["accuracy"] == close(right.float().mean().item())


def test_too_many_unreadable_images_are_an_error() -> None:
    accelerator = build_accelerator()
    pictures = build_labeled_images("single", unreadable=UNREADABLE)
    evaluator = build_evaluator("single", accelerator, pictures, max_unreadable_images=3)
    with raises_one_line("more than 3 images cannot be read", "'12.png'"):
        evaluator(build_classifier("single"))
    evaluator = build_evaluator(
        "single", accelerator, build_labeled_images("single", number=2, unreadable=(0, 1))
    )
    with pytest.raises(ValueError, match="none of the 2 images can be read"):
        evaluator(build_classifier("single"))


@pytest.mark.parametrize(("free_bytes", "num_reads"), [(0, 1), (-1, 3)])
def test_small_datasets_are_preprocessed_once(
    free_bytes: int, num_reads: int, monkeypatch: pytest.MonkeyPatch, by_one_process: dict[str, Any]
) -> None:
    num_bytes = NUM_IMAGES * 3 * 16 * 16 * 4
    monkeypatch.setattr(image_pass, "MAX_CACHE_BYTES", num_bytes + free_bytes)
    pictures = build_labeled_images("single")
    counted = CountedImages(pictures.images)
    evaluator = build_evaluator(
        "single", build_accelerator(), LabeledImages(counted, pictures.labels)
    )
    for _ in range(3):
        assert evaluator(build_classifier("single")) == by_one_process["single"]
    assert counted.num_reads == num_reads * NUM_IMAGES


def test_evaluation_draws_no_random_numbers() -> None:
    """Otherwise, training would depend on the steps at which it is evaluated."""
    evaluator = build_evaluator("single", build_accelerator(), num_workers=1)
    model = build_classifier("single")
    before = torch.get_rng_state()
    evaluator(model)
    assert evaluator.loader.num_workers == 1
    assert torch.equal(torch.get_rng_state(), before)
