"""The training state as named full tensors, for one process, DDP and FSDP2.

    model, optimizer, start weights    <->   {"model", "optimizer", "start"} -> name -> full tensor on the CPU
    on every process, possibly sharded       on the main process

Full tensors do not depend on the number of processes. Names are parameter names of the unwrapped
model, without the prefixes that DDP and torch.compile add. The state excludes the optimizer's
hyperparameters, which are computed from the flags and the step, and the states of random number
generators, which are seeded in each step. checkpoints.py writes the tensors to disk.

The functions of torch.distributed.checkpoint.state_dict gather weights and moments, and distribute
weights. Moments are not loaded with `set_optimizer_state_dict`, because this function sets a step
count of 1 for parameters that have no moments in the checkpoint: they are overwritten in place.
"""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

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
    moments: Tensors = {}
    if optimizer.state:
        moments = name_moments(
            get_optimizer_state_dict(model, optimizer, options=FULL_STATE_DICT_OPTIONS)
        )
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

    def load_tensors(name: str) -> Tensors:
        return checkpoint.load_tensors(name) if PartialState().is_main_process else {}

    weights: Any = load_tensors("model")
    # Full tensors cannot be copied into DTensors without these options. FSDP2 uses DTensors, and a
    # process group, even with one process.
    is_distributed = distributed.is_initialized()
    options = StateDictOptions(full_state_dict=is_distributed, broadcast_from_rank0=is_distributed)
    set_model_state_dict(model, weights, options=options)
    if start:
        copy_from_main(load_tensors("start"), start)
    # Accelerate's wrapper would pass the step that creates the moments to the loss scaler.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    copy_from_main(
        load_tensors("optimizer"), name_moments(get_optimizer_state_dict(model, optimizer))
    )
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


def distribute_like(full_tensor: Tensor, like: Tensor) -> Tensor:
    """Give every process its shard of a tensor of the main process.

    The result has the device and the sharding of `like`, whose shape and dtype it has. On all other
    processes, the values of `full_tensor` do not matter.
    """
    full_tensor = full_tensor.to(PartialState().device)
    if isinstance(like, DTensor):
        return distribute_tensor(full_tensor, like.device_mesh, like.placements)
    if PartialState().num_processes > 1:
        distributed.broadcast(full_tensor, src=0)
    return full_tensor


def copy_from_main(full_tensors: Tensors, targets: Mapping[str, Tensor]) -> None:
    """Overwrite tensors on every process with the tensors of the main process, by name.

    A parameter that has had no gradient yet has no moments in a checkpoint: they are zeros.
    """
    for name, target in targets.items():
        full_tensor = full_tensors.get(name, torch.zeros(target.shape, dtype=target.dtype))
        target.copy_(distribute_like(full_tensor, target))


def name_moments(state_dict: Mapping[str, Any]) -> Tensors:
    """Name the tensors in the state of an optimizer: `exp_avg/NAME`; empty on the other processes."""
    return {
        f"{key}/{name}": value
        for name, state in state_dict.get("state", {}).items()
        for key, value in state.items()
    }
