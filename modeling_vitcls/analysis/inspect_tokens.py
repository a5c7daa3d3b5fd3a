"""The command: options -> model and images -> the page and the figures, and what it comes to on the terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from transformers.configuration_utils import PreTrainedConfig

from ..adaptation_vitcls import load_checkpoint
from ..data.held_out import RESULTS_FILE, read_record
from ..files import read_json
from ..hub.loading import MODEL_FILES, local_copy
from ..inference.evaluate import table
from ..inference.load_model import is_preset, load_model
from ..options import InspectOptions
from .inspection import Inspection, Watch, inspect_model, silent
from .inspection_inputs import open_images
from .report import SIGNS, named_after, patch_size_table, write_figures, write_page
from .report_data import has_room_for_heads


STYLES = {"good": "green", "bad": "red", "doubtful": "yellow", "neutral": "dim"}


def inspect_tokens(options: InspectOptions) -> Inspection:
    """Inspect a saved model, write the page, and print the verdicts.

    Raises:
        ValueError, OSError: in one line, for a model or images that cannot be read or do not fit, and files that
            cannot be written.
    """
    console = Console(soft_wrap=True, highlight=False)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    if is_preset(options.model):
        raise ValueError(f"{options.model} is a preset, which has learned nothing yet: give a folder or a Hub id")
    folder = local_copy(options.model, [*MODEL_FILES, RESULTS_FILE], options.revision)
    model, processor = load_any(folder)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    images = open_images(options, model, read_record(folder))
    for file in (options.output, options.json):
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)  # before the work is done
    with progress(errors) as watch:
        inspection = inspect_model(
            model,
            processor,
            **images.to_inspect(options.num_images, options.max_images),
            movement=movement_of(folder),
            patch_sizes=options.patch_sizes,
            batch_size=options.batch_size,
            warn=lambda message: errors.print(f"WARNING: {message}", style="bold yellow", markup=False),
            watch=watch,
        )
    write_page(options.output, inspection, named_after(options.model), images.source)
    if options.json is not None:
        write_figures(options.json, inspection, named_after(options.model))
    show(inspection, options, console)
    return inspection


def load_any(folder: str) -> tuple[Any, Any]:
    """A model as a classifier if it is one, else as an encoder; and its image processor."""
    names = load_checkpoint(PreTrainedConfig.get_config_dict, folder)[0].get("architectures") or []
    return load_model(folder, with_head=any(name.endswith("Classification") for name in names))


def movement_of(folder: str) -> dict[str, float] | None:
    """How far training moved each token, where the run that made the model wrote it down."""
    file = Path(folder, RESULTS_FILE)
    return (read_json(file).get("token_movement") or None) if file.is_file() else None


@contextmanager
def progress(console: Console) -> Iterator[Watch]:
    """A bar on a terminal, nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    if not console.is_terminal:
        yield silent
        return
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


# What is printed -----------------------------------------------------------------------------------------------------


def show(inspection: Inspection, options: InspectOptions, console: Console) -> None:
    """The verdicts, what other patch sizes would mean, and where everything is."""
    if inspection.verdicts:
        console.print(verdict_table(inspection))
    else:
        console.print("the model has no special tokens to judge")
    console.print(inspection.artifacts, markup=False)
    for sentence in inspection.depth:
        console.print(sentence, markup=False)
    if inspection.patch_sizes:
        found = patch_size_table(inspection.patch_sizes)
        console.print(table("Patch sizes", found["header"], found["rows"]))
        for sentence in found["sentences"]:
            console.print(sentence, markup=False)
    size = options.output.stat().st_size / 2**20
    counted = f"statistics over {inspection.findings.num_images:,} images, {len(inspection.readings)} of them shown"
    without = "" if has_room_for_heads(inspection.readings) else "; too large for maps of single heads"
    console.print(f"saved {options.output} ({size:.1f} MB{without}; {counted})", markup=False)
    if options.json is not None:
        console.print(f"saved {options.json}", markup=False)


def verdict_table(inspection: Inspection) -> Table:
    """Token, verdict, and why."""
    printed = Table()
    for name in ("token", "verdict", "why"):
        printed.add_column(name)
    for verdict in inspection.verdicts:
        sign = SIGNS[verdict.word, verdict.meaning]
        word = f"[{STYLES[verdict.meaning]}]{sign} {verdict.word}[/]"
        printed.add_row(escape(verdict.token), word, escape(verdict.reason))
    return printed
