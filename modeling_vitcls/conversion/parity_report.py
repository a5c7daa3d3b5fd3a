"""Compare the outputs of a source and the converted model, for the parity report.

    # Raises ConversionError if a difference exceeds MAX_DIFFERENCE.
    comparisons, reason = compare_models(source, model)

The comparison covers all token groups of the final hidden state, and the logits or the pooled
output. The inputs are random images of the native size. If the source supports other sizes, the
comparison is repeated at a non-square size, for which position embeddings are resampled.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hub.local_paths import resolve_name, strip_folders
from ..hub.model_files import PARITY_REPORT_FILE, hash_weights
from ..hub.provenance import find_provenance
from ..model.field_checks_vitcls import Size
from ..model.modeling_vitcls import ViTCLSForImageClassification, ViTCLSPreTrainedModel
from ..runtime.errors import format_error, warn_on_first_process
from ..runtime.files import write_json
from ..runtime.system import get_versions
from .source_models import Outputs, SourceModel
from .weight_rules import ConversionError


# Maximum allowed difference between float32 outputs, relative to the largest value of a token group
# or head.
MAX_DIFFERENCE = 1e-5

Report = dict[str, Any]  # Content of parity_report.json, or of one of its comparisons


# Without CPU kernels, whose rounding errors grow with the magnitude of the values (docs/speed.md).
@torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
def compare_models(source: SourceModel, model: ViTCLSPreTrainedModel) -> tuple[list[Report], str]:
    """Compare the outputs of a source and the converted model at its native and a non-square size.

    Raise ConversionError if a difference exceeds `MAX_DIFFERENCE`.

    Args:
        source: Source whose model is in float32. If it has a `native_size_reason`, only the native
            size is compared.
        model: The converted model. It is cast to float32.

    Returns:
        One dict per size, and the reason why a size is not compared (empty if all sizes are
        compared). `image_size` is (height, width) in pixels. `differences` and `magnitudes` contain
        the largest absolute differences and the largest absolute values of the source, by token
        group ("cls", ...), "logits" or "pooled".
    """
    source.model.eval()
    model.to(dtype=torch.float32)  # type: ignore[call-arg]  # `to` is untyped in transformers
    images = [
        build_random_images((2, model.config.num_channels, *size))
        for size in (
            source.image_size,
            # A square grid would hide swapped rows and columns.
            get_non_square_size(source.image_size, model.config.patch_height_width),
        )
    ]
    return compare_on_images(source, model, images, MAX_DIFFERENCE)


def check_in_memory(model: ViTCLSPreTrainedModel, source: SourceModel) -> ViTCLSPreTrainedModel:
    """Compare the outputs of two models as they are, for a random image of the native size.

    `model` is returned. If the source cannot process the image, a warning says why.

    Raise ConversionError if a difference exceeds 1e-4 of the largest value, or 5 % in half
    precision.
    """
    try:
        source.model = copy_for_evaluation(source.model)
        image = build_random_images((1, model.config.num_channels, *source.image_size))
        with torch.autocast(model.device.type, enabled=False):
            compare_on_images(
                source,
                copy_for_evaluation(model),
                [image.to(model.device, model.dtype)],
                0.05 if model.dtype.itemsize < 4 else 1e-4,
            )
    except ConversionError as error:
        raise ConversionError(
            f"{error}. Undo what was changed in the model since it was built, such as a hook, an "
            "activation or a `forward`"
        ) from None
    except Exception as error:  # The exception type depends on the source
        warn_on_first_process(
            f"the outputs of {source.name} and the converted model were not compared: "
            f"{format_error(error)}"
        )
    return model


def copy_for_evaluation(model: Any) -> Any:
    """Copy the modules and settings of a model, in eval mode, with the same tensors."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()


@torch.no_grad()
def compare_on_images(
    source: SourceModel, model: ViTCLSPreTrainedModel, images: list[Tensor], limit: float
) -> tuple[list[Report], str]:
    """Compare two models as `compare_models` does, on images [B, C, H, W] of each size."""
    comparisons: list[Report] = []
    for pixel_values in images:
        height, width = pixel_values.shape[2:]
        try:
            source_outputs = source.compute_outputs(pixel_values)
        except Exception as error:  # The exception type depends on the source
            # The native size comes first. An error there is a fault, and only later a limit of the
            # source.
            if not comparisons:
                raise
            return (
                comparisons,
                f"the source does not support {height} x {width} pixels: {format_error(error)}",
            )

        source_groups = split_token_groups(source_outputs.pop("sequence"), model) | source_outputs
        outputs = compute_model_outputs(model, pixel_values)
        # The comparison below covers the outputs that both models have, so it would miss a lost
        # classifier.
        if ("logits" in source_groups) != ("logits" in outputs) or any(
            outputs.get(name, output).shape != output.shape
            for name, output in source_groups.items()
        ):
            raise ConversionError(
                f"the outputs of {source.name} and of the converted model differ in names or shapes"
            )

        comparison = compare_outputs(outputs, source_groups)
        # `not value <= limit` is also true for NaN.
        excessive = [
            f"{name} by {value:.2g} (largest value {comparison['magnitudes'][name]:.2g})"
            for name, value in comparison["differences"].items()
            if not value <= limit * comparison["magnitudes"][name]
        ]
        if excessive:
            raise ConversionError(
                f"the outputs of the converted model differ from {source.name} at "
                f"{height} x {width} pixels: {', '.join(excessive)}; the limit is "
                f"{limit:g} of the largest value"
            )

        comparisons.append({"image_size": (height, width), **comparison})
        if source.native_size_reason:
            return comparisons, source.native_size_reason
    return comparisons, ""


