"""`from_pretrained` of each class takes any ViT that can be converted, and never gives random weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import timm
import torch
import transformers
from helpers.source_checkpoints import SIZES, save_large_encoder, save_vit_classifier
from helpers.tiny_models import raises_one_line
from huggingface_hub import constants
from pytest import LogCaptureFixture, MonkeyPatch
from timm.models import save_for_hf
from torch import Tensor
from torch.testing import assert_close

import modeling_vitcls as vitcls
from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSImageProcessorPil,
    ViTCLSModel,
)
from modeling_vitcls.runtime.files import read_json
from scripts.tools.random_weights import randomize_weights


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: MonkeyPatch) -> Iterator[Path]:
    """Use an empty cache without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache/hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache/vitcls/converted"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder of a small ViT of transformers, with three labels and an image processor."""
    return save_vit_classifier(tmp_path / "source")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def load_reference(source: Path) -> Any:
    model = transformers.ViTForImageClassification.from_pretrained(source)
    return model.eval()


# Classes ------------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_classifier_of_transformers_has_its_logits(source: Path, images: Tensor) -> None:
    model = ViTCLSForImageClassification.from_pretrained(source).eval()
    assert_close(model(images).logits, load_reference(source)(images).logits, rtol=0, atol=1e-5)
    assert model.config.id2label == {0: "ant", 1: "bee", 2: "cow"}


@pytest.mark.parametrize(
    ("model_class", "fields"),
    [
        (ViTCLSModel, {}),
        (ViTCLSForImageClassification, {}),
        (ViTCLSForMaskedImageModeling, {}),
        (ViTCLSForMultiTaskClassification, {"tasks": {"age": 2}}),
        (ViTCLSBackbone, {}),
    ],
    ids=lambda each: getattr(each, "__name__", ""),
)
@torch.no_grad()
def test_each_class_has_the_tokens_of_another_vit(
    source: Path, images: Tensor, model_class: Any, fields: dict[str, Any]
) -> None:
    model = model_class.from_pretrained(source, **fields).eval()
    reference = load_reference(source).vit(images).last_hidden_state
    tokens = ViTCLSModel.forward(model.base_model, images).last_hidden_state
    assert_close(tokens, reference, rtol=0, atol=1e-5)


@torch.no_grad()
def test_tokens_are_added_in_the_same_call(source: Path, images: Tensor) -> None:
    model = ViTCLSForImageClassification.from_pretrained(source, num_register_tokens=4).eval()
    assert model.config.token_counts == (1, 0, 4)
    assert_close(model(images).logits, load_reference(source)(images).logits, rtol=0, atol=1e-5)


def test_other_labels_get_a_new_classifier(tmp_path: Path) -> None:
    folder = save_large_encoder(tmp_path / "encoder")
    model = ViTCLSForImageClassification.from_pretrained(folder, num_labels=10)
    assert model.classifier.out_features == 10


def test_the_configuration_is_of_the_conversion(source: Path) -> None:
    config = ViTCLSConfig.from_pretrained(source, num_register_tokens=2)
    assert config.hidden_size == SIZES["hidden_size"]
    assert config.layer_norm_eps == transformers.ViTConfig().layer_norm_eps
    assert config.num_register_tokens == 2


@pytest.mark.parametrize("processor_class", [ViTCLSImageProcessor, ViTCLSImageProcessorPil])
def test_the_processor_has_the_pixels_of_the_other_one(source: Path, processor_class: Any) -> None:
    settings = {
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
        "image_mean": [0.1, 0.2, 0.3],
    }
    names = {ViTCLSImageProcessor: "torchvision", ViTCLSImageProcessorPil: "pil"}
    transformers.CLIPImageProcessor(**settings).save_pretrained(source)
    other = transformers.AutoImageProcessor.from_pretrained(source, backend=names[processor_class])
    processor = processor_class.from_pretrained(source)
    image = np.random.default_rng(0).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    found, wanted = (each(image, return_tensors="pt") for each in (processor, other))
    assert torch.equal(found["pixel_values"], wanted["pixel_values"])


