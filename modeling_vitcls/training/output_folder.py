"""What is in an output folder before a run starts, and what of it the run may replace.

    a finished run (results.json)            replaced only with --overwrite
    an unfinished run (checkpoints/)         --resume continues it, --overwrite replaces it
    files that no run wrote                  replaced only with --overwrite
    the rest of a run without a checkpoint   replaced

A run that replaces another one first removes the files of the old run, results.json and the model before the others.
Then it writes its own: a run that is killed at any moment leaves no old model next to a new configuration.
"""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoints import CheckpointStore
from ..hub.local_paths import divided, is_local
from ..hub.manifest import ACCOMPANYING, ESSENTIAL, RECIPE, matches
from ..options import FinetuneOptions, PretrainOptions
from .model_report import REPORT


RESULTS = "results.json"
METRICS = "metrics.jsonl"
MODEL = "config.json"

# Files that a run writes at its end, with those of the model first.
FINAL = (RESULTS, *ESSENTIAL, *(name for name in ACCOMPANYING if name not in (METRICS, RECIPE)), REPORT)
NON_FINITE = "non_finite.json"
NON_FINITE_STATE = "non_finite"  # folder with a checkpoint
CHECKPOINTS = "checkpoints"
# Files that a run writes while it trains. The configuration is removed last: it tells which run the others are of.
IN_TRAINING = (METRICS, NON_FINITE, RECIPE)

MOST_NAMED = 3


def check_replaceable(options: Any, store: CheckpointStore) -> None:
    """Raise ValueError, in one line, if a new run would replace something and --overwrite is not given.

    Args:
        options: FinetuneOptions or PretrainOptions.
        store: checkpoints in the output folder.
    """
    folder = options.output_dir
    if options.run.overwrite:
        check_sources_stay(options)
        return
    anew = "start anew with --overwrite, or choose another --output-dir"
    if (folder / RESULTS).exists() and (folder / MODEL).exists():
        raise ValueError(f"{folder} holds a finished run: replace it with --overwrite, or choose another --output-dir")
    if steps := store.steps():
        raise ValueError(
            f"{folder} holds an unfinished run (a checkpoint of step {steps[-1]:,}): go on with --resume, {anew}"
        )
    check_no_other_files(folder)


def check_no_other_files(folder: Path) -> None:
    """Raise ValueError, in one line, if there are files that a run would replace, but no run wrote."""
    names = final_files(folder)
    if (folder / METRICS).exists() and not (folder / RECIPE).exists():
        names.append(METRICS)
    if names:
        more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
        raise ValueError(
            f"{folder} holds files that this run would overwrite ({', '.join(names[:MOST_NAMED])}{more}): move them, "
            "allow it with --overwrite, or choose another --output-dir"
        )


def check_sources_stay(options: FinetuneOptions | PretrainOptions) -> None:
    """Raise ValueError, in one line, if --overwrite would remove the model to start from or the teacher."""
    folder = options.output_dir.resolve()
    sources = {"--model": options.model.model}
    if isinstance(options, FinetuneOptions) and options.distillation.teacher is not None:
        sources["--teacher"] = options.distillation.teacher
    for flag, name in sources.items():
        path = Path(divided(name)[1]).resolve()
        if is_local(name) and (path == folder or folder in path.parents):
            raise ValueError(f"{flag} is in --output-dir {folder}, which --overwrite clears: choose another folder")


def remove_run(folder: Path, store: CheckpointStore) -> None:
    """Remove the files of an earlier run or model, if there is one; other files stay, also those of other programs."""
    if not any((folder / name).exists() for name in (RESULTS, MODEL, RECIPE)) and not store.steps():
        return
    for name in (*final_files(folder), *(name for name in IN_TRAINING if name != RECIPE)):
        (folder / name).unlink(missing_ok=True)
    for name in ("pictures", ".eval_results"):
        with suppress(OSError):  # not there, or not empty
            (folder / name).rmdir()
    shutil.rmtree(folder / NON_FINITE_STATE, ignore_errors=True)
    store.clear()
    (folder / RECIPE).unlink(missing_ok=True)


def final_files(folder: Path) -> list[str]:
    """Return the files in the folder that a run writes at its end, results and model before the others."""
    files = (path for kind in ("*", "pictures/*", ".eval_results/*") for path in folder.glob(kind) if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    order = {name: [number for number, kind in enumerate(FINAL) if matches(name, (kind,))] for name in sorted(names)}
    return sorted((name for name in order if order[name]), key=order.__getitem__)
