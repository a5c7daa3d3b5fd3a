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
from typing import Any, Literal


@dataclass(frozen=True)
class ExportOptions:
    """Export a model. Nothing is written if the outputs of the graph and the model differ by more than the limit."""

    model: str
    """A model folder, the id of a model on the Hub, or a preset (random weights)."""
    format: Literal["torch", "onnx", "openvino", "transformers.js"]
    """torch.export (.pt2), ONNX (.onnx), OpenVINO (.xml and .bin), or a folder for transformers.js."""
    output: Path
    """Output file, which must not exist yet, or a folder: model.onnx (or model.xml, model.pt2) and all files that
    `predict` and `evaluate` with --backend require. With --format transformers.js: a new or empty folder."""
    int8: bool = False
    """With --format onnx or openvino: quantize the matrix products to int8 (NNCF), calibrated on training images of
    --dataset. The image size is fixed."""
    max_drop: float = 0.5
    """With --int8: largest loss of accuracy, in points. If it is exceeded, nothing is written."""
    exclude_layers: tuple[int, ...] = ()
    """With --int8: numbers of the layers, from 1, that stay in float32."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels. With --no-dynamic, the graph accepts only this size; otherwise, the size is used
    only in the comparison. Default: the image size of the model."""
    dynamic: bool = True
    """Accept images of different sizes, not only of --image-size. The batch size is always dynamic."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """dtype of the weights and computations. Inputs and outputs are always float32."""
    dataset: str | None = None
    """Images, as in `vitcls evaluate`, to measure the accuracy of the file. For images without labels, the outputs of
    file and model are compared."""
    split: str | None = None
    """Split of --dataset, as in `vitcls evaluate`."""

    def __post_init__(self) -> None:
        size, has_dataset, is_js = self.image_size, self.dataset is not None, self.format == "transformers.js"
        has_graph_settings = (size, self.dynamic, self.dtype) != (None, True, "float32")
        errors = {
            f"--image-size requires positive numbers, but the value is {size}. Set HEIGHT WIDTH": size is not None
            and min(size) < 1,
            "--format transformers.js does not support --image-size, --no-dynamic or --dtype. Remove the flag": is_js
            and has_graph_settings,
            "--dataset requires --format onnx, openvino or transformers.js": has_dataset and self.format == "torch",
            "--int8 requires --format onnx or openvino, and --dataset": self.int8
            and not (has_dataset and self.format in ("onnx", "openvino")),
            "--int8 does not support --dtype or --no-dynamic. Remove the flag": self.int8
            and (not self.dynamic or self.dtype != "float32"),
            "--exclude-layers requires --int8": bool(self.exclude_layers) and not self.int8,
            "--split requires --dataset": self.split is not None and not has_dataset,
        }
        for message, is_wrong in errors.items():
            if is_wrong:
                raise ValueError(message)


OPTIONS_CLASS = ExportOptions


def run(options: ExportOptions) -> None:
    """Export the model and print the largest differences."""
    from ..export.exporter import export_model
    from ..export.transformers_js import export_for_transformers_js

    silence_exporters()
    if options.format == "transformers.js":
        web_report = export_for_transformers_js(options.model, options.output, options.dataset, options.split)
        for comparison in web_report["comparisons"]:
            agreement = comparison["top1_agreement"]
            text = "" if agreement is None else f", same top-1 label: {agreement:.1%}"
            print(f"{comparison['file']:26} largest difference {comparison['largest_difference']:.1e}{text}")
        if (scores := web_report["labeled"]) is not None:
            print(f"{scores['metric']} on {scores['num_images']} images of {scores['dataset']} ({scores['split']}):")
            for name, score in {"PyTorch": scores["model"], **scores["files"]}.items():
                print(f"{name:26} {score:.2%}")
        return
    report = export_model(
        options.model,
        options.format,
        options.output,
        options.image_size,
        options.dynamic,
        options.dtype,
        int8=options.int8,
        dataset=options.dataset,
        split=options.split,
        max_drop=options.max_drop,
        exclude_layers=options.exclude_layers,
    )
    print_report(report, options.output)


def silence_exporters() -> None:
    """Disable progress bars and the warnings of torch.export and torch.onnx."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"torch\.|onnxscript|copyreg")


def print_report(report: dict[str, Any], output: Path) -> None:
    """Print the report and the code to run the exported file."""
    print(f"Largest differences between {report['format']} in {report['dtype']} and {report['model']}:")
    for comparison in report["tried"]:
        batch_size, _, height, width = comparison["shape"]
        differences = ", ".join(f"{name} {value:.1e}" for name, value in comparison["differences"].items())
        print(f"- {batch_size} images of {height} x {width}: {differences}")
    print("\n".join(format_notes(report)))
    file = output if output.suffix else output / f"model{SUFFIXES[report['format']]}"
    print(f"\nWrote the model to {file}, and its description to {file}.json. Run the exported model with")
    for line in USAGE[report["format"]]:
        print(f"  {line.format(file=file)}")
    if not output.suffix:
        print(f"or with `vitcls predict --model {output} --backend {report['format']} IMAGES`")


def format_notes(report: dict[str, Any]) -> list[str]:
    """Format what a user has to know about the file, one fact per line. The other fields are in the description."""
    size, smallest_size = (" x ".join(map(str, report["input"][key])) for key in ("image_size", "smallest_image_size"))
    is_dynamic = "height" in report["input"]["shape"]
    sizes = f" and images of at least {smallest_size} pixels" if is_dynamic else f", but only images of {size} pixels"
    lines = [f"Accepts any batch size{sizes}"]
    if report["fixed_because"]:
        lines.append(f"The image size is fixed: {report['fixed_because']}")
    if report["weights"] == "random":
        lines.append("The weights are random, because presets are untrained")
    if (comparison := report["comparison"]) is not None:
        lines.append(
            f"{comparison['output']} of {comparison['num_images']} held-out images: relative error "
            f"{comparison['relative_error']:.1e}, cosine similarity {comparison['cosine_similarity']:.4f}"
        )
    if (scores := report["evaluation"]) is not None:
        accuracies = f"file {scores['file']:.2%}, model {scores['model']:.2%}"
        lines.append(f"{scores['metric']}: {accuracies}, on {scores['num_images']} images")
    if "speed" in report:
        speed = report["speed"]
        lines.append(f"{speed['images_per_second']:g} images/s in batches of {speed['batch_size']}, {speed['device']}")
    return [*lines, f"Size: {report['num_bytes'] / 2**20:.1f} MiB"]


SUFFIXES = {"torch": ".pt2", "onnx": ".onnx", "openvino": ".xml"}
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
