"""Runs that keep the encoder, and what they say.

The encoder is converted and has a native side of 280 pixels; the photos are not square, and the
classes have different sizes.
"""

from pathlib import Path

import pytest
import torch
from helpers.accelerate_state import reset_accelerate
from helpers.photo_folders import write_unequal_photos
from helpers.source_checkpoints import save_large_encoder

from modeling_vitcls import ViTCLSModel
from modeling_vitcls.cli import main
from modeling_vitcls.runtime.files import read_json


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Return a folder with a Dinov2 encoder and photos of two classes."""
    save_large_encoder(tmp_path / "vit", num_layers=5)
    write_unequal_photos(tmp_path / "my photos")
    return tmp_path


@pytest.mark.parametrize("flags", [(), ("--trainable", "head")])
def test_a_run_without_steps_says_how_to_train_all_layers(
    flags: tuple[str, ...], sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless the person has asked for a frozen encoder."""
    arguments = ["--model", str(sources / "vit"), "--dataset", str(sources / "my photos")]
    arguments += ["--num-workers", "0", "--no-report", "--output-dir"]
    main(["finetune", *arguments, str(sources / "frozen"), *flags])
    assert read_json(sources / "frozen/results.json")["steps"] == 0
    advice = "set --epochs 5 and another --output-dir"
    assert (advice in capsys.readouterr().out) is not bool(flags)

    reset_accelerate()
    main(["finetune", *arguments, str(sources / "tuned"), "--epochs", "5"])
    results = read_json(sources / "tuned/results.json")
    assert results["steps"] > 0
    start = results["before_steps"]["accuracy"]
    printed = capsys.readouterr().out
    assert f". Before the steps: accuracy {start:.2%}" in printed
    assert ("which was better" in printed) is (start > results["accuracy"])

    original = ViTCLSModel.from_pretrained(sources / "frozen").state_dict()
    trained = ViTCLSModel.from_pretrained(sources / "tuned").state_dict()
    is_equal = [
        torch.equal(original[name], trained[name])
        for name in (f"layers.{index}.mlp.fc1.weight" for index in range(5))
    ]
    assert not any(is_equal)


def test_a_class_without_readable_images_is_named(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The saved model has the class, but can never predict it."""
    for index in range(3):
        file = sources / "my photos" / "zebra" / f"{index}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"no photo")
    arguments = ["--model", str(sources / "vit"), "--dataset", str(sources / "my photos")]
    arguments += ["--output-dir", str(sources / "frozen"), "--num-workers", "0", "--no-report"]
    main(["finetune", *arguments])
    captured = capsys.readouterr()
    (line,) = [each for each in captured.out.splitlines() if "never predicts" in each]
    assert "no image of zebra can be read" in line
    assert len(read_json(sources / "frozen/config.json")["id2label"]) == 3


@pytest.mark.filterwarnings("error::scipy.linalg.LinAlgWarning")
@pytest.mark.parametrize("num_photos", [1, 2, 3, 4])
def test_a_few_photos_of_each_class_are_enough_and_have_no_percentage(
    num_photos: int, sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two images have one difference, and four classes of them a covariance of rank 4."""
    photos = sources / "few photos"
    for index, photo in enumerate(sorted((sources / "my photos" / "ants").iterdir())):
        if index == 4 * num_photos:
            break
        (photos / f"kind {index % 4}").mkdir(parents=True, exist_ok=True)
        photo.rename(photos / f"kind {index % 4}" / photo.name)
    (photos / "kind 0" / "broken.png").write_bytes(b"")  # does not count

    arguments = ["--model", str(sources / "vit"), "--dataset", str(photos)]
    arguments += ["--output-dir", str(sources / "frozen"), "--num-workers", "0", "--no-report"]
    main(["finetune", *arguments])
    results = read_json(sources / "frozen/results.json")
    assert results["steps"] == 0
    assert results["num_training_images"] == 4 * min(num_photos, 3) + (num_photos == 4) * 3
    assert ("right (95%" in capsys.readouterr().out) == (num_photos > 1)


def test_images_that_trained_the_encoder_measure_nothing(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It knows their labels, also under new names and after another run. A frozen one does not."""

    def finetune(model: str, output: str, *flags: str) -> bool:
        """Return whether the result has an interval, and check that a warning says why not."""
        paths = ["--model", sources / model, "--dataset", sources / "my photos"]
        paths += ["--output-dir", sources / output, "--num-workers", "0", "--no-report"]
        reset_accelerate()
        main(["finetune", *map(str, paths), *flags])
        has_interval = "accuracy_interval" in read_json(sources / output / "results.json")
        card = (sources / output / "README.md").read_text(encoding="utf-8")
        assert ("trained the encoder" in capsys.readouterr().out) is not has_interval
        assert ("The encoder was trained on" in card) is not has_interval
        return has_interval

    assert finetune("vit", "frozen")
    assert finetune("vit", "steps", "--epochs", "1", "--batch-size", "8")
    (sources / "my photos" / "ants").rename(sources / "my photos" / "insects")
    assert finetune("frozen", "frozen-again")
    assert not finetune("steps", "second")
    assert not finetune("steps", "held-out", "--held-out-fraction", "0.4")
    assert not finetune("second", "third")


def test_a_second_run_with_several_labels_has_a_result_without_interval(
    sources: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = sorted((sources / "my photos").rglob("*.png"))
    rows = [f"{photo},{('small', 'small|dark')[index % 2]}" for index, photo in enumerate(photos)]
    (sources / "tags.csv").write_text("\n".join(["image,label", *rows]))
    for model, output, fraction in (("vit", "first", "0.2"), ("first", "second", "0.6")):
        reset_accelerate()
        arguments = ["--model", str(sources / model), "--dataset", str(sources / "tags.csv")]
        arguments += ["--output-dir", str(sources / output), "--held-out-fraction", fraction]
        arguments += ["--label-separator", "|"]
        main(["finetune", *arguments, "--epochs", "1", "--num-workers", "0", "--no-report"])
    assert read_json(sources / "second/results.json")["num_images_of_encoder"] > 0
    assert " (no interval) on " in capsys.readouterr().out
