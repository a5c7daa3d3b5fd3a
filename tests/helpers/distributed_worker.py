"""Checks of test_distributed_runs.py: two processes equal one process.

Start with: torchrun --nproc-per-node 2 distributed_worker.py FOLDER
"""

import functools
import itertools
import math
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close
from transformers.distributed import DistributedConfig


sys.path.extend(map(str, Path(__file__).parents[1:3]))

import modeling_vitcls as vitcls
from helpers.batch_plans import build_plan
from helpers.tiny_models import build_random
from modeling_vitcls.runtime.distributed import run_on_main
from modeling_vitcls.runtime.errors import RunStopped
from modeling_vitcls.runtime.files import write_json
from modeling_vitcls.training.checkpoints import CheckpointStore
from modeling_vitcls.training.loop import TrainingLoop
from modeling_vitcls.training.losses import Objective
from modeling_vitcls.training.optimizer import build_parameter_groups
from modeling_vitcls.training.reporter import Reporter
from modeling_vitcls.training.signals import SignalHandler


NUM_PROCESSES = 2
# Name -> model class and configuration fields. Each model must train on several processes without
# changes.
LAYOUTS = {
    "one CLS": (vitcls.ViTCLSForImageClassification, {"use_mask_token": True}),
    "distillation and registers": (
        vitcls.ViTCLSForImageClassification,
        {
            "num_distillation_tokens": 1,
            "num_register_tokens": 4,
            "head_type": "mlp",
            "mlp_type": "swiglu",
        },
    ),
    "attention pooling": (
        vitcls.ViTCLSForImageClassification,
        {
            "num_cls_tokens": 0,
            "pooling": "attention",
            "position_embedding_type": "sincos_2d",
            "qk_norm": True,
        },
    ),
    "three CLS with scopes": (
        vitcls.ViTCLSForImageClassification,
        {
            "num_cls_tokens": 3,
            "cls_scopes": ["image", [2, 2, 0, 0], [2, 2, 1, 1]],
            "cls_pooling": "concat",
            "pooling": "cls_mean",
        },
    ),
    "only the CLS head answers": (
        vitcls.ViTCLSForImageClassification,
        {
            "num_distillation_tokens": 1,
            "distillation_inference": "cls",
            "position_embedding_type": "rope_2d",
        },
    ),
    "several tasks": (
        vitcls.ViTCLSForMultiTaskClassification,
        {"num_cls_tokens": 2, "tasks": {"species": 3, "age": 2}},
    ),
    "masked images": (vitcls.ViTCLSForMaskedImageModeling, {"num_register_tokens": 1}),
    "backbone": (vitcls.ViTCLSBackbone, {"out_features": ["stage1", "stage2"]}),
}

CHECKS = {}


def check(function: Callable) -> Callable:
    """Register one check per layout, `function name: layout`."""
    for layout in LAYOUTS:
        CHECKS[f"{function.__name__}: {layout}"] = functools.partial(function, layout)
    return function


@check
def fsdp_by_plan(layout: str, folder: Path) -> None:
    """Check a training step with FSDP2 as set up by transformers."""
    if layout == "backbone":
        return  # see `fsdp_by_block`
    model, path = save_model(layout, folder)
    config = DistributedConfig(fsdp_size=NUM_PROCESSES)
    compare_a_step(layout, model, type(model).from_pretrained(path, distributed_config=config))


@check
def fsdp_by_block(layout: str, folder: Path) -> None:
    """Check a step with FSDP2 on the modules in `_no_split_modules`, as in accelerate.

    A backbone is sharded as a submodule of another module, as in real models. If it is the
    outermost module, FSDP2 renames its class. transformers, which finds the class by name, then
    records no hidden states. Its own ViT has the same problem.
    """
    model, sharded = shard_blocks(layout, folder)
    outer_module = nn.Sequential(sharded) if layout == "backbone" else sharded
    fully_shard(outer_module)
    compare_a_step(layout, model, outer_module)


def shard_blocks(layout: str, folder: Path) -> tuple[Any, Any]:
    """Return a model, and a copy whose blocks are sharded."""
    model, path = save_model(layout, folder)
    sharded = type(model).from_pretrained(path)
    blocks = [
        module for module in sharded.modules() if type(module).__name__ in sharded._no_split_modules
    ]
    assert len(blocks) == 1 + model.config.num_hidden_layers
    for block in blocks:
        fully_shard(block)
    return model, sharded


