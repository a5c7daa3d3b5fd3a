"""`vitcls export`: export a model to ONNX, and compare the outputs (modeling_vitcls/exporting/)."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..exporting.options import ExportOptions


def run_export(options: ExportOptions) -> dict[str, Any]:
    """Export a model to ONNX, and compare the outputs.

    Examples:
        vitcls export --model runs/mine --output mine.onnx
        vitcls export --model runs/mine --output mine.onnx --no-dynamic --image-size 224 320

    The export also writes OUTPUT.json, which contains the largest output differences, the shapes of the
    images in the comparison, and a description of the inputs and outputs of the graph.
    """
    from ..exporting.exporter import export_model

    silence_exporters()
    report = export_model(options)
    print_export(report, options.output)
    return report


def silence_exporters() -> None:
    """Disable progress bars and the warnings of torch.export and torch.onnx."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\.|onnxscript|copyreg")


def print_export(report: Mapping[str, Any], output: Path) -> None:
    """Print the report and the name of the file."""
    file = output if output.suffix else output / report["file"]
    differences = [f"{name} {value:.1e}" for name, value in report["largest_differences"].items()]
    print(
        f"Largest differences between the file in {report['dtype']} and the model in float32: "
        f"{', '.join(differences)}"
    )
    size, smallest_size = (
        " x ".join(map(str, report["input"][key])) for key in ("image_size", "smallest_image_size")
    )
    if "height" in report["input"]["shape"]:
        print(f"Accepts any batch size and images of at least {smallest_size} pixels")
    else:
        print(f"Accepts any batch size, but only images of {size} pixels")
    if report["fixed_because"]:
        print(f"The image size is fixed: {report['fixed_because']}")
    print(f"Size: {report['num_bytes'] / 2**20:.1f} MiB")
    print(f"\nwrote {file} and {file.name}.json")
