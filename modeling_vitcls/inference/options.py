"""Flags of `vitcls evaluate` and `vitcls predict` (runtime/flags.py)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..data.options import DataOptions, check_stored_images
from ..hub.model_files import check_output_files
from ..runtime.flags import Options, check_minimum, check_value


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Options):
    """Flags of the forward pass that evaluation and prediction share."""

    resize: Literal["squash", "crop", "pad"] | None = None
    """How images of other aspect ratios become the input: resize the whole image (`squash`), crop
    the center (`crop`) or add gray (`pad`). Default: the setting of the image processor."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass. `auto`: the setting of `accelerate launch` or, without it,
    `bf16` on GPUs and CPUs with bf16 instructions (on CPUs, for models at least as wide as ViT-Ti),
    and otherwise `no`."""
    backend: str = "auto"
    """Engine: `torch`, or `onnx` or `openvino` for model.onnx or model.xml in the model's folder,
    which then requires no other weights, or a file that `vitcls export` wrote. `auto`: for labels on
    CPUs, model.xml or model.onnx in the folder if it was exported from this model; otherwise
    `torch`."""


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
    """Maximum number of images to evaluate, drawn at random (--split-seed)."""
    batch_size: int | None = None
    """Number of images per process and forward pass. Default: 64 on GPUs. On CPUs, larger batches
    are not faster and need more memory: as many images as have 1,600 tokens, for example 8 images
    of 224 pixels."""
    frozen: Literal["knn", "logreg"] | None = None
    """Evaluate the frozen encoder instead of the classifier of the model: fit `knn` or `logreg`
    (shrinkage LDA or logistic regression) to the features of the training images."""
    output: Path | None = None
    """JSON file for the metrics, including the metrics of each class and the confusion matrix."""
    task: str | None = None
    """Evaluate an added task (`vitcls add-task`) instead of the classifier of the model."""
    per_image: Path | None = None
    """Parquet file with one row per image: label, prediction, probabilities and loss."""
    config: Path | None = None
    """Recipe: a YAML file of flags. Flags on the command line override flags in the recipe."""

    def check(self) -> None:
        super().check()
        check_stored_images(self)
        check_minimum(self, 1, "batch_size", "max_images")
        check_output_files(self, "output", "per_image")
        if self.task is not None and (self.frozen or self.per_image):
            raise ValueError("`task` only measures a task. Remove `frozen`, `per_image`")
        if self.per_image and self.frozen:
            raise ValueError("`per_image` is about the classifier. Remove `per_image` or `frozen`")
        if self.backend not in ("auto", "torch") and self.frozen:
            raise ValueError("`frozen` requires `backend='torch'`. Remove `backend`")


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Model and image flags that prediction and inspection share. Labels are not required."""

    model: str
    """Folder or Hub id of a vitcls model (`ID@COMMIT` pins the model), or another ViT, which is
    converted once (`timm:NAME`, `transformers:ID`, a folder, a Hub id, a file)."""
    paths: tuple[str, ...] = ()
    """Image files or folders (including subfolders)."""
    dataset: str | None = None
    """`digits` (scikit-learn), a folder with a subfolder per class, a CSV, JSON Lines or Parquet
    file, a folder written by `save_to_disk`, or a dataset id on the Hub."""
    image_column: str | None = None
    """Column with images or image paths. By default, the column is detected by type or name."""
    batch_size: int | None = None
    """Maximum number of images per process and forward pass. To save memory, smaller batches are
    used if full attention maps are computed. Default: 32 on GPUs; on CPUs, as many images as have
    1,600 tokens, for example 8 images of 224 pixels."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions(ImageOptions, EngineOptions):
    """Predict the labels of images, or compute the features of images.

    The images are selected by PATHS, --list or --dataset, and distributed over all processes. The
    row of an unreadable image contains an error message.
    """

    list: Path | None = None
    """Text file with one image file or folder per line."""
    split: str | None = None
    """Dataset split with the images. Default: the only split."""
    output: Path | None = None
    """Output file (.csv, .json, .jsonl or .parquet), or a folder for the file of --shard. Default:
    print a table."""
    shard: str | None = None
    """`i/n`: compute the i-th of n parts of the images (numbered from 1), and write
    OUTPUT/part-i-of-n.parquet, for array jobs. A job whose file exists ends at once. The jobs do not
    communicate. Default for a folder: 1/1."""
    top_k: int | None = None
    """Maximum number of predicted labels per image. Default: 1 or, for multi-label models, all
    labels with a probability of at least --threshold."""
    threshold: float = 0.5
    """Minimum probability of a predicted label (multi-label models only)."""
    features: tuple[str, ...] | None = None
    """Features to write instead of labels: `cls`, `registers`, `distillation` or `patches`, or
    `mean` for the mean of the patch tokens. `cls@6` is the output of layer 6 after the final norm;
    the default is the last layer. Each of several features has a column."""
    feature_dtype: Literal["float32", "float16"] = "float32"
    """Data type of the features."""
    num_workers: int | None = None
    """Number of image loading threads per process. Default: the number of CPU cores, but at most
    8."""

    def check(self) -> None:
        super().check()
        check_minimum(self, 1, "batch_size", "top_k", "num_workers")
        check_value(self, "threshold", 0 <= self.threshold <= 1, "from 0 to 1")
        if sum(map(bool, (self.paths, self.list, self.dataset))) != 1:
            raise ValueError(
                "Set exactly one of `images`, `list` and `dataset` to select the images."
            )
        if self.dataset is None and (self.split or self.image_column):
            raise ValueError("`split` and `image_column` require `dataset`. Set `dataset`.")
        for name in self.features or ():
            is_feature = bool(
                re.fullmatch(r"(cls|registers|distillation|patches|mean)(@[1-9]\d*)?", name)
            )
            requirement = (
                "cls, registers, distillation, patches or mean, and optionally a layer such as "
                "cls@6"
            )
            check_value(self, "features", is_feature, requirement)
        match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.shard or "1/1")
        is_part = match is not None and int(match[1]) <= int(match[2])
        check_value(self, "shard", is_part, "i/n with i from 1 to n, such as 3/16")
        suffix = "" if self.output is None or self.output.is_dir() else self.output.suffix.lower()
        if suffix not in ("", ".csv", ".json", ".jsonl", ".parquet"):
            raise ValueError(
                f"`output={str(self.output)!r}`: set a .csv, .json, .jsonl or .parquet file, or a "
                "folder without a suffix"
            )
        if suffix:
            check_output_files(self, "output")
        elif self.output is not None and self.output.exists() and not self.output.is_dir():
            raise ValueError(
                f"`output={str(self.output)!r}` exists and is not a folder. Set a folder, or a file "
                "with a suffix such as .csv"
            )
        if self.shard is not None and (self.output is None or suffix):
            raise ValueError(
                "`shard` requires a folder of Parquet files. Set `output` to a folder."
            )
        if self.features and (self.output is None or suffix == ".csv"):
            output_text = "a printed table" if self.output is None else "a CSV file"
            raise ValueError(
                f"`features={self.features}` cannot be written to {output_text}. Set `output` to a "
                "folder, or to a .parquet, .json or .jsonl file."
            )
