"""splits.parquet: the images that a run trained on and held out.

It is a file of every run, and is published with the model. Each row is an image:

    key      a checksum of its content (images.py); there are no names
    split    train, validation (calibrates), test (held out), or encoder (trained the
             encoder in the steps of an earlier run, or a classifier that this run kept)
    task     the added task that saw it; "" is the model itself

This table says whether an image was trained on, so a dataset may be renamed, moved, extended or
divided after training.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from ..hub.model_files import RECIPE_FILE, SPLITS_FILE
from ..hub.model_folder import ModelFolder
from ..runtime.errors import explain_damage, warn_on_first_process
from ..runtime.files import check_parquet_size, write_atomically
from .images import LabeledImages


EMPTY_TABLE = pd.DataFrame(
    {"key": np.zeros(0, np.uint64), "split": np.zeros(0, str), "task": np.zeros(0, str)}
)


def get_keys(images: LabeledImages) -> np.ndarray:
    """Look up the keys of images, or compute them from the content if they are not known."""
    return images.images.compute_content_keys() if images.keys is None else images.keys


def build_splits_table(parts: Mapping[str, LabeledImages | None], task: str = "") -> pd.DataFrame:
    """Build the rows of splits.parquet about images by split, of which there may be none."""
    tables = [
        pd.DataFrame({"key": get_keys(part), "split": split, "task": task})
        for split, part in parts.items()
        if part
    ]
    return pd.concat(tables) if tables else EMPTY_TABLE


def write_splits(table: pd.DataFrame, folder: Path) -> None:
    """Write splits.parquet to a model folder. Each image is listed once for each split and task."""
    # Sorted, so the same images give the same file.
    rows = table.drop_duplicates().sort_values(["task", "split", "key"])
    with write_atomically(folder / SPLITS_FILE) as temporary_file:
        rows.to_parquet(temporary_file, index=False)


def read_splits(folder: ModelFolder) -> pd.DataFrame:
    """Read which images a model was trained on; an empty table if its folder does not say.

    Raise ValueError if the file is damaged, or its keys are no checksums.
    """
    file = folder.path / SPLITS_FILE
    if not file.is_file():
        if (folder.path / RECIPE_FILE).is_file():
            warn_on_first_process(
                f"{SPLITS_FILE} of {folder.source} is missing, so images that the model was trained "
                "on are not recognized"
            )
        return EMPTY_TABLE
    with explain_damage(file, "Remove it to use the model without the list of its training images"):
        check_parquet_size(file)
        table = pd.read_parquet(file, columns=list(EMPTY_TABLE))
        # No image would have other keys, such as text
        if table["key"].dtype != np.uint64:
            raise ValueError("the column key has no unsigned integers of 64 bits")
        return table


def list_encoder_rows(folder: ModelFolder | None, keeps_classifier: bool = False) -> pd.DataFrame:
    """List the images that trained an encoder with their labels, in its run or an earlier one.

    The features depend on these labels, so any accuracy on these images is too high. A frozen run
    trains no encoder. With `keeps_classifier`, the images that trained the classifier are listed, too.
    """
    if folder is None:
        return EMPTY_TABLE
    splits = select_task(read_splits(folder), None)
    is_trained = keeps_classifier or (
        folder.results.get("steps") and folder.results.get("steps_train_encoder", True)
    )
    is_seen = splits["split"] != "test" if is_trained else splits["split"] == "encoder"
    return splits[is_seen].assign(split="encoder")


def select_task(splits: pd.DataFrame, task: str | None) -> pd.DataFrame:
    """Select the rows about an added task, or about the model itself (None)."""
    # Other programs write an empty text as a missing value
    return splits[splits["task"].fillna("") == (task or "")]


def find_trained_images(images: LabeledImages, splits: pd.DataFrame) -> np.ndarray:
    """Recognize the images [N] that trained a model, under any name."""
    if not len(splits):
        return np.zeros(len(images), bool)
    return np.isin(get_keys(images), list_trained_keys(splits))


def list_trained_keys(splits: pd.DataFrame) -> pd.Series:
    """List the keys of the images that trained a model."""
    # Images that selected the checkpoint count, too: the model was chosen because it is right on
    # them.
    return splits["key"][splits["split"] != "test"]
