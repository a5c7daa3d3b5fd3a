"""Random valid configurations build models that train and can be saved.

The examples are the same in every run. `HYPOTHESIS_PROFILE=explore` draws other examples, and more
of them.
"""

import os
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.tiny_models import assert_same_bits, build_images, list_tensors
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers.activations import ACT2FN
from transformers.utils import logging

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
    ViTCLSPreTrainedModel,
)
from modeling_vitcls.conversion.weight_rules import Fields


SLOW_IS_FINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("reproducible", max_examples=100, derandomize=True, **SLOW_IS_FINE)
settings.register_profile("explore", max_examples=2000, **SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "reproducible"))


@pytest.fixture(scope="module", autouse=True)
def hide_progress_bars() -> Iterator[None]:
    """Hide two progress bars for each example."""
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


CLASSES = [
    ViTCLSModel,
    ViTCLSForImageClassification,  # or the multi-task class, if there are tasks
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSBackbone,
]
# In an order that sorting changes. ModuleDict has attributes of two of these names.
NAMES = ["species", "age", "colour", "type", "keys"]


@st.composite
def cls_scopes(draw: st.DrawFn, grid: tuple[int, int]) -> Any:
    """Draw the part of the image to which one CLS token attends."""
    if draw(st.booleans()):
        return "image"
    rows, columns = (draw(st.integers(1, size)) for size in grid)
    return [rows, columns, draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))]


@st.composite
def valid_fields(draw: st.DrawFn) -> Fields:
    """Draw fields of a valid configuration of a tiny model."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    rows = draw(st.integers(1, 3))
    columns = draw(st.integers(1, 3))
    patch = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    positions = one_of("learned", "sincos_2d", "rope_2d", "none")
    heads = draw(st.integers(1, 3))
    num_layers = draw(st.integers(1, 3))
    counts = {
        f"num_{kind}_tokens": draw(st.integers(0, 3))
        for kind in ("cls", "distillation", "register")
    }
    fields: Fields = {
        **counts,
        "image_size": [rows * patch[0], columns * patch[1]],
        "patch_size": list(patch),
        "num_channels": draw(st.integers(1, 4)),
        "hidden_size": heads
        * (4 if positions in ("rope_2d", "sincos_2d") else 1)
        * draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_hidden_layers": num_layers,
        "intermediate_size": draw(st.integers(1, 9)),
        "hidden_act": one_of(*ACT2FN),
        "mlp_type": one_of("mlp", "swiglu"),
        "layer_norm_eps": one_of(1e-6, 1e-5),  # with 1e-12, gradients of equal values overflow
        "layer_scale_init_value": one_of(None, 0, 1e-5, 1),
        "position_embedding_type": positions,
        "position_embedding_tokens": one_of("patches", "cls", "all"),
        "pooling": one_of(
            "mean", "max", "attention", *(["cls", "cls_mean"] if counts["num_cls_tokens"] else [])
        ),
        "cls_pooling": one_of("first", "mean", "concat"),
        "head_type": one_of("linear", "mlp"),
        "hidden_dropout_prob": one_of(0, 0.1, 0.9),
        "attention_probs_dropout_prob": one_of(0, 0.1, 0.9),
        "drop_path_rate": one_of(0, 0.1, 0.9),
        "num_labels": draw(st.integers(0, 3)),
        "out_indices": one_of(None, [0], [num_layers], [0, num_layers]),
    }
    for name in (
        "use_mask_token",
        "qk_norm",
        "pre_norm",
        "qkv_bias",
        "projection_bias",
        "mlp_bias",
        "patch_bias",
        "apply_layernorm",
        "reshape_hidden_states",
    ):
        fields[name] = draw(st.booleans())
    for name in ("query_bias", "key_bias", "value_bias"):
        fields[name] = one_of(None, True, False)
    if counts["num_cls_tokens"] and draw(st.booleans()):
        fields["cls_scopes"] = [
            draw(cls_scopes((rows, columns))) for _ in range(counts["num_cls_tokens"])
        ]
    if counts["num_distillation_tokens"]:
        fields["distillation_head"] = one_of(None, True, False)
    choices = ["mean", "cls"]
    if counts["num_distillation_tokens"] and fields["distillation_head"] is not False:
        choices.append("distillation")
    fields["distillation_inference"] = one_of(*choices)
    # Several tokens of one kind that are initialized with zeros require positions, because they
    # would stay equal.
    fields["token_init"] = one_of(
        "trunc_normal", "near_zero", *(["zeros"] if max(counts.values()) < 2 else [])
    )
    if fields["pooling"] == "cls" and draw(st.booleans()):
        names = (
            NAMES[: counts["num_cls_tokens"]]
            if draw(st.booleans())
            else NAMES[-counts["num_cls_tokens"] :]
        )
        if "cls_scopes" in fields:  # in the alphabetical order of the tasks
            names = sorted(names)
        fields["tasks"] = {name: one_of(1, 3, ["only"], ["yes", "no"]) for name in names}
    return fields


def build_inputs(model: ViTCLSPreTrainedModel, height: int, width: int) -> dict[str, Any]:
    """Return two images, and the labels of the class."""
    config = model.config
    inputs = {"pixel_values": build_images(2, height, width, config.num_channels)}
    if isinstance(model, ViTCLSForImageClassification) and config.num_labels:
        inputs["labels"] = torch.tensor([0, config.num_labels - 1])
    if isinstance(model, ViTCLSForMultiTaskClassification):
        inputs["labels"] = {name: torch.tensor([0, -100]) for name in config.tasks}
    if isinstance(model, ViTCLSForMaskedImageModeling):
        (patch_height, patch_width) = config.patch_height_width
        patches = (height // patch_height) * (width // patch_width)
        inputs["bool_masked_pos"] = torch.arange(2 * patches).view(2, patches) % 2 == 0
    return inputs


def run_training_step(model: ViTCLSPreTrainedModel) -> None:
    """Run a forward and a backward pass, and check that all outputs and gradients are finite."""
    output = model.train()(**build_inputs(model, *model.config.image_height_width))
    results = list_tensors(output)
    assert results
    assert all(result.isfinite().all() for result in results)
    sum(result.float().sum() for result in results).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.slow
@given(
    fields=valid_fields(),
    model_class=st.sampled_from(CLASSES),
    more=st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_valid_configurations_train_and_can_be_saved(
    fields: Fields, model_class: type[ViTCLSPreTrainedModel], more: tuple[int, int]
) -> None:
    config = ViTCLSConfig(**fields)
    # Without a CLS token, this combination is an error; tests/model/test_models.py checks the
    # message.
    assume(
        model_class is not ViTCLSBackbone
        or config.reshape_hidden_states
        or config.num_cls_tokens > 0
    )
    if model_class is ViTCLSForImageClassification and config.tasks:
        model_class = ViTCLSForMultiTaskClassification
    torch.manual_seed(0)
    model = model_class(config)
    run_training_step(model)

    with tempfile.TemporaryDirectory() as folder:
        model.eval().save_pretrained(folder)
        loaded = model_class.from_pretrained(folder)
    assert loaded.config.token_layout == config.token_layout
    assert_same_bits(loaded.state_dict(), model.state_dict())
    # Native size and a larger one. Values may differ in the last bits: kernels depend on memory
    # alignment.
    native_height, native_width = config.image_height_width
    for height, width in (
        (native_height, native_width),
        (native_height + more[0], native_width + more[1]),
    ):
        inputs = build_inputs(model, height, width)
        before, after = (list_tensors(each(**inputs)) for each in (model, loaded))
        assert_close(after, before, rtol=1e-4, atol=1e-5)
