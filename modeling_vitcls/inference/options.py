"""Flags of `vitcls evaluate` and `vitcls predict` (runtime/flags.py)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from ..data.options import DataOptions
from ..hub.model_files import check_output_files
from ..runtime.flags import Options, check_each, check_minimum, check_suffix, check_value


# Written without a flag
Paths = Annotated[tuple[str, ...], Positional, arg(metavar="PATHS")]


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Options):
    """Flags of the forward pass that evaluation and prediction share."""

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass. `auto`: the setting of `accelerate launch` or, without it,
    `bf16` on GPUs and CPUs with bf16 instructions (on CPUs, for models at least as wide as ViT-Ti),
    and otherwise `no`."""
    threshold: float | None = None
    """Minimum probability of a predicted label, for models with several labels per image. Default:
    0.5."""

    def check(self) -> None:
        super().check()
        check_each(self, lambda value: 0 <= value <= 1, "from 0 to 1", "threshold")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(EngineOptions, DataOptions):
    """Evaluate a vitcls model on labeled images. Each image is counted exactly once."""

    model: str
    """Folder or Hub id of a vitcls model (`ID@COMMIT` pins the model), or another ViT, which is
    converted once (`timm:NAME`, `transformers:ID`, a folder, a Hub id, a file)."""
    split: str | None = None
    """Dataset split, of which all images are evaluated. Default: `test` or, if there is none,
    `validation` or the only split, without the images that the model was trained on."""
    max_images: int | None = None
    """Maximum number of images to evaluate, drawn at random."""
    batch_size: int | None = None
    """Number of images per process and forward pass. Default: 64 on GPUs. On CPUs, larger batches
    are not faster and need more memory: as many images as have 1,600 tokens, for example 8 images
    of 224 pixels."""
    output: Path | None = None
    """JSON file for the metrics, including the metrics of each class and the confusion matrix (of up to
    200 classes)."""
    resize: Literal["squash", "crop", "pad"] | None = None
    """How images of other aspect ratios become the input: resize the whole image (`squash`), crop
    the center (`crop`) or add gray (`pad`). Default: the setting of the image processor."""
    task: str | None = None
    """Evaluate an added task (`vitcls add-task`) instead of the classifier of the model."""
    per_image: Path | None = None
    """Parquet file with one row per image: label, prediction, probabilities and loss. Not of several
    tasks."""
    config: Path | None = None
    """Recipe: a YAML file of flags. Flags on the command line override flags in the recipe."""

    def check(self) -> None:
        super().check()
        check_minimum(self, 1, "batch_size", "max_images")
        check_suffix(self, "output", ".json")
        check_suffix(self, "per_image", ".parquet")
        check_output_files(output=self.output, per_image=self.per_image)
        if self.task is not None and self.per_image:
            raise ValueError("`task` only measures an added task. Remove `per_image`")


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Model and image flags that prediction and inspection share. Labels are not required."""

    model: str
    """Folder or Hub id of a vitcls model (`ID@COMMIT` pins the model), or another ViT, which is
    converted once (`timm:NAME`, `transformers:ID`, a folder, a Hub id, a file)."""
    paths: Paths = ()
    """Image files or folders (including subfolders)."""
    dataset: str | None = None
    """`digits` (scikit-learn), a folder with a subfolder per class, a CSV, JSON Lines or Parquet
    file, a folder written by `save_to_disk`, or a dataset id on the Hub."""
    image_column: str | None = None
    """Column with images or image paths. By default, the column is detected by type or name."""
    batch_size: int | None = None
    """Number of images per process and forward pass. Default: 32 on GPUs; on CPUs, as many images as
    have 1,600 tokens, for example 8 images of 224 pixels."""

    def check(self) -> None:
        super().check()
        check_minimum(self, 1, "batch_size")
        for name in ("split", "image_column", "label_column", "label_separator"):
            if self.dataset is None and getattr(self, name, None):
                raise ValueError(f"`{name}` requires `dataset`. Set `dataset`")

    def check_images(self) -> None:
        """Raise ValueError unless exactly one of the two selects the images."""
        if bool(self.paths) == bool(self.dataset):
            raise ValueError(
                "set either `images`, which are paths on a command line, or `dataset`. A path after a flag of several "
                "values belongs to the flag, so write paths first"
            )


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ImageOptions, EngineOptions):
    """Predict the labels of images, or compute the features of images.

    The images are selected by PATHS or --dataset, and distributed over all processes. The row of an
    unreadable image contains an error message.
    """

    split: str | None = None
    """Dataset split with the images. Default: the only split."""
    output: Path | None = None
    """Output file (.csv, .json, .jsonl or .parquet). CLS and the mean of the patches of the last four
    layers are kept: if the command is interrupted, or images are new, it computes only what is missing.
    Default: print a table."""
    overwrite: bool = False
    """Replace a file in --output that is not as this command has written it, and keep it beside."""
    top_k: int | None = None
    """Maximum number of predicted labels per image. Default: 1 or, for multi-label models, all
    labels with a probability of at least --threshold."""
    features: tuple[str, ...] | None = None
    """Features to write instead of labels: `cls`, `registers`, `distillation` or `patches`, or
    `mean` for the mean of the patch tokens. `cls@6` is the output of layer 6; the default is the
    last layer. All are after the final norm of the model, also those of other layers. Each of
    several features has a column."""
    feature_dtype: Literal["float32", "float16"] = "float32"
    """Data type of the features."""
    delimiter: Literal[",", ";"] = ","
    """Delimiter of a .csv file in --output. With `;`, numbers have decimal commas, as spreadsheets
    in German, French and other languages read them."""
    max_megapixels: int | None = None
    """Largest image that is read, in megapixels. Default: 179, the limit of Pillow, because a small file
    can take all memory. An A3 scan at 1,200 dpi has 278; reading 195 took 3 GB."""
    strict: bool = False
    """End with exit status 1 if any image has no prediction. The output is written all the same."""
    review: Path | None = None
    """HTML page for a person, who clicks what photos show: those that the model is least sure about, that
    look unknown, or that are drawn at random, without those with an answer. It needs no server."""
    review_count: int = 100
    """Number of photos on the page of --review. A quarter of them is drawn at random."""
    answers: tuple[str, ...] = ()
    """Files with the labels that a person gave on such pages: these photos have them, with `person` in the
    column `source`, and are not asked about again."""
    num_workers: int | None = None
    """Number of image loading threads per process. With 0, an image is read when it is needed.
    Default: the number of CPU cores, but at most 8."""

    def check(self) -> None:
        super().check()
        check_minimum(self, 1, "top_k", "max_megapixels")
        check_minimum(self, 0, "num_workers")
        check_value(self, "features", self.features != (), "one name or more")
        check_suffix(self, "output", ".csv", ".json", ".jsonl", ".parquet")
        check_suffix(self, "review", ".html")
        check_output_files(output=self.output, review=self.review)

    def check_files(self) -> None:
        self.check_images()
        if self.features and (self.output is None or self.output.suffix.lower() == ".csv"):
            raise ValueError(
                f"`features={self.features}` cannot be printed or written to a CSV file. Set "
                "`output` to a .parquet, .json or .jsonl file"
            )
