"""int8 weights and activations: `from_pretrained` with transformers' TorchAoConfig."""

from pathlib import Path

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, get_largest_difference
from torchao import quantization
from transformers import TorchAoConfig

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.cpu_kernels_vitcls import CPULinear


CONFIGS = ("Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig")


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_loading_in_int8(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "intermediate_size": 64, "num_register_tokens": 2, "initializer_range": 0.2}
    exact = ViTCLSForImageClassification(build_tiny_config(**fields)).eval()
    exact.save_pretrained(tmp_path / "exact")
    config = TorchAoConfig(getattr(quantization, name)(), modules_to_not_convert=["classifier"])
    model = ViTCLSForImageClassification.from_pretrained(tmp_path / "exact", quantization_config=config)
    quantized = [module for module in model.vitcls.layers.modules() if isinstance(module, CPULinear)]
    assert len(quantized) == 2 * 6 and {type(module.weight).__name__ for module in quantized} == {"Int8Tensor"}
    assert type(model.classifier.weight) is torch.nn.Parameter
    found, wanted = model(build_images()).logits, exact(build_images()).logits
    assert 0 < get_largest_difference(found, wanted) <= 0.05 * wanted.abs().max().item()
    model.save_pretrained(tmp_path / "int8")
    again = ViTCLSForImageClassification.from_pretrained(tmp_path / "int8")
    assert get_largest_difference(again(build_images()).logits, found) == 0
