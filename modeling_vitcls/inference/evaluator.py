"""Metrics of a model on labeled images.

Each image is counted exactly once with any number of processes.

The pass over the images is in image_pass.py, the metrics are in metrics.py, and evaluate.py
evaluates a saved model and writes the results.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from rich.console import Console
from torch import nn

from .image_pass import ImageOutput, ImagePass, list_rows
from .metrics import METRICS, select_scalars


@dataclass(frozen=True)
class HeadOutput:
    """The logits of a single head, as the output of a classifier."""

    logits: torch.Tensor
    distillation_logits: None = None


class Evaluator(ImagePass):
    """Evaluates models on a fixed set of labeled images. The arguments are those of `ImagePass`.

    With `task`, the logits are those of this added task.

    With `keep_logits = True`, `rows` contains the logits of the last evaluation for all readable
    images, in their order, on every process.
    """

    keep_logits = False
    task: str | None = None
    rows: Sequence[ImageOutput] = ()
    pass_name = "evaluating"

    @torch.no_grad()
    def __call__(self, model: nn.Module, console: Console | None = None) -> dict[str, Any]:
        """Evaluate a model on the device in evaluation mode.

        Return the metrics for the kind of labels (metrics.py).

        In the returned dict, numbers come before lists and dicts, and the first number is the
        metric for comparing models. `num_unreadable_images` is the number of unreadable images,
        which `num_images` excludes. Floats are rounded to six decimals. `console` shows the
        progress (runtime/progress.py).

        Raises:
            ValueError: if all images are unreadable, if more than `max_unreadable_images` images
                are unreadable, or if the outputs of the model for any image are not finite.
        """
        metrics = METRICS[self.label_space.kind](self.label_space, self.accelerator.device)
        rows: list[ImageOutput] = []

        def compute(pixel_values: torch.Tensor) -> Any:
            return self.compute_outputs(model, pixel_values)

        for batch, outputs in self.iterate(model, compute, console):
            metrics.update(outputs, send_to_device(batch.labels, self.accelerator.device))
            if self.keep_logits:
                rows += list_rows(batch, outputs.logits)
        if self.keep_logits:
            self.rows = self.gather_rows(rows)
        values = round_floats(metrics.compute())
        return select_scalars(values) | {"num_unreadable_images": self.num_unreadable} | values

    def compute_outputs(self, model: nn.Module, pixel_values: torch.Tensor) -> Any:
        """Return the model outputs for images [B, C, H, W]."""
        outputs = model(pixel_values)
        return outputs if self.task is None else HeadOutput(outputs.task_logits[self.task])


def round_floats(value: Any) -> Any:
    """Return the value with all floats rounded to six decimals, also in nested lists and dicts."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list):
        return [round_floats(item) for item in value]
    if isinstance(value, dict):
        return {name: round_floats(item) for name, item in value.items()}
    return value
