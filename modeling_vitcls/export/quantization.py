"""Post-training quantization of exported graphs to int8, with NNCF's preset for transformers.

NNCF adds fake-quantization nodes around matrix products; the runtimes compute these products in int8. The value ranges
of the activations are measured on calibration images.
"""

import contextlib
import io
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..conversion.any_checkpoint import resolve_checkpoint
from ..data.held_out import read_held_out_record
from ..data.splits import load_evaluation_data
from ..distributed import build_accelerator
from ..errors import format_error
from ..files import read_json, write_json
from ..hub.local_paths import strip_folders
from ..inference.evaluate import load_evaluation
from ..inference.exported_graphs import INPUT_NAME, use_backend
from ..inference.load_model import load_processor
from ..intervals import compute_proportion_interval
from ..options import DataOptions, EvaluateOptions
from .exporter import check_files_do_not_exist, export_model, get_report_path, move_files


NUM_CALIBRATION_IMAGES = 300


def export_int8(
    source: str, format_name: str, output: Path, dataset: str, split: str | None = None, max_drop: float = 0.5
) -> dict[str, Any]:
    """Export a classifier with int8 matrix products, and measure its accuracy.

    The graph is calibrated on training images, which are not evaluated. FILE.json gets the key "int8".

    Args:
        source: A model folder or a model on the Hub.
        format_name: "onnx" or "openvino".
        output: Path of the exported file, which must not exist.
        dataset: Labeled images, as in `vitcls evaluate`.
        split: Split to evaluate, as in `vitcls evaluate`.
        max_drop: Largest accepted loss of the metric, in points.

    Returns:
        The metric, its values before and after, and the size of the files.

    Raises:
        ValueError, OSError: As in `export_model` and `vitcls evaluate`, or if the metric falls by more than
            `max_drop`. Nothing is written if an error is raised.
    """
    check_files_do_not_exist(output, get_report_path(output))
    options = EvaluateOptions(model=source, data=DataOptions(dataset=dataset), split=split)
    setup = load_evaluation(options, build_accelerator(mixed_precision="no"), print)
    folder = resolve_checkpoint(source)
    record = read_held_out_record(folder)
    images = load_evaluation_data(options.data, "train", record)[1].images
    step = max(1, len(images) // NUM_CALIBRATION_IMAGES)
    processor = load_processor(source, folder)
    calibration_images = [
        processor(images[index], return_tensors="pt")[INPUT_NAME]
        for index in range(0, len(images), step)[:NUM_CALIBRATION_IMAGES]
    ]
    with tempfile.TemporaryDirectory() as temporary_folder:
        file = Path(temporary_folder, output.name)
        export_model(source, format_name, file, dynamic=False)
        quantize_graph(file, calibration_images)
        before = setup.evaluator(setup.model)
        use_backend(setup.model, str(file), file.parent)
        after = setup.evaluator(setup.model)
        metric, num_images = next(iter(before)), after["num_images"]
        drop = 100 * (before[metric] - after[metric])
        interval = compute_proportion_interval(round(after[metric] * num_images), num_images)
        if drop > max_drop:
            raise ValueError(
                f"int8 lowers the {metric} from {before[metric]:.1%} to {after[metric]:.1%} on {num_images} images, "
                f"more than --max-drop {max_drop:g} points. Set a larger --max-drop, or export without --int8"
            )
        results = {
            "dataset": strip_folders(dataset),
            "split": setup.split,
            "num_images": num_images,
            "num_calibration_images": len(calibration_images),
            "metric": metric,
            "float32": before[metric],
            "int8": after[metric],
            "interval": interval if metric == "accuracy" else None,
            "num_bytes": sum(each.stat().st_size for each in file.parent.iterdir() if each.suffix != ".json"),
        }
        write_json(get_report_path(file), read_json(get_report_path(file)) | {"int8": results})
        move_files(file.parent, output.parent)
    return results


def quantize_graph(file: Path, images: Sequence[torch.Tensor]) -> None:
    """Quantize the matrix products of an .onnx or .xml file to int8, in place.

    Args:
        file: A graph in float32.
        images: Preprocessed calibration images, each [1, C, H, W].

    Raises:
        ValueError: If NNCF cannot quantize the graph.
    """
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    dataset = nncf.Dataset(images, lambda image: {INPUT_NAME: image.numpy()})

    def quantize(graph: Any) -> Any:
        with contextlib.redirect_stdout(io.StringIO()):  # progress bars
            model_type = nncf.ModelType.TRANSFORMER
            return nncf.quantize(graph, dataset, model_type=model_type, subset_size=len(images))

    try:
        if file.suffix == ".xml":
            import openvino

            quantized = quantize(openvino.Core().read_model(file.read_bytes(), file.with_suffix(".bin").read_bytes()))
            openvino.save_model(quantized, file, compress_to_fp16=False)
        else:
            import onnx

            onnx.save(quantize(onnx.load(file)), file)
    except Exception as error:  # NNCF raises many types of errors
        raise ValueError(f"NNCF cannot quantize {file.name}: {format_error(error)}") from error
