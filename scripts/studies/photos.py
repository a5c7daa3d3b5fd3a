"""What the studies on photographs share: options, photographs, features, and rows of results."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from modeling_vitcls import Predictor
from modeling_vitcls.frozen.class_statistics import TokenFeatures
from modeling_vitcls.frozen.linear_probe import NUM_LAST_LAYERS


@dataclass(frozen=True)
class PhotoOptions:
    """Encoder, photographs and output of a study."""

    encoder: Path
    """A ViT, as `vitcls convert` takes it; scripts that compare with transformers need a folder."""
    photos: Path
    """Folder with train/CLASS/PHOTO and test/CLASS/PHOTO."""
    output: Path
    """Folder for the runs and README.md."""


# Photographs --------------------------------------------------------------------------------------


def draw_photos(folder: Path, num_labels: int, seed: int) -> list[Path]:
    """Return `num_labels` random photographs of each class."""
    chooser = random.Random(seed)
    classes = [sorted(each.iterdir()) for each in sorted(folder.iterdir())]
    return [
        file for files in classes for file in chooser.sample(files, min(num_labels, len(files)))
    ]


def list_photos(folder: Path) -> list[Path]:
    """Return all photographs in FOLDER/CLASS."""
    return sorted(folder.glob("*/*"))


def link_photos(files: Iterable[Path], folder: Path) -> None:
    """Link photographs in FOLDER/CLASS."""
    for file in files:
        link = folder / file.parent.name / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.exists():
            link.symlink_to(file.resolve())


def compute_features(model: Path, files: Sequence[Path]) -> TokenFeatures:
    """Compute CLS and the mean of the patches in the last four layers of a vitcls model."""
    num_layers = AutoConfig.from_pretrained(model).num_hidden_layers
    names = {
        (layer, kind): f"{kind}@{num_layers + 1 + layer}"
        for layer in range(-NUM_LAST_LAYERS, 0)
        for kind in ("cls", "mean")
    }
    values = Predictor(model, list(names.values()))({"path": files})
    return {token: values[name] for token, name in names.items()}


# Results ------------------------------------------------------------------------------------------


def read_rows(output: Path) -> list[dict[str, Any]]:
    """Read the results of an interrupted study."""
    file = output / "rows.jsonl"
    return [json.loads(line) for line in file.open(encoding="utf-8")] if file.exists() else []


def add_row(output: Path, row: dict[str, Any]) -> None:
    """Append a result at once, so that an interrupted study continues."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def has_row(output: Path, key: dict[str, Any]) -> bool:
    """Return whether a result with these values has been measured."""
    return any(key.items() <= row.items() for row in read_rows(output))


def write_page(output: Path, page: str) -> None:
    """Write README.md, and print it."""
    (output / "README.md").write_text(page, encoding="utf-8")
    print(page)
