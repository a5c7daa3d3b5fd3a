"""Teachers: classifiers of any architecture that answer about the student's own pixels, in the order of its labels.

    the student's pixels -> channels, size and scale of the teacher -> teacher -> logits in the student's order

`FOLDER` or a Hub id     any image classifier that transformers has a class for, ours included; no other code is run
`timm:NAME`              a timm model with its published weights; also `timm:hf-hub:ID` and `timm:local-dir:FOLDER`
`timm:NAME@FILE`         a timm model with the weights in FILE (safetensors, or a state dict, read without unpickling
                         anything else)

The teacher sees the very crop that the student sees, resized as a whole (DeiT, arXiv 2012.12877): its own image
processor decides size, filter, scale and normalisation, but cuts nothing off. Losses are in losses.py.

The teacher's answers, kept, so that it is asked once about each augmented view of a picture.

With `--teacher-views V` every picture has V views that recur; a view is known by (view, index). The answers stay in
memory and in no checkpoint: after a resumption the teacher is asked again, in other batches, and its answers
are the same up to rounding before they are kept in half precision.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as transforms
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
)
from transformers.image_utils import pil_torch_interpolation_mapping

from ..data.labels import LabelSpace
from ..hub.loading import load_timm, local_copy_of_any_kind
from ..options import AugmentationOptions


TIMM_PREFIX = "timm:"
GREY, RGB = 1, 3


@dataclass(frozen=True)
class Preprocessing:
    """What a teacher wants to see."""

    num_channels: int
    height_width: tuple[int, int]
    interpolation: InterpolationMode
    normalise: Callable[[torch.Tensor], torch.Tensor]  # [B, C, H, W] uint8 of that size -> float32

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """The student's pixels [B, C, H, W] of 0 to 255 -> the teacher's input; mixed pixels are rounded."""
        if pixels.is_floating_point():
            pixels = pixels.clamp(0, 255).round().to(torch.uint8)
        pixels = with_channels(pixels, self.num_channels)
        if pixels.shape[-2:] != self.height_width:
            pixels = transforms.resize(pixels, list(self.height_width), self.interpolation, antialias=True)
        return self.normalise(pixels)


class Teacher(nn.Module):
    """A frozen classifier, always in eval mode.

    Attributes:
        description: what it is, for a person.
        note: what was assumed about its labels; empty if nothing was.
    """

    def __init__(
        self,
        model: nn.Module,
        preprocessing: Preprocessing,
        columns: list[int] | None = None,
        description: str = "",
        note: str = "",
    ) -> None:
        """`columns`: for each of the student's labels, its place in the teacher's logits; None: they are the same."""
        super().__init__()
        self.model = model.requires_grad_(False)
        self.preprocessing = preprocessing
        self.columns = columns
        self.description = description
        self.note = note
        self.eval()

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """The student's pixels [B, C, H, W], `uint8` or floats of 0 to 255 -> logits [B, labels of the student]."""
        answer = self.model(self.preprocessing(pixels))
        logits = answer if isinstance(answer, torch.Tensor) else answer.logits
        return logits if self.columns is None else logits[:, self.columns]

    def ask(self, batch: dict[str, Any]) -> torch.Tensor:
        """Its logits [B, labels] on the `pixels` of a batch."""
        return self(batch["pixels"])

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)


@dataclass(frozen=True)
class Loaded:
    """A teacher as it was found: label names by index, None where it has none."""

    model: nn.Module
    preprocessing: Preprocessing
    label_names: list[str] | None
    num_labels: int


def load_teacher(
    source: str, labels: LabelSpace, num_channels: int, height_width: tuple[int, int], device: torch.device
) -> Teacher:
    """Load a teacher for a student with these labels, whose pictures have this many channels and this size.

    Its labels are matched by name. One without names, but with as many labels, is taken to have them in the same
    order, which `note` then says.

    Raises:
        ValueError: for labels that it lacks, a student of several tasks or several labels per picture, or what is no
            image classifier.
        OSError: for a teacher that cannot be found or read.
    """
    if labels.kind != "single_label_classification":
        raise ValueError(f"--teacher is for one label per picture, and the data set is of {labels.kind}: leave it out")
    load = load_from_timm if source.startswith(TIMM_PREFIX) else load_from_transformers
    loaded = load(source, num_channels, height_width)
    columns, note = match_labels(source, loaded, labels.names)
    height, width = loaded.preprocessing.height_width
    size = sum(parameter.numel() for parameter in loaded.model.parameters())
    description = f"{source}: {size:,} parameters, at {height} x {width} pixels"
    return Teacher(loaded.model, loaded.preprocessing, columns, description, note).to(device)


