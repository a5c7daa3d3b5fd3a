"""The output folder of a run, before the run starts: what is in it, and what is removed.

    finished run (results.json)              replaced only with --overwrite
    unfinished run (checkpoints/)            continued with --resume, replaced with --overwrite
    files that were not written by a run     replaced only with --overwrite
    unfinished run without a checkpoint      replaced

A run first removes the files of the earlier run, starting with results.json and the model, and then
writes new files (save.py). Therefore, the folder never contains an old model with a new
configuration, even if the run is killed.

The folder is locked (runtime/staging.py).
"""

import shutil
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from ..hub.local_paths import is_local, make_relative, split_prefix
from ..hub.model_files import (
    CONFIG_FILE,
    FINAL_FILE_PATTERNS,
    IMAGES_FOLDER,
    METRICS_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    hash_weights,
)
from ..hub.model_folder import SOURCE_FLAGS, dump_flags
from ..runtime.errors import format_name_list
from ..runtime.files import read_json, read_text, write_text
from ..runtime.staging import STAGING_FOLDER
from .checkpoints import Checkpoint, CheckpointStore
from .options import FinetuneOptions


CHECKPOINTS_FOLDER = "checkpoints"
MODEL_FLAGS = ("model", "teacher")  # Flags whose values may be models in the output folder


def find_run(
    folder: Path, store: CheckpointStore, options: FinetuneOptions, warn: Callable[[str], None]
) -> tuple[dict[str, Any] | None, Checkpoint | None]:
    """Look at the output folder for the run that `resume=True` continues or, if it is finished, repeats.

    Args:
        folder: output folder.
        store: the checkpoints in it.
        options: the flags of the new run.
        warn: prints a warning about a damaged checkpoint.

    Returns:
        The record of the run (`build_run_record`), with what its checkpoint adds to the record, or
        None if a new one may start; and the checkpoint, or None for a finished or a new run.

    Raises:
        ValueError: if files would be replaced without `overwrite=True`, or the run in the folder is
            damaged.
    """
    is_finished = (folder / RESULTS_FILE).exists() and (folder / CONFIG_FILE).exists()
    # The results are looked for first: a finished run may have no checkpoints left to continue
    # from, and has nothing left to do.
    if options.resume and is_finished:
        return read_finished_run(folder), None
    checkpoint = store.load_newest(warn) if options.resume else None
    if checkpoint is not None:
        return checkpoint.metadata, checkpoint
    # Nothing is removed yet. `prepare_folder` removes the old files after the data and the model
    # were read without an error, so a typo costs no finished run.
    if options.overwrite:
        for flag in MODEL_FLAGS:
            source = getattr(options, flag)
            path = Path(split_prefix(source or "")[1]).resolve()
            if is_local(source) and path.is_relative_to(folder.resolve()):
                raise ValueError(
                    f"`overwrite=True` would remove the `{flag}` in {folder.resolve()}. Choose a "
                    "different `output_dir`"
                )
    elif is_finished:
        raise ValueError(
            f"{folder} contains a finished run. Set `overwrite=True`, or choose a different "
            "`output_dir`"
        )
    else:
        check_replaceable(folder, store)
    return None, None


def read_finished_run(folder: Path) -> dict[str, Any]:
    """Read the record of a finished run. Raise ValueError if its weights are not those it wrote."""
    results = read_json(folder / RESULTS_FILE)
    if hash_weights(folder) != results.get("weights_sha256"):
        raise ValueError(
            f"`resume=True`: the run in {folder} is finished, but its weights are missing or have "
            "changed. Choose a different `output_dir`, or set `overwrite=True` without `resume`"
        )
    try:
        flags = yaml.safe_load(read_text(folder / RECIPE_FILE)) | results["asked_flags"]
        compared = {"chosen_flags", "images_per_step", "mixed_precision"}
        if not (isinstance(results["data"], dict) and compared <= results.keys()):
            raise KeyError
    except (ValueError, KeyError, TypeError, yaml.YAMLError):
        raise ValueError(
            f"`resume=True`: the record of the run in {folder} ({RECIPE_FILE}, {RESULTS_FILE}) is damaged "
            "or from another version. Choose a different `output_dir`, or set `overwrite=True` without "
            "`resume`"
        ) from None
    return results | {"flags": flags}


def check_replaceable(folder: Path, store: CheckpointStore) -> None:
    """Raise ValueError if a folder has checkpoints, or files that no run has written."""
    if steps := store.list_steps():
        raise ValueError(
            f"{folder} contains an unfinished run (step {steps[-1]:,}). Set `resume=True` or "
            "`overwrite=True`, or choose a different `output_dir`"
        )

    names = list_final_files(folder)
    if (folder / METRICS_FILE).exists() and not (folder / RECIPE_FILE).exists():
        names.append(METRICS_FILE)
    if names:
        raise ValueError(
            f"{folder} contains other files that this run would replace "
            f"({format_name_list(names)}). Move them, or set `overwrite=True`"
        )


def list_final_files(folder: Path) -> list[str]:
    """List the existing final files, in the order of `FINAL_FILE_PATTERNS`."""
    paths = chain.from_iterable(sorted(folder.glob(pattern)) for pattern in FINAL_FILE_PATTERNS)
    names = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    return list(dict.fromkeys(names))


# What a run writes before it starts --------------------------------------------------------------


def prepare_folder(
    folder: Path, store: CheckpointStore, flags: dict[str, Any], is_resumed: bool
) -> None:
    """Remove the files of an earlier run, unless it is resumed, and write config.resolved.yaml.

    The file contains `flags`, with paths relative to the current directory.
    """
    if not is_resumed:
        remove_run_files(folder, store)
    flags = make_flags_relative(flags)
    # These two say how a run was started, not what it is; a repeated run must not overwrite by
    # itself.
    flags = {name: flags[name] for name in flags if name not in ("resume", "overwrite")}
    write_text(folder / RECIPE_FILE, dump_flags(flags))


def make_flags_relative(flags: dict[str, Any]) -> dict[str, Any]:
    """Make the local paths among the flags relative to the current directory."""
    paths = flags.keys() & {*SOURCE_FLAGS, "output_dir"}
    return flags | {name: make_relative(flags[name]) for name in paths}


def remove_run_files(folder: Path, store: CheckpointStore) -> None:
    """Remove the files of an earlier run or model. Other files are kept."""
    # Without one of these, the folder is not of a run, and images or notes in it are not ours to
    # remove.
    has_marker_file = any(
        (folder / name).exists() for name in (RESULTS_FILE, CONFIG_FILE, RECIPE_FILE)
    )
    if not has_marker_file and not store.list_steps():
        return

    for name in (*list_final_files(folder), METRICS_FILE):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # The folder does not exist or is not empty
        (folder / IMAGES_FOLDER).rmdir()
    shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)
    store.clear()

    # Removed last: if the process is killed before, this file still marks an output folder.
    (folder / RECIPE_FILE).unlink(missing_ok=True)
