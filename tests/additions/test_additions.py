"""Added tasks and classes: earlier outputs keep their bits, and any change is found."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers.additions import add_class, add_task
from helpers.command_in_process import run_here
from helpers.digits_models import DIGITS, LABELS, PIXELS, STRIPED, STRIPES, train_digits_model
from helpers.photo_folders import draw_pixels, get_unicode_forms, write_files
from helpers.read_datasets import read_training_data
from helpers.tiny_models import (
    CLS,
    build_images,
    edit_config,
    edit_weights,
    raises_one_line,
    save_both,
    save_classifier,
)
from numpy.random import default_rng
from PIL import Image
from pytest import CaptureFixture, LogCaptureFixture, MonkeyPatch
from safetensors.torch import load_file
from torch.testing import assert_close

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    evaluate,
    verify_unchanged,
)
from modeling_vitcls.additions.certificate import load_tensors
from modeling_vitcls.data.in_memory import add_dataset
from modeling_vitcls.data.splits_table import build_splits_table, write_splits
from modeling_vitcls.frozen.class_statistics import ClassStatistics
from modeling_vitcls.hub.model_files import hash_weights
from modeling_vitcls.runtime.files import read_json, write_json


NOISE = build_images(3, 8, 8, channels=1)
NUM_IMAGES = 120
IMAGES = [
    Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in DIGITS.images[:NUM_IMAGES]
]
TARGETS = DIGITS.target[:NUM_IMAGES].tolist()
TASKS = {
    "parity": ["odd" if target % 2 else "even" for target in TARGETS],
    "size": ["large" if target > 4 else "small" for target in TARGETS],
}


def build_dataset(labels: list[str]) -> list[tuple[Image.Image, str]]:
    return list(zip(IMAGES, labels, strict=True))


@pytest.fixture(scope="module")
def digits(module_path: Path) -> Path:
    """Write the folder of a classifier of digits with class statistics."""
    return save_digits(module_path / "digits", epochs=2)


def save_digits(folder: Path, epochs: int, num_labels: int = 10) -> Path:
    """Write the folder of a classifier of some digits with class statistics of all of their images."""
    model = train_digits_model(epochs=epochs, num_labels=num_labels)
    model.config.id2label = {index: str(index) for index in range(num_labels)}
    known = num_labels > LABELS
    states = model(PIXELS[known], output_hidden_states=True).hidden_states[-1]
    features = {CLS: model.vitcls.normalize(states)[:, 0].detach().numpy()}
    ClassStatistics.fit(features, LABELS[known].numpy(), num_labels).set_in_model(model)
    processor = ViTCLSImageProcessor(
        size=8, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5]
    )
    return save_both(model, folder, processor)


@pytest.fixture(scope="module")
def with_parity(digits: Path, module_path: Path) -> Path:
    """Return the classifier of digits with the task "odd or even"."""
    folder = module_path / "parity"
    add_task(digits, build_dataset(TASKS["parity"]), "parity", folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_report() -> Iterator[None]:
    """Write no report, which takes longer than an addition (test_added_photos.py)."""
    with MonkeyPatch.context() as patch:
        patch.setattr("modeling_vitcls.publishing.report.write_report", lambda folder: None)
        yield


@torch.no_grad()
def compute(folder: Path, images: torch.Tensor) -> Any:
    return ViTCLSForImageClassification.from_pretrained(folder).eval()(images)


# Tasks -------------------------------------------------------------------------------------------


def test_an_added_task_is_better_than_chance_and_keeps_the_logits(
    digits: Path, with_parity: Path
) -> None:
    outputs = compute(with_parity, NOISE)
    assert torch.equal(outputs.logits, compute(digits, NOISE).logits)
    assert outputs.task_logits["parity"].shape == (3, 2)
    results = evaluate(
        with_parity, build_dataset(TASKS["parity"]), task="parity", split="train", num_workers=0
    )
    assert results["accuracy"] > 0.65  # By chance, one run in a thousand has as many of 120


def test_an_earlier_task_keeps_its_bits(with_parity: Path, tmp_path: Path) -> None:
    add_task(with_parity, build_dataset(TASKS["size"]), "size", tmp_path / "both")
    both = compute(tmp_path / "both", NOISE).task_logits
    assert set(both) == {"parity", "size"}
    assert torch.equal(both["parity"], compute(with_parity, NOISE).task_logits["parity"])


@pytest.mark.parametrize("name", ["parity", "distance", "loss"])
def test_a_task_has_a_free_name(name: str, with_parity: Path, tmp_path: Path) -> None:
    with raises_one_line("the model has an output with this name"):
        add_task(with_parity, build_dataset(TASKS["size"]), name, tmp_path / "new")


@torch.no_grad()
def test_an_encoder_becomes_a_model_with_a_task(digits: Path, tmp_path: Path) -> None:
    encoder = ViTCLSModel.from_pretrained(digits)
    processor = ViTCLSImageProcessor.from_pretrained(digits)
    save_both(encoder, tmp_path / "encoder", processor)
    add_task(tmp_path / "encoder", build_dataset(TASKS["size"]), "size", tmp_path / "new")
    images = build_images(2, 8, 8, channels=1)
    outputs = compute(tmp_path / "new", images)
    assert outputs.task_logits["size"].shape == (2, 2)
    assert torch.equal(outputs.logits, encoder.eval()(images).pooler_output)


def test_a_task_has_one_label_per_image(digits: Path, tmp_path: Path) -> None:
    rows = [f"{parity}|{size}" for parity, size in zip(TASKS["parity"], TASKS["size"], strict=True)]
    with raises_one_line("one label per image"):
        add_task(digits, build_dataset(rows), "tags", tmp_path / "new", label_separator="|")


# Certificate -------------------------------------------------------------------------------------


def copy_and_change(source: Path, folder: Path, name: str) -> Path:
    """Copy a folder, and change one value of a tensor by one unit in the last place."""
    shutil.copytree(source, folder)
    with edit_weights(folder) as tensors:
        flat = tensors[name].reshape(-1)
        flat[0] = torch.nextafter(flat[0], torch.tensor(torch.inf))
    return folder


def test_the_certificate_lists_what_was_compared(digits: Path, with_parity: Path) -> None:
    certificate = read_json(with_parity / "certificate.json")
    tensors = load_file(digits / "model.safetensors")
    assert certificate["weights_sha256"] == hash_weights(with_parity)
    assert certificate["old_weights_sha256"] == hash_weights(digits)
    assert datetime.now(UTC) - datetime.fromisoformat(certificate["date"]) < timedelta(hours=1)
    record = read_json(with_parity / "results.json")["additions"]["parity"]
    assert record["old_weights_sha256"] == hash_weights(digits)
    assert 0 < record["relative_flops"] <= 0.02  # a task costs at most two percent
    assert record["date"] == certificate["date"]
    assert str(digits) not in (with_parity / "certificate.json").read_text()
    assert certificate["tensors_sha256"].keys() == tensors.keys()
    assert certificate["num_tensors"] == len(tensors)
    assert certificate["num_images"] == 64
    assert certificate["batch_sizes"] == [16, 3, 1]
    assert certificate["dtypes"][0] == "float32"
    assert certificate["outputs"] == ["logits", "cls_logits"]


def test_verify_unchanged_exits_with_1_on_a_changed_weight(
    digits: Path, with_parity: Path, tmp_path: Path
) -> None:
    assert run_here("verify-unchanged", digits, with_parity) == 0
    changed = copy_and_change(with_parity, tmp_path / "changed", "classifier.bias")
    assert run_here("verify-unchanged", digits, changed) == 1


def test_models_with_different_code_are_not_certified(
    tmp_path: Path, capsys: CaptureFixture
) -> None:
    """The code of the folders is not run, and may compute anything."""
    old, new = save_classifier(tmp_path / "old"), tmp_path / "new"
    shutil.copytree(old, new)
    assert run_here("verify-unchanged", old, new) == 0
    with (new / "modeling_vitcls.py").open("a") as file:
        file.write("# flips the logits\n")
    assert run_here("verify-unchanged", old, new) == 1
    assert "not certified: the code modeling_vitcls.py" in capsys.readouterr().out
    for file in old.glob("*_vitcls.py"):
        file.unlink()  # As in a folder that a program saved without its code
    assert run_here("verify-unchanged", old, new) == 1


def test_nothing_is_unchanged_on_images_that_cannot_be_read(digits: Path, tmp_path: Path) -> None:
    write_files(tmp_path / "photos", "a/1.png", "b/2.png")
    with raises_one_line("no image of", "can be read"):
        verify_unchanged(digits, digits, dataset=tmp_path / "photos")


def test_damaged_weights_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(9))
    with raises_one_line("model.safetensors", "Copy the file again"):
        load_tensors(tmp_path)


def test_a_class_beside_a_task_with_any_name_keeps_the_statistics_without_a_warning(
    digits: Path, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    add_task(digits, build_dataset(TASKS["parity"]), "added_classes_001", tmp_path / "task")
    add_class(tmp_path / "task", STRIPED, tmp_path / "class")
    assert "class statistics" not in caplog.text
    outputs = compute(tmp_path / "class", NOISE)
    assert outputs.distance.isfinite().all()
    assert outputs.logits.shape == (3, 11)
    assert outputs.task_logits["added_classes_001"].shape == (3, 2)


def test_nothing_is_written_if_an_old_output_would_change(
    digits: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    save = ViTCLSForImageClassification.save_pretrained

    def save_wrongly(model: ViTCLSForImageClassification, folder: Path) -> None:
        model.classifier.bias.data[0] += 1
        save(model, folder)

    monkeypatch.setattr(ViTCLSForImageClassification, "save_pretrained", save_wrongly)
    with raises_one_line("classifier.bias has other values"):
        add_task(digits, build_dataset(TASKS["size"]), "size", tmp_path / "new")
    with raises_one_line("classifier.bias has other values"):
        add_class(digits, STRIPED, tmp_path / "new")
    assert not (tmp_path / "new").exists()


# Classes -----------------------------------------------------------------------------------------


def build_new(pixels: np.ndarray, name: str) -> list[tuple[Image.Image, str]]:
    return [(Image.fromarray(each), name) for each in pixels]


@pytest.fixture(scope="module")
def with_stripes(digits: Path, module_path: Path) -> Path:
    """Write the classifier of digits with a class that looks like no digit."""
    folder = module_path / "stripes"
    add_class(digits, STRIPED, folder)
    return folder


def test_the_statistics_of_old_classes_are_certified(
    digits: Path, with_stripes: Path, tmp_path: Path
) -> None:
    assert verify_unchanged(digits, with_stripes)["difference"] is None
    changed = copy_and_change(with_stripes, tmp_path / "changed", "class_distance.means_0")
    assert "class_distance.means_0" in str(verify_unchanged(digits, changed)["difference"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"layer_norm_eps": 0.1}, "logits"),
        ({"distance_threshold": 9.0}, "distance_threshold"),
    ],
)
def test_outputs_and_the_threshold_are_certified_even_if_all_tensors_are_equal(
    change: dict[str, float], word: str, digits: Path, with_stripes: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(with_stripes, tmp_path / "changed")
    edit_config(changed, **change)
    assert word in verify_unchanged(digits, changed)["difference"]


def test_a_class_is_added_to_statistics_in_bfloat16(digits: Path, tmp_path: Path) -> None:
    model = ViTCLSForImageClassification.from_pretrained(digits, dtype=torch.bfloat16)
    save_both(model, tmp_path / "half", ViTCLSImageProcessor.from_pretrained(digits))
    record = add_class(tmp_path / "half", STRIPED, tmp_path / "new")
    assert record["result"]["recall"] > 0.9


def test_photos_of_an_added_class_are_known_also_if_they_differ_more_than_the_old_ones(
    digits: Path, tmp_path: Path
) -> None:
    """Noise is far from every digit and from other noise; one threshold serves both."""
    noise = draw_pixels(60, 8, 8)
    images = torch.tensor(noise[20:, None] / 127.5 - 1, dtype=torch.float32)
    model = ViTCLSForImageClassification.from_pretrained(digits).eval()
    with torch.no_grad():
        old = model(PIXELS).distance
        is_unknown = model(images).distance > old.quantile(0.95)
    assert is_unknown.float().mean() > 0.5
    model.config.distance_threshold = threshold = float(old.quantile(0.95))
    save_both(model, tmp_path / "old", ViTCLSImageProcessor.from_pretrained(digits))

    record = add_class(tmp_path / "old", build_new(noise[:20], "noise"), tmp_path / "noise")
    assert record["num_unknown"] < 8
    outputs = compute(tmp_path / "noise", images)
    assert (outputs.distance > threshold).float().mean() < 0.3
    distances = compute(tmp_path / "noise", PIXELS).distance
    # Where the new class is not the nearest one, not a bit changes.
    assert ((distances == old) | (distances < old - 1e-4)).all()
    assert (distances == old).float().mean() > 0.8

    # A second class keeps the scale of the first.
    add_class(tmp_path / "noise", STRIPED, tmp_path / "both")
    assert verify_unchanged(tmp_path / "noise", tmp_path / "both")["difference"] is None
    assert (compute(tmp_path / "both", images).distance <= outputs.distance).all()


@pytest.mark.parametrize("epochs", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_the_recall_of_a_class_that_the_encoder_has_never_seen_is_near_the_stated_one(
    epochs: int, tmp_path: Path
) -> None:
    """An encoder that was trained from random weights hardly separates a tenth digit."""
    # In any order but that of the file, which begins with other writers.
    nines = default_rng(1).permutation(np.flatnonzero(LABELS == 9))
    pixels = (DIGITS.images[nines] * 255 / 16).astype(np.uint8)
    old = save_digits(tmp_path / "old", epochs, num_labels=9)
    stated = add_class(old, build_new(pixels[:30], "nine"), tmp_path / "new")["result"]
    predicted = compute(tmp_path / "new", PIXELS[nines[30:]]).logits.argmax(dim=-1)
    recall = float((predicted == 9).float().mean())
    low, high = stated["recall_interval"]
    assert low <= recall <= high
    assert recall < 0.95


def test_without_class_statistics_the_remedy_is_named(tmp_path: Path) -> None:
    source = save_classifier(tmp_path / "source")
    with raises_one_line("requires class statistics", f"vitcls finetune --model {source}"):
        add_class(source, STRIPED, tmp_path / "new")


def test_copies_of_an_image_count_once(digits: Path, tmp_path: Path) -> None:
    record = add_class(digits, 5 * STRIPED[:6], tmp_path / "copies")
    expected = add_class(digits, STRIPED[:6], tmp_path / "single")
    assert record["result"]["recall_interval"] == expected["result"]["recall_interval"]


def test_photos_that_trained_the_model_are_counted(
    digits: Path, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    """As photos that were moved to a new class, or have further labels."""
    folder = tmp_path / "model"
    shutil.copytree(digits, folder)
    dataset = build_dataset(TASKS["parity"])
    data = read_training_data(add_dataset(dataset), held_out_fraction=0.0)
    write_splits(build_splits_table({"train": data.train}), folder)
    results = {"steps": 3, "label_column": ["label"], "weights_sha256": hash_weights(folder)}
    write_json(folder / "results.json", results)

    moved = [(image, "new") for image, _ in dataset[:5]]
    add_class(folder, moved, tmp_path / "class")
    assert "5 of the 5 images of the new classes trained" in caplog.text
    record = add_task(folder, dataset, "parity", tmp_path / "task")
    assert "accuracy_interval" not in record["result"]
    assert "trained on 120 of the images that measure the task" in caplog.text
    write_json(folder / "results.json", results | {"steps_train_encoder": False})
    record = add_task(folder, dataset, "parity", tmp_path / "head")
    assert "accuracy_interval" in record["result"]


def test_a_new_class_that_is_spelled_like_an_old_one_is_named(
    with_stripes: Path, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    composed, decomposed = get_unicode_forms("café")
    new = [*build_new(STRIPES[::2], "Stripes "), *build_new(STRIPES[1::2], decomposed)]
    add_class(with_stripes, new, tmp_path / "new")
    assert "'stripes' and 'Stripes '" in caplog.text
    with raises_one_line(f"has the class {composed!r} already"):
        add_class(tmp_path / "new", build_new(STRIPES, composed), tmp_path / "both")


def test_classes_that_a_filtered_dataset_only_declares_are_not_added(
    digits: Path, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    names = ["0", "unused", "stripes"]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
    images = [image for image, _ in build_new(STRIPES, "stripes")]
    dataset = datasets.Dataset.from_dict({"image": images, "label": [2] * len(images)}, features)
    record = add_class(digits, dataset, tmp_path / "new")
    assert record["labels"] == ["stripes"]
    assert "not added, because no image has them: unused" in caplog.text


def test_several_processes_are_refused(
    digits: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with raises_one_line("by one process", "`accelerate launch`"):
        add_class(digits, STRIPED, tmp_path / "new")


def test_the_logits_of_a_new_class_have_the_scale_of_the_others(
    digits: Path, with_stripes: Path, tmp_path: Path
) -> None:
    model = ViTCLSForImageClassification.from_pretrained(digits)
    with torch.no_grad():
        model.classifier.weight.mul_(0.2)
        model.classifier.bias.mul_(0.2).add_(5)
    save_both(model, tmp_path / "scaled", ViTCLSImageProcessor.from_pretrained(digits))
    add_class(tmp_path / "scaled", STRIPED, tmp_path / "new")
    expected = 0.2 * compute(with_stripes, NOISE).logits + 5
    assert_close(compute(tmp_path / "new", NOISE).logits, expected)
    assert expected[:, 10].std() > 0
