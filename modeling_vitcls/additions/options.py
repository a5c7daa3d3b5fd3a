"""Flags of `add-task`, `add-class` and `verify-unchanged`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..data.options import DataOptions, DivisionOptions
from ..runtime.flags import Options, check_minimum


@dataclass(frozen=True, kw_only=True)
class AdditionOptions(DataOptions):
    """Flags that `add-task` and `add-class` share."""

    model: str
    """A vitcls model: a folder or a Hub id."""
    output_dir: Path
    """Output folder, which must be empty or must not exist."""
    batch_size: int = 64
    """Number of images per forward pass."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass, as in `vitcls evaluate`."""

    def check(self) -> None:
        super().check()
        check_minimum(self, 1, "batch_size")


@dataclass(frozen=True, kw_only=True)
class AddTaskOptions(AdditionOptions, DivisionOptions):
    """Add a task to a finished model, whose other outputs stay equal to the bit.

    The task is a classifier that reads the features of the model.
    """

    name: str
    """Name of the task, of letters, digits and underscores: the key of `outputs.task_logits`."""
    max_images: int | None = None
    """Maximum number of training images, drawn at random before any are held out. Default: all."""

    def check(self) -> None:
        super().check()
        check_minimum(self, 1, "max_images")
        if not self.name.isidentifier():
            raise ValueError(
                f"`name={self.name!r}` must consist of letters, digits and underscores"
            )


class AddClassOptions(AdditionOptions):
    """Add classes to a finished classifier, which has class statistics, as `vitcls finetune` writes it.

    The logits of the old classes stay equal to the bit.
    """


@dataclass(frozen=True, kw_only=True)
class VerifyUnchangedOptions(Options):
    """Compare two models: weights and outputs, to the bit. The exit status is 1 if they differ."""

    old: Annotated[str, Positional, arg(metavar="OLD")]
    """The vitcls model before the change: a folder or a Hub id (`ID@COMMIT` pins the model)."""
    new: Annotated[str, Positional, arg(metavar="NEW")]
    """The model after the change."""
    dataset: str | None = None
    """Images to compare the outputs with. Default: random pixels."""
    split: str | None = None
    """Split of --dataset, as in `vitcls evaluate`."""
