"""The default model compiles to one graph, also after transformers has installed hooks that record hidden states."""

from typing import Any

import pytest
import torch
from tiny_models import TASKS, build_images, build_tiny_config, get_largest_difference, randomize

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification, ViTCLSModel
from modeling_vitcls.cpu_kernels_vitcls import uninstall_cpu_kernels


MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "encoder": (ViTCLSModel, {}),
    "classifier": (ViTCLSForImageClassification, {}),
    "classifier_with_tokens": (
        ViTCLSForImageClassification,
        {"num_register_tokens": 2, "num_distillation_tokens": 1, "position_embedding_type": "rope_2d"},
    ),
    "several_tasks": (ViTCLSForMultiTaskClassification, {"num_cls_tokens": 2, "tasks": TASKS}),
}
each_model = pytest.mark.parametrize(("model_class", "fields"), MODELS.values(), ids=MODELS)


@pytest.fixture(autouse=True)
def no_compiled_code() -> None:
    """Reset the compiler before each test."""
    torch._dynamo.reset()


def build_model(model_class: Any, fields: dict[str, Any], has_kernels: bool) -> Any:
    """Return a model with random weights."""
    model = randomize(model_class(build_tiny_config(**fields)))
    if not has_kernels:
        uninstall_cpu_kernels(model)
    return model


def assert_one_graph(model: Any, **kwargs: Any) -> None:
    """Check that there is no graph break, during inference and in training mode."""
    for is_training in (False, True):
        model.train(is_training)
        with torch.set_grad_enabled(is_training):
            explained = torch._dynamo.explain(model)(build_images(), **kwargs)
        assert explained.graph_break_count == 0, explained.break_reasons
        assert explained.graph_count == 1
        assert explained.op_count > 20
        torch._dynamo.reset()


@pytest.mark.slow_cases
@pytest.mark.parametrize("has_kernels", [True, False])
@each_model
@pytest.mark.integration
def test_there_is_no_graph_break(model_class: Any, fields: dict[str, Any], has_kernels: bool) -> None:
    assert_one_graph(build_model(model_class, fields, has_kernels))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder", "classifier_with_tokens"])
@pytest.mark.integration
def test_there_is_no_graph_break_with_recorded_hidden_states(name: str) -> None:
    model = build_model(*MODELS[name], has_kernels=True)
    with torch.no_grad():
        model(build_images(), output_hidden_states=True)
    assert model.base_model.layers[0]._forward_hooks
    assert_one_graph(model)
    assert_one_graph(model, output_hidden_states=True)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_values() -> None:
    model = build_model(ViTCLSForImageClassification, {"num_register_tokens": 2}, has_kernels=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    logits = model(build_images()).logits
    assert get_largest_difference(compiled(build_images()).logits, logits) <= 1e-5 * logits.abs().max().item()
    model(build_images(), output_hidden_states=True)  # transformers cannot install its hooks during compilation
    recorded = compiled(build_images(), output_hidden_states=True)
    assert [state.shape for state in recorded.hidden_states] == [(2, 19, 16)] * 3
    assert get_largest_difference(recorded.logits, logits) <= 1e-5 * logits.abs().max().item()
    assert get_largest_difference(compiled(build_images()).logits, logits) <= 1e-5 * logits.abs().max().item()
