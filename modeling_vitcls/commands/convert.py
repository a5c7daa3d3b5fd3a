"""`vitcls convert`: convert a timm or transformers ViT, or convert a vitcls model to a transformers model.

    vitcls convert --source timm:vit_base_patch14_reg4_dinov2.lvd142m --output converted
    vitcls convert --source transformers:facebook/dinov2-base@COMMIT --output converted --num-labels 10
    vitcls convert --source dinov2_vits14_reg4_pretrain.pth --output converted
    vitcls convert --to transformers --model runs/mine --output native

The conversions are implemented in modeling_vitcls/conversion/convert.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .parsing import exit_with_message


if TYPE_CHECKING:
    from ..conversion.parity_report import ParityReport


@dataclass
class ConvertOptions:
    """Convert a ViT and save the converted model. Nothing is written if the outputs of the two models differ by more
    than the limit."""

    output: Path
    """Output folder, which must be empty or must not exist."""
    source: str | None = None
    """timm:NAME, transformers:PATH_OR_ID or a state-dict file. An id may end with @REVISION (commit, branch or
    tag)."""
    to: Literal["vitcls", "transformers"] = "vitcls"
    """Convert --source to a vitcls model, or --model to a transformers model, which requires no remote code."""
    model: str | None = None
    """With --to transformers: folder or Hub id of a vitcls model."""
    any_size: bool = False
    """With --to transformers: require the same outputs for images of any size, not only of the native size."""
    random_init: bool = False
    """Initialize the source with random weights, to test the conversion without trained weights."""
    classifier: Literal["keep", "new", "drop"] = "keep"
    """Keep the classifier of the source, replace it with a new classifier, or drop it."""
    num_labels: int | None = None
    """Number of labels of a new classifier. The source does not need to have a classifier."""
    family: str | None = None
    """Model family of a state-dict file, such as dino, ibot, mae or dinov2. Default: detected from the parameter
    names."""


OPTIONS_CLASS = ConvertOptions


def check_options(options: ConvertOptions) -> None:
    """Exit with status 2 if a flag has an invalid value or if flags contradict each other."""
    if options.to == "transformers":
        if options.model is None or options.source is not None:
            exit_with_message("error: --to transformers requires --model and does not support --source")
        return
    if options.model is not None or options.source is None:
        exit_with_message("error: --to vitcls requires --source and does not support --model")
    if not options.source.startswith(("timm:", "transformers:")) and not Path(options.source).suffix:
        exit_with_message(
            f"error: --source {options.source} is not supported. Use timm:NAME, transformers:PATH_OR_ID or a "
            "state-dict file"
        )
    if options.num_labels is not None and options.num_labels < 1:
        exit_with_message(f"error: --num-labels must be at least 1, but it is {options.num_labels}")


def run(options: ConvertOptions) -> None:
    """Convert the model and print the parity report."""
    from ..conversion.convert import convert_checkpoint, write_native_model
    from ..publishing.card import write_card

    if options.to == "transformers":
        report = write_native_model(str(options.model), options.output, options.any_size)
        write_card(options.output)
        print_report(report, options.output, trust_argument="")
        return
    report = convert_checkpoint(
        str(options.source),
        options.output,
        options.random_init,
        options.classifier,
        options.num_labels,
        options.family,
    )
    write_card(options.output)
    print_report(report, options.output)


def print_report(report: "ParityReport", output: Path, trust_argument: str = ", trust_remote_code=True") -> None:
    """Print the parity report, code that loads the model, and the command that pushes the model to the Hub."""
    from rich.console import Console
    from rich.table import Table

    from ..publishing.push import build_push_command

    console = Console(soft_wrap=True, highlight=False)
    table = Table(title=f"Largest differences between {report.model_class} and {report.source}")
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
    console.print(f'  model = {auto_class}.from_pretrained("{output}"{trust_argument})')
    console.print(f'  processor = AutoImageProcessor.from_pretrained("{output}"{trust_argument})')
    console.print("Push the model and its card to the Hub, and verify the pushed model, with")
    console.print(f"  {build_push_command(output, f'YOUR-NAME/{output.resolve().name}')}")


def format_notes(report: "ParityReport") -> list[str]:
    """Format all fields of the parity report except the differences, one per line."""
    preprocessing = report.preprocessing
    if preprocessing["assumed_because"]:
        processor_note = (
            f"Image processor: the settings are assumed, because {preprocessing['assumed_because']}. Check them"
        )
    else:
        difference = preprocessing["largest_difference_in_grey_levels"]
        processor_note = (
            f"Image processor: settings of {preprocessing['origin']}; pixel values differ by at most "
            f"{difference:.2g} gray levels (0 to 255)"
        )
    return [
        *([f"Not compared at a second image size: {report.not_compared}"] if report.not_compared else []),
        *report.notes,
        f"Classifier: {report.classifier}. Maximum allowed difference: {report.limit:g}",
        processor_note,
        "Versions: " + ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        *([f"SHA-256 of the source ({report.family}): {report.source_sha256}"] if report.source_sha256 else []),
        *(f"SHA-256 of {file}: {digest}" for file, digest in report.sha256.items()),
    ]
