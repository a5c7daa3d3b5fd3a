"""The frozen model: scikit-learn's classifier, its result, and the start of steps."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.photo_folders import draw_pixels, write_digits
from helpers.tiny_models import edit_config
from helpers.tiny_options import (
    build_tiny_options,
    prepare_setup,
    read_metrics,
    run_training,
    save_digits_encoder,
)
from numpy.random import default_rng
from numpy.testing import assert_allclose
from PIL import Image
from pytest import CaptureFixture, approx
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    predict,
)
from modeling_vitcls.data.aspect_ratio import get_resize, set_resize
from modeling_vitcls.evaluation.evaluate import evaluate_checkpoint
from modeling_vitcls.inference.options import EvaluateOptions


WIDTH = 32  # of the tiny models

TAGS = {
    "digit": lambda digit: True,
    "even": lambda digit: digit % 2 == 0,
    "round": lambda digit: digit in (0, 6, 8),
    "zero": lambda digit: digit == 0,
}

pytestmark = pytest.mark.usefixtures("few_digits")


@pytest.fixture(scope="module")
def encoder(module_path: Path) -> Path:
    """Return an encoder without a classifier that was trained on digits."""
    return save_digits_encoder(module_path)


def build_options(folder: Path, encoder: Path, dataset: str | Path = "digits", **flags: Any) -> Any:
    """Return the options of a frozen run or, with `max_steps`, of one with steps."""
    settings = {"model": encoder, "probe": True, "batch_size": 32}
    return build_tiny_options(folder, dataset, **settings | flags)


def process(run: Path, images: Any) -> torch.Tensor:
    """Return the pixel values of images for a saved model."""
    processor = ViTCLSImageProcessor.from_pretrained(run)
    return processor(list(images), return_tensors="pt")["pixel_values"]


@torch.no_grad()
def compute_logits(run: Path, images: Any) -> np.ndarray:
    """Compute the logits of a saved model with its public interface."""
    model = ViTCLSForImageClassification.from_pretrained(run).eval()
    return model(process(run, images)).logits.numpy()


@torch.no_grad()
def compute_features(run: Path, images: Any) -> np.ndarray:
    """Compute the input of the saved model's classifier."""
    model = ViTCLSModel.from_pretrained(run).eval()
    return model(process(run, images)).pooler_output.double().numpy()


def predict_with_scikit_learn(
    features: np.ndarray, labels: np.ndarray, others: np.ndarray
) -> np.ndarray:
    """Return the log probabilities of averaged discriminants, before the temperature."""
    num_tokens = features.shape[1] // WIDTH
    logits = []
    for train, test in zip(
        np.split(features, num_tokens, axis=1), np.split(others, num_tokens, axis=1), strict=True
    ):
        lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(train, labels)
        residuals = train - lda.means_[np.searchsorted(lda.classes_, labels)]
        size = np.trace(np.linalg.inv(lda.covariance_) @ residuals.T @ residuals) / len(train)
        noise = size / (2 * np.unique(labels, return_counts=True)[1])  # of the class means
        logits.append(lda.decision_function(test) + noise)
    return np.mean(logits, axis=0)


