"""Models loaded for export: their named outputs, the attention of CLS tokens, and presets."""

from pathlib import Path

import torch
from helpers.tiny_models import IMAGES, build_random, build_tiny_config

from modeling_vitcls import ViTCLSModel
from modeling_vitcls.export.tracing import NamedOutputsModel, load_exportable_model


def test_an_encoder_in_half_precision_is_exported_in_float32(tmp_path: Path) -> None:
    source = build_random(ViTCLSModel).bfloat16()
    source.save_pretrained(tmp_path)
    model, processor, _ = load_exportable_model(str(tmp_path))
    assert model.dtype == torch.float32
    assert not model.training
    assert processor.size["height"] == 32
    outputs = NamedOutputsModel(model)(IMAGES)
    assert list(outputs) == ["last_hidden_state", "pooler_output"]
    assert torch.equal(outputs["last_hidden_state"], source.float()(IMAGES).last_hidden_state)


def test_an_encoder_without_a_pooler_has_one_output() -> None:
    model = ViTCLSModel(build_tiny_config(), add_pooling_layer=False)
    assert list(NamedOutputsModel(model)(IMAGES)) == ["last_hidden_state"]
