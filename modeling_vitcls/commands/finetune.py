"""`vitcls finetune`: fine-tune a ViT on labeled images.

    vitcls finetune --config scripts/recipes/digits.yaml --output-dir runs/digits
    vitcls finetune --model vitcls-tiny --dataset path/to/images --output-dir runs/mine

To continue an interrupted run, repeat the command with --resume. --dry-run tests all stages of a run with a few steps.
The training is implemented in modeling_vitcls/training/task.py and finetune.py.
"""

from typing import TYPE_CHECKING, Any

from ..options import FinetuneOptions
from .parsing import exit_with_message


if TYPE_CHECKING:
    from ..training.task import Task


OPTIONS_CLASS = FinetuneOptions
# Flags in `--help`, by group; `--help-all` shows all flags
COMMON_FLAGS = {
    "input and output": "model dataset output_dir config label_column held_out_fraction",
    "model": "num_register_tokens image_size fit pooling",
    "training": "epochs batch_size learning_rate trainable mixed_precision auto_augment mixup class_balance seed",
    "run": "resume overwrite dry_run log_with push_to_hub hub_model_id",
}


def run(options: FinetuneOptions) -> None:
    """Fine-tune the model, or test the run if --dry-run is set."""
    from ..training.finetune import FinetuneTask

    train(FinetuneTask, options)


def train(task_class: "type[Task]", options: Any) -> None:
    """Run a training task. If the run is interrupted or fails, exit with its exit status."""
    from ..api import run_training
    from ..training.runner import RunStopped

    try:
        run_training(task_class, options)
    except RunStopped as stopped:
        exit_with_message(str(stopped), stopped.exit_status, stopped.is_on_all_processes)
