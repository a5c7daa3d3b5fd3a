"""The state of training as plain named tensors, and back: for one process, DDP and FSDP2 alike, to the bit.
Of DeepSpeed's shards, weights and gradients alone can be made whole.

    model, optimiser, EMA weights      <->   {"model", "optimizer", "ema"} -> name -> whole tensor on the CPU
    on every process, maybe in shards        on the main process

Whole tensors do not depend on how many processes there are. Names are the model's own, without what DDP,
torch.compile or PEFT put before them. Left out is what follows from the flags and the step: the optimiser's
hyperparameters, and random numbers, which are seeded anew for each step. How tensors reach the disk is in
checkpoints.py.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..checkpoints import Checkpoint, Tensors
from ..distributed import on_main


PEFT_PREFIX = "base_model.model."


def unsupported(accelerator: Accelerator) -> str | None:
    """Why no checkpoint can be written under the launched configuration; None where it can."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "DeepSpeed keeps the optimiser's state in a form of its own; use FSDP2 to be able to --resume"
    return None


def gather_state(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, shadow: Sequence[torch.Tensor] | None
) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """All tensors of the state on the main process (no tensors on the others), and the rest of it as JSON values.

    All processes have to call it together. Tensors of one process on the CPU are not copied: write them before
    training goes on.

    Args:
        model, optimizer: as `Accelerator.prepare` returned them.
        shadow: EMA weights, in the order of the trainable parameters; None without EMA.

    Raises:
        ValueError: see `unsupported`.
    """
    reason = unsupported(accelerator)
    if reason:
        raise ValueError(f"no checkpoint can be written: {reason}")
    is_main = accelerator.is_main_process
    inner = inner_optimizer(optimizer)
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    moments: Tensors = {}
    others: dict[str, Any] = {}
    for parameter in optimized(inner):
        for key, value in inner.state.get(parameter, {}).items():
            target = moments if isinstance(value, torch.Tensor) else others
            target[f"{key}/{names[id(parameter)]}"] = value
    tensors = {"model": gather(named_tensors(model), is_main), "optimizer": gather(moments, is_main)}
    if shadow is not None:
        tensors["ema"] = gather(dict(zip(trainable(model), shadow, strict=True)), is_main)
    scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
    return tensors, {"optimizer": others, "scaler": scaler}


def scatter_state(
    checkpoint: Checkpoint | None,
    facts: dict[str, Any],
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    shadow: Sequence[torch.Tensor] | None,
) -> None:
    """Put the state back that `gather_state` gave. All processes have to call it together.

    Args:
        checkpoint: on the main process; None on the others, which get their part from it.
        facts: the second part of what `gather_state` returned, on all processes.
        shadow: filled in place.

    Raises:
        ValueError: in one line, where the checkpoint is another model's or optimiser's.
    """

    def read(name: str) -> Tensors | None:
        return None if checkpoint is None else checkpoint.tensors(name)

    scatter(read("model"), named_tensors(model), accelerator)
    if shadow is not None:
        scatter(read("ema"), dict(zip(trainable(model), shadow, strict=True)), accelerator)
    scatter_optimizer(read("optimizer"), facts["optimizer"], accelerator, model, optimizer)
    if accelerator.scaler is not None and facts["scaler"]:
        accelerator.scaler.load_state_dict(facts["scaler"])


def reshard(model: nn.Module) -> None:
    """Give up the whole weights that FSDP2 keeps after a forward pass without a backward one.

    Until then the model holds copies: its parameters are not the optimiser's, and changes of those do not reach it.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# Names ---------------------------------------------------------------------------------------------------------------


def plain_name(name: str) -> str:
    """A name without what wrappers put into it: `module._orig_mod.vitcls.x` is `vitcls.x`."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]  # torch.compile, of the whole or of parts
    return ".".join(parts[parts[0] == "module" :]).removeprefix(PEFT_PREFIX)  # DDP


def renamed(tensors: Iterable[tuple[str, Any]]) -> Tensors:
    """Tensors by their plain names. What is not a tensor is left out."""
    return {plain_name(name): tensor for name, tensor in tensors if isinstance(tensor, torch.Tensor)}


def named_tensors(model: nn.Module) -> Tensors:
    """Parameters and persistent buffers; in place changes of them change the model."""
    return renamed(model.state_dict(keep_vars=True).items())


