"""Metrics of a model on labeled images.

Each image is counted exactly once with any number of processes.

The pass over the images is in image_pass.py, the metrics are in metrics.py, and evaluate.py
evaluates a saved model and writes the results.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from rich.console import Console
from scipy.special import expit
from torch import nn

from ..data.labels import LabelSpace
from ..model.heads_vitcls import IGNORED_LABEL
from ..model.modeling_vitcls import ViTCLSImageClassifierOutput
from .image_pass import BatchArrays, ImageOutputs, ImagePass, to_arrays
from .metrics import METRICS, NOTHING_MEASURED, MultiLabelMetrics, select_scalars
from .prediction_rows import DEFAULT_THRESHOLD


@dataclass(frozen=True)
class Predictions:
    """Logits of a model for the readable images that have a label, and their metrics.

    They are the same on every process.
    """

    label_space: LabelSpace
    outputs: ImageOutputs  # The values are logits [N, L]
    metrics: dict[str, Any]
    threshold: float = (
        DEFAULT_THRESHOLD  # The probability from which one of several labels is predicted
    )

    def list_wrong(self) -> np.ndarray:
        """List the indices of the images with another predicted label, or others, than their own."""
        logits = self.outputs.values
        labels = self.outputs.labels
        if labels.ndim == 1:
            return self.outputs.indices[logits.argmax(axis=1) != labels]
        are_right = (expit(logits) >= self.threshold) == (labels > 0.5)
        return self.outputs.indices[~are_right.all(axis=1)]


def build_predictions(label_space: LabelSpace, outputs: ImageOutputs) -> Predictions:
    """Measure logits that are known on every process, with one label or several."""
    state = PartialState()
    metrics = METRICS[label_space.kind](label_space, state.device)
    # Metrics are summed over the processes
    own = slice(state.process_index, None, state.num_processes)
    logits, labels = (
        torch.from_numpy(array[own]).to(state.device) for array in (outputs.values, outputs.labels)
    )
    metrics.update(ViTCLSImageClassifierOutput(logits=logits), labels)
    return Predictions(label_space, outputs, round_floats(metrics.compute()))


class Evaluator(ImagePass):
    """Evaluates models on a fixed set of labeled images. It takes the arguments of `ImagePass`.

    With `task`, it evaluates this added task. With `threshold`, one of several labels is predicted
    from this probability on.
    """

    task: str | None = None
    threshold = DEFAULT_THRESHOLD
    pass_name = "evaluating"

    def predict(self, model: nn.Module, console: Console | None = None) -> Predictions:
        """Measure a model with one label or several, and keep the logits of each labeled image.

        All processes must call this method.
        """
        parts: list[BatchArrays] = []
        metrics = self(model, console, parts)
        outputs = self.gather(parts)
        if outputs.labels.ndim == 1:
            outputs = outputs.take(outputs.labels != IGNORED_LABEL)
        return Predictions(self.label_space, outputs, metrics, self.threshold)

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        console: Console | None = None,
        parts: list[BatchArrays] | None = None,
    ) -> dict[str, Any]:
        """Evaluate a model on the device in evaluation mode.

        Return the metrics for the kind of labels (metrics.py). The logits of the batches of this
        process are added to `parts`.

        In the returned dict, numbers come before lists and dicts, and the first number is the
        metric for comparing models. `num_unreadable_images` is the number of unreadable images,
        which `num_images` excludes; without images, there are only these two. Floats are rounded to
        six decimals. `console` shows the
        progress (runtime/progress.py).

        Raises:
            ValueError: if all images are unreadable, if more than `MAX_UNREADABLE_IMAGES` images
                are unreadable, or if the outputs of the model for any image are not finite.
        """
        if not len(self.images):
            return NOTHING_MEASURED
        metrics = METRICS[self.label_space.kind](self.label_space, self.accelerator.device)
        if isinstance(metrics, MultiLabelMetrics):
            metrics.threshold = self.threshold

        def compute(pixel_values: torch.Tensor) -> Any:
            outputs = model(pixel_values)
            if self.task is None:
                return outputs
            return ViTCLSImageClassifierOutput(logits=outputs.task_logits[self.task])

        for batch, outputs in self.iterate(model, compute, console):
            metrics.update(outputs, send_to_device(batch.labels, self.accelerator.device))
            if parts is not None:
                parts.append(to_arrays(batch, outputs.logits))
        values = round_floats(metrics.compute())
        return select_scalars(values) | {"num_unreadable_images": self.num_unreadable} | values


def round_floats(value: Any) -> Any:
    """Round all floats to six decimals, also in nested lists and dicts."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list):
        return [round_floats(item) for item in value]
    if isinstance(value, dict):
        return {name: round_floats(item) for name, item in value.items()}
    return value
