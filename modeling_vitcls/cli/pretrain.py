"""`vitcls pretrain`: pre-train a ViT on images without labels, with LeJEPA or MAE.

    vitcls pretrain --model vitcls-tiny --dataset path/to/images --output-dir runs/pretrained
    vitcls finetune --model runs/pretrained --dataset path/to/labeled --output-dir runs/mine

To continue an interrupted run, repeat the command with --resume. --dry-run tests all stages of a run with a few steps.
The training is implemented in modeling_vitcls/training/run.py and pretrain.py.
"""

from ..options import PretrainOptions
from .finetune import run as run  # the same for both kinds of training


OPTIONS_CLASS = PretrainOptions
COMMON_FLAGS = {
    "input and output": "model dataset output_dir config",
    "model": "method num_register_tokens image_size patch_size",
    "training": "epochs batch_size learning_rate mask_ratio mixed_precision seed",
    "run": "resume overwrite dry_run log_with push_to_hub hub_model_id",
}
