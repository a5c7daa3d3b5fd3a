"""`Predictor`: a loaded model to keep, for servers, notebooks, Ray Data, Spark and `datasets.map`.

    predictor = Predictor("runs/mine", top_k=3)
    predictor(["a.jpg", image])             one photo or a list: the rows of `predict`
    predictor({"path": ["a.jpg"], "id": [7]})       a batch of columns: its columns, and those of the rows

    photos -> records -> pixels -> outputs -> rows
    inputs.py ---------------->    prediction_rows.py

The images are divided into batches by index. The command (predict.py) assigns the batches to its
processes in turn, so its output is bit-identical for any number of processes.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import parse_flag_from_env
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..conversion.open_model import compute_cache_name, is_preset, open_model
from ..data.labels import get_heads
from ..hub.loading import pin_revision
from ..model.image_processing_vitcls import SOURCE_TYPES
from ..runtime.distributed import build_autocast, resolve_precision
from ..runtime.flags import check_types
from ..runtime.own_state import own_state
from .cuda_graphs import GraphedFunction
from .feature_store import FeatureStore
from .features import FrozenEncoder
from .image_pass import pass_over_images, prepare_batches
from .inputs import (
    COMPOSITE,
    ImageRecord,
    build_record,
    compute_checksum,
    find_image,
    find_note,
    prepare_image,
    read_trained_checksums,
    wrap_images,
)
from .load_model import load_for_inference
from .options import PredictOptions
from .prediction_rows import (
    FeatureColumns,
    LabelColumns,
    Outputs,
    PredictionColumns,
    Row,
    build_checked_rows,
    try_predict,
)


# The fields of `PredictOptions` that are not about the images or the output
FLAGS = (
    "feature_dtype",
    "top_k",
    "threshold",
    "mixed_precision",
    "batch_size",
    "num_workers",
)
PREDICTION_BATCH_SIZE = 32  # Default number of images per forward pass on GPUs
IMAGE_COLUMNS = ("image", "bytes", "path")  # Column names of images in Ray, Spark and `datasets`


class Predictor:
    """A loaded model to keep, which predicts photos as `predict` does.

    An object of this class costs as much as `predict` once, and a call then only its photos. Any
    number of threads may call it, whatever torch defaults and precision other code has set. Later
    changes of the model's files change nothing.

    A pickle, which Ray, Spark and `datasets` write, has no weights: each process loads the model.

    Args:
        model: as in `predict`.
        features: features instead of labels, as in `predict`, such as `["cls", "mean@6"]`.
        image_column: column of a batch with paths, encoded bytes, `{"bytes", "path"}`, arrays or
            PIL images. Default: `image`, `bytes` or `path`.
        flags: `feature_dtype`, `top_k`, `threshold`, `mixed_precision`, `batch_size` and
            `num_workers`, as in `predict`.

    Raises:
        TypeError, ValueError, OSError: as in `predict`.

    Examples:
        >>> from modeling_vitcls import Predictor
        >>> predictor = Predictor("runs/photos", top_k=2)
        >>> (row,) = predictor("photo.jpg")
        >>> print(row["label"], row["probability"], row["error"])
        >>> columns = Predictor("runs/photos", features=["cls"])({"path": ["photo.jpg"]})
        >>> columns["cls"].shape
        (1, 32)
    """

    @own_state()
    def __init__(
        self,
        model: str | Path,
        features: str | Sequence[str] | None = None,
        image_column: str | None = None,
        **flags: Any,
    ) -> None:
        for name in flags:
            if name not in FLAGS:
                raise TypeError(f"`Predictor` has no argument `{name}`, only {', '.join(FLAGS)}")
        given: dict[str, Any] = {"model": model, "features": features, **flags}
        options = PredictOptions(**given)
        check_types(options, given)
        options.check()
        self.process_id = os.getpid()

        # All processes, and the cache of `datasets`, then have the same commit of a model on the Hub
        source = options.model if is_preset(options.model) else pin_revision(options.model)
        self.image_column = image_column
        self.arguments = given | {"model": source, "image_column": image_column}
        self.files = compute_cache_name(source)  # What a local model was when it was loaded
        self.folder = folder = open_model(source)
        device = torch.device("cpu")
        if not parse_flag_from_env("ACCELERATE_USE_CPU"):
            device = torch.accelerator.current_accelerator(check_available=True) or device
        loaded = load_for_inference(
            folder,
            device,
            use_head=options.features is None,
            batch_size=options.batch_size,
            max_batch_size=PREDICTION_BATCH_SIZE,
        )
        self.model, self.processor = loaded.model, loaded.processor
        self.batch_size = loaded.batch_size

        self.columns: PredictionColumns
        # Images that trained the classifier (inputs.py)
        self.trained_checksums: frozenset[str] = frozenset()
        if options.features is None:
            heads = get_heads(self.model.config, options.threshold)
            self.columns = LabelColumns(self.model, heads, options.top_k)
            self.trained_checksums = read_trained_checksums(folder)
        else:
            self.columns = FeatureColumns(self.model, options.features, options.feature_dtype)

        self.encoder = FrozenEncoder(self.model)
        config = self.model.config
        self.precision = resolve_precision(options.mixed_precision, device, config)
        self.autocast = build_autocast(self.precision, device, config)
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        num_cores = max(1, min(8, (os.cpu_count() or 1) // num_processes))
        self.num_workers = num_cores if options.num_workers is None else options.num_workers

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave the model out of a pickle: the process that reads it loads the model itself.

        Its files are named: `datasets` takes what a function with an equal pickle has computed from
        its cache.
        """
        return partial(type(self), **self.arguments), (), {"files": self.files}

    def __call__(self, images: Any) -> Any:
        """Predict photos, or add the predictions to a batch of columns.

        Args:
            images: one photo or a list, as in `predict`; or a batch: a dict of columns, an Arrow
                table or a pandas DataFrame with an image column.

        Returns:
            The rows of `predict`; of a batch, a dict of its columns without the images (paths
            stay), and an array for each column of the rows. A feature has its name and is [B, D] or
            [B, n, D]. Numbers of an unreadable image are NaN and labels None; `error` is the
            reason, or an empty text.

        Raises:
            ValueError: if `images` is no photo, list or batch, or the batch has no image column, or
                one image in it, or already a column of the predictions.
        """
        if hasattr(images, "columns"):  # A table of Arrow or pandas
            images = images.to_pydict() if hasattr(images, "to_pydict") else images.to_dict("list")
        if isinstance(images, Mapping) and COMPOSITE not in images:
            return self.add_columns(images)
        if isinstance(images, Mapping):
            images = find_image(images)
        return list(self.iterate_rows(wrap_images(images)))

    def add_columns(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Replace the images of a batch with the columns of the predictions.

        Ray and Spark also pass empty batches, for which the columns are empty.
        """
        column = self.image_column or next((name for name in IMAGE_COLUMNS if name in batch), None)
        if batch and column not in batch:
            raise ValueError(
                f"the batch has only the columns {', '.join(batch)}. Build the object with one of "
                "them: `Predictor(..., image_column=NAME)`"
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
        rows = list(self.iterate_rows(records))
        outputs = {name: batch[name] for name in batch if name != column or name == "path"}
        arrays = self.columns.build_arrays(rows)
        for name, values in outputs.items():
            if name in (*arrays, "error"):
                raise ValueError(
                    f"the batch has a column {name!r}, which the predictions would replace. Rename it"
                )
            if len(values) != len(rows):
                raise ValueError(
                    f"the column {name} of the batch has {len(values)} values, {column} has {len(rows)}"
                )
        errors = np.array([row["error"] or "" for row in rows], dtype=object)
        return outputs | arrays | {"error": errors}

    def iterate_rows(
        self,
        records: Sequence[ImageRecord],
        batches: Sequence[Sequence[int]] | None = None,
        store: FeatureStore | None = None,
    ) -> Iterator[Row]:
        """Yield a row for each image, in the order of the batches.

        A row contains an error if the image cannot be read, if the model does not support it, or if
        the outputs are not finite.

        Args:
            records: All images.
            batches: Indices of the images of each batch (`divide`). Default: all images.
            store: Has what photos have left in earlier passes, and keeps what they leave in this one.
        """
        if os.getpid() != self.process_id:
            # Threads do not survive a fork: computing with several would wait for them forever
            torch.set_num_threads(1)
        known: dict[int, Row] = {}  # What is known without the model

        def prepare(index: int) -> Tensor | str:
            name, content = records[index]
            checksum = compute_checksum(content)
            decode = partial(prepare_image, self.processor, content, index)
            pixels = decode() if store is None else store.prepare(index, content, decode)
            is_trained = None
            if self.trained_checksums and checksum is not None:
                # The list also has the images that the run could not read
                is_trained = checksum in self.trained_checksums and isinstance(pixels, Tensor)
            known[index] = {
                "image": name,
                "checksum": checksum,
                "trained": is_trained,
                "note": find_note(content, self.processor.bit_depth),
            }
            return pixels

        if batches is None:
            batches = self.divide(range(len(records)))
        predict = self.columns.predict if store is None else self.predict_kept
        compute = GraphedFunction(partial(try_predict, predict), self.model.device)
        # A pool of threads costs more than one photo
        prepared = prepare_batches(prepare, batches, self.num_workers if len(records) > 1 else 0)
        computed = pass_over_images(compute, prepared, self.model.device, self.autocast)
        empty_row = {**dict.fromkeys(self.columns.columns), "error": None}
        found: dict[int, Row] = {}
        for indices in batches:
            while not found.keys() >= set(indices):  # One batch per shape
                batch, outputs = next(computed)
                found |= {index: {"error": text} for index, text in batch.error_messages.items()}
                if store is not None and isinstance(outputs, dict):
                    store.write(batch.indices, outputs.pop("row"))
                rows = build_checked_rows(self.columns, outputs, len(batch.indices))
                found |= dict(zip(batch.indices, rows, strict=True))
            # In the order of the input, not of the shapes.
            for index in indices:
                yield {"index": index, **known.pop(index), **empty_row, **found.pop(index)}

    def predict_kept(self, values: Tensor) -> Outputs:
        """Compute outputs of images [B, C, H, W] or of kept rows [B, F], and the rows as `row`.

        What follows the encoder always has as many images: which ones come together changes no bit.
        """
        row = self.encoder.encode(values)
        padded = F.pad(row, (0, 0, 0, max(0, self.batch_size - len(row))))
        outputs = self.columns.read(self.encoder, padded)
        return {"row": row} | {name: each[: len(row)] for name, each in outputs.items()}

    def open_store(self) -> FeatureStore | None:
        """Open what photos have left in earlier passes; None if it has not what the columns read."""
        layers = self.encoder.layers
        for feature in getattr(self.columns, "features", {}).values():
            if feature.group not in ("cls", "mean") or (feature.layer or layers[-1]) not in layers:
                return None
        return self.encoder.open_store(self.processor, self.precision)

    def divide(self, indices: Sequence[int]) -> list[Sequence[int]]:
        """Divide images into batches.

        Rounding depends on which images share a batch. The batches are therefore divided among
        processes, which do not change the output.
        """
        starts = range(0, len(indices), self.batch_size)
        return [indices[start : start + self.batch_size] for start in starts]


def build_predictor(options: PredictOptions) -> Predictor:
    """Load the model of the options, and set the largest image that is read."""
    if options.max_megapixels is not None:
        Image.MAX_IMAGE_PIXELS = round(options.max_megapixels * 1e6) // 2  # Twice as many are read
    flags = {name: getattr(options, name) for name in FLAGS}
    return Predictor(options.model, options.features, **flags)
