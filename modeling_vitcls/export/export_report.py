"""How far a written graph is from the model, on which images, and what its user has to know to feed it.

The model answers in float32, in eager mode, at its own image size as it was loaded; the file answers in its runtime.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers.image_utils import PILImageResampling

from ..configuration_vitcls import ViTCLSConfig
from ..conversion.parity_report import largest, sha256
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..modeling_vitcls import ViTCLSPreTrainedModel
from .exportable import INPUT, Answers, NamedAnswers
from .tracing import Plan


# dtype of the graph -> largest difference of any value: absolute, and as a part of the model's largest value.
LIMITS: dict[str, tuple[float, float]] = {"float32": (1e-4, 0.0), "float16": (1e-4, 1e-2), "bfloat16": (1e-4, 8e-2)}

Numbers = dict[str, float]
Shape = tuple[int, int, int, int]

# Settings of the image processor that say what to feed.
PREPROCESSING = (
    "do_resize size resample do_center_crop crop_size crop_rounding do_rescale rescale_factor do_normalize image_mean "
    "image_std do_convert_rgb do_pad pad_size"
).split()


@dataclasses.dataclass(frozen=True)
class Trial:
    """One batch of images.

    Attributes:
        shape: [batch, channels, height, width].
        differences: largest absolute difference, per answer.
        magnitudes: largest absolute value of the model, per answer.
    """

    shape: Shape
    differences: Numbers
    magnitudes: Numbers


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What was exported, how exactly, with which versions, and how to feed it.

    Attributes:
        model: its name, without the folders of this machine.
        weights: "trained", or "random" for a preset.
        limit: the largest difference that would have passed: absolute, and relative to the magnitude.
        input: name, dtype and shape, open axes by name, and the smallest (height, width).
        outputs: name -> shape, open axes by name.
        fixed_because: why the graph takes one image size although any was asked for.
        preprocessing: settings of the image processor; None where the model has none.
        labels: answer -> names of its classes.
        sha256: file name -> hash.
    """

    format: str
    model: str
    model_class: str
    weights: str
    dtype: str
    opset: int | None
    limit: tuple[float, float]
    largest_differences: Numbers
    tried: list[Trial]
    input: dict[str, Any]
    outputs: dict[str, list[int | str]]
    fixed_because: str
    preprocessing: dict[str, Any] | None
    labels: dict[str, list[str]]
    versions: dict[str, str]
    sha256: dict[str, str]

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")


def shapes_to_try(config: ViTCLSConfig, plan: Plan) -> list[Shape]:
    """Batches of several sizes: the intended one, both kinds of rectangle, whole patches or not, the smallest."""
    if not plan.any_size:
        return [(batch, config.num_channels, *plan.image_size) for batch in (1, 2, 3)]
    (height, width), (patch_height, patch_width) = plan.image_size, config.patch_height_width
    rows, columns = height // patch_height, width // patch_width
    sizes = {
        config.image_height_width: 1,
        plan.image_size: 3,
        (max(1, rows * 3 // 4) * patch_height, (columns * 5 // 4 + 1) * patch_width): 2,
        ((rows * 5 // 4 + 1) * patch_height, max(1, columns * 3 // 4) * patch_width): 1,
        (height + patch_height - 1, width + 1): 2,
        plan.smallest_size: 1,
    }
    smallest = plan.smallest_size
    return [
        (batch, config.num_channels, max(height, smallest[0]), max(width, smallest[1]))
        for (height, width), batch in sizes.items()
    ]


def images(shape: Shape) -> torch.Tensor:
    """Random ones, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def model_answers(model: ViTCLSPreTrainedModel, batches: list[torch.Tensor]) -> list[Answers]:
    """What the model itself answers."""
    named = NamedAnswers(model)
    return [named(batch) for batch in batches]


def compared(batches: list[torch.Tensor], wanted: list[Answers], found: list[Answers], dtype: str) -> list[Trial]:
    """One trial per batch.

    Raises:
        ValueError: if an answer has another name or shape, or is further away than `LIMITS` allows; NaN is.
    """
    trials = []
    for batch, right, answered in zip(batches, wanted, found, strict=True):
        if [(name, answer.shape) for name, answer in right.items()] != [
            (name, answer.shape) for name, answer in answered.items()
        ]:
            raise ValueError(f"the written graph gives other answers, or of other shapes, for {list(batch.shape)}")
        trial = Trial(
            tuple(batch.shape),  # type: ignore[arg-type]  # four numbers
            {name: largest(answered[name] - right[name]) for name in right},
            {name: largest(right[name]) for name in right},
        )
        check_limit(trial, dtype)
        trials.append(trial)
    return trials


def check_limit(trial: Trial, dtype: str) -> None:
    """Raise ValueError for a difference that is too large."""
    absolute, relative = LIMITS[dtype]
    for name, difference in trial.differences.items():
        allowed = absolute + relative * trial.magnitudes[name]
        if not difference <= allowed:
            raise ValueError(
                f"the written graph differs from the model: {name} by {difference:.2g} for images "
                f"{list(trial.shape)}; the limit in {dtype} is {allowed:.2g}"
            )


def largest_differences(trials: list[Trial]) -> Numbers:
    """Of all trials, per answer."""
    return {name: max(trial.differences[name] for trial in trials) for name in trials[0].differences}


def input_facts(config: ViTCLSConfig, plan: Plan) -> dict[str, Any]:
    """What goes in."""
    sides = ["height", "width"] if plan.any_size else list(plan.image_size)
    return {
        "name": INPUT,
        "dtype": "float32",
        "shape": ["batch", config.num_channels, *sides],
        "image_size": list(plan.image_size),
        "smallest_image_size": list(plan.smallest_size),
        "patch_size": list(config.patch_height_width),
    }


def output_shapes(answers: Answers, plan: Plan) -> dict[str, list[int | str]]:
    """What comes out, from answers to one batch; axes that follow the images are called by what they count."""
    return {name: list(open_axes(list(answer.shape), plan)) for name, answer in answers.items()}


def open_axes(shape: list[int], plan: Plan) -> list[int | str]:
    """[B, ...] with names for open axes: [B, tokens, D] and [B, D, rows, columns] follow the image size."""
    fixed: list[int | str] = [*shape[1:]]
    if plan.any_size and len(shape) == 3:
        fixed[0] = "tokens"
    if plan.any_size and len(shape) == 4:
        fixed[1:] = ["rows", "columns"]
    return ["batch", *fixed]


def preprocessing_facts(processor: ViTCLSImageProcessor | None) -> dict[str, Any] | None:
    """How a picture becomes `pixel_values`, channels red, green, blue; what is not set is left out."""
    if processor is None:
        return None
    settings = processor.to_dict()
    facts = {name: settings[name] for name in PREPROCESSING if settings.get(name) is not None}
    if "resample" in facts:
        facts["resample"] = PILImageResampling(facts["resample"]).name.lower()
    return facts


def label_names(config: ViTCLSConfig, names: list[str]) -> dict[str, list[str]]:
    """The classes of each answer that has any, in the order of its logits."""
    if config.tasks:
        return config.task_labels()
    id2label: dict[Any, str] = dict(config.id2label or {})
    return {name: [id2label[index] for index in range(len(id2label))] for name in names if name.endswith("logits")}


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file."""
    return {file.name: sha256(file) for file in sorted(folder.iterdir())}
