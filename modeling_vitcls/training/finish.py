"""The end of a run, of any kind: its folder is written, and pushed to the Hub where that was asked for.

The model folder: what `from_pretrained` loads, from a model in training and its gathered weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..checkpoints import WRITE_ERRORS, Tensors
from ..distributed import on_main
from ..files import read_json
from ..hub.publish import push_folder
from ..hub.push_permissions import check_push_rights
from ..hub.verify import verify_pushed
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..options import FinetuneOptions, PretrainOptions
from .distributed_state import unsupported
from .model_report import REPORT
from .results import without_progress_bars
from .runner import RunStopped, Session
from .trainable import merged_weights


def find_repository(options: FinetuneOptions | PretrainOptions, accelerator: Accelerator) -> str | None:
    """Where `--push-to-hub` will push to, once it is sure that it may; None where nothing is to be pushed.

    Raises:
        ValueError, OSError: in one line, on all processes, where it may not or the Hub cannot be reached.
    """
    run, name = options.run, options.output_dir.resolve().name
    if not run.push_to_hub:
        return None
    if run.hub_push_optimizer and (reason := unsupported(accelerator)):
        raise ValueError(f"--hub-push-optimizer: there are no checkpoints to push: {reason}")
    return on_main(accelerator, lambda: check_push_rights(run.hub_model_id, name, run.hub_private))


def write_output(session: Session, write: Callable[[], None]) -> None:
    """Call `write` on the main process, while all wait.

    Raises:
        RunStopped: on all processes, where the folder cannot be written.
    """

    def write_quietly() -> None:
        try:
            with without_progress_bars():
                write()
        except WRITE_ERRORS as error:
            raise OSError(" ".join(str(error).split())) from error

    try:
        on_main(session.accelerator, write_quietly)
    except OSError as error:
        again = "give the same command with --resume" if session.keeps_checkpoints else "start the run anew"
        raise RunStopped(f"cannot write the model to {session.folder} ({error}): make room, then {again}") from error


def finished_before(session: Session, repository: str | None) -> dict[str, Any]:
    """What `--resume` does with a run that has come to its end: it may still have to be pushed. Returns its results.

    Raises:
        RunStopped: see `push`.
    """
    session.reporter.say("finished", f"{session.folder} holds the results of this run: there is nothing to resume")
    push(session, repository)
    return read_json(session.folder / "results.json")


def conclude(session: Session, headline: str, repository: str | None) -> None:
    """Say what came out of a run whose folder is written, and push it where that was asked for.

    Raises:
        RunStopped: see `push`.
    """
    session.reporter.say("result", headline)
    files = ["README.md", *([REPORT] if (session.folder / REPORT).exists() else []), "results.json"]
    session.reporter.say("saved", f"{session.folder} (model, image processor, {', '.join(files)})")
    push(session, repository)
    session.accelerator.end_training()


def push(session: Session, repository: str | None) -> None:
    """Push the folder as it is, and verify what arrived, unless there is no repository or the run is a rehearsal.

    Raises:
        RunStopped: in one line, with the command that finishes the job.
    """
    options = session.options.run
    if repository is None or options.dry_run:
        return
    reporter = session.reporter

    def push_and_verify() -> None:
        pushed = push_folder(
            session.folder, repository, options.hub_private, with_optimizer=options.hub_push_optimizer
        )
        reporter.say("pushed", pushed.in_words)
        if options.hub_verify:
            reporter.say("verifying", "loading it from there in a fresh process")
            reporter.console.print("\n".join(verify_pushed(pushed, session.folder).lines()), markup=False)

    try:
        on_main(session.accelerator, push_and_verify)  # the others wait: see LONGEST_WAIT in distributed.py
    except (ValueError, OSError) as error:
        raise RunStopped(str(error)) from error


def write_model(model: PreTrainedModel, processor: ViTCLSImageProcessor, folder: Path, weights: Tensors) -> None:
    """Write weights, configuration, code and image processor. Call it on the main process.

    Args:
        model: the plain model, which may be sharded.
        weights: all of its tensors, whole, by name; LoRA's additions are merged into what is written.
    """
    with plain_class(model):
        model.save_pretrained(folder, state_dict=merged_weights(weights))
    processor.save_pretrained(folder)


@contextmanager
def plain_class(model: PreTrainedModel) -> Iterator[None]:
    """The model is of its own class inside this block.

    FSDP2 gives it a class of PyTorch's, and Transformers would then save PyTorch's files as the model's code.
    """
    wrapped = type(model)
    plain: Any = next(kind for kind in wrapped.__mro__ if not issubclass(kind, FSDPModule))
    model.__class__ = plain
    try:
        yield
    finally:
        model.__class__ = wrapped
