"""Token merging: groups of patches, weighting by size, unmerged special tokens; without it, nothing changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    assert_same_outputs,
    build_images,
    build_tiny_config,
    get_largest_difference,
    raises_one_line,
    randomize,
    record_outputs,
    save_and_load,
)
from torch.nn.functional import normalize

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSModel,
)
from modeling_vitcls.blocks_vitcls import ViTCLSLayer
from modeling_vitcls.variants_vitcls import MergedGroups, MergingAttention, MergingLayer, match_similar_patches


TOKENS: dict[str, Any] = {"num_cls_tokens": 2, "num_distillation_tokens": 1, "num_register_tokens": 3}
PREFIX = 6  # register tokens among them


def build_classifier(number: int, **fields: Any) -> Any:
    """Return a model that merges `number` patches per layer, with the same weights for any number."""
    return randomize(
        ViTCLSForImageClassification(build_tiny_config(**(TOKENS | fields), merged_patches_per_layer=number))
    )


def record_groups(model: Any) -> list[list[tuple[torch.Tensor, MergedGroups]]]:
    """Return one list per layer that collects its outputs: hidden states and groups."""
    return [record_outputs(layer) for layer in model.base_model.layers]


def build_two_color_images(seed: int = 0) -> torch.Tensor:
    """Return images [2, 3, 32, 32] with 16 patches of two colors at random positions."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(2, 3, 8, 8, generator=generator)
    places = torch.randint(0, 2, (2, 4, 4), generator=generator)
    return kinds[places].permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)


