"""Uploads of checkpoints to a branch of the run's repository during training (`--hub-checkpoint-every`).

    upload is due -> all processes gather the weights -> the main process writes a model folder and continues training
                                                      -> a background thread pushes the folder

At most one upload runs at a time. If an upload is due while another upload is running, the new upload is skipped.
Errors are printed as warnings and do not end the run. The pushed model contains the averaged weights if EMA is used.
With `--hub-push-optimizer`, the branch also contains the checkpoint for `--resume`.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import nn

from ..checkpoints import WRITE_ERRORS, CheckpointStore, Tensors
from ..distributed import run_on_main
from ..files import read_json
from ..hub.connection import format_hub_error, silence_transformers
from ..hub.provenance import CARD_FILE, Provenance
from ..options import to_flags
from ..publishing.card import build_checkpoint_card, build_common_metadata, get_license
from ..publishing.manifest import RECIPE_FILE
from ..publishing.publish import push_folder
from .distributed_state import gather_weights
from .loop import TrainingInterrupted, TrainingState
from .model_report import get_model_provenance, get_teacher_provenance
from .reporter import Reporter


UPLOAD_TIMEOUT = 600.0  # maximum waiting time for an upload at the end of training, in seconds
# Maximum waiting time for an upload after a signal or an error, in seconds. Launchers kill a process 30 seconds after
# a signal.
UPLOAD_TIMEOUT_AFTER_SIGNAL = 20.0

ModelWriter = Callable[[Path, Tensors], None]  # writes model files with the given weights to a folder


@dataclass(eq=False)
class BranchUploader:
    """Context manager that pushes checkpoints in a background thread. On exit, the context manager waits for a running
    upload, up to a timeout."""

    options: Any
    reporter: Reporter
    repo_id: str  # `namespace/name`
    model: nn.Module  # unwrapped model; shares weights with the model from `Accelerator.prepare`
    write_model: ModelWriter  # called on the main process
    provenance: Provenance | None = None
    teacher_provenance: Provenance | None = None
    thread: threading.Thread | None = None
    last_upload_step: int = 0
    last_failed_step: int = 0  # last step whose files could not be written
    has_skipped_upload: bool = False
    has_timed_out: bool = False  # whether the last upload exceeded the timeout

    def __post_init__(self) -> None:
        self.accelerator, self.run_options = self.reporter.accelerator, self.options.run
        self.branch = self.run_options.hub_checkpoint_branch
        self.folder = self.options.output_dir / ".hub-checkpoint" / self.repo_id.rpartition("/")[2]

    # Called by all processes together --------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.remove_folder()  # a killed run may have left the folder behind
        if self.accelerator.is_main_process:
            # Find the provenance before training, so that training does not wait for the network.
            self.provenance = get_model_provenance(self.options)
            self.teacher_provenance = get_teacher_provenance(self.options)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *error: object) -> None:
        try:
            self.wait_for_upload(UPLOAD_TIMEOUT if exc_type is None else UPLOAD_TIMEOUT_AFTER_SIGNAL)
            # After other errors, not all processes reach this line.
            if exc_type is None or exc_type is TrainingInterrupted:
                self.accelerator.wait_for_everyone()  # launchers terminate all processes when one process fails
        finally:
            self.remove_folder()

    def push_if_due(
        self, state: TrainingState, gather_checkpoint: Callable[[], tuple[dict[str, Tensors], dict[str, Any]]]
    ) -> None:
        """Push the model if an upload is due at this step. `gather_checkpoint` returns the tensors and the metadata of
        the checkpoint for `--resume`. This method must be called on all processes."""
        step = state.step
        is_due = step % self.run_options.hub_checkpoint_every == 0
        if not is_due or not run_on_main(self.accelerator, lambda: self.can_start_upload(step)):
            return
        self.try_write(step, self.recreate_folder)
        # The checkpoint is written before the averaged weights are copied into the model, because the tensors of the
        # checkpoint may share memory with the model.
        if self.run_options.hub_push_optimizer:
            tensors, metadata = gather_checkpoint()
            store = CheckpointStore(self.folder / "checkpoints", num_kept=1)
            self.try_write(step, lambda: store.save(step, tensors, metadata, is_best=False))
        with state.use_averaged_weights():
            weights = gather_weights(self.model, self.accelerator.is_main_process)
            self.try_write(step, lambda: self.write_model_folder(step, weights))
        if self.accelerator.is_main_process and self.last_failed_step != step:
            self.start_push(step)

    # Called on the main process --------------------------------------------------------------------------------------

    def can_start_upload(self, step: int) -> bool:
        """Return whether no upload is running. Print a warning the first time that an upload is skipped."""
        if self.thread is None or not self.thread.is_alive():
            return True
        if not self.has_skipped_upload:
            self.has_skipped_upload = True
            self.reporter.warn(
                f"the model from step {step:,} is not pushed, because the upload of step {self.last_upload_step:,} is "
                "still running. Later uploads may be skipped without a warning. To push every checkpoint, increase "
                "--hub-checkpoint-every"
            )
        return False

    def try_write(self, step: int, write: Callable[[], Any]) -> None:
        """Call `write` on the main process unless an earlier write in this step failed. Convert a write error to a
        warning."""
        if not self.accelerator.is_main_process or self.last_failed_step == step:
            return
        try:
            with silence_transformers(hide_warnings=False):
                write()
        except WRITE_ERRORS as error:
            self.last_failed_step = step
            self.remove_folder()
            self.reporter.warn(
                f"the model from step {step:,} is not pushed, because the model cannot be written: "
                f"{format_hub_error(error)}"
            )

    def start_push(self, step: int) -> None:
        """Push the folder in a background thread."""
        self.last_upload_step = step
        # At exit, Python does not wait for a daemon thread, but waits without a timeout for the thread that
        # huggingface_hub's `run_as_future` uses.
        self.thread = threading.Thread(target=self.push, args=(step,), daemon=True)
        self.thread.start()

    def recreate_folder(self) -> None:
        self.remove_folder()
        self.folder.mkdir(parents=True)

    def write_model_folder(self, step: int, weights: Tensors) -> None:
        """Write the model card, metrics, flags, license files, and the model with the given weights."""
        self.write_model(self.folder, weights)
        for name in ("metrics.jsonl", RECIPE_FILE):
            if (self.options.output_dir / name).is_file():
                shutil.copyfile(self.options.output_dir / name, self.folder / name)
        flags = to_flags(self.options)
        card = build_checkpoint_card(
            self.repo_id,
            self.branch,
            step,
            read_json(self.folder / "config.json")["architectures"][0],
            build_common_metadata(flags, self.provenance),
            get_license(flags, self.provenance, self.teacher_provenance),
            self.run_options.hub_push_optimizer,
        )
        card.save(self.folder / CARD_FILE)
        if self.provenance is not None:
            self.provenance.copy_license(self.folder)

    def push(self, step: int) -> None:
        """Push the folder. This method runs in the background thread and does not raise errors."""
        try:
            push_result = push_folder(
                self.folder,
                self.repo_id,
                self.run_options.hub_private,
                message=f"Step {step}",
                branch=self.branch,
                with_optimizer=self.run_options.hub_push_optimizer,
                in_background=True,
            )
        except Exception as error:  # errors from the Hub, the Hub client or the disk must not end training
            if not self.has_timed_out:
                reason = format_hub_error(error.__cause__ or error)
                self.reporter.warn(
                    f"the model from step {step:,} was not pushed to the branch {self.branch}: {reason}"
                )
            return
        self.reporter.print_line("pushed", f"step {step:,} to the branch {self.branch}, commit {push_result.commit}")

    def wait_for_upload(self, timeout: float) -> None:
        """Wait for the running upload for at most `timeout` seconds."""
        if self.thread is None or not self.thread.is_alive():
            return
        self.reporter.print_line("waiting", f"for the upload of step {self.last_upload_step:,}, up to {timeout:.0f} s")
        self.thread.join(timeout)
        if self.thread.is_alive():
            self.has_timed_out = True
            self.reporter.warn(
                f"the upload of step {self.last_upload_step:,} to the branch {self.branch} did not finish in time"
            )

    def remove_folder(self) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder.parent, ignore_errors=True)


def build_branch_uploader(
    options: Any, reporter: Reporter, repo_id: str | None, model: nn.Module, write_model: ModelWriter
) -> BranchUploader | None:
    """Build a `BranchUploader`. Return None in a dry run, or if `--hub-checkpoint-every` or the repository is not
    set."""
    if repo_id is None or options.run.hub_checkpoint_every is None or options.run.dry_run:
        return None
    return BranchUploader(options, reporter, repo_id, model, write_model)
