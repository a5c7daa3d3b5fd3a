"""Build the plan of the batches of a run from training options."""

from typing import Any

from modeling_vitcls.data.sampling import BatchPlan
from modeling_vitcls.training.loop import build_batch_plan
from modeling_vitcls.training.options import FinetuneOptions


def build_plan(num_images: int, num_processes: int = 1, **options: Any) -> BatchPlan:
    run = FinetuneOptions(model="vitcls-tiny", dataset="digits", output_dir="out", **options)
    return build_batch_plan(num_images, run, num_processes)
