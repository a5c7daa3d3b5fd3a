"""The measurements of special tokens during training, compared with direct computations."""

import math

import pytest
import torch
from helpers.random_classifiers import build_random_model

from modeling_vitcls.training.token_monitor import measure_attention_entropy


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_entropy_of_cls_attention_equals_eager_attention() -> None:
    torch.manual_seed(0)
    model = build_random_model(num_cls_tokens=2, initializer_range=0.5, hidden_dropout_prob=0.5)
    model.vitcls.layers[0].requires_grad_(False)
    normalise = lambda pixels: pixels / 255  # noqa: E731
    pixels = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8)
    model.train()
    (found,) = measure_attention_entropy(model, normalise, {"pixels": pixels}).values()
    assert model.training
    assert [layer.training for layer in model.vitcls.layers] == [False, True]
    eager = build_random_model(num_cls_tokens=2)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    attentions = eager.eval()(normalise(pixels[:8]), output_attentions=True).attentions
    rows = [weights[:, :, model.config.token_layout.cls] for weights in attentions]
    expected = [-(row * row.log()).sum(-1).mean().item() for row in rows]

    assert found == pytest.approx(expected, abs=1e-3)
    assert max(found) < math.log(8) - 0.01  # 2 CLS, 2 registers, 4 patches: not uniform
