"""The comparison of a source with its conversion, and notes on positions."""

from typing import Any

import pytest
from helpers.tiny_models import build_tiny_config, raises_one_line

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.conversion.parity_report import (
    compare_models,
    describe_pooling,
    describe_position_embeddings,
)


class StubSource:
    """A source of which only the notes are built."""

    def __init__(self, name: str, project: str) -> None:
        self.name, self.project, self.model, self.native_size_reason = name, project, None, ""
        self.image_size = (32, 32)


def test_only_timms_mean_pooling_of_dinov3_has_a_note() -> None:
    dinov3: Any = StubSource("timm:vit_small_patch16_dinov3.lvd1689m", "timm")
    dinov2: Any = StubSource("timm:vit_small_patch14_dinov2.lvd142m", "timm")
    mean = build_tiny_config(pooling="mean")
    cls = build_tiny_config(pooling="cls")
    assert len(describe_pooling(dinov3, mean)) == 1
    assert describe_pooling(dinov3, cls) == []
    assert describe_pooling(dinov2, mean) == []


def test_notes_name_the_resampling_of_positions() -> None:
    """The notes name the resampling, and what other implementations compute in another way."""
    cases: list[tuple[str, dict[str, Any], list[str]]] = [
        ("timm:vit", {"position_embedding_type": "none"}, []),
        ("timm:vit", {"position_embedding_type": "rope_2d", "rope_coordinates": "grid"}, []),
        (
            "timm:vit",
            {"position_interpolation": "bilinear", "position_offset": 0.1},
            ["bilinear without antialiasing, offset 0.1"],
        ),
        (
            "timm:vit",
            {"position_embedding_type": "learned_rope_2d", "position_antialias": True},
            ["bicubic with antialiasing, as in timm", "computed in float32"],
        ),
        ("timm:vit_base_patch16_sapiens2", {"position_embedding_type": "rope_2d"}, ["bfloat16"]),
    ]
    for name, fields, parts in cases:
        source: Any = StubSource(name, "timm")
        notes = describe_position_embeddings(source, build_tiny_config(**fields))
        assert len(notes) == len(parts)
        assert all(part in note for part, note in zip(parts, notes, strict=True))

    source.name = "mine"
    source.model = type("Sapiens2Model", (), {})()
    assert "bfloat16" in str(describe_position_embeddings(source, build_tiny_config(**fields)))
    source.model, source.native_size_reason = None, "the source supports only one size"
    assert describe_position_embeddings(source, build_tiny_config()) == []


def test_sources_without_the_same_outputs_are_errors() -> None:
    model = ViTCLSForImageClassification(build_tiny_config())
    source: Any = StubSource("timm:vit", "timm")
    source.compute_outputs = lambda images: {"sequence": model.vitcls(images).last_hidden_state}
    with raises_one_line("only one of timm:vit"):
        compare_models(source, model)
    source.compute_outputs = lambda images: 1 / 0  # fails at the native size
    with pytest.raises(ZeroDivisionError):
        compare_models(source, model)
