"""What a resumed run takes from its start, and what it compares with it.

A run records its flags as the person set them, and `chosen_flags`: values that it derived for some
of them, such as the learning rate, the image size of a large checkpoint, and the commit of a model
on the Hub. A resumed run may set a flag as before, or to the value that was derived for it. Derived
values are taken from the record, so they do not depend on the machine that resumes the run.
"""

import operator
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState

from ..data.dataset import Dataset
from ..data.splits import hash_data
from ..hub.local_paths import is_local, is_same_source, split_prefix
from ..hub.model_folder import SOURCE_FLAGS
from ..runtime.flags import expand_home, to_flags
from .options import FinetuneOptions
from .run_folder import make_flags_relative


# Flags that may change on --resume, because these flags do not affect the result.
CHANGEABLE_FLAGS = (
    "output_dir num_workers batch_size gradient_accumulation_steps resume "
    "overwrite save_every keep_checkpoints log_with report push_to_hub hub_model_id "
    # The precision itself is compared (`check_run_unchanged`)
    "mixed_precision"
).split()


def convert_sources(
    options: FinetuneOptions, convert: Callable[[str], str], flags: Iterable[str] = SOURCE_FLAGS
) -> FinetuneOptions:
    """Replace the dataset, the model and the teacher, as far as they are set and among `flags`."""
    values: dict[str, Any] = {
        name: convert(value) for name in flags if (value := getattr(options, name)) is not None
    }
    return replace(options, **values)


def take_derived_values(options: FinetuneOptions, recorded: dict[str, Any]) -> FinetuneOptions:
    """Give a resumed run the values that its start derived for unset flags, and the same commits.

    Args:
        options: as the person set them.
        recorded: record of the run that is resumed.

    Raises:
        ValueError: if a flag has another value than in the earlier run.
    """
    flags = to_flags(options)
    derived = recorded["chosen_flags"]
    for name, asked in recorded["flags"].items():
        # A person may copy the derived value from the log into the command; that is no change.
        accepted_values = (asked, derived.get(name, asked))
        is_same = is_same_source if name in SOURCE_FLAGS else operator.eq
        value = flags.get(name)  # Another version may have had other flags
        is_accepted = any(is_same(accepted, value) for accepted in accepted_values)
        if not is_accepted and name not in CHANGEABLE_FLAGS:
            raise ValueError(describe_flag_change(name, value, options.output_dir, recorded))

    # The batch size may change, so it is derived only while it is unset.
    values = {
        name: value
        for name, value in derived.items()
        if flags[name] is None or name not in CHANGEABLE_FLAGS
    }
    return replace(options, **values)


def describe_flag_change(name: str, value: Any, folder: Path, recorded: dict[str, Any]) -> str:
    """Say how a flag differs from the run in a folder that is resumed, and what to do."""
    asked = recorded["flags"][name]
    advice = "Use the same flags, or choose a different `output_dir`"
    # More epochs are another run: the learning rate of every past step depends on the total.
    if name in ("epochs", "max_steps"):
        advice = (
            f"For more steps, let it finish, then start another run with `model={str(folder)!r}`"
        )
    if is_local(asked) and not Path(split_prefix(expand_home(asked))[1]).exists():
        advice = f"{asked} does not exist. Restore it, or choose a different `output_dir`"

    asked_text = format_flag_value(asked)
    derived = recorded["chosen_flags"]
    if name in derived:
        asked_text += f" ({format_flag_value(derived[name])} was chosen)"
    return (
        f"`resume=True`: the run in {folder} was started with `{name}` {asked_text}, but the value "
        f"in this run is {format_flag_value(value)}. {advice}"
    )


def format_flag_value(value: Any) -> Any:
    """Format a flag's value as on the command line, or as "unset" for None; numbers stay numbers."""
    if value is None:
        return "unset"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return value if isinstance(value, float | int) else str(value)


def build_run_record(
    options: FinetuneOptions,
    images: Dataset,
    flags: dict[str, Any],
    recorded: dict[str, Any] | None,
) -> dict[str, Any]:
    """Build what checkpoints and results.json contain about the run.

    Args:
        options: flags with the values of the plan.
        images: of the run.
        flags: flags as the person set them.
        recorded: record of the run that is resumed, which is compared.

    Raises:
        ValueError: as `check_run_unchanged`.
    """
    state = AcceleratorState()
    assert options.batch_size is not None, "the defaults set it"
    num_processes = state.num_processes
    record: dict[str, Any] = {
        "images_per_step": options.batch_size * options.gradient_accumulation_steps * num_processes,
        "mixed_precision": state.mixed_precision,
        "data": hash_data(images),
    }
    if recorded is None:
        resolved = to_flags(options) | {"mixed_precision": state.mixed_precision}
        chosen = {name: value for name, value in resolved.items() if value != flags[name]}
        return record | {"flags": make_flags_relative(flags), "chosen_flags": chosen}

    check_run_unchanged(recorded, record, options.output_dir)
    # The flags are the same, and values that were derived at the first start stay derived, even if
    # the person has typed them since.
    return record | {name: recorded[name] for name in ("flags", "chosen_flags")}


def check_run_unchanged(earlier: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if --resume would continue a run with other data or settings.

    These are another precision, and another number of images per step.

    Args:
        earlier: record of the run in `folder`.
        current: record of this run.
        folder: output folder.
    """
    stored = earlier["data"]
    if changed := [name for name, value in current["data"].items() if stored.get(name) != value]:
        raise ValueError(
            f"`resume=True`: the dataset has changed since the run in {folder} was started: "
            f"{' and '.join(changed)}. Restore the dataset, choose a different `output_dir`, or set "
            "`overwrite=True` without `resume`"
        )
    if earlier["mixed_precision"] != current["mixed_precision"]:
        raise ValueError(
            f"`resume=True`: the run in {folder} requires "
            f"`mixed_precision={earlier['mixed_precision']!r}`, but the mixed precision of this "
            f"run is {current['mixed_precision']}"
        )
    if earlier["images_per_step"] != current["images_per_step"]:
        raise ValueError(
            f"`resume=True`: the run in {folder} has {earlier['images_per_step']} images per "
            f"step, but this run has {current['images_per_step']}. Restore the product of "
            "`batch_size`, `gradient_accumulation_steps` and the number of processes"
        )
