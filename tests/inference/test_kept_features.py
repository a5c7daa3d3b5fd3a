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
from modeling_vitcls.inference import features, inputs
from modeling_vitcls.inference.features import FrozenEncoder
from modeling_vitcls.inference.inputs import compute_checksum
from modeling_vitcls.inference.load_model import load_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITCLS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


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


@pytest.mark.parametrize("names", [None, ("cls", "mean@1")])
def test_kept_rows_equal_computed_ones(
    names: Any, cache: Path, model: Path, photos: Path, tmp_path: Path, passed: list[int]
) -> None:
    """Half of them were kept by an earlier command, in other batches."""
    flags = {"features": names} if names else {}
    tables = [tmp_path / f"{name}.parquet" for name in ("half", "kept", "again", "computed")]
    write_predictions(model, photos / "inner", tables[0], batch_size=4, **flags)
    passed.clear()
    write_predictions(model, photos, tables[1], **flags)
    assert sum(passed) == 3
    write_predictions(model, photos, tables[2], **flags)
    assert sum(passed) == 3
    os.environ["VITCLS_CACHE"] = "none"
    write_predictions(model, photos, tables[3], **flags)
    kept, again, computed = (pd.read_parquet(table) for table in tables[1:])
    pd.testing.assert_frame_equal(again, kept)
    pd.testing.assert_frame_equal(computed, kept, rtol=1e-5)


@pytest.mark.usefixtures("cache")
def test_a_photo_is_known_by_its_content(model: Path, tmp_path: Path, passed: list[int]) -> None:
    """Photos of one size and time exchange their names, one gets another content and one a new name."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(draw_pixels(20, 20, 3, seed=number)).save(folder / f"{number}.bmp")
        os.utime(folder / f"{number}.bmp", (10**9, 10**9))
    write_predictions(model, folder, tmp_path / "table.csv")
    before = pd.read_csv(tmp_path / "table.csv").set_index("checksum")
    passed.clear()

    (folder / "0.bmp").rename(folder / "x.bmp")
    (folder / "1.bmp").rename(folder / "0.bmp")
    (folder / "x.bmp").rename(folder / "1.bmp")
    (folder / "2.bmp").rename(folder / "other.bmp")
    Image.fromarray(draw_pixels(20, 20, 3, seed=9)).save(folder / "3.bmp")
    os.utime(folder / "3.bmp", (10**9, 10**9))
    write_predictions(model, folder, tmp_path / "table.csv")
    after = pd.read_csv(tmp_path / "table.csv")
    assert passed == [1]
    assert after["checksum"].tolist() == [compute_checksum(image) for image in after["image"]]
    known = after[after["checksum"].isin(before.index)].set_index("checksum")
    assert len(known) == 3
    assert (known["probability"] == before.loc[known.index, "probability"]).all()


@pytest.mark.usefixtures("cache")
def test_a_file_that_changes_while_it_is_read_is_kept_as_what_was_read(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(photos / "inner", tmp_path / "photos"))
    other = (photos / "a.jpg").read_bytes()
    read_photo = inputs.read_photo

    def change(*arguments: Any) -> Any:
        photo = read_photo(*arguments)
        (folder / "d.jpg").write_bytes(other)
        return photo

    original = (folder / "d.jpg").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("modeling_vitcls.inference.predictor.read_photo", change)
        write_predictions(model, folder, tmp_path / "table.csv")
    (folder / "d.jpg").write_bytes(original)
    write_predictions(model, folder, tmp_path / "after.csv")
    os.environ["VITCLS_CACHE"] = "none"
    write_predictions(model, folder, tmp_path / "computed.csv")
    after, computed = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("after", "computed"))
    pd.testing.assert_frame_equal(after, computed, rtol=1e-5)


@pytest.mark.usefixtures("cache")
def test_an_interrupted_command_goes_on_where_it_stopped(
    model: Path, photos: Path, tmp_path: Path, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_photo = inputs.read_photo
    read: list[Any] = []

    def interrupt(*arguments: Any) -> Any:
        read.append(arguments)
        if len(read) == 6:
            raise KeyboardInterrupt
        return read_photo(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("modeling_vitcls.inference.predictor.read_photo", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_predictions(model, photos, tmp_path / "table.csv")
    assert not (tmp_path / "table.csv").exists()
    number = sum(passed)
    assert number == 4
    write_predictions(model, photos, tmp_path / "table.csv")
    assert sum(passed) == 9


# The key of a pass --------------------------------------------------------------------------------


def compute_key(folder: Path, change: Callable[[Any, Any], Any] = lambda *parts: None) -> bytes:
    """Compute the key of a model and its processor after a change, which may return a precision."""
    model = load_model(ModelFolder(folder))
    processor = ViTCLSImageProcessor.from_pretrained(folder)
    precision = change(model, processor) or "no"
    kept = FrozenEncoder(model).open_kept(processor, precision)
    assert kept is not None
    return kept.key


@torch.no_grad()
def change_weight(model: Any, processor: Any) -> None:
    model.vitcls.layers[0].mlp.fc1.weight[0, 0] += 1e-3


def change_config(model: Any, processor: Any) -> None:
    model.config.layer_norm_eps = 1e-3


def change_size(model: Any, processor: Any) -> None:
    processor.size = {"height": 40, "width": 40}


def change_mean(model: Any, processor: Any) -> None:
    processor.image_mean = (0.4, 0.5, 0.5)


def change_depth(model: Any, processor: Any) -> None:
    processor.bit_depth = 12


def change_layers(model: Any, processor: Any) -> None:
    model.vitcls.layers = model.vitcls.layers[:1]


def change_precision(model: Any, processor: Any) -> str:
    return "bf16"


def change_type(model: Any, processor: Any) -> None:
    model.half()


def change_attention(model: Any, processor: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize(
    "change",
    [
        change_weight,
        change_config,
        change_size,
        change_mean,
        change_depth,
        change_layers,
        change_precision,
        change_type,
        change_attention,
    ],
)
def test_a_pass_with_other_features_has_another_key(
    change: Callable[[Any, Any], Any], model: Path
) -> None:
    assert compute_key(model, change) != compute_key(model)


@pytest.mark.usefixtures("cache")
def test_another_version_of_the_pass_and_plain_kernels_have_other_keys(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {compute_key(model)}
    monkeypatch.setattr(features, "PASS_VERSION", 0)
    keys.add(compute_key(model))
    monkeypatch.setattr(features, "can_use_cpu_kernels", lambda: "other")
    keys.add(compute_key(model))
    assert len(keys) == 3


@torch.no_grad()
def change_head(model: Any, processor: Any) -> None:
    model.classifier.weight.add_(1)
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    model.config.pooling = "mean"
    model.config.distance_threshold = 2.0


@pytest.mark.usefixtures("cache")
def test_another_classifier_on_the_same_encoder_has_the_same_key(model: Path) -> None:
    assert compute_key(model, change_head) == compute_key(model)


def test_nothing_is_kept_without_a_place(model: Path, tmp_path: Path) -> None:
    assert FrozenEncoder(load_model(ModelFolder(model))).open_kept(object(), "no") is None
