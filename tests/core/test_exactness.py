"""Compare with independent implementations with the same, entirely random weights. peers/ compares more models.

Every parameter of the other model is random, because a zero bias or a LayerScale of 1e-5 could hide a difference.
Tokens, logits and losses agree within 1e-5 in float32, at the native size and, if the other model supports it, at a
rectangular size.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.tiny_models import (
    SIZES,
    assert_same_outputs,
    build_images,
    build_tiny_config,
    get_largest_difference,
    randomize,
)
from torch import nn

from modeling_vitcls import ViTCLSBackbone, ViTCLSForImageClassification, ViTCLSForMaskedImageModeling, ViTCLSModel
from modeling_vitcls.heads_vitcls import compute_masked_pixel_loss


TOLERANCE = 1e-5
NATIVE, RECTANGLE = (32, 32), (24, 56)
Weights = dict[str, torch.Tensor]

# Rules (regular expression, replacement) that map parameter names of the other model to ours, applied in order.
VIT = {r"^(vit|deit)\.": "vitcls.", r"^cls_classifier": "classifier"}
DINOV2 = {
    r"^dinov2_with_registers\.": "vitcls.",
    r"encoder\.layer\.": "layers.",
    r"norm1": "layernorm_before",
    r"norm2": "layernorm_after",
    r"attention\.attention\.(query|key|value)": lambda match: f"attention.{match[1][0]}_proj",  # before 5.23
    r"attention\.output\.dense": "attention.o_proj",
    r"weights_out": "down_proj",
}
DINOV3 = {
    r"^model\.layer\.": "layers.",
    r"^norm\.": "layernorm.",
    r"norm1": "layernorm_before",
    r"norm2": "layernorm_after",
    r"patch_embeddings\.": "patch_embeddings.projection.",
}
DINOV3_PLAIN_MLP = DINOV3 | {r"mlp\.up_proj": "mlp.fc1", r"mlp\.down_proj": "mlp.fc2"}


def rename_weights(weights: Mapping[str, torch.Tensor], rules: Mapping[str, Any]) -> Weights:
    """Return the weights under our names."""
    result = {}
    for name, weight in weights.items():
        for pattern, replacement in rules.items():
            name = re.sub(pattern, replacement, name)
        result[name] = weight.clone()
    return result


def split_positions(weights: Weights, name: str, **counts: int) -> None:
    """Split one position table [1, N, D] into ours: `counts` tokens per group, then the patches."""
    positions = weights.pop(name)
    prefix = "vitcls." if any(key.startswith("vitcls.") for key in weights) else ""
    parts = positions.split([*counts.values(), positions.shape[1] - sum(counts.values())], dim=1)
    for group, part in zip([*counts, "patches"], parts, strict=True):
        weights[f"{prefix}embeddings.position_embeddings.{group}"] = part.clone()


def assert_same_tokens(ours: ViTCLSModel, peer: nn.Module, sizes: list[tuple[int, int]], **inputs: Any) -> None:
    """Check every token after every layer, and after the last norm."""
    for height, width in sizes:
        pixels = build_images(2, height, width)
        with torch.no_grad():
            expected = peer(pixels, output_hidden_states=True, **inputs)
            got = ours(pixels, output_hidden_states=True)
        assert get_largest_difference(got.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
        for our_state, peer_state in zip(got.hidden_states, expected.hidden_states, strict=True):
            assert get_largest_difference(our_state, peer_state) <= TOLERANCE


def test_vit() -> None:
    peer = randomize(transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)))
    weights = rename_weights(peer.state_dict(), VIT)
    split_positions(weights, "vitcls.embeddings.position_embeddings", cls=1)
    ours = ViTCLSForImageClassification(build_tiny_config(layer_norm_eps=peer.config.layer_norm_eps)).eval()
    ours.load_state_dict(weights)

    assert_same_tokens(ours.vitcls, peer.vit, [NATIVE, RECTANGLE], interpolate_pos_encoding=True)
    for size in (NATIVE, RECTANGLE):
        pixels = build_images(2, *size)
        expected = peer(pixels, interpolate_pos_encoding=True, labels=torch.tensor([0, 2]))
        got = ours(pixels, labels=torch.tensor([0, 2]))
        assert get_largest_difference(got.logits, expected.logits) <= TOLERANCE
        assert get_largest_difference(got.loss, expected.loss) <= TOLERANCE


@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_with_registers(swiglu: bool) -> None:
    """Check registers, LayerScale, antialiased positions, the mean of the patches next to the CLS token, the mask
    token.
    """
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    peer_config = transformers.Dinov2WithRegistersConfig(
        **sizes, mlp_ratio=2, num_register_tokens=3, use_swiglu_ffn=swiglu
    )
    peer = randomize(transformers.Dinov2WithRegistersForImageClassification(peer_config))
    weights = rename_weights(peer.state_dict(), DINOV2)
    split_positions(weights, "vitcls.embeddings.position_embeddings", cls=1)
    weights["vitcls.embeddings.mask_token"] = weights["vitcls.embeddings.mask_token"][None]
    for name in [name for name in weights if "mlp.weights_in" in name]:  # before 5.23
        gate, up = weights.pop(name).chunk(2)
        weights |= {name.replace("weights_in", "gate_proj"): gate, name.replace("weights_in", "up_proj"): up}
    config = build_tiny_config(
        num_register_tokens=3,
        pooling="cls_mean",
        layer_scale_init_value=1.0,
        use_mask_token=True,
        position_antialias=True,
        mlp_type="swiglu" if swiglu else "mlp",
        intermediate_size=24 if swiglu else 32,
        layer_norm_eps=peer_config.layer_norm_eps,
    )
    ours = ViTCLSForImageClassification(config).eval()
    ours.load_state_dict(weights)

    assert_same_tokens(ours.vitcls, peer.dinov2_with_registers, [NATIVE, RECTANGLE, (16, 24)])
    for size in (NATIVE, RECTANGLE):
        assert_same_outputs(ours(build_images(2, *size)).logits, peer(build_images(2, *size)).logits, TOLERANCE)
    mask = torch.arange(32).view(2, 16) % 3 == 0
    masked = peer.dinov2_with_registers(build_images(), bool_masked_pos=mask).last_hidden_state
    assert_same_outputs(ours.vitcls(build_images(), bool_masked_pos=mask).last_hidden_state, masked, TOLERANCE)


@pytest.mark.parametrize(("apply_layernorm", "reshape"), [(True, True), (False, True), (True, False)])
def test_dinov2_backbone(apply_layernorm: bool, reshape: bool) -> None:
    """Check stages, norm and order of the feature maps. DINOv2 keeps its registers in maps that are not reshaped."""
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    options = {"apply_layernorm": apply_layernorm, "reshape_hidden_states": reshape, "out_indices": [0, 1]}
    peer_config = transformers.Dinov2WithRegistersConfig(**sizes, mlp_ratio=2, num_register_tokens=3, **options)
    peer = randomize(transformers.Dinov2WithRegistersBackbone(peer_config))
    weights = rename_weights(peer.state_dict(), DINOV2)
    split_positions(weights, "embeddings.position_embeddings", cls=1)
    weights["embeddings.mask_token"] = weights["embeddings.mask_token"][None]
    config = build_tiny_config(
        num_register_tokens=3,
        layer_scale_init_value=1.0,
        use_mask_token=True,
        position_antialias=True,
        intermediate_size=32,
        layer_norm_eps=peer_config.layer_norm_eps,
        **options,
    )
    ours = ViTCLSBackbone(config).eval()
    ours.load_state_dict(weights)
    for size in (NATIVE, RECTANGLE):
        got, expected = ours(build_images(2, *size)).feature_maps, peer(build_images(2, *size)).feature_maps
        for our_map, peer_map in zip(got, expected, strict=True):
            if not reshape:
                peer_map = torch.cat([peer_map[:, :1], peer_map[:, 4:]], dim=1)
            assert get_largest_difference(our_map, peer_map) <= TOLERANCE


@pytest.mark.parametrize("gated", [False, True])
def test_dinov3(gated: bool) -> None:
    """Check rotary positions without special tokens, biases for all but keys, the gated MLP."""
    peer_config = transformers.DINOv3ViTConfig(
        **SIZES, num_register_tokens=4, use_gated_mlp=gated, hidden_act="silu" if gated else "gelu", rope_theta=50.0
    )
    peer = randomize(transformers.DINOv3ViTModel(peer_config))
    config = build_tiny_config(
        num_register_tokens=4,
        position_embedding_type="rope_2d",
        rope_theta=50.0,
        key_bias=False,
        layer_scale_init_value=1.0,
        use_mask_token=True,
        mlp_type="swiglu" if gated else "mlp",
        layer_norm_eps=peer_config.layer_norm_eps,
    )
    ours = ViTCLSModel(config).eval()
    ours.load_state_dict(rename_weights(peer.state_dict(), DINOV3 if gated else DINOV3_PLAIN_MLP))
    for size in (NATIVE, RECTANGLE, (8, 40)):
        got, expected = (model(build_images(2, *size)) for model in (ours, peer))
        assert get_largest_difference(got.last_hidden_state, expected.last_hidden_state) <= TOLERANCE
        assert get_largest_difference(got.pooler_output, expected.pooler_output) <= TOLERANCE
    mask = torch.arange(32).view(2, 16) % 3 == 0
    got, expected = (model(build_images(), bool_masked_pos=mask).last_hidden_state for model in (ours, peer))
    assert get_largest_difference(got, expected) <= TOLERANCE


def test_deit_distilled() -> None:
    """Check positions of the distillation token, and the mean of two heads."""
    peer_config = transformers.DeiTConfig(**SIZES)
    peer = randomize(transformers.DeiTForImageClassificationWithTeacher(peer_config))
    weights = rename_weights(peer.state_dict(), VIT)
    split_positions(weights, "vitcls.embeddings.position_embeddings", cls=1, distillation=1)
    options = {"num_distillation_tokens": 1, "position_embedding_tokens": "all"}
    ours = ViTCLSForImageClassification(build_tiny_config(**options, layer_norm_eps=peer_config.layer_norm_eps)).eval()
    ours.load_state_dict(weights)

    assert_same_tokens(ours.vitcls, peer.deit, [NATIVE, RECTANGLE], interpolate_pos_encoding=True)
    got, expected = ours(build_images()), peer(build_images())
    for name in ("logits", "cls_logits", "distillation_logits"):
        assert get_largest_difference(getattr(got, name), getattr(expected, name)) <= TOLERANCE
    assert get_largest_difference(got.cls_logits, got.distillation_logits) > 0.01


@pytest.mark.parametrize("choice", ["cls", "distillation"])
def test_deit_with_one_head(choice: str) -> None:
    config = build_tiny_config(num_distillation_tokens=1, distillation_inference=choice)
    output = randomize(ViTCLSForImageClassification(config))(build_images())
    assert torch.equal(output.logits, getattr(output, f"{choice}_logits"))
    assert get_largest_difference(output.cls_logits, output.distillation_logits) > 0.01


@pytest.mark.parametrize("size", [NATIVE, RECTANGLE])
def test_sincos_positions(size: tuple[int, int]) -> None:
    """Compare with a loop over the formula of MoCo v3 and MAE: half of the channels encode x, half y."""
    quarter = 4
    rows, columns = size[0] // 8, size[1] // 8
    expected = np.zeros((rows * columns, 16))
    for row in range(rows):
        for column in range(columns):
            for channel in range(quarter):
                frequency = 1.0 / 10000 ** (channel / quarter)
                vector = expected[row * columns + column]
                vector[channel] = math.sin(column * frequency)
                vector[quarter + channel] = math.cos(column * frequency)
                vector[2 * quarter + channel] = math.sin(row * frequency)
                vector[3 * quarter + channel] = math.cos(row * frequency)
    fields = {"position_embedding_type": "sincos_2d", "num_register_tokens": 2}
    with_positions = randomize(ViTCLSModel(build_tiny_config(**fields))).embeddings(
        build_images(1, *size), (rows, columns)
    )
    plain_model = randomize(ViTCLSModel(build_tiny_config(**fields | {"position_embedding_type": "none"})))
    without = plain_model.embeddings(build_images(1, *size), (rows, columns))
    added = (with_positions - without)[0]
    assert torch.equal(added[:3], torch.zeros(3, 16))
    assert get_largest_difference(added[3:], torch.tensor(expected, dtype=torch.float32)) <= TOLERANCE


def test_masked_image_modeling_equals_simmim() -> None:
    peer_config = transformers.ViTConfig(**SIZES, encoder_stride=8)
    peer = randomize(transformers.ViTForMaskedImageModeling(peer_config))
    weights = rename_weights(peer.state_dict(), VIT)
    split_positions(weights, "vitcls.embeddings.position_embeddings", cls=1)
    weights["decoder.projection.weight"] = weights.pop("decoder.0.weight").flatten(1)
    weights["decoder.projection.bias"] = weights.pop("decoder.0.bias")
    ours = ViTCLSForMaskedImageModeling(build_tiny_config(layer_norm_eps=peer_config.layer_norm_eps)).eval()
    ours.load_state_dict(weights)
    mask = torch.arange(32).view(2, 16) % 3 == 0
    got, expected = (model(build_images(), bool_masked_pos=mask) for model in (ours, peer))
    assert get_largest_difference(got.reconstruction, expected.reconstruction) <= TOLERANCE
    assert get_largest_difference(got.loss, expected.loss) <= TOLERANCE


@pytest.mark.parametrize("normalised", [False, True])
def test_squared_pixel_loss_equals_mae(normalised: bool) -> None:
    peer = randomize(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**SIZES, norm_pix_loss=normalised)))
    expected = peer(build_images(), noise=torch.rand(2, 16, generator=torch.Generator().manual_seed(0)))
    config = build_tiny_config(mim_loss="l2", norm_pixel_target=normalised)
    reconstruction = peer.unpatchify(expected.logits)
    loss = compute_masked_pixel_loss(reconstruction, build_images(), expected.mask, config)
    assert loss.item() == pytest.approx(expected.loss.item(), rel=TOLERANCE)
