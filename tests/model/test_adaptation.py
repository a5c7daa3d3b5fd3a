"""Adaptation of trained models to other tokens, image sizes and patch sizes.

Models are adapted by `from_pretrained(..., field=value)` and `adapt`.

Unchanged weights (kept and removed tokens) must be equal to the bit. Resampled weights are compared
with PyTorch's interpolation, and patch kernels with timm's. Fading in is tested in
test_gates.py.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adaptation_cases import adapt_with_loader, get_logged_lines
from helpers.tiny_models import (
    BLOCKS,
    IMAGES,
    PARAMETERS,
    assert_same_bits,
    build_images,
    build_random,
    build_tiny_config,
    get_largest_difference,
    raises_one_line,
)
from peft import LoraConfig, get_peft_model
from pytest import LogCaptureFixture
from timm.layers import resample_abs_pos_embed
from timm.layers.patch_embed import resample_patch_embed
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageClassification, QuantoConfig

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.model.positions_vitcls import resize_patch_kernel
from modeling_vitcls.model.token_layout_vitcls import COUNT_FIELDS


pytestmark = pytest.mark.usefixtures("no_grad")

# Name -> class that saves, class that loads.
LOADERS = {
    "model": (ViTCLSModel, ViTCLSModel),
    "auto_classifier": (ViTCLSForImageClassification, AutoModelForImageClassification),
    "masked": (ViTCLSForMaskedImageModeling, ViTCLSForMaskedImageModeling),
    "backbone": (ViTCLSBackbone, ViTCLSBackbone),
    "loaded": (ViTCLSForImageClassification, None),  # `adapt` of a loaded model
}

# Changes of a checkpoint with 2 CLS, 1 distillation and 2 register tokens, images of 32 x 48 and
# patches of 8 x 8.
CHANGES = {
    "registers": {"num_register_tokens": 6},
    "none_left": {"num_cls_tokens": 1, "num_distillation_tokens": 0, "num_register_tokens": 0},
    "image": {"image_size": [24, 64]},
    "patch_height": {"patch_size": [4, 8]},
    "everything": {
        "num_cls_tokens": 3,
        "num_distillation_tokens": 2,
        "num_register_tokens": 6,
        "image_size": 64,
        "patch_size": 16,
    },
}
COUNTS = {"num_cls_tokens": 2, "num_distillation_tokens": 1, "num_register_tokens": 2}
FIELDS_THAT_ADAPT = {**COUNTS, "image_size": [32, 48]}
FIELDS = FIELDS_THAT_ADAPT | {"position_embedding_tokens": "all"}


# All weights


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize(("saver", "loader"), LOADERS.values(), ids=LOADERS)
def test_adapted_models_keep_their_tokens_and_resample_their_patches(
    saver: Any, loader: Any, change: Fields, tmp_path: Path
) -> None:
    old = build_random(saver, **FIELDS)
    new = adapt_with_loader(old, loader, tmp_path, token_fade_in_steps=0, **change)

    assert type(new) is saver
    assert not new.training
    for field, value in (COUNTS | change).items():
        assert getattr(new.config, field) == value
    assert new.base_model.config is new.config
    assert_adapted(old, new)

    outputs = new(build_images(1, *new.config.image_height_width))
    assert all(
        value.isfinite().all() for value in outputs.values() if isinstance(value, torch.Tensor)
    )


def assert_adapted(old: Any, new: Any) -> None:
    """Check that the first tokens are kept, patches are resampled, and other weights are unchanged.

    The positions of the first tokens are kept as well.
    """
    before = old.state_dict()
    after = new.state_dict()
    prefix = "" if old.base_model is old else "vitcls."
    expected = dict(before)
    for group, token in PARAMETERS.items():
        for name in (
            f"{prefix}embeddings.{token}",
            f"{prefix}embeddings.position_embeddings.{group}",
        ):
            count = getattr(new.config, COUNT_FIELDS[group])
            tokens = expected.pop(name)
            assert (name in after) == (count > 0)
            if count:
                found = after.pop(name)
                kept = min(count, tokens.shape[1])
                assert found.shape[1] == count
                assert torch.equal(found[:, :kept], tokens[:, :kept])
                assert found[:, kept:].any() == ("position" not in name and count > kept)
    name = f"{prefix}embeddings.position_embeddings.patches"
    grids = (new.config.grid_size, old.config.grid_size)
    resampled = resample_abs_pos_embed(expected.pop(name), *grids, 0, antialias=False)
    assert torch.equal(after.pop(name), resampled)
    kernels = [
        name
        for name in before
        if "patch_embeddings.projection.weight" in name or "decoder." in name
    ]
    for name in kernels:
        weight = after.pop(name)
        kernel = expected.pop(name)
        if old.config.patch_height_width == new.config.patch_height_width:
            assert torch.equal(weight, kernel)
        elif "decoder" not in name:
            resized = resize_patch_kernel(kernel, new.config.patch_height_width)
            assert_close(weight, resized)
    if not new.config.num_distillation_tokens:
        expected = {
            name: weight
            for name, weight in expected.items()
            if "distillation_classifier" not in name
        }
    assert_same_bits(after, expected)


def test_the_source_model_is_unchanged() -> None:
    model = build_random(ViTCLSForImageClassification, **FIELDS)
    before = copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    changed = model.adapt(**CHANGES["everything"])
    for parameter in changed.parameters():
        parameter.add_(1)

    assert_same_bits(model.state_dict(), before)
    assert model.config.to_dict() == config


def test_nothing_changes_without_a_change(caplog: LogCaptureFixture, tmp_path: Path) -> None:
    model = build_random(ViTCLSForImageClassification, **FIELDS)
    assert model.adapt(**FIELDS_THAT_ADAPT) is model
    model.save_pretrained(tmp_path)
    for loader in (ViTCLSForImageClassification, AutoModelForImageClassification):
        again = loader.from_pretrained(tmp_path, **FIELDS_THAT_ADAPT)
        assert_same_bits(again.state_dict(), model.state_dict())
    assert not get_logged_lines(caplog)


def test_new_parameters_of_a_frozen_model_are_trainable() -> None:
    model = build_random(ViTCLSForImageClassification).requires_grad_(False).train()
    changed = model.adapt(num_register_tokens=2, num_distillation_tokens=1, image_size=48)

    assert changed.training
    assert {name for name, parameter in changed.named_parameters() if parameter.requires_grad} == {
        "vitcls.embeddings.register_tokens",
        "vitcls.embeddings.distillation_token",
        "distillation_classifier.weight",
        "distillation_classifier.bias",
    }


def test_new_tokens_of_a_frozen_group_are_frozen_and_a_line_says_so(
    caplog: LogCaptureFixture,
) -> None:
    model = build_random(ViTCLSForImageClassification, num_register_tokens=2).requires_grad_(False)
    changed = model.adapt(num_register_tokens=4)
    assert not changed.vitcls.embeddings.register_tokens.requires_grad
    assert "register_tokens: 2 kept, 0 dropped, 2 added; frozen, as before" in caplog.text


# Tokens


@pytest.mark.parametrize("positions", ["patches", "cls", "all"])
def test_adding_and_removing_tokens_restores_the_model(positions: str) -> None:
    model = build_random(ViTCLSForImageClassification, position_embedding_tokens=positions)
    larger = model.adapt(
        num_register_tokens=4, num_cls_tokens=3, num_distillation_tokens=1, token_fade_in_steps=0
    )
    wanted = model(IMAGES, output_hidden_states=True)
    between = larger(IMAGES).cls_logits
    found = larger.adapt(**{field: getattr(model.config, field) for field in COUNTS})(
        IMAGES, output_hidden_states=True
    )

    assert torch.equal(found.logits, wanted.logits)
    assert_same_bits(found.hidden_states, wanted.hidden_states)
    assert get_largest_difference(between, wanted.logits) > 1e-3


def test_distillation_tokens_are_multiplied_so_that_their_mean_stays() -> None:
    model = build_random(ViTCLSForImageClassification, num_distillation_tokens=2)
    with raises_one_line("num_distillation_tokens=3", "mean of the 2", "Choose 4"):
        model.adapt(num_distillation_tokens=3)
    logits = [each(IMAGES).logits for each in (model, model.adapt(num_distillation_tokens=4))]
    assert get_largest_difference(*logits) < 1e-5


def test_a_new_distillation_head_starts_as_the_classifier() -> None:
    for fields in ({}, {"head_type": "mlp"}):
        model = build_random(ViTCLSForImageClassification, **fields).adapt(
            num_distillation_tokens=1
        )
        classifier = model.classifier.state_dict()
        assert_same_bits(model.distillation_classifier.state_dict(), classifier)
    # 32 inputs
    wide = build_random(ViTCLSForImageClassification, pooling="cls_mean")
    assert wide.adapt(num_distillation_tokens=1).distillation_classifier.weight.shape == (3, 16)


@pytest.mark.parametrize("loader", [ViTCLSForImageClassification, AutoModelForImageClassification])
def test_tokens_and_pooling_change_together(loader: Any, tmp_path: Path) -> None:
    """Each pooling is possible only with the tokens that change together with it."""
    without = build_random(ViTCLSForImageClassification, num_cls_tokens=0, pooling="mean")
    without.save_pretrained(tmp_path / "without")
    gained = loader.from_pretrained(tmp_path / "without", num_cls_tokens=1, pooling="cls")

    assert torch.equal(gained.classifier.weight, without.classifier.weight)
    assert gained(IMAGES).logits.isfinite().all()

    gained.save_pretrained(tmp_path / "with")
    lost = loader.from_pretrained(tmp_path / "with", num_cls_tokens=0, pooling="mean")

    assert torch.equal(lost(IMAGES).logits, without(IMAGES).logits)


# Configurations


@pytest.mark.parametrize("loader", [ViTCLSModel, AutoModel])
def test_a_configuration_object_adapts_the_model_and_is_not_changed(
    loader: Any, tmp_path: Path
) -> None:
    model = build_random(ViTCLSModel)
    model.save_pretrained(tmp_path)
    config = build_tiny_config(num_register_tokens=2, image_size=48)
    before = config.to_dict()
    for more in ({}, {"num_distillation_tokens": 1}):
        larger = loader.from_pretrained(tmp_path, config=config, **more)
        assert larger.embeddings.register_tokens.shape[1] == 2
        assert (larger.embeddings.distillation_token is None) == (not more)
        assert torch.equal(larger.embeddings.cls_token, model.embeddings.cls_token)
    assert config.to_dict() == before


def test_impossible_changes_are_errors_with_a_remedy_that_works(tmp_path: Path) -> None:
    zeros = build_random(ViTCLSModel, token_init="zeros", num_register_tokens=1)
    with raises_one_line('token_init="trunc_normal"'):
        zeros.adapt(num_register_tokens=4)
    tokens = zeros.adapt(
        num_register_tokens=4, token_init="trunc_normal"
    ).embeddings.register_tokens
    assert (tokens[:, 1:].std(dim=1) > 0).all()
    pooled = build_random(ViTCLSModel, pooling="attention", attention_pool_tokens="all")
    with raises_one_line("token_fade_in_steps=0"):
        pooled.adapt(num_register_tokens=4)
    assert pooled.adapt(num_register_tokens=4, token_fade_in_steps=0).fade_in is None

    model = build_random(ViTCLSModel, tasks={"age": 2})
    model.save_pretrained(tmp_path)
    load = partial(ViTCLSModel.from_pretrained, tmp_path)
    for adapt, change, *words in (
        (model.adapt, {"hidden_size": 32}, "hidden_size", "num_register_tokens"),
        (model.adapt, {"image_size": 30}, "image_size", "24 or 32"),
        (model.adapt, {"num_cls_tokens": 2}, "tasks", "num_cls_tokens"),
        (load, {"num_register_tokens": -1}, "num_register_tokens", "-1"),
        (
            load,
            {"tasks": {"a": 2, "age": 2}, "num_cls_tokens": 2},
            "'age' would read the CLS token",
        ),
    ):
        with raises_one_line(*words):
            adapt(**change)


# Grids and patches


@pytest.mark.parametrize(
    "fields",
    [
        {"position_offset": 0.1},  # as in DINO
        {"position_interpolation": "crop"},  # as in RADIO
        {"position_embedding_type": "sincos_2d"},
        {"position_embedding_type": "rope_2d"},
        {"position_embedding_type": "learned_rope_mixed", "position_offset": 0.1},
        {"position_embedding_type": "none"},
        {"relative_position_bias": "layer"},
        {"relative_position_bias": "shared"},
    ],
    ids=str,
)
def test_adapting_equals_running_with_larger_images(fields: Fields) -> None:
    """The tests of conversions compare images of other sizes with the authors' code."""
    model = build_random(ViTCLSModel, image_size=[32, 48], **fields)
    wanted = model(build_images(2, 48, 24)).last_hidden_state
    found = model.adapt(image_size=[48, 24])(build_images(2, 48, 24)).last_hidden_state
    assert get_largest_difference(found, wanted) < 1e-5


