"""Build options of tiny training runs, and read the logs of the runs."""

import json
from pathlib import Path
from typing import Any

from helpers.accelerate_state import reset_accelerate
from modeling_vitcls.api import build_options
from modeling_vitcls.options import AugmentationOptions, FinetuneOptions, ModelOptions
from modeling_vitcls.training.task import Task, run_task


TINY = ModelOptions(
    model="vitcls-tiny",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=32,
    patch_size=16,
    num_register_tokens=2,
)
PLAIN = AugmentationOptions(crop_scale=1.0, flip=False, shift=0.0)


def build_tiny_options(output_dir: Path, dataset: object, kind: type = FinetuneOptions, **flags: Any) -> Any:
    """Return options of a training run of a tiny model, or of `model`, in this process. `flags` sets further flags."""
    model = {} if "model" in flags else vars(TINY)
    settings = {**model, **vars(PLAIN), "num_workers": 0, "report": False} | flags
    return build_options(kind, output_dir=output_dir, dataset=str(dataset), **settings)


def run_to_folder(task_class: type[Task], options: Any) -> Path:
    """Run a task in this process, for a fixture of a module, and return the output folder."""
    reset_accelerate()
    run_task(task_class(options))
    return options.output_dir


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
