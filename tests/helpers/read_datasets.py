"""Training data and splits of a dataset, as a run reads them."""

from typing import Any

from modeling_vitcls.data.dataset import Dataset, read_dataset
from modeling_vitcls.data.options import DataOptions, DivisionOptions
from modeling_vitcls.data.splits import (
    TrainingData,
    check_can_divide,
    divide_images,
    load_undivided_images,
)


def read_undivided(dataset: object, **options: Any) -> Dataset:
    """Read the images of a dataset as a run does, and hold nothing out."""
    return load_undivided_images(DataOptions(dataset=str(dataset), **options))


def read_training_data(dataset: object, **flags: Any) -> TrainingData:
    """Read a dataset, and divide its images as a run with steps does."""
    options = DivisionOptions(dataset=str(dataset), **flags)
    images = load_undivided_images(options)
    fraction = 0.2 if options.held_out_fraction is None else options.held_out_fraction
    check_can_divide(images, fraction)
    return divide_images(images, fraction)


def read_splits_of(dataset: object, **options: Any) -> Dataset:
    """Read the labels of a dataset by split, without its groups."""
    return read_dataset(DataOptions(dataset=str(dataset), **options)).drop_unlabeled()
