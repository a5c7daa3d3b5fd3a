"""Flags of the dataset, of the held-out split and of the augmentation (runtime/flags.py)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..runtime.flags import Options, check_each, check_minimum, get_flag_fields


# A shift or zoom of 1 would leave nothing of an image.
LARGEST_AUGMENT = {"rotation": 180, "shift": 0.9, "zoom": 0.9, "random_erasing": 1, "cutmix": 10}


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Dataset and held-out split."""

    dataset: str
    """`digits` (scikit-learn), a folder with a subfolder per class, a CSV, JSON Lines or Parquet
    file, a folder written by `save_to_disk`, or a dataset id on the Hub. Several have labels of one
    kind: `--dataset photos collection` sets --more-data to those after the first one."""
    more_data: tuple[str, ...] = ()
    """More datasets. Labels are matched by name, and copies of a photo count once. If --answers is set, and no
    subfolder of an image folder has the name of a class, only its answered photos are used."""
    answers: tuple[str, ...] = ()
    """Files with the labels that a person gave on pages of photos (labels.html of a run). They replace
    the labels of the dataset, and belong to the content of a photo, whatever its name is."""
    image_column: str | None = None
    """Column with images or image paths. By default, the column is detected by type or name."""
    label_column: tuple[str, ...] | None = None
    """Column with the labels; several columns define several tasks. By default, the column is
    detected by type or name."""
    label_separator: str | None = None
    """Separator of several labels in one text (`cat|dog`). By default, it is `|`, `;` or `,` if the
    parts between them repeat more often than whole texts. none: each text is one label."""
    label_names: tuple[str, ...] | None = None
    """Names of all labels. By default, they are declared by the dataset or collected from the label
    column."""
    split_column: str | None = None
    """Column of a table with the split of each row: train, validation or test. By default, a column
    `split` is used."""
    group_column: str | None = None
    """Column of a table with groups, such as patients: all images of a group are on one side of
    every split. In image folders, the folders below a class are groups; none: they are not."""
    num_workers: int = 2
    """Number of processes that load training images, per training process, and of threads that
    load other images. 0: images are loaded when they are needed."""

    def check(self) -> None:
        super().check()
        check_minimum(self, 0, "num_workers")


@dataclass(frozen=True, kw_only=True)
class DivisionOptions(DataOptions):
    """Dataset, and the part of it that is held out."""

    held_out_fraction: float | None = None
    """Fraction of the images that a run holds out for evaluation if the dataset has no evaluation split.
    Default: 0 without training steps, because cross-validation measures the model; otherwise 0.1
    from 2,000 images on, 0.2 for fewer, and 0 for fewer than 5 per class. Which images of a
    class are held out depends on their content, not on names or order. 0: train on all images, without
    evaluation."""

    def check(self) -> None:
        super().check()
        check_each(self, lambda part: 0 <= part < 1, "at least 0 and below 1", "held_out_fraction")


def read_data_options(flags: Mapping[str, Any]) -> DataOptions:
    """Read the options of the dataset among the flags of a command."""
    names = get_flag_fields(DataOptions)
    return DataOptions(**{name: flags[name] for name in names if name in flags})


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions(Options):
    """Random augmentation of training images."""

    crop_scale: float | None = None
    """Minimum area of a random crop, as a fraction of the image area. 1: resize the whole image.
    Default: 0.35, or 1 for images of at most 64 pixels per side."""
    flip: bool = True
    """Flip each image horizontally with a probability of 0.5."""
    auto_augment: Literal["none", "rand", "trivial"] = "none"
    """Automatic augmentation of torchvision: RandAugment (Cubuk et al. 2020; magnitude 9 of 30, two
    operations for each image, unlike timm's `rand-m9`) or TrivialAugment (Müller and Hutter 2021)."""
    augment: dict[str, Any] | None = None
    """`rotation=10 shift=0.1 zoom=0.1 random_erasing=0.5 cutmix=1`, or some of them: the maximum
    rotation in degrees, translation (as a fraction of the image size) and relative change of scale,
    the probability of replacing a random rectangle with noise (Zhong et al. 2020), and the alpha of
    CutMix (Yun et al. 2019). Default: 0, but `shift=0.04` for images of at most 64 pixels per
    side."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018). 0: off. With --augment cutmix=1 as well, each batch uses
    either mixup or CutMix."""

    def check(self) -> None:
        super().check()
        check_each(self, lambda scale: 0 < scale <= 1, "above 0 and at most 1", "crop_scale")
        for name, value in (self.augment or {}).items():
            largest = LARGEST_AUGMENT.get(name, -1)
            if not isinstance(value, int | float) or not 0 <= value <= largest:
                raise ValueError(
                    f"`augment` has {name}={value}, but it takes values from 0 to {LARGEST_AUGMENT}"
                )
        check_minimum(self, 0, "mixup")
