"""What a run can be asked for. Each field is a flag (`batch_size` is `--batch-size`) and a key of a recipe file.

Only the standard library is imported here, so that `--help` and a wrong flag answer at once.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class DataOptions:
    """The images."""

    dataset: str
    """`digits` (scikit-learn's), a folder with a sub-folder per class, a CSV or Parquet file, or a Hub data set."""
    image_column: str | None = None
    """Column of images or their paths. Default: found by its type or name."""
    label_column: str | None = None
    """Column of labels. Default: found by its type or name."""
    held_out_fraction: float = 0.2
    """Part of the images to hold out for evaluation where the data set has no split for it."""
    split_seed: int = 0
    """Chooses which images are held out. Keep it when comparing runs, or evaluating later."""
    num_workers: int = 2
    """Processes that prepare images, for each training process. 0: none besides it."""

    def __post_init__(self) -> None:
        require(self, "held_out_fraction", 0 < self.held_out_fraction < 1, "between 0 and 1")
        require(self, "num_workers", self.num_workers >= 0, "0 or more")


@dataclass(frozen=True)
class ModelOptions:
    """The model. Fields left at None keep the preset's or checkpoint's own value."""

    model: str
    """`vitcls-tiny`, `-small`, `-base` or `-large` (from scratch), a folder, or a Hub id of a vitcls model."""
    num_cls_tokens: int | None = None
    """Class tokens."""
    num_distillation_tokens: int | None = None
    """Distillation tokens."""
    num_register_tokens: int | None = None
    """Register tokens."""
    pooling: Literal["cls", "mean", "cls_mean", "max", "attention"] | None = None
    """What the classifier reads."""
    cls_pooling: Literal["first", "mean", "concat"] | None = None
    """How several class tokens become one vector."""
    head_type: Literal["linear", "mlp"] | None = None
    """The classifier."""
    image_size: int | tuple[int, int] | None = None
    """Pixels; two numbers are height and width."""
    patch_size: int | tuple[int, int] | None = None
    """Pixels; two numbers are height and width."""
    position_embedding_type: Literal["learned", "sincos_2d", "rope_2d", "none"] | None = None
    """How patches know their place."""
    hidden_size: int | None = None
    """Width of the tokens."""
    num_hidden_layers: int | None = None
    """Layers."""
    num_attention_heads: int | None = None
    """Attention heads."""
    intermediate_size: int | None = None
    """Width of the MLP."""
    drop_path_rate: float | None = None
    """Rate of dropped residual branches at the last layer."""
    initializer_range: float | None = None
    """Standard deviation of fresh weights. Narrow models learn faster with more than the usual 0.02."""

    def config_values(self) -> dict[str, Any]:
        """The fields of ViTCLSConfig that were set."""
        return {name: value for name, value in vars(self).items() if name != "model" and value is not None}


@dataclass(frozen=True)
class AugmentationOptions:
    """Random changes of training images."""

    crop_scale: float = 0.35
    """Smallest part of the area that a random crop keeps. 1: the whole image, resized."""
    flip: bool = True
    """Mirror half of the images left to right."""
    rotation: float = 0.0
    """Largest rotation, degrees."""
    shift: float = 0.0
    """Largest shift along each axis, as a part of the image."""
    zoom: float = 0.0
    """Largest change of size, as a part of it: 0.1 is from 0.9 to 1.1."""

    def __post_init__(self) -> None:
        require(self, "crop_scale", 0 < self.crop_scale <= 1, "above 0 and at most 1")
        require(self, "rotation", 0 <= self.rotation <= 180, "0 to 180")
        require(self, "shift", 0 <= self.shift < 1, "at least 0 and below 1")
        require(self, "zoom", 0 <= self.zoom < 1, "at least 0 and below 1")


@dataclass(frozen=True)
class TrainingOptions:
    """Optimisation."""

    epochs: float = 30.0
    """Times that each training image is seen."""
    max_steps: int | None = None
    """Optimiser steps, instead of --epochs."""
    batch_size: int = 64
    """Images per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimiser step."""
    learning_rate: float = 5e-4
    """The highest learning rate; it rises to it linearly and falls to 0 along a cosine."""
    warmup: float = 0.1
    """Part of the steps over which it rises."""
    weight_decay: float = 0.05
    """On the weights of linear layers and patches; never on biases, norms, tokens and positions."""
    label_smoothing: float = 0.1
    """Probability that is spread over all classes."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    seed: int = 0
    """Initial weights, order of the images, augmentation, drop path."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    evaluate_every: int = 1
    """Epochs between two evaluations on held-out images. There is always one at the end."""

    def __post_init__(self) -> None:
        require(self, "epochs", self.epochs > 0, "above 0")
        require(self, "max_steps", self.max_steps is None or self.max_steps >= 1, "1 or more")
        for name in ("batch_size", "gradient_accumulation_steps", "log_every", "evaluate_every"):
            require(self, name, getattr(self, name) >= 1, "1 or more")
        for name in ("learning_rate", "max_gradient_norm"):
            require(self, name, getattr(self, name) > 0, "above 0")
        for name in ("warmup", "label_smoothing"):
            require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        require(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        require(self, "seed", self.seed >= 0, "0 or more")


@dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tune a ViT on labelled images, evaluate it on held-out ones, and write model, card and results."""

    output_dir: Path
    """Folder to write; files of an earlier run in it are replaced."""
    data: DataOptions
    model: ModelOptions
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    config: Path | None = None
    """A recipe: a YAML file of flags. Flags on the command line override it."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a vitcls model on labelled images, each exactly once."""

    model: str
    """A folder, or the id of a vitcls model on the Hub."""
    data: DataOptions
    split: str = "test"
    """Split of the data set; for a data set of one split, `test` is the part that fine-tuning holds out."""
    batch_size: int = 64
    """Images per process and forward pass."""
    output: Path | None = None
    """JSON file for the results."""
    config: Path | None = None
    """A YAML file of flags. Flags on the command line override it."""

    def __post_init__(self) -> None:
        require(self, "batch_size", self.batch_size >= 1, "1 or more")


def require(options: Any, name: str, holds: bool, allowed: str) -> None:
    """Raise ValueError, naming the flag, unless its value is allowed."""
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}: set a value {allowed}")


def as_flags(options: Any) -> dict[str, Any]:
    """All flags of a run by name, in values that YAML and JSON know; `--config` is resolved in them."""
    flags: dict[str, Any] = {}
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if dataclasses.is_dataclass(value):
            flags |= as_flags(value)
        elif item.name != "config":
            flags[item.name] = plain(value)
    return flags


def plain(value: Any) -> Any:
    """Paths as text, tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
