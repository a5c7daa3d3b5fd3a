"""Accuracy of frozen features, for every token and layer, equals that of scikit-learn.

The features are those of a plain loop.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import LAYOUTS, build_tiny_config, raises_one_line, randomize
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.data.aspect_ratio import set_resize
from modeling_vitcls.data.evaluation_data import load_evaluation_data
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.inference import frozen
from modeling_vitcls.inference.frozen import evaluate_frozen
from modeling_vitcls.inference.intervals import compute_proportion_interval
from modeling_vitcls.inference.linear_probe import LinearProbe
from modeling_vitcls.inference.options import EvaluateOptions


DIGITS = DataOptions(dataset="digits", num_workers=0, held_out_fraction=0.1)
TOKENS = [
    "CLS",
    "distillation",
    "register 1",
    "register 2",
    "register 3",
    "register 4",
    "mean of patches",
]
pytestmark = pytest.mark.usefixtures("fresh_accelerate")

CLASSIFIERS: dict[str, Any] = {
    "knn": lambda: KNeighborsClassifier(10, weights="distance", metric="cosine"),
    "logreg": LinearProbe,
}


def save_model(folder: Path, **fields: Any) -> Path:
    """Save a classifier with random weights for small images, and its image processor."""
    config = build_tiny_config(image_size=16, patch_size=8, **fields)
    randomize(ViTCLSForImageClassification(config)).save_pretrained(folder)
    ViTCLSImageProcessor(size=16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with one CLS and one distillation token, and four registers."""
    return save_model(tmp_path_factory.mktemp("model"), **LAYOUTS["cls_distillation_registers"])


def run(model: Path, frozen: str, **options: Any) -> dict[str, Any]:
    """Evaluate the frozen features on digits."""
    options = {"dataset": "digits", "num_workers": 0, "batch_size": 50} | options
    return evaluate_frozen(EvaluateOptions(model=str(model), frozen=frozen, **options))


@torch.no_grad()
def encode(model: Path, images: Any) -> np.ndarray:
    """Return the features of the tokens [images, tokens, D], from a plain loop over the images."""
    encoder = ViTCLSModel.from_pretrained(model).eval()
    processor = ViTCLSImageProcessor.from_pretrained(model)
    set_resize(processor, "pad", (16, 16))
    rows = []
    for image in images:
        tokens = encoder(processor(image, return_tensors="pt")["pixel_values"]).last_hidden_state[0]
        rows.append([*tokens[:6].numpy(), tokens[6:].mean(0).numpy()])
    return np.array(rows)