def test_zero_merged_patches_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modeling_vitcls.modeling_vitcls.run_merging_layers", None)  # must not be called
    model = ViTCLSModel(build_tiny_config())
    model(build_images())
    assert {type(layer) for layer in model.layers} == {ViTCLSLayer}
    assert not any(isinstance(layer.attention, MergingAttention) for layer in model.layers)
    assert [*model.state_dict()] == [*ViTCLSModel(build_tiny_config(merged_patches_per_layer=2)).state_dict()]


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["cls", "mean", "attention"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("number", [1, 4])
def test_merging_equal_patches_changes_nothing(pooling: str, implementation: str, number: int) -> None:
    """This requires averages weighted by size, and attention proportional to size."""
    fields: dict[str, Any] = {"position_embedding_type": "none", "pooling": pooling, "num_hidden_layers": 3}
    fields["layer_scale_init_value"] = 1.0  # random values replace this value
    plain, merging = (build_classifier(merged, **fields) for merged in (0, number))
    for model in (plain, merging):
        model.set_attn_implementation(implementation)
    outputs = record_groups(merging)
    equal = build_images(2, 8, 8).repeat(1, 1, 4, 4)
    for pixel_values in (equal, build_two_color_images()):
        found, wanted = (model(pixel_values, output_hidden_states=True) for model in (merging, plain))
        assert_same_outputs(found.hidden_states, wanted.hidden_states, 2e-5)
        assert_same_outputs(found.logits, wanted.logits, 2e-5)
        # the last layer computes only some tokens
        assert_same_outputs(merging(pixel_values).logits, wanted.logits, 2e-5)
    assert [states.shape[1] for states, _ in outputs[2]] == 2 * ([22, 3] if pooling == "cls" else [22, 22])
    _, groups = outputs[2][0]
    assert groups.sizes.max() > 1 and groups.sizes.shape == (2, PREFIX + 16 - 3 * number)


@torch.no_grad()
def test_patches_of_one_color_are_merged() -> None:
    """Patches of different colors are never merged."""
    model = build_classifier(4, position_embedding_type="none")
    outputs, pixel_values = record_groups(model), build_two_color_images()
    model(pixel_values, output_hidden_states=True)
    kinds = pixel_values[:, 0, ::8, ::8].flatten(1)  # [2, 16]
    group_index = outputs[-1][0][1].group_index[:, PREFIX:]
    together = group_index[:, :, None] == group_index[:, None, :]
    assert together.sum() > 2 * 16
    assert (kinds[:, :, None] == kinds[:, None, :])[together].all()


@torch.no_grad()
def test_special_tokens_are_kept_and_merged_patches_share_a_state() -> None:
    model = build_classifier(3, num_hidden_layers=4)
    outputs = record_groups(model)
    states = model(build_images(), output_hidden_states=True).hidden_states
    for index, (((_, group),), state) in enumerate(zip(outputs, states[1:], strict=True)):
        left = 16 - 3 * (index + 1)
        assert group.sizes.shape == (2, PREFIX + left) and group.sizes.sum(1).tolist() == [PREFIX + 16] * 2
        assert group.sizes[:, :PREFIX].eq(1).all()
        assert group.group_index[:, :PREFIX].eq(torch.arange(PREFIX)).all()
        assert group.group_index[:, PREFIX:].min() >= PREFIX
        assert state.shape == (2, PREFIX + 16, 16)
        assert_same_outputs(group.expand(group.collect(state)), state)
        assert group.member_index.diff(dim=1).min() > 0  # tokens keep their order


@torch.no_grad()
def test_patches_are_compared_by_their_mean_keys() -> None:
    attention = randomize(MergingAttention(build_tiny_config(attn_implementation="eager")))
    tokens = build_images(2, 5, 16, channels=1)[:, 0]
    _, keys = attention(tokens)
    assert_same_outputs(keys, attention.k_proj(tokens).unflatten(-1, (2, 8)).mean(dim=2), 1e-6)


def test_matching_and_averages_equal_the_paper() -> None:
    """Compare with loops over individual tokens, for two rounds of merging."""
    tokens, groups = build_images(2, 11, 5, channels=1)[:, 0], None
    groups = MergedGroups.from_tokens(tokens)
    members = [[[place] for place in range(11)] for _ in range(2)]
    for seed, num_pairs in ((0, 3), (1, 4)):
        keys = build_images(2, tokens.shape[1], 7, channels=1, seed=seed)[:, 0]
        sources, targets = match_similar_patches(keys, num_pairs)
        merged, after = groups.merge(tokens, sources, targets)
        for image in range(2):
            cosines = normalize(keys[image], dim=-1) @ normalize(keys[image], dim=-1).T
            proposals = [
                max((cosines[one, other].item(), one, other) for other in range(1, len(cosines), 2))
                for one in range(0, len(cosines), 2)
            ]
            best = sorted(proposals, reverse=True)[:num_pairs]
            joined = {one: other for _, one, other in best}
            assert dict(zip(sources[image].tolist(), targets[image].tolist(), strict=True)) == joined
            new = [
                sorted(sum((members[image][source] for source in joined if joined[source] == token), list(own)))
                for token, own in enumerate(members[image])
                if token not in joined
            ]
            sums = [
                sum(
                    tokens[image, token] * len(members[image][token])
                    for token in range(len(members[image]))
                    if members[image][token][0] in group
                )
                for group in new
            ]
            wanted = torch.stack([total / len(group) for total, group in zip(sums, new, strict=True)])
            assert get_largest_difference(merged[image], wanted) <= 1e-6
            assert after.sizes[image].tolist() == [len(group) for group in new]
            for token, group in enumerate(new):
                assert (after.group_index[image] == token).nonzero().flatten().tolist() == group
                assert after.member_index[image, token].item() in group
            members[image] = new
        tokens, groups = merged, after


@torch.no_grad()
def test_every_model_class_keeps_its_shapes(tmp_path: Path) -> None:
    plain, model = build_classifier(0), build_classifier(4)
    assert get_largest_difference(model(build_images()).logits, plain(build_images()).logits) > 1e-4
    again = save_and_load(model, tmp_path)
    assert_same_outputs(again(build_images()), model(build_images()))
    assert (tmp_path / "variants_vitcls.py").is_file()
    off = ViTCLSForImageClassification.from_pretrained(tmp_path, merged_patches_per_layer=0)
    assert_same_outputs(off(build_images()), plain(build_images()))
    for size in ((8, 8), (24, 56), (16, 8)):  # one patch, and more patches than the native image size has
        assert model(build_images(1, *size)).logits.shape == (1, 3)
    fields = {"merged_patches_per_layer": 5, "image_size": [32, 16]}
    backbone = randomize(ViTCLSBackbone(build_tiny_config(**fields, out_indices=[0, 1, 2])))
    assert [each.shape for each in backbone(build_images(2, 32, 16)).feature_maps] == [(2, 16, 4, 2)] * 3
    masked = randomize(ViTCLSForMaskedImageModeling(build_tiny_config(**fields)))
    reconstruction = masked(build_images(2, 32, 16), bool_masked_pos=torch.arange(16).view(2, 8) % 2).reconstruction
    assert reconstruction.shape == (2, 3, 32, 16)
    assert build_classifier(4).bfloat16()(build_images().bfloat16()).logits.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_gradient_checkpointing_and_patch_dropout(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build_classifier(3, patch_drop_rate=0.25, pooling="cls_mean").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        model(build_images(), labels=torch.tensor([0, 2])).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert all(gradient is not None for gradient in gradients[-1])
    assert_same_outputs(*gradients, 1e-6)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compiling_to_one_graph(backend: str) -> None:
    """Check also other batch sizes and image sizes."""
    assert ViTCLSForImageClassification._can_compile_fullgraph
    model = build_classifier(3)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for pixel_values in (build_images(2), build_images(3), build_images(2, 48, 32)):
        assert_same_outputs(compiled(pixel_values).logits, model(pixel_values).logits, 1e-5)


IMPOSSIBLE = [
    {"position_embedding_type": "rope_2d"},
    {"position_embedding_type": "learned_rope_mixed"},
    {"relative_position_bias": "layer"},
    {"cls_scopes": ["image"]},
    {"num_register_tokens": 1, "gated_tokens": {"registers": 1}},
    {"num_register_tokens": 1, "register_neurons": [[0, 1]]},
    {"attention_type": "differential"},
    {"layer_type": "parallel"},
    {"layer_type": "post"},
]


@pytest.mark.parametrize("fields", IMPOSSIBLE, ids=str)
def test_incompatible_options_are_errors(fields: dict[str, Any]) -> None:
    build_tiny_config(**fields)
    with raises_one_line("merged_patches_per_layer=2", [*fields][-1]):
        build_tiny_config(**fields, merged_patches_per_layer=2)


@torch.no_grad()
def test_unsupported_attention_is_an_error() -> None:
    model = build_classifier(2)
    with raises_one_line("attention_mask", "merged_patches_per_layer=0"):
        model(build_images(), attention_mask=torch.tensor([[1] * 22, [1] * 20 + [0] * 2]))
    with raises_one_line("merged_patches_per_layer=0"):
        model.token_attention(build_images())
    model.set_attn_implementation("eager")
    for as_argument in (True, False):
        model.config.output_attentions = not as_argument
        with raises_one_line("merged_patches_per_layer=0"):
            model(build_images(), **({"output_attentions": True} if as_argument else {}))
    model.config.output_attentions = False
    model.config._attn_implementation = "flash_attention_2"  # the package need not be installed
    with raises_one_line("merged_patches_per_layer", "flash_attention_2"):
        model(build_images())
    assert type(model.vitcls.layers[0]) is MergingLayer


@torch.no_grad()
def test_heads_split_by_tensor_parallelism_are_an_error() -> None:
    """Each process would merge patches by the keys of its own heads."""
    model = build_classifier(2)
    attention = model.vitcls.layers[0].attention
    for name in ("q_proj", "k_proj", "v_proj"):
        setattr(attention, name, torch.nn.Linear(16, 8))  # one of two heads
    with raises_one_line("does not support tensor parallelism", "merged_patches_per_layer=0"):
        model(build_images())
