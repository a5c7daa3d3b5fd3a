"""Compare every plain ViT of transformers with its conversion, at two sizes.

The models are in transformers_cases.py.
"""

import copy

import pytest
import torch
import transformers
from helpers.source_checkpoints import refuses_conversion
from helpers.tiny_models import assert_same_bits, get_largest_difference
from pytest import LogCaptureFixture
from torch import nn

from modeling_vitcls import convert_from_transformers, convert_to_transformers
from modeling_vitcls.conversion.from_transformers import CONVERTIBLE_CLASSES
from modeling_vitcls.conversion.parity_report import compare_models
from modeling_vitcls.conversion.source_models import TransformersSource
from modeling_vitcls.conversion.weight_rules import ConversionError
from peers.transformers_cases import (
    CASES,
    PLAIN,
    RADIO,
    RATIO,
    Case,
    compute_outputs,
    compute_source_outputs,
    images,
)


LIMIT = 1e-5  # DESIGN.md, accuracy of equivalence
SIZES = [
    pytest.param(name, size, id=f"{name}-{size[0]}x{size[1]}")
    for name, c in CASES.items()
    for size in c.sizes
]


def assert_same(outputs: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for key, value in wanted.items():
        assert value.abs().max() > 0.1, f"{key} is too small for a comparison"
        difference = get_largest_difference(outputs[key], value)
        assert difference <= LIMIT, f"{key} differs by {difference:.1e}"


@pytest.mark.parametrize(("name", "size"), SIZES)
@torch.no_grad()
def test_converted_models_have_the_same_outputs(name: str, size: tuple[int, int]) -> None:
    source = CASES[name].build()
    wanted = compute_source_outputs(CASES[name], source, images(size))
    assert_same(compute_outputs(convert_from_transformers(source), images(size)), wanted)


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("vit of rectangles", {"cls", "patches", "pooled"}),
        (
            "deit distilled",
            {"cls", "distillation", "patches", "logits", "cls_logits", "distillation_logits"},
        ),
        ("mae", {"cls", "patches"}),
        ("clip projection", {"cls", "patches", "logits"}),
        ("metaclip 2 classifier", {"cls", "patches", "logits"}),
        ("siglip 2 classifier", {"patches", "logits"}),
        ("siglip with pixels over", {"patches", "pooled"}),
        ("beit cls classifier", {"cls", "patches", "logits"}),
    ],
)
def test_the_parity_report_compares_all_outputs_of_the_source(name: str, outputs: set[str]) -> None:
    """`TransformersSource` computes the outputs for the parity report, at both sizes."""
    source = TransformersSource(name, "", CASES[name].build(), [])
    if name == "mae":
        # as in published models; the comparison needs all patches
        source.model.config.mask_ratio = 0.75

    assert source.image_size == CASES[name].sizes[0]

    comparisons, reason = compare_models(source, source.convert())
    assert [set(comparison["differences"]) for comparison in comparisons] == [outputs] * (
        1 if reason else 2
    )
    assert bool(reason) == (name == "vit of rectangles")


def test_every_class_is_tested() -> None:
    assert {case.model for case in CASES.values()} == set(CONVERTIBLE_CLASSES)


@torch.no_grad()
def test_the_source_is_unchanged_and_shares_no_memory() -> None:
    source = CASES["radio"].build()
    before = copy.deepcopy(source.state_dict())
    model = convert_from_transformers(source)
    for parameter in model.parameters():
        parameter.zero_()
    assert_same_bits(source.state_dict(), before)


@pytest.mark.parametrize("name", ["vit classifier", "radio", "aimv2"])
def test_dtype_labels_and_mode_are_kept(name: str) -> None:
    source = CASES[name].build().to(torch.bfloat16).train()
    model = convert_from_transformers(source)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert source.training
    assert model.config.id2label == source.config.id2label
    assert model.config.label2id == source.config.label2id


class Subclass(transformers.ViTModel):
    """May compute anything."""


Subclass.__name__ = "ViTModel"

REFUSED = {
    "another architecture": (
        "SwinModel",
        {"depths": [1], "num_heads": [2]},
        {},
        "SwinModel cannot",
    ),
    "another task": (
        "ViTForMaskedImageModeling",
        PLAIN,
        {},
        "the encoder inside the model",
    ),
    "a wider pooler": (
        "ViTModel",
        PLAIN | {"pooler_output_size": 64},
        {},
        "pooler.dense.weight",
    ),
    "norms over heads": (
        "InternVLVisionModel",
        PLAIN | {"use_qk_norm": True},
        {},
        "q_norm.weight",
    ),
    "a pooler on a patch": (
        "IJepaModel",
        PLAIN,
        {"add_pooling_layer": True},
        "uses the first patch",
    ),
    "videos": (
        "RadioModel",
        RADIO | {"video_temporal_patch_size": 2},
        {},
        "video_patch_projection",
    ),
    "rectangular positions": (
        "Dinov2Model",
        RATIO | {"image_size": [16, 64]},
        {},
        "as a square grid",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_unsupported_models_are_refused_by_name(why: str) -> None:
    *class_and_values, message = REFUSED[why]
    source = Case(*class_and_values).build()
    if why == "videos" and not hasattr(source.embeddings, "video_patch_projection"):
        pytest.skip(f"transformers {transformers.__version__} has no RADIO for videos")
    with refuses_conversion(message):
        convert_from_transformers(source)


def test_edited_models_are_refused_in_both_directions() -> None:
    source = CASES["vit classifier"].build()
    ours = convert_from_transformers(source)
    source.vit.layernorm.eps = ours.vitcls.layernorm.eps = 1.0
    with refuses_conversion("differ", "Undo"):
        convert_from_transformers(source)
    with refuses_conversion("differ"):
        convert_to_transformers(ours)


def test_a_source_that_cannot_run_is_converted_with_a_warning(
    caplog: LogCaptureFixture,
) -> None:
    source = CASES["vit"].build()
    source.forward = None
    convert_from_transformers(source)
    assert "were not compared" in caplog.text


def test_a_class_of_the_same_name_is_refused() -> None:
    with refuses_conversion("ViTModel cannot be converted"):
        convert_from_transformers(Subclass(transformers.ViTConfig(**PLAIN)))


def test_unexpected_weights_are_listed() -> None:
    source = CASES["vit"].build()
    for index in range(5):
        source.add_module(f"adapter{index}", nn.Linear(2, 2))
    with pytest.raises(
        ConversionError, match=r"unexpected weights: adapter0\.weight, .*3\.bias and 2 more$"
    ):
        convert_from_transformers(source)
