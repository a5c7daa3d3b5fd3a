"""Post-training quantization of exported graphs to int8, with NNCF's preset for transformers.

NNCF adds fake-quantization nodes around matrix products; the runtimes compute these products in int8. The value ranges
of the activations are measured on calibration images.
"""

import contextlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import format_error
from ..inference.exported_graphs import INPUT_NAME


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
