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
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ..data.options import DataOptions
from ..data.sources import load_on_main
from ..data.splits import (
    TrainingData,
    describe_change,
    describe_data,
    divide_images,
    load_undivided_images,
)
from ..hub.local_paths import is_local, split_prefix
from ..hub.model_files import (
    CONFIG_FILE,
    FINAL_FILE_PATTERNS,
    IMAGES_FOLDER,
    METRICS_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    hash_weights,
    is_match,
)
from ..hub.model_folder import ModelFolder
from ..runtime.errors import format_name_list
from ..runtime.files import read_json, read_text, write_atomically
from ..runtime.flags import get_flag_fields
from ..runtime.staging import STAGING_FOLDER
from .checkpoints import Checkpoint, CheckpointStore
from .options import TrainOptions
from .reporter import Reporter
from .resume import (
    PATH_FLAGS,
    SOURCE_FLAGS,
    FlagsRecord,
    check_flags_unchanged,
    make_flags_relative,
)


CHECKPOINTS_FOLDER = "checkpoints"


def find_run(
    folder: Path, store: CheckpointStore, flags: dict[str, Any], warn: Callable[[str], None]
) -> tuple[Checkpoint | None, bool]:
    """Find the checkpoint to resume from, and tell whether the run to resume is finished.

    Args:
        folder: output folder.
        store: the checkpoints in it.
        flags: the flags as the person set them.
        warn: prints a warning about a damaged checkpoint.

    Raises:
        ValueError: if the run in the folder has other flags, or if files would be replaced without
            `overwrite=True`.
    """
    # The results are looked for first: a finished run may have no checkpoints left to continue
    # from, and has nothing left to do.
    is_repeated = flags["resume"] and is_finished(folder)
    checkpoint = None
    if flags["resume"] and not is_repeated:
        checkpoint = store.load_newest(warn)
    if checkpoint is None and not is_repeated:
        # Nothing is removed yet. `prepare_folder` removes the old files after the data and the
        # model were read without an error, so a typo costs no finished run.
        if flags["overwrite"]:
            check_sources_not_removed(folder, {name: flags.get(name) for name in SOURCE_FLAGS})
        else:
            check_replaceable(folder, store)
        return None, False
    recorded = read_finished_flags(folder) if checkpoint is None else checkpoint.metadata["flags"]
    check_flags_unchanged(recorded, flags, folder)
    return checkpoint, is_repeated


def check_replaceable(folder: Path, store: CheckpointStore) -> None:
    """Raise ValueError if a run without `overwrite=True` would replace files.

    Files that no run has written count as well. `store` contains the checkpoints in the folder.
    """
    if is_finished(folder):
        raise ValueError(
            f"{folder} contains a finished run. Set `overwrite=True`, or choose a different "
            "`output_dir`"
        )
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


def is_finished(folder: Path) -> bool:
    """Return whether a folder contains the model and the results of a run."""
    return (folder / RESULTS_FILE).exists() and (folder / CONFIG_FILE).exists()


def read_finished_flags(folder: Path) -> FlagsRecord:
    """Read the record of a finished run, which has no checkpoints, from its other files."""
    flags = yaml.safe_load(read_text(folder / RECIPE_FILE))
    chosen = read_json(folder / RESULTS_FILE).get("chosen_flags", {})
    unset = {name: None for name in chosen if name not in PATH_FLAGS}
    return {"flags": flags | unset, "chosen": chosen, "config": read_json(folder / CONFIG_FILE)}


def clean_up_finished(asked: TrainOptions, store: CheckpointStore, reporter: Reporter) -> None:
    """Check that a finished run has today's photos, labels and weights, and remove what it left.

    Raises:
        ValueError, OSError: if they have changed, or cannot be read.
    """
    folder = ModelFolder(asked.output_dir)
    # The photos and labels may have changed since, although the flags are the same.
    load_data = partial(load_run_data, folder, asked.dataset)
    check_finished(folder, load_on_main(asked.dataset, load_data))
    shutil.rmtree(folder.path / STAGING_FOLDER, ignore_errors=True)
    if asked.keep_checkpoints is None:
        store.clear()
    reporter.print_line("finished", f"{folder.path} already contains the results of this run")


def check_finished(folder: ModelFolder, data: TrainingData) -> None:
    """Raise ValueError if a finished run has lost its weights, or had other images or labels.

    Args:
        folder: output folder.
        data: what `load_run_data` reads today.
    """
    results = folder.results_of_any_weights
    problem = None
    if hash_weights(folder.path) != results.get("weights_sha256"):
        problem = "its weights are missing or have changed"
    if change := describe_change(results["data"], describe_data(data)):
        problem = f"the dataset has changed since: {change}"
    if problem is not None:
        raise ValueError(
            f"`resume=True`: the run in {folder.path} is finished, but {problem}. Choose a different "
            "`output_dir`, or set `overwrite=True` without `resume`"
        )


def load_run_data(folder: ModelFolder, dataset: str) -> TrainingData:
    """Read the images and labels of a finished run again, and divide them as the run did.

    Args:
        folder: its folder.
        dataset: where the dataset is now.

    Raises:
        ValueError, OSError: if the dataset cannot be read.
    """
    flags = folder.flags
    results = folder.results_of_any_weights
    values = {name: flags[name] for name in get_flag_fields(DataOptions) if name in flags}
    options = DataOptions(**values | {"dataset": dataset})
    images = load_undivided_images(
        options,
        # A test split that the run did not read may have come since.
        reads_all=results.get("held_out_split") == "test",
        use_labels=bool(results.get("data", {}).get("classes", True)),
    )
    return divide_images(images, options.held_out_part, flags.get("select") == "best")


def check_sources_not_removed(folder: Path, sources: Mapping[str, str | None]) -> None:
    """Raise ValueError if `overwrite=True` would remove the initial model or the teacher.

    `sources` contains them by flag.
    """
    folder = folder.resolve()
    for flag, source in sources.items():
        path = Path(split_prefix(source or "")[1]).resolve()
        if is_local(source) and folder in (path, *path.parents):
            raise ValueError(
                f"`overwrite=True` would remove the `{flag}` in {folder}. Choose a different "
                "`output_dir`"
            )


def list_final_files(folder: Path) -> list[str]:
    """List the existing final files, in the order of `FINAL_FILE_PATTERNS`."""
    patterns = ("*", f"{IMAGES_FOLDER}/*")
    files = (
        path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()
    )
    names = [path.relative_to(folder).as_posix() for path in files]
    matches = [
        name for pattern in FINAL_FILE_PATTERNS for name in names if is_match(name, (pattern,))
    ]
    return list(dict.fromkeys(matches))


# What a run writes before it starts --------------------------------------------------------------


def prepare_folder(
    folder: Path, store: CheckpointStore, flags: dict[str, Any], checkpoint: Checkpoint | None
) -> None:
    """Remove the files of an earlier run, unless it is resumed, and write config.resolved.yaml.

    The file contains `flags`, with paths relative to the current directory.
    """
    if checkpoint is None:
        remove_run_files(folder, store)
    flags = make_flags_relative(flags)
    # These two say how a run was started, not what it is; a repeated run must not overwrite by
    # itself.
    flags = {name: flags[name] for name in flags if name not in ("resume", "overwrite")}
    with write_atomically(folder / RECIPE_FILE) as file:  # Never through a link
        file.write_text(yaml.safe_dump(flags, sort_keys=False), encoding="utf-8")


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