def match_labels(source: str, teacher: Loaded, wanted: list[str]) -> tuple[list[int] | None, str]:
    """For each label its place in the teacher's logits, None where those are the same, and what was assumed."""
    names = teacher.label_names
    if names is None:
        if teacher.num_labels != len(wanted):
            raise ValueError(
                f"the teacher {source} has {teacher.num_labels} labels without names, and the data set has "
                f"{len(wanted)}: give one that was trained on these labels"
            )
        return None, f"the teacher's labels have no names: its {len(wanted)} are taken to be in the data set's order"
    if names == wanted:
        return None, ""
    if missing := [name for name in wanted if name not in names]:
        raise ValueError(
            f"the teacher {source} has no label {missing[0]!r}: it knows {shortened(names)}; give one that was "
            "trained on these labels"
        )
    if ambiguous := [name for name in wanted if Counter(names)[name] > 1]:
        raise ValueError(f"the teacher {source} has several labels {ambiguous[0]!r}: name them apart in its config")
    note = f"{len(wanted)} of the teacher's {len(names)} labels are used" if len(names) > len(wanted) else ""
    return [names.index(name) for name in wanted], note


# transformers --------------------------------------------------------------------------------------------------------


def load_from_transformers(source: str, num_channels: int, height_width: tuple[int, int]) -> Loaded:
    """A classifier with its image processor, weights in `float32`."""
    try:
        folder = local_copy_of_any_kind(source)
    except OSError as error:
        raise OSError(f"cannot load the teacher: {error}") from error
    config = read(source, "config.json", AutoConfig.from_pretrained, folder, trust_remote_code=False)
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise ValueError(f"the teacher {source} is a model of type {config.model_type!r}: give an image classifier")
    load_model = AutoModelForImageClassification.from_pretrained
    model, info = read(
        source, "model", load_model, folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    if info["missing_keys"]:
        raise ValueError(
            f"the teacher {source} was saved without {sorted(info['missing_keys'])[0]}: give a trained classifier"
        )
    names = [config.id2label[index] for index in range(config.num_labels)]
    has_names = names != [f"LABEL_{index}" for index in range(config.num_labels)]
    processor = read(source, "image processor", AutoImageProcessor.from_pretrained, folder, trust_remote_code=False)
    if config.model_type == "timm_wrapper":
        preprocessing = preprocessing_of_timm(processor.data_config)
    else:
        preprocessing = preprocessing_of_processor(
            processor, getattr(config, "num_channels", RGB), num_channels, height_width
        )
    return Loaded(model, preprocessing, names if has_names else None, config.num_labels)


def preprocessing_of_processor(
    processor: Any, num_channels: int, student_channels: int, height_width: tuple[int, int]
) -> Preprocessing:
    """What an image processor of transformers does; the size is what it makes of a picture of the student's."""

    def normalise(pixels: torch.Tensor) -> torch.Tensor:
        return call(processor, pixels, do_resize=False)

    blank = torch.zeros(1, student_channels, *height_width, dtype=torch.uint8)
    height, width = call(processor, with_channels(blank, num_channels)).shape[-2:]
    interpolation = interpolation_of(getattr(processor, "resample", None))
    return Preprocessing(num_channels, (height, width), interpolation, normalise)


def call(processor: Any, pixels: torch.Tensor, **settings: Any) -> torch.Tensor:
    """An image processor on a batch [B, C, H, W] `uint8` -> [B, C, H', W'], on the same device."""
    settings |= {"input_data_format": "channels_first", "return_tensors": "pt"}
    return processor(list(pixels), **settings)["pixel_values"]


def read(source: str, what: str, load: Callable[..., Any], folder: str, **settings: Any) -> Any:
    """`load(folder)`, with an error of one line that names the `source`."""
    try:
        return load(folder, **settings)
    except Exception as error:  # configurations and weights of others raise almost anything
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"the teacher {source} needs code of its own, which is not run: give one that transformers has a "
                "class for, or timm:NAME"
            ) from error
        raise OSError(f"cannot load the {what} of the teacher {source} ({one_line(error)})") from error


# timm ----------------------------------------------------------------------------------------------------------------


def load_from_timm(source: str, num_channels: int, height_width: tuple[int, int]) -> Loaded:
    """A timm model with the preprocessing of its published weights; the student's size and channels do not matter."""
    try:
        import timm
    except ImportError as error:
        raise OSError(f"the teacher {source} needs timm: pip install timm") from error

    name, _, file = source.removeprefix(TIMM_PREFIX).partition("@")
    try:
        model: Any = timm_with_weights(name, file) if file else load_timm(name)[0]
    except Exception as error:  # unknown names, no network, weights that do not fit
        raise OSError(f"cannot load the teacher {source} ({one_line(error)})") from error
    preprocessing = preprocessing_of_timm(timm.data.resolve_model_data_config(model))
    return Loaded(model, preprocessing, model.pretrained_cfg.get("label_names"), model.num_classes)


