"""Maps by removal find what was planted: a score that adds up, a sticker, a frame."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command_in_process import run_here
from helpers.sample_photographs import photograph
from helpers.source_checkpoints import save_large_encoder
from helpers.tiny_models import build_images, build_tiny_config, randomize
from PIL import Image
from sklearn.linear_model import LinearRegression

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.analysis.photo import (
    compute_scores,
    draw_masks,
    fit_effects,
    hide_parts,
    measure_photo,
)
from modeling_vitcls.analysis.token_use import find_token_use


SIDE, FRAME = 240, 40


def test_the_whole_photo_and_nothing_come_first_and_each_half_is_followed_by_its_complement() -> (
    None
):
    masks = draw_masks((5, 6))
    assert (masks[0::2] + masks[1::2] == 1).all()
    assert masks[:2].flatten(1).tolist() == [[0] * 30, [1] * 30]
    assert (masks[2:].sum(dim=(1, 2)) == 15).all()


def test_halves_of_a_photo_have_equally_many_patches() -> None:
    """Parts of 16 patches a side have 4, 6 or 9 patches."""
    masks = draw_masks((16, 16))[2:]
    patches = torch.nn.functional.interpolate(masks[:, None], (16, 16)).sum(dim=(1, 2, 3))
    assert (patches == 128).all()


def test_the_effects_of_a_score_that_adds_up_are_its_parts() -> None:
    generator = np.random.default_rng(0)
    masks = draw_masks((4, 4))
    parts = generator.normal(size=16)
    noise = 0.1 * generator.normal(size=len(masks))
    scores = (1 - masks).flatten(1).double() @ torch.from_numpy(parts) + torch.from_numpy(noise) + 7
    effects, errors = fit_effects(masks, scores)

    found = effects.flatten().numpy()
    exact = LinearRegression().fit((1 - masks).flatten(1).numpy(), scores.numpy())
    assert found == pytest.approx(exact.coef_, abs=0.1)
    assert (np.abs(found - parts) < 3 * errors.flatten().numpy()).all()


@pytest.mark.parametrize("side", [4, 6])
def test_no_part_lowers_a_score_that_all_parts_raise(side: int) -> None:
    masks = draw_masks((side, side))
    effects, _ = fit_effects(masks, -masks.flatten(1).sum(dim=1).double())
    assert effects.flatten().tolist() == pytest.approx([1] * side**2, abs=0.05)


def test_parts_are_left_out_as_if_no_token_attended_to_them() -> None:
    config = build_tiny_config(num_labels=3, pooling="cls")
    model = randomize(ViTCLSForImageClassification(config)).eval()
    pixels = build_images(1)
    masks = draw_masks((4, 4))
    found = hide_parts(model, pixels, masks)[""]

    visible = torch.cat([torch.ones(len(masks), 1), 1 - masks.flatten(1)], dim=1).long()
    expected = model(pixels.expand(len(masks), -1, -1, -1), attention_mask=visible).logits
    gray = pixels.mean(dim=(2, 3), keepdim=True).expand_as(pixels)
    expected[1] = model(gray).logits
    assert torch.allclose(found.float(), expected, atol=1e-5)


def test_scores_are_log_odds() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    assert torch.allclose(compute_scores(logits, has_one_label=True), logits.softmax(1).logit())
    assert torch.equal(compute_scores(logits, has_one_label=False), logits)


def train_classifier(folder: Path, draw: Any, pooling: str) -> tuple[Any, ViTCLSImageProcessor]:
    """Train on 20 marked and 20 plain parts of the same photographs; `draw(pixels)` marks one."""
    generator = np.random.default_rng(0)
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
    command = ["finetune", "--model", folder / "vit", "--dataset", folder / "photos", "--no-report"]
    flags = ["--pooling", pooling, "--mixed-precision", "no", "--output-dir", folder / "run"]
    assert run_here(*command, *flags) == 0
    model = ViTCLSForImageClassification.from_pretrained(folder / "run").eval()
    return model, ViTCLSImageProcessor.from_pretrained(folder / "run")


def map_of_marked(model: Any, processor: Any, pixels: np.ndarray) -> torch.Tensor:
    found = measure_photo(model, processor, Image.fromarray(pixels), find_token_use(model))
    (values,) = (each.values for each in found.attributions if each.label[0] == "marked")
    return values


def draw_sticker(pixels: np.ndarray, generator: np.random.Generator) -> set[tuple[int, int]]:
    """Draw a sticker of 2 x 2 of the 8 x 8 patches, and return the parts that have some of them."""
    side = SIDE // 4
    row, column = generator.integers(0, 4, 2).tolist()
    pixels[row * side : (row + 1) * side, column * side : (column + 1) * side] = (255, 0, 255)
    parts = [{6 * patch // 8 for patch in (2 * each, 2 * each + 1)} for each in (row, column)]
    return set(product(*parts))


@pytest.mark.parametrize("pooling", ["mean", "cls_mean"])
def test_the_part_with_the_sticker_that_decides_is_the_hottest(
    pooling: str, tmp_path: Path
) -> None:
    model, processor = train_classifier(tmp_path, draw_sticker, pooling)
    generator = np.random.default_rng(1)
    num_found = 0
    for index in range(8):
        photo = photograph(("china.jpg", "flower.jpg")[index % 2])
        pixels = np.array(photo.crop((160, 160, 160 + SIDE, 160 + SIDE)))
        parts = draw_sticker(pixels, generator)
        values = map_of_marked(model, processor, pixels)
        num_found += divmod(values.argmax().item(), values.shape[1]) in parts
    assert num_found >= 5  # by chance, one


def test_most_of_what_raises_a_score_is_on_the_frame_that_decides(tmp_path: Path) -> None:
    def draw_frame(pixels: np.ndarray, generator: np.random.Generator) -> None:
        inner = pixels[FRAME:-FRAME, FRAME:-FRAME].copy()
        pixels[:] = (30, 180, 60)
        pixels[FRAME:-FRAME, FRAME:-FRAME] = inner

    model, processor = train_classifier(tmp_path, draw_frame, "mean")
    pixels = np.array(photograph("flower.jpg").crop((160, 160, 160 + SIDE, 160 + SIDE)))
    draw_frame(pixels, np.random.default_rng(0))
    values = map_of_marked(model, processor, pixels).clamp(min=0)
    values[1:-1, 1:-1], inside = 0, values[1:-1, 1:-1].sum()
    assert values.sum() / (values.sum() + inside) > 0.75