def named_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters, trained or not; weights that are tied have one name."""
    return renamed(model.named_parameters())


def trainable(model: nn.Module) -> list[str]:
    """Names of the parameters that are trained, in their order."""
    return [name for name, parameter in named_parameters(model).items() if parameter.requires_grad]


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """PyTorch's optimiser inside of Accelerate's."""
    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def optimized(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The optimiser's parameters, in the order in which its state numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# Tensors across processes --------------------------------------------------------------------------------------------


def gather(tensors: Tensors, is_main: bool) -> Tensors:
    """Whole tensors on the main process's CPU; nothing on the others, which take part one tensor at a time."""
    result: Tensors = {}
    for name, tensor in tensors.items():
        gathered = as_whole(tensor)
        if is_main:
            result[name] = gathered.detach().cpu()
    return result


def as_whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each process may hold a part. All processes have to call it together."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "ds_id"):  # ZeRO-3
        from deepspeed import zero

        with zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


def whole_gradient(parameter: torch.Tensor) -> torch.Tensor | None:
    """A parameter's gradient, over all processes; None where it has none. All processes have to call it together."""
    if parameter.requires_grad and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")):  # ZeRO
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)
    return None if parameter.grad is None else as_whole(parameter.grad)


def size(parameter: torch.Tensor) -> int:
    """Numbers in the whole of a parameter."""
    return getattr(parameter, "ds_numel", parameter.numel())


@torch.no_grad()
def scatter(whole: Tensors | None, targets: Tensors, accelerator: Accelerator) -> None:
    """Copy whole tensors, from the main process, into `targets` on all processes.

    Raises:
        ValueError: in one line, naming a tensor that is missing, unknown, or of another shape.
    """
    on_main(accelerator, lambda: require_same(whole or {}, targets))
    for name, target in targets.items():
        target.copy_(laid_out(None if whole is None else whole[name], target.dtype, target, accelerator))


def laid_out(
    whole: torch.Tensor | None, dtype: torch.dtype, like: torch.Tensor, accelerator: Accelerator
) -> torch.Tensor:
    """A tensor of the main process (None elsewhere), on all processes, on the device and in the shards of `like`."""
    if whole is None:
        whole = torch.empty(like.shape, dtype=dtype)
    whole = whole.to(accelerator.device)
    if isinstance(like, DTensor):
        return distribute_tensor(whole, like.device_mesh, like.placements)
    if accelerator.num_processes > 1:
        distributed.broadcast(whole, src=0)
    return whole


def scatter_optimizer(
    whole: Tensors | None,
    others: dict[str, Any],
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Rebuild the optimiser's state per parameter: moments in the parameter's shards, step counts as they are."""
    parameters = named_parameters(model)
    inner = inner_optimizer(optimizer)
    places = {id(parameter): place for place, parameter in enumerate(optimized(inner))}

    def contents() -> dict[str, Any]:
        """For each tensor its type where it is shaped as its parameter is; itself, being small, where it is not."""
        values: dict[str, Any] = {}
        for name, tensor in (whole or {}).items():
            owner = parameters.get(name.split("/", 1)[1])
            if owner is None or id(owner) not in places:
                raise ValueError(f"the checkpoint is another run's: its optimiser has {name}, and this one has not")
            values[name] = tensor.dtype if tensor.ndim and tensor.shape == owner.shape else tensor
        return values | others

    state: dict[int, dict[str, Any]] = {}
    for name, value in on_main(accelerator, contents).items():
        key, owner_name = name.split("/", 1)
        owner = parameters[owner_name]
        if isinstance(value, torch.dtype):
            value = laid_out(None if whole is None else whole[name], value, owner, accelerator)
        state.setdefault(places[id(owner)], {})[key] = value
    inner.load_state_dict({"state": state, "param_groups": inner.state_dict()["param_groups"]})


def require_same(whole: Tensors, targets: Tensors) -> None:
    """Raise ValueError unless names and shapes agree."""
    for name in sorted(whole.keys() ^ targets.keys()):
        where = "the checkpoint" if name in whole else "the model"
        raise ValueError(f"the checkpoint is another model's: only {where} has {name}")
    for name, target in targets.items():
        if whole[name].shape != target.shape:
            shapes = f"{list(whole[name].shape)} in the checkpoint and {list(target.shape)} in the model"
            raise ValueError(f"the checkpoint is another model's: {name} is {shapes}")