@pytest.mark.parametrize(
    ("size", "new_size"), [((8, 8), (4, 4)), ((8, 8), (5, 7)), ((4, 16), (16, 16))]
)
def test_patch_kernels_are_the_best_fit(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    """As in FlexiViT: over white noise x, <resized x, new kernel> is nearest to <x, kernel>."""
    kernel = torch.randn(5, 3, *size)
    found = resize_patch_kernel(kernel, new_size)
    expected = resample_patch_embed(kernel, list(new_size), "bilinear", antialias=False)
    assert get_largest_difference(found, expected) < 1e-4
    assert resize_patch_kernel(kernel.double(), new_size).dtype == torch.float64


def test_validation_is_enabled_again_after_loading(tmp_path: Path) -> None:
    """Check that the flag that skips validation while a checkpoint is loaded is removed."""
    ViTCLSModel(build_tiny_config()).save_pretrained(tmp_path)
    loaded = ViTCLSModel.from_pretrained(tmp_path, num_register_tokens=1)
    loaded.config.num_cls_tokens = 0
    with raises_one_line("num_cls_tokens"):
        ViTCLSModel(loaded.config)
    assert "_skip_validation" not in loaded.config.to_dict()


# Every kind of token ------------------------------------------------------------------------------


ALL_LAYERS = [-3, -2, -1]
CLASSIFIERS = {
    "CLS": {},
    "CLS of several layers": {"pooled_layers": ALL_LAYERS},
    "CLS and patches of several layers": {"pooling": "cls_mean", "pooled_layers": ALL_LAYERS},
    "patches": {"pooling": "mean"},
    "no CLS": {"pooling": "mean", "num_cls_tokens": 0},
    "mean of one CLS": {"cls_pooling": "mean"},
    "mean of two CLS": {"cls_pooling": "mean", "num_cls_tokens": 2},
    "second CLS": {"cls_pooling": "mean", "num_cls_tokens": 2, "pooled_cls_tokens": [1]},
    "concatenated": {"cls_pooling": "concat", "num_cls_tokens": 2, "pooled_layers": [-2, -1]},
    "concatenated and patches": {"cls_pooling": "concat", "pooling": "cls_mean"},
    "concatenated and normed": {"cls_pooling": "concat", "pooled_norm": True},
    "concatenated with an activation": {"cls_pooling": "concat", "pooled_activation": "tanh"},
    "positions of all tokens": {"position_embedding_tokens": "all"},
    "MLP head": {"head_type": "mlp"},
    "two heads": {"num_distillation_tokens": 1},
    "relative positions": {"position_embedding_type": "none", "relative_position_bias": "shared"},
    "relative positions of layers": {"relative_position_bias": "layer"},
    "rotary positions": {"position_embedding_type": "rope_2d"},
    "scopes": BLOCKS["scopes"],
    "parallel layers": {"layer_type": "parallel"},
}
ADDED = [
    {"num_distillation_tokens": 1},
    {"num_distillation_tokens": 2},
    {"num_register_tokens": 4},
    {"num_cls_tokens": 3},
    {"num_cls_tokens": 4, "num_distillation_tokens": 1, "num_register_tokens": 1},
]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("fields", CLASSIFIERS.values(), ids=CLASSIFIERS.keys())
def test_added_tokens_of_every_kind_leave_logits_and_patches_as_they_are(
    fields: Fields, implementation: str
) -> None:
    model = build_random(ViTCLSForImageClassification, num_hidden_layers=3, num_labels=5, **fields)
    model.set_attn_implementation(implementation)
    logits = model(IMAGES).logits
    patches = model.vitcls(IMAGES).tokens["patches"]
    for added in ADDED:
        if "cls_scopes" in fields and "num_cls_tokens" in added:
            continue  # The new CLS tokens would require scopes
        adapted = model.adapt(**added).eval()
        assert get_largest_difference(adapted(IMAGES).logits, logits) <= 1e-5, added
        found = adapted.vitcls(IMAGES).tokens["patches"]
        assert get_largest_difference(found, patches) <= 1e-5, added
    # otherwise, the test could not detect unused tokens
    opened = model.adapt(num_register_tokens=4, token_fade_in_steps=0)
    assert get_largest_difference(opened(IMAGES).logits, logits) > 1e-3


@pytest.mark.parametrize("loader", [ViTCLSForImageClassification, None], ids=["loaded", "adapt"])
def test_a_line_says_once_that_no_head_reads_a_new_cls_token(
    loader: Any, caplog: LogCaptureFixture, tmp_path: Path
) -> None:
    model = build_random(ViTCLSForImageClassification)
    adapted = adapt_with_loader(model, loader, tmp_path, num_cls_tokens=2).eval()
    assert caplog.text.count("no head reads the new CLS tokens") == 1
    assert adapted.config.cls_pooling == "first"
    assert get_largest_difference(adapted(IMAGES).logits, model(IMAGES).logits) <= 1e-5


def test_a_head_that_reads_a_new_cls_token_need_not_be_fitted_again(
    caplog: LogCaptureFixture, tmp_path: Path
) -> None:
    model = build_random(ViTCLSForImageClassification)
    model.save_pretrained(tmp_path)
    tokens = {"num_cls_tokens": 2, "cls_pooling": "mean"}
    adapted = ViTCLSForImageClassification.from_pretrained(tmp_path, **tokens).eval()
    assert "no head reads" not in caplog.text
    assert "Fit it again" not in caplog.text
    assert get_largest_difference(adapted(IMAGES).logits, model(IMAGES).logits) <= 1e-5


def test_a_distillation_token_is_a_twin_of_cls_until_a_teacher_trains_it() -> None:
    model = build_random(ViTCLSForImageClassification, num_labels=5, pooled_layers=[-2, -1])
    adapted = model.adapt(num_distillation_tokens=1).eval()
    outputs = adapted(IMAGES)
    assert get_largest_difference(outputs.distillation_logits, outputs.cls_logits) <= 1e-5
    assert adapted.config.distillation_inference == "mean"


@pytest.mark.parametrize("fields", [{"pooling": "mean"}, {"cls_scopes": [[2, 2, 0, 1]]}], ids=str)
def test_a_distillation_head_that_cannot_be_a_copy_is_random_and_not_read(
    fields: Fields, caplog: LogCaptureFixture
) -> None:
    """The head of the patches has another input, and a token with a scope sees a part of the image."""
    model = build_random(ViTCLSForImageClassification, **fields)
    adapted = model.adapt(num_distillation_tokens=1)
    assert adapted.config.distillation_inference == "cls"
    assert caplog.text.count("distillation_inference") == 1
    logits = [each(IMAGES).logits for each in (model, adapted)]
    assert get_largest_difference(*logits) < 1e-5


def test_the_token_of_a_second_task_is_a_twin_of_cls(tmp_path: Path) -> None:
    """As in `vitcls finetune`: a random one would start far behind."""
    saved = build_random(ViTCLSForImageClassification)
    saved.save_pretrained(tmp_path)
    model = ViTCLSForMultiTaskClassification.from_pretrained(
        tmp_path, tasks={"age": 2, "kind": 3}, num_cls_tokens=2
    )
    expected = saved.vitcls(IMAGES).last_hidden_state[:, 0]
    states = model.vitcls(IMAGES).last_hidden_state
    for index in range(2):
        assert get_largest_difference(states[:, index], expected) <= 1e-5


def test_quantized_weights_shortened_models_and_adapters_are_not_adapted(tmp_path: Path) -> None:
    model = ViTCLSForImageClassification(build_tiny_config())
    model.save_pretrained(tmp_path)
    with raises_one_line("while weights are quantized", "without quantization_config"):
        ViTCLSForImageClassification.from_pretrained(
            tmp_path, num_register_tokens=2, quantization_config=QuantoConfig(weights="int8")
        )
    shortened = copy.deepcopy(model)
    del shortened.vitcls.layers[-1]
    with raises_one_line("shortened"):
        shortened.adapt(num_register_tokens=2)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with raises_one_line("merge_and_unload"):
        adapted.adapt(num_register_tokens=2)
    assert adapted.merge_and_unload().adapt(num_register_tokens=2).config.num_register_tokens == 2


def test_gradient_checkpointing_stays_and_hooks_do_not() -> None:
    model = ViTCLSModel(build_tiny_config())
    model.gradient_checkpointing_enable()
    model.layers[0].register_forward_hook(lambda *_: None)
    adapted = model.adapt(num_register_tokens=2)
    assert all(layer.gradient_checkpointing for layer in adapted.layers)
    assert not adapted.layers[0]._forward_hooks
