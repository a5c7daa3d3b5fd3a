"""The section of a card on a training run: hyperparameters, recipe, teacher and duration."""

import re
from dataclasses import fields
from typing import Any

import yaml

from ..configuration_vitcls import ViTCLSConfig
from ..hub.local_paths import strip_folders
from ..hub.provenance import Provenance
from ..inference.metric_tables import format_name
from ..options import LeJEPAOptions, MAEOptions
from .model_folder import ModelFolder


# Flags that have no effect during pre-training.
FINETUNING_FLAGS = (
    *("label_smoothing", "class_balance", "trainable", "feature_views", "lora_rank", "mixup", "cutmix"),
    *("pooling", "cls_pooling", "head_type"),
)
# Names or prefixes of the flags that set the destination of a push.
PUSH_FLAGS = ("push_to_hub", "hub_")
# Names or prefixes of the flags that are not part of the recipe: they start, resume or publish a run.
NON_RECIPE_FLAGS = (*PUSH_FLAGS, "resume", "overwrite", "dry_run", "eval_", "license", "card_samples")
# Flag -> label in the table, and the value for which the hyperparameter is not listed, because it has no effect.
HYPERPARAMETERS: dict[str, tuple[str, Any]] = {
    "learning_rate": ("Peak learning rate (cosine decay to 0)", None),
    "warmup": ("Warmup, fraction of the steps", 0.0),
    "layer_decay": ("Layer-wise learning rate decay", 1.0),
    "weight_decay": ("Weight decay", 0.0),
    "max_gradient_norm": ("Maximum gradient norm", None),
    "trainable": ("Trainable parameters", "full"),
    "select": ("Saved checkpoint (selected on images that are excluded from the results)", "last"),
    "patience": ("Evaluations without improvement before stopping", None),
    "ema_decay": ("Decay of the weight average (EMA)", None),
    "label_smoothing": ("Label smoothing", 0.0),
    "class_balance": ("Class balancing", "none"),
    "method": ("Method", None),
    "global_crops": ("Global crops per image", None),
    "local_crops": ("Local crops per image", None),
    "global_crop_scale": ("Minimum area of global crops, fraction of the image", None),
    "sigreg_weight": ("Weight of SIGReg", None),
    "mask_ratio": ("Mask ratio", None),
    "decoder_layers": ("Layers of the decoder", None),
    "crop_scale": ("Minimum area of a random crop, fraction of the image", 1.0),
    "flip": ("Random horizontal flip", False),
    "rotation": ("Maximum rotation, degrees", 0.0),
    "shift": ("Maximum shift, fraction of the image", 0.0),
    "zoom": ("Maximum zoom", 0.0),
    "auto_augment": ("Automatic augmentation", "none"),
    "random_erasing": ("Probability of random erasing", 0.0),
    "mixup": ("Mixup, alpha", 0.0),
    "cutmix": ("CutMix, alpha", 0.0),
    "repeated_augmentation": ("Copies of each image per step", 1),
    "seed": ("Seed", None),
}


def describe_training(folder: ModelFolder) -> dict[str, Any]:
    """Return the variables of the section "Training", on data, recipe, duration, speed and environment."""
    config, results, flags = folder.config, folder.results, folder.flags
    is_pretraining = "method" in results
    if is_pretraining:
        other_options = MAEOptions if results["method"] == "lejepa" else LeJEPAOptions
        unused_flags = {*FINETUNING_FLAGS} | {field.name for field in fields(other_options)}
        flags = {flag: value for flag, value in flags.items() if flag not in unused_flags}
    shareable_flags = get_shareable_flags(flags)
    recipe = {name: value for name, value in shareable_flags.items() if not name.startswith(NON_RECIPE_FLAGS)}
    recipe_text = yaml.safe_dump(recipe, sort_keys=False).strip()
    seconds = results["seconds"]
    return {
        "hyperparameters": list_hyperparameters(config, results, flags),
        "teacher": describe_teacher(flags, folder.teacher_provenance),
        "seconds": f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}",
        "command": "pretrain" if is_pretraining else "finetune",
        "recipe": recipe_text,
        "fence": max(["```", *(f"{backticks}`" for backticks in re.findall("`+", recipe_text))], key=len),
    }


def list_hyperparameters(
    config: ViTCLSConfig | None, results: dict[str, Any], flags: dict[str, Any]
) -> dict[str, str]:
    """Return a dict that maps the label of each hyperparameter that has an effect to its value."""
    rows = {"Optimizer": "AdamW"}
    if "batch_size" in flags:
        num_images = flags["batch_size"] * flags.get("gradient_accumulation_steps", 1) * results["num_processes"]
        rows["Images per step"] = f"{num_images:,}"
    rows["Steps"] = f"{results['steps']:,}"
    for flag, (label, value_without_effect) in HYPERPARAMETERS.items():
        value = flags.get(flag)
        if value is not None and value != value_without_effect:
            rows[label] = ("yes" if value else "no") if isinstance(value, bool) else format_value(value)
    if config is None:
        return rows
    if config.drop_path_rate:
        rows["Stochastic depth, rate at the last layer"] = format_value(config.drop_path_rate)
    # Patches are dropped only if the first layer or an embedding, such as the distillation token, is trainable.
    is_first_layer_trainable = flags.get("trainable", "full") in ("full", "lora", f"last-{config.num_hidden_layers}")
    if config.patch_drop_rate and (is_first_layer_trainable or flags.get("teacher")):
        rows["Patch dropout rate"] = format_value(config.patch_drop_rate)
    return rows


def format_value(value: Any) -> str:
    """Return a number without trailing zeros; any other value as a string."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def describe_teacher(flags: dict[str, Any], teacher_provenance: Provenance | None) -> str | None:
    """Return sentences about the teacher and its license, or None if there is no teacher."""
    if not flags.get("teacher"):
        return None
    label = teacher_provenance.license_label if teacher_provenance else None
    license_text = f" License of the teacher: {label}." if label else ""
    target_names = {"hard": "predicted class", "soft": "predicted probabilities"}
    targets = target_names.get(flags.get("distillation", ""), "predictions")
    name = format_name(strip_folders(flags["teacher"]))
    return f"The distillation token was trained on the {targets} of the teacher {name}.{license_text}"


def get_shareable_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the flags for publication, without unset flags, local folders or push destinations."""
    sources = {name: strip_folders(flags[name]) for name in ("dataset", "model", "teacher") if flags.get(name)}
    shareable_paths = sources | {"output_dir": "my-model"}
    return {
        name: shareable_paths.get(name, value)
        for name, value in flags.items()
        if value is not None and not name.startswith(PUSH_FLAGS)
    }
