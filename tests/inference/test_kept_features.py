"""A photo passes a frozen encoder once: what the commands keep for one another, and what it depends on."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
import torch
from helpers.accelerate_state import reset_accelerate
from helpers.additions import add_class, add_task
from helpers.command_in_process import finetune
from helpers.photo_folders import write_bursts, write_shots
from helpers.prediction_photos import write_predictions
from helpers.tiny_models import save_classifier
from pytest import MonkeyPatch

from modeling_vitcls import ViTCLSImageProcessor, evaluate
from modeling_vitcls.frozen.scenes import NUM_MIRRORED, MirroringProcessor
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference import feature_store, features, predictor
from modeling_vitcls.inference.features import FrozenEncoder
from modeling_vitcls.inference.load_model import load_model


Label = Callable[..., pd.DataFrame]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("VITCLS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def passed(monkeypatch: MonkeyPatch) -> list[int]:
    """Return the number of images of each batch that passes an encoder."""
    counts: list[int] = []
    encode = FrozenEncoder.encode

    def count(self: FrozenEncoder, values: torch.Tensor) -> Any:
        counts.append(len(values) * (values.ndim > 2))
        return encode(self, values)

    monkeypatch.setattr(FrozenEncoder, "encode", count)
    return counts


@pytest.fixture(scope="module")
def model(module_path: Path) -> Path:
    return save_classifier(module_path / "model")


def test_all_commands_share_what_has_passed_an_encoder(
    tmp_path: Path, converted_encoder: Path, passed: list[int], monkeypatch: MonkeyPatch
) -> None:
    photos, run = tmp_path / "photos", tmp_path / "run"
    write_bursts(photos)
    for shot in range(16, 20):
        write_shots(tmp_path / "new/keys", shot)
    monkeypatch.setattr("modeling_vitcls.additions.certificate.MAX_IMAGES", {1: 1})
    monkeypatch.setattr("modeling_vitcls.publishing.report.write_report", lambda folder: None)

    first = finetune(converted_encoder, photos, run)
    assert sum(passed) == 80 + NUM_MIRRORED
    passed.clear()
    again = finetune(converted_encoder, photos, tmp_path / "again")
    assert not sum(passed)
    assert again["frozen"]["findings"] == first["frozen"]["findings"]
    passed.clear()
    with monkeypatch.context() as patch:
        patch.setenv("VITCLS_CACHE", "none")
        finetune(converted_encoder, photos, tmp_path / "without")
    assert sum(passed) == 80 + NUM_MIRRORED

    passed.clear()
    write_predictions(run, photos, tmp_path / "table.csv")
    reset_accelerate()
    evaluate(model=str(run), dataset=str(photos), split="train", num_workers=0)
    reset_accelerate()
    add_task(run, photos, "kind", tmp_path / "task")
    assert not sum(passed)
    reset_accelerate()
    add_class(tmp_path / "task", tmp_path / "new", tmp_path / "class")
    assert sum(passed) == 20


@pytest.fixture
def label(model: Path, tmp_path: Path) -> Label:
    """Write the table of a folder, and return it."""

    def label(folder: Path, **flags: Any) -> pd.DataFrame:
        write_predictions(model, folder, tmp_path / "table.parquet", **flags)
        return pd.read_parquet(tmp_path / "table.parquet")

    return label


@pytest.mark.parametrize(
    "flags", [{}, {"features": ("cls", "mean@1")}, {"mixed_precision": "bf16"}]
)
def test_kept_rows_equal_computed_ones(
    flags: Any,
    label: Label,
    photos: Path,
    passed: list[int],
    monkeypatch: MonkeyPatch,
) -> None:
    """Half of them were kept by an earlier command, in other batches."""
    label(photos / "inner", batch_size=4, **flags)
    passed.clear()
    kept = label(photos, **flags)
    pd.testing.assert_frame_equal(label(photos, **flags), kept)
    assert sum(passed) == 3
    monkeypatch.setenv("VITCLS_CACHE", "none")
    tolerance = 1e-2 if "mixed_precision" in flags else 1e-5
    pd.testing.assert_frame_equal(label(photos, **flags), kept, rtol=tolerance)


def test_features_that_are_not_kept_are_computed(
    label: Label, photos: Path, monkeypatch: MonkeyPatch
) -> None:
    label(photos)
    rows = label(photos, features=("patches",))
    monkeypatch.setenv("VITCLS_CACHE", "none")
    pd.testing.assert_frame_equal(label(photos, features=("patches",)), rows)


def test_a_photo_is_known_by_its_content(
    label: Label, photos: Path, tmp_path: Path, passed: list[int]
) -> None:
    """The photos exchange their names, and all have one time."""
    folder = Path(shutil.copytree(photos / "inner", tmp_path / "photos"))
    before = label(folder)
    passed.clear()
    names = before["image"].tolist()
    for name, content in zip(names, [Path(name).read_bytes() for name in names][::-1], strict=True):
        Path(name).write_bytes(content)
        os.utime(name, (10**9, 10**9))
    after = label(folder)
    assert not sum(passed)
    columns = ["checksum", "label", "probability"]
    assert after[columns].values.tolist() == before[columns].values.tolist()[::-1]


def test_an_interrupted_command_goes_on_where_it_stopped(
    label: Label,
    photos: Path,
    passed: list[int],
    monkeypatch: MonkeyPatch,
) -> None:
    numbers = iter(range(9))
    prepare = predictor.prepare_image

    def interrupt(*arguments: Any) -> Any:
        if next(numbers) == 5:
            raise KeyboardInterrupt
        return prepare(*arguments)

    monkeypatch.setattr(feature_store, "SECONDS_BETWEEN_WRITES", 0)
    with monkeypatch.context() as patch:
        patch.setattr(predictor, "prepare_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            label(photos)
    assert sum(passed) == 4
    label(photos)
    assert sum(passed) == 9


def test_nothing_is_kept_of_adapters_and_hooks(model: Path) -> None:
    processor = ViTCLSImageProcessor.from_pretrained(model)
    adapted, hooked = (load_model(ModelFolder(model)) for _ in range(2))
    peft.get_peft_model(adapted, peft.LoraConfig(target_modules=["q_proj"]))
    hooked.vitcls.layers[0].register_forward_hook(print)
    for each in (adapted, hooked):
        assert FrozenEncoder(each).open_store(processor, "no") is None


@torch.no_grad()
def test_all_that_changes_the_features_of_a_photo_is_in_the_key(
    model: Path, monkeypatch: MonkeyPatch
) -> None:
    classifier = load_model(ModelFolder(model))
    processor = ViTCLSImageProcessor.from_pretrained(model)
    keys: list[bytes] = []

    used: Any = processor

    def add_key(precision: str = "no") -> None:
        store = FrozenEncoder(classifier).open_store(used, precision)
        assert store is not None
        keys.append(store.key)

    add_key()
    classifier.classifier.weight.add_(1)
    classifier.config.id2label = {0: "a", 1: "b", 2: "c"}
    classifier.config.pooling = "mean"
    add_key()
    assert keys[0] == keys.pop()  # Another classifier on the same encoder

    weight = classifier.vitcls.layers[0].mlp.fc1.weight
    weight.view(torch.int32)[0, 0] += 1  # The last bit of one number
    add_key()
    weight.copy_(weight.flip(0))
    add_key()
    classifier.vitcls.layers = classifier.vitcls.layers[::-1]
    add_key()
    classifier.config.layer_norm_eps = 1e-3
    add_key()
    classifier.vitcls.layers = classifier.vitcls.layers[:1]
    add_key()
    classifier.half()
    add_key()
    classifier.set_attn_implementation("eager")
    add_key()
    processor.image_mean = (0.4, 0.5, 0.5)
    add_key()
    used = MirroringProcessor(processor)
    add_key()
    add_key("bf16")
    monkeypatch.setattr(features, "PASS_VERSION", 0)
    add_key()
    monkeypatch.setattr(features, "can_use_cpu_kernels", lambda: "other")
    add_key()
    assert len({*keys}) == len(keys)
