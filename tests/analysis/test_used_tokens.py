"""Which final tokens a head reads, compared with the gradient of its output."""

import pytest
import torch
from helpers.tiny_models import TASKS, build_images, build_tiny_config, randomize
from torch import nn

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
)
from modeling_vitcls.analysis.maps import is_used_by_head


FIELDS = {
    "cls": {},
    "first of pooled": {"num_cls_tokens": 3, "pooled_cls_tokens": [1, 2]},
    "concat of pooled": {"num_cls_tokens": 3, "pooled_cls_tokens": [2, 0], "cls_pooling": "concat"},
    "distillation": {"num_distillation_tokens": 2, "num_register_tokens": 1},
    "distillation without head": {"num_distillation_tokens": 1, "distillation_head": False},
    "mean": {"pooling": "mean", "num_register_tokens": 2},
    "cls_mean": {"pooling": "cls_mean", "num_cls_tokens": 2},
    "attention": {"pooling": "attention", "num_register_tokens": 1},
    "attention to all": {"pooling": "attention", "attention_pool_tokens": "all", "num_register_tokens": 1},
    "tasks": {"num_cls_tokens": 2, "tasks": TASKS, "num_distillation_tokens": 1},
    "masked": {"num_register_tokens": 1, "architectures": ["ViTCLSForMaskedImageModeling"]},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_head_reads_the_tokens_with_a_gradient(fields: dict) -> None:
    config = build_tiny_config(**fields)
    classes = {"tasks": ViTCLSForMultiTaskClassification, "architectures": ViTCLSForMaskedImageModeling}
    model_class = next((classes[name] for name in classes if name in fields), ViTCLSForImageClassification)
    model = randomize(model_class(config))
    sequences: list[torch.Tensor] = []

    def record(norm: nn.Module, args: tuple, sequence: torch.Tensor) -> None:
        sequence.retain_grad()
        sequences.append(sequence)

    model.vitcls.layernorm.register_forward_hook(record)
    outputs = model(build_images(batch=1))
    outputs = outputs.reconstruction if model_class is ViTCLSForMaskedImageModeling else outputs.logits
    tensors = outputs.values() if isinstance(outputs, dict) else [outputs]
    torch.stack([tensor.square().sum() for tensor in tensors]).sum().backward()
    gradient = sequences[0].grad[0].abs().sum(dim=1)  # one value per computed token
    for group, tokens in config.token_layout.items():
        if group == "patches":
            assert is_used_by_head(config, group, 0) == bool(gradient[tokens].sum() > 0)
            continue
        for place, index in enumerate(range(config.token_layout.num_prefix_tokens)[tokens]):
            is_read = index < len(gradient) and bool(gradient[index] > 0)
            assert is_used_by_head(config, group, place) == is_read, (group, place)
