"""Predictions of the photographs of tests/inference/conftest.py."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from modeling_vitcls.data.labels import get_heads
from modeling_vitcls.inference.predict import LoadedPredictor, wrap_images
from modeling_vitcls.inference.prediction_rows import FeatureColumns, LabelColumns


def sorted_photos(photos: Path) -> list[str]:
    return [str(photos / name) for name in ("a.jpg", "b.JPEG", "c.png")] + [
        str(photos / "inner" / name)
        for name in ("d.jpg", "e.jpg", "f.jpg", "g.webp", "h.jpg", "i.gif")
    ]


def predict(
    model: Any,
    processor: Any,
    images: Any,
    top_k: int | None = None,
    threshold: float | None = None,
    features: Any = None,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Return the rows of a model in memory."""
    names = [features] if isinstance(features, str) else features
    columns: Any = (
        LabelColumns(model.eval(), get_heads(model.config, threshold), top_k)
        if names is None
        else FeatureColumns(model.eval(), names, "float32")
    )
    predictor = LoadedPredictor(model, processor, columns, nullcontext, batch_size, num_workers=1)
    records = wrap_images(images if isinstance(images, list) else [images])
    return list(predictor.iterate_rows(records))
