"""Photographs of many kinds, and the metrics of evaluation_worker.py in one process."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def by_one_process() -> dict[str, Any]:
    """Return the metrics of all scenarios of evaluation_worker.py."""
    from helpers.evaluation_worker import evaluate_all

    from modeling_vitcls.runtime.distributed import build_accelerator

    return evaluate_all(build_accelerator())


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of nine photographs of many kinds, and files that are not images."""
    import sklearn.datasets
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    (folder / "inner").mkdir()
    (folder / ".hidden").mkdir()
    photograph = Image.fromarray(sklearn.datasets.load_sample_images().images[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "a.jpg": ("RGB", {"quality": 60}),
        "b.JPEG": ("RGB", {"quality": 95, "subsampling": 0, "progressive": True}),
        "c.png": ("RGBA", {}),
        "inner/d.jpg": ("L", {}),
        "inner/e.jpg": ("CMYK", {}),
        "inner/f.jpg": ("RGB", {"exif": turned}),
        "inner/g.webp": ("RGB", {}),
        "inner/h.jpg": ("RGB", {"quality": 20, "subsampling": 1}),
        "inner/i.gif": ("P", {}),
    }
    for place, (name, (mode, settings)) in enumerate(kinds.items()):
        left = 40 * place
        crop = photograph.crop((left, 100, left + 101 - place, 177 + place))
        crop.convert(mode).save(folder / name, **settings)
    (folder / "notes.txt").write_text("no image", encoding="utf-8")
    photograph.crop((0, 0, 9, 9)).save(folder / ".hidden" / "z.jpg")
    return folder