@check
def token_attention_with_fsdp(layout: str, folder: Path) -> None:
    """Check that `token_attention` gathers weights, also for tokens that heads ignore."""
    model, sharded = shard_blocks(layout, folder)
    if layout != "backbone":  # see `fsdp_by_block`
        fully_shard(sharded)
    with torch.no_grad():
        rows = sharded.token_attention(build_own_images())
        expected = model.token_attention(build_own_images())
    assert_close(rows, expected, rtol=1e-5, atol=1e-6)


@check
def data_parallel(layout: str, folder: Path) -> None:
    """Check two steps with DDP; the second is an error if a parameter was unused."""
    accelerator = Accelerator(cpu=True)
    model, path = save_model(layout, folder)
    replica = type(model).from_pretrained(path)
    optimizer = torch.optim.SGD(replica.parameters(), lr=0.1)
    replica, optimizer = accelerator.prepare(replica, optimizer)
    reference = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        compute_loss(model.train(), layout, build_all_images()).backward()
        accelerator.backward(compute_loss(replica.train(), layout, build_own_images()))
        for each in (reference, optimizer):
            each.step()
            each.zero_grad()
    assert_same_weights(model, accelerator.unwrap_model(replica))


def tokens_are_gathered(folder: Path) -> None:
    """Check that the tokens of all processes are those of one, by group; one group is empty."""
    model = build_random(vitcls.ViTCLSModel, image_size=[16, 24], num_register_tokens=4)
    with torch.no_grad():
        gathered = Accelerator(cpu=True).gather(model(build_own_images()))
        expected = model(build_all_images())
    assert gathered.tokens["registers"].shape == (2 * NUM_PROCESSES, 4, 16)
    assert_close(gathered.tokens, expected.tokens, rtol=1e-5, atol=1e-6)


