"""Maps by removal find what was planted: a score that adds up, a sticker, a frame."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command_in_process import finetune
from helpers.sample_photographs import photograph
from helpers.source_checkpoints import save_large_encoder
from numpy.random import default_rng
from PIL import Image
from pytest import approx
from sklearn.linear_model import LinearRegression

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.analysis.photo import compute_scores, draw_masks, fit_effects, measure_photo
from modeling_vitcls.analysis.token_use import find_token_use


SIDE, STICKER = 240, 40


def test_the_whole_photo_and_nothing_come_first_and_each_half_is_followed_by_its_complement() -> (
    None
):
    masks = draw_masks(5, 6)
    assert (masks[0::2] + masks[1::2] == 1).all()
    assert masks[:2].flatten(1).tolist() == [[0] * 30, [1] * 30]
    assert (masks[2:].sum(dim=(1, 2)) == 15).all()


def test_the_effects_of_a_score_that_adds_up_are_its_parts() -> None:
    generator = default_rng(0)
    masks = draw_masks(4, 4)
    parts = generator.normal(size=16)
    noise = 0.1 * generator.normal(size=len(masks))
    scores = (1 - masks).flatten(1).double() @ torch.from_numpy(parts) + torch.from_numpy(noise) + 7
    effects, errors = fit_effects(masks, scores)

    found = effects.flatten().numpy()
    exact = LinearRegression().fit((1 - masks).flatten(1).numpy(), scores.numpy())
    assert found == approx(exact.coef_, abs=0.1)
    assert (np.abs(found - parts) < 3 * errors.flatten().numpy()).all()


@pytest.mark.parametrize("side", [4, 6])
def test_no_part_lowers_a_score_that_all_parts_raise(side: int) -> None:
    masks = draw_masks(side, side)
    effects, _ = fit_effects(masks, -masks.flatten(1).sum(dim=1).double())
    assert effects.flatten().tolist() == approx([1] * side**2, abs=0.05)


def test_scores_are_log_odds() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    assert torch.allclose(compute_scores(logits, has_one_label=True), logits.softmax(1).logit())
    assert torch.equal(compute_scores(logits, has_one_label=False), logits)


def train_classifier(folder: Path, draw: Any, pooling: str) -> tuple[Any, ViTCLSImageProcessor]:
    """Train on 20 marked and 20 plain parts of the same photographs; `draw(pixels)` marks one."""
    generator = default_rng(0)
    for index in range(40):
        whole = photograph(("china.jpg", "flower.jpg")[index // 2 % 2])
        left, top = generator.integers(0, 150, 2).tolist()
        pixels = np.array(whole.crop((left, top, left + SIDE, top + SIDE)))
        if index % 2:
            draw(pixels, generator)
        photo = folder / "photos" / ("plain", "marked")[index % 2] / f"{index}.png"
        photo.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(photo)
    save_large_encoder(folder / "vit", num_layers=5)
    flags = ("--pooling", pooling, "--mixed-precision", "no")
    finetune(folder / "vit", folder / "photos", folder / "run", *flags)
    model = ViTCLSForImageClassification.from_pretrained(folder / "run").eval()
    return model, ViTCLSImageProcessor.from_pretrained(folder / "run")


def map_of_marked(model: Any, processor: Any, pixels: np.ndarray) -> torch.Tensor:
    found = measure_photo(model, processor, Image.fromarray(pixels), find_token_use(model))
    (values,) = (each.values for each in found.attributions if each.label[0] == "marked")
    return values


def draw_sticker(pixels: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    row, column = generator.integers(0, SIDE // STICKER, 2) * STICKER
    pixels[row : row + STICKER, column : column + STICKER] = (255, 0, 255)
    return row // STICKER, column // STICKER


@pytest.mark.parametrize("pooling", ["mean", "cls_mean"])
def test_the_part_with_the_sticker_that_decides_is_the_hottest(
    pooling: str, tmp_path: Path
) -> None:
    model, processor = train_classifier(tmp_path, draw_sticker, pooling)
    generator = default_rng(1)
    num_found = 0
    for index in range(8):
        photo = photograph(("china.jpg", "flower.jpg")[index % 2])
        pixels = np.array(photo.crop((160, 160, 160 + SIDE, 160 + SIDE)))
        place = draw_sticker(pixels, generator)
        values = map_of_marked(model, processor, pixels)
        num_found += divmod(values.argmax().item(), values.shape[1]) == place
    assert num_found >= 7


def test_most_of_what_raises_a_score_is_on_the_frame_that_decides(tmp_path: Path) -> None:
    def draw_frame(pixels: np.ndarray, generator: np.random.Generator) -> None:
        inner = pixels[STICKER:-STICKER, STICKER:-STICKER].copy()
        pixels[:] = (30, 180, 60)
        pixels[STICKER:-STICKER, STICKER:-STICKER] = inner

    model, processor = train_classifier(tmp_path, draw_frame, "mean")
    pixels = np.array(photograph("flower.jpg").crop((160, 160, 160 + SIDE, 160 + SIDE)))
    draw_frame(pixels, default_rng(0))
    values = map_of_marked(model, processor, pixels).clamp(min=0)
    values[1:-1, 1:-1], inside = 0, values[1:-1, 1:-1].sum()
    assert values.sum() / (values.sum() + inside) > 0.75
