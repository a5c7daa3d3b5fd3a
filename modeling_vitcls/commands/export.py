"""`vitcls export`: export a model to a graph that runs without this package, and compare the outputs of both.

    vitcls export --model runs/mine --format onnx --output mine.onnx
    vitcls export --model runs/mine --format torch --output mine.pt2 --no-dynamic --image-size 224 320

The export also writes OUTPUT.json, which contains the largest output differences, the shapes of the images in the
comparison, and a description of the inputs and outputs of the graph. The export is implemented in
modeling_vitcls/export/.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .parsing import exit_with_message


if TYPE_CHECKING:
    from ..export.exporter import ExportReport

MIN_OPSET = 18  # lowest ONNX opset that torch.onnx supports


@dataclass(frozen=True)
class ExportOptions:
    """Export a model. Nothing is written if the outputs of the graph and the model differ by more than the limit."""

    model: str
    """A model folder, the id of a model on the Hub, or a preset (random weights)."""
    format: Literal["torch", "onnx", "openvino", "transformers.js"]
    """torch.export (.pt2), ONNX (.onnx), OpenVINO (.xml and .bin), or a folder for transformers.js."""
    output: Path
    """Output file, which must not exist yet. With --format transformers.js: a new or empty folder. --backend finds
    MODEL/model.onnx and MODEL/model.xml."""
    int8: bool = False
    """With --format onnx or openvino: quantize the matrix products to int8 (NNCF), calibrated on training images of
    --dataset, and measure the accuracy."""
    max_drop: float = 0.5
    """With --int8: largest loss of accuracy, in points."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels. With --no-dynamic, the graph accepts only this size; otherwise, the size is used
    only in the comparison. Default: the image size of the model."""
    dynamic: bool = True
    """Accept images of different sizes, not only of --image-size. The batch size is always dynamic."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """dtype of the weights and computations. Inputs and outputs are always float32."""
    opset: int | None = None
    """ONNX opset. Default: the default opset of torch.onnx."""
    dataset: str | None = None
    """With --int8 or --format transformers.js: labeled images, as in `vitcls evaluate`, to measure the accuracy."""
    split: str | None = None
    """Split of --dataset, as in `vitcls evaluate`."""


OPTIONS_CLASS = ExportOptions


def check_options(options: ExportOptions) -> None:
    """Exit with status 2 if a flag has an invalid value or if flags contradict each other."""
    if options.image_size is not None and min(options.image_size) < 1:
        exit_with_message(
            f"error: --image-size must be two positive numbers, but it is {' '.join(map(str, options.image_size))}"
        )
    graph_settings = (options.image_size, options.dynamic, options.dtype, options.opset)
    if options.format == "transformers.js" and graph_settings != (None, True, "float32", None):
        exit_with_message(
            "error: --format transformers.js does not support --image-size, --no-dynamic, --dtype or --opset"
        )
    if options.dataset is not None and options.format != "transformers.js" and not options.int8:
        exit_with_message(f"error: --dataset requires --int8 or --format transformers.js, not {options.format}")
    if options.int8 and (options.dataset is None or options.format not in ("onnx", "openvino")):
        exit_with_message("error: --int8 requires --format onnx or openvino, and --dataset for calibration. Set both")
    if options.split is not None and options.dataset is None:
        exit_with_message("error: --split requires --dataset. Set --dataset")
    if options.opset is not None and options.format == "torch":
        exit_with_message("error: --opset requires --format onnx or openvino, but --format is torch")
    if options.opset is not None and options.opset < MIN_OPSET:
        exit_with_message(f"error: --opset must be at least {MIN_OPSET}, but it is {options.opset}")


def run(options: ExportOptions) -> None:
    """Export the model and print the largest differences."""
    from ..export.exporter import export_model
    from ..export.transformers_js import export_for_transformers_js

    silence_exporters()
    if options.format == "transformers.js":
        web_report = export_for_transformers_js(options.model, options.output, options.dataset, options.split)
        for comparison in web_report.comparisons:
            difference, agreement = comparison.largest_difference, comparison.top1_agreement
            print(f"{comparison.file:26} largest difference {difference:.1e}, same top-1 label: {agreement:.1%}")
        if (scores := web_report.labeled) is not None:
            print(f"{scores.metric} on {scores.num_images} images of {scores.dataset} ({scores.split}):")
            for name, score in {"PyTorch": scores.model, **scores.files}.items():
                print(f"{name:26} {score:.2%}")
        return
    if options.int8:
        from ..export.quantization import export_int8

        assert options.dataset is not None
        result = export_int8(
            options.model, options.format, options.output, options.dataset, options.split, options.max_drop
        )
        print(
            f"{options.output}: {result['metric']} {result['int8']:.2%} in int8, {result['float32']:.2%} in float32, "
            f"on {result['num_images']} images; {result['num_bytes'] / 2**20:.1f} MiB"
        )
        return
    report = export_model(
        options.model,
        options.format,
        options.output,
        options.image_size,
        options.dynamic,
        options.dtype,
        options.opset,
    )
    print_report(report, options.output)


def silence_exporters() -> None:
    """Disable progress bars and the warnings of torch.export and torch.onnx."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\.|onnxscript|copyreg")


def print_report(report: "ExportReport", output: Path) -> None:
    """Print the report and the code to run the exported file."""
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    absolute_limit, relative_limit = report.limit
    limit = f"{absolute_limit:g}" + (f" + {relative_limit:g} of the largest value" if relative_limit else "")
    table = Table(title=f"Largest differences between {report.format} and {report.model} (limit {limit})")
    table.add_column("images")
    for name in report.outputs:
        table.add_column(name, justify="right")
    for comparison in report.tried:
        batch_size, _, height, width = comparison.shape
        table.add_row(
            f"{batch_size} of {height} x {width}", *(f"{value:.1e}" for value in comparison.differences.values())
        )
    console.print(table)
    for line in format_notes(report):
        console.print(line, markup=False)
    console.print(
        f"\nWrote the model to {output}, and a description of its inputs and outputs to {output}.json. "
        "Run the exported model with",
        markup=False,
    )
    for line in USAGE[report.format]:
        console.print(f"  {line.format(file=output)}", markup=False)


def format_notes(report: "ExportReport") -> list[str]:
    """Format all fields of the report except the differences, one per line."""
    height, width = report.input["image_size"]
    smallest_size_text = " x ".join(map(str, report.input["smallest_image_size"]))
    accepted_sizes_text = f" and images of at least {smallest_size_text} pixels"
    if "height" not in report.input["shape"]:
        accepted_sizes_text = f", but only images of {height} x {width} pixels"
    opset = [] if report.opset is None else [f"opset {report.opset}"]
    return [
        f"Accepts any batch size{accepted_sizes_text}",
        *([f"The image size is fixed: {report.fixed_because}"] if report.fixed_because else []),
        *(["The weights are random, because presets are untrained"] if report.weights == "random" else []),
        *(["The checkpoint has no image processor"] if report.preprocessing is None else []),
        "Versions: " + ", ".join([*opset, *(f"{name} {version}" for name, version in report.versions.items())]),
    ]


USAGE = {
    "torch": ('outputs = torch.export.load("{file}").module()(pixel_values)',),
    "onnx": (
        'session = onnxruntime.InferenceSession("{file}")',
        'outputs = session.run(None, {{"pixel_values": pixel_values}})',
    ),
    "openvino": (
        'compiled = openvino.Core().compile_model("{file}", "CPU", {{"INFERENCE_PRECISION_HINT": "f32"}})',
        'outputs = compiled({{"pixel_values": pixel_values}})',
    ),
}
