"""All kinds of work that are compared, by the name that `vitcls benchmark --work` has for them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .attention_reads import ATTENTION_READS, compare_attention
from .comparison import Comparison, chosen
from .forward_passes import FORWARD_PASSES, compare_inference
from .growth import POINTS, TOY_POINTS, compare_growth
from .image_processing import PIXEL_ROWS, compare_pixels
from .inexact import INEXACT, compare_inexact
from .predictions import PREDICTION_ROWS, compare_prediction
from .probes import PROBES, compare_probes
from .training_runs import TOY_RUNS, TRAINING_RUNS, compare_training
from .training_steps import TRAINING_STEPS, compare_steps


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and how often: the flags of the script."""

    against: tuple[str, ...]
    num_pairs: int
    toy: bool
    precision: str = "fp32"  # of growth: the rows of other work name theirs
    device: str = "cpu"


@dataclass(frozen=True)
class Work:
    """The rows of one kind of work, for toy models where they differ, and what measures some of them."""

    rows: dict[str, Any]
    compare: Callable[[tuple[str, ...], Plan], Iterator[Comparison]]
    toy_rows: dict[str, Any] | None = None
    on_gpu: bool = False  # whether it can be measured there

    def names(self, toy: bool) -> list[str]:
        """Of the rows."""
        return list(self.toy_rows if toy and self.toy_rows is not None else self.rows)


WORK = {
    "inference": Work(
        FORWARD_PASSES,
        lambda rows, do: compare_inference(rows, do.against, do.num_pairs, do.toy, do.device),
        on_gpu=True,
    ),
    "growth": Work(
        POINTS,
        lambda rows, do: compare_growth(rows, do.against, do.num_pairs, do.toy, do.precision, do.device),
        TOY_POINTS,
        on_gpu=True,
    ),
    "step": Work(
        TRAINING_STEPS, lambda rows, do: compare_steps(rows, do.against, do.num_pairs, do.toy, do.device), on_gpu=True
    ),
    "inexact": Work(INEXACT, lambda rows, do: compare_inexact(rows, do.num_pairs, do.toy, do.device), on_gpu=True),
    "pixels": Work(PIXEL_ROWS, lambda rows, do: compare_pixels(rows, do.num_pairs, do.toy)),
    "prediction": Work(PREDICTION_ROWS, lambda rows, do: compare_prediction(rows, do.num_pairs, do.toy)),
    "probe": Work(PROBES, lambda rows, do: compare_probes(rows, do.num_pairs, do.toy)),
    "training": Work(TRAINING_RUNS, lambda rows, do: compare_training(rows, do.num_pairs, do.toy), TOY_RUNS),
    "attention": Work(ATTENTION_READS, lambda rows, do: compare_attention(rows, do.num_pairs, do.toy)),
}


def compare(names: tuple[str, ...], rows: tuple[str, ...], plan: Plan) -> Iterator[Comparison]:
    """The rows of these kinds of work: all, or those that are named, wherever there is one of that name.

    Raises:
        ValueError: for a row that none of them has, or work that cannot be done on that device, before anything is
            measured; if outputs differ.
    """
    if plan.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {plan.device}: PyTorch finds no such GPU here: leave it out to measure on the CPU")
    on_cpu_alone = [name for name in names if not WORK[name].on_gpu]
    if plan.device != "cpu" and on_cpu_alone:
        able = ", ".join(name for name, work in WORK.items() if work.on_gpu)
        raise ValueError(f"--work {' '.join(on_cpu_alone)} is measured on the CPU: --device cuda is for {able}")
    of_work = {name: WORK[name].names(plan.toy) for name in names}
    chosen({row: None for known in of_work.values() for row in known}, rows)
    for name, known in of_work.items():
        if wanted := tuple(row for row in known if not rows or row in rows):
            yield from WORK[name].compare(wanted, plan)
