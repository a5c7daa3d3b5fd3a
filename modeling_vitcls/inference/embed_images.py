"""`EmbedImages`: features of batches of images, for Ray Data, Spark and `datasets.map`.

embed = EmbedImages("runs/mine", features=["cls", "mean"])
ray_dataset.map_batches(embed_class, fn_constructor_args=["runs/mine"])       # see scripts/ray_features.py
spark_frame.mapInPandas(embed_frames, schema)                                 # see docs/predicting.md
dataset.with_format("numpy").map(embed, batched=True, batch_size=256)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..conversion.open_model import compute_cache_name
from ..hub.loading import pin_revision
from ..model.image_processing_vitcls import SOURCE_TYPES
from ..runtime.flags import expand_home
from .inputs import build_record
from .options import PredictOptions
from .predict import LoadedPredictor, load_predictor


IMAGE_COLUMNS = ("image", "bytes", "path")  # Column names of images in Ray, Spark and `datasets`


class EmbedImages:
    """Picklable function that adds features to a batch of images.

    The model is loaded on the first call, and again after a local model has changed.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        features: features as in `vitcls predict --features`, such as `["cls", "mean@6"]`.
        image_column: column with paths, encoded bytes, `{"bytes", "path"}`, arrays or PIL images.
            Default: `image`, `bytes` or `path`.
        dtype: "float32" or "float16".
        batch_size: maximum number of images per forward pass. Default: as in `vitcls predict`.

    Examples:
        >>> from datasets import load_dataset
        >>> from modeling_vitcls import EmbedImages
        >>> photos = load_dataset("imagefolder", data_dir="photos", split="train")
        >>> photos = photos.map(EmbedImages("runs/photos", ["cls"]), batched=True, batch_size=8)
        >>> len(photos[0]["cls"])
        32
    """

    def __init__(
        self,
        model: str | Path,
        features: Sequence[str] = ("cls",),
        image_column: str | None = None,
        dtype: Literal["float32", "float16"] = "float32",
        batch_size: int | None = None,
    ) -> None:
        # All workers, and the cache of `datasets`, then have the same commit of a model on the Hub.
        source = pin_revision(str(expand_home(model)))
        self.features = tuple(features)
        self.options = PredictOptions(
            model=source, features=self.features, feature_dtype=dtype, batch_size=batch_size
        )
        self.image_column = image_column
        self.predictor: LoadedPredictor | None = None
        self.files = ""  # What a local model was when it was loaded

    def __getstate__(self) -> dict[str, Any]:
        """Leave the model out of a pickle: each process loads it itself.

        Its files are named instead: `datasets` takes what a function with an equal pickle has
        computed from its cache.
        """
        return self.__dict__ | {"predictor": None, "files": compute_cache_name(self.options.model)}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the images of a batch with one array per feature and the column `error`.

        A feature is [B, D] or [B, n, D]. `error` is the error message of each unreadable image,
        whose features are NaN, or an empty text. Ray and Spark also pass empty batches, for which
        the columns are empty.
        """
        files = compute_cache_name(self.options.model)
        if self.predictor is None or files != self.files:
            # In the worker: the function was pickled there without the model.
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            self.predictor = load_predictor(self.options, device)
            self.files = files
        column = self.image_column or next((name for name in IMAGE_COLUMNS if name in batch), None)
        if batch and column not in batch:
            raise ValueError(
                f"the batch has only the columns {', '.join(batch)}. Set `image_column` to one of "
                "them"
            )
        images = batch[column] if column is not None and batch else ()
        shape: Any = getattr(images, "shape", ())
        # [H, W], or [H, W, C]; with another last axis, it is a batch of gray images
        is_array = len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4))
        if is_array or isinstance(images, (*SOURCE_TYPES, Image.Image)):
            raise ValueError(
                f"the column {column} is one image, not a batch. Set `batched=True`, or pass a list"
            )
        records = [build_record(index, image, Path()) for index, image in enumerate(images)]
        rows = list(self.predictor.iterate_rows(records))
        columns: Any = self.predictor.columns
        outputs: dict[str, Any] = {name: values for name, values in batch.items() if name != column}
        for name, (output_name, feature) in zip(
            self.features, columns.features.items(), strict=True
        ):
            width = self.predictor.model.config.hidden_size
            shape = (width,) if feature.num_tokens == 1 else (feature.num_tokens, width)
            outputs[name] = np.full((len(rows), *shape), np.nan, self.options.feature_dtype)
            for index, row in enumerate(rows):
                if row["error"] is None:
                    outputs[name][index] = np.stack([*row[output_name]]).reshape(shape)
        return outputs | {"error": np.array([row["error"] or "" for row in rows], dtype=object)}
