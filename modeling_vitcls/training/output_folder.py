"""Content of an output folder before a run starts, and the files that the run may replace.

    finished run (results.json)              replaced only with --overwrite
    unfinished run (checkpoints/)            --resume continues it, --overwrite replaces it
    files that were not written by a run     replaced only with --overwrite
    unfinished run without a checkpoint      replaced

A run first removes the files of the run that it replaces, starting with results.json and the model. Then it writes its
own files. A run that is killed at any moment therefore never leaves an old model next to a new configuration.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoints import CheckpointStore
from ..hub.local_paths import is_local, split_prefix
from ..hub.manifest import EXTRA_PATTERNS, MODEL_PATTERNS, RECIPE, is_match
from ..options import FinetuneOptions, PretrainOptions
from .model_report import REPORT


RESULTS = "results.json"
METRICS = "metrics.jsonl"
MODEL = "config.json"

# Files that a run writes at its end, results and model first.
FINAL_FILES = (RESULTS, *MODEL_PATTERNS, *(name for name in EXTRA_PATTERNS if name not in (METRICS, RECIPE)), REPORT)
NON_FINITE = "non_finite.json"
NON_FINITE_STATE = "non_finite"  # folder of a checkpoint
CHECKPOINTS = "checkpoints"
# Files that a run writes during training. The configuration, which identifies the run, is removed last.
TRAINING_FILES = (METRICS, NON_FINITE, RECIPE)

MAX_LISTED = 3  # maximum number of files in an error message


def check_replaceable(options: Any, store: CheckpointStore) -> None:
    """Raise ValueError if a new run would replace files without --overwrite.

    Args:
        options: FinetuneOptions or PretrainOptions.
        store: checkpoints in the output folder.
    """
    folder = options.output_dir
    if options.run.overwrite:
        check_sources_kept(options)
        return
    advice = "restart with --overwrite, or choose another --output-dir"
    if (folder / RESULTS).exists() and (folder / MODEL).exists():
        raise ValueError(
            f"{folder} contains a finished run. Replace it with --overwrite, or choose another --output-dir"
        )
    if steps := store.steps():
        raise ValueError(
            f"{folder} contains an unfinished run (a checkpoint of step {steps[-1]:,}). Continue it with "
            f"--resume, {advice}"
        )
    check_no_other_files(folder)


def check_no_other_files(folder: Path) -> None:
    """Raise ValueError if the run would replace files that were not written by a run."""
    names = list_final_files(folder)
    if (folder / METRICS).exists() and not (folder / RECIPE).exists():
        names.append(METRICS)
    if names:
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        raise ValueError(
            f"{folder} contains files that this run would overwrite ({', '.join(names[:MAX_LISTED])}{more}). Move the "
            "files, set --overwrite, or choose another --output-dir"
        )


def check_sources_kept(options: FinetuneOptions | PretrainOptions) -> None:
    """Raise ValueError if --overwrite would remove the initial model or the teacher."""
    folder = options.output_dir.resolve()
    sources = {"--model": options.model.model}
    if isinstance(options, FinetuneOptions) and options.distillation.teacher is not None:
        sources["--teacher"] = options.distillation.teacher
    for flag, name in sources.items():
        path = Path(split_prefix(name)[1]).resolve()
        if is_local(name) and (path == folder or folder in path.parents):
            raise ValueError(
                f"{flag} is in --output-dir {folder}, which --overwrite clears. Choose another --output-dir"
            )


def remove_run(folder: Path, store: CheckpointStore) -> None:
    """Remove the files of an earlier run or model; keep all other files."""
    if not any((folder / name).exists() for name in (RESULTS, MODEL, RECIPE)) and not store.steps():
        return
    for name in (*list_final_files(folder), *(name for name in TRAINING_FILES if name != RECIPE)):
        (folder / name).unlink(missing_ok=True)
    for name in ("pictures", ".eval_results"):
        with suppress(OSError):  # not there, or not empty
            (folder / name).rmdir()
    shutil.rmtree(folder / NON_FINITE_STATE, ignore_errors=True)
    store.clear()
    (folder / RECIPE).unlink(missing_ok=True)


def list_final_files(folder: Path) -> list[str]:
    """Return the files in the folder that a run writes at its end, results and model first."""
    files = (path for kind in ("*", "pictures/*", ".eval_results/*") for path in folder.glob(kind) if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    order = {
        name: [number for number, kind in enumerate(FINAL_FILES) if is_match(name, (kind,))] for name in sorted(names)
    }
    return sorted((name for name in order if order[name]), key=order.__getitem__)
