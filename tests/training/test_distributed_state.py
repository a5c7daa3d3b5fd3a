"""The state of training as tensors, in one process.

tests/integration resumes runs in two processes.
"""

from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from helpers.tiny_models import assert_same_bits, build_tiny_config
from pytest import approx
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.frozen.linear_probe import ABSENT_CLASS_MARGIN
from modeling_vitcls.training.checkpoints import CheckpointStore
from modeling_vitcls.training.distributed_state import (
    gather_state,
    gather_weights,
    reshard,
    scatter_state,
)
from modeling_vitcls.training.model import keep_old_tokens, set_trainable_parameters
from modeling_vitcls.training.steps_run import exclude_unreadable_classes


pytestmark = pytest.mark.integration


def build(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = ViTCLSForImageClassification(build_tiny_config(num_register_tokens=2))
    if kind == "head only":
        model.vitcls.requires_grad_(False)
    if kind == "LoRA":
        set_trainable_parameters(model, "lora")
    if kind == "compiled":
        model = torch.compile(model, backend="eager")
    return model


def build_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": trained[::2], "weight_decay": 0.1}, {"params": trained[1::2]}]
    return torch.optim.AdamW(groups, lr=1e-3, fused=kind == "fused")


def step_once(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    torch.manual_seed(step)
    pixels = torch.randn(4, 3, 32, 32)  # [B, C, H, W]
    loss = nn.functional.cross_entropy(model(pixel_values=pixels).logits, torch.arange(4) % 3)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def check_resume(
    store: CheckpointStore, accelerator: Accelerator, first: Any, second: Any
) -> dict[str, dict[str, torch.Tensor]]:
    """Check that `second` continues from a checkpoint as `first` does; return its tensors.

    Both are a model and its optimizer.
    """
    model, optimizer = first
    for step in range(3):
        step_once(model, optimizer, step)
    tensors, facts = gather_state(accelerator, model, optimizer, start={})
    store.save(3, tensors, facts)
    expected = [step_once(model, optimizer, step) for step in range(3, 6)]

    other, other_optimizer = second
    checkpoint = store.load_newest(pytest.fail)
    scatter_state(checkpoint, accelerator, other, other_optimizer, start={})

    assert [step_once(other, other_optimizer, step) for step in range(3, 6)] == expected
    assert_same_bits(gather_weights(model), gather_weights(other))
    return tensors


@pytest.mark.parametrize("kind", ["plain", "fused", "head only", "LoRA", "compiled"])
@torch.compiler.set_stance("force_eager")  # tracing takes seconds
def test_training_resumes_to_the_bit(store: CheckpointStore, kind: str) -> None:
    accelerator = Accelerator(cpu=True)
    models = [build(kind, seed) for seed in (0, 1)]
    states = [accelerator.prepare(model, build_optimizer(kind, model)) for model in models]
    tensors = check_resume(store, accelerator, *states)

    assert tensors["optimizer"]
    if kind != "LoRA":
        assert tensors["model"].keys() == build("plain", seed=0).state_dict().keys()


def test_the_loss_scaler_is_resumed(store: CheckpointStore) -> None:
    accelerator = Accelerator(cpu=True)
    model = build("plain", seed=0)
    model, optimizer = accelerator.prepare(model, build_optimizer("plain", model))
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=512.5, growth_interval=5)
    tensors, facts = gather_state(accelerator, model, optimizer, start={})
    assert tensors.keys() == {"model", "optimizer"}
    store.save(1, tensors, facts)
    checkpoint = store.load_newest(pytest.fail)
    accelerator.scaler = torch.amp.GradScaler("cpu")
    scatter_state(checkpoint, accelerator, model, optimizer, start={})
    state = accelerator.scaler.state_dict()

    assert state["scale"] == 512.5
    assert state["growth_interval"] == 5


# FSDP2 --------------------------------------------------------------------------------------------


@pytest.fixture
def mesh() -> Iterator[distributed.DeviceMesh]:
    """Return the device mesh of one process, as on a machine with one GPU."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def build_sharded(
    seed: int, mesh: distributed.DeviceMesh
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model that is sharded with FSDP2, and its optimizer."""
    model = build("plain", seed)
    for layer in model.vitcls.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, build_optimizer("plain", model)


def test_fsdp2_on_one_process_resumes_bit_for_bit(
    store: CheckpointStore, mesh: distributed.DeviceMesh
) -> None:
    states = [build_sharded(seed, mesh) for seed in (0, 1)]

    tensors = check_resume(store, Accelerator(cpu=True), *states)

    assert not any(
        isinstance(tensor, DTensor) for group in tensors.values() for tensor in group.values()
    )
    assert tensors["model"].keys() == build("plain", 0).state_dict().keys()


def test_old_tokens_of_a_sharded_group_that_grew_get_no_gradient(
    mesh: distributed.DeviceMesh,
) -> None:
    model, _ = build_sharded(0, mesh)
    model(pixel_values=torch.randn(2, 3, 32, 32)).logits.square().sum().backward()
    name = "vitcls.embeddings.register_tokens"
    keep_old_tokens(model, {name: [False, True]})
    gradient = model.get_parameter(name).grad
    old, new = gradient.full_tensor()[0]
    assert not old.any()
    assert new.any()


def test_a_sharded_model_never_predicts_a_class_without_readable_images(
    mesh: distributed.DeviceMesh,
) -> None:
    model = build_sharded(0, mesh)[0]
    data = Mock(train=Mock(labels=[0, 1, 2, 2]), label_space=Mock(names=["cat", "dog", "owl"]))
    before = model.classifier.bias.full_tensor().clone()
    exclude_unreadable_classes(model, data, {1}, Mock())
    margins = before - model.classifier.bias.full_tensor()
    assert margins.tolist() == approx([0, ABSENT_CLASS_MARGIN, 0])


@torch.no_grad()
def test_evaluated_weights_are_sharded_again(mesh: distributed.DeviceMesh) -> None:
    model, *_ = build_sharded(0, mesh)
    model(pixel_values=torch.zeros(1, 3, 32, 32))
    assert not all(isinstance(parameter, DTensor) for parameter in model.parameters())
    reshard(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
