"""Ten tasks of somebody who reads no page, each as he would write it for any model of transformers.

A task has at most twelve lines, and imports nothing internal. The fourth, a script for Accelerate that is
copied and changed, is in test_run_image_classification.py.
"""

from pathlib import Path

import onnxruntime
import pytest
import torch
import transformers
from accelerate.utils import send_to_device
from datasets import Dataset
from helpers.fresh_processes import run_python
from helpers.local_hub import LocalHub
from helpers.photo_folders import draw_noise
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model, Trainer, TrainingArguments, ViTImageProcessor

from modeling_vitcls import (
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    export,
)


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture
def images() -> Tensor:
    return torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def photo() -> Image.Image:
    return draw_noise((50, 70))[0]


@pytest.fixture
def dinov2(tmp_path: Path) -> str:
    """The folder of a small DINOv2 of transformers with its image processor."""
    torch.manual_seed(0)
    config = Dinov2Config(**TINY | {"mlp_ratio": 2, "patch_size": 8})
    Dinov2Model(config).save_pretrained(tmp_path / "dinov2")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dinov2")
    return str(tmp_path / "dinov2")


@torch.no_grad()
def test_1_two_cls_tokens_and_four_registers_are_all_in_use(images: Tensor) -> None:
    config = ViTCLSConfig(**TINY, num_cls_tokens=2, num_register_tokens=4, num_labels=3)
    model = ViTCLSForImageClassification(config).eval()
    logits = model(images).logits
    model.vitcls.embeddings.cls_token[:, 1].normal_()
    assert not torch.allclose(model(images).logits, logits, atol=1e-3)


@torch.no_grad()
def test_2_a_dinov2_is_loaded_with_registers_in_one_call(dinov2: str, photo: Image.Image) -> None:
    model = ViTCLSForImageClassification.from_pretrained(
        dinov2, num_register_tokens=4, num_labels=10
    )
    processor = ViTCLSImageProcessor.from_pretrained(dinov2)
    inputs = processor(photo, return_tensors="pt")
    outputs = model.vitcls.eval()(**inputs)
    other = transformers.AutoModel.from_pretrained(dinov2)(**inputs)
    torch.testing.assert_close(outputs.last_hidden_state[:, 0], other.last_hidden_state[:, 0])


def test_3_registers_are_in_use_after_trainer(dinov2: str, tmp_path: Path) -> None:
    model = ViTCLSForImageClassification.from_pretrained(
        dinov2, num_register_tokens=4, num_labels=2
    )
    rows = [{"pixel_values": torch.randn(3, 32, 32) + i % 2, "labels": i % 2} for i in range(64)]
    arguments = TrainingArguments(str(tmp_path), max_steps=100, report_to="none", use_cpu=True)
    Trainer(model, arguments, train_dataset=Dataset.from_list(rows).with_format("torch")).train()
    model.save_pretrained(tmp_path / "trained")
    images = torch.stack([row["pixel_values"] for row in rows])
    with_them, without = (load_logits(tmp_path / "trained", images, number) for number in (4, 0))
    assert (with_them - without).abs().mean() > 0.02 * with_them.std()


@torch.no_grad()
def load_logits(folder: Path, images: Tensor, num_registers: int) -> Tensor:
    model = ViTCLSForImageClassification.from_pretrained(folder, num_register_tokens=num_registers)
    return model.eval()(images).logits


@torch.no_grad()
def test_5_a_model_is_pushed_and_loaded_elsewhere(
    hub: LocalHub, dinov2: str, tmp_path: Path
) -> None:
    model = ViTCLSModel.from_pretrained(dinov2, num_register_tokens=4)
    model.push_to_hub("ann/registers")
    program = (
        "import sys; sys.modules['modeling_vitcls'] = None\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained('ann/registers', trust_remote_code=True)\n"
        "print(model.config.num_register_tokens)"
    )
    assert run_python("-P", "-c", program, cwd=tmp_path).stdout == "4\n"


@torch.no_grad()
def test_6_any_auto_class_loads_a_saved_model(images: Tensor, tmp_path: Path) -> None:
    config = ViTCLSConfig(**TINY, num_register_tokens=4, num_labels=3)
    model = ViTCLSForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    encoder = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(again(images).logits, model(images).logits)
    tokens = encoder(images).last_hidden_state
    torch.testing.assert_close(tokens, model.vitcls(images).last_hidden_state)


@torch.no_grad()
def test_7_a_classifier_returns_its_registers_also_after_accelerate(images: Tensor) -> None:
    config = ViTCLSConfig(**TINY, num_register_tokens=4, num_labels=3)
    model = ViTCLSForImageClassification(config).eval()
    outputs = send_to_device(model(images, output_tokens=True), "cpu")
    assert outputs.tokens["registers"].shape == (8, 4, 32)
    assert outputs.tokens["patches"].shape == (8, 16, 32)


def test_8_a_distillation_token_learns_from_a_teacher(images: Tensor) -> None:
    config = ViTCLSConfig(**TINY, num_distillation_tokens=1, num_labels=3)
    model = ViTCLSForImageClassification(config).train()
    teacher_logits = torch.randn(8, 3)
    outputs = model(images, labels=torch.arange(8) % 3, teacher_logits=teacher_logits)
    outputs.loss.backward()
    hard = torch.nn.functional.cross_entropy(outputs.distillation_logits, teacher_logits.argmax(1))
    labels = torch.nn.functional.cross_entropy(outputs.cls_logits, torch.arange(8) % 3)
    torch.testing.assert_close(outputs.loss, (hard + labels) / 2)


@torch.no_grad()
def test_9_a_model_is_exported(images: Tensor, tmp_path: Path) -> None:
    config = ViTCLSConfig(**TINY, num_register_tokens=4, num_labels=3)
    model = ViTCLSForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "model.onnx")
    graph = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits, *_) = graph.run(["logits"], {"pixel_values": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images).logits, rtol=0, atol=1e-4)


@torch.no_grad()
def test_10_attention_of_the_special_tokens_is_returned(images: Tensor) -> None:
    config = ViTCLSConfig(**TINY, num_register_tokens=4, attn_implementation="eager")
    model = ViTCLSModel(config).eval()
    maps = model.token_attention(images, layers=[1])
    assert maps.shape == (8, 1, 2, 5, 21)
    first = model(images, output_attentions=True).attentions[0]
    torch.testing.assert_close(maps[:, 0], first[:, :, :5])
    with pytest.raises(ValueError, match="layers count from 1"):
        model.token_attention(images, layers=[0])
