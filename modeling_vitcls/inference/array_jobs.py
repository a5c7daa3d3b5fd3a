"""One part of an array job: `predict --output FOLDER --shard i/n` writes FOLDER/part-i-of-n.parquet.

The i-th of n jobs predicts the i-th of n equal ranges of the images. A file is written atomically,
and its metadata contains the settings of the prediction, so that a job whose file exists and fits
ends at once. Any program that reads a folder of Parquet files reads all parts.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import pyarrow.parquet as pq

from ..hub.model_files import BACKEND_FILES, CONFIG_FILES, hash_files
from ..hub.model_folder import ModelFolder
from ..runtime.errors import explain_damage
from .inputs import PredictionInput
from .options import PredictOptions
from .outputs import PredictionCounts


METADATA_KEY = "vitcls"
# options that determine the rows, beside the model and the images
SETTINGS = (
    *("features", "feature_dtype", "top_k", "threshold"),
    *("mixed_precision", "backend", "resize"),
)


class Part(NamedTuple):
    """The i-th of n parts, numbered from 1."""

    number: int
    num_parts: int

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Parse `i/n`."""
        return cls(*map(int, text.split("/")))

    @property
    def file_name(self) -> str:
        return f"part-{self.number}-of-{self.num_parts}.parquet"

    def select(self, num_images: int) -> range:
        """Return the indices of the images of this part."""
        start, stop = (
            num_images * number // self.num_parts for number in (self.number - 1, self.number)
        )
        return range(start, stop)


def describe_settings(options: PredictOptions, folder: ModelFolder, source: PredictionInput) -> str:
    """Return what determines the rows of a prediction, as JSON."""
    model: dict[str, Any] = {
        "config": hash_files(filter(Path.is_file, map(folder.path.joinpath, CONFIG_FILES))),
        "weights": folder.weights_sha256,
    }
    if options.backend != "torch":
        names = [name for files in BACKEND_FILES.values() for name in files]
        graphs = [folder.path / name for name in names]
        graphs += [Path(options.backend), Path(options.backend).with_suffix(".bin")]
        model["graphs"] = hash_files(filter(Path.is_file, graphs))
    settings = {name: getattr(options, name) for name in SETTINGS}
    return json.dumps(settings | {"input": source.compute_fingerprint(), "model": model})


def read_finished_part(file: Path, settings: str, indices: range) -> PredictionCounts | None:
    """Return the counts of a part that exists and fits, or None if it has to be computed.

    Raises:
        ValueError: If the folder has parts of another prediction, or the file is damaged.
    """
    for other in sorted(file.parent.glob("part-*.parquet")):
        if re.sub(r"\d+", "", other.name, count=1) != re.sub(r"\d+", "", file.name, count=1):
            raise ValueError(
                f"{other} is a part of another number of jobs. Set a new `output` folder"
            )
        check_settings(read_settings(other), json.loads(settings), other)
    if not file.exists():
        return None

    with explain_damage(file, "Delete it, and repeat"):
        errors = pq.read_table(file, columns=["index", "error"])
    if errors["index"].to_pylist() != list(indices):
        raise ValueError(f"{file} has other images. Delete it, and repeat")
    return PredictionCounts(len(errors), len(errors) - errors["error"].null_count)


def read_settings(file: Path) -> dict[str, Any]:
    """Return the settings in a part. Raise ValueError if the file is damaged."""
    if not file.is_file():  # a pipe, from which reading would wait forever
        raise ValueError(f"{file} is not a regular file. Delete it, and repeat")
    with explain_damage(file, "Delete it, and repeat"):
        metadata: Mapping[bytes, bytes] = pq.read_metadata(file).metadata
        return json.loads(metadata[METADATA_KEY.encode()])


def check_settings(found: dict[str, Any], settings: dict[str, Any], file: Path) -> None:
    """Raise ValueError if the settings in a part differ from those of this prediction."""
    for name, value in settings.items():
        if found.get(name) != value:
            difference = f"another {name}" if name in ("input", "model") else f"other `{name}`"
            raise ValueError(f"{file} was written with {difference}. Set a new `output` folder")
