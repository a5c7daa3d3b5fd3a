"""Study: which planted marks the map of a label shows (model_cards/studies/maps.md).

    python scripts/studies/maps.py --encoder ENCODER --photos PHOTOS --output runs/maps

Classifiers of a frozen ENCODER are trained on photos with a mark (a sticker anywhere, or a frame) and
without. Of each marked test photo, the map of the label "marked" is measured as `vitcls look` draws it.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import tyro
from photos import PhotoOptions, add_row, draw_photos, has_row, read_rows, write_page
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, finetune
from modeling_vitcls.analysis.photo import measure_photo
from modeling_vitcls.analysis.token_use import find_token_use


SIDE = 240  # of the photos, in pixels
STICKER = 40
FRAME = 20


@dataclass(frozen=True)
class Options(PhotoOptions):
    """Encoder, photographs and size of the study."""

    num_labels: int = 4
    """Number of training photos per class, each with the mark and without."""
    num_test: int = 6
    """Number of test photos per class."""


def draw_mark(mark: str, photo: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Draw a mark into a photo, and return where it is: bright where the mark is."""
    corner, side = (FRAME, FRAME), SIDE - 2 * FRAME
    if mark == "sticker":
        corner, side = tuple(generator.integers(0, SIDE - STICKER, 2).tolist()), STICKER
    place = Image.new("L", photo.size, 0 if mark == "sticker" else 255)
    place.paste(255 - place.getpixel((0, 0)), (*corner, corner[0] + side, corner[1] + side))
    color = (255, 0, 255) if mark == "sticker" else (30, 60, 200)
    photo.paste(color, mask=place)
    return place


def read_photo(file: Path) -> Image.Image:
    return Image.open(file).convert("RGB").resize((SIDE, SIDE))


def train_detector(options: Options, mark: str, pooling: str) -> Path:
    """Train a classifier of marked and plain photos; return its folder."""
    folder = options.output / mark
    generator = np.random.default_rng(0)
    for index, file in enumerate(draw_photos(options.photos / "train", options.num_labels, seed=0)):
        for label in ("plain", "marked"):
            photo = read_photo(file)
            if label == "marked":
                draw_mark(mark, photo, generator)
            (folder / label).mkdir(parents=True, exist_ok=True)
            photo.save(folder / label / f"{index}.png")
    run = options.output / f"{mark}-{pooling}"
    finetune(str(options.encoder), str(folder), output_dir=run, pooling=pooling, overwrite=True)
    return run


def measure_maps(options: Options, mark: str, run: Path) -> dict[str, float]:
    """Measure the maps of marked test photos."""
    model = ViTCLSForImageClassification.from_pretrained(run).eval()
    processor = ViTCLSImageProcessor.from_pretrained(run)
    use = find_token_use(model)
    generator = np.random.default_rng(7)
    are_found, shares = [], []
    for file in draw_photos(options.photos / "test", options.num_test, seed=0):
        photo = read_photo(file)
        place = draw_mark(mark, photo, generator)
        attributions = measure_photo(model, processor, photo, use).attributions
        (values,) = (each.values.numpy() for each in attributions if each.label[0] == "marked")
        is_marked = np.asarray(place.resize(values.shape[::-1], Image.Resampling.BOX)) > 0
        are_found.append(values[is_marked].max() == values.max())
        positive = values.clip(min=0)
        shares.append(positive[is_marked].sum() / positive.sum())
    return {"photos": len(shares), "found": int(sum(are_found)), "share": float(np.mean(shares))}


def main() -> None:
    options = tyro.cli(Options)
    for mark, pooling in product(("sticker", "frame"), ("cls", "mean")):
        key = {"mark": mark, "pooling": pooling}
        if not has_row(options.output, key):
            run = train_detector(options, mark, pooling)
            add_row(options.output, key | measure_maps(options, mark, run))
    lines = [
        "| {mark} | {pooling} | {found} of {photos} | {share:.0%} |".format(**row)
        for row in read_rows(options.output)
    ]
    head = "| mark | pooling | the hottest part is on it | of what raises the score, on it |"
    write_page(options.output, "\n".join([head, "|---|---|---:|---:|", *lines, ""]))


if __name__ == "__main__":
    main()
