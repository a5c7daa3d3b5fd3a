"""Token statistics compared with plain loops over images, layers, heads and tokens."""

import math
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    TOKENS,
    build_images,
    build_tiny_config,
    each_layout,
    get_largest_difference,
    randomize,
)
from helpers.varied_models import collect_findings
from torch import nn

from modeling_vitcls import (
    ViTCLSModel,
)
from modeling_vitcls.analysis.token_statistics import Findings


TOLERANCE = 1e-5
PATCH = {"patch_size": [8, 4], "num_hidden_layers": 3}


@torch.no_grad()
def run_eager(model: Any, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return attention maps [L, H, N, N] and states [L + 1, N, D] of one image [C, H, W]."""
    encoder = model.base_model
    encoder.set_attn_implementation("eager")
    outputs = encoder(image[None], output_attentions=True, output_hidden_states=True)
    encoder.set_attn_implementation("sdpa")
    return torch.cat(outputs.attentions), torch.cat(outputs.hidden_states)


def average(values: list[Any]) -> torch.Tensor:
    """Return the mean over the statistics of individual images."""
    return torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in values]).mean(
        dim=0
    )


def check_maps(found: Findings, model: Any, image: torch.Tensor) -> None:
    """Check the attention statistics of one image with loops."""
    maps, _ = run_eager(model, image)
    num_special = model.config.token_layout.num_prefix_tokens
    for layer, head in (
        (layer, head) for layer in range(maps.shape[0]) for head in range(maps.shape[1])
    ):
        rows = maps[layer, head].tolist()
        for token in range(num_special):
            row = rows[token]
            assert found.entropy[layer, head, token] == pytest.approx(
                -sum(p * math.log(p) for p in row), abs=1e-5
            )
    for layer, token in (
        (layer, token) for layer in range(maps.shape[0]) for token in range(num_special)
    ):
        rows = maps[layer, :, token].tolist()  # [H, N]
        uniform = [1 / len(rows[0])] * len(rows[0])
        selectivity = sum(get_total_variation(row, uniform) for row in rows) / len(rows)
        assert found.map_selectivity[layer, token] == pytest.approx(selectivity, abs=TOLERANCE)


def get_total_variation(first: list[float], second: list[float]) -> float:
    """Return the total variation distance between two attention maps."""
    return sum(abs(one - other) for one, other in zip(first, second, strict=True)) / 2


def check_states(found: Findings, model: Any, image: torch.Tensor) -> None:
    """Check the state statistics of one image with loops."""
    _, states = run_eager(model, image)
    num_special = model.config.token_layout.num_prefix_tokens
    for step, state in enumerate(states):
        special, patches = state[:num_special], state[num_special:]
        norms = sorted(patch.norm().item() for patch in patches)
        median = norms[(len(norms) - 1) // 2]
        assert found.patch_norms[step] == pytest.approx(median, rel=1e-4)
        assert sorted(found.patch_ratios[step].tolist()) == pytest.approx(
            [norm / median for norm in norms], rel=1e-4
        )
        for token in range(num_special):
            assert found.token_norms[step, token] == pytest.approx(
                special[token].norm().item(), rel=1e-4
            )


@each_layout
def test_statistics_of_an_image_equal_loops(layout: dict[str, Any]) -> None:
    model = randomize(ViTCLSModel(build_tiny_config(**PATCH | layout)))
    image = build_images(1, 24, 32)
    found = collect_findings(model, image)

    assert found.num_images == 1
    check_maps(found, model, image[0])
    check_states(found, model, image[0])

    num_special = model.config.token_layout.num_prefix_tokens
    assert (
        get_largest_difference(found.mean_states, run_eager(model, image[0])[1][:, :num_special])
        <= TOLERANCE
    )
    assert found.variation.shape == (4, num_special)
    assert found.variation.sum() <= 1e-4  # there is only one image


def test_statistics_over_images_are_means() -> None:
    """They are means over individual images for any batches, even with images of several sizes."""
    model = randomize(ViTCLSModel(build_tiny_config(**PATCH | TOKENS)))
    pixels = build_images(5)
    oblong = build_images(2, 24, 40)
    together = collect_findings(model, pixels, oblong)
    assert together.num_images == 7

    for batches in (
        (pixels[:1], pixels[1:4], pixels[4:], oblong),
        (oblong[:1], pixels, oblong[1:]),
    ):
        found = collect_findings(model, *batches)
        for name, value in vars(together).items():
            if name == "map_variation":  # not defined for images of several sizes
                continue
            if isinstance(value, torch.Tensor) and name != "patch_ratios":
                assert get_largest_difference(getattr(found, name), value) <= TOLERANCE, name
        ratios = (each.patch_ratios.sort().values for each in (found, together))
        assert get_largest_difference(*ratios) <= 1e-4
    singles = [collect_findings(model, image[None]) for image in [*pixels, *oblong]]
    for name in ("entropy", "uniform_entropy_by_token", "patch_norms"):
        expected = average([getattr(single, name) for single in singles])
        assert get_largest_difference(getattr(together, name).double(), expected) <= TOLERANCE, name


def test_variation_is_the_distance_from_the_mean_of_the_images() -> None:
    """Variation is the distance from the mean; distances are means over images and all channels."""
    model = randomize(ViTCLSModel(build_tiny_config(**PATCH | TOKENS)))
    with torch.no_grad():
        model.embeddings.register_tokens[:, 2] = model.embeddings.register_tokens[:, 0]
    found = collect_findings(model, build_images(4)[:3], build_images(4)[3:])
    states = torch.stack(
        [run_eager(model, image)[1][:, :6] for image in build_images(4)]
    ).double()  # [B, L + 1, S, D]
    means = states.mean(dim=0)

    distances = (states - means).square().sum(dim=-1).mean(dim=0).sqrt()  # [L + 1, S]
    expected = distances / means.norm(dim=-1)
    by_channel = (states - means).square().mean(dim=0).sqrt() / means.abs()  # [L + 1, S, D]
    assert (
        get_largest_difference(found.channel_variation.double(), by_channel.median(dim=-1).values)
        <= 1e-4
    )
    assert get_largest_difference(found.variation.double(), expected) <= TOLERANCE
    assert get_largest_difference(found.mean_states.double(), means) <= TOLERANCE
    # embeddings do not depend on the image
    assert found.variation[0].max() <= 1e-6 < 1e-2 < found.variation[1:].min()

    # [L + 1, S, S]
    pairs = (states.unsqueeze(3) - states.unsqueeze(2)).square().sum(dim=-1).mean(dim=0).sqrt()
    assert get_largest_difference(found.state_distance.double(), pairs) <= 1e-4
    assert found.state_distance[:, 3, 5].max() == 0 < 0.1 < found.state_distance[:, 3, 4].min()


def test_one_large_channel_does_not_hide_variation() -> None:
    """The channel is equal in all images and tokens, as in large models (massive activations)."""
    model = randomize(ViTCLSModel(build_tiny_config(**PATCH | TOKENS)))

    def shift(mlp: nn.Module, args: tuple, added: torch.Tensor) -> torch.Tensor:
        return added + 1e4 * torch.eye(16)[3]

    plain = collect_findings(model, build_images(4))
    with model.layers[-1].mlp.register_forward_hook(shift):
        found = collect_findings(model, build_images(4))
    assert found.variation[-1].max() < 1e-3
    difference = get_largest_difference(found.state_distance[-1], plain.state_distance[-1])
    assert difference <= 1e-2 < 1 < found.state_distance[-1, 0, 1]
    assert found.channel_variation[-1].min() > 0.05


def test_small_variation_is_not_lost_to_rounding() -> None:
    """A difference of squares in float32 would lose the variation of a token with a large norm."""
    model = randomize(ViTCLSModel(build_tiny_config(**PATCH)))
    with torch.no_grad():
        model.embeddings.cls_token += 1000
        for layer in model.layers:
            for part in (layer.attention.o_proj, layer.mlp.fc2):
                part.weight *= 0.1
    found = collect_findings(model, build_images(4))
    states = torch.stack([run_eager(model, image)[1][:, 0] for image in build_images(4)]).double()
    expected = (states - states.mean(0)).square().sum(-1).mean(0).sqrt() / states.mean(0).norm(
        dim=-1
    )

    assert 1e-7 < expected[-1] < 1e-3
    assert found.variation[-1, 0].item() == pytest.approx(expected[-1].item(), rel=0.05)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flex_attention"])
def test_uniform_attention_is_compared_within_the_scope(implementation: str) -> None:
    """The second CLS token attends to a quarter of the patches, and all special tokens."""
    fields = {"num_cls_tokens": 2, "num_register_tokens": 1, "cls_scopes": ["image", [2, 2, 0, 1]]}
    model = randomize(ViTCLSModel(build_tiny_config(**fields)))
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.q_proj.weight.zero_()
            layer.attention.q_proj.bias.zero_()
    with torch.compiler.set_stance("force_eager"):  # flex attention is mathematically equal
        found = collect_findings(model, build_images(2), build_images(1))
    entropy = found.uniform_entropy_by_token

    assert entropy.tolist() == pytest.approx([math.log(3 + 16), math.log(3 + 4), math.log(3 + 16)])
    assert get_largest_difference(found.entropy, entropy.expand_as(found.entropy)) <= 1e-5
    # compared with uniform attention to the tokens in the scope
    assert found.map_selectivity.max() <= 1e-6


def test_map_variation_is_zero_for_one_image_and_infinite_for_two_sizes() -> None:
    model = randomize(ViTCLSModel(build_tiny_config(**PATCH)))
    assert collect_findings(model, build_images(1)).map_variation.max() <= 1e-3

    found = collect_findings(model, build_images(3))
    assert found.map_variation.min() > 1e-3
    assert found.map_variation.isfinite().all()
    assert (
        collect_findings(model, build_images(1), build_images(1, 24, 40))
        .map_variation.isinf()
        .all()
    )

    # [images, L, H, N, N]
    weights = torch.stack([run_eager(model, image)[0] for image in build_images(3)])
    maps = weights.mean(dim=2)[:, :, 0]  # attention of the CLS token, mean over heads
    mean = maps.mean(dim=0)
    distance = (mean - 1 / mean.shape[-1]).norm(dim=-1)
    expected = (maps - mean).square().sum(dim=-1).mean(dim=0).sqrt() / distance
    assert get_largest_difference(found.map_variation[:, 0], expected) <= 1e-3
