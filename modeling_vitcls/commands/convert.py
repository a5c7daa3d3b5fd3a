"""`vitcls convert`: convert a ViT of timm or transformers exactly: model, image processor, card and parity report.

    python scripts/convert.py --source timm:vit_base_patch14_reg4_dinov2.lvd142m --output converted
    python scripts/convert.py --source transformers:facebook/dinov2-base@COMMIT --output converted --num-labels 10

The conversion is implemented in modeling_vitcls/conversion/convert.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .parsing import errors_in_one_line, stop


if TYPE_CHECKING:
    from ..conversion.parity_report import ParityReport


@dataclass
class ConvertOptions:
    """Convert a ViT and write it to a folder. Nothing is written if a difference exceeds the limit."""

    source: str
    """timm:NAME, transformers:PATH_OR_ID or a state-dict file. An id may end with @REVISION (commit, branch, tag)."""
    output: Path
    """A folder that does not exist or is empty."""
    random_init: bool = False
    """Fill the source with random values, to test the conversion without trained weights."""
    classifier: Literal["keep", "new", "drop"] = "keep"
    """Keep the classifier of the source, replace it by a new classifier, or drop it."""
    num_labels: int | None = None
    """Number of labels of a new classifier, also if the source has no classifier."""
    family: str | None = None
    """Family of a state-dict file, such as dino, ibot, mae or dinov2. Default: detected."""


OPTIONS = ConvertOptions


def check(options: ConvertOptions) -> None:
    """Exit with status 2 if a flag has a wrong value."""
    if not options.source.startswith(("timm:", "transformers:")) and not Path(options.source).suffix:
        stop(
            f"--source {options.source} is not supported. Use timm:NAME, transformers:PATH_OR_ID or a state-dict file"
        )
    if options.num_labels is not None and options.num_labels < 1:
        stop(f"--num-labels must be at least 1, but is {options.num_labels}")


def run(options: ConvertOptions) -> None:
    """Convert the model and print the parity report."""
    from transformers.utils.logging import disable_progress_bar

    from ..analysis.card_images import write_card_images
    from ..conversion.convert import convert_checkpoint

    disable_progress_bar()
    with errors_in_one_line():
        report = convert_checkpoint(
            options.source,
            options.output,
            options.random_init,
            options.classifier,
            options.num_labels,
            write_card_images,
            options.family,
        )
    print_report(report, options.output)


def print_report(report: "ParityReport", output: Path) -> None:
    """Print the parity report, and the code and command that load and publish the model."""
    from rich.console import Console
    from rich.table import Table

    from ..hub.publish import build_push_command

    console = Console(soft_wrap=True, highlight=False)
    table = Table(title=f"Largest differences of {report.model_class} from {report.source}")
    table.add_column("values")
    for comparison in report.comparisons:
        height, width = comparison.image_size
        table.add_column(f"{height} x {width} pixels", justify="right")
    for name in report.comparisons[0].differences:
        table.add_row(name, *(f"{comparison.differences[name]:.1e}" for comparison in report.comparisons))
    console.print(table)
    for line in format_notes(report):
        console.print(line)
    auto_class = "AutoModelForImageClassification" if "Classification" in report.model_class else "AutoModel"
    console.print(f"\nWritten to {output}. Load the model with")
    console.print(f'  model = {auto_class}.from_pretrained("{output}", trust_remote_code=True)')
    console.print(f'  processor = AutoImageProcessor.from_pretrained("{output}", trust_remote_code=True)')
    console.print("or publish the model and its card, and verify the published model, with")
    console.print(f"  {build_push_command(output, f'YOUR-NAME/{output.resolve().name}')}")


def format_notes(report: "ParityReport") -> list[str]:
    """Return the parity report without the differences, as lines of text."""
    preprocessing = report.preprocessing
    if preprocessing["assumed_because"]:
        processor = f"Image processor: ASSUMED, because {preprocessing['assumed_because']}. Check its settings"
    else:
        difference = preprocessing["largest_difference_in_grey_levels"]
        processor = f"Image processor: from {preprocessing['origin']}, within {difference:.2g} of 255 gray levels"
    return [
        *([f"Not compared at a second size: {report.not_compared}"] if report.not_compared else []),
        *report.notes,
        f"Classifier: {report.classifier}. Maximum difference: {report.limit:g}",
        processor,
        "Versions: " + ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        *([f"SHA-256 of the source, {report.family}: {report.source_sha256}"] if report.source_sha256 else []),
        *(f"SHA-256 of {file}: {digest}" for file, digest in report.sha256.items()),
    ]
