"""What a resumed run may change: checks of flags, models, data and plan.

A run records three things, because only the first one is a person's choice:

    flags     the flags as the person set them
    chosen    values that the program derived for some of them, such as the learning rate, the
              image size of a large checkpoint, and the commit of a model on the Hub
    config    values of the model's configuration that no flag set

A resumed run may set a flag as before, or to the value that was derived for it. Derived values are
taken from the record, so they do not depend on the machine that resumes the run.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

from accelerate.state import AcceleratorState

from ..data.splits import TrainingData, describe_change, describe_data
from ..hub.local_paths import is_same_source, make_relative
from ..model.configuration_vitcls import ViTCLSConfig
from ..runtime.flags import to_flags
from .checkpoints import Checkpoint
from .options import NO_CONFIG_FIELDS, ModelOptions, TrainOptions


# Flags that may change on --resume, because these flags do not affect the result.
CHANGEABLE_FLAGS = (
    "output_dir num_workers batch_size gradient_accumulation_steps resume "
    "overwrite save_every keep_checkpoints log_with report push_to_hub hub_model_id "
    # The precision itself is compared (`check_run_unchanged`)
    "mixed_precision"
).split()
# Flags whose values may be paths
SOURCE_FLAGS = ("model", "teacher")
PATH_FLAGS = ("dataset", *SOURCE_FLAGS)
# The configuration of the model cannot confirm these: it stores another form, or the probe chose them.
FLAGS_NOT_IN_CONFIG = (*NO_CONFIG_FIELDS, "cls_scopes", "pooling", "pooled_layers")
CONFIG_FLAGS = [
    field.name for field in fields(ModelOptions) if field.name not in FLAGS_NOT_IN_CONFIG
]

Options = TypeVar("Options", bound=TrainOptions)
FlagsRecord = dict[str, dict[str, Any]]  # "flags", "chosen" and "config"


def convert_sources(
    options: Options, convert: Callable[[str], str], flags: Iterable[str] = PATH_FLAGS
) -> Options:
    """Replace the dataset, the model and the teacher, as far as they are set and among `flags`."""
    values: dict[str, Any] = {
        name: convert(value)
        for name in flags
        if (value := getattr(options, name, None)) is not None
    }
    return replace(options, **values)


def make_flags_relative(flags: dict[str, Any]) -> dict[str, Any]:
    """Make the local paths among the flags relative to the current directory."""
    names = (*PATH_FLAGS, "output_dir")
    return {name: make_relative(flags[name]) if name in names else flags[name] for name in flags}


def build_flags_record(
    flags: dict[str, Any],
    used_flags: dict[str, Any],
    config: dict[str, Any],
    recorded: FlagsRecord | None,
) -> FlagsRecord:
    """Build the record of the flags for a checkpoint.

    Args:
        flags: the flags as the person set them.
        used_flags: the flags of the run, with derived values.
        config: the configuration of the model.
        recorded: the record of the run that is resumed, whose derived values stay derived.
    """
    # Compared before paths become relative, which would make every path look derived.
    chosen = {name: value for name, value in used_flags.items() if value != flags[name]}
    flags = make_flags_relative(flags)
    # A value that was derived at the first start stays derived, even if the person has typed it
    # since: otherwise the second resumption would compare it as a person's choice.
    if recorded is not None:
        derived = (recorded["chosen"].keys() | recorded["config"].keys()).difference(PATH_FLAGS)
        flags |= {name: recorded["flags"][name] for name in derived}
        chosen = recorded["chosen"] | chosen
    config = {name: config[name] for name in CONFIG_FLAGS if name in config}
    return {"flags": flags, "chosen": chosen, "config": config}


def select_chosen_values(chosen: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Select the values that a resumed run takes from its start: of unset flags, and commits.

    The set ones are compared instead (`check_flags_unchanged`). A dict, such as the fields of the
    configuration, may be set in part.
    """
    return {
        name: value
        for name, value in chosen.items()
        if flags[name] is None or isinstance(value, dict) or name in PATH_FLAGS
    }


def check_flags_unchanged(recorded: FlagsRecord, flags: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if a resumed run has other flags than the run that it continues.

    Args:
        recorded: the record of the run in `folder`.
        flags: the flags of the resumed run, as the person set them.
        folder: output folder.
    """
    derived = (recorded["chosen"], recorded["config"])
    for name, value in recorded["flags"].items():
        current_value = flags.get(name)
        chosen_value = recorded["chosen"].get(name)
        if isinstance(chosen_value, dict) and isinstance(current_value, dict):
            current_value = chosen_value | current_value
        # A person may copy the derived value from the log into the command; that is no change.
        accepted_values = [value, *(values[name] for values in derived if name in values)]
        if name in CHANGEABLE_FLAGS or any(
            is_same_value(name, accepted, current_value) for accepted in accepted_values
        ):
            continue

        advice = "Use the same flags, or choose a different `output_dir`"
        # More epochs are another run: the learning rate of every past step depends on the total.
        if name in ("epochs", "max_steps"):
            advice = f"To train for more steps, start another run with `model={str(folder)!r}`"
        raise ValueError(
            f"`resume=True`: the run in {folder} was started with `{name}` "
            f"{format_flag_value(value)}, but the value in this run is "
            f"{format_flag_value(current_value)}. {advice}"
        )


def is_same_value(name: str, stored: Any, current: Any) -> bool:
    """Compare two values of a flag by what they mean. One number sets both image sides."""
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


def build_run_record(
    options: TrainOptions,
    data: TrainingData,
    config: ViTCLSConfig,
    flags: dict[str, Any],
    checkpoint: Checkpoint | None,
) -> dict[str, Any]:
    """Build what checkpoints contain about the run, and compare it with the checkpoint to resume.

    `options` have the values of the plan, and `flags` are the flags as the person set them. Raise
    ValueError if the checkpoint belongs to a different run.
    """
    state = AcceleratorState()
    assert options.batch_size is not None, "the defaults set it"
    recorded = None if checkpoint is None else checkpoint.metadata["flags"]
    record = {
        "images_per_step": options.batch_size
        * options.gradient_accumulation_steps
        * state.num_processes,
        "mixed_precision": state.mixed_precision,
        "data": describe_data(data),
        "flags": build_flags_record(flags, to_flags(options), config.to_dict(), recorded),
    }
    if checkpoint is not None:
        check_run_unchanged(checkpoint.metadata, record, options.output_dir)
    return record
