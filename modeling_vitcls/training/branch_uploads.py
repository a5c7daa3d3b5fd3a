"""Uploads of checkpoints to a branch of the run's repository during training (`--hub-checkpoint-every`).

    upload is due -> all processes gather the weights -> the main process writes a model folder and continues training
                                                      -> a background thread pushes the folder

At most one upload runs at a time: an upload that is due while another upload runs is skipped. Errors are printed as
warnings and do not end the run. The pushed models contain the evaluated weights (the averaged weights if EMA is used)
and are loaded like the final model. With `--hub-push-optimizer`, the branch also contains the state for `--resume`.
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
from ..hub.card import build_checkpoint_card, build_common_metadata, get_license
from ..hub.connection import format_hub_error, silence_transformers
from ..hub.manifest import CARD_FILE, RECIPE_FILE
from ..hub.provenance import Provenance
from ..hub.publish import push_folder
from ..options import to_flags
from .distributed_state import gather_weights
from .loop import Interrupted, TrainingState
from .model_report import get_model_provenance, get_teacher_provenance
from .reporter import Reporter


MAX_SECONDS_AT_END = 600.0  # maximum waiting time for an upload at the end of training, in seconds
# Maximum waiting time for an upload after a signal, in seconds. Launchers kill the process after 30 seconds.
MAX_SECONDS_AFTER_SIGNAL = 20.0

ModelWritingFunction = Callable[[Path, Tensors], None]  # writes model files with the given weights to a folder
GatheredCheckpoint = tuple[dict[str, Tensors], dict[str, Any]]  # tensors and facts for `CheckpointStore.save`


@dataclass(eq=False)
class BranchUploads:
    """Context manager around the training loop. On exit, the context manager waits for a running upload, up to a time
    limit."""

    options: Any
    reporter: Reporter
    repo_id: str  # `namespace/name`
    model: nn.Module  # unwrapped model; shares weights with the model from `Accelerator.prepare`
    write_model: ModelWritingFunction  # called on the main process
    provenance: Provenance | None = None
    teacher: Provenance | None = None
    thread: threading.Thread | None = None
    step: int = 0  # step of the last upload
    last_failed_step: int = 0  # last step whose files could not be written
    has_skipped_upload: bool = False  # whether an upload was skipped
    has_timed_out: bool = False  # whether the last upload exceeded the maximum waiting time

    def __post_init__(self) -> None:
        self.accelerator, self.run = self.reporter.accelerator, self.options.run
        self.branch = self.run.hub_checkpoint_branch
        self.folder = self.options.output_dir / ".hub-checkpoint" / self.repo_id.rpartition("/")[2]

    # Called by all processes together --------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.remove_folder()  # the folder may remain from a killed run
        if self.accelerator.is_main_process:
            # Find the provenance before training, so that training does not wait for the network.
            self.provenance = get_model_provenance(self.options)
            self.teacher = get_teacher_provenance(self.options)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *error: object) -> None:
        try:
            self.wait(MAX_SECONDS_AT_END if exc_type is None else MAX_SECONDS_AFTER_SIGNAL)
            if exc_type is None or exc_type is Interrupted:  # after other errors, not all processes reach this line
                self.accelerator.wait_for_everyone()  # launchers terminate all processes when one exits
        finally:
            self.remove_folder()

    def push_if_due(self, state: TrainingState, gather_checkpoint: Callable[[], GatheredCheckpoint]) -> None:
        """Push the model if an upload is due at this step. `gather_checkpoint` returns the state for `--resume`. All
        processes must call this method together."""
        step = state.step
        if step % self.run.hub_checkpoint_every or not run_on_main(self.accelerator, lambda: self.can_start(step)):
            return
        self.try_write(step, self.recreate_folder)
        # The checkpoint is written before the averaged weights are copied into the model, because the tensors of the
        # checkpoint may share memory with the model.
        if self.run.hub_push_optimizer:
            tensors, facts = gather_checkpoint()
            store = CheckpointStore(self.folder / "checkpoints", num_kept=1)
            self.try_write(step, lambda: store.save(step, tensors, facts, is_best=False))
        with state.use_averaged_weights():
            weights = gather_weights(self.model, self.accelerator.is_main_process)
            self.try_write(step, lambda: self.fill_folder(step, weights))
        if self.accelerator.is_main_process and self.last_failed_step != step:
            self.start_push(step)

    # Called on the main process --------------------------------------------------------------------------------------

    def can_start(self, step: int) -> bool:
        """Return whether no upload is running, so that a new upload can start. Print a warning when the first upload
        is skipped."""
        if self.thread is None or not self.thread.is_alive():
            return True
        if not self.has_skipped_upload:
            self.has_skipped_upload = True
            self.reporter.warn(
                f"the model of step {step:,} is not pushed, because the upload of step {self.step:,} is still "
                "running; later uploads may be skipped without a warning"
            )
        return False

    def try_write(self, step: int, action: Callable[[], Any]) -> None:
        """On the main process, run an action that writes to the folder. Do nothing if an earlier action of this step
        has failed."""
        if not self.accelerator.is_main_process or self.last_failed_step == step:
            return
        try:
            with silence_transformers(hide_warnings=False):
                action()
        except WRITE_ERRORS as error:
            self.last_failed_step = step
            self.remove_folder()
            reason = format_hub_error(error)
            self.reporter.warn(
                f"the model of step {step:,} is not pushed, because the model cannot be written: {reason}"
            )

    def start_push(self, step: int) -> None:
        """Push the folder in a background thread."""
        self.step = step
        # huggingface_hub's `run_as_future` is not used: at exit, Python would wait for its thread without a timeout.
        self.thread = threading.Thread(target=self.push, args=(step,), daemon=True)
        self.thread.start()

    def recreate_folder(self) -> None:
        self.remove_folder()
        self.folder.mkdir(parents=True)

    def fill_folder(self, step: int, weights: Tensors) -> None:
        """Write the model card, metrics, flags, license files, and the model with the given weights."""
        self.write_model(self.folder, weights)
        for name in ("metrics.jsonl", RECIPE_FILE):
            if (self.options.output_dir / name).is_file():
                shutil.copyfile(self.options.output_dir / name, self.folder / name)
        architecture = read_json(self.folder / "config.json")["architectures"][0]
        flags = to_flags(self.options)
        card = build_checkpoint_card(
            self.repo_id,
            self.branch,
            step,
            architecture,
            build_common_metadata(flags, self.provenance),
            get_license(flags, self.provenance, self.teacher),
            self.run.hub_push_optimizer,
        )
        card.save(self.folder / CARD_FILE)
        if self.provenance is not None:
            self.provenance.copy_license(self.folder)

    def push(self, step: int) -> None:
        """Push the folder. This method runs in the background thread, writes to no other folder and raises no
        errors."""
        try:
            push_result = push_folder(
                self.folder,
                self.repo_id,
                self.run.hub_private,
                message=f"Step {step}",
                branch=self.branch,
                with_optimizer=self.run.hub_push_optimizer,
                in_background=True,
            )
        except Exception as error:  # errors of the Hub, the Hub client or the disk must not end training
            if not self.has_timed_out:
                reason = format_hub_error(error.__cause__ or error)
                self.reporter.warn(f"the model of step {step:,} was not pushed to the branch {self.branch}: {reason}")
        else:
            self.reporter.print_line(
                "pushed", f"step {step:,} to the branch {self.branch}, commit {push_result.commit}"
            )

    def wait(self, timeout: float) -> None:
        """Wait until the upload is finished or the time limit is reached."""
        if self.thread is None or not self.thread.is_alive():
            return
        self.reporter.print_line("waiting", f"for the upload of step {self.step:,}, up to {timeout:.0f} s")
        self.thread.join(timeout)
        if self.thread.is_alive():
            self.has_timed_out = True
            self.reporter.warn(f"the upload of step {self.step:,} to the branch {self.branch} did not finish in time")

    def remove_folder(self) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder.parent, ignore_errors=True)


def build_branch_uploads(
    options: Any, reporter: Reporter, repo_id: str | None, model: nn.Module, write_model: ModelWritingFunction
) -> BranchUploads | None:
    """Build `BranchUploads`. Return None in a dry run, or if `--hub-checkpoint-every` or the repository is not set."""
    if repo_id is None or options.run.hub_checkpoint_every is None or options.run.dry_run:
        return None
    return BranchUploads(options, reporter, repo_id, model, write_model)
