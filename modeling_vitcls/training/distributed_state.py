"""The training state as named full tensors, for one process, DDP and FSDP2.

    model, optimizer, start weights    <->   {"model", "optimizer", "start"} -> name -> full tensor on the CPU
    on every process, possibly sharded       on the main process

Full tensors do not depend on the number of processes. Names are parameter names of the unwrapped
model, without the prefixes that DDP and torch.compile add. The state excludes the optimizer's
hyperparameters, which are computed from the flags and the step, and the states of random number
generators, which are seeded in each step. checkpoints.py writes the tensors to disk.

The functions of torch.distributed.checkpoint.state_dict gather weights and moments, and distribute
weights. Moments are not loaded with `set_optimizer_state_dict`, because this function sets a step
count of 1 for parameters that have no moments in the checkpoint.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..runtime.distributed import run_on_main
from .checkpoints import Checkpoint, Tensors


FULL_STATE_DICT_OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)


def gather_state(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    start: Mapping[str, Tensor],
) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Gather the training state as full tensors, and the loss scaler's state for JSON.

    The tensors are returned only on the main process. This function must be called on all
    processes. With a single process on the CPU, the returned tensors share memory with the training
    state and must be written to disk before training continues. `start` contains the weights
    before the first step, by name; it is empty if they are not needed.
    """
    parameter_states: Any = {}
    if optimizer.state:
        optimizer_state = get_optimizer_state_dict(
            model, optimizer, options=FULL_STATE_DICT_OPTIONS
        )
        parameter_states = optimizer_state.get("state", {})
    moments = {
        f"{key}/{name}": value
        for name, state in parameter_states.items()
        for key, value in state.items()
    }

    tensors = {"model": gather_weights(model), "optimizer": moments}
    if start:
        tensors["start"] = {}
        for name, tensor in start.items():
            full_tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if PartialState().is_main_process:
                tensors["start"][name] = full_tensor.detach().cpu()

    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
    return tensors, {"scaler": scaler}


@torch.no_grad()
def scatter_state(
    checkpoint: Checkpoint,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    start: Mapping[str, Tensor],
) -> None:
    """Load a state returned by `gather_state`. This function must be called on all processes.

    Args:
        checkpoint: checkpoint to load, the same on all processes. Only the main process reads the
            tensors from disk.
        start: weights before the first step, by name, which are overwritten in place.
    """
    is_main_process = PartialState().is_main_process
    weights: Any = checkpoint.load_tensors("model") if is_main_process else {}
    # Full tensors cannot be copied into DTensors without these options. FSDP2 uses DTensors, and a
    # process group, even with one process.
    is_distributed = distributed.is_initialized()
    options = StateDictOptions(full_state_dict=is_distributed, broadcast_from_rank0=is_distributed)
    set_model_state_dict(model, weights, options=options)
    if start:
        stored = checkpoint.load_tensors("start") if is_main_process else {}
        for name, target in start.items():
            target.copy_(distribute_like(stored.get(name), target))
    moments = checkpoint.load_tensors("optimizer") if is_main_process else {}
    scatter_optimizer_state(moments, model, optimizer)
    if accelerator.scaler is not None and checkpoint.metadata["scaler"]:
        accelerator.scaler.load_state_dict(checkpoint.metadata["scaler"])


def reshard(model: nn.Module) -> None:
    """Release the full weights that FSDP2 keeps after a forward pass without a backward pass.

    Without this call, the model's parameters would remain copies that the optimizer does not
    update.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# Tensors across processes -------------------------------------------------------------------------


def gather_weights(model: nn.Module) -> Tensors:
    """Gather parameters and persistent buffers as full CPU tensors on the main process.

    The other processes get an empty dictionary. This function must be called on all processes.
    """
    weights: Any = get_model_state_dict(model, options=FULL_STATE_DICT_OPTIONS)
    return weights


def distribute_like(full_tensor: Tensor | None, like: Tensor) -> Tensor:
    """Give every process its shard of a tensor of the main process.

    The result has the device and the sharding of `like`, whose dtype it has. `full_tensor` may be None
    on all other processes.
    """
    if full_tensor is None:
        full_tensor = torch.empty(like.shape, dtype=like.dtype)
    full_tensor = full_tensor.to(PartialState().device)
    if isinstance(like, DTensor):
        return distribute_tensor(full_tensor, like.device_mesh, like.placements)
    if PartialState().num_processes > 1:
        distributed.broadcast(full_tensor, src=0)
    return full_tensor


def scatter_optimizer_state(
    full_tensors: Tensors, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Load the optimizer state.

    Moments are sharded like their parameters, and step counts are copied.
    """
    unwrapped = extract_model_from_parallel(model, keep_torch_compile=False)
    parameters: Tensors = dict(unwrapped.named_parameters())
    grouped_parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    indices = {id(parameter): index for index, parameter in enumerate(grouped_parameters)}

    def read_state() -> dict[str, Any]:
        # The result is sent to all processes. It has None for the moments, which are large and have
        # the shapes and dtypes of their parameters. Step counts, which are small, are sent as tensors.
        shapes = {name: parameters[name.split("/", 1)[1]].shape for name in full_tensors}
        return {
            name: None if tensor.ndim and tensor.shape == shapes[name] else tensor
            for name, tensor in full_tensors.items()
        }

    state: dict[int, dict[str, Any]] = {}
    for name, value in run_on_main(read_state).items():
        key, parameter_name = name.split("/", 1)
        parameter = parameters[parameter_name]
        if value is None:
            value = distribute_like(full_tensors.get(name), parameter)
        state.setdefault(indices[id(parameter)], {})[key] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
