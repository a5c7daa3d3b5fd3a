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
    from ..conversion.parity_report import Certificate


@dataclass
class ConvertOptions:
    """Convert a ViT and write it to a folder. A difference over the limit writes nothing."""

    source: str
    """timm:NAME, or transformers:PATH_OR_ID; of an id @REVISION may follow: a commit hash, branch or tag."""
    output: Path
    """A folder that does not exist yet, or is empty."""
    random_init: bool = False
    """Fill the source with random values first: a test of the conversion that needs no trained weights."""
    classifier: Literal["keep", "new", "drop"] = "keep"
    """What becomes of the source's classifier."""
    num_labels: int | None = None
    """Labels of a new classifier, also on a source without one."""


OPTIONS = ConvertOptions


def check(options: ConvertOptions) -> None:
    """Exit with status 2 if a flag has a wrong value."""
    if not options.source.startswith(("timm:", "transformers:")):
        stop(f"--source {options.source}: give timm:NAME or transformers:PATH_OR_ID")
    if options.num_labels is not None and options.num_labels < 1:
        stop(f"--num-labels {options.num_labels}: give 1 or more")


def run(options: ConvertOptions) -> None:
    """Convert the model and print the parity report."""
    from transformers.utils.logging import disable_progress_bar

    from ..analysis.card_images import write_card_images
    from ..conversion.convert import take_over

    disable_progress_bar()
    with errors_in_one_line():
        certificate = take_over(
            options.source,
            options.output,
            options.random_init,
            options.classifier,
            options.num_labels,
            write_card_images,
        )
    show(certificate, options.output)


def show(certificate: "Certificate", output: Path) -> None:
    """Print the certificate, and how to load what was written."""
    from rich.console import Console
    from rich.table import Table

    from ..hub.publish import build_push_command

    console = Console(soft_wrap=True, highlight=False)
    table = Table(title=f"{certificate.source} -> {certificate.model_class}: largest differences")
    table.add_column("values")
    for comparison in certificate.comparisons:
        height, width = comparison.image_size
        table.add_column(f"{height} x {width} pixels", justify="right")
    for name in certificate.comparisons[0].differences:
        table.add_row(name, *(f"{comparison.differences[name]:.1e}" for comparison in certificate.comparisons))
    console.print(table)
    for line in remarks(certificate):
        console.print(line)
    auto_class = "AutoModelForImageClassification" if "Classification" in certificate.model_class else "AutoModel"
    console.print(f"\nWritten to {output}. Load it with")
    console.print(f'  model = {auto_class}.from_pretrained("{output}", trust_remote_code=True)')
    console.print(f'  processor = AutoImageProcessor.from_pretrained("{output}", trust_remote_code=True)')
    console.print("or publish it, card and all, and prove that it loads from there:")
    console.print(f"  {build_push_command(output, f'YOUR-NAME/{output.resolve().name}')}")


def remarks(certificate: "Certificate") -> list[str]:
    """What else the certificate says, in lines."""
    preprocessing = certificate.preprocessing
    if preprocessing["assumed_because"]:
        processor = f"Image processor: ASSUMED, because {preprocessing['assumed_because']}; check it"
    else:
        difference = preprocessing["largest_difference_in_grey_levels"]
        processor = f"Image processor: from {preprocessing['origin']}, within {difference:.2g} of 255 grey levels"
    return [
        *([f"Not compared at a second size: {certificate.not_compared}"] if certificate.not_compared else []),
        *certificate.notes,
        f"Classifier: {certificate.classifier}. Limit of differences: {certificate.limit:g}",
        processor,
        "Versions: " + ", ".join(f"{name} {version}" for name, version in certificate.versions.items()),
        *(f"SHA-256 of {file}: {digest}" for file, digest in certificate.sha256.items()),
    ]
