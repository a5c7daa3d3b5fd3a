"""How a model was trained, as the last part of any card: data, recipe, effort, speed, environment.

The text is in model_cards/training.md.j2.
"""

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Template

from ..configuration_vitcls import ViTCLSConfig
from .local_paths import without_folders
from .provenance import Origin


PLACES = (Path(__file__).parents[1] / "model_cards", Path(__file__).parents[2] / "model_cards")  # installed, checkout
TEMPLATE = next((place for place in PLACES if place.is_dir()), PLACES[-1]) / "template.md.j2"

# Flags that say how to start or publish a run: nothing for those who repeat it.
NO_RECIPE = ("resume", "overwrite", "dry_run", "push_to_hub", "hub_", "eval_", "license", "card_samples")
# Flag -> what it is called in the table, and the value with which it does nothing.
HYPERPARAMETERS: dict[str, tuple[str, Any]] = {
    "learning_rate": ("Highest learning rate (then a cosine to 0)", None),
    "warmup": ("Part of the steps over which it rises", 0.0),
    "layer_decay": ("Its factor from layer to layer", 1.0),
    "weight_decay": ("Weight decay", 0.0),
    "max_gradient_norm": ("Largest gradient norm", None),
    "trainable": ("Trained", "full"),
    "ema_decay": ("Moving average of the weights", None),
    "label_smoothing": ("Label smoothing", 0.0),
    "class_balance": ("Balance of the classes", "none"),
    "mask_ratio": ("Part of the patches that is hidden", None),
    "mask_block": ("Side of the hidden squares, patches", 1),
    "crop_scale": ("Smallest part that a random crop keeps", 1.0),
    "flip": ("Mirrored at random", False),
    "rotation": ("Largest rotation, degrees", 0.0),
    "shift": ("Largest shift, part of the image", 0.0),
    "zoom": ("Largest zoom", 0.0),
    "auto_augment": ("Automatic augmentation", "none"),
    "random_erasing": ("Probability of random erasing", 0.0),
    "mixup": ("Mixup, alpha", 0.0),
    "cutmix": ("CutMix, alpha", 0.0),
    "repeated_augmentation": ("Copies of an image in a step", 1),
    "seed": ("Seed", None),
}


def training_section(
    config: ViTCLSConfig, results: dict[str, Any], flags: dict[str, Any], script: str, teacher: Origin | None
) -> str:
    """The text.

    Args:
        config: of the model.
        results: what results.json holds.
        flags: the run's flags.
        script: that repeats the run.
        teacher: of a distillation.
    """
    template = Template(TEMPLATE.with_name("training.md.j2").read_text(encoding="utf-8"))
    return template.render(
        config=config,
        results=results,
        hyperparameters=hyperparameters(config, results, flags),
        teacher=teacher_in_words(flags, teacher),
        seconds=seconds_in_words(results["seconds"]),
        energy=energy_in_words(results.get("energy")),
        utilisation=utilisation_in_words(results.get("utilisation")),
        script=script,
        recipe=yaml.safe_dump(recipe(flags), sort_keys=False).strip(),
    ).strip()


def hyperparameters(config: ViTCLSConfig, results: dict[str, Any], flags: dict[str, Any]) -> dict[str, str]:
    """The rows of the table: those settings that did something."""
    rows = {"Optimiser": "AdamW"}
    if "batch_size" in flags:
        images = flags["batch_size"] * flags.get("gradient_accumulation_steps", 1) * results["num_processes"]
        rows["Images per step"] = f"{images:,}"
    rows["Steps"] = f"{results['steps']:,}"
    for flag, (label, neutral) in HYPERPARAMETERS.items():
        value = flags.get(flag)
        if value is not None and value != neutral:
            rows[label] = ("yes" if value else "no") if isinstance(value, bool) else shown(value)
    if config.drop_path_rate:
        rows["Stochastic depth, rate at the last layer"] = shown(config.drop_path_rate)
    if config.patch_drop_rate and trains_first_layers(config, flags):
        rows["Part of the patches left out in training"] = shown(config.patch_drop_rate)
    return rows


def trains_first_layers(config: ViTCLSConfig, flags: dict[str, Any]) -> bool:
    """Whether anything learns at the encoder's beginning, where patches are left out; a teacher's token does."""
    trainable = flags.get("trainable", "full")
    return trainable in ("full", "lora", f"last-{config.num_hidden_layers}") or bool(flags.get("teacher"))


def shown(value: Any) -> str:
    """A number without needless digits; anything else as it is."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def seconds_in_words(seconds: float) -> str:
    """With a decimal where it was short."""
    return f"{seconds:,.0f}" if seconds >= 10 else f"{seconds:.1f}"


def energy_in_words(estimate: dict[str, Any] | None) -> str | None:
    """In the unit that suits it; None where there is no estimate."""
    if estimate is None:
        return None
    kilowatt_hours = estimate["kilowatt_hours"]
    return f"{kilowatt_hours:.3g} kWh" if kilowatt_hours >= 0.1 else f"{kilowatt_hours * 1000:.2g} Wh"


def utilisation_in_words(measured: dict[str, Any] | None) -> str | None:
    """Return a sentence with the utilization and the peak; None if the peak was not measured."""
    if measured is None:
        return None
    share = measured["of_training_steps"]
    if share is None:
        return "Its model FLOPs utilization is unknown, since other programs disturbed the measurements of the peak."
    return (
        f"Its steps reached {share:.1%} of the speed of large matrix products there, measured "
        f"before and during training: {measured['gemm_peak_flops_per_second'] / 1e9:,.0f} GFLOP/s in "
        f"{measured['gemm_dtype']}. Counted are {measured['training_flops_per_image'] / 1e6:,.0f} million "
        "floating-point operations an image, forward and backward, and nothing that is computed a second time."
    )


def teacher_in_words(flags: dict[str, Any], teacher: Origin | None) -> str | None:
    """Who taught, how, and under which licence; None without a teacher."""
    if not flags.get("teacher"):
        return None
    known = teacher.license_in_words if teacher else None
    licensed = f" Licence of the teacher: {known}." if known else ""
    kind = {"hard": "its answer", "soft": "its probabilities"}.get(flags.get("distillation", ""), "its answers")
    return f"The distillation token learned {kind} from the teacher `{without_folders(flags['teacher'])}`.{licensed}"


# Flags without this machine ------------------------------------------------------------------------------------------


def recipe(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags with which a reader repeats the run."""
    return {name: value for name, value in shareable(flags).items() if not name.startswith(NO_RECIPE)}


# Flags of a run that say where it was pushed to: nothing for those who repeat it.
PUSH_FLAGS = ("push_to_hub", "hub_")


def shareable(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that a reader can use: those that were set, without paths of the machine they were used on, and
    without its owner's pushes."""
    paths = {"output_dir": "my-model"}
    for name in ("dataset", "model", "teacher"):
        if flags.get(name):
            paths[name] = without_folders(flags[name])
    return {
        name: paths.get(name, value)
        for name, value in flags.items()
        if value is not None and not name.startswith(PUSH_FLAGS)
    }
