"""Build the plan of the batches of a run from training options."""

from typing import Any

from modeling_vitcls.data.sampling import BatchPlan
from modeling_vitcls.options import TrainingOptions


def build_plan(num_images: int, num_processes: int = 1, **options: Any) -> BatchPlan:
    return BatchPlan.from_options(num_images, TrainingOptions(**options), num_processes)
