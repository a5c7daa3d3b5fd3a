"""The training loop.

    pixels -> model -> loss -> gradients, accumulated -> clipped -> AdamW        and, now and then, a line of metrics

What changes from step to step is in `TrainingState`. The order of the pictures, their augmentation, the learning rate
and the random numbers inside the model are all functions of the step, so nothing else describes where a run stands.
What is trained, and on which loss, is the caller's.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from .batches import BatchPlan, seed_for
from .optimisation import learning_rate_at
from .options import TrainingOptions


Batch = dict[str, torch.Tensor]
Metrics = dict[str, Any]


@dataclass
class TrainingState:
    """All that a run changes; model and optimiser as `Accelerator.prepare` returned them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0  # optimiser steps done


def train(
    state: TrainingState,
    batches: Iterator[Batch],
    loss_function: Callable[[nn.Module, Batch], torch.Tensor],
    plan: BatchPlan,
    options: TrainingOptions,
    accelerator: Accelerator,
    evaluate: Callable[[], Metrics],
    log: Callable[[Metrics], None],
) -> Metrics:
    """Train from `state.step` to `plan.num_steps`, and return the metrics of the evaluation at the end.

    Args:
        batches: this process's batches on the CPU, `gradient_accumulation_steps` of them per step, from `state.step`.
        loss_function: model and batch, on the device -> mean loss over the batch.
        evaluate: metrics of the model as it is; called on all processes.
        log: takes one record per logged step; called on all processes.
    """
    model, optimizer = state.model, state.optimizer
    meter = Meter(accelerator, plan)
    metrics: Metrics = {}
    model.train()
    while state.step < plan.num_steps:
        learning_rate = learning_rate_at(state.step, plan.num_steps, options)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        for accumulated in range(plan.accumulation_steps):
            batch = {name: tensor.to(accelerator.device, non_blocking=True) for name, tensor in next(batches).items()}
            torch.manual_seed(seed_for(plan.seed, state.step, accumulated, accelerator.process_index))
            with accelerator.accumulate(model):
                loss = loss_function(model, batch)
                accelerator.backward(loss)  # divides by the accumulation steps
                if accelerator.sync_gradients:
                    gradient_norm = accelerator.clip_grad_norm_(model.parameters(), options.max_gradient_norm)
                optimizer.step()  # waits for the last accumulated batch, and so does zero_grad
                optimizer.zero_grad()
            meter.add(loss)
        state.step += 1

        is_last = state.step == plan.num_steps
        evaluates = is_last or ends_epochs(state.step, options.evaluate_every, plan)
        if evaluates or state.step % options.log_every == 0:
            record = {
                "step": state.step,
                "epoch": round(plan.epochs_after(state.step), 4),
                "learning_rate": learning_rate,
                "gradient_norm": round(float(gradient_norm), 6),
                **meter.read(),
            }
            if evaluates:
                model.eval()
                metrics = evaluate()
                model.train()
                meter.restart_clock()
            log(record | ({f"held_out_{name}": value for name, value in metrics.items()} if evaluates else {}))
    return metrics


def ends_epochs(step: int, every: int, plan: BatchPlan) -> bool:
    """Whether the step completes another `every` epochs."""
    return math.floor(plan.epochs_after(step) / every) > math.floor(plan.epochs_after(step - 1) / every)


class Meter:
    """Mean loss and images per second, over all processes, since the last reading. Evaluation time is left out."""

    def __init__(self, accelerator: Accelerator, plan: BatchPlan) -> None:
        self.accelerator = accelerator
        self.plan = plan
        self.losses: list[torch.Tensor] = []
        self.restart_clock()

    def add(self, loss: torch.Tensor) -> None:
        """Note the loss of one batch, without waiting for the device."""
        self.losses.append(loss.detach())

    def read(self) -> Metrics:
        """The figures since the last reading."""
        loss = self.accelerator.reduce(torch.stack(self.losses).mean(), reduction="mean").item()
        pictures = len(self.losses) * self.plan.batch_size * self.plan.num_processes
        images_per_second = pictures / (time.perf_counter() - self.started)
        self.losses.clear()
        self.restart_clock()
        return {"loss": round(loss, 6), "images_per_second": round(images_per_second, 1)}

    def restart_clock(self) -> None:
        """Leave out the time until now."""
        self.started = time.perf_counter()
