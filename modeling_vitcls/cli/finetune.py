"""`vitcls finetune`: fine-tune a ViT on labeled images.

    vitcls finetune --config scripts/recipes/digits.yaml --output-dir runs/digits
    vitcls finetune --model vitcls-tiny --dataset path/to/images --output-dir runs/mine

To continue an interrupted run, repeat the command with --resume. The training is
implemented in modeling_vitcls/training/run.py and finetune.py.
"""

from ..training.options import FinetuneOptions


OPTIONS_CLASS = FinetuneOptions
# Flags in `--help`, by group; `--help-all` shows all flags
COMMON_FLAGS = {
    "files, such as --model facebook/dinov2-small --dataset photos --output-dir runs": {
        "model": "folder, Hub id, timm:NAME, or vitcls-tiny to -large",
        "dataset": "folder with one folder per class, table, Hub id",
        "output_dir": "folder for the model, the card and the report",
        "config": "recipe: a YAML file of flags, or a name such as digits",
        "label_column": "one column, or one per task; default: by name or type",
        "held_out_fraction": "part of the images for evaluation",
    },
    "model, such as --image-size 336 --num-register-tokens 4": {
        "num_register_tokens": "registers; default: the checkpoint's",
        "image_size": "or native; default: as trained, but 224 if above 256",
        "resize": "squash, crop or pad; default: measured",
        "pooling": "cls, mean, cls_mean, max, attention; default: measured",
    },
    "training, such as --epochs 5 --auto-augment rand": {
        "select": "last or best epoch; default: last",
        "epochs": "with steps; default: 5 from a frozen start, or 30",
        "batch_size": "per process; default: 64, or 32 below 10,000 images",
        "learning_rate": "default: from the width and the initial weights",
        "trainable": "full, head, last-N, lora or tokens; default: full",
        "mixed_precision": "auto, no, bf16 or fp16; default: auto",
        "auto_augment": "none, rand or trivial; default: none",
        "mixup": "alpha; default: 0, which is none",
        "class_balance": "none, or weights for imbalanced classes; default: none",
        "seed": "random seed; default: 0",
    },
    "run, such as --resume after an interruption": {
        "resume": "continue the run in --output-dir",
        "overwrite": "replace the run in --output-dir",
        "log_with": "tensorboard, wandb or trackio",
        "push_to_hub": "push the model, and verify it",
        "hub_model_id": "default: in your account, named after --output-dir",
    },
}


def run(options: FinetuneOptions) -> None:
    """Train a model."""
    from .api import run_training

    run_training(options)
