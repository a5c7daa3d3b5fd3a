"""What a resumed run may change: checks of flags, models, data and plan.

A run records three things, because only the first one is a person's choice:

    flags     the flags as the person set them
    chosen    values that the program derived for some of them, such as the learning rate, the
              image size of a large checkpoint, and the commit of a model on the Hub
    config    values of the model's configuration that no flag set

A resumed run may set a flag as before, or to the value that was derived for it. Derived values are
taken from the record, so that they do not depend on the machine that resumes the run.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..conversion.open_model import is_preset, pin_revision
from ..data.splits import describe_change
from ..hub.local_paths import (
    is_same_source,
    make_relative,
    resolve_name,
)
from ..hub.model_files import CONFIG_FILE, RECIPE_FILE, RESULTS_FILE
from ..runtime.files import read_json, read_text
from ..runtime.flags import to_flags
from .options import ModelOptions, PretrainOptions, TrainOptions


# Flags that may change on --resume, because these flags do not affect the result.
CHANGEABLE_FLAGS = (
    "output_dir num_workers max_unreadable_images batch_size gradient_accumulation_steps resume "
    "overwrite save_every keep_checkpoints log_with report push_to_hub hub_model_id "
    "hub_private hub_verify license card_samples "
    # the precision itself is compared (`check_run_unchanged`)
    "mixed_precision"
).split()
# flags whose values may be paths
PATH_FLAGS = ("dataset", "model", "teacher")
# flags of the model whose values are not in its configuration as they are set, or are chosen by the
# probe after the start
FLAGS_NOT_IN_CONFIG = ("model", "resize", "bit_depth", "cls_scopes", "pooling", "pooled_layers")
CONFIG_FLAGS = [
    field.name for field in fields(ModelOptions) if field.name not in FLAGS_NOT_IN_CONFIG
]


@dataclass(frozen=True)
class RecordedFlags:
    """The flags of a run, and the values that were derived for flags that were not set."""

    flags: dict[str, Any]
    chosen: dict[str, Any]
    config: dict[str, Any]


def resolve_local_paths(options: TrainOptions) -> TrainOptions:
    """Return the options with absolute paths for a local dataset, model and teacher."""
    dataset = resolve_name(options.dataset)
    options = replace(options, dataset=dataset)
    return replace_sources(options, lambda flag, source: resolve_name(source))


def pin_models(options: TrainOptions) -> TrainOptions:
    """Return the options with Hub models pinned to commits.

    Raise ValueError or OSError if a model cannot be found.
    """

    def pin(flag: str, source: str) -> str:
        return source if flag == "model" and is_preset(source) else pin_revision(source)

    return replace_sources(options, pin)


def replace_sources(options: TrainOptions, convert: Callable[[str, str], str]) -> TrainOptions:
    """Return the options with another model and teacher: `convert(flag, value)`."""
    options = replace(options, model=convert("model", options.model))
    if isinstance(options, PretrainOptions) or options.teacher is None:
        return options
    teacher = convert("teacher", options.teacher)
    return replace(options, teacher=teacher)


def get_relative_flags(options: TrainOptions) -> dict[str, Any]:
    """Return all flags of the run, with paths relative to the current directory."""
    options = replace_sources(options, lambda _, source: make_relative(source))
    flags = to_flags(replace(options, dataset=make_relative(options.dataset)))
    return flags | {"output_dir": make_relative(flags["output_dir"])}


def build_flags_record(
    asked: TrainOptions,
    options: TrainOptions,
    config: dict[str, Any],
    recorded: RecordedFlags | None,
) -> dict[str, Any]:
    """Return the fields of `RecordedFlags` for a checkpoint.

    Args:
        asked: the options as the person set them.
        options: the options of the run.
        config: the configuration of the model.
        recorded: the record of the run that is resumed, whose derived values stay derived.
    """
    asked_flags = to_flags(asked)
    flags = get_relative_flags(asked)
    chosen = {
        name: value for name, value in to_flags(options).items() if value != asked_flags[name]
    }
    if recorded is not None:
        derived_names = (recorded.chosen.keys() | recorded.config.keys()).difference(PATH_FLAGS)
        flags |= {name: recorded.flags[name] for name in derived_names}
        chosen = recorded.chosen | chosen
    config = {name: config[name] for name in CONFIG_FLAGS if name in config}
    return {"flags": flags, "chosen": chosen, "config": config}


def read_finished_flags(folder: Path) -> RecordedFlags:
    """Return the flags of a finished run, which has no checkpoints, from its files."""
    flags = yaml.safe_load(read_text(folder / RECIPE_FILE))
    chosen = read_json(folder / RESULTS_FILE).get("chosen_flags", {})
    unset = {name: None for name in chosen if name not in PATH_FLAGS}
    return RecordedFlags(flags | unset, chosen, read_json(folder / CONFIG_FILE))


def use_chosen_values(options: TrainOptions, chosen: dict[str, Any]) -> TrainOptions:
    """Return the options with the values that were derived when the run was started.

    The flags of the resumed run are checked (`check_flags_unchanged`).
    """
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in chosen.items()
        if getattr(options, name) is None or name in PATH_FLAGS
    }
    return replace(options, **values)


def check_flags_unchanged(recorded: RecordedFlags, asked: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if the flags of a resumed run differ from those of the run.

    Args:
        recorded: the flags of the run in `folder`.
        asked: the flags of the resumed run, as the person set them.
        folder: output folder.
    """
    for name, value in recorded.flags.items():
        current_value = asked.get(name)
        accepted_values = [
            value,
            *(values[name] for values in (recorded.chosen, recorded.config) if name in values),
        ]
        if name in CHANGEABLE_FLAGS or any(
            is_same_value(name, accepted, current_value) for accepted in accepted_values
        ):
            continue

        advice = "Use the same flags, or choose a different `output_dir`"
        if name in ("epochs", "max_steps"):
            advice = f"To train for more steps, start another run with `model={str(folder)!r}`"
        raise ValueError(
            f"`resume=True`: the run in {folder} was started with `{name}` "
            f"{format_flag_value(value)}, but the value in this run is "
            f"{format_flag_value(current_value)}. {advice}"
        )


