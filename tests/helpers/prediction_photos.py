"""Predictions of the photographs of tests/conftest.py."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from modeling_vitcls import Predictor
from modeling_vitcls.inference.options import PredictOptions
from modeling_vitcls.inference.predict import predict_images


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


def write_predictions(model: Path, photos: Path, output: Path, **flags: Any) -> None:
    """Write the table of a folder of photographs, as `vitcls predict` does."""
    values = {"batch_size": 2, "num_workers": 0, **flags}
    predict_images(PredictOptions(model=str(model), paths=(str(photos),), output=output, **values))
