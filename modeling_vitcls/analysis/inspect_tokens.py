"""Inspect a saved model on images, write the report and JSON values, and print the verdicts: `vitcls inspect`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from transformers.configuration_utils import PreTrainedConfig

from ..conversion.any_checkpoint import resolve_checkpoint
from ..data.held_out import RESULTS_FILE, read_held_out_record
from ..files import read_json
from ..hub.loading import MODEL_FILE_PATTERNS
from ..inference.load_model import is_preset, load_model
from ..options import InspectOptions
from .inspection import Inspection, ProgressCallback, inspect_model, open_images
from .report import SIGNS, count_images_with_heads, get_model_name, write_json_values, write_page


SPEED_ESTIMATE_PERIOD = 600  # period in seconds over which the progress bar estimates the speed
RATING_STYLES = {"good": "green", "bad": "red", "doubtful": "yellow", "neutral": "dim"}


def inspect_tokens(options: InspectOptions) -> Inspection:
    """Inspect a saved model, write the report, and print the verdicts.

    Raises:
        ValueError, OSError: if the model or the images cannot be read, the images do not match the model, or the
            report cannot be written. The message is a single line.
    """
    console = Console(soft_wrap=True, highlight=False)
    error_console = Console(stderr=True, soft_wrap=True, highlight=False)
    if is_preset(options.model):
        raise ValueError(f"{options.model} is a preset without trained weights. Pass a folder or a Hub id.")
    source = options.model if options.revision is None else f"{options.model}@{options.revision}"
    folder = resolve_checkpoint(source, [*MODEL_FILE_PATTERNS, RESULTS_FILE])
    architectures = PreTrainedConfig.get_config_dict(folder)[0].get("architectures") or []
    model, processor = load_model(folder, use_head=any(name.endswith("Classification") for name in architectures))
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu")).eval()  # type: ignore[arg-type]  # `to` is decorated
    results = read_json(Path(folder, RESULTS_FILE)) if Path(folder, RESULTS_FILE).is_file() else {}
    images = open_images(options, model, read_held_out_record(folder))
    for file in (options.output, options.json):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)  # raise errors before the measurements
    with show_progress(error_console) as on_progress:
        inspection = inspect_model(
            model,
            processor,
            **images.build_arguments(options.num_images, options.max_images),
            token_movement=results.get("token_movement"),
            batch_size=options.batch_size,
            on_warning=lambda message: error_console.print(f"WARNING: {message}", style="bold yellow", markup=False),
            on_progress=on_progress,
        )
    write_page(options.output, inspection, get_model_name(options.model), images.source)
    if options.json is not None:
        write_json_values(options.json, inspection, get_model_name(options.model))
    print_inspection(inspection, options, console)
    return inspection


@contextmanager
def show_progress(console: Console) -> Iterator[ProgressCallback]:
    """Show a progress bar with the remaining time, if the output is a terminal."""
    period, is_hidden = SPEED_ESTIMATE_PERIOD, not console.is_terminal
    with Progress(console=console, transient=True, speed_estimate_period=period, disable=is_hidden) as bar:
        task = bar.add_task("", total=None)
        yield lambda description, num_finished, total: bar.update(
            task, description=description, completed=num_finished, total=total
        )


# Output -------------------------------------------------------------------------------------------------------------


def print_inspection(inspection: Inspection, options: InspectOptions, console: Console) -> None:
    """Print the verdicts and the paths of the written files."""
    if not inspection.verdicts:
        console.print("The model has no special tokens.")
    for verdict in [*inspection.verdicts, *inspection.tasks, inspection.heads, inspection.patches]:
        headline = f"[{RATING_STYLES[verdict.rating]}]{SIGNS[verdict.rating]} {verdict.word}[/]"
        console.print(f"[bold]{escape(verdict.token)}[/]: {headline}. {escape(verdict.reason)}")
    for name, check in inspection.map_checks.items():
        console.print(check.describe(name), markup=False)
    num_with_heads, num_shown = count_images_with_heads(inspection.image_reports), len(inspection.image_reports)
    console.print(
        f"saved {options.output} (statistics over {inspection.findings.num_images:,} images, {num_shown} shown, "
        f"{num_with_heads} with individual heads)",
        markup=False,
    )
    if options.json is not None:
        console.print(f"saved {options.json}", markup=False)
