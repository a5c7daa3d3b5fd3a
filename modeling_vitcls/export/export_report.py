"""Compare an exported file with the model, and describe the inputs and outputs of the file.

The loaded model computes the reference outputs in float32, in eager mode. The runtime of the format computes the
outputs of the file.
"""

import dataclasses
from typing import Any

import torch
from transformers.image_utils import PILImageResampling

from ..configuration_vitcls import ViTCLSConfig
from ..conversion.parity_report import get_max_magnitude
from ..image_processing_vitcls import ViTCLSImageProcessor
from .exportable import INPUT_NAME, Outputs
from .tracing import GraphShape


# dtype of the graph -> maximum difference of any output: absolute, and relative to the largest output of the model.
LIMITS: dict[str, tuple[float, float]] = {"float32": (1e-4, 0.0), "float16": (1e-4, 1e-2), "bfloat16": (1e-4, 8e-2)}

ImageShape = tuple[int, int, int, int]  # batch, channels, height, width

# Settings of the image processor that the report contains.
PREPROCESSING = (
    "do_resize size resample do_center_crop crop_size crop_rounding do_rescale rescale_factor do_normalize image_mean "
    "image_std do_convert_rgb do_pad pad_size"
).split()


@dataclasses.dataclass(frozen=True)
class BatchComparison:
    """Comparison of one batch of images."""

    shape: ImageShape  # shape of the images, [batch, channels, height, width]
    differences: dict[str, float]  # largest absolute difference of each output
    magnitudes: dict[str, float]  # largest absolute value of each output of the model


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """The content of FILE.json."""

    format: str
    model: str  # name of the model, without local folders
    model_class: str
    weights: str  # "trained", or "random" for a preset
    dtype: str
    opset: int | None
    limit: tuple[float, float]  # maximum difference: absolute, and relative to the magnitude
    largest_differences: dict[str, float]
    tried: list[BatchComparison]  # comparisons of all batches
    # Name, dtype and shape of the input, with names for dynamic axes, and the smallest (height, width)
    input: dict[str, Any]
    outputs: dict[str, list[int | str]]  # names -> shapes of the outputs, with names for dynamic axes
    fixed_because: str  # reason why the image size is fixed although a dynamic size was requested
    preprocessing: dict[str, Any] | None  # settings of the image processor; None if the model has none
    labels: dict[str, list[str]]  # names of outputs -> names of their classes
    versions: dict[str, str]
    sha256: dict[str, str]  # file names -> hashes


def select_image_shapes(config: ViTCLSConfig, shape: GraphShape) -> list[ImageShape]:
    """Return shapes of images to compare: the requested size, rectangles, partial patches and the smallest size."""
    if not shape.is_dynamic:
        return [(batch, config.num_channels, *shape.image_size) for batch in (1, 2, 3)]
    (height, width), (patch_height, patch_width) = shape.image_size, config.patch_height_width
    rows, columns = height // patch_height, width // patch_width
    sizes = {
        config.image_height_width: 1,
        shape.image_size: 3,
        (max(1, rows * 3 // 4) * patch_height, (columns * 5 // 4 + 1) * patch_width): 2,
        ((rows * 5 // 4 + 1) * patch_height, max(1, columns * 3 // 4) * patch_width): 1,
        (height + patch_height - 1, width + 1): 2,
        shape.smallest_size: 1,
    }
    min_height, min_width = shape.smallest_size
    return [
        (batch, config.num_channels, max(height, min_height), max(width, min_width))
        for (height, width), batch in sizes.items()
    ]


def compare_outputs(
    batches: list[torch.Tensor], expected: list[Outputs], outputs: list[Outputs], dtype: str
) -> list[BatchComparison]:
    """Compare the outputs of a file with the outputs of the model. Raises ValueError if they exceed `LIMITS`."""
    absolute, relative = LIMITS[dtype]
    comparisons = []
    for images, reference, result in zip(batches, expected, outputs, strict=True):
        shape: ImageShape = tuple(images.shape)  # type: ignore[assignment]  # four numbers
        if get_shapes(reference) != get_shapes(result):
            raise ValueError(
                f"the written graph must have the outputs {get_shapes(reference)} for images {list(shape)}, but has "
                f"{get_shapes(result)}"
            )
        differences = {name: get_max_magnitude(result[name] - reference[name]) for name in reference}
        magnitudes = {name: get_max_magnitude(reference[name]) for name in reference}
        for name, difference in differences.items():
            limit = absolute + relative * magnitudes[name]
            if not difference <= limit:  # or NaN
                raise ValueError(
                    f"the written graph differs from the model: {name} by {difference:.2g} for images {list(shape)}; "
                    f"the limit in {dtype} is {limit:.2g}"
                )
        comparisons.append(BatchComparison(shape, differences, magnitudes))
    return comparisons


def get_shapes(outputs: Outputs) -> list[tuple[str, list[int]]]:
    """Return the names and shapes of outputs, in order."""
    return [(name, list(output.shape)) for name, output in outputs.items()]


def get_largest_differences(comparisons: list[BatchComparison]) -> dict[str, float]:
    """Return the largest difference of each output over all batches."""
    return {name: max(batch.differences[name] for batch in comparisons) for name in comparisons[0].differences}


def describe_input(config: ViTCLSConfig, shape: GraphShape) -> dict[str, Any]:
    """Return the name, dtype, shape and image sizes of the input."""
    height_width = ["height", "width"] if shape.is_dynamic else list(shape.image_size)
    return {
        "name": INPUT_NAME,
        "dtype": "float32",
        "shape": ["batch", config.num_channels, *height_width],
        "image_size": list(shape.image_size),
        "smallest_image_size": list(shape.smallest_size),
        "patch_size": list(config.patch_height_width),
    }


def describe_outputs(outputs: Outputs, shape: GraphShape) -> dict[str, list[int | str]]:
    """Return the shape of each output, with names for the axes of [B, N, D] and [B, D, rows, columns]."""
    shapes: dict[str, list[int | str]] = {}
    for name, output in outputs.items():
        axes: list[int | str] = ["batch", *output.shape[1:]]
        if shape.is_dynamic and len(axes) == 3:
            axes[1] = "tokens"
        if shape.is_dynamic and len(axes) == 4:
            axes[2:] = ["rows", "columns"]
        shapes[name] = axes
    return shapes


def describe_preprocessing(processor: ViTCLSImageProcessor | None) -> dict[str, Any] | None:
    """Return the settings of the image processor that are set; None without an image processor."""
    if processor is None:
        return None
    all_settings = processor.to_dict()
    settings = {name: all_settings[name] for name in PREPROCESSING if all_settings.get(name) is not None}
    if "resample" in settings:
        settings["resample"] = PILImageResampling(settings["resample"]).name.lower()
    return settings


def get_label_names(config: ViTCLSConfig, names: list[str]) -> dict[str, list[str]]:
    """Return the names of the classes of each output with logits, in the order of the logits."""
    if config.tasks:
        return config.task_labels()
    id2label: dict[Any, str] = dict(config.id2label or {})
    return {name: [id2label[index] for index in range(len(id2label))] for name in names if name.endswith("logits")}
