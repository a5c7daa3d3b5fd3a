"""Flags of `vitcls export` (runtime/flags.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..runtime.flags import Options, check_minimum


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Export a model to ONNX, which OpenVINO reads, too.

    Nothing is written if the outputs of the graph and the model differ by more than the limit.
    """

    model: str
    """A model folder, the id of a model on the Hub, any checkpoint that `vitcls convert` takes, or a
    preset (random weights)."""
    output: Path
    """Output file (.onnx), which must not exist yet, or a folder for `model.onnx`, and
    for the configuration and the image processor unless they are there. A push of a model folder
    also publishes the files in it that were exported from its weights."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels. With --no-dynamic, the graph accepts only this size; otherwise,
    the size is used only in the comparison. Default: the image size of the model."""
    dynamic: bool = True
    """Accept images of different sizes, not only of --image-size, unless the model has one size (a line says
    so). The batch size is always dynamic."""
    dtype: Literal["float32", "float16"] = "float32"
    """dtype of the weights and computations. Inputs and outputs are always float32."""

    def check(self) -> None:
        super().check()
        check_minimum(self, 1, "image_size")
