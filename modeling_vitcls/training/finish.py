"""The end of a run: write its output folder, and push it to the Hub if requested."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub import ModelCard
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..checkpoints import WRITE_ERRORS, Tensors
from ..data.splits import TrainingData
from ..distributed import on_main
from ..files import read_json, write_json
from ..hub.provenance import Provenance
from ..hub.publish import push_folder
from ..hub.push_permissions import check_push_permissions
from ..hub.verify import verify_push
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..options import FinetuneOptions, PretrainOptions
from .distributed_state import get_unsupported_reason
from .model_report import REPORT, build_model_report, can_show_samples, get_model_provenance, write_card
from .results import disable_progress_bars
from .runner import Runner, RunStopped
from .trainable import merge_lora


def check_repository(options: FinetuneOptions | PretrainOptions, accelerator: Accelerator) -> str | None:
    """Return the repository for `--push-to-hub` after checking the permissions; None without `--push-to-hub`.

    Raises:
        ValueError, OSError: on all processes, if pushing is not permitted or the Hub cannot be reached.
    """
    run, name = options.run, options.output_dir.resolve().name
    if not run.push_to_hub:
        return None
    if run.hub_push_optimizer and (reason := get_unsupported_reason(accelerator)):
        raise ValueError(f"--hub-push-optimizer requires checkpoints: {reason}")
    return on_main(accelerator, lambda: check_push_permissions(run.hub_model_id, name, run.hub_private))


def save_output(
    runner: Runner,
    model: PreTrainedModel,
    processor: ViTCLSImageProcessor,
    weights: Tensors,
    data: TrainingData,
    results: dict[str, Any],
    repository: str | None,
    build: Callable[[str, Provenance | None, dict[str, str]], ModelCard],
) -> None:
    """Write model, image processor, card and, last, results.json, which marks the folder as complete.

    Args:
        model: the plain model, which may be sharded.
        weights: all full tensors of the trained model by name, on the main process.
        results: content of results.json; the speed of the model is added.
        repository: repository that the result is pushed to, or None.
        build: builds the card from name, provenance of the initial model and paths of images.

    Raises:
        RunStopped: on all processes, if the folder cannot be written.
    """
    folder, options, reporter = runner.folder, runner.options, runner.reporter

    def write() -> None:
        write_model(model, processor, folder, weights)
        images = build_model_report(
            folder,
            type(model),
            results,
            data.held_out,
            data.label_space,
            runner.accelerator.device,
            options.run.report,
            reporter.warn,
            reporter.track_images,
            can_show_samples(options, repository, reporter.warn),
        )
        if "diagnosis" in results:
            reporter.print_line("diagnosis", results["diagnosis"])
        provenance = get_model_provenance(options)
        card = build(repository or folder.resolve().name, provenance, images)
        write_card(folder, card, provenance, results, options.run, reporter.warn)
        write_json(folder / "results.json", results)

    def write_quietly() -> None:
        try:
            with disable_progress_bars():
                write()
        except WRITE_ERRORS as error:
            raise OSError(" ".join(str(error).split())) from error

    try:
        on_main(runner.accelerator, write_quietly)
    except OSError as error:
        again = "use the same command with --resume" if runner.can_save_checkpoints else "restart the run"
        raise RunStopped(
            f"cannot write the model to {runner.folder} ({error}). Free disk space, then {again}"
        ) from error


def push_finished_run(runner: Runner, repository: str | None) -> dict[str, Any]:
    """Push a run that is already finished, for `--resume`, and return its results.

    Raises:
        RunStopped: see `push`.
    """
    runner.reporter.print_line("finished", f"{runner.folder} already contains the results of this run")
    push(runner, repository)
    return read_json(runner.folder / "results.json")


def finish_run(runner: Runner, headline: str, repository: str | None) -> None:
    """Print the result of a run whose folder is written, and push the folder if requested.

    Raises:
        RunStopped: see `push`.
    """
    runner.reporter.print_line("result", headline)
    files = ["README.md", *([REPORT] if (runner.folder / REPORT).exists() else []), "results.json"]
    runner.reporter.print_line("saved", f"{runner.folder} (model, image processor, {', '.join(files)})")
    push(runner, repository)
    runner.accelerator.end_training()


def push(runner: Runner, repository: str | None) -> None:
    """Push the folder and verify the pushed files. Do nothing without a repository or in a dry run.

    Raises:
        RunStopped: with the command that repeats the push.
    """
    options = runner.options.run
    if repository is None or options.dry_run:
        return
    reporter = runner.reporter

    def push_and_verify() -> None:
        pushed = push_folder(runner.folder, repository, options.hub_private, with_optimizer=options.hub_push_optimizer)
        reporter.print_line("pushed", pushed.summary)
        if options.hub_verify:
            reporter.print_line("verifying", "loading the pushed model in a new process")
            reporter.console.print("\n".join(verify_push(pushed, runner.folder).format_lines()), markup=False)

    try:
        on_main(runner.accelerator, push_and_verify)  # the other processes wait up to LONGEST_WAIT (distributed.py)
    except (ValueError, OSError) as error:
        raise RunStopped(str(error)) from error


def write_model(model: PreTrainedModel, processor: ViTCLSImageProcessor, folder: Path, weights: Tensors) -> None:
    """Write weights, configuration, code and image processor. Call it on the main process.

    Args:
        model: the plain model, which may be sharded.
        weights: all full tensors of the model by name; LoRA weights are merged.
    """
    with use_plain_class(model):
        model.save_pretrained(folder, state_dict=merge_lora(weights))
    processor.save_pretrained(folder)


@contextmanager
def use_plain_class(model: PreTrainedModel) -> Iterator[None]:
    """Restore the model's own class inside this block.

    FSDP2 replaces the class, and Transformers would save PyTorch's source files as the model's code.
    """
    wrapped = type(model)
    plain: Any = next(base for base in wrapped.__mro__ if not issubclass(base, FSDPModule))
    model.__class__ = plain
    try:
        yield
    finally:
        model.__class__ = wrapped
