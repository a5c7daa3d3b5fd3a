"""Checks of test_distributed_state.py that run in two processes. Start with:

torchrun --nproc-per-node 2 checkpoint_worker.py FOLDER
"""

import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.process_checks import write_report
from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification
from modeling_vitcls.checkpoints import CheckpointStore
from modeling_vitcls.distributed import run_on_main
from modeling_vitcls.training.distributed_state import gather_state, scatter_state
from modeling_vitcls.training.optimizer import Ema
from modeling_vitcls.training.signals import SignalHandler


NUM_PROCESSES = 2
# Three registers, five labels and a width of 30: no size is divisible into even shards.
SIZES: dict[str, Any] = {"image_size": 16, "patch_size": 8, "hidden_size": 30, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 3, "intermediate_size": 45, "num_register_tokens": 3, "num_labels": 5}


class Training:
    """A model on both processes, with an optimizer and a moving average of the weights."""

    def __init__(self, kind: str, seed: int, accelerator: Accelerator) -> None:
        torch.manual_seed(seed)
        model: nn.Module = ViTCLSForImageClassification(ViTCLSConfig(**SIZES))
        if kind == "FSDP2":
            for layer in model.vitcls.layers:
                fully_shard(layer)
            fully_shard(model)
        else:
            model = accelerator.prepare(model)
        self.accelerator = accelerator
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=kind == "DDP")
        self.ema = Ema(model, decay=0.9)

    def run(self, first: int, last: int) -> list[float]:
        """Train from step `first` to step `last` - 1 and return the losses of this process."""
        return [self.step(step) for step in range(first, last)]

    def step(self, step: int) -> float:
        torch.manual_seed(2 * step + self.accelerator.process_index)
        logits = self.model(pixel_values=torch.randn(4, 3, 16, 16)).logits  # [B, labels]
        loss = nn.functional.cross_entropy(logits, torch.arange(4))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(step + 1)
        return loss.item()

    def save(self, store: CheckpointStore, step: int) -> None:
        tensors, facts = gather_state(self.accelerator, self.model, self.optimizer, self.ema.shadow)
        assert bool(tensors["model"]) == self.accelerator.is_main_process
        run_on_main(self.accelerator, lambda: store.save(step, tensors, facts, is_best=False))

    def load(self, store: CheckpointStore) -> None:
        checkpoint = run_on_main(self.accelerator, lambda: store.load_newest(print))
        scatter_state(checkpoint, self.accelerator, self.model, self.optimizer, self.ema.shadow)

    def get_local_tensors(self) -> dict[str, torch.Tensor]:
        """Return copies of all weights, optimizer moments and averages, as stored on this process."""
        moments = {
            f"{place}/{key}": value
            for place, entry in self.optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        shadow = {f"shadow/{place}": tensor for place, tensor in enumerate(self.ema.shadow)}
        return {
            name: (value.to_local() if isinstance(value, DTensor) else value).clone()
            for name, value in (get_model_state_dict(self.model) | moments | shadow).items()
        }


def check_exact_resume(kind: str, folder: Path, accelerator: Accelerator) -> None:
    store = CheckpointStore(folder / kind, num_kept=2)
    training = Training(kind, 0, accelerator)
    training.run(0, 3)
    training.save(store, 3)
    expected = training.run(3, 6)
    resumed = Training(kind, 1, accelerator)
    resumed.load(store)
    assert resumed.run(3, 6) == expected
    tensors = training.get_local_tensors()
    # weights, two moments and a step count, average
    assert len(tensors) > 4 * len(list(training.model.parameters()))
    for name, value in resumed.get_local_tensors().items():
        assert torch.equal(value, tensors[name]), name


def check_other_number_of_shards(folder: Path, accelerator: Accelerator) -> None:
    """Check that DDP loads a checkpoint that FSDP2 saved."""
    store = CheckpointStore(folder / "shards", num_kept=2)
    training = Training("FSDP2", 0, accelerator)
    training.run(0, 2)
    training.save(store, 2)
    resumed = Training("DDP", 1, accelerator)
    resumed.load(store)
    whole, _ = gather_state(accelerator, training.model, training.optimizer, training.ema.shadow)
    again, _ = gather_state(accelerator, resumed.model, resumed.optimizer, resumed.ema.shadow)
    assert whole.keys() == again.keys() == {"model", "optimizer", "ema"}
    for part in whole:
        assert whole[part].keys() == again[part].keys()
        assert all(torch.equal(tensor, again[part][name]) for name, tensor in whole[part].items()), part


def check_signal_to_one_process(folder: Path, accelerator: Accelerator) -> None:
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        with SignalHandler(accelerator) as interruption:
            assert interruption.get_signal() is None
            if accelerator.process_index == 1:
                os.kill(os.getpid(), number)
            assert interruption.get_signal() == number.name
            assert interruption.exit_status == status


def check_save_error_on_all_processes(folder: Path, accelerator: Accelerator) -> None:
    if accelerator.is_main_process:
        (folder / "a file").touch()
    accelerator.wait_for_everyone()
    try:
        Training("DDP", 0, accelerator).save(CheckpointStore(folder / "a file", num_kept=2), 1)
    except OSError as error:
        assert "cannot write the checkpoint of step 1" in str(error)
    else:
        raise AssertionError("no error on this process")


def check_load_error_on_all_processes(folder: Path, accelerator: Accelerator) -> None:
    store = CheckpointStore(folder / "damaged", num_kept=2)
    assert run_on_main(accelerator, lambda: store.load_newest(print)) is None
    training = Training("DDP", 0, accelerator)
    training.save(store, 1)
    if accelerator.is_main_process:
        (store.get_folder(1) / "state.json").unlink()
    try:
        training.load(store)
    except ValueError as error:
        assert "is damaged" in str(error)
    else:
        raise AssertionError("no error on this process")


CHECKS: dict[str, Callable[[Path, Accelerator], None]] = {
    "DDP goes on to the bit": lambda folder, accelerator: check_exact_resume("DDP", folder, accelerator),
    "FSDP2 goes on to the bit": lambda folder, accelerator: check_exact_resume("FSDP2", folder, accelerator),
    "another number of shards": check_other_number_of_shards,
    "only one is asked to stop": check_signal_to_one_process,
    "all learn that it was not saved": check_save_error_on_all_processes,
    "all learn that it cannot be read": check_load_error_on_all_processes,
}


def main() -> None:
    """Run every check."""
    folder = Path(sys.argv[1])
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=60))])
    write_report(CHECKS, folder, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main()
