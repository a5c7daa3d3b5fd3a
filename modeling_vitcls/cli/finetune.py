"""`vitcls finetune`: fine-tune a ViT on labeled images.

    vitcls finetune --config scripts/recipes/digits.yaml --output-dir runs/digits
    vitcls finetune --model vitcls-tiny --dataset path/to/images --output-dir runs/mine

To continue an interrupted run, repeat the command with --resume. --dry-run tests all stages of a run with a few steps.
The training is implemented in modeling_vitcls/training/run.py and finetune.py.
"""

from ..options import FinetuneOptions, PretrainOptions
from .parsing import exit_with_message


OPTIONS_CLASS = FinetuneOptions
# Flags in `--help`, by group; `--help-all` shows all flags
COMMON_FLAGS = {
    "input and output": "model dataset output_dir config label_column held_out_fraction",
    "model": "num_register_tokens image_size fit pooling",
    "training": "epochs batch_size learning_rate trainable mixed_precision auto_augment mixup class_balance seed",
    "run": "resume overwrite dry_run log_with push_to_hub hub_model_id",
}


def run(options: FinetuneOptions | PretrainOptions) -> None:
    """Train a model, or test the run if --dry-run is set. If the run is interrupted or fails, exit with its exit
    status."""
    from ..runtime.errors import RunStopped
    from .functions import run_training

    try:
        run_training(options)
    except RunStopped as stopped:
        exit_with_message(str(stopped), stopped.exit_status, stopped.is_on_all_processes)
