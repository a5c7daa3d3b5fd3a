"""Check the output folder before a run starts, remove replaced files, and lock the folder.

    finished run (results.json)              replaced only with --overwrite
    unfinished run (checkpoints/)            continued with --resume, replaced with --overwrite
    files that were not written by a run     replaced only with --overwrite
    unfinished run without a checkpoint      replaced

A run first removes the files of the earlier run, starting with results.json and the model, and then
writes new files. Therefore, the folder never contains an old model with a new configuration, even
if the run is killed.

`FolderLock` prevents other runs from using the folder.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import yaml
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch.distributed.fsdp import FSDPModule

from ..data.image_folder import format_name_list
from ..hub.connection import silence_transformers
from ..hub.local_paths import is_local, split_prefix
from ..hub.model_files import (
    CARD_FILE,
    CONFIG_FILE,
    DEFAULT_EXPORT_PATTERNS,
    IMAGES_FOLDER,
    LICENSE_PATTERNS,
    METRICS_FILE,
    MODEL_PATTERNS,
    ONNX_PATTERNS,
    PARITY_REPORT_FILE,
    PREDICTIONS_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    hash_weights,
    is_match,
    list_export_files,
)
from ..hub.provenance import find_provenance
from ..inference.evaluator import Evaluator
from ..inference.per_image import write_predictions
from ..inference.speed import measure_inference_speed
from ..runtime.distributed import run_on_main
from ..runtime.errors import RunStopped, format_error
from ..runtime.files import follow_umask, read_json, sync_to_disk, write_json
from .checkpoints import WRITE_ERRORS, Checkpoint, CheckpointStore, Tensors
from .distributed_state import gather_weights
from .model import InitialModel, merge_lora
from .options import FinetuneOptions, PretrainOptions
from .resume import replace_sources
from .training_setup import TrainingSetup


# Files that a run writes at the end, and exports of them, in the order in which they are removed;
# the results and the model come first.
FINAL_FILE_PATTERNS = (
    RESULTS_FILE,
    *MODEL_PATTERNS,
    *(
        PREDICTIONS_FILE,
        CARD_FILE,
        *LICENSE_PATTERNS,
        REPORT_FILE,
        PARITY_REPORT_FILE,
        *ONNX_PATTERNS,
    ),
    f"{IMAGES_FOLDER}/*.png",
    *DEFAULT_EXPORT_PATTERNS,
)
CHECKPOINTS_FOLDER = "checkpoints"

STAGING_FOLDER = ".model.partial"  # files of the model until all of them are written
LOCK_FILE = ".vitcls.lock"
# Waiting time in seconds. Data loading processes of a killed run hold its lock until they end, a
# few seconds later.
LOCK_TIMEOUT = 10.0


def check_replaceable(options: Any, store: CheckpointStore) -> None:
    """Raise ValueError if a new run would replace files without `overwrite=True`.

    Files that no run has written count, too.

    Also raise ValueError if --overwrite would remove the initial model or the teacher. `store`
    contains the checkpoints in the output folder.
    """
    folder = options.output_dir
    if options.run.overwrite:
        check_sources_not_removed(options)
        return

    if (folder / RESULTS_FILE).exists() and (folder / CONFIG_FILE).exists():
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


def check_sources_not_removed(options: FinetuneOptions | PretrainOptions) -> None:
    """Raise ValueError if --overwrite would remove the initial model or the teacher."""
    folder = options.output_dir.resolve()

    def check(flag: str, source: str) -> str:
        path = Path(split_prefix(source)[1]).resolve()
        if is_local(source) and folder in (path, *path.parents):
            raise ValueError(
                f"`overwrite=True` would remove the `{flag}` in {folder}. Choose a different "
                "`output_dir`"
            )
        return source

    replace_sources(options, check)


def remove_run_files(folder: Path, store: CheckpointStore) -> None:
    """Remove the files of an earlier run or model. Other files are kept."""
    has_marker_file = any(
        (folder / name).exists() for name in (RESULTS_FILE, CONFIG_FILE, RECIPE_FILE)
    )
    if not has_marker_file and not store.list_steps():
        return

    for name in (*list_final_files(folder), METRICS_FILE):
        (folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # the folder does not exist or is not empty
        (folder / IMAGES_FOLDER).rmdir()
    shutil.rmtree(folder / STAGING_FOLDER, ignore_errors=True)
    store.clear()

    # removed last, because this file marks an output folder
    (folder / RECIPE_FILE).unlink(missing_ok=True)


def prepare(
    folder: Path, store: CheckpointStore, flags: dict[str, Any], checkpoint: Checkpoint | None
) -> None:
    """Remove the files of an earlier run, unless it is resumed, and write config.resolved.yaml."""
    if checkpoint is None:
        remove_run_files(folder, store)
    flags = {
        name: value
        for name, value in flags.items()
        if name not in ("resume", "overwrite", "dry_run")
    }
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(flags, sort_keys=False), encoding="utf-8")


def list_final_files(folder: Path) -> list[str]:
    """Return the names of the existing final files, in the order of `FINAL_FILE_PATTERNS`."""
    patterns = ("*", f"{IMAGES_FOLDER}/*", "onnx/*")
    files = (
        path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()
    )
    names = [path.relative_to(folder).as_posix() for path in files]
    matches = [
        name for pattern in FINAL_FILE_PATTERNS for name in names if is_match(name, (pattern,))
    ]
    return list(dict.fromkeys([*matches, *list_export_files(folder)]))


# Model --------------------------------------------------------------------------------------------


@contextmanager
def stage_files(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder for the files of the model, and move them to `folder` at the end.

    config.json is moved first, because it marks the folder as the folder of a model, and
    results.json last, because it marks the run as finished. A run that is killed at any time is
    therefore continued by --resume.
    """
    staging_folder = folder / STAGING_FOLDER
    shutil.rmtree(staging_folder, ignore_errors=True)
    staging_folder.mkdir()
    yield staging_folder

    files = [path for path in staging_folder.rglob("*") if path.is_file()]
    for path in (*files, staging_folder):
        sync_to_disk(path)

    order = {CONFIG_FILE: 0, RESULTS_FILE: 2}
    names = {path: path.relative_to(staging_folder).as_posix() for path in files}
    for path in sorted(files, key=lambda path: (order.get(names[path], 1), path)):
        target = folder / names[path]
        target.parent.mkdir(exist_ok=True)
        path.replace(target)

    sync_to_disk(folder)
    shutil.rmtree(staging_folder)


