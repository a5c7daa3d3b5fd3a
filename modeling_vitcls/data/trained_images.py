"""Which images trained a model, for predictions, which measure nothing on them.

The list is splits.parquet (splits_table.py). Without it, nothing here imports pandas: a photo is
predicted without libraries of tables.
"""

from pathlib import Path
from typing import Any

from ..hub.model_files import SPLITS_FILE
from ..hub.model_folder import ModelFolder
from .images import compute_content_key, open_encoded_image, to_encoded_image


def read_trained_keys(folder: ModelFolder) -> frozenset[int]:
    """Read the keys of the images that trained a model; none if its folder does not list them."""
    if not (folder.path / SPLITS_FILE).is_file():
        return frozenset()

    from .splits_table import list_trained_keys, read_splits  # imports pandas

    return frozenset(list_trained_keys(read_splits(folder)).tolist())


def compute_image_key(image: Any) -> int | None:
    """Compute the key of the content of a path or an encoded image; others have none."""
    if not isinstance(image, str | bytes | Path):
        return None
    content = image if isinstance(image, bytes) else str(image)
    return compute_content_key(open_encoded_image(to_encoded_image(content, Path())))


def is_trained_image(image: Any, trained_keys: frozenset[int]) -> bool:
    """Recognize an image that trained a model: a path or an encoded image."""
    return bool(trained_keys) and compute_image_key(image) in trained_keys
