"""Teachers: frozen classifiers that predict labels from the student's pixels.

    student's pixels -> channels, size and scale of the teacher -> teacher -> logits of the student's labels

Teachers (`finetune --teacher`) are image classifiers of any architecture. A published state dict is converted
first (`vitcls convert`).

`FOLDER` or a Hub id     an image classifier from transformers or this package; code in the repository is not executed
`timm:NAME`              a timm model with its pretrained weights; also `timm:hf-hub:ID` and `timm:local-dir:FOLDER`

The teacher and the student receive the same crop, resized for the teacher (DeiT, arXiv 2012.12877).
The teacher's image processor determines the input size, interpolation, scale and normalization, but
does not crop. losses.py contains the losses.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import Compose, Normalize, ToDtype
from torchvision.transforms.v2 import functional as transforms
from transformers import AutoImageProcessor, AutoModelForImageClassification
from transformers.image_utils import pil_torch_interpolation_mapping

from ..data.batches import Normalizer
from ..data.cells import normalize_name
from ..data.labels import LabelSpace
from ..evaluation.evaluator import Evaluator, build_predictions
from ..hub.loading import get_external_model_folder, load_timm_model
from ..inference.image_pass import find_finite
from ..inference.metrics import MetricValues
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.field_checks_vitcls import Size
from ..runtime.errors import format_error, format_name_list


TIMM_PREFIX = "timm:"
# Model, preprocessing, and label names in the order of the logits: LABEL_0, ... if they have no names
LoadedTeacher = tuple[nn.Module, "TeacherPreprocessing", list[str]]


@dataclass(frozen=True)
class TeacherPreprocessing:
    """Preprocessing of the student's pixels for a teacher."""

    num_channels: int
    height_width: Size
    interpolation: InterpolationMode
    # Converts uint8 [B, C, H, W] to normalized float32
    normalize: Callable[[Tensor], Tensor]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Convert the student's pixels [B, C, H, W] in [0, 255] to the teacher's input.

        Pixels of mixed images are rounded.
        """
        if pixels.is_floating_point():
            pixels = pixels.clamp(0, 255).round().to(torch.uint8)
        pixels = convert_channels(pixels, self.num_channels)
        size = list(self.height_width)
        return self.normalize(transforms.resize(pixels, size, self.interpolation))


class Teacher(nn.Module):
    """Frozen model in eval mode."""

    def __init__(
        self,
        source: str,
        model: nn.Module,
        preprocessing: TeacherPreprocessing,
        label_indices: list[int],
        note: str,
    ) -> None:
        super().__init__()
        self.source = source
        self.model: Any = model.requires_grad_(False)
        self.preprocessing = preprocessing
        self.label_indices = label_indices  # Positions of the student's labels

        height, width = preprocessing.height_width
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        self.description = (
            f"{source}: {num_parameters:,} parameters, at {height} x {width} pixels{note}"
        )
        self.eval()

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Predict logits [B, L] for the student's pixels [B, C, H, W].

        The pixels are `uint8` or floats in [0, 255]. Raise ValueError if any output is not finite.
        """
        outputs = self.model(self.preprocessing(pixels))
        logits: Tensor = getattr(outputs, "logits", outputs)
        if num_wrong := int((~find_finite({"logits": logits})).sum()):
            raise ValueError(
                f"the outputs of the teacher {self.source} are not finite for {num_wrong} of "
                f"{len(logits)} images. Use another teacher, or set `mixed_precision='no'`"
            )
        return logits[:, self.label_indices]


def load_teacher(
    source: str, labels: LabelSpace, student: ViTCLSConfig, device: torch.device
) -> Teacher:
    """Load a teacher for a student with the given labels and configuration.

    Raise ValueError if the teacher is not an image classifier, lacks a label or has several labels
    per image, and OSError if the teacher cannot be found or read.

    Labels are matched by name. If a teacher has no label names but the same number of labels, the
    labels are assumed to be in the same order. `Teacher.description` states this assumption.
    """
    if source.startswith(TIMM_PREFIX):
        model, preprocessing, names = load_timm_teacher(source)
    else:
        model, preprocessing, names = load_transformers_teacher(source, student)
    label_indices, note = match_labels(source, names, labels.names)
    return Teacher(source, model, preprocessing, label_indices, note).to(device)


def measure(teacher: Teacher, student: nn.Module, images: Evaluator) -> MetricValues:
    """Measure a teacher on the images of an evaluator, which prepares them for the student."""
    normalize = Normalizer(images.processor, images.accelerator.device)
    outputs = images.collect(
        student, lambda pixel_values: {"logits": teacher(normalize.revert(pixel_values))}
    )
    return build_predictions(images.label_space, outputs).metrics


def match_labels(source: str, names: list[str], labels: list[str]) -> tuple[list[int], str]:
    """Find each label in the teacher's logits, which have names; also return a note on the mapping."""
    are_unnamed = names == [f"LABEL_{index}" for index in range(len(names))]
    if are_unnamed and len(names) == len(labels):
        return (
            list(range(len(names))),
            f"; the teacher's {len(names)} labels have no names and are assumed to be in the "
            "dataset's order",
        )

    names = list(map(normalize_name, names))
    if missing_names := [name for name in labels if names.count(name) != 1]:
        names_text = format_name_list(names, 8)
        if are_unnamed:
            names_text = f"{len(names)} labels without names"
        raise ValueError(
            f"the teacher {source} must have exactly one label {missing_names[0]!r}, like the "
            f"dataset, but has {names_text}. Use a teacher that was trained on the dataset's labels"
        )

    note = ""
    if len(names) > len(labels):
        note = f"; {len(labels)} of the teacher's {len(names)} labels are used"
    return [names.index(name) for name in labels], note


