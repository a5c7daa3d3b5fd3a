"""Predictions of the photographs of tests/conftest.py."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from modeling_vitcls import Predictor


def sorted_photos(photos: Path) -> list[str]:
    return [str(photos / name) for name in ("a.jpg", "b.JPEG", "c.png")] + [
        str(photos / "inner" / name)
        for name in ("d.jpg", "e.jpg", "f.jpg", "g.webp", "h.jpg", "i.gif")
    ]


def predict(model: Any, processor: Any, images: Any, **flags: Any) -> list[dict[str, Any]]:
    """Return the rows of a model in memory."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return Predictor(folder, **flags)(images)
