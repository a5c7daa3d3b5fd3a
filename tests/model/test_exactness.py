"""Compare with independent implementations; peers/ compares more models.

Every parameter of the other model is random, because a zero bias or a LayerScale of 1e-5 could hide
a difference. Tokens, logits and losses agree within 1e-5 in float32, at the native size and, if the
other model supports it, at a rectangular size.
"""

import pytest
import torch
import transformers
from helpers.tiny_models import (
    IMAGES,
    SIZES,
    build_images,
    build_random,
    build_tiny_config,
    get_largest_difference,
    randomize,
)
from pytest import approx
from timm.layers import build_sincos2d_pos_embed

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSConfig,
    ViTCLSForMaskedImageModeling,
    ViTCLSModel,
    convert_from_transformers,
)
from modeling_vitcls.model.heads_vitcls import compute_masked_pixel_loss


TOLERANCE = 1e-5
NATIVE = (32, 32)
RECTANGLE = (24, 56)


@pytest.mark.parametrize(
    ("apply_layernorm", "reshape"), [(True, True), (False, True), (True, False)]
)
def test_feature_maps_equal_those_of_the_dinov2_backbone(
    apply_layernorm: bool, reshape: bool
) -> None:
    """Check stages, norm and order of the feature maps.

    DINOv2 keeps its registers in maps that are not reshaped.
    """
    sizes = {name: size for name, size in SIZES.items() if name != "intermediate_size"}
    options = {
        "apply_layernorm": apply_layernorm,
        "reshape_hidden_states": reshape,
        "out_indices": [0, 1, 2],  # The stem, and both layers
    }
    peer_config = transformers.Dinov2WithRegistersConfig(
        **sizes, mlp_ratio=2, num_register_tokens=3, **options
    )
    peer, model = (
        getattr(transformers, f"Dinov2WithRegisters{kind}")(peer_config)
        for kind in ("Backbone", "Model")
    )
    model.load_state_dict(randomize(peer).state_dict())
    encoder = convert_from_transformers(model)
    ours = ViTCLSBackbone(ViTCLSConfig.from_dict(encoder.config.to_dict(), **options)).eval()
    ours.load_state_dict(encoder.state_dict())
    for size in (NATIVE, RECTANGLE):
        got, expected = (
            ours(build_images(2, *size)).feature_maps,
            peer(build_images(2, *size)).feature_maps,
        )
        for our_map, peer_map in zip(got, expected, strict=True):
            if not reshape:
                peer_map = torch.cat([peer_map[:, :1], peer_map[:, 4:]], dim=1)
            assert get_largest_difference(our_map, peer_map) <= TOLERANCE


@pytest.mark.parametrize("size", [NATIVE, RECTANGLE])
def test_sincos_positions_are_ordered_as_in_moco_v3_and_mae(size: tuple[int, int]) -> None:
    """timm orders the channels as sin y, sin x, cos y, cos x.

    MoCo v3 and MAE order them as sin x, cos x, sin y, cos y.
    """
    rows = size[0] // 8
    columns = size[1] // 8
    expected = build_sincos2d_pos_embed([rows, columns], dim=16, interleave_sin_cos=False)
    expected = expected.unflatten(1, (2, 2, 4)).flip(2).transpose(1, 2).flatten(1)
    fields = {"position_embedding_type": "sincos_2d", "num_register_tokens": 2}
    with_positions = build_random(ViTCLSModel, **fields).embeddings(
        build_images(1, *size), (rows, columns)
    )
    plain_model = build_random(ViTCLSModel, **fields | {"position_embedding_type": "none"})
    without = plain_model.embeddings(build_images(1, *size), (rows, columns))
    added = (with_positions - without)[0]
    assert torch.equal(added[:3], torch.zeros(3, 16))
    assert get_largest_difference(added[3:], expected) <= TOLERANCE


def test_masked_image_modeling_equals_simmim() -> None:
    peer = randomize(
        transformers.ViTForMaskedImageModeling(transformers.ViTConfig(**SIZES, encoder_stride=8))
    )
    encoder = convert_from_transformers(peer.vit)
    decoder = peer.decoder[0]
    ours = ViTCLSForMaskedImageModeling(encoder.config).eval()
    ours.vitcls.load_state_dict(encoder.state_dict())
    ours.decoder.projection.load_state_dict(
        {"weight": decoder.weight.flatten(1), "bias": decoder.bias}
    )
    mask = torch.arange(32).view(2, 16) % 3 == 0
    got, expected = (model(IMAGES, bool_masked_pos=mask) for model in (ours, peer))

    assert all(
        get_largest_difference(got[name], expected[name]) <= TOLERANCE
        for name in ("reconstruction", "loss")
    )


@pytest.mark.parametrize("normalised", [False, True])
def test_squared_pixel_loss_equals_mae(normalised: bool) -> None:
    peer = randomize(
        transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**SIZES, norm_pix_loss=normalised)
        )
    )
    expected = peer(IMAGES, noise=torch.rand(2, 16))
    config = build_tiny_config(mim_loss="l2", norm_pixel_target=normalised)
    reconstruction = peer.unpatchify(expected.logits)
    loss = compute_masked_pixel_loss(reconstruction, IMAGES, expected.mask, config)

    assert loss.item() == approx(expected.loss.item(), rel=TOLERANCE)
