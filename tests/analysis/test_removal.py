"""Maps by removal find what was planted: a score that adds up, a sticker, a frame."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.sample_photographs import photograph
from helpers.tiny_models import IMAGES, build_random, build_tiny_config, initialize
from numpy.random import default_rng
from PIL import Image
from pytest import approx

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.analysis.photo import (
    NUM_PAIRS,
    compute_scores,
    draw_halves,
    fit_effects,
    hide_parts,
    measure_photo,
)
from modeling_vitcls.analysis.token_use import find_token_use
from modeling_vitcls.inference.interventions import continue_from


SIDE, PATCH = 240, 15
CUTS = (0, 45, 90, 120, 165, 210, 240)  # of 6 parts of 16 patches of 15 pixels


def test_each_half_is_followed_by_the_other() -> None:
    drawn = draw_halves((8, 16))
    parts, halves, shares = drawn.parts, drawn.patches, drawn.shares
    assert parts[:3, 3].tolist() == [1, 1, 7]
    patches = torch.cat([halves[0::2], halves[1::2]], dim=1).sort(dim=1).values
    assert torch.equal(patches, torch.arange(128).expand(NUM_PAIRS, -1))
    assert (shares[0::2] + shares[1::2]).numpy() == approx(1)
    assert ((shares > 0) & (shares < 1)).sum(dim=1).max() == 1


def test_the_effects_of_a_score_that_adds_up_are_its_parts() -> None:
    """Of 16 parts; for 36, there are fewer pairs than parts."""
    generator = default_rng(0)
    shares = draw_halves((4, 4)).shares
    parts = 1 + generator.normal(size=shares.shape[1])
    is_shown = torch.cat([torch.ones_like(shares[:1]), torch.zeros_like(shares[:1]), shares])
    scores = is_shown.numpy() @ parts + 0.1 * generator.normal(size=len(is_shown)) + 7
    effects, errors = fit_effects(shares, torch.from_numpy(scores)).numpy()
    assert (np.abs(effects - parts) < 3 * errors).all()
    assert errors.max() < 0.1


@pytest.mark.parametrize("side", [4, 16])
def test_no_part_lowers_a_score_that_all_parts_raise(side: int) -> None:
    shares = draw_halves((side, side)).shares
    num_shown = torch.cat([torch.tensor([shares.shape[1], 0]), shares.sum(dim=1)])
    effects, _ = fit_effects(shares, num_shown)
    assert effects.tolist() == approx([1] * shares.shape[1], abs=0.05)


@torch.no_grad()
def test_the_photo_and_nothing_come_first_and_halves_start_after_a_third_of_the_layers() -> None:
    model = build_random(ViTCLSForImageClassification, num_hidden_layers=3, pooling="mean")
    photo, halves = IMAGES[:1], draw_halves((4, 4)).patches
    outputs = model(photo, output_hidden_states=True)
    logits = hide_parts(model, photo, outputs, halves)[""].float()
    nothing = model(photo.mean(dim=(2, 3), keepdim=True).expand_as(photo)).logits
    shown = continue_from(model, photo, outputs.hidden_states[:2], halves).logits
    assert torch.allclose(logits, torch.cat([outputs.logits, nothing, shown]), atol=1e-5)


def test_scores_are_log_odds() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    assert torch.allclose(compute_scores(logits, has_one_label=True), logits.softmax(1).logit())
    assert torch.equal(compute_scores(logits, has_one_label=False), logits)


def crop_photographs(number: int, seed: int) -> list[np.ndarray]:
    generator = default_rng(seed)
    photos = [np.array(photograph(name)) for name in ("china.jpg", "flower.jpg")]
    corners = generator.integers(0, (400, 187), (number, 2)).tolist()
    return [
        photos[index % 2][top : top + SIDE, left : left + SIDE].copy()
        for index, (left, top) in enumerate(corners)
    ]


def draw_sticker(pixels: np.ndarray, generator: np.random.Generator) -> tuple[int, int]:
    """Cover one of 6 x 6 parts, and return its first patch."""
    row, column = generator.integers(0, 6, 2)
    pixels[CUTS[row] : CUTS[row + 1], CUTS[column] : CUTS[column + 1]] = (255, 0, 255)
    return CUTS[row] // PATCH, CUTS[column] // PATCH


def draw_frame(pixels: np.ndarray, _: np.random.Generator) -> None:
    inner = pixels[45:-45, 45:-45].copy()
    pixels[:] = (30, 180, 60)
    pixels[45:-45, 45:-45] = inner


def train_detector(draw: Any, pooling: str) -> ViTCLSForImageClassification:
    """Train all weights on marked and plain copies of parts of photographs; `draw` marks one."""
    sizes = {"image_size": SIDE, "patch_size": PATCH, "hidden_size": 32, "num_hidden_layers": 3}
    config = build_tiny_config(**sizes, pooling=pooling)
    config.id2label = {0: "plain", 1: "marked"}
    model = initialize(ViTCLSForImageClassification(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = default_rng(0)
    for step in range(60):
        plain = crop_photographs(8, seed=step)
        marked = [pixels.copy() for pixels in plain]
        for pixels in marked:
            draw(pixels, generator)
        images = torch.from_numpy(np.stack([*plain, *marked])).movedim(3, 1) / 127.5 - 1
        loss = model(images, labels=torch.arange(16) // 8).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def map_of_marked(model: ViTCLSForImageClassification, pixels: np.ndarray) -> torch.Tensor:
    processor = ViTCLSImageProcessor(size=SIDE)
    found = measure_photo(model, processor, Image.fromarray(pixels), find_token_use(model))
    return {each.label[0]: each.values for each in found.attributions}["marked"]


@pytest.mark.parametrize("pooling", ["cls", pytest.param("mean", marks=pytest.mark.slow)])
def test_the_part_with_the_sticker_that_decides_is_the_hottest(pooling: str) -> None:
    """The CLS token of this model has read the sticker after a third of the layers."""
    model = train_detector(draw_sticker, pooling)
    generator = default_rng(1)
    num_found = 0
    for pixels in crop_photographs(8, seed=100):
        place = draw_sticker(pixels, generator)
        values = map_of_marked(model, pixels)
        num_found += int(values[place] == values.max() > 1)
    assert num_found >= 7


@pytest.mark.slow
def test_most_of_what_raises_a_score_is_on_the_frame_that_decides() -> None:
    model = train_detector(draw_frame, "mean")
    for pixels in crop_photographs(2, seed=100):
        draw_frame(pixels, default_rng(0))
        values = map_of_marked(model, pixels).clamp(min=0)
        assert values[3:-3, 3:-3].sum() < 0.25 * values.sum()
