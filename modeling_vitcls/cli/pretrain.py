"""`vitcls pretrain`: pre-train a ViT on images without labels, with LeJEPA.

    vitcls pretrain --model vitcls-tiny --dataset path/to/images --output-dir runs/pretrained
    vitcls finetune --model runs/pretrained --dataset path/to/labeled --output-dir runs/mine

To continue an interrupted run, repeat the command with --resume. The training is
implemented in modeling_vitcls/training/run.py and pretraining/pretrain.py.
"""

from ..training.options import PretrainOptions
from .finetune import run as run  # Both kinds of training run in the same way


OPTIONS_CLASS = PretrainOptions
COMMON_FLAGS = {
    "files, such as --model vitcls-tiny --dataset photos --output-dir runs/pretrained": {
        "model": "folder, Hub id, timm:NAME, or vitcls-tiny to -large",
        "dataset": "folder, table or Hub id; labels are not needed",
        "output_dir": "folder for the encoder and the card",
        "config": "recipe: a YAML file of flags",
    },
    "model, such as --image-size 96 --patch-size 8": {
        "num_register_tokens": "registers; default: the preset's or checkpoint's",
        "image_size": "pixels; default: the preset's or checkpoint's",
        "patch_size": "pixels; default: the preset's or checkpoint's",
    },
    "training, such as --epochs 100 --batch-size 128": {
        "epochs": "default: 30, or 10 if pre-trained, from 10,000 images",
        "batch_size": "per process; default: 64, or 32 below 10,000 images",
        "learning_rate": "default: from the width and the initial weights",
        "mixed_precision": "auto, no, bf16 or fp16; default: auto",
        "seed": "random seed; default: 0",
    },
    "run, such as --resume after an interruption": {
        "resume": "continue the run in --output-dir",
        "overwrite": "replace the run in --output-dir",
        "log_with": "tensorboard, wandb or trackio",
        "push_to_hub": "push the encoder, and verify it",
        "hub_model_id": "default: in your account, named after --output-dir",
    },
}
