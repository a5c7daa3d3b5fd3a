"""Load a model, name its outputs, and trace it to a graph with dynamic batch and image sizes.

    exportable = load_exportable_model("runs/mine")
    graph_shape = select_graph_shape(model, image_size, dynamic=True)
    graph = trace_model(model, graph_shape, torch.float32)    # torch.export.ExportedProgram

A graph with a fixed image size contains the position embeddings for this size. A graph with a
dynamic image size resamples the position embeddings at run time. The outputs of a graph are

ViTCLSModel                         last_hidden_state, pooler_output
ViTCLSForImageClassification        logits; if there are two heads, also cls_logits and distillation_logits
ViTCLSForMultiTaskClassification    one output per task, named after the task
both classifiers                    then one output per extra head, named after its task, and
                                    distance (to the nearest class), if the model has class statistics
ViTCLSBackbone                      feature maps, named after their stages
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..conversion.open_model import is_preset, open_model
from ..hub.model_folder import ModelFolder, build_processor
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.field_checks_vitcls import Size
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
    ViTCLSPreTrainedModel,
)
from ..runtime.errors import format_error


Outputs = dict[str, Tensor]


EXPORTABLE_CLASSES = (
    ViTCLSModel,
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSBackbone,
)


class NamedOutputsModel(nn.Module):
    """Model wrapper that takes only images as input and returns a dict of float32 outputs."""

    def __init__(self, model: ViTCLSPreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixel_values: Tensor) -> Outputs:
        """Compute the outputs [B, ...] for images [B, C, H, W], by name."""
        outputs: Any = self.model(pixel_values)
        named: Outputs = {}
        for name, value in outputs.items():
            if name == "tokens":  # A graph of an encoder has none: they are in `last_hidden_state`
                continue
            if name == "feature_maps":
                named |= zip(self.model.out_features, value, strict=True)
            elif isinstance(value, dict):  # Task -> logits
                named |= value
            # With one head, the logits belong to CLS.
            elif name != "cls_logits" or outputs.distillation_logits is not None:
                named[name] = value
        # All graphs have float32 outputs, so the program that runs one needs no knowledge of its
        # dtype.
        return {name: output.float() for name, output in named.items()}


class Exportable(NamedTuple):
    """A model to export, in float32 and evaluation mode."""

    model: ViTCLSPreTrainedModel
    processor: ViTCLSImageProcessor
    folder: ModelFolder | None  # None for a preset, which has random weights


def load_exportable_model(source: str) -> Exportable:
    """Load any checkpoint that `model` may name, or a preset with random weights.

    Raises:
        ValueError: If the checkpoint is not a ViTCLS model, if its class is not supported, or if
            weights are missing.
        OSError: If the checkpoint cannot be found or read.
    """
    if is_preset(source):
        preset = ViTCLSForImageClassification(ViTCLSConfig.from_preset(source))
        return Exportable(preset.eval(), build_processor(preset.config), None)
    folder = open_model(source)
    class_name = folder.architecture
    classes: dict[str, Any] = {each.__name__: each for each in EXPORTABLE_CLASSES}
    if class_name not in classes:
        raise ValueError(
            f"export requires one of {', '.join(classes)}, but {source} contains {class_name}. Set "
            "`model` to a model of a supported class"
        )
    model = folder.load(classes[class_name], dtype=torch.float32)
    return Exportable(model, folder.load_processor(), folder)


# The graph ----------------------------------------------------------------------------------------


INPUT_NAME = "pixel_values"
# Minimum number of patch rows, patch columns and example images; torch.export treats a size of 1 as
# constant.
MIN_DYNAMIC_SIZE = 2


@dataclass(frozen=True)
class GraphShape:
    """Image sizes that a graph accepts. The batch size is always dynamic."""

    # (height, width) in pixels; the only accepted size unless `is_dynamic`
    image_size: Size
    smallest_size: Size  # Smallest accepted (height, width) in pixels
    is_dynamic: bool  # Whether the graph accepts sizes other than `image_size`
    # Reason why the size is fixed although a dynamic size was requested; empty otherwise
    fixed_size_reason: str = ""

    @property
    def dynamic_shapes(self) -> dict[str, Any]:
        """The dynamic axes of the input for torch.export, with names and minimum sizes."""
        axes = {0: Dim("batch", min=1)}
        if self.is_dynamic:
            height, width = self.smallest_size
            axes |= {2: Dim("height", min=height), 3: Dim("width", min=width)}
        return {INPUT_NAME: axes}


def select_graph_shape(
    model: ViTCLSPreTrainedModel,
    image_size: Size | None,
    dynamic: bool,
) -> GraphShape:
    """Choose the image sizes that the graph of a model will accept.

    If `dynamic` is True but a dynamic size is not possible, the size is fixed.

    `image_size` is (height, width) in pixels, by default the native size.
    """
    config = model.config
    size = config.image_height_width if image_size is None else image_size
    reason = find_fixed_size_reason(config) if dynamic else ""
    if not dynamic or reason:
        return GraphShape(size, size, is_dynamic=False, fixed_size_reason=reason)
    return GraphShape(size, get_smallest_size(config), is_dynamic=True)


def find_fixed_size_reason(config: ViTCLSConfig) -> str:
    """Say why the image size of the graph must be fixed; empty if it can be dynamic."""
    rows, columns = config.grid_size
    # The scale of the resampling, or the part that is cropped, depends on the image size.
    is_cropped = config.position_interpolation == "crop" and rows != columns
    is_resampled = config.position_embedding_type.startswith("learned")
    if is_resampled and (config.position_offset or is_cropped):
        return (
            "a graph cannot compute its position embeddings for another size (position_offset, or "
            'position_interpolation="crop" of a non-square grid)'
        )
    return ""


def get_smallest_size(config: ViTCLSConfig) -> Size:
    """Compute (height, width) in pixels of the smallest images that a dynamic graph accepts."""
    grids = [scope[:2] for scope in config.cls_scopes or () if not isinstance(scope, str)]
    rows, columns = np.max([[MIN_DYNAMIC_SIZE, MIN_DYNAMIC_SIZE], *grids], axis=0).tolist()
    patch_height, patch_width = config.patch_height_width
    return rows * patch_height, columns * patch_width


def trace_model(
    model: ViTCLSPreTrainedModel,
    graph_shape: GraphShape,
    dtype: torch.dtype,
) -> ExportedProgram:
    """Trace a copy of a model to a graph with float32 inputs and outputs.

    Weights and computations have the given dtype. Raise ValueError if the model cannot be traced.
    """
    config = model.config
    if not graph_shape.is_dynamic and graph_shape.image_size != config.image_height_width:
        model = model.adapt(image_size=list(graph_shape.image_size))
    else:
        # The caller still computes reference outputs with the model, in float32.
        model = copy.deepcopy(model)
    # PyTorch's fused attention, which the exporters know as one operation
    model.set_attn_implementation("sdpa")
    # Attention masks that require gradients would select a different attention kernel
    model.requires_grad_(False)
    model.to(dtype=dtype)  # type: ignore[call-arg]  # `to` is decorated

    height, width = graph_shape.image_size
    # At the native size, position embeddings are not resampled, and a square image hides which axis
    # a size comes from. A graph traced with such an example would be right for that size only.
    if graph_shape.is_dynamic:
        num_patches = max(config.grid_size)
        height = (num_patches + 1) * config.patch_height_width[0]
        width = (num_patches + 3) * config.patch_height_width[1]
    images = torch.zeros(MIN_DYNAMIC_SIZE, config.num_channels, height, width)

    try:
        with torch.no_grad():
            graph = torch.export.export(
                NamedOutputsModel(model).eval(),
                (images,),
                dynamic_shapes=graph_shape.dynamic_shapes,
            )
            # Decomposition is required to save vectorized attention masks
            graph = graph.run_decompositions({})
    except Exception as error:  # torch.export raises many types of errors
        hint = ". Set `dynamic=False`" if graph_shape.is_dynamic else ""
        raise ValueError(
            f"torch.export cannot trace this {type(model).__name__} ({format_error(error)}){hint}"
        ) from error

    for node in graph.graph.nodes:
        # The file may be published, and stack traces contain the paths of this machine.
        node.meta.pop("stack_trace", None)
    return graph
