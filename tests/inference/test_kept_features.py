"""A photo passes a frozen encoder once: what the commands keep for one another, and what it depends on."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.accelerate_state import reset_accelerate
from helpers.additions import add_class, add_task
from helpers.command_in_process import finetune
from helpers.photo_folders import draw_pixels, write_bursts, write_shots
from helpers.prediction_photos import write_predictions
from helpers.source_checkpoints import save_converted_encoder
from helpers.tiny_models import save_classifier
from PIL import Image

from modeling_vitcls import ViTCLSImageProcessor, evaluate
from modeling_vitcls.frozen.scenes import NUM_MIRRORED
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference import features, inputs, predictor
from modeling_vitcls.inference.features import FrozenEncoder
from modeling_vitcls.inference.inputs import compute_checksum
from modeling_vitcls.inference.load_model import load_model


Command = Callable[..., Any]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITCLS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the number of images of each batch that passes an encoder to be kept."""
    counts: list[int] = []
    encode = FrozenEncoder.encode

    def count(self: FrozenEncoder, pixel_values: torch.Tensor) -> Any:
        counts.append(len(pixel_values))
        return encode(self, pixel_values)

    monkeypatch.setattr(FrozenEncoder, "encode", count)
    return counts


@pytest.fixture(scope="module")
def model(module_path: Path) -> Path:
    return save_classifier(module_path / "model")