def check_classifier(run: Path, results: dict[str, Any], parts: list[Any], images: Any) -> None:
    """Compare a saved model with scikit-learn's classifier on the input of its own."""
    features = np.concatenate([compute_features(run, part.images) for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    logits = predict_with_scikit_learn(features, labels, compute_features(run, images))
    expected = softmax(logits / results["calibration"]["temperature"], axis=1)
    assert_allclose(softmax(compute_logits(run, images), axis=1), expected, atol=5e-3)


def train_frozen(options: Any) -> Any:
    """Return the options and the results of a run."""
    return options, run_training(options)


@pytest.fixture(scope="module")
def frozen_run(encoder: Path, module_path: Path) -> Any:
    """Run the probe without steps, and measure it on held-out images."""
    return train_frozen(build_options(module_path / "frozen", encoder, held_out_fraction=0.2))


@pytest.fixture(scope="module")
def run_on_all_labels(encoder: Path, module_path: Path) -> Any:
    """Run the probe without steps and without held-out images."""
    return train_frozen(build_options(module_path / "all labels", encoder))


@pytest.mark.parametrize(("name", "num_images"), [("frozen_run", 240), ("run_on_all_labels", 300)])
def test_a_frozen_model_is_the_classifier_of_scikit_learn(
    name: str, num_images: int, request: pytest.FixtureRequest
) -> None:
    options, results = request.getfixturevalue(name)
    train = prepare_setup(options).data.train
    assert results["steps"] == 0
    assert results["num_training_images"] == len(train) == num_images
    check_classifier(options.output_dir, results, [train], train.images.select(range(40)))


def test_the_reported_accuracy_is_that_of_the_saved_model(frozen_run: Any) -> None:
    options, results = frozen_run
    held_out = prepare_setup(options).data.held_out
    predictions = compute_logits(options.output_dir, held_out.images).argmax(axis=1)
    assert results["num_images"] == len(held_out)
    assert results["accuracy"] == approx((predictions == held_out.labels).mean(), abs=1e-6)


def test_predictions_of_training_images_come_from_classifiers_of_other_images(
    run_on_all_labels: Any,
) -> None:
    options, results = run_on_all_labels
    rows = pd.read_parquet(options.output_dir / "predictions.parquet")
    assert len(rows) == results["num_training_images"]
    images = prepare_setup(options).data.train.images
    fitted = compute_logits(options.output_dir, images)
    own = rows.set_index("image").loc[images.get_names(), "probabilities"].map(max)
    assert own.mean() < softmax(fitted, axis=1).max(axis=1).mean()


def test_most_training_images_are_known_and_noise_is_unknown(
    run_on_all_labels: Any, tmp_path: Path
) -> None:
    options, _ = run_on_all_labels
    images = prepare_setup(options).data.train.images
    for index in range(40):
        images[index].save(tmp_path / f"digit{index}.png")
        Image.fromarray(draw_pixels(8, 8, seed=index)).save(tmp_path / f"noise{index}.png")
    rows = predict(options.output_dir, sorted(tmp_path.glob("*.png")))
    unknown = [row["unknown"] for row in rows]
    assert np.mean(unknown[:40]) <= 0.15
    assert np.mean(unknown[40:]) >= 0.8


def test_a_frozen_run_is_fitted_to_the_validation_split_and_measured_on_the_test_split(
    encoder: Path, tmp_path: Path
) -> None:
    digits = load_digits()
    for index, split in enumerate(("train", "validation", "test")):
        images, labels = digits.images[index:90:3], digits.target[index:90:3]
        for label in range(10):
            save_images(tmp_path / "photos" / split / str(label), 15 * images[labels == label])
    options = build_options(tmp_path / "run", encoder, tmp_path / "photos")
    results = run_training(options)
    data = prepare_setup(options).data
    assert results["num_training_images"] == 60
    assert results["split"] == "split 'test'"
    parts = [data.train, data.selection]
    check_classifier(tmp_path / "run", results, parts, data.held_out.images)
    # no second copy of the weights
    assert not list((tmp_path / "run").rglob("checkpoints/*/*.safetensors"))


def save_images(folder: Path, pixels: np.ndarray) -> None:
    """Save images [N, H, W] of 8 bits as 0.png, 1.png, ..."""
    folder.mkdir(parents=True)
    for index, image in enumerate(pixels.astype(np.uint8)):
        Image.fromarray(image).save(folder / f"{index}.png")


def test_class_weights_raise_the_recall_of_a_small_class(encoder: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_digits(photos / "8", 8, slice(60))
    write_digits(photos / "3", 3, slice(8))
    recalls = {}
    for balance in ("none", "weights"):
        flags = {"class_balance": balance, "pooling": "cls", "pooled_layers": (-1,)}
        options = build_options(tmp_path / balance, encoder, photos, **flags)
        results = run_training(options)
        recalls[balance] = results["per_class"][0]["recall"]
    assert recalls["weights"] >= recalls["none"]
    weights = [
        ViTCLSForImageClassification.from_pretrained(tmp_path / balance).classifier.bias
        for balance in recalls
    ]
    assert not torch.equal(*weights)


def test_steps_start_from_the_frozen_model_also_after_a_damaged_checkpoint(
    encoder: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    """A resumed run starts after step 1, because the checkpoint of step 2 is damaged."""
    flags = {
        "max_steps": 2,
        "learning_rate": 1e-6,
        "save_every": 1,
        "keep_checkpoints": 3,
        "pooled_layers": (-2, -1),
        "pooling": "cls_mean",
    }
    options = build_options(tmp_path / "run", encoder, **flags)
    results = run_training(options)
    # the loss of a random classifier
    assert read_metrics(tmp_path / "run")[0]["loss"] < 0.6 * math.log(10)

    capsys.readouterr()
    (tmp_path / "run/results.json").unlink()
    weights = tmp_path / "run/checkpoints/step-00000002/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])

    resumed = run_training(replace(options, resume=True))
    assert resumed["frozen"] == results["frozen"]
    assert resumed["accuracy"] == results["accuracy"]
    printed = capsys.readouterr().out
    assert f"the checkpoint {weights.parent} is damaged" in printed
    assert "resumed   after step 1 of 2" in printed
    config = ViTCLSForImageClassification.from_pretrained(tmp_path / "run").config
    assert config.pooled_layers == [-2, -1]
    assert config.pooling == "cls_mean"


@pytest.mark.parametrize(
    ("flags", "tokens"),
    [
        ({"num_cls_tokens": 0, "pooling": "mean"}, {"mean"}),
        ({"pooling": "max"}, {"own"}),
        ({"pooling": "cls"}, {"cls"}),
        ({}, {"cls", "mean", "cls_mean"}),
    ],
)
def test_the_probe_chooses_what_the_user_has_not_set(
    encoder: Path, tmp_path: Path, flags: dict[str, Any], tokens: set[str]
) -> None:
    prepared = prepare_setup(build_options(tmp_path / "run", encoder, **flags))
    search = prepared.inputs.head_search
    warn = prepared.reporter.warn
    images = search.encode(prepared.data.train, warn, 64, is_divided=False)
    record = search.fit(images, prepared.data, warn).record
    assert {row["pooling"] for row in record["candidates"]} == tokens
    assert record["num_training_images"] == 64


def test_the_better_geometry_is_chosen(encoder: Path, tmp_path: Path) -> None:
    """The classes differ only at the left and right edges, which a center crop removes."""
    folder = tmp_path / "photos"
    generator = default_rng(0)
    for name, edge in (("left", slice(8)), ("right", slice(-8, None))):
        # Different scenes: photos of the same noise would be one scene, which measures nothing
        scenes = generator.integers(0, 200, (40, 4, 12), dtype=np.uint8)
        pixels = np.kron(scenes, np.ones((1, 8, 8), np.uint8))
        pixels[:, :, edge] = 255
        save_images(folder / name, pixels)
    (folder / "left" / "broken.png").write_bytes(b"no image")
    own = shutil.copytree(encoder, tmp_path / "own")
    processor = ViTCLSImageProcessor.from_pretrained(own)
    set_resize(processor, "crop", (32, 32))
    processor.save_pretrained(own)
    results = run_training(build_options(tmp_path / "run", own, folder))

    assert results["frozen"]["resize"] == "squash"
    assert results["num_unreadable_images"] == 1
    assert get_resize(ViTCLSImageProcessor.from_pretrained(tmp_path / "run")) == "squash"
    assert results["num_right"] == results["num_images"]


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"probe": False}, "`probe=False` is set"),
        ({"model": "vitcls-tiny"}, "the initial weights are random"),
        ({"model_config": {"head_type": "mlp"}}, "the head is an MLP"),
        ({"pooling": "attention"}, "the pooler has random weights"),
    ],
)
def test_heads_and_poolers_of_another_kind_have_no_probe(
    encoder: Path, tmp_path: Path, flags: dict[str, Any], reason: str
) -> None:
    inputs = prepare_setup(build_options(tmp_path / "run", encoder, **flags)).inputs
    assert inputs.head_search is None
    assert inputs.missing_start_reason == reason


