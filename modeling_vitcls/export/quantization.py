"""Post-training quantization of exported graphs to int8, with NNCF's preset for transformers.

NNCF adds fake-quantization nodes around matrix products; the runtimes compute these products in
int8. The value ranges of the activations are measured on calibration images.
"""

import contextlib
import copy
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..inference.exported_graphs import INPUT_NAME
from ..runtime.errors import format_error
from .exportable import NamedOutputsModel


NUM_CALIBRATION_IMAGES = 300


def quantize_graph(
    file: Path, images: Sequence[torch.Tensor], excluded_layers: Iterable[int] = ()
) -> None:
    """Quantize the matrix products of an .onnx or .xml file to int8, in place.

    The patch projection is excluded.

    Args:
        file: A graph in float32.
        images: Preprocessed calibration images, each [1, C, H, W].
        excluded_layers: Numbers of the layers, from 1, that stay in float32.

    Raises:
        ValueError: If NNCF cannot quantize the graph.
    """
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    dataset = nncf.Dataset(images, lambda image: {INPUT_NAME: image.numpy()})
    settings: dict[str, Any] = {
        "model_type": nncf.ModelType.TRANSFORMER,
        "subset_size": len(images),
        # The patch projection, the only convolution, is 1% of the operations. In int8, it doubles
        # the squared error.
        "ignored_scope": nncf.IgnoredScope(
            # names of nodes (formats.py)
            patterns=[rf"layers\.{number - 1}/.*" for number in excluded_layers],
            types=["Convolution", "Conv"],
            validate=False,
        ),
    }
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # progress bars
            if file.suffix == ".xml":
                import openvino

                # From bytes, because a graph that was read from a file may keep the file mapped,
                # and this file is replaced below.
                graph = openvino.Core().read_model(
                    file.read_bytes(), file.with_suffix(".bin").read_bytes()
                )
                openvino.save_model(
                    nncf.quantize(graph, dataset, **settings), file, compress_to_fp16=False
                )
            else:
                import onnx

                onnx.save(nncf.quantize(onnx.load(file), dataset, **settings), file)
    except Exception as error:  # NNCF raises many types of errors
        raise ValueError(f"NNCF cannot quantize {file.name}: {format_error(error)}") from error


def check_drop(report: dict[str, Any], max_drop: float, model: Any, images: torch.Tensor) -> None:
    """Raise ValueError if the metric falls by more than `max_drop` points.

    An accuracy must fall by more than that with 95% confidence: few images cannot show a small
    loss. The message names the layers with the largest error in int8, measured on preprocessed
    images [B, C, H, W].
    """
    scores = report["evaluation"]
    if scores is None:
        return
    interval = scores["drop_interval"]
    drop = scores["model"] - scores["file"] if interval is None else interval[0]
    if 100 * drop <= max_drop:
        return
    excluded = report["excluded_layers"]
    layers = [number for number in rank_layers(model, images) if number not in excluded]
    worst = sorted([*excluded, *layers[: max(1, len(layers) // 4)]])
    raise ValueError(
        f"int8 lowers the {scores['metric']} from {scores['model']:.1%} to {scores['file']:.1%} on "
        f"{scores['num_images']} images, at least {100 * drop:.1f} points and more than "
        f"`max_drop={max_drop:g}` points. Set `exclude_layers={tuple(worst)}`, the layers with the "
        "largest errors, or a larger `max_drop`"
    )


@torch.no_grad()
# Fused kernels would skip the hooks that round the inputs.
@torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
def rank_layers(model: Any, images: torch.Tensor) -> list[int]:
    """Rank the numbers of the layers, from 1, by their errors in int8, the largest first.

    The error is measured at the outputs, with the linear layers of one layer alone in int8
    (simulated: weights per output channel, inputs per tensor).

    Args:
        model: A vitcls model in float32.
        images: Preprocessed images [B, C, H, W].
    """

    def compute_output(model: Any) -> torch.Tensor:
        return next(iter(NamedOutputsModel(model)(images).values()))

    expected = compute_output(model)
    errors = {}
    for number in range(1, model.config.num_hidden_layers + 1):
        # A new copy for each layer, so that its error is not mixed with the errors of the layers
        # before.
        quantized = copy.deepcopy(model)
        for module in quantized.base_model.layers[number - 1].modules():
            if isinstance(module, nn.Linear):
                module.weight.copy_(
                    round_to_int8(module.weight, module.weight.abs().amax(1, keepdim=True))
                )
                module.register_forward_pre_hook(
                    lambda module, inputs: round_to_int8(inputs[0], inputs[0].abs().max())
                )
        errors[number] = (compute_output(quantized) - expected).norm().item()
    return sorted(errors, key=lambda number: -errors[number])


def round_to_int8(values: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Round values to multiples of largest / 127."""
    scale = largest.clamp(min=1e-12) / 127
    return (values / scale).round() * scale
