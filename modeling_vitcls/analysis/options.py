"""Flags of `vitcls inspect` and `vitcls look` (runtime/flags.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..hub.model_files import check_output_files
from ..inference.options import ImageOptions, Paths
from ..runtime.flags import Options, check_each, check_minimum, check_suffix


PAGE_SUFFIXES = (".html", ".htm")


@dataclass(frozen=True, kw_only=True)
class InspectOptions(ImageOptions):
    """Show what the special tokens of a vitcls model do: write an HTML report and print a summary.

    The images are photographs (PATHS), or those of --dataset, whose labels say which predictions are
    wrong.
    """

    split: str | None = None
    """Dataset split to inspect. Default: `test` or, if there is none, `validation` or the only
    split, without the images that the model was trained on."""
    label_column: tuple[str, ...] | None = None
    """Column with the labels; several columns define several tasks. By default, the column is
    detected by type or name."""
    label_separator: str | None = None
    """Separator of the labels in a text column with several labels per image (`cat|dog`)."""
    output: Path = Path("report.html")
    """HTML file for the report; or a .csv or .parquet file for its numbers."""
    layers: tuple[int, int] | None = None
    """First and last layer, from 1, in which tokens are hidden and replaced. Default: all."""
    num_images: int = 8
    """Number of images in the report: wrong predictions, the least confident ones and typical images
    in turn."""
    max_images: int = 128
    """Maximum number of images for the statistics, drawn at random and stored in memory. Each token
    takes two passes over them."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Precision of the forward pass. `auto`: `bf16` on GPUs and CPUs with bf16 instructions (on
    CPUs, for models at least as wide as ViT-Ti), and otherwise `no`."""

    def check(self) -> None:
        super().check()
        check_minimum(self, 1, "num_images", "max_images")
        self.check_images()
        check_output_files(output=self.output)
        check_suffix(self, "output", *PAGE_SUFFIXES, ".csv", ".parquet")


@dataclass(frozen=True, kw_only=True)
class LookOptions(Options):
    """Show one sheet per photo: attention by head and layer, and features and norms of the patches.

    The photos are image files or folders.
    """

    model: str
    """Folder or Hub id of a vitcls model (`ID@COMMIT` pins the model), or another ViT, which is
    converted once (`timm:NAME`, `transformers:ID`, a folder, a Hub id, a file)."""
    paths: Paths = ()
    """Image files or folders (including subfolders)."""
    output: Path | None = None
    """HTML or image file for the sheet, or a folder for HTML files. For several photos, the name of each
    photo is appended to the file name. The command writes `look.html` by default."""
    image_size: int | tuple[int, int] | None = None
    """Image height and width in pixels; one number sets both. Default: the size of the image
    processor. Larger images have finer maps of attention and features."""
    resize: Literal["squash", "crop", "pad"] | None = None
    """How photos of other aspect ratios become the input: resize the whole photo (`squash`), crop
    the center (`crop`) or add gray (`pad`). Default: the setting of the image processor."""

    def check(self) -> None:
        super().check()
        check_minimum(self, 1, "image_size")
        suffixes = ("", ".html", ".png", ".jpg", ".jpeg", ".webp")
        requirement = "a .html, .png, .jpg or .webp file, or a folder without a suffix"
        check_each(self, lambda file: file.suffix.lower() in suffixes, requirement, "output")

    def check_files(self) -> None:
        if not self.paths:
            raise ValueError("Name at least one photo or folder: `vitcls look photo.jpg --model M`")