def get_non_square_size(image_size: Size, patch_size: Size) -> Size:
    """Choose an image size (height, width) with fewer rows and more columns of patches."""
    rows, columns = (side // patch for side, patch in zip(image_size, patch_size, strict=True))
    return max(1, rows * 3 // 4) * patch_size[0], (columns * 5 // 4 + 1) * patch_size[1]


def build_random_images(shape: tuple[int, int, int, int]) -> Tensor:
    """Build random images [B, C, height, width], the same ones for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def compute_model_outputs(model: ViTCLSPreTrainedModel, pixel_values: Tensor) -> Outputs:
    """Compute the outputs of the converted model by token group."""
    encoder_outputs = model.base_model(pixel_values)
    token_groups = split_token_groups(encoder_outputs.last_hidden_state, model)
    if not isinstance(model, ViTCLSForImageClassification):
        pooled = encoder_outputs.pooler_output
        return token_groups | ({} if pooled is None else {"pooled": pooled})
    outputs = model(pixel_values)
    return token_groups | {
        n: outputs[n] for n in ("logits", "cls_logits", "distillation_logits") if n in outputs
    }


def split_token_groups(sequence: Tensor, model: ViTCLSPreTrainedModel) -> Outputs:
    """Split a sequence [B, N, D] into its token groups that are not empty."""
    groups = {name: sequence[:, group] for name, group in model.config.token_layout.items()}
    return {name: tokens for name, tokens in groups.items() if tokens.shape[1]}


def compare_outputs(outputs: Outputs, reference: Outputs) -> Report:
    """Find the largest differences from the reference, and its largest values, by common name.

    A number is NaN if any of its values is NaN.
    """
    names = [name for name in reference if name in outputs]
    return {
        "differences": {
            name: (outputs[name] - reference[name]).abs().max().item() for name in names
        },
        "magnitudes": {name: reference[name].abs().max().item() for name in names},
    }


def write_parity_report(
    folder: Path,
    source_name: str,
    reference: SourceModel,
    model: ViTCLSPreTrainedModel,
    *,
    preprocessing: dict[str, Any],
    is_native: bool,
) -> Report:
    """Compare two models as `compare_models` does, and write the parity report in a folder.

    docs/converting.md describes the main fields. `is_native` and `provenance` (license and base model)
    are for the card.

    Args:
        folder: It has the weights of the converted model, and gets the license files of the source.
        source_name: Name of the source, as on the command line.
        reference: The model of the other project.
        model: The vitcls model.
        preprocessing: What is known about the image processor.
        is_native: Whether `reference` was converted from `model`.
    """
    comparisons, not_compared = compare_models(reference, model)
    notes = reference.notes
    # A known difference (huggingface/pytorch-image-models#2681)
    name = reference.name.lower()
    if name.startswith("timm:") and "dinov3" in name and model.config.pooling == "mean":
        notes.append(
            "pooling: the mean of the patches, as in timm; Meta's code and transformers read the CLS "
            "token. To do the same, set `pooling='cls'` in training (`vitcls finetune --pooling cls`)"
        )
    classes = [type(reference.model).__name__, type(model).__name__]
    if is_native:
        classes.reverse()
    source_class, model_class = classes
    report = {
        "is_native": is_native,
        "notes": notes,
        "provenance": find_provenance(source_name).copy_to(folder),
        "source": strip_folders(resolve_name(source_name)),
        "source_class": source_class,
        "source_revision": reference.revision,
        "family": reference.family,
        "source_sha256": reference.sha256,
        "model_class": model_class,
        "image_size": model.config.image_height_width,
        "classifier": (
            "kept"
            if isinstance(model, ViTCLSForImageClassification) and model.config.num_labels
            else "none"
        ),
        "num_labels": model.config.num_labels,
        "preprocessing": preprocessing,
        "comparisons": comparisons,
        "not_compared": not_compared,
        "limit": MAX_DIFFERENCE,
        "versions": get_versions("timm"),
        "sha256": hash_weights(folder),
    }
    write_json(folder / PARITY_REPORT_FILE, report)
    return report
