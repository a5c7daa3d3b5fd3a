"""Export a checkpoint and compare the outputs of the exported file with the outputs of the model.

    report = export_model(ExportOptions(model="runs/mine", output=Path("mine.onnx")))   # also writes mine.onnx.json

    output -> check -> Exportable -> graph -> file -> report

The reference outputs are computed by the model in float32, in eager mode, and the outputs of the
file by onnxruntime. If the outputs differ by more than the limit, nothing is written.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..conversion.parity_report import build_random_images
from ..data.aspect_ratio import get_output_size, get_resize, set_resize
from ..hub.local_paths import resolve_name, strip_folders
from ..hub.model_files import CONFIG_FILE, GRAPH_FILE, PROCESSOR_FILE
from ..runtime.errors import describe_installation
from ..runtime.files import write_json
from ..runtime.staging import lock_folder, stage_files
from .compare import LIMITS, measure_differences, select_image_shapes
from .exportable import NamedOutputsModel, load_exportable_model
from .onnx_file import OnnxGraph, write_onnx
from .options import ExportOptions
from .report import PACKAGES, build_file_record, build_model_record
from .tracing import GraphShape, select_graph_shape, trace_model


@torch.no_grad()
def export_model(options: ExportOptions) -> dict[str, Any]:
    """Export a model to a file, such as mine.onnx, and write a report to mine.onnx.json.

    Args:
        options: The flags of `vitcls export`.

    Returns:
        The contents of the report. If a dynamic image size is not possible, it states the reason.

    Raises:
        ValueError, OSError: If the model cannot be found or exported, if the outputs of the file
            differ from the outputs of the model by more than the limit, if packages are missing, or
            if `output` is invalid or exists. The message is a single line. Nothing is written if an
            error is raised.
    """
    # A wrong file name or a missing package is reported before anything is downloaded.
    target = options.output
    if not target.suffix:
        target = target / GRAPH_FILE
    check_target(target)
    exportable = load_exportable_model(options.model)
    model = exportable.model
    shape = select_graph_shape(model, options.image_size, options.dynamic)
    fit_processor(exportable.processor, shape)
    program = trace_model(model, shape, getattr(torch, options.dtype))
    batches = list(map(build_random_images, select_image_shapes(model.config, shape)))
    expected = list(map(NamedOutputsModel(model), batches))

    report_name = f"{target.name}.json"
    with (
        lock_folder(target.parent, "output"),
        stage_files(target.parent, last=report_name) as folder,
    ):
        file = folder / target.name
        description = build_model_record(exportable, list(expected[0]))
        write_onnx(program, shape, list(expected[0]), file, description)
        graph = OnnxGraph(file)
        outputs = list(map(graph, batches))
        comparisons = measure_differences(batches, expected, outputs, LIMITS[options.dtype])
        report = {
            "model": strip_folders(resolve_name(options.model)),
            "dtype": options.dtype,
            **description,
            **build_file_record(shape, file, graph, expected[0], comparisons),
        }
        if not options.output.suffix and not (options.output / CONFIG_FILE).exists():
            # What a program needs in addition to the graph, if the folder is not the model's
            model.config.to_json_file(folder / CONFIG_FILE)
            if exportable.processor is not None:
                exportable.processor.to_json_file(folder / PROCESSOR_FILE)
        write_json(folder / report_name, report)
    return report


def check_target(target: Path) -> None:
    """Raise ValueError if a file has another suffix or exists, or packages are missing."""
    if target.suffix != ".onnx":
        raise ValueError(f"`output={str(target)!r}`: a file must end in .onnx")
    for file in (target, Path(f"{target}.json"), Path(f"{target}.data")):
        if file.exists():
            raise ValueError(f"{file} exists. Set a different `output`, or remove the file")
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(
            f"the export requires packages that are not installed: {', '.join(missing)}. "
            f"{describe_installation('export')}"
        )


def fit_processor(processor: Any, shape: GraphShape) -> None:
    """Make an image processor return the size of a graph, if the graph accepts only one."""
    has_one_size = processor is not None and not shape.is_dynamic
    if has_one_size and get_output_size(processor, (0, 0)) != shape.image_size:
        set_resize(processor, get_resize(processor), shape.image_size)
