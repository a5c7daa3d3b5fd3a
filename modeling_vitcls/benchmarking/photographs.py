"""Real photographs as JPEG files: parts of scikit-learn's two, of the usual size, saved as cameras and sites do."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images


VARIANTS: list[dict[str, Any]] = [
    {"quality": 90},
    {"quality": 75, "optimize": True},
    {"quality": 95, "subsampling": "4:4:4"},
    {"quality": 85, "progressive": True},
]


def write_photographs(folder: Path, per_class: int = 64, height_width: tuple[int, int] = (375, 500)) -> Path:
    """A folder per photograph, with different parts of it, in turn in each of the `VARIANTS`."""
    height, width = height_width
    generator = torch.Generator().manual_seed(0)
    for name, photograph in zip(("china", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir(parents=True)
        rows, columns, _ = photograph.shape  # 427 x 640
        for index in range(per_class):
            y = int(torch.randint(rows - height + 1, (), generator=generator))
            x = int(torch.randint(columns - width + 1, (), generator=generator))
            part = Image.fromarray(photograph[y : y + height, x : x + width])
            part.save(folder / name / f"{index:03}.jpg", **VARIANTS[index % len(VARIANTS)])
    return folder