# transformers -------------------------------------------------------------------------------------


def load_transformers_teacher(source: str, student: ViTCLSConfig) -> LoadedTeacher:
    """Load a transformers classifier in `float32`, and its image processor."""
    with explain_loading_errors(source):
        folder = get_external_model_folder(source.removeprefix("transformers:"))
        # By default, transformers would wait for an input on the terminal, even in a job on a
        # cluster.
        model, loading_info = AutoModelForImageClassification.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)

    if missing_names := loading_info["missing_keys"]:
        raise ValueError(
            f"the teacher {source} lacks the weight {min(missing_names)}. Use a trained classifier"
        )

    config = model.config
    if getattr(config, "tasks", None) or config.problem_type not in (
        None,
        "single_label_classification",
    ):
        raise ValueError(
            f"the teacher {source} was not trained with one label per image, as the dataset has. Use "
            "a teacher of this kind"
        )
    names = [config.id2label[index] for index in range(config.num_labels)]
    if config.model_type == "timm_wrapper":
        preprocessing = build_timm_preprocessing(processor.data_config)
    else:
        preprocessing = build_processor_preprocessing(
            processor, getattr(config, "num_channels", 3), student
        )
    # With statistics of ours, it would compare its weights with them after each step.
    model.class_distance = None
    return model, preprocessing, names


@contextmanager
def explain_loading_errors(source: str) -> Iterator[None]:
    """Convert all errors to OSErrors of one line that name the teacher."""
    try:
        yield
    except Exception as error:  # Loading files of other projects may raise any error
        advice = ""
        if "trust_remote_code" in str(error):
            advice = (
                ". Code of a repository is not executed: use a model that is part of "
                "transformers, or timm:NAME"
            )
        if Path(source).is_file():
            advice = f". Convert the file first: vitcls convert {source} FOLDER"
        reason = f"{type(error).__name__}: {format_error(error)}"
        raise OSError(f"cannot load the teacher {source} ({reason}){advice}") from error


def build_processor_preprocessing(
    processor: Any, num_channels: int, student: ViTCLSConfig
) -> TeacherPreprocessing:
    """Build the preprocessing from a transformers image processor.

    The teacher's input size is the processor's output size for an image of the student's size.
    """
    blank_image = torch.zeros(
        1, student.num_channels, *student.image_height_width, dtype=torch.uint8
    )
    height, width = run_processor(processor, convert_channels(blank_image, num_channels)).shape[-2:]
    return TeacherPreprocessing(
        num_channels,
        (height, width),
        get_interpolation(getattr(processor, "resample", None)),
        normalize=partial(run_processor, processor, do_resize=False),
    )


def run_processor(processor: Any, pixels: Tensor, **kwargs: Any) -> Tensor:
    """Run an image processor on `uint8` images [B, C, H, W], and return [B, C, H', W']."""
    kwargs |= {"input_data_format": "channels_first", "return_tensors": "pt"}
    return processor(list(pixels), **kwargs)["pixel_values"]


# timm ---------------------------------------------------------------------------------------------


def load_timm_teacher(source: str) -> LoadedTeacher:
    """Load a timm model, and the preprocessing that timm specifies for the model's weights."""
    # For example, timm is not installed, or the name is unknown
    with explain_loading_errors(source):
        import timm

        model: Any = load_timm_model(source.removeprefix(TIMM_PREFIX))[0]
    preprocessing = build_timm_preprocessing(timm.data.resolve_model_data_config(model))
    unnamed = [f"LABEL_{index}" for index in range(model.num_classes)]
    return model, preprocessing, model.pretrained_cfg.get("label_names") or unnamed


def build_timm_preprocessing(data_config: dict[str, Any]) -> TeacherPreprocessing:
    """Build the preprocessing from timm's data configuration."""
    num_channels, height, width = data_config["input_size"]
    normalize = Compose(
        [ToDtype(torch.float32, scale=True), Normalize(data_config["mean"], data_config["std"])]
    )
    interpolation = get_interpolation(data_config["interpolation"])
    return TeacherPreprocessing(num_channels, (height, width), interpolation, normalize)


# Image conversion -----------------------------------------------------------------------


def convert_channels(pixels: Tensor, num_channels: int) -> Tensor:
    """Convert the student's pixels to the teacher's number of channels.

    Gray [B, 1, H, W] becomes color [B, 3, H, W], or color becomes gray. Raise ValueError for other
    numbers of channels.
    """
    if pixels.shape[1] == num_channels:
        return pixels
    if {pixels.shape[1], num_channels} == {1, 3}:  # One channel becomes three equal ones
        return transforms.rgb_to_grayscale(pixels, num_output_channels=num_channels)
    raise ValueError(
        f"the teacher requires {num_channels} channel(s), but the student's images have "
        f"{pixels.shape[1]}. Use a teacher with {pixels.shape[1]} channel(s)"
    )


def get_interpolation(resample: Any) -> InterpolationMode:
    """Find torchvision's interpolation mode for a PIL number or a name of timm.

    Lanczos is replaced with bicubic, because torchvision does not support Lanczos for tensors.
    """
    if resample is None:
        return InterpolationMode.BILINEAR
    mode = (
        InterpolationMode(resample)
        if isinstance(resample, str)
        else pil_torch_interpolation_mapping[resample]
    )
    return InterpolationMode.BICUBIC if mode is InterpolationMode.LANCZOS else mode
