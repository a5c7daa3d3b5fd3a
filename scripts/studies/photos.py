"""What the studies on photographs share: their first options, and how they draw photographs."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PhotoOptions:
    """Encoder, photographs and output of a study."""

    encoder: Path
    """A ViT, as `vitcls convert` takes it; scripts that compare with transformers need a folder."""
    photos: Path
    """Folder with train/CLASS/PHOTO and test/CLASS/PHOTO."""
    output: Path
    """Folder for the runs and README.md."""


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
