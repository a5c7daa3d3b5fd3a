"""Code that runs in the two processes of test_cpu_kernels.py and test_outputs.py. Start with:

    two_processes.py TARGET

TARGET/sharded.pt contains the results of one training step with FSDP2, with and without CPU kernels;
TARGET/gathered.pt contains the outputs that accelerate gathered from both processes.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import distributed
from torch.distributed.fsdp import fully_shard


sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers.tiny_models import build_images, build_tiny_config, randomize

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, cpu_kernels_vitcls


def main(target: Path) -> None:
    """Run both parts and save the results of the first process."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    cpu_kernels_vitcls.MIN_MULTIPLICATIONS.update(dict.fromkeys(cpu_kernels_vitcls.MIN_MULTIPLICATIONS, 0))
    sharded = {has_kernels: train_sharded(has_kernels) for has_kernels in (True, False)}
    gathered = gather_outputs(accelerator)
    if accelerator.is_main_process:
        torch.save(sharded, target / "sharded.pt")
        torch.save(gathered, target / "gathered.pt")
    distributed.barrier()
    distributed.destroy_process_group()


def train_sharded(has_kernels: bool) -> dict[str, Any]:
    """Return loss and full gradients of a step with FSDP2, with one of two images in each process."""
    config = build_tiny_config(num_register_tokens=2, specialized_layers={"norm": [0], "qkv": [0]})
    model: Any = randomize(ViTCLSForImageClassification(config))
    if not has_kernels:
        cpu_kernels_vitcls.uninstall_cpu_kernels(model)
    for layer in model.vitcls.layers:
        fully_shard(layer)
    fully_shard(model)
    rank = distributed.get_rank()
    loss = model(build_images()[rank : rank + 1], labels=torch.tensor([0, 2])[rank : rank + 1]).loss
    loss.backward()
    gradients = {name: weight.grad.full_tensor() for name, weight in model.named_parameters()}
    classes = {type(module).__name__.removeprefix("FSDP") for module in model.modules()}
    return {"classes": classes, "tensors": {"loss": loss.detach(), **gradients}}


@torch.no_grad()
def gather_outputs(accelerator: Accelerator) -> dict[str, dict[str, torch.Tensor]]:
    """Return the tensors of gathered outputs, with one of two images in each process."""
    own_image = build_images()[accelerator.process_index :][:1]
    gathered = {}
    for model_class in (ViTCLSModel, ViTCLSForImageClassification):
        model = accelerator.prepare(randomize(model_class(build_tiny_config(num_register_tokens=2))))
        output = accelerator.gather(model(own_image))
        assert type(output) is type(accelerator.unwrap_model(model)(own_image))
        gathered[model_class.__name__] = dict(output)
    return gathered


if __name__ == "__main__":
    main(Path(sys.argv[1]))
