"""`vitcls finetune`: fine-tune a ViT on labeled images.

    accelerate launch scripts/finetune.py --config scripts/recipes/digits.yaml --output-dir runs/digits
    accelerate launch scripts/finetune.py --model vitcls-tiny --dataset path/to/images --output-dir runs/mine

To continue an interrupted run, repeat its command with --resume. With --dry-run, one step of everything is tried. The
training is implemented in modeling_vitcls/training/finetune.py.
"""

from collections.abc import Callable
from typing import Any

from ..options import FinetuneOptions
from .parsing import errors_in_one_line, stop


OPTIONS = FinetuneOptions


def run(options: FinetuneOptions) -> None:
    """Fine-tune the model, or try everything once for --dry-run."""
    from ..training.finetune import dry_run, finetune
    from ..training.setup import prepare

    train(options, dry_run if options.run.dry_run else lambda checked: finetune(prepare(checked)))


def train(options: Any, run_training: Callable[[Any], object]) -> None:
    """Call `run_training(options)`. A run that stops early ends the program with its exit status."""
    from ..training.runner import RunStopped

    try:
        with errors_in_one_line():
            run_training(options)
    except RunStopped as stopped:
        stop(str(stopped), stopped.exit_status, stopped.on_all)