def build_training_loop(folder: Path, objective: Objective) -> TrainingLoop:
    """Build a training loop of four steps, which calls `objective(model, batch)`."""
    accelerator = Accelerator(cpu=True)
    model, _ = save_model("one CLS", folder)
    optimizer = torch.optim.SGD(build_parameter_groups(model, weight_decay=0.0), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    plan = build_plan(8, NUM_PROCESSES, max_steps=4, batch_size=2)
    reporter = Reporter(folder / "metrics.jsonl", accelerator)
    store = CheckpointStore(folder / "checkpoints", num_kept=1)
    return TrainingLoop(
        model=prepared,
        optimizer=optimizer,
        objective=objective,
        evaluate_model=dict,
        plan=plan,
        warmup=0.1,
        accelerator=accelerator,
        reporter=reporter,
        store=store,
        signals=SignalHandler(),
    )


NO_IMAGES = {"errors": {}}  # a batch of two readable images, without the images


def random_numbers_per_process(folder: Path) -> None:
    """Check that random numbers differ between processes and steps, and repeat."""

    def draw(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        drawn.append(torch.rand(4))
        return {"loss": compute_loss(model, "one CLS", build_own_images())}

    runs = []
    for _ in range(2):
        drawn: list[torch.Tensor] = []
        loop = build_training_loop(folder, draw)
        for _ in range(2):
            loop.run_optimizer_step(itertools.repeat(NO_IMAGES))
        numbers: list[Any] = [None] * NUM_PROCESSES
        distributed.all_gather_object(numbers, drawn)
        runs.append([tuple(each.tolist()) for process in numbers for each in process])
    assert len(set(runs[0])) == 2 * NUM_PROCESSES
    assert runs[0] == runs[1]


def non_finite_loss_stops_all_processes(folder: Path) -> None:
    """Check that a non-finite loss on either process stops both, and that no weight changes."""

    def get_loss(failing: int, model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        loss = compute_loss(model, "one CLS", build_own_images())
        if distributed.get_rank() == failing:
            return {"loss": loss + math.inf}
        return {"loss": loss, "logged": loss}

    for failing in range(NUM_PROCESSES):
        loop = build_training_loop(folder, functools.partial(get_loss, failing))
        before = [parameter.detach().clone() for parameter in loop.model.parameters()]
        with pytest.raises(RunStopped):
            loop.run_optimizer_step(itertools.repeat(NO_IMAGES))
        for parameter, value in zip(loop.model.parameters(), before, strict=True):
            assert torch.equal(parameter, value)
            assert parameter.grad is None


def signal_to_one_process_is_known_to_all(folder: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with SignalHandler() as interruption:
            assert interruption.get_signal() is None
            if distributed.get_rank() == 1:
                signal.raise_signal(number)
            assert interruption.get_signal() == number.name


def error_of_the_main_process_is_raised_by_all(folder: Path) -> None:
    """Check a checkpoint that cannot be written."""
    (folder / "a file").touch()
    store = CheckpointStore(folder / "a file", num_kept=1)
    with pytest.raises(OSError, match="cannot write the checkpoint of step 1"):
        run_on_main(lambda: store.save(1, {"model": {"x": torch.ones(1)}}, {"step": 1}))


CHECKS |= {
    function.__name__: function
    for function in (
        tokens_are_gathered,
        random_numbers_per_process,
        non_finite_loss_stops_all_processes,
        signal_to_one_process_is_known_to_all,
        error_of_the_main_process_is_raised_by_all,
    )
}


def save_model(layout: str, folder: Path) -> tuple[Any, Path]:
    """Return the model of a layout, equal in all processes, and its saved folder."""
    model_class, overrides = LAYOUTS[layout]
    model = build_random(model_class, image_size=[16, 24], **overrides).train()
    path = folder / layout.replace(" ", "_")
    if distributed.get_rank() == 0:
        model.save_pretrained(path)
    distributed.barrier()
    return model, path


def build_all_images() -> torch.Tensor:
    """Return the images of all processes, [4, 3, 16, 24]."""
    return torch.rand(2 * NUM_PROCESSES, 3, 16, 24, generator=torch.Generator().manual_seed(1))


def build_own_images() -> torch.Tensor:
    """Return the images of this process, [2, 3, 16, 24]."""
    return build_all_images().chunk(NUM_PROCESSES)[distributed.get_rank()]


def compute_loss(model: Any, layout: str, images: torch.Tensor) -> torch.Tensor:
    """Return a mean loss over images. The labels depend only on the images."""
    model_class, _ = LAYOUTS[layout]
    labels = (images[:, 0, 0, 0] * 100).long()  # [B]
    if model_class is vitcls.ViTCLSForImageClassification:
        return model(images, labels=labels % 2).loss
    if model_class is vitcls.ViTCLSForMultiTaskClassification:
        return model(images, labels={"species": labels % 3, "age": labels % 2}).loss
    if model_class is vitcls.ViTCLSForMaskedImageModeling:
        return model(images, bool_masked_pos=torch.arange(6).expand(len(images), -1) % 2 == 0).loss
    return torch.stack([features.square().mean() for features in model(images).feature_maps]).sum()


def compare_a_step(layout: str, model: Any, sharded: Any) -> None:
    """Check that an SGD step of a sharded model equals a step on one process.

    Each process has half of the batch.
    """
    assert any(hasattr(weight, "full_tensor") for weight in sharded.parameters())
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, sharded)]
    compute_loss(model.train(), layout, build_all_images()).backward()
    compute_loss(sharded.train(), layout, build_own_images()).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_same_weights(model, sharded)


def assert_same_weights(model: Any, other: Any) -> None:
    """Check that weights are equal up to rounding."""
    found = [gather(weight.detach()) for weight in other.parameters()]
    assert_close(found, list(model.parameters()), rtol=1e-4, atol=1e-6)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor of a sharded or plain tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def write_report(folder: Path) -> None:
    """Call every check on all processes.

    FOLDER/report.json contains the errors of each check on all processes, or an empty string.
    """
    report = {}
    for name, run_check in CHECKS.items():
        try:
            run_check(folder)
            error = ""
        except Exception:
            error = traceback.format_exc()
        errors = [""] * NUM_PROCESSES
        distributed.all_gather_object(errors, error)
        report[name] = "\n".join(
            f"process {rank}: {text}" for rank, text in enumerate(errors) if text
        )
    if distributed.get_rank() == 0:
        write_json(folder / "report.json", report)


def main(folder: Path) -> None:
    """Run every check."""
    torch.set_num_threads(1)
    limit = InitProcessGroupKwargs(timeout=timedelta(seconds=60))
    Accelerator(cpu=True, kwargs_handlers=[limit])  # starts the process group
    write_report(folder)
    distributed.barrier()  # the first process to exit would stop the other
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