@pytest.mark.usefixtures("cache")
def test_all_commands_share_what_has_passed_an_encoder(
    tmp_path: Path, module_path: Path, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = save_converted_encoder(module_path, num_layers=6)
    write_bursts(tmp_path / "photos")
    for shot in range(16, 20):
        write_shots(tmp_path / "new/keys", shot)
    monkeypatch.setattr("modeling_vitcls.additions.certificate.MAX_IMAGES", {1: 1})
    monkeypatch.setattr("modeling_vitcls.publishing.report.write_report", lambda folder: None)

    first = finetune(encoder, tmp_path / "photos", tmp_path / "run")
    assert sum(passed) == 80 + NUM_MIRRORED  # Mirror images are not kept
    passed.clear()
    again = finetune(encoder, tmp_path / "photos", tmp_path / "again")
    assert sum(passed) == NUM_MIRRORED
    assert again["accuracy"] == first["accuracy"]
    assert again["frozen"]["findings"] == first["frozen"]["findings"]

    passed.clear()
    write_predictions(tmp_path / "run", tmp_path / "photos", tmp_path / "table.csv")
    reset_accelerate()
    evaluate(
        model=str(tmp_path / "run"), dataset=str(tmp_path / "photos"), split="train", num_workers=0
    )
    reset_accelerate()
    add_task(tmp_path / "run", tmp_path / "photos", "kind", tmp_path / "task")
    assert not passed
    reset_accelerate()
    add_class(tmp_path / "task", tmp_path / "new", tmp_path / "class")
    assert sum(passed) == 20
    passed.clear()
    write_predictions(tmp_path / "class", tmp_path / "new", tmp_path / "new.csv")
    assert not passed


@pytest.fixture
def label(model: Path, tmp_path: Path, cache: None) -> Command:
    """Write the table of a folder, and return it."""

    def label(folder: Path, **flags: Any) -> pd.DataFrame:
        write_predictions(model, folder, tmp_path / "table.parquet", **flags)
        return pd.read_parquet(tmp_path / "table.parquet")

    return label


@pytest.mark.parametrize("flags", [{}, {"features": ("cls", "mean@1")}])
def test_kept_rows_equal_computed_ones(
    flags: Any, label: Command, photos: Path, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of them were kept by an earlier command, in other batches."""
    label(photos / "inner", batch_size=4, **flags)
    passed.clear()
    kept = label(photos, **flags)
    pd.testing.assert_frame_equal(label(photos, **flags), kept)
    assert sum(passed) == 3
    monkeypatch.setenv("VITCLS_CACHE", "none")
    pd.testing.assert_frame_equal(label(photos, **flags), kept, rtol=1e-5)


def test_a_photo_is_known_by_its_content(label: Command, tmp_path: Path, passed: list[int]) -> None:
    """Photos of one size and time exchange their names, one gets another content and one a new name."""
    folder = tmp_path / "photos"
    folder.mkdir()

    def draw(number: int, seed: int) -> None:
        Image.fromarray(draw_pixels(20, 20, 3, seed=seed)).save(folder / f"{number}.bmp")
        os.utime(folder / f"{number}.bmp", (10**9, 10**9))

    for number in range(4):
        draw(number, number)
    before = label(folder).set_index("checksum")
    passed.clear()
    draw(0, 1)
    draw(1, 0)
    (folder / "2.bmp").rename(folder / "other.bmp")
    draw(3, 9)
    after = label(folder)
    assert passed == [1]
    assert after["checksum"].tolist() == [compute_checksum(image) for image in after["image"]]
    known = after[after["checksum"].isin(before.index)].set_index("checksum")
    assert len(known) == 3
    assert (known["probability"] == before.loc[known.index, "probability"]).all()


def test_a_file_that_changes_while_it_is_read_is_kept_as_what_was_read(
    label: Command, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(photos / "inner", tmp_path / "photos"))

    def change(*arguments: Any) -> Any:
        photo = inputs.read_photo(*arguments)
        shutil.copy(photos / "a.jpg", folder / "d.jpg")
        return photo

    with monkeypatch.context() as patch:
        patch.setattr(predictor, "read_photo", change)
        label(folder)
    shutil.copy(photos / "inner/d.jpg", folder / "d.jpg")
    after = label(folder)
    monkeypatch.setenv("VITCLS_CACHE", "none")
    pd.testing.assert_frame_equal(label(folder), after, rtol=1e-5)


def test_an_interrupted_command_goes_on_where_it_stopped(
    label: Command,
    photos: Path,
    tmp_path: Path,
    passed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[Any] = []

    def interrupt(*arguments: Any) -> Any:
        read.append(arguments)
        if len(read) == 6:
            raise KeyboardInterrupt
        return inputs.read_photo(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(predictor, "read_photo", interrupt)
        with pytest.raises(KeyboardInterrupt):
            label(photos)
    assert not (tmp_path / "table.parquet").exists()
    assert sum(passed) == 4
    label(photos)
    assert sum(passed) == 9


@pytest.mark.usefixtures("cache")
@torch.no_grad()
def test_all_that_changes_the_features_of_a_photo_is_in_the_key(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = load_model(ModelFolder(model))
    processor = ViTCLSImageProcessor.from_pretrained(model)
    keys: list[bytes] = []

    def add_key(precision: str = "no") -> None:
        keys.append(FrozenEncoder(classifier).compute_pass_key(processor, precision))

    add_key()
    classifier.classifier.weight.add_(1)
    classifier.config.id2label = {0: "a", 1: "b", 2: "c"}
    classifier.config.pooling = "mean"
    classifier.config.distance_threshold = 2.0
    add_key()
    assert keys[0] == keys.pop()  # Another classifier on the same encoder

    classifier.vitcls.layers[0].mlp.fc1.weight[0, 0] += 1e-3
    add_key()
    classifier.config.layer_norm_eps = 1e-3
    add_key()
    classifier.vitcls.layers = classifier.vitcls.layers[:1]
    add_key()
    classifier.half()
    add_key()
    classifier.set_attn_implementation("eager")
    add_key()
    processor.size = {"height": 40, "width": 40}
    add_key()
    processor.image_mean = (0.4, 0.5, 0.5)
    add_key()
    processor.bit_depth = 12
    add_key()
    add_key("bf16")
    monkeypatch.setattr(features, "PASS_VERSION", 0)
    add_key()
    monkeypatch.setattr(features, "can_use_cpu_kernels", lambda: "other")
    add_key()
    assert len({*keys}) == len(keys)
    # A function instead of a processor has no settings
    assert FrozenEncoder(classifier).open_kept(object(), "no") is None
