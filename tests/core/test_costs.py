"""`model.flops()` compared with torch's counter, and the measured GEMM peak."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.tiny_models import BLOCKS, LAYOUTS, build_images, build_tiny_config, each_kind, raises_one_line, randomize
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification, ViTCLSModel


# Fields that change the matrix products, in addition to the fields of all tests.
OTHERS: dict[str, dict[str, Any]] = {
    "parallel": {"layer_type": "parallel"},
    "post": {"layer_type": "post"},
    "rmsnorm": {"norm_type": "rmsnorm"},
    "differential": {"attention_type": "differential"},
    "more_norms": {"attention_norm": True, "mlp_norm": True},
    "attention_pooling_of_all": {
        "pooling": "attention",
        "attention_pool_tokens": "all",
        "attention_pool_intermediate_size": 40,
    },
    "attention_pooling_without_mlp": {"pooling": "attention", "attention_pool_mlp": False},
    "pooled_layer": {"pooled_activation": "tanh", "pooled_norm": True},
    "concatenated": {"num_cls_tokens": 3, "cls_pooling": "concat"},
    "cls_mean": {"pooling": "cls_mean"},
    "other_head_size": {"attention_head_size": 32},
    "gates": {"num_register_tokens": 2, "gated_tokens": {"registers": 1}},
    "distances": {"relative_position_bias": "layer"},
    "register_neurons": {"num_register_tokens": 1, "register_neurons": [[1, 2]]},
    "rope_mixed": {"position_embedding_type": "rope_mixed"},
    "antialias": {"position_antialias": True},
}
CASES = LAYOUTS | BLOCKS | OTHERS
each_case = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)


def count_attention_flops(query: tuple, key: tuple, value: tuple, *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of attention, from the shapes of its inputs."""
    return sdpa_flop_count(query, key, value)


def count_flops(call: Callable[[], Any]) -> int:
    """Return the FLOPs that torch counts; older versions do not count the CPU's fused attention."""
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention_flops}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


# Operations


@pytest.mark.slow
@each_case
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_flops_equal_those_of_torch(fields: dict[str, Any], attention: str) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))
    model.set_attn_implementation(attention)
    assert model.flops() == count_flops(lambda: model(build_images(1)))
    larger = count_flops(lambda: model(build_images(3, 40, 56)))
    assert model.flops([40, 56], batch_size=3) == larger


@each_kind
def test_flops_of_all_model_classes(model_class: type, fields: dict[str, Any], inputs: dict[str, Any]) -> None:
    model = randomize(model_class(build_tiny_config(**fields, num_channels=1, patch_drop_rate=0.5)))
    wanted = count_flops(lambda: model(build_images(2, 32, 40, channels=1)))
    assert model.flops((32, 40), batch_size=2) == wanted
    assert model.config._attn_implementation == "sdpa"


def test_flops_with_patches_that_are_not_square() -> None:
    config = build_tiny_config(patch_size=[8, 4], image_size=[24, 32], num_register_tokens=2)
    model = randomize(ViTCLSForImageClassification(config))
    assert model.flops() == count_flops(lambda: model(build_images(1, 24, 32)))


def test_flops_of_all_tokens_in_the_last_layer() -> None:
    """A classifier computes the last layer for the tokens that it reads, an encoder for all tokens."""
    config = build_tiny_config(num_register_tokens=4)
    classifier, encoder = ViTCLSForImageClassification(config), ViTCLSModel(config)
    head = 2 * 16 * 3
    assert classifier.flops() - head < encoder.flops() == count_flops(lambda: encoder(build_images(1)))
    config.output_hidden_states = True
    assert classifier.flops() - head == encoder.flops() == count_flops(lambda: classifier(build_images(1))) - head


def test_flops_on_the_meta_device() -> None:
    """ViT-B/16 at 224 pixels has 17.6 billion multiply-adds."""
    with torch.device("meta"):
        model = ViTCLSModel(ViTCLSConfig())
    assert round(model.flops() / 2e9, 1) == 17.6


def test_images_that_are_too_small() -> None:
    with raises_one_line("32 x 7", "8 x 8"):
        ViTCLSModel(build_tiny_config()).flops((32, 7))


# The machine
