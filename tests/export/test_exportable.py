"""Models loaded for export: their named outputs, the attention of CLS tokens, and presets."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, randomize

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.export import exporter
from modeling_vitcls.export.exportable import NamedOutputsModel, compute_named_outputs, load_exportable_model


pytestmark = pytest.mark.integration


def test_an_encoder_without_pooler(tmp_path: Path) -> None:
    """A model that was saved without a pooler is exported without a pooler."""
    model = randomize(ViTCLSModel(build_tiny_config(pooling="attention"), add_pooling_layer=False))
    model.save_pretrained(tmp_path / "model")
    loaded, processor, _ = load_exportable_model(str(tmp_path / "model"))
    assert processor is None
    outputs = NamedOutputsModel(loaded)(build_images())
    assert list(outputs) == ["last_hidden_state"]
    assert torch.equal(outputs["last_hidden_state"], model(build_images()).last_hidden_state)
    model.bfloat16().save_pretrained(tmp_path / "half")
    assert load_exportable_model(str(tmp_path / "half"))[0].dtype == torch.float32


@torch.no_grad()
def test_the_attention_of_cls_tokens_is_an_output() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(num_cls_tokens=2, num_register_tokens=3)))
    pixel_values = build_images(2, 24, 40)
    outputs = NamedOutputsModel(model, output_attentions=True)(pixel_values)
    assert list(outputs) == ["logits", "cls_attention"]
    expected = model(pixel_values)
    torch.testing.assert_close(outputs["logits"], expected.logits)
    model.set_attn_implementation("eager")
    attentions = torch.stack(model(pixel_values, output_attentions=True).attentions, dim=1)
    maps = attentions.mean(2)[:, :, :2, 5:].unflatten(-1, (3, 5))  # [B, layers, CLS tokens, rows, columns]
    torch.testing.assert_close(outputs["cls_attention"], maps)
    assert NamedOutputsModel(model.bfloat16())(pixel_values.bfloat16())["logits"].dtype == torch.float32
    assert list(compute_named_outputs(model.float(), [pixel_values], True)[0]) == ["logits", "cls_attention"]


def test_a_preset_has_random_weights() -> None:
    model, processor, is_trained = load_exportable_model("vitcls-tiny")
    assert not is_trained and not model.training and model.config.hidden_size == 192
    assert exporter.describe_preprocessing(processor)["size"] == {"height": 224, "width": 224}
