"""Flags of `vitcls export` (runtime/flags.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..runtime.flags import Options


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Export a model.

    Nothing is written if the outputs of the graph and the model differ by more than the limit.
    """

    model: str
    """A model folder, the id of a model on the Hub, or a preset (random weights)."""
    format: Literal["onnx", "openvino"]
    """ONNX (.onnx), or OpenVINO (.xml and .bin)."""
    output: Path
    """Output file, which must not exist yet, or a folder: model.onnx (or model.xml) and all files
    that `predict --backend` requires."""
    int8: bool = False
    """Quantize the matrix products to int8 (NNCF), calibrated on training images of --dataset. The
    image size is fixed."""
    max_drop: float = 0.5
    """With --int8: largest loss of accuracy, in points. If the images show a larger loss with 95%
    confidence, nothing is written."""
    exclude_layers: tuple[int, ...] = ()
    """With --int8: numbers of the layers, from 1, that stay in float32."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels. With --no-dynamic, the graph accepts only this size; otherwise,
    the size is used only in the comparison. Default: the image size of the model."""
    dynamic: bool = True
    """Accept images of different sizes, not only of --image-size. The batch size is always dynamic."""
    dtype: Literal["float32", "float16"] = "float32"
    """dtype of the weights and computations. Inputs and outputs are always float32."""
    dataset: str | None = None
    """Images, as in `vitcls evaluate`, to measure the accuracy of the file. For images without
    labels, the outputs of file and model are compared."""
    split: str | None = None
    """Split of --dataset, as in `vitcls evaluate`."""

    def check(self) -> None:
        super().check()
        size = self.image_size
        has_dataset = self.dataset is not None
        checks = (
            (
                size is not None and min(size) < 1,
                f"`image_size` requires positive numbers, but got {size}. Set `image_size` to a "
                "height and a width",
            ),
            (self.int8 and not has_dataset, "`int8=True` requires `dataset`"),
            (
                self.int8 and (not self.dynamic or self.dtype != "float32"),
                "`int8=True` does not support `dtype` or `dynamic=False`. Remove the flag",
            ),
            (self.exclude_layers and not self.int8, "`exclude_layers` requires `int8=True`"),
            (self.split is not None and not has_dataset, "`split` requires `dataset`"),
        )
        for is_wrong, message in checks:
            if is_wrong:
                raise ValueError(message)
