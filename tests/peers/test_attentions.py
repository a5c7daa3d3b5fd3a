"""What tokens attend to, in every family that is converted: the source's own maps, ours with eager attention, those
recorded from fused attention (analysis/attention_recorder.py), and the special tokens' rows (`token_attention`) are
the same.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from modeling_vitcls import convert_from_timm, convert_from_transformers
from modeling_vitcls.analysis.attention_recorder import record_attention_layers
from peers import test_from_timm as timm_cases
from peers.transformers_cases import CASES, Case, as_patches, encoder_of, images


LIMIT = 1e-5


def check_maps(ours: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Three ways to our maps agree; returns those of eager attention, [B, maps, N, N] per layer."""
    rows = ours.token_attention(pixels)  # [B, layer, map, special token, N]
    with record_attention_layers(ours) as layers:
        ours(pixels)
    recorded = [layer.weights() for layer in layers]
    ours.set_attn_implementation("eager")
    maps = ours(pixels, output_attentions=True).attentions
    num_special = ours.config.token_layout.num_prefix_tokens
    for index, (by_record, by_eager) in enumerate(zip(recorded, maps, strict=True)):
        assert by_eager.std() > 0.001, "the maps are too alike to tell"
        assert difference(by_record, by_eager) <= LIMIT
        assert difference(rows[:, index], by_eager[:, :, :num_special]) <= LIMIT
        assert difference(layers[index].weights(2), by_eager[:, :, :2]) <= LIMIT
    return maps


def difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest; 0 of nothing."""
    assert first.shape == second.shape
    return (first - second).abs().max().item() if first.numel() else 0.0


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_of_transformers(name: str) -> None:
    case = with_eager_attention(CASES[name])
    source = case.build()
    pixels = images(case.sizes[-1])
    maps = check_maps(convert_from_transformers(source), pixels)
    for ours, theirs in zip(maps, maps_of(source, case, pixels), strict=True):
        assert difference(ours, theirs) <= LIMIT


def with_eager_attention(case: Case) -> Case:
    """The case of a source that returns its maps."""
    values = dict(case.values)
    values["attn_implementation"] = "eager"
    return replace(case, values=values)


def maps_of(source: nn.Module, case: Case, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The source's maps [B, heads, N, N] per layer, its patches in their places."""
    inputs: dict[str, Any] = {"pixel_values": pixels}
    if case.model.startswith("Siglip2"):
        inputs = as_patches(pixels, case.values.get("vision_config", case.values)["patch_size"])
    elif case.ask and pixels.shape[-2:] != case.sizes[0]:
        inputs["interpolate_pos_encoding"] = True
    encoded = encoder_of(source)(**inputs, output_attentions=True)
    if "ids_restore" not in encoded:
        return list(encoded.attentions)
    places = torch.cat([torch.zeros(len(pixels), 1, dtype=torch.long), encoded.ids_restore + 1], dim=1)  # [B, N]
    image = torch.arange(len(pixels))[:, None, None]
    return [
        maps.transpose(0, 1)[:, image, places[:, :, None], places[:, None, :]].transpose(0, 1)
        for maps in encoded.attentions
    ]


@pytest.mark.parametrize("name", timm_cases.REPRESENTATIVES)
def test_of_timm(name: str) -> None:
    check_timm(name, {})


@pytest.mark.parametrize("what", timm_cases.OWN_ARGUMENTS)
def test_of_own_arguments_in_timm(what: str) -> None:
    check_timm(*timm_cases.OWN_ARGUMENTS[what])


@torch.no_grad()
def check_timm(name: str, arguments: dict[str, Any]) -> None:
    """At a size that the model was not trained at."""
    model = timm_cases.peer(name, **timm_cases.TINY | arguments)
    size = timm_cases.pixels(model, timm_cases.RECTANGLE)
    model.set_input_size(img_size=size)
    check_maps(
        convert_from_timm(model), torch.randn(2, model.in_chans, *size, generator=torch.Generator().manual_seed(0))
    )