def test_the_own_geometry_that_wins_is_saved_as_it_was(encoder: Path, tmp_path: Path) -> None:
    """The processor resizes to 40 pixels before the crop.

    The labels are noise, so no geometry wins.
    """
    folder = tmp_path / "photos"
    generator = default_rng(0)
    for name in ("a", "b"):
        save_images(folder / name, generator.integers(0, 256, (40, 48, 96), dtype=np.uint8))
    own = shutil.copytree(encoder, tmp_path / "own")
    crop = {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    edit_config(own, "preprocessor_config.json", size={"shortest_edge": 40}, **crop)
    results = run_training(build_options(tmp_path / "run", own, folder))
    assert results["frozen"]["geometry"]["losses"].keys() == {"crop", "squash"}

    image = Image.open(folder / "a/0.png")
    assert torch.equal(process(tmp_path / "run", [image]), process(own, [image]))


@pytest.fixture(scope="module")
def tagged_digits(module_path: Path) -> Path:
    """Return tables of digits with tags and tasks: 100 images that train, and 100 others.

    Each task has some empty cells.
    """
    digits = load_digits()
    save_images(module_path / "images", 15 * digits.images[:200])
    rows = [
        (
            f"images/{index}.png",
            "|".join(name for name, has in TAGS.items() if has(digit)),
            f"digit {digit}" if index % 5 else "",
            ("even", "odd")[digit % 2] if index % 7 else "",
            "other" if index else "first",
        )
        for index, digit in enumerate(digits.target[:200])
    ]
    for name, part in (("train", rows[:100]), ("others", rows[100:])):
        table = pd.DataFrame(part, columns=["image", "tags", "number", "half", "place"])
        table.to_csv(module_path / f"{name}.csv", index=False)
    return module_path


def train_on_tags(folder: Path, encoder: Path, tagged_digits: Path, **flags: Any) -> Any:
    """Return the results of a run on the tagged digits."""
    columns = {"label_column": ("tags",)}
    options = build_options(folder, encoder, tagged_digits / "train.csv", **columns | flags)
    return run_training(options)


def test_several_labels_train_a_frozen_model_and_are_cross_validated(
    encoder: Path, tagged_digits: Path, tmp_path: Path
) -> None:
    results = train_on_tags(tmp_path / "run", encoder, tagged_digits)
    assert (results["steps"], results["split"]) == (0, "cross-validation")
    assert results["num_images"] == results["num_training_images"] == 100
    low, high = results["mean_average_precision_interval"]
    assert low < results["mean_average_precision"] < high
    assert [row["name"] for row in results["per_class"]] == sorted(TAGS)
    assert {"images", "average_precision", "f1"} <= results["per_class"][0].keys()

    others = evaluate_checkpoint(
        EvaluateOptions(model=str(tmp_path / "run"), dataset=str(tagged_digits / "others.csv"))
    )
    assert others["loss"] == approx(results["loss"], abs=0.1)
    assert low - 0.1 < others["mean_average_precision"]
    rows = predict(str(tmp_path / "run"), str(tagged_digits / "images/0.png"))
    assert set(rows[0]["labels"]) == {"digit", "even", "round", "zero"}


def test_each_task_has_the_classifier_and_the_result_of_a_run_on_its_column_alone(
    encoder: Path, tagged_digits: Path, tmp_path: Path
) -> None:
    tasks = ("half", "number")
    results = train_on_tags(tmp_path / "run", encoder, tagged_digits, label_column=tasks)
    assert (results["steps"], results["split"]) == (0, "cross-validation")
    assert results["num_images"] == 100
    model = ViTCLSForMultiTaskClassification.from_pretrained(tmp_path / "run").eval()
    images = [Image.open(file) for file in sorted((tagged_digits / "images").iterdir())]
    found = model(process(tmp_path / "run", images)).logits
    for task in tasks:
        run = tmp_path / task
        alone = train_on_tags(run, encoder, tagged_digits, label_column=(task,))
        own = results["tasks"][task]
        assert own["num_images"] == alone["num_images"] < 100
        assert own["accuracy_interval"] == approx(alone["accuracy_interval"], abs=1e-3)
        expected = softmax(compute_logits(run, images), axis=1)
        assert_allclose(found[task].softmax(1).detach(), expected, atol=1e-3)


def test_a_task_that_no_fold_can_measure_leaves_the_others_their_result(
    encoder: Path, tagged_digits: Path, tmp_path: Path
) -> None:
    flags = {"label_column": ("half", "place")}
    results = train_on_tags(tmp_path / "run", encoder, tagged_digits, **flags)
    assert "accuracy" not in results["tasks"]["place"]
    assert results["accuracy"] == results["tasks"]["half"]["accuracy"]


@pytest.mark.parametrize(
    ("columns", "metric"),
    [(("tags",), "mean_average_precision"), (("number", "half"), "accuracy")],
)
def test_steps_on_several_labels_end_at_the_mean_with_the_frozen_start(
    encoder: Path, tagged_digits: Path, tmp_path: Path, columns: tuple[str, ...], metric: str
) -> None:
    flags = {"epochs": 1, "label_column": columns}
    results = train_on_tags(tmp_path / "run", encoder, tagged_digits, **flags)
    assert results["average_with_start"] == 0.5
    assert results[metric] > results["before_steps"][metric] - 0.05