def is_same_value(name: str, stored: Any, current: Any) -> bool:
    """Return whether two values of a flag mean the same. One number sets both image sides."""
    if name in ("image_size", "patch_size"):
        stored, current = (
            [value, value] if isinstance(value, int) else value for value in (stored, current)
        )
    return bool(stored == current) or (name in PATH_FLAGS and is_same_source(stored, current))


def check_run_unchanged(metadata: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if --resume would continue the run with other data or settings.

    These are another precision, and another number of images per step. `metadata` and `current` are
    the values in the checkpoint and in this run.
    """
    if change := describe_change(metadata["data"], current["data"]):
        raise ValueError(
            f"`resume=True`: the dataset has changed since the run in {folder} was started: "
            f"{change}. Restore the dataset, or choose a different `output_dir`"
        )
    if metadata["mixed_precision"] != current["mixed_precision"]:
        raise ValueError(
            f"`resume=True`: the run in {folder} requires "
            f"`mixed_precision={metadata['mixed_precision']!r}`, but the mixed precision of this "
            f"run is {current['mixed_precision']}"
        )
    if metadata["images_per_step"] != current["images_per_step"]:
        raise ValueError(
            f"`resume=True`: the run in {folder} has {metadata['images_per_step']} images per "
            f"step, but this run has {current['images_per_step']}. Restore the product of "
            "`batch_size`, `gradient_accumulation_steps` and the number of processes"
        )


def format_flag_value(value: Any) -> str:
    """Format a flag's value for messages: as on the command line, or "unset" for None."""
    if value is None:
        return "unset"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)
