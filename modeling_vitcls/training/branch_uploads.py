"""Checkpoints on a branch of the run's repository, `--hub-checkpoint-every`: pushed while training goes on.

    the step is due -> all processes gather the weights -> the main one writes a model folder, and trains on
                                                           -> a thread pushes the folder, then removes it

One upload at a time: a step that is due while one is under way is left out. Whatever goes wrong costs a warning, never
the run. The branch holds models as they are evaluated, with averaged weights where there are any, that load as the
result does; with `--hub-push-optimizer` also what `--resume` needs.
"""

import shutil
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import nn

from ..checkpoints import WRITE_ERRORS, CheckpointStore, Tensors
from ..distributed import on_main
from ..files import read_json
from ..hub.card import checkpoint_card, licence_of, metadata_of_any_model
from ..hub.connection import in_one_line
from ..hub.manifest import CARD, RECIPE
from ..hub.provenance import Origin
from ..hub.publish import push_folder
from ..options import as_flags
from .distributed_state import gather, named_tensors
from .loop import Interrupted, TrainingState
from .model_report import origin_of_run, teacher_of_run
from .results import without_progress_bars
from .runner import Session


SECONDS_AT_THE_END = 600.0
SECONDS_AFTER_A_SIGNAL = 20.0  # launchers kill after 30

WriteModel = Callable[[Path, Tensors], None]  # folder, weights -> what from_pretrained loads
Gathered = tuple[dict[str, Tensors], dict[str, Any]]  # tensors and facts, as CheckpointStore.save takes them


