"""`vitcls export`: write a model as one graph that runs without this package, compared with the model.

    python scripts/export.py --model runs/mine --format onnx --output mine.onnx
    python scripts/export.py --model runs/mine --format torch --output mine.pt2 --no-dynamic --image-size 224 320

FILE.json contains the largest differences, the inputs that were compared and the signature of the graph. The export is
implemented in modeling_vitcls/export/.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .parsing import errors_in_one_line, stop


if TYPE_CHECKING:
    from ..export.export_report import Certificate

LOWEST_OPSET = 18  # of torch.onnx


@dataclass(frozen=True)
class ExportOptions:
    """Export a model. A difference over the limit writes nothing."""

    model: str
    """A folder, a model of the Hub, or a preset (random weights)."""
    format: Literal["torch", "onnx", "openvino"]
    """torch.export (.pt2), ONNX (.onnx), or OpenVINO (.xml and .bin)."""
    output: Path
    """A file that does not exist yet."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels that the graph is meant for. Default: the model's."""
    dynamic: bool = True
    """Take images of any size; otherwise of --image-size alone. Batches are of any size in either case."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of weights and calculations; the graph takes and gives float32."""
    opset: int | None = None
    """Version of the ONNX operators. Default: torch's choice."""


OPTIONS = ExportOptions


def check(options: ExportOptions) -> None:
    """Exit with status 2 if flags do not go together."""
    if options.image_size is not None and min(options.image_size) < 1:
        stop(f"--image-size {' '.join(map(str, options.image_size))}: give 1 or more")
    if options.opset is not None and options.format == "torch":
        stop("--opset is for ONNX, and --format is torch")
    if options.opset is not None and options.opset < LOWEST_OPSET:
        stop(f"--opset {options.opset}: torch exports {LOWEST_OPSET} or later")


def run(options: ExportOptions) -> None:
    """Export the model and print the largest differences."""
    from transformers.utils.logging import disable_progress_bar

    from ..export.exporter import export_model

    disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\.|onnxscript|copyreg")  # of the exporters, about themselves
    with errors_in_one_line():
        certificate = export_model(
            options.model,
            options.format,
            options.output,
            options.image_size,
            options.dynamic,
            options.dtype,
            options.opset,
        )
    show(certificate, options.output)


def show(certificate: "Certificate", output: Path) -> None:
    """Print the certificate, and how to run what was written."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    table = Table(
        title=f"{certificate.model} -> {certificate.format}: largest differences, limit {limit(certificate)}"
    )
    table.add_column("images")
    for name in certificate.outputs:
        table.add_column(name, justify="right")
    for trial in certificate.tried:
        batch, _, height, width = trial.shape
        table.add_row(f"{batch} of {height} x {width}", *(f"{value:.1e}" for value in trial.differences.values()))
    console.print(table)
    for line in remarks(certificate):
        console.print(line, markup=False)
    console.print(f"\nWritten to {output}; how to feed it: {output}.json. Run it with", markup=False)
    for line in USES[certificate.format]:
        console.print(f"  {line.format(file=output)}", markup=False)


def limit(certificate: "Certificate") -> str:
    """The limit in words."""
    absolute, relative = certificate.limit
    return f"{absolute:g}" + (f" + {relative:g} of the largest value" if relative else "")


def remarks(certificate: "Certificate") -> list[str]:
    """What else the certificate says, in lines."""
    height, width = certificate.input["image_size"]
    smallest = " x ".join(map(str, certificate.input["smallest_image_size"]))
    sizes = f"any image size from {smallest} pixels"
    if "height" not in certificate.input["shape"]:
        sizes = f"images of {height} x {width} pixels alone"
    opset = [] if certificate.opset is None else [f"opset {certificate.opset}"]
    return [
        f"Takes any batch, {sizes}",
        *([f"One image size only: {certificate.fixed_because}"] if certificate.fixed_because else []),
        *(["The weights are random: a preset has learned nothing"] if certificate.weights == "random" else []),
        *(["No image processor stands beside the weights"] if certificate.preprocessing is None else []),
        "Versions: " + ", ".join([*opset, *(f"{name} {version}" for name, version in certificate.versions.items())]),
    ]


USES = {
    "torch": ('answers = torch.export.load("{file}").module()(pixel_values)',),
    "onnx": (
        'session = onnxruntime.InferenceSession("{file}")',
        'answers = session.run(None, {{"pixel_values": pixel_values}})',
    ),
    "openvino": (
        'compiled = openvino.Core().compile_model("{file}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})',
        'answers = compiled({{"pixel_values": pixel_values}})',
    ),
}
