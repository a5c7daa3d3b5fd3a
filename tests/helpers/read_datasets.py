"""Training data and splits of a dataset, as a run reads them."""

from typing import Any

from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.sources import Splits, load_splits
from modeling_vitcls.data.splits import TrainingData, load_training_data


def read_training_data(dataset: object, **options: Any) -> TrainingData:
    """Read a dataset, and hold images out."""
    return load_training_data(DataOptions(dataset=str(dataset), **options))


def read_splits_of(dataset: object, **options: Any) -> Splits:
    """Read the labels of a dataset by split, and hold nothing out."""
    return load_splits(DataOptions(dataset=str(dataset), **options))