class BranchUploads:
    """Context manager around the training loop: at its end it waits for the upload that is under way, for a while."""

    def __init__(self, session: Session, repo_id: str, model: nn.Module, write_model: WriteModel) -> None:
        """
        Args:
            repo_id: `namespace/name`.
            model: the plain model, whose weights the prepared one shares.
            write_model: called on the main process.
        """
        self.accelerator = session.accelerator
        self.reporter = session.reporter
        self.options = session.options
        self.run = session.options.run
        self.folder = session.folder / ".hub-checkpoint" / repo_id.rpartition("/")[2]
        self.repo_id = repo_id
        self.branch = session.options.run.hub_checkpoint_branch
        self.model = model
        self.write_model = write_model
        self.origin: Origin | None = None
        self.teacher: Origin | None = None
        self.thread: threading.Thread | None = None
        self.step = 0  # of the last upload
        self.failed = 0  # the last step that could not be written
        self.has_skipped = False
        self.is_given_up = False

    # All processes together ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.remove()  # what a killed run left
        if self.accelerator.is_main_process:
            self.origin = origin_of_run(self.options)  # now, since training does not wait for the network
            self.teacher = teacher_of_run(self.options)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait(SECONDS_AT_THE_END if kind is None else SECONDS_AFTER_A_SIGNAL)
            if kind is None or kind is Interrupted:  # else the others may not be here
                self.accelerator.wait_for_everyone()  # a launcher ends all processes once one has ended
        finally:
            self.remove()

    def publish(self, state: TrainingState, gather_checkpoint: Callable[[], Gathered]) -> None:
        """Called after each step: push the model if it is due.

        Args:
            gather_checkpoint: all that `--resume` needs; all processes call it together.
        """
        if state.step % self.run.hub_checkpoint_every or not on_main(
            self.accelerator, lambda: self.is_free(state.step)
        ):
            return
        step = state.step
        self.write(step, self.make_folder)
        if self.run.hub_push_optimizer:  # written at once, since the gathered tensors may be the model's own
            tensors, facts = gather_checkpoint()
            self.write(step, lambda: self.checkpoints().save(step, tensors, facts, is_best=False))
        with nullcontext() if state.ema is None else state.ema.in_place():
            weights = gather(named_tensors(self.model), self.accelerator.is_main_process)
            self.write(step, lambda: self.fill_folder(step, weights))
        if self.accelerator.is_main_process:
            self.start(step)

    # On the main process ---------------------------------------------------------------------------------------------

    def is_free(self, step: int) -> bool:
        """Whether no upload is under way; says once what happens where one is."""
        if self.thread is None or not self.thread.is_alive():
            return True
        if not self.has_skipped:
            self.has_skipped = True
            self.reporter.warn(
                f"step {step:,} is not pushed, since the upload of step {self.step:,} is still under way; later "
                "steps may be left out too, without a word"
            )
        return False

    def write(self, step: int, action: Callable[[], Any]) -> None:
        """Do a part of writing the folder, on the main process, unless an earlier part of it failed."""
        if not self.accelerator.is_main_process or self.failed == step:
            return
        try:
            with without_progress_bars():
                action()
        except WRITE_ERRORS as error:
            self.failed = step
            self.remove()
            self.reporter.warn(f"step {step:,} is not pushed, as it cannot be written: {in_one_line(error)}")

    def start(self, step: int) -> None:
        """Push the folder in the background, if all of it was written."""
        if self.failed == step:
            return
        self.step = step
        # Not huggingface_hub's `run_as_future`: the end of Python waits for its thread without any limit.
        self.thread = threading.Thread(target=self.push, args=(step,), daemon=True)
        self.thread.start()

    def make_folder(self) -> None:
        """An empty folder to push."""
        self.remove()
        self.folder.mkdir(parents=True)

    def checkpoints(self) -> CheckpointStore:
        """Where `--resume` looks for its checkpoint."""
        return CheckpointStore(self.folder / "checkpoints", keep=1)

    def fill_folder(self, step: int, weights: Tensors) -> None:
        """Write the model, and what is told about it."""
        self.write_model(self.folder, weights)
        for name in ("metrics.jsonl", RECIPE):
            if (self.options.output_dir / name).is_file():
                shutil.copyfile(self.options.output_dir / name, self.folder / name)
        architecture = read_json(self.folder / "config.json")["architectures"][0]
        flags = as_flags(self.options)
        card = checkpoint_card(
            self.repo_id,
            self.branch,
            step,
            architecture,
            metadata_of_any_model(flags, self.origin),
            licence_of(flags, self.origin, self.teacher),
            self.run.hub_push_optimizer,
        )
        card.save(self.folder / CARD)
        if self.origin is not None:
            self.origin.copy_license(self.folder)

    def push(self, step: int) -> None:
        """What the thread does. It writes to no other folder, and raises nothing."""
        try:
            pushed = push_folder(
                self.folder,
                self.repo_id,
                self.run.hub_private,
                message=f"Step {step}",
                branch=self.branch,
                with_optimizer=self.run.hub_push_optimizer,
                in_background=True,
            )
        except Exception as error:  # of the Hub, its client, or the disk: training goes on in any case
            if not self.is_given_up:
                why = in_one_line(error.__cause__ or error)
                self.reporter.warn(f"step {step:,} was not pushed to the branch {self.branch}: {why}")
        else:
            self.reporter.say("pushed", f"step {step:,} to the branch {self.branch}, commit {pushed.commit}")

    def wait(self, seconds: float) -> None:
        """Until the upload is done, but no longer than that."""
        if self.thread is None or not self.thread.is_alive():
            return
        self.reporter.say("waiting", f"for the upload of step {self.step:,}, {seconds:.0f} s at most")
        self.thread.join(seconds)
        if self.thread.is_alive():
            self.is_given_up = True
            self.reporter.warn(f"gave up the upload of step {self.step:,}, which is not on the branch {self.branch}")

    def remove(self) -> None:
        """Remove the folder that was pushed."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder.parent, ignore_errors=True)


def branch_uploads(
    session: Session, repository: str | None, model: nn.Module, write_model: WriteModel
) -> BranchUploads | None:
    """What `--hub-checkpoint-every` asks for; None where it does not, or in a rehearsal.

    Args:
        repository: `namespace/name`, where there is something to push.
    """
    run = session.options.run
    if repository is None or run.hub_checkpoint_every is None or run.dry_run:
        return None
    return BranchUploads(session, repository, model, write_model)
