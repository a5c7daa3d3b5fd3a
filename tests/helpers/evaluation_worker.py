"""Evaluations in the test process, which test_evaluate.py compares with two processes:

    accelerate launch --multi_gpu --num_processes 2 evaluation_worker.py FOLDER

The worker writes FOLDER/scenarios.json.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.random import default_rng
from PIL import Image
from torch.distributed.fsdp import fully_shard


sys.path.extend(map(str, Path(__file__).parents[1:3]))

from helpers.photo_folders import encode_image
from modeling_vitcls import (
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
)
from modeling_vitcls.data.images import DatasetImages, LabeledImages
from modeling_vitcls.data.labels import OneLabel, PerTask, SeveralLabels
from modeling_vitcls.evaluation.evaluator import Evaluator
from modeling_vitcls.runtime.distributed import build_accelerator
from modeling_vitcls.runtime.files import write_json


BATCH_SIZE = 3
NUM_IMAGES = 13  # not a multiple of 3 or 2 x 3
UNREADABLE = (0, 5, 11, 12)  # the last batch has no readable image
CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
SIZES = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "initializer_range": 0.5,
}
SPACES = {
    "single": OneLabel({"label": CLASSES}),
    "multi_label": SeveralLabels({"label": CLASSES}),
    "multi_task": PerTask({"age": ["old", "young"], "species": CLASSES}),
}
CONFIGS = {
    "single": {"num_distillation_tokens": 1},
    "multi_label": {"pooling": "mean"},
    "multi_task": {"num_cls_tokens": 2},
}


def build_classifier(name: str) -> Any:
    """Return a model in evaluation mode, with the same random weights in each call."""
    torch.manual_seed(3)
    config = ViTCLSConfig(**SIZES, **CONFIGS[name], **SPACES[name].to_config_values())
    model_class = ViTCLSForMultiTaskClassification if config.tasks else ViTCLSForImageClassification
    return model_class(config).eval()


def draw_label(name: str, random: np.random.Generator) -> Any:
    """Draw a label. No image has the last class, and some have no species."""
    if name == "single":
        return int(random.integers(6))
    if name == "multi_label":
        return np.flatnonzero(random.integers(2, size=6)).tolist()
    return {"age": int(random.integers(2)), "species": [None, 0, 3, 5][random.integers(4)]}


def build_labeled_images(
    name: str, number: int = NUM_IMAGES, unreadable: tuple[int, ...] = ()
) -> LabeledImages:
    """Return noise images with labels, as PNG files in memory.

    Files with an index in `unreadable` are truncated.
    """
    random = default_rng(0)
    encoded = []
    labels = []
    for index in range(number):
        noise = random.integers(256, size=(16, 16, 3), dtype=np.uint8)
        content = encode_image(Image.fromarray(noise))
        encoded.append(
            {"path": f"{index}.png", "bytes": content[:200] if index in unreadable else content}
        )
        labels.append(draw_label(name, random))
    return LabeledImages(DatasetImages.from_list(encoded), labels)


def build_evaluator(
    name: str,
    accelerator: Accelerator,
    images: Any = None,
    warn: Any = print,
    num_workers: int = 0,
) -> Evaluator:
    """Return an evaluator for one kind of labels."""
    return Evaluator(
        images or build_labeled_images(name),
        processor=ViTCLSImageProcessor(size=16),
        label_space=SPACES[name],
        batch_size=BATCH_SIZE,
        accelerator=accelerator,
        num_workers=num_workers,
        num_channels=3,
        warn=warn,
    )


def evaluate_all(accelerator: Accelerator) -> dict[str, Any]:
    """Return scenario -> metrics."""
    results = {name: build_evaluator(name, accelerator)(build_classifier(name)) for name in SPACES}
    model = build_classifier("single")
    one_image = build_labeled_images("single", number=1)
    results["one image"] = build_evaluator("single", accelerator, one_image)(model)
    images = build_labeled_images("single", unreadable=UNREADABLE)
    evaluator = build_evaluator("single", accelerator, images, num_workers=1)
    results["unreadable"] = evaluator(model)
    results["unreadable, again"] = evaluator(model)
    results["sharded"] = build_evaluator("single", accelerator, images)(shard(model, accelerator))
    return results


def shard(model: Any, accelerator: Accelerator) -> Any:
    """Apply FSDP2 if there are several processes.

    Then all processes must run the same number of batches.
    """
    if accelerator.num_processes == 1:
        return model
    for layer in model.vitcls.layers:
        fully_shard(layer)
    return fully_shard(model)


def main() -> None:
    """Evaluate. The main process writes the results."""
    folder = Path(sys.argv[1])
    accelerator = build_accelerator()
    results = evaluate_all(accelerator)
    if accelerator.is_main_process:
        write_json(folder / "scenarios.json", results)


if __name__ == "__main__":
    main()
