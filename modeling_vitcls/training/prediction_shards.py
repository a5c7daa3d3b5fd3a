"""A folder of Parquet files that grows until it holds the whole input, over as many starts as that takes.

    folder/.manifest.json          what it holds: the input, the model, the flags that change an answer
    folder/shard-000000.parquet    images 0 .. size - 1
    folder/shard-000001.parquet    images size .. 2 * size - 1, and so on

Which images make a shard depends on the input alone, so another start may have other processes. A shard is there
whole or not at all. Names with a leading dot are passed over by whoever reads the folder as one data set.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from .prediction_outputs import written_whole


MANIFEST = ".manifest.json"
FORMAT = 1


@dataclass
class ShardFolder:
    """The folder, and how many images each of its files holds."""

    path: Path
    size: int

    def file(self, number: int) -> Path:
        """Where a shard is, or will be."""
        return self.path / f"shard-{number:06}.parquet"

    def done(self) -> set[int]:
        """The numbers of the shards that are there."""
        return {int(file.stem.removeprefix("shard-")) for file in self.path.glob("shard-*.parquet")}

    def begin(self, contents: dict[str, Any]) -> int | None:
        """Create the folder, or check that it was begun with the same contents; only for the main process.

        Returns:
            How many images the input has, if an earlier start has come to know.

        Raises:
            ValueError: if it holds something else.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for unfinished in self.path.glob(".*.unfinished"):
            unfinished.unlink()  # of a start that was killed
        contents = {"format": FORMAT, "shard_size": self.size, **contents}
        manifest = self.manifest()
        if manifest is None:
            if any(self.path.iterdir()):
                raise ValueError(f"--output {self.path} holds other files: name a new or empty folder")
            self.write_manifest({"num_images": None, **contents})
            return None
        num_images = manifest.pop("num_images", None)
        if difference := first_difference(manifest, contents):
            raise ValueError(f"--output {self.path} was begun with {difference}: repeat that, or name another folder")
        return num_images

    def manifest(self) -> dict[str, Any] | None:
        """What the folder says that it holds."""
        file = self.path / MANIFEST
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Say what it holds."""
        with written_whole(self.path / MANIFEST) as unfinished:
            unfinished.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def set_num_images(self, num_images: int) -> None:
        """Note the length of the input, so that the next start need not look for its end."""
        self.write_manifest({**(self.manifest() or {}), "num_images": num_images})

    def is_complete(self, num_images: int) -> bool:
        """Whether all shards are there."""
        return self.done().issuperset(range(math.ceil(num_images / self.size)))

    def counts(self, num_images: int) -> tuple[int, int]:
        """Rows, and rows with an error, of all shards.

        Raises:
            ValueError: for a file that is damaged or has another number of rows.
        """
        rows = failed = 0
        for number, indices in enumerate(shard_ranges(num_images, self.size)):
            file = self.file(number)
            try:
                footer = pq.read_metadata(file)
            except Exception as error:  # pyarrow raises several kinds
                raise ValueError(f"{file} is damaged ({error}): delete it and start again") from error
            if footer.num_rows != len(indices):
                raise ValueError(
                    f"{file} has {footer.num_rows} rows in place of {len(indices)}: delete it and start again"
                )
            rows += footer.num_rows
            failed += int(footer.metadata[b"failed"])
        return rows, failed


def shard_ranges(num_images: int | None, size: int) -> Iterator[range]:
    """The images of each shard; without end for an input whose length is not known."""
    numbers = count() if num_images is None else range(math.ceil(num_images / size))
    for number in numbers:
        end = (number + 1) * size
        yield range(number * size, end if num_images is None else min(end, num_images))


def share(ranges: Iterator[range], process: int, num_processes: int) -> Iterator[range]:
    """The ranges that one process has to do, when they are dealt out in turn."""
    return islice(ranges, process, None, num_processes)


def first_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What differs, in words; most names are flags."""
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            if name in ("format", "input", "model"):
                return f"another {name}"
            return f"--{name.replace('_', '-')} {before.get(name)}, not {now.get(name)}"
    return None
