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


SIDE = 240
CUTS = (0, 45, 90, 120, 165, 210, 240)  # of 6 parts of 16 patches of 15 pixels


def test_each_half_is_followed_by_the_other() -> None:
    parts, halves, shares = draw_halves((8, 16))
    assert parts[:3, 3].tolist() == [1, 1, 7]
    patches = torch.cat([halves[0::2], halves[1::2]], dim=1).sort(dim=1).values
    assert torch.equal(patches, torch.arange(128).expand(NUM_PAIRS, -1))
    assert (shares[0::2] + shares[1::2]).numpy() == approx(1)
    assert ((shares > 0) & (shares < 1)).sum(dim=1).max() == 1


def test_the_effects_of_a_score_that_adds_up_are_its_parts() -> None:
    """Of 16 parts; for 36, there are fewer pairs than parts."""
    generator = default_rng(0)
    *_, shares = draw_halves((4, 4))
    parts = 1 + generator.normal(size=shares.shape[1])
    is_shown = torch.cat([torch.ones_like(shares[:1]), torch.zeros_like(shares[:1]), shares])
    scores = is_shown.numpy() @ parts + 0.1 * generator.normal(size=len(is_shown)) + 7
    effects, errors = fit_effects(shares, torch.from_numpy(scores)).numpy()
    assert (np.abs(effects - parts) < 3 * errors).all()
    assert errors.max() < 0.1


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


def map_of_green(pixels: np.ndarray) -> torch.Tensor:
    """Map "marked" for a model of which channel 0 has how green a patch is."""
    config = build_tiny_config(image_size=SIDE, patch_size=15, pooling="mean")
    config.id2label = {0: "plain", 1: "marked"}
    model = initialize(ViTCLSForImageClassification(config)).eval()
    with torch.no_grad():
        colors = torch.tensor([-0.01, 0.01, -0.01])[:, None, None]
        model.vitcls.embeddings.patch_embeddings.projection.weight[0] = colors
        model.classifier.weight.zero_()[1, -config.hidden_size] = 20
    processor = ViTCLSImageProcessor(size=SIDE)
    found = measure_photo(model, processor, Image.fromarray(pixels), find_token_use(model))
    return {each.label[0]: each.values for each in found.attributions}["marked"]


def test_the_part_with_the_sticker_that_decides_is_the_hottest() -> None:
    generator = default_rng(1)
    for index in range(8):
        pixels = crop_photograph(("china.jpg", "flower.jpg")[index % 2])
        row, column = generator.choice([0, 1, 3, 4], 2)  # parts of 3 x 3 patches
        pixels[CUTS[row] : CUTS[row + 1], CUTS[column] : CUTS[column + 1]] = (0, 255, 0)
        values = map_of_green(pixels)
        assert values[CUTS[row] // 15, CUTS[column] // 15] == values.max()


def test_most_of_what_raises_a_score_is_on_the_frame_that_decides() -> None:
    inner = np.s_[45:-45, 45:-45]
    photo = crop_photograph("flower.jpg")
    pixels = np.full_like(photo, (30, 180, 60))
    pixels[inner] = photo[inner]
    values = map_of_green(pixels).clamp(min=0)
    assert values[3:-3, 3:-3].sum() < 0.25 * values.sum()
