"""An inspection: which images are measured with which labels, and which photos are shown."""

from typing import Any

import torch
from helpers.photo_folders import draw_noise
from helpers.tiny_models import PROCESSOR, build_tiny_config, raises_one_line
from helpers.varied_models import center_logits
from PIL import Image

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
)
from modeling_vitcls.analysis.inspection import inspect_images, select_images
from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.data.labels import OneLabel
from modeling_vitcls.evaluation.token_effects import read_batches


NUM_IMAGES = 18
IMAGES = draw_noise(*[(32, 32)] * NUM_IMAGES)


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    """1 CLS token, which the head uses, and 2 registers."""
    model = ViTCLSForImageClassification(
        build_tiny_config(**{"num_labels": 8, "num_register_tokens": 2, **fields})
    )
    return center_logits(model, PROCESSOR(IMAGES, return_tensors="pt")["pixel_values"])


def read(model: Any, images: Any, labels: Any, processor: Any = PROCESSOR) -> Any:
    label_space = OneLabel({"label": list("abcdefgh")})
    labeled = LabeledImages(images, labels)
    return read_batches(model, processor, labeled, label_space, 4)[0]


def inspect(model: Any, count: int = NUM_IMAGES, **settings: Any) -> Any:
    """Measure images without labels, and show the first one."""
    labeled = LabeledImages(IMAGES[:count], [None] * count)
    chosen = [(IMAGES[0], {"name": "first"})]
    return inspect_images(model, PROCESSOR, labeled, batch_size=4, chosen=chosen, **settings)


# Measured images ----------------------------------------------------------------------------------


def test_the_first_images_of_a_sorted_dataset_are_of_several_classes() -> None:
    model = build_classifier()
    labels = [0] * 9 + [1] * 9
    batch = read(model, IMAGES, labels)[0]
    assert set(batch.labels.tolist()) == {0, 1}


def test_images_of_several_shapes_keep_their_labels() -> None:
    """The processor keeps the aspect ratio, and one image is unreadable."""
    model = build_classifier()
    images = draw_noise(*[(32, 32), (32, 48)] * 4)
    images[3] = Image.new("F", (32, 32))
    processor = ViTCLSImageProcessor(size={"shortest_edge": 32})
    found = {}
    for batch in read(model, images, list(range(8)), processor):
        rows = zip(batch.pixel_values, batch.labels.tolist(), strict=True)
        found |= dict(zip(batch.indices, rows, strict=True))
    assert sorted(found) == [0, 1, 2, 4, 5, 6, 7]
    for index, (pixels, label) in found.items():
        assert torch.equal(pixels, processor(images[index], return_tensors="pt")["pixel_values"][0])
        assert label == index


def test_hidden_states_that_are_not_finite_are_errors() -> None:
    model = ViTCLSForImageClassification(build_tiny_config(num_cls_tokens=0, pooling="mean")).eval()
    model.vitcls.layers[0].mlp.fc2.bias.data[0] = torch.inf
    for effects in (None, []):  # of `vitcls inspect`; of the report of a run
        with raises_one_line("not finite"):
            inspect(model, count=1, effects=effects)


# Shown photos -------------------------------------------------------------------------------------


def test_shown_photos_are_of_all_classes() -> None:
    """All wrong predictions are of one class, as all of the least confident ones."""
    classes = ["bee"] * 30 + ["ant"] * 6 + ["fly"]
    is_wrong = [True] * 12 + [False] * 25
    confidences = [0.9 - index / 100 for index in range(12)] + [0.5] * 18 + [0.95] * 7
    found = select_images(confidences, is_wrong, classes, 4)
    assert {classes[index] for index in found} == {"bee", "ant", "fly"}
    assert next(iter(found)) == 0
    assert list(found.values())[:3] == ["wrong", "uncertain", "typical"]
