"""MAE equals transformers' ViTMAEForPreTraining, and encodes only visible patches."""

from typing import Any

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, randomize
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from modeling_vitcls import ViTCLSConfig, ViTCLSModel, convert_from_transformers
from modeling_vitcls.pretraining.mae import MAE, build_decoder_config, draw_masks


def build_mae(**fields: Any) -> MAE:
    encoder = ViTCLSModel(build_tiny_config(**fields))
    return MAE(encoder, build_decoder_config(encoder.config))


@torch.no_grad()
def test_loss_and_reconstruction_equal_transformers() -> None:
    decoder = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 40,
    }
    config = ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
        norm_pix_loss=True,
        **{f"decoder_{name}": value for name, value in decoder.items()},
    )
    theirs = ViTMAEForPreTraining(config).eval()
    # sets the fixed positions, which a new model leaves at zero
    randomize(theirs).decoder.initialize_weights(16)
    encoder = convert_from_transformers(theirs.vit)
    decoder_config = ViTCLSConfig(
        image_size=32, patch_size=8, layer_norm_eps=theirs.config.layer_norm_eps, **decoder
    )
    ours = MAE(encoder, decoder_config).eval()
    state = theirs.decoder.state_dict()
    del state["decoder_pos_embed"]
    for name in ("weight", "bias"):  # rows, columns, channels -> channels, rows, columns
        pixels = state.pop(f"decoder_pred.{name}").unflatten(0, (8, 8, 3))
        state[f"decoder.projection.{name}"] = pixels.movedim(2, 0).flatten(0, 2)

    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith("vitcls.") for name in missing)

    pixels = build_images(3)
    noise = torch.rand(3, 16)
    expected = theirs(pixels, noise=noise)
    found = ours(pixels, expected.mask.bool())

    assert found.reconstruction.shape == pixels.shape
    reconstruction = theirs.unpatchify(expected.logits)
    torch.testing.assert_close(found.loss, expected.loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.reconstruction, reconstruction, atol=1e-5, rtol=0)


VARIANTS: dict[str, dict[str, Any]] = {
    "tokens": {"num_cls_tokens": 2, "num_register_tokens": 2, "num_distillation_tokens": 1},
    "rotary": {"position_embedding_type": "rope_2d"},
    "relative": {"relative_position_bias": "layer"},
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_only_visible_patches_are_encoded(name: str) -> None:
    model = randomize(build_mae(**VARIANTS[name])).eval()
    pixels = build_images(2)
    masks = draw_masks(2, 16, 0.75, torch.device("cpu"))
    assert masks.sum(dim=1).tolist() == [12, 12]
    seen: list[int] = []
    model.vitcls.layers[0].register_forward_hook(
        lambda layer, inputs, output: seen.append(output.shape[1])
    )
    expected = model(pixels, masks).reconstruction
    hidden = masks.view(2, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = model(torch.where(hidden, torch.randn_like(pixels), pixels), masks).reconstruction
    assert model.vitcls(pixels).last_hidden_state.shape[1] == model.num_prefix_tokens + 16

    assert seen[:2] == [model.num_prefix_tokens + 4] * 2
    torch.testing.assert_close(changed, expected)
    assert not torch.allclose(model(pixels + 1, masks).reconstruction, expected)


def test_every_parameter_except_the_pooler_is_trained() -> None:
    """The pooler is frozen, because DDP would wait for its gradients.

    At least one patch is visible.
    """
    model = build_mae(num_register_tokens=1, pooling="attention")
    masks = draw_masks(2, 16, 0.99, torch.device("cpu"))
    assert 0 < model.mask_token.abs().max() < 0.1
    assert masks.sum(dim=1).tolist() == [15, 15]
    randomize(model).train()(build_images(2), masks).loss.backward()
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}

    assert {name for name, weight in model.named_parameters() if weight.grad is None} == frozen
    assert frozen
    assert all(name.startswith("vitcls.pooler.") for name in frozen)
    # As in SimMIM.
    assert model.vitcls.config.mim_loss == "l1"
    assert not model.vitcls.config.norm_pixel_target
