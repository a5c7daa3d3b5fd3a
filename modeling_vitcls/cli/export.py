"""`vitcls export`: export a model to ONNX or OpenVINO, and compare the outputs.

    vitcls export --model runs/mine --format onnx --output mine.onnx
    vitcls export --model runs/mine --format openvino --output mine.xml --no-dynamic --image-size 224 320

The export also writes OUTPUT.json, which contains the largest output differences, the shapes of the
images in the comparison, and a description of the inputs and outputs of the graph. The export is
implemented in modeling_vitcls/export/.
"""

import warnings
from pathlib import Path
from typing import Any

from ..export.options import ExportOptions


OPTIONS_CLASS = ExportOptions


def run(options: ExportOptions) -> None:
    """Export the model and print the largest differences."""
    from ..export.exporter import export_model

    silence_exporters()
    print_export(export_model(options), options.output)


def silence_exporters() -> None:
    """Disable progress bars and the warnings of torch.export and torch.onnx."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\.|onnxscript|copyreg")


def print_export(report: dict[str, Any], output: Path) -> None:
    """Print the report and the name of the file."""
    file = output / report["file"] if not output.suffix else output
    # The ranges of int8 were measured on photos, so random images say little about it.
    if report["dtype"] != "int8":
        print(
            f"Largest differences between {report['format']} in {report['dtype']} and the model in "
            "float32:"
        )
        for comparison in report["tried"]:
            batch_size, _, height, width = comparison["shape"]
            differences = ", ".join(
                f"{name} {value:.1e}" for name, value in comparison["differences"].items()
            )
            print(f"- batch of {batch_size}, {height} x {width} pixels: {differences}")
    print("\n".join(format_notes(report)))
    print(f"\nwrote {file} and {file.name}.json")


def format_notes(report: dict[str, Any]) -> list[str]:
    """Format what a user has to know about the file, one fact per line.

    The other fields are in the description.
    """
    size, smallest_size = (
        " x ".join(map(str, report["input"][key])) for key in ("image_size", "smallest_image_size")
    )
    lines = [f"Accepts any batch size, but only images of {size} pixels"]
    if "height" in report["input"]["shape"]:
        lines = [f"Accepts any batch size and images of at least {smallest_size} pixels"]
    if report["fixed_because"]:
        lines.append(f"The image size is fixed: {report['fixed_because']}")
    if report["lacks_distance"]:
        lines.append(
            "Has no output `distance`, for which int8 has too few digits: predictions through the "
            "file do not mark unknown images"
        )
    if (comparison := report["comparison"]) is not None:
        lines.append(
            f"{comparison['output']} of {comparison['num_images']} held-out images: relative error "
            f"{comparison['relative_error']:.1e}"
        )
    if (scores := report["evaluation"]) is not None:
        accuracies = f"file {scores['file']:.2%}, model {scores['model']:.2%}"
        lines.append(f"{scores['metric']}: {accuracies}, on {scores['num_images']} images")
        if scores["drop_interval"] is not None:
            low, high = (100 * bound for bound in scores["drop_interval"])
            lines.append(
                f"same label as the model: {scores['num_equal_labels']} of {scores['num_images']} "
                f"images; loss of accuracy: {low:.1f} to {high:.1f} points (95% interval)"
            )
    if (speed := report.get("speed")) is not None:
        lines.append(
            f"{speed['images_per_second']:g} images/s in batches of {speed['batch_size']}, "
            f"{speed['device']}"
        )
    return [*lines, f"Size: {report['num_bytes'] / 2**20:.1f} MiB"]