def save_output(
    setup: TrainingSetup,
    results: dict[str, Any],
    options: FinetuneOptions | PretrainOptions,
    initial: InitialModel,
    accelerator: Accelerator,
    evaluator: Evaluator | None,
    nearest_images: dict[int, list[str]] | None,
) -> None:
    """Write the model, the image processor, results.json and the evaluator's predictions.

    All processes must call this function. Raise RunStopped on all processes if the folder cannot be
    written.
    """
    weights = gather_weights(setup.model)
    if setup.encoder is not None:
        weights = {
            name.removeprefix("vitcls."): weights[name]
            for name in weights
            if name.startswith("vitcls.")
        }

    def write() -> None:
        try:
            with stage_files(options.output_dir) as folder, silence_transformers():
                write_model_files(
                    setup,
                    folder,
                    weights=weights,
                    results=results,
                    options=options,
                    initial=initial,
                )
                if evaluator is not None:
                    weights_hash = read_json(folder / RESULTS_FILE)["weights_sha256"]
                    file = folder / PREDICTIONS_FILE
                    write_predictions(file, evaluator, weights_hash, nearest_images)
        except WRITE_ERRORS as error:
            raise OSError(format_error(error)) from error

    try:
        run_on_main(accelerator, write)
    except OSError as error:
        raise RunStopped(
            f"cannot write the model to {options.output_dir} ({error}). Free disk space, then use "
            "`resume=True`"
        ) from error


def write_model_files(
    setup: TrainingSetup,
    folder: Path,
    weights: Tensors,
    results: dict[str, Any],
    options: FinetuneOptions | PretrainOptions,
    initial: InitialModel,
) -> None:
    """Write weights, configuration, code, image processor and results.

    LoRA weights are merged. Only the main process may call this function. `weights` are full
    tensors, because the model may be sharded.
    """
    # FSDP2 replaces the model's class with a subclass. With the subclass, transformers would save
    # PyTorch's source files as the model's code.
    model = setup.encoder or setup.model
    unsharded_class: Any = next(
        base for base in type(model).__mro__ if not issubclass(base, FSDPModule)
    )
    model.__class__ = unsharded_class
    model.save_pretrained(folder, state_dict=merge_lora(weights))
    setup.processor.save_pretrained(folder)
    follow_umask(folder)

    # provenance None: random weights
    results = results | {"weights_sha256": hash_weights(folder), "provenance": None}
    if not initial.has_random_weights:
        provenance = find_provenance(initial.name)
        provenance.copy_license(folder)
        results["provenance"] = provenance.to_dict()
    if isinstance(options, FinetuneOptions) and options.distillation.teacher is not None:
        results["teacher_provenance"] = find_provenance(options.distillation.teacher).to_dict()

    # `model` may be sharded
    saved_model = unsharded_class.from_pretrained(folder).to(model.device).eval()
    results["inference"] = measure_inference_speed(saved_model, model.device)
    write_json(folder / RESULTS_FILE, results)


# Lock ---------------------------------------------------------------------------------------------


class FolderLock:
    """Lock of one output folder.

    The operating system releases the lock of a process that has ended for any reason, even if the
    process ran on another host that shares the file system.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_lock = FileLock(folder / LOCK_FILE, timeout=LOCK_TIMEOUT, thread_local=False)

    def acquire(self) -> None:
        """Create the folder if necessary, and lock it.

        Raise ValueError if another run holds the lock.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.file_lock.acquire()
        except Timeout:
            raise ValueError(
                f"{self.folder} is in use by another run. Wait until that run ends, or choose a "
                "different `output_dir`"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file_lock.is_locked:
            (self.folder / LOCK_FILE).unlink(missing_ok=True)
            self.file_lock.release()
            with suppress(OSError):  # the folder is not empty
                self.folder.rmdir()