def test_auto_classes_of_another_vit_stay_those_of_transformers(source: Path) -> None:
    assert vitcls.__version__  # imported
    model = transformers.AutoModelForImageClassification.from_pretrained(source)
    assert type(model) is transformers.ViTForImageClassification


# Sources ------------------------------------------------------------------------------------------
@torch.no_grad()
def test_a_folder_that_timm_saved_is_converted(tmp_path: Path, images: Tensor) -> None:
    model = randomize_weights(timm.create_model("test_vit", img_size=32)).eval()
    save_for_hf(model, tmp_path / "timm", safe_serialization=True)
    converted = ViTCLSForImageClassification.from_pretrained(tmp_path / "timm").eval()
    assert_close(converted(images).logits, model(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_timm_with_a_file_of_weights_is_converted(tmp_path: Path, images: Tensor) -> None:
    model = randomize_weights(timm.create_model("vit_tiny_patch16_224", num_classes=2)).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    name = f"timm:vit_tiny_patch16_224@{tmp_path / 'weights.pth'}"
    converted = ViTCLSForImageClassification.from_pretrained(name).eval()
    image = torch.randn(1, 3, 224, 224)
    assert_close(converted(image).logits, model(image), rtol=1e-5, atol=1e-5)


def test_a_revision_of_a_hub_id_is_converted(own_cache: Path) -> None:
    repository = Path(constants.HF_HUB_CACHE, "models--ann--vit")
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/v1").write_text(COMMIT)
    save_vit_classifier(repository / "snapshots" / COMMIT)
    model = ViTCLSModel.from_pretrained("ann/vit", revision="v1")
    assert model.config.hidden_size == SIZES["hidden_size"]
    assert model.name_or_path == "ann/vit"
    (report,) = own_cache.glob("*/parity_report.json")
    assert read_json(report)["source"] == f"transformers:ann/vit@{COMMIT}"
    with pytest.raises(OSError):
        ViTCLSModel.from_pretrained("ann/vit", revision="v2")


def test_a_model_is_converted_once(source: Path, caplog: LogCaptureFixture) -> None:
    for _ in range(2):
        ViTCLSModel.from_pretrained(source)
    ViTCLSImageProcessor.from_pretrained(source)
    assert caplog.text.count("converting") == 1


# Refusals -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("loaded", [ViTCLSModel, ViTCLSConfig, ViTCLSImageProcessor])
def test_a_model_that_cannot_be_converted_is_named_with_those_that_can(
    tmp_path: Path, loaded: Any
) -> None:
    config = transformers.ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8)
    transformers.ResNetModel(config).save_pretrained(tmp_path / "resnet")
    with raises_one_line("ResNetModel (model type resnet)", "Dinov2WithRegisters, DINOv3ViT"):
        loaded.from_pretrained(tmp_path / "resnet")


def test_a_model_type_that_transformers_does_not_know_is_named(source: Path) -> None:
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace('"model_type": "vit"', '"model_type": "vitx"'))
    with raises_one_line("vitx", error=OSError):
        ViTCLSModel.from_pretrained(source)


def test_a_preset_is_no_checkpoint() -> None:
    with raises_one_line("ViTCLSConfig.from_preset('tiny')"):
        ViTCLSModel.from_pretrained("vitcls-tiny")


def test_an_argument_without_an_effect_on_a_conversion_is_refused(source: Path) -> None:
    with raises_one_line("`cache_dir` has no effect", "set HF_HUB_CACHE"):
        ViTCLSModel.from_pretrained(source, cache_dir="elsewhere")
    assert ViTCLSModel.from_pretrained(source, token=True).config.hidden_size == 32


@torch.no_grad()
def test_an_adapter_of_another_vit_loads_onto_its_conversion(
    source: Path, images: Tensor, tmp_path: Path
) -> None:
    model = ViTCLSForImageClassification.from_pretrained(source)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    with raises_one_line(f"is an adapter of {source}", "PeftModel.from_pretrained("):
        ViTCLSForImageClassification.from_pretrained(tmp_path / "adapter")

    again = peft.PeftModel.from_pretrained(
        ViTCLSForImageClassification.from_pretrained(source), tmp_path / "adapter"
    )
    assert_close(again.eval()(images).logits, adapted.eval()(images).logits)
