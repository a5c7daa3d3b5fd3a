"""From a model to a graph: torch.export, with the batch and, where possible, the image's height and width left open.

    plan = plan_for(model, image_size, dynamic=True)     # says why, where it has to be one size
    graph = traced(model, plan)                          # torch.export.ExportedProgram

A graph of one size holds positions that were resampled beforehand; one of any size resamples them itself.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from ..configuration_vitcls import ViTCLSConfig
from ..modeling_vitcls import ViTCLSPreTrainedModel
from .exportable import INPUT, NamedAnswers


# Rows and columns of patches, and images of a batch, with which nothing is taken for a constant: torch treats 1 so.
FEWEST_OPEN = 2

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """Which images a graph takes; the batch is always open.

    Attributes:
        image_size: (height, width), pixels, that the graph is meant for; the only one unless `any_size`.
        smallest_size: (height, width), pixels.
        reason: why the graph takes one size although any was asked for; empty otherwise.
    """

    image_size: tuple[int, int]
    smallest_size: tuple[int, int]
    any_size: bool
    reason: str = ""


def plan_for(
    model: ViTCLSPreTrainedModel, image_size: tuple[int, int] | None, dynamic: bool, has_antialias: bool = True
) -> Plan:
    """What can be had of what is asked for.

    Args:
        image_size: (height, width), pixels. Default: the model's own.
        dynamic: Whether any size is asked for.
        has_antialias: Whether what runs the graph low-passes as PyTorch does where it shrinks.

    Raises:
        ValueError: for images that are smaller than the graph could take.
    """
    config = model.config
    size = config.image_height_width if image_size is None else image_size
    reason = why_one_size(config, has_antialias) if dynamic else ""
    if not dynamic or reason:
        return Plan(size, size, any_size=False, reason=reason)
    smallest = smallest_size(config)
    if size[0] < smallest[0] or size[1] < smallest[1]:
        raise ValueError(
            f"--image-size {size[0]} {size[1]}: a graph for any size takes images of {smallest[0]} x {smallest[1]} "
            "pixels or more: set a larger one, or --no-dynamic"
        )
    return Plan(size, smallest, any_size=True)


def why_one_size(config: ViTCLSConfig, has_antialias: bool) -> str:
    """What keeps the graph from following the image size; empty for nothing."""
    if config.merged_patches_per_layer:
        return (
            "merged_patches_per_layer depends on how many patches there are to merge, and the graph holds that number"
        )
    if not config.position_embedding_type.startswith("learned"):
        return ""
    if config.position_offset:
        return "position_offset makes the scale of positions a number that a graph cannot derive from the image"
    if config.position_antialias and not has_antialias:
        return "position_antialias=True, and the format shrinks positions in another way than PyTorch"
    rows, columns = config.grid_size
    if config.position_interpolation == "crop" and rows != columns:
        return 'position_interpolation="crop" is left out at the one size of a grid that is no square'
    return ""


def smallest_size(config: ViTCLSConfig) -> tuple[int, int]:
    """(height, width) of the smallest images for which a graph of any size holds."""
    cells = [scope for scope in config.cls_scopes or () if not isinstance(scope, str)]
    rows = max([FEWEST_OPEN, *(cell[0] for cell in cells)])
    columns = max([FEWEST_OPEN, *(cell[1] for cell in cells)])
    patch_height, patch_width = config.patch_height_width
    return rows * patch_height, columns * patch_width


def traced(model: ViTCLSPreTrainedModel, plan: Plan, dtype: torch.dtype) -> ExportedProgram:
    """The graph, with its weights and its calculations in `dtype`; it takes and gives float32.

    Raises:
        ValueError: if the model cannot be traced.
    """
    model = prepared(model, plan, dtype)
    asked = NamedAnswers(model).eval(), (example(model.config, plan),)
    try:
        with torch.no_grad():
            graph = torch.export.export(*asked, dynamic_shapes=open_shapes(plan))
            graph = graph.run_decompositions({})  # only what cannot be saved: the vectorised masks of scopes
    except Exception as error:  # whatever torch raises for what it does not trace
        hint = ": --no-dynamic may do" if plan.any_size else ""
        raise ValueError(
            f"torch.export cannot trace this {type(model).__name__} ({first_line(error)}){hint}"
        ) from error
    for node in graph.graph.nodes:
        node.meta.pop("stack_trace", None)  # folders of this machine
    return graph


def prepared(model: ViTCLSPreTrainedModel, plan: Plan, dtype: torch.dtype) -> ViTCLSPreTrainedModel:
    """A model to trace: of this dtype, and made for the one size where there is one. The caller's stays as it is."""
    config = model.config
    if not plan.any_size and plan.image_size != config.image_height_width:
        model = model.adapt(image_size=list(plan.image_size))
    else:
        model = copy.deepcopy(model)
    model.set_attn_implementation("sdpa")
    model.requires_grad_(False)  # masks that learn would go by another kernel than the graph's
    return model.to(dtype=dtype)  # type: ignore[call-arg,return-value]  # transformers wraps `to` untyped


def example(config: ViTCLSConfig, plan: Plan) -> torch.Tensor:
    """Images to trace with; a rectangle of another grid than the model's where sizes are open."""
    height, width = plan.image_size
    if plan.any_size:
        patch_height, patch_width = config.patch_height_width
        rows, columns = config.grid_size
        height, width = (max(rows, columns) + 1) * patch_height, (max(rows, columns) + 3) * patch_width
    return torch.zeros(FEWEST_OPEN, config.num_channels, height, width)


def open_shapes(plan: Plan) -> dict[str, Any]:
    """The axes of the input that are left open, by name."""
    axes = {0: Dim("batch", min=1)}
    if plan.any_size:
        height, width = plan.smallest_size
        axes |= {2: Dim("height", min=height), 3: Dim("width", min=width)}
    return {INPUT: axes}


def first_line(error: Exception) -> str:
    """The first line of its message, or its type where it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