def write_noise(folder: Path, counts: dict[str, tuple[int, ...]]) -> Path:
    """Write noise images of the classes a, b, c, ... in each split.

    `counts` are the numbers of images per class.
    """
    generator = np.random.default_rng(0)
    for split, numbers in counts.items():
        for name, number in zip("abc", numbers, strict=False):
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(256, size=(16, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def test_the_named_split_is_evaluated_without_unreadable_images(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_noise(tmp_path / "noise", {"train": (6, 6), "val": (4, 4)})
    for split in ("train", "val"):
        (dataset / split / "a" / "3.png").write_bytes(b"no image")
    data = {"dataset": str(dataset), "num_workers": 0}
    monkeypatch.setattr(
        frozen, "time", SimpleNamespace(perf_counter=iter([10.0, 11.234, 20.0]).__next__)
    )

    results = run(model, "knn", **data, split="validation")
    assert (results["seconds"], results["images_per_second"]) == (1.23, 14.6)  # 18 images
    assert (results["split"], results["num_training_images"], results["num_images"]) == (
        "validation",
        11,
        7,
    )
    assert results["num_unreadable_images"] == 2

    gray = save_model(tmp_path / "gray", num_channels=1)
    processor = ViTCLSImageProcessor(size=16, do_convert_rgb=False, image_mean=0.5, image_std=0.5)
    processor.save_pretrained(gray)
    with pytest.raises(ValueError, match=r"more than 0 images cannot be read.* has 3 channels"):
        run(gray, "knn", **data, max_unreadable_images=0, split="validation")


@pytest.mark.parametrize("frozen", CLASSIFIERS)
def test_results_equal_scikit_learn(model: Path, frozen: str, tmp_path: Path) -> None:
    """The evaluated split lacks the first class."""
    dataset = str(write_noise(tmp_path, {"train": (4, 5, 6), "val": (0, 4, 3)}))
    data = DataOptions(dataset=dataset, num_workers=0)
    results = run(
        model,
        frozen,
        **vars(data),
        split="validation",
        resize="pad",
        output=tmp_path / "new" / "frozen.json",
    )
    assert json.loads((tmp_path / "new" / "frozen.json").read_text(encoding="utf-8")) == results | {
        "frozen": frozen
    }
    assert "versions" in results

    rows = results["rows"]
    assert [row["token"] for row in rows] == TOKENS
    assert (results["num_training_images"], results["num_images"]) == (15, 7)
    assert len({row["accuracy"] for row in rows}) > 1

    splits = [load_evaluation_data(data, split) for split in ("train", "validation")]
    labels = [np.array(split.label_space.names)[split.images.labels] for split in splits]
    train, held_out = (encode(model, split.images.images) for split in splits)
    for index, row in enumerate(rows):
        accuracy = (
            CLASSIFIERS[frozen]()
            .fit(train[:, index], labels[0])
            .score(held_out[:, index], labels[1])
        )
        assert row["accuracy"] == pytest.approx(accuracy, abs=1e-6)
        interval = compute_proportion_interval(round(7 * accuracy), 7)
        assert row["accuracy_interval"] == pytest.approx(interval, abs=1e-6)


def test_the_images_that_a_classifier_is_fitted_to_are_not_evaluated(
    model: Path, tmp_path: Path
) -> None:
    data = DataOptions(dataset=str(write_noise(tmp_path / "data", {".": (8, 8)})), num_workers=0)
    results = run(model, "knn", **vars(data))
    assert results["num_training_images"] + results["num_images"] == 16
    with raises_one_line("`split`"):
        run(model, "knn", **vars(data), split="train")


def test_other_labels_are_an_error(model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    table = tmp_path / "table.csv"
    table.write_text("path,a,b\n" + "".join(f"{n}.png,{n % 2},{n % 3}\n" for n in range(40)))
    data = DataOptions(dataset=str(table), label_column=("a", "b"), num_workers=0)
    with pytest.raises(
        ValueError, match=r"`frozen='knn'` requires one label per image.* `label_column`"
    ):
        run(model, "knn", **vars(data))


def test_each_row_by_layer_is_scikit_learn_on_that_layer(model: Path, tmp_path: Path) -> None:
    """The other rows are compared with the first, CLS of the last layer, on the same images."""
    dataset = str(write_noise(tmp_path, {"train": (8, 8), "val": (6, 6)}))
    data = DataOptions(dataset=dataset, num_workers=0)
    rows = run(model, "knn", **vars(data), split="validation")["layers"]
    encoder = ViTCLSModel.from_pretrained(model).eval()
    processor = ViTCLSImageProcessor.from_pretrained(model)

    @torch.no_grad()
    def compute(split: str, row: dict[str, Any]) -> tuple[np.ndarray, list[int]]:
        images = load_evaluation_data(data, split).images
        pixels = torch.cat(
            [processor(image, return_tensors="pt")["pixel_values"] for image in images.images]
        )
        states = encoder(pixels, output_hidden_states=True).hidden_states
        parts = []
        for layer in row["layers"]:
            tokens = encoder.layernorm(states[layer])
            if row["pooling"] in ("cls", "cls_mean"):
                parts.append(tokens[:, 0])
            if row["pooling"] != "cls":
                parts.append(tokens[:, 6:].mean(dim=1))
        return torch.cat(parts, dim=1).numpy(), images.labels

    assert (rows[0]["layers"], rows[0]["pooling"]) == ([-1], "cls")
    for row in rows:
        classifier = CLASSIFIERS["knn"]().fit(*compute("train", row))
        features, labels = compute("validation", row)
        assert row["accuracy"] == pytest.approx(classifier.score(features, labels), abs=1e-6)
        assert row["difference"] == pytest.approx(row["accuracy"] - rows[0]["accuracy"], abs=2e-6)
