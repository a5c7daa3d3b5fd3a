"""The proof of a conversion: how far the converted model is from its source, measured, with versions and hashes.

    comparisons, not_compared = compare(source, model, with_logits=True)      # raises where a limit is exceeded

Compared are every token of the final hidden state, by group, and the logits, on random images of the native size and
of a rectangle, for which positions are interpolated, where the source takes one.
"""

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from ..errors import in_one_line
from ..modeling_vitcls import ViTCLSForImageClassification, ViTCLSPreTrainedModel
from .source_models import Answers, Source
from .weight_rules import ConversionError


# DESIGN.md, "Accuracy of equivalence": the largest difference of any value, in float32.
LIMIT = 1e-5

NUM_IMAGES = 2
FILE_NAME = "certificate.json"

Numbers = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Differences at one image size, by "cls", "distillation", "registers", "patches", "logits", "pooled".

    Attributes:
        image_size: (height, width), pixels.
        differences: largest absolute difference in float32.
        magnitudes: largest absolute value of the source.
    """

    image_size: tuple[int, int]
    differences: Numbers
    magnitudes: Numbers

    def exceeding(self) -> list[str]:
        """What is beyond the limit; NaN is."""
        return [name for name, value in self.differences.items() if not value <= LIMIT]


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was converted, into what, how exactly, from which preprocessing, with which versions.

    Attributes:
        source: `timm:NAME` or `transformers:PATH_OR_ID`, without the folders of this machine.
        source_revision: the hash of the source's commit on the Hub; None where it is not known.
        classifier: "kept", "new", "dropped" or "none" (the source has none).
        not_compared: why there is no second comparison; empty if there is one.
        preprocessing: `Preprocessing` without the processor itself.
        sha256: file name -> hash of the written weights.
    """

    source: str
    source_revision: str | None
    source_class: str
    random_init: bool
    model_class: str
    classifier: str
    limit: float
    comparisons: list[Comparison]
    not_compared: str
    preprocessing: dict[str, Any]
    versions: dict[str, str]
    sha256: dict[str, str]
    notes: list[str]

    def save(self, folder: Path) -> None:
        """Write certificate.json."""
        text = json.dumps(dataclasses.asdict(self), indent=2)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")


def compare(source: Source, model: ViTCLSPreTrainedModel, with_logits: bool) -> tuple[list[Comparison], str]:
    """Compare at the native size and at a rectangle; and why there is no second comparison, empty if there is one.

    The source's model is in float32, and is left so.

    Args:
        with_logits: whether the model has the source's classifier.

    Raises:
        ConversionError: where a difference exceeds the limit.
    """
    native, rectangle = source.image_size, rectangle_for(source, model)
    comparisons = [compare_at(native, source, model, with_logits)]
    try:
        source_answers(source, images(model, rectangle))
    except Exception as error:  # whatever the source raises for a size that it does not take
        return comparisons, f"the source refuses {rectangle[0]} x {rectangle[1]} pixels: {in_one_line(error)}"
    return [*comparisons, compare_at(rectangle, source, model, with_logits)], ""


def rectangle_for(source: Source, model: ViTCLSPreTrainedModel) -> tuple[int, int]:
    """A size of fewer rows and more columns of patches than the native one."""
    (height, width), (patch_height, patch_width) = source.image_size, model.config.patch_height_width
    rows, columns = height // patch_height, width // patch_width
    return max(1, rows * 3 // 4) * patch_height, (columns * 5 // 4 + 1) * patch_width


def compare_at(size: tuple[int, int], source: Source, model: ViTCLSPreTrainedModel, with_logits: bool) -> Comparison:
    """Compare on images of one size.

    Raises:
        ConversionError: where a difference exceeds the limit.
    """
    comparison = Comparison(size, *differences_at(size, source, model, with_logits))
    if exceeding := comparison.exceeding():
        listed = ", ".join(f"{name} by {comparison.differences[name]:.2g}" for name in exceeding)
        raise ConversionError(
            f"the converted model differs from {source.name} at {size[0]} x {size[1]} pixels: {listed}; the limit is "
            f"{LIMIT:g}"
        )
    return comparison


def differences_at(
    size: tuple[int, int], source: Source, model: ViTCLSPreTrainedModel, with_logits: bool
) -> tuple[Numbers, Numbers]:
    """Largest absolute differences, and largest absolute values of the source."""
    pixel_values = images(model, size)
    wanted = by_group(source_answers(source, pixel_values), model)
    found = model_answers(model, pixel_values)
    names = [name for name in wanted if name in found and (with_logits or "logits" not in name)]
    if with_logits and "logits" not in names:
        raise ConversionError(f"the logits of {source.name} cannot be compared")
    differences = {name: largest(found[name] - wanted[name]) for name in names}
    return differences, {name: largest(wanted[name]) for name in names}


def images(model: ViTCLSPreTrainedModel, size: tuple[int, int]) -> torch.Tensor:
    """Random images [B, C, height, width], the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(NUM_IMAGES, model.config.num_channels, *size, generator=generator)


@torch.no_grad()
def source_answers(source: Source, pixel_values: torch.Tensor) -> Answers:
    """What the source, which is in float32, answers."""
    return source.answers(pixel_values)


@torch.no_grad()
def model_answers(model: ViTCLSPreTrainedModel, pixel_values: torch.Tensor) -> Answers:
    """What ours answers, by the same names and by token group, in float32 too."""
    if model.dtype != pixel_values.dtype:
        model = copy.deepcopy(model)
        model.to(dtype=pixel_values.dtype)  # type: ignore[call-arg]  # transformers wraps `to` untyped
    encoded = model.base_model(pixel_values)
    answers = by_group({"sequence": encoded.last_hidden_state}, model)
    if not isinstance(model, ViTCLSForImageClassification):
        return answers | ({} if encoded.pooler_output is None else {"pooled": encoded.pooler_output})
    outputs = model(pixel_values)
    answers |= {name: outputs[name] for name in ("logits", "cls_logits", "distillation_logits") if name in outputs}
    return answers


def by_group(answers: Answers, model: ViTCLSPreTrainedModel) -> Answers:
    """With each group of tokens, those that there are, in place of the whole sequence [B, N, D]."""
    sequence = answers["sequence"]
    groups = {name: sequence[:, group] for name, group in model.config.token_layout.items()}
    others = {name: answer for name, answer in answers.items() if name != "sequence"}
    return {name: tokens for name, tokens in groups.items() if tokens.shape[1]} | others


def largest(values: torch.Tensor) -> float:
    """The largest magnitude; NaN if any is."""
    return values.abs().max().item()


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of weights."""
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def sha256(file: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
