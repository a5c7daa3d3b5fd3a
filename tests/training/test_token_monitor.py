"""The measurements of special tokens during training, compared with direct computations."""

import math

import pytest
import torch
from helpers.random_classifiers import build_random_model

from modeling_vitcls.training.token_monitor import TokenMonitor, measure_attention_entropy


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def test_entropy_of_cls_attention_equals_eager_attention() -> None:
    torch.manual_seed(0)
    model = build_random_model(num_cls_tokens=2, initializer_range=0.5, hidden_dropout_prob=0.5)
    model.vitcls.layers[0].requires_grad_(False)
    normalise = lambda pixels: pixels / 255  # noqa: E731
    pixels = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8)
    model.train()
    (found,) = measure_attention_entropy(model, normalise, {"pixels": pixels}).values()
    assert model.training and [layer.training for layer in model.vitcls.layers] == [False, True]
    eager = build_random_model(num_cls_tokens=2)
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    attentions = eager.eval()(normalise(pixels[:8]), output_attentions=True).attentions
    rows = [weights[:, :, model.config.token_layout.cls] for weights in attentions]
    expected = [-(row * row.log()).sum(-1).mean().item() for row in rows]
    assert found == pytest.approx(expected, abs=1e-3)
    assert max(found) < math.log(8) - 0.01  # 2 CLS, 2 registers, 4 patches: not uniform


def test_the_update_of_a_token_that_was_zero() -> None:
    model = build_random_model()
    monitor = TokenMonitor(model)
    zero = torch.zeros(32)
    health = monitor.compute_token_metrics(dict.fromkeys(monitor.initial_tokens, zero), {"cls[0]": zero + 1})
    norms = {name: token.norm().item() for name, token in monitor.initial_tokens.items()}
    assert health["token_norm"] == pytest.approx(norms, rel=1e-5)
    assert health["token_update_ratio"] == pytest.approx({name: norm * 1e12 for name, norm in norms.items()}, rel=1e-5)
    assert health["token_gradient_norm"] == pytest.approx(dict.fromkeys(norms, 0.0) | {"cls[0]": math.sqrt(32)})