def timm_with_weights(name: str, file: str) -> nn.Module:
    """A timm model with weights of its own, which say how many labels and channels it has."""
    import timm

    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file}")
    weights = timm.models.load_state_dict(file, weights_only=True)
    published: Any = timm.get_pretrained_cfg(name, allow_unregistered=False)
    sizes = {
        "num_classes": (first(published.classifier), 0),
        "in_chans": (first(published.first_conv), 1),
    }
    known = {
        setting: weights[f"{module}.weight"].shape[dimension]
        for setting, (module, dimension) in sizes.items()
        if f"{module}.weight" in weights
    }
    model = timm.create_model(name, pretrained=False, **known)
    model.load_state_dict(weights)
    return model


def first(names: str | tuple[str, ...] | None) -> str | None:
    """timm names one module or several."""
    return names[0] if isinstance(names, tuple | list) else names


def preprocessing_of_timm(settings: dict[str, Any]) -> Preprocessing:
    """From timm's data configuration."""
    num_channels, height, width = settings["input_size"]
    mean, std = list(settings["mean"]), list(settings["std"])

    def normalise(pixels: torch.Tensor) -> torch.Tensor:
        return transforms.normalize(transforms.to_dtype(pixels, torch.float32, scale=True), mean, std)

    return Preprocessing(num_channels, (height, width), interpolation_of(settings["interpolation"]), normalise)


# Pictures and words --------------------------------------------------------------------------------------------------


def with_channels(pixels: torch.Tensor, num_channels: int) -> torch.Tensor:
    """Grey [B, 1, H, W] to colour [B, 3, H, W], or colour to grey, where a teacher needs it.

    Raises:
        ValueError: for other numbers of channels that differ.
    """
    have = pixels.shape[1]
    if have == num_channels:
        return pixels
    if (have, num_channels) == (GREY, RGB):
        return pixels.expand(-1, RGB, -1, -1)
    if (have, num_channels) == (RGB, GREY):
        return transforms.rgb_to_grayscale(pixels)
    raise ValueError(f"the teacher takes pictures of {num_channels} channel(s) and the student's have {have}")


def interpolation_of(resample: Any) -> InterpolationMode:
    """PIL's number, or timm's name, of a filter as torchvision has it; Lanczos, which it lacks, becomes bicubic."""
    if resample is None or resample == "random":
        return InterpolationMode.BILINEAR
    mode = InterpolationMode(resample) if isinstance(resample, str) else pil_torch_interpolation_mapping[resample]
    return InterpolationMode.BICUBIC if mode is InterpolationMode.LANCZOS else mode


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def shortened(names: list[str]) -> str:
    """The first few names."""
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


class TeacherCache:
    """Asks a teacher about batches with `pixels`, `view` [B] and `index` [B].

    Each process keeps what it has seen. An answer is rounded to the type it is kept in before it is used for the first
    time, and a batch is always asked about as a whole, so that it makes no difference when it was asked.
    """

    def __init__(
        self, teacher: Teacher, num_pictures: int, num_views: int, num_labels: int, dtype: torch.dtype = torch.float16
    ) -> None:
        """Takes num_views * num_pictures * num_labels numbers of `dtype` of memory."""
        self.teacher = teacher
        self.logits = torch.empty(num_views, num_pictures, num_labels, dtype=dtype)
        self.is_known = torch.zeros(num_views, num_pictures, dtype=torch.bool)

    def ask(self, batch: dict[str, Any]) -> torch.Tensor:
        """The teacher's logits [B, labels] on a batch, `float32`, on the device of its pixels."""
        view, index = batch["view"].cpu(), batch["index"].cpu()
        unknown = ~self.is_known[view, index]  # [B]
        if unknown.any():
            answers = self.teacher.ask(batch).to("cpu", self.logits.dtype)
            self.logits[view[unknown], index[unknown]] = answers[unknown]
            self.is_known[view, index] = True
        return self.logits[view, index].to(batch["pixels"].device, torch.float32)


def check_teacher_views(num_views: int, augmentation: AugmentationOptions) -> None:
    """Raise ValueError where pictures are mixed: then no view of one recurs."""
    for flag in ("mixup", "cutmix"):
        if num_views and getattr(augmentation, flag):
            raise ValueError(f"--teacher-views keeps answers about single pictures: leave out --{flag}, or it")
