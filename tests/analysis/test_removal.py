"""Maps by removal find what was planted: a score that adds up, a sticker, a frame."""

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


SIDE, STICKER = 240, 40


def test_each_half_is_followed_by_the_other() -> None:
    parts, halves, shares = draw_halves((8, 16))
    assert parts[:3, 3].tolist() == [1, 1, 7]
    patches = torch.cat([halves[0::2], halves[1::2]], dim=1).sort(dim=1).values
    assert torch.equal(patches, torch.arange(128).expand(NUM_PAIRS, -1))
    assert (shares[0::2] + shares[1::2]).numpy() == approx(1)
    assert ((shares > 0) & (shares < 1)).sum(dim=1).max() == 1


@pytest.mark.parametrize("side", [4, 16])
def test_the_effects_of_a_score_that_adds_up_are_its_parts(side: int) -> None:
    generator = default_rng(0)
    *_, shares = draw_halves((side, side))
    parts = 1 + generator.normal(size=shares.shape[1])
    is_shown = torch.cat([torch.ones_like(shares[:1]), torch.zeros_like(shares[:1]), shares])
    noise = 0.1 * generator.normal(size=len(is_shown))
    scores = is_shown @ torch.from_numpy(parts) + torch.from_numpy(noise) + 7
    effects, errors = fit_effects(shares, scores).numpy()
    assert (np.abs(effects - parts) < 3 * errors).all()
    assert errors.max() < 1


@pytest.mark.parametrize("side", [4, 16])
def test_no_part_lowers_a_score_that_all_parts_raise(side: int) -> None:
    *_, shares = draw_halves((side, side))
    num_shown = torch.cat([torch.tensor([shares.shape[1], 0]), shares.sum(dim=1)])
    effects, _ = fit_effects(shares, num_shown)
    assert effects.tolist() == approx([1] * shares.shape[1], abs=0.05)


@torch.no_grad()
def test_the_first_logits_are_those_of_the_photo() -> None:
    model = build_random(ViTCLSForImageClassification, num_labels=5)
    outputs = model(IMAGES[:1], output_hidden_states=True)
    logits = hide_parts(model, IMAGES[:1], outputs, draw_halves((4, 4))[1])[""]
    assert torch.equal(logits[:1].float(), outputs.logits)


def test_scores_are_log_odds() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64)
    assert torch.allclose(compute_scores(logits, has_one_label=True), logits.softmax(1).logit())
    assert torch.equal(compute_scores(logits, has_one_label=False), logits)


def crop_photograph(name: str) -> np.ndarray:
    return np.array(photograph(name).crop((160, 160, 160 + SIDE, 160 + SIDE)))


def map_of_color(color: tuple[int, int, int], pooling: str, pixels: np.ndarray) -> torch.Tensor:
    """Map "marked" for a model of which channel 0 has how much of a color (1 or -1 each) a patch has."""
    config = build_tiny_config(image_size=SIDE, patch_size=10, pooling=pooling)
    config.id2label = {0: "plain", 1: "marked"}
    model = initialize(ViTCLSForImageClassification(config)).eval()
    with torch.no_grad():
        model.vitcls.embeddings.patch_embeddings.projection.weight[0] = (
            torch.tensor(color).view(3, 1, 1) / 100
        )
        model.classifier.weight.zero_()[1, -config.hidden_size] = 20
    processor = ViTCLSImageProcessor(size=SIDE)
    found = measure_photo(model, processor, Image.fromarray(pixels), find_token_use(model))
    (values,) = (each.values for each in found.attributions if each.label[0] == "marked")
    return values


@pytest.mark.parametrize("pooling", ["mean", "cls_mean"])
def test_the_part_with_the_sticker_that_decides_is_the_hottest(pooling: str) -> None:
    generator = default_rng(1)
    for index in range(8):
        pixels = crop_photograph(("china.jpg", "flower.jpg")[index % 2])
        row, column = generator.integers(0, SIDE // STICKER, 2)
        place = np.s_[
            row * STICKER : (row + 1) * STICKER, column * STICKER : (column + 1) * STICKER
        ]
        pixels[place] = (255, 0, 255)
        values = map_of_color((1, -1, 1), pooling, pixels)
        assert values[row, column] == values.max()


def test_most_of_what_raises_a_score_is_on_the_frame_that_decides() -> None:
    inner = np.s_[STICKER:-STICKER, STICKER:-STICKER]
    photo = crop_photograph("flower.jpg")
    pixels = np.full_like(photo, (30, 180, 60))
    pixels[inner] = photo[inner]
    values = map_of_color((-1, 1, -1), "mean", pixels).clamp(min=0)
    assert values[1:-1, 1:-1].sum() < 0.25 * values.sum()
