"""The tokens that heads read, compared with the gradients of the outputs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import TASKS, build_images, build_tiny_config, randomize
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification
from modeling_vitcls.analysis.token_use import PATCHES, TokenUse, find_token_use


@pytest.mark.parametrize(
    ("fields", "has_head", "expected"),
    [
        ({"pooled_layers": [1, 3], "num_register_tokens": 1}, True, [3, 2, 2]),
        ({"pooled_layers": [1, 3], "num_register_tokens": 1}, False, [4, 3, 4]),
        # the distillation head reads the last layer
        ({"pooled_layers": [2], "num_distillation_tokens": 1}, True, [3, 4, 3]),
    ],
)
def test_layers_above_those_that_a_head_reads_are_not_used(
    fields: dict[str, Any], has_head: bool, expected: list[int]
) -> None:
    config = build_tiny_config(num_hidden_layers=4, **fields)
    assert TokenUse(config, has_head).num_layers == expected


FIELDS = {
    "cls": {},
    "first of pooled": {"num_cls_tokens": 3, "pooled_cls_tokens": [1, 2]},
    "concat of pooled": {"num_cls_tokens": 3, "pooled_cls_tokens": [2, 0], "cls_pooling": "concat"},
    "distillation": {"num_distillation_tokens": 2, "num_register_tokens": 1},
    "distillation without head": {"num_distillation_tokens": 1, "distillation_head": False},
    "mean": {"pooling": "mean", "num_register_tokens": 2},
    "cls_mean": {"pooling": "cls_mean", "num_cls_tokens": 2},
    "attention": {"pooling": "attention", "num_register_tokens": 1},
    "attention to all": {
        "pooling": "attention",
        "attention_pool_tokens": "all",
        "num_register_tokens": 1,
    }
    | {"num_distillation_tokens": 1, "distillation_head": False},
    "tasks": {"num_cls_tokens": 2, "tasks": TASKS, "num_distillation_tokens": 1},
    "added classes": {
        "pooling": "mean",
        "extra_heads": {"more": {"labels": ["LABEL_2"], "pooling": "cls", "adds_classes": True}},
    },
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_head_reads_the_tokens_with_a_gradient(fields: dict) -> None:
    config = build_tiny_config(**fields)
    model = randomize(
        (ViTCLSForMultiTaskClassification if config.tasks else ViTCLSForImageClassification)(config)
    )
    sequences: list[torch.Tensor] = []

    def record(norm: nn.Module, args: tuple, sequence: torch.Tensor) -> None:
        sequence.retain_grad()
        sequences.append(sequence)

    model.vitcls.layernorm.register_forward_hook(record)
    outputs = model(build_images(batch=1)).logits
    tensors = outputs.values() if isinstance(outputs, dict) else [outputs]
    torch.stack([tensor.square().sum() for tensor in tensors]).sum().backward()
    gradient = sequences[0].grad[0].abs().sum(dim=1)  # one value per computed token
    layout = config.token_layout
    expected = set(gradient[: layout.num_prefix_tokens].nonzero().flatten().tolist())
    if gradient[layout.patches].any():
        expected.add(PATCHES)
    assert TokenUse(config).read_tokens == expected


def test_remote_code_has_classifiers_of_its_own(tmp_path: Path) -> None:
    """They are not instances of the package's classes."""
    ViTCLSForImageClassification(build_tiny_config()).save_pretrained(tmp_path)
    kind = get_class_from_dynamic_module(
        "modeling_vitcls.ViTCLSForImageClassification", str(tmp_path)
    )
    model = kind.from_pretrained(tmp_path)
    assert not isinstance(model, ViTCLSForImageClassification)
    assert find_token_use(model).has_head
