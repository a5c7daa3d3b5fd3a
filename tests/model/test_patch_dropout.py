"""Patch dropout: training uses some patches, with their positions, masks and rotations."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    assert_same_outputs,
    build_images,
    build_tiny_config,
    get_largest_difference,
    randomize,
    save_and_load,
)

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel


TOKENS: dict[str, Any] = {
    "num_cls_tokens": 2,
    "num_distillation_tokens": 1,
    "num_register_tokens": 3,
}
PREFIX = 6  # register tokens among them
MASK = torch.ones(2, PREFIX + 16, dtype=torch.long)
MASK[1, 8:14] = 0

# Sources of masks and positions; rotary positions may differ between layers and heads.
SOURCES: dict[str, dict[str, Any]] = {
    "learned": {},
    "rotary": {"position_embedding_type": "rope_2d"},
    "mixed rotary": {"position_embedding_type": "rope_mixed", "attention_head_size": 12},
    "scopes": {"cls_scopes": [[2, 2, 0, 1], [2, 2, 1, 0]]},
    "gates": {"gated_tokens": {"registers": 2}, "position_embedding_type": "sincos_2d"},
    "distances": {"relative_position_bias": "layer"},
    "no special tokens": {
        "num_cls_tokens": 0,
        "num_distillation_tokens": 0,
        "num_register_tokens": 0,
    }
    | {"pooling": "mean", "position_embedding_type": "rope_2d"},
}
CASES: list[Any] = [(source, "sdpa", None) for source in SOURCES]
CASES += [(source, "sdpa", MASK) for source in ("rotary", "scopes", "gates", "distances")]
CASES += [("scopes", "eager", None), ("gates", "eager", MASK)]
CASES += [("rotary", "flash_attention_2", MASK)]


def record_kept_patches(model: ViTCLSModel) -> list[torch.Tensor]:
    """Return a list that collects the indices [B, n] of the kept patches of each pass."""
    found: list[torch.Tensor] = []
    choose = model.patch_dropout.choose_patches

    def note(hidden_states: torch.Tensor) -> torch.Tensor:
        found.append(choose(hidden_states))
        return found[-1]

    model.patch_dropout.choose_patches = note
    return found


@torch.no_grad()
@pytest.mark.usefixtures("flash_attention")
@pytest.mark.parametrize(("source", "implementation", "mask"), CASES)
def test_training_equals_evaluation_on_the_kept_patches(
    source: str, implementation: str, mask: torch.Tensor | None
) -> None:
    """If the dropped patches are masked for all tokens, the states are the same."""
    model = randomize(
        ViTCLSModel(build_tiny_config(**(TOKENS | SOURCES[source]), patch_drop_rate=0.4))
    )
    prefix = model.config.token_layout.num_prefix_tokens
    mask = None if mask is None else mask[:, PREFIX - prefix :]
    # `set_attn_implementation` requires the package of flash attention
    model.config._attn_implementation = implementation
    kept = record_kept_patches(model)

    found = model.train()(build_images(), attention_mask=mask, output_hidden_states=True)
    assert kept[0].shape == (2, 10)
    assert kept[0].diff().min() > 0
    assert not kept[0][0].equal(kept[0][1])

    visible = torch.zeros(2, prefix + 16, dtype=torch.long)
    visible[:, :prefix] = 1
    visible.scatter_(1, kept[0] + prefix, 1)
    visible *= 1 if mask is None else mask
    wanted = model.eval()(build_images(), attention_mask=visible, output_hidden_states=True)

    places = torch.cat([torch.arange(prefix).expand(2, -1), kept[0] + prefix], dim=1).unsqueeze(-1)
    for one, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
        assert get_largest_difference(one, other.take_along_dim(places, dim=1)) <= 2e-5
    assert len(kept) == 1
    assert found.tokens["patches"].shape == (2, 10, 16)


@torch.no_grad()
def test_evaluation_and_weights_do_not_change(tmp_path: Path) -> None:
    plain = randomize(ViTCLSForImageClassification(build_tiny_config(**TOKENS)))
    model = randomize(
        ViTCLSForImageClassification(build_tiny_config(**TOKENS, patch_drop_rate=0.5))
    )

    assert plain.state_dict().keys() == model.state_dict().keys()
    assert_same_outputs(model(build_images()), plain(build_images()))
    assert (
        get_largest_difference(
            model.train()(build_images()).logits, plain.train()(build_images()).logits
        )
        > 1e-3
    )

    again = save_and_load(model, tmp_path)
    assert again.config.patch_drop_rate == 0.5
    assert_same_outputs(again(build_images()), plain.eval()(build_images()))
    assert (tmp_path / "variants_vitcls.py").is_file()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_uses_the_same_patches(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        fields = TOKENS | {"position_embedding_type": "rope_2d", "relative_position_bias": "layer"}
        model = randomize(
            ViTCLSForImageClassification(build_tiny_config(**fields, patch_drop_rate=0.5))
        ).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        model(build_images(), labels=torch.tensor([0, 2])).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        # DDP waits for the gradients of all parameters
        assert all(gradient is not None for gradient in gradients[-1])
    assert_same_outputs(*gradients, 1e-6)


def test_kept_patches_are_random_and_reproducible() -> None:
    model = randomize(ViTCLSModel(build_tiny_config(patch_drop_rate=0.5))).train()
    kept = record_kept_patches(model)
    counts = torch.zeros(16)
    for seed in range(100):
        torch.manual_seed(seed)
        model.patch_dropout(torch.zeros(4, 17, 16), None, None)
        counts += torch.bincount(kept[-1].flatten(), minlength=16)

    assert counts.min() > 150
    assert counts.max() < 250  # expected 200, with a standard deviation of 10

    torch.manual_seed(99)
    model(build_images(4))

    assert kept[-1].equal(kept[-2])

    model = randomize(ViTCLSModel(build_tiny_config(patch_drop_rate=0.99))).train()
    assert model(build_images()).tokens["patches"].shape == (2, 1, 16)
