"""Positions for images of any size at run time.

Adaptation to another size is tested in test_adaptation.py.
"""

import pytest
import torch
from helpers.tiny_models import (
    LAYOUTS,
    POSITIONS,
    build_images,
    build_random,
    build_tiny_config,
    get_largest_difference,
    raises_one_line,
)
from timm.layers.pos_embed_sincos import init_random_2d_freqs
from torch import nn

from modeling_vitcls import ViTCLSModel


# At run time


@pytest.mark.parametrize("kind", POSITIONS)
@pytest.mark.parametrize("size", [(8, 8), (37, 45)], ids=str)
def test_images_of_any_size_are_cropped_to_whole_patches(kind: str, size: tuple[int, int]) -> None:
    """Pixels beyond the last whole patch are ignored."""
    model = build_random(ViTCLSModel, position_embedding_type=kind, num_register_tokens=2)
    patches = (size[0] // 8) * (size[1] // 8)
    pixels = build_images(2, *size)
    output = model(pixels).last_hidden_state
    assert output.shape == (2, 3 + patches, 16)
    assert output.isfinite().all()
    whole = pixels[:, :, : size[0] // 8 * 8, : size[1] // 8 * 8]
    assert torch.equal(model(whole).last_hidden_state, output)


@pytest.mark.parametrize(
    ("tokens", "groups"),
    [
        ("patches", ["patches"]),
        ("cls", ["cls", "patches"]),
        ("all", ["cls", "distillation", "registers", "patches"]),
    ],
)
@torch.no_grad()
def test_only_the_configured_tokens_have_learned_positions(tokens: str, groups: list[str]) -> None:
    layout = LAYOUTS["several_of_each"]
    model = build_random(ViTCLSModel, **layout, position_embedding_tokens=tokens)
    positions = dict(model.embeddings.position_embeddings.named_parameters())

    without_cls = ViTCLSModel(
        build_tiny_config(num_cls_tokens=0, pooling="mean", position_embedding_tokens=tokens)
    )

    assert list(dict(without_cls.embeddings.position_embeddings.named_parameters())) == ["patches"]

    counts = {"cls": 2, "distillation": 2, "registers": 3, "patches": 16}
    assert {name: parameter.shape for name, parameter in positions.items()} == {
        name: (1, counts[name], 16) for name in groups
    }


def test_learned_positions_of_models_in_bfloat16_are_resampled_in_float32() -> None:
    """The tests of conversions compare float32, and the other modes."""
    fields = {"image_size": [32, 48], "position_interpolation": "bilinear"}
    model = build_random(ViTCLSModel, **fields).bfloat16()
    pixels = build_images(1, 16, 72).bfloat16()
    table = model.embeddings.position_embeddings.patches.float()
    maps = table.view(1, 4, 6, 16).permute(0, 3, 1, 2)
    resampled = nn.functional.interpolate(maps, size=(2, 9), mode="bilinear").bfloat16()
    expected = model.embeddings.patch_embeddings(pixels) + resampled.flatten(2).mT
    assert torch.equal(model.embeddings(pixels, (2, 9))[:, 1:], expected)


# Rotary positions


def test_initial_frequencies_of_mixed_rotary_positions_equal_those_of_timm() -> None:
    config = build_tiny_config(
        position_embedding_type="rope_mixed", rope_theta=10.0, num_hidden_layers=3
    )
    positions = ViTCLSModel(config).rotary_positions
    torch.manual_seed(0)
    expected = init_random_2d_freqs(head_dim=8, depth=3, num_heads=2, temperature=10.0)
    torch.manual_seed(0)

    assert get_largest_difference(positions.get_initial_frequencies(), expected) <= 1e-6
    assert positions.frequencies.abs().max() > 0.1  # the parameter has such values

    lengths = positions.frequencies.square().sum(dim=0).sqrt()  # a rotation keeps the magnitudes
    magnitudes = torch.tensor([1.0, 10**-0.5])

    assert get_largest_difference(lengths, magnitudes.tile(2).expand_as(lengths)) <= 1e-6


def test_a_layer_that_is_called_without_its_rotary_positions_is_an_error() -> None:
    model = ViTCLSModel(build_tiny_config(position_embedding_type="rope_2d"))
    with raises_one_line("position_embeddings"):
        model.layers[0](torch.zeros(1, 5, model.config.hidden_size))
