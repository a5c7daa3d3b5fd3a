"""Export a checkpoint, compare the file with the model, and write the file and its report, or write nothing.

report = export_model("runs/mine", "onnx", Path("mine.onnx"))      # also writes mine.onnx.json
"""

import dataclasses
import tempfile
from pathlib import Path

from ..conversion.parity_report import build_random_images, hash_files
from ..files import write_json
from ..hub.local_paths import resolve_name, strip_folders
from ..system import get_versions
from .export_report import (
    LIMITS,
    ExportReport,
    compare_outputs,
    describe_input,
    describe_outputs,
    describe_preprocessing,
    get_label_names,
    get_largest_differences,
    select_image_shapes,
)
from .exportable import compute_named_outputs, load_exportable
from .formats import FORMATS, Format, TracedModel
from .tracing import DTYPES, select_graph_shape, trace_model


def export_model(
    source: str,
    format_name: str,
    output: Path,
    image_size: tuple[int, int] | None = None,
    dynamic: bool = True,
    dtype: str = "float32",
    opset: int | None = None,
) -> ExportReport:
    """Write the graph of a model to `output`, and its report to the same name with `.json` appended.

    Args:
        source: A model folder, a model on the Hub, or a preset, which has random weights.
        format_name: "torch", "onnx" or "openvino".
        output: A file that does not exist, with the suffix of the format.
        image_size: (height, width) in pixels: the fixed image size, or the main size of the comparison if the size is
            dynamic. Default: the size of the model.
        dynamic: Whether the graph accepts any image size. If this is not possible, the report states the reason.
        dtype: dtype of weights and computations; inputs and outputs are float32.
        opset: ONNX opset. Default: the default of torch.

    Raises:
        ValueError, OSError: If the model cannot be found or exported, a difference exceeds the limit, packages are
            missing, or `output` exists. The message has one line, and nothing is written.
    """
    file_format = FORMATS[format_name]
    check_output_path(output, file_format)
    if missing := file_format.find_missing_packages():
        raise ValueError(
            f"--format {format_name} requires {', '.join(missing)}. Run pip install 'modeling_vitcls[export]'"
        )
    exportable = load_exportable(source)
    model = exportable.model
    shape = select_graph_shape(model, image_size, dynamic, file_format.has_antialias)
    batches = [build_random_images(batch_shape) for batch_shape in select_image_shapes(model.config, shape)]
    expected = compute_named_outputs(model, batches)
    names = list(expected[0])
    graph = TracedModel(trace_model(model, shape, DTYPES[dtype]), shape, names, opset)
    parent = next(folder for folder in output.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=parent) as partial:
        file = Path(partial, output.name)
        written_opset = file_format.write(graph, file)
        comparisons = compare_outputs(batches, expected, file_format.run(file, batches, names), dtype)
        report = ExportReport(
            format=format_name,
            model=strip_folders(resolve_name(source, is_built_in=not exportable.is_trained)),
            model_class=type(model).__name__,
            weights="trained" if exportable.is_trained else "random",
            dtype=dtype,
            opset=written_opset,
            limit=LIMITS[dtype],
            largest_differences=get_largest_differences(comparisons),
            tried=comparisons,
            input=describe_input(model.config, shape),
            outputs=describe_outputs(expected[0], shape),
            fixed_because=shape.fixed_size_reason,
            preprocessing=describe_preprocessing(exportable.processor),
            labels=get_label_names(model.config, names),
            versions=get_versions("timm", *file_format.packages),
            sha256=hash_files(Path(partial).iterdir()),
        )
        write_json(get_report_path(file), dataclasses.asdict(report))
        move_files(Path(partial), output.parent)
    return report


def get_report_path(file: Path) -> Path:
    """Return the path of the report of an exported file."""
    return file.with_name(f"{file.name}.json")


def check_output_path(output: Path, file_format: Format) -> None:
    """Raise ValueError if the suffix of the path does not match the format, or the file or its report exists."""
    if output.suffix != file_format.suffix:
        raise ValueError(f"--output must end with {file_format.suffix}, but is {output}")
    for file in (output, get_report_path(output)):
        check_does_not_exist(file)


def check_does_not_exist(file: Path) -> None:
    """Raise ValueError if a file exists."""
    if file.exists():
        raise ValueError(f"{file} exists. Set another --output, or remove the file")


def move_files(source: Path, target: Path) -> None:
    """Move all files of a folder to another folder, or no file if a file exists in the target."""
    files = sorted(source.iterdir())
    for file in files:
        check_does_not_exist(target / file.name)
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        file.rename(target / file.name)
