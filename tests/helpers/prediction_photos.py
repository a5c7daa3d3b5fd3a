"""A folder of photographs of many kinds for tests of prediction."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import sklearn.datasets
from PIL import Image

from modeling_vitcls.data.labels import get_heads
from modeling_vitcls.inference.predict import Predictor, wrap_images
from modeling_vitcls.inference.prediction_rows import FeatureColumns, LabelColumns


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of nine photographs of many kinds, and files that are not images."""
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
    predictor = Predictor(model, processor, columns, nullcontext, batch_size, num_workers=1)
    records = wrap_images(images if isinstance(images, list) else [images])
    return list(predictor.iterate_rows(records))
