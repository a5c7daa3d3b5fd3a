"""What a resumed run may change: checks of flags, models, data and plan."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..conversion.any_checkpoint import is_pinned, is_preset, pin_revision
from ..data.splits import describe_change
from ..hub.local_paths import (
    BUILT_IN_DATASET,
    is_same_source,
    make_relative,
    resolve_name,
    strip_folders,
)
from ..runtime.flags import to_flags
from .checkpoints import Checkpoint
from .defaults import DEFAULT_FLAGS
from .options import PretrainOptions


# Flags that may change on --resume, because these flags do not affect the result.
CHANGEABLE_FLAGS = (
    "output_dir num_workers max_unreadable_images batch_size gradient_accumulation_steps resume "
    "overwrite save_every keep_checkpoints log_with report dry_run push_to_hub hub_model_id "
    "hub_private hub_verify hub_checkpoint_branch license card_samples"
).split()
PATH_FLAGS = ("dataset", "model", "teacher")  # flags whose values may be paths


def resolve_local_paths(options: Any) -> Any:
    """Return the options with absolute paths for a local dataset, model and teacher."""
    dataset = resolve_name(
        options.data.dataset, is_built_in=options.data.dataset == BUILT_IN_DATASET
    )
    options = replace(options, data=replace(options.data, dataset=dataset))
    return replace_sources(
        options,
        lambda flag, source: resolve_name(
            source, is_built_in=flag == "model" and is_preset(source)
        ),
    )


def pin_models(options: Any, checkpoint: Checkpoint | None) -> Any:
    """Return the options with Hub models pinned to commits.

    A resumed run uses the commits that are stored in the flags of the checkpoint. Raise ValueError
    or OSError if a model cannot be found.
    """
    stored_flags = checkpoint.metadata["flags"] if checkpoint else {}

    def pin(flag: str, source: str) -> str:
        if flag == "model" and is_preset(source):
            return source
        stored_source: str = stored_flags.get(flag) or ""
        return stored_source if is_pinned(stored_source, source) else pin_revision(source)

    return replace_sources(options, pin)


def replace_sources(options: Any, convert: Callable[[str, str], str]) -> Any:
    """Return the options with another model and teacher: `convert(flag, value)`."""
    options = replace(
        options, model=replace(options.model, model=convert("model", options.model.model))
    )
    if isinstance(options, PretrainOptions) or options.distillation.teacher is None:
        return options
    teacher = convert("teacher", options.distillation.teacher)
    return replace(options, distillation=replace(options.distillation, teacher=teacher))


def get_relative_flags(options: Any, should_strip: bool = False) -> dict[str, Any]:
    """Return all flags of the run, with paths relative to the current directory.

    If `should_strip` is set, local folders are replaced with placeholders, because the flags are
    published.
    """
    convert = strip_folders if should_strip else make_relative
    options = replace_sources(options, lambda _, source: convert(source))
    flags = to_flags(
        replace(options, data=replace(options.data, dataset=convert(options.data.dataset)))
    )
    return flags | {"output_dir": convert(flags["output_dir"])}


def check_flags_unchanged(
    stored_flags: dict[str, Any], current_flags: dict[str, Any], folder: Path
) -> None:
    """Raise ValueError if the flags of a resumed run differ from those of the checkpoint.

    A current value of None is accepted if the default value of the flag depends on the run. A
    current model without a commit hash is accepted if the stored model is the same model with a
    commit hash.
    """
    for name, value in stored_flags.items():
        current_value = current_flags.get(name)
        if (
            name in CHANGEABLE_FLAGS
            or current_value == value
            or (
                name in PATH_FLAGS
                and (is_same_source(value, current_value) or is_pinned(value, current_value))
            )
            or (current_value is None and name in ("select", *DEFAULT_FLAGS))
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
    if metadata.get("files") != current["files"]:
        raise ValueError(
            "`resume=True`: the sizes or times of the dataset's files have changed since the run "
            f"in {folder} was started. Restore the files and their times, or choose a different "
            "`output_dir`"
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
