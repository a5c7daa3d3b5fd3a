"""`vitcls finetune`: fine-tune a ViT on labeled images.

    accelerate launch scripts/finetune.py --config scripts/recipes/digits.yaml --output-dir runs/digits
    accelerate launch scripts/finetune.py --model vitcls-tiny --dataset path/to/images --output-dir runs/mine

To continue an interrupted run, repeat its command with --resume. With --dry-run, one step of everything is tried. The
training is implemented in modeling_vitcls/training/task.py and finetune.py.
"""

from typing import TYPE_CHECKING, Any

from ..options import FinetuneOptions
from .parsing import errors_in_one_line, stop


if TYPE_CHECKING:
    from ..training.task import Task


OPTIONS = FinetuneOptions


def run(options: FinetuneOptions) -> None:
    """Fine-tune the model, or try everything once for --dry-run."""
    from ..training.finetune import FinetuneTask

    train(FinetuneTask, options)


def train(task_class: "type[Task]", options: Any) -> None:
    """Run a task, or try everything once for --dry-run. A run that stops early ends the program with its exit
    status."""
    from ..training.runner import RunStopped
    from ..training.task import dry_run, run_folds, run_task

    try:
        with errors_in_one_line():
            if options.run.dry_run:
                dry_run(task_class, options)
            elif options.data.folds is not None and options.data.fold is None:
                run_folds(task_class, options)
            else:
                run_task(task_class(options))
    except RunStopped as stopped:
        stop(str(stopped), stopped.exit_status, stopped.on_all)
