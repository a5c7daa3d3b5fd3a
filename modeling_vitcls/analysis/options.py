"""What scripts/inspect_tokens.py can be asked for. Each field is a flag, as in training/options.py.

Only the standard library is imported here, so that `--help` and a wrong flag answer at once.
"""

from dataclasses import dataclass
from pathlib import Path

from ..training.options import require


@dataclass(frozen=True)
class InspectOptions:
    """See what the special tokens of a vitcls model do: writes a page, and prints what it comes to.

    The images are those at PATHS or those of --dataset. Where the folders at PATHS are named like the model's classes,
    they are the labels.
    """

    model: str
    """A folder, or the id of a vitcls model on the Hub."""
    paths: tuple[str, ...] = ()
    """Image files, folders (with all folders in them), or URLs."""
    dataset: str | None = None
    """`digits` (scikit-learn's), a folder with a sub-folder per class, a CSV or Parquet file, a folder of MNIST's idx
    files, or a Hub data set."""
    split: str | None = None
    """Split of the data set; for a data set of one split, `test` is the part that fine-tuning holds out. Default: what
    the model's run held out, or `test`."""
    image_column: str | None = None
    """Column of images or their paths. Default: found by its type or name."""
    label_column: tuple[str, ...] | None = None
    """Column of labels; several columns are several tasks. Default: found by its type or name."""
    label_separator: str | None = None
    """What stands between the labels of one image, where a text column holds several (`cat|dog`)."""
    revision: str | None = None
    """Commit, branch or tag of a model on the Hub. Default: the newest."""
    output: Path = Path("report.html")
    """The page to write."""
    json: Path | None = None
    """A file for the figures themselves, for programs."""
    num_images: int = 8
    """Images that the page shows, spread evenly over all."""
    max_images: int = 256
    """Images for the statistics, spread evenly over all; they are kept in memory."""
    batch_size: int = 32
    """Images per forward pass at most; fewer where whole attention maps would need much memory."""
    patch_sizes: tuple[int, ...] = ()
    """Patch sizes to compare, such as 8 16 32: sequence length, cost and, with labels, accuracy."""

    def __post_init__(self) -> None:
        for name in ("num_images", "max_images", "batch_size"):
            require(self, name, getattr(self, name) >= 1, "1 or more")
        require(self, "patch_sizes", all(size >= 1 for size in self.patch_sizes), "of 1 or more pixels each")
        if bool(self.paths) == (self.dataset is not None):
            raise ValueError("give images as PATHS or with --dataset, in one of these ways")
        if self.dataset is None and (self.image_column or self.label_column or self.label_separator):
            raise ValueError(
                "--image-column, --label-column and --label-separator are about a data set: name it with --dataset"
            )
        if self.output.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--output {self.output}: name a .html file")
        if self.json is not None and self.json.suffix.lower() != ".json":
            raise ValueError(f"--json {self.json}: name a .json file")
