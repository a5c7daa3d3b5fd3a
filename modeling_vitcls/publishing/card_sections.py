"""The templates of cards, and the sections that several cards share: Use, Citation, ONNX files and Training.

The texts are in model_cards/*.md.j2.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, FileSystemLoader

from ..configuration_vitcls import MIN_TRANSFORMERS_VERSION, ViTCLSConfig
from ..hub.local_paths import strip_folders
from ..hub.provenance import Provenance
from ..version import __version__
from .card_results import METRIC_NAMES, format_name, format_percent
from .code_files import READING_ORDER, compute_code_digest
from .verification_script import get_auto_class


# Jinja environment; templates are loaded from the installed package or from a source checkout.
TEMPLATES = Environment(
    loader=FileSystemLoader([Path(__file__).parents[1] / "model_cards", Path(__file__).parents[2] / "model_cards"])
)


def render_template(template: str, /, **variables: Any) -> str:
    """Return the rendered text of a template in model_cards/."""
    return TEMPLATES.get_template(f"{template}.md.j2").render(variables)


def render_card(template: str, metadata: ModelCardData, /, **variables: Any) -> ModelCard:
    """Return a card rendered from a template in model_cards/."""
    return ModelCard(render_template(template, card_data=metadata.to_yaml(), **variables))


# Use and citation ----------------------------------------------------------------------------------------------------


# Auto class -> the expression that the first code block prints.
PRINTED_OUTPUTS = {
    "AutoModel": "outputs.last_hidden_state.shape",
    "AutoModelForImageClassification": "outputs.logits",
    "AutoModelForMaskedImageModeling": "outputs.reconstruction.shape",
    "AutoBackbone": "[feature_map.shape for feature_map in outputs.feature_maps]",
}
CITATION = f"""## Citation

```bibtex
@software{{modeling_vitcls,
  title = "modeling_vitcls: Vision Transformers with configurable special tokens",
  author = "{{The modeling_vitcls maintainers}}",
  version = "{__version__}",
  year = "2026"
}}
```"""


def build_use_section(
    name: str,
    architecture: str,
    has_pipeline: bool,
    revision: str = "main",
    finetune_dataset: str | None = None,
    is_native: bool = False,
) -> str:
    """Return the section "Use". Its first code block runs without changes; its second code block pins a commit.

    Args:
        name: Hub id of the model, or name of its folder.
        architecture: Name of the model class.
        has_pipeline: Whether the image-classification pipeline supports the model.
        revision: Branch that the first code block loads. Without a revision, transformers would print a warning for
            each code file.
        finetune_dataset: Dataset in the fine-tuning command. Default: the section has no fine-tuning command.
        is_native: Whether the class is part of transformers, in which case no code from the repository runs.
    """
    auto_class = get_auto_class(architecture)
    return render_template(
        "use",
        name=name,
        auto_class=auto_class,
        has_pipeline=has_pipeline,
        newest="" if is_native else f', revision="{revision}", trust_remote_code=True',
        expression=PRINTED_OUTPUTS[auto_class],
        is_native=is_native,
        finetune_dataset=finetune_dataset,
        min_transformers=".".join(map(str, MIN_TRANSFORMERS_VERSION)),
        version=__version__,
        code_digest=compute_code_digest(),
        reading_order=", ".join(f"`{name}`" for name in READING_ORDER),
    ).strip()


def insert_onnx_section(card_text: str, report: dict[str, Any]) -> str:
    """Insert the section "ONNX files" before the citation of a card, unless the card already has the section. `report`
    is the parsed onnx/report.json."""
    if "\n## ONNX files\n" in card_text:
        return card_text
    labeled_scores = report["labeled"]
    rows = []
    for comparison in report["comparisons"]:
        file, agreement = comparison["file"], comparison["top1_agreement"]
        row = [f"`{file}`", f"{comparison['largest_difference']:.1e}", format_percent(agreement)]
        if labeled_scores:
            row.append(format_percent(labeled_scores["files"][Path(file).name]))
        rows.append(row)
    section = render_template(
        "onnx",
        rows=rows,
        labeled=labeled_scores,
        dataset=format_name(labeled_scores["dataset"]) if labeled_scores else None,
        metric=METRIC_NAMES[labeled_scores["metric"]].lower() if labeled_scores else None,
        model_score=format_percent(labeled_scores["model"]) if labeled_scores else None,
    ).strip()
    before, heading, after = card_text.partition("\n## Citation\n")
    return f"{before}\n{section}\n{heading}{after}" if heading else f"{card_text.rstrip()}\n\n{section}\n"


# Training ------------------------------------------------------------------------------------------------------------


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
    "mask_ratio": ("Mask ratio", None),
    "mask_block": ("Side length of the mask blocks, patches", 1),
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


def build_training_section(
    config: ViTCLSConfig,
    results: dict[str, Any],
    flags: dict[str, Any],
    command: str,
    teacher_provenance: Provenance | None,
) -> str:
    """Return the section on data, recipe, duration, speed and environment. `command` is "finetune" or "pretrain"."""
    shareable_flags = get_shareable_flags(flags)
    recipe = {name: value for name, value in shareable_flags.items() if not name.startswith(NON_RECIPE_FLAGS)}
    recipe_text = yaml.safe_dump(recipe, sort_keys=False).strip()
    seconds = results["seconds"]
    return render_template(
        "training",
        config=config,
        results=results,
        hyperparameters=list_hyperparameters(config, results, flags),
        teacher=describe_teacher(flags, teacher_provenance),
        seconds=f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}",
        energy=format_energy(results.get("energy")),
        utilization=describe_utilization(results.get("utilisation")),
        command=command,
        dataset=format_name(results["dataset"]),
        recipe=recipe_text,
        fence=max(["```", *(f"{backticks}`" for backticks in re.findall("`+", recipe_text))], key=len),
    ).strip()


def list_hyperparameters(config: ViTCLSConfig, results: dict[str, Any], flags: dict[str, Any]) -> dict[str, str]:
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


def format_energy(estimate: dict[str, Any] | None) -> str | None:
    """Return the estimated energy consumption in kWh or Wh, or None if there is no estimate."""
    if estimate is None:
        return None
    kilowatt_hours = estimate["kilowatt_hours"]
    value, unit = (kilowatt_hours, "kWh") if kilowatt_hours >= 0.1 else (kilowatt_hours * 1000, "Wh")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def describe_utilization(measurements: dict[str, Any] | None) -> str | None:
    """Return sentences about the FLOPs utilization and the peak throughput, or None if there are no measurements."""
    if measurements is None:
        return None
    fraction = measurements["of_training_steps"]
    if fraction is None:
        return (
            "The model FLOPs utilization is unknown, because other programs interfered with the measurement of the "
            "peak throughput."
        )
    return (
        f"The model FLOPs utilization of the training steps was {fraction:.1%}. The reference is the peak throughput "
        f"of large matrix multiplications, {measurements['gemm_peak_flops_per_second'] / 1e9:,.0f} GFLOP/s in "
        f"{measurements['gemm_dtype']}, measured before and during training. The forward and backward passes for an "
        f"image require {measurements['training_flops_per_image'] / 1e6:,.0f} million floating-point operations, "
        "excluding recomputed operations."
    )


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
