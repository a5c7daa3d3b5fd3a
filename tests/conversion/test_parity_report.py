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


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        (
            {"position_interpolation": "bilinear", "position_offset": 0.1},
            "bilinear without antialiasing, offset 0.1",
        ),
        ({"position_antialias": True}, "bicubic with antialiasing, as in timm"),
        ({"position_embedding_type": "none"}, ""),
    ],
)
def test_a_note_names_the_resampling_of_learned_positions(
    fields: dict[str, Any], note: str
) -> None:
    source: Any = StubSource("timm:vit", "timm")
    notes = describe_position_embeddings(source, build_tiny_config(**fields))
    assert note in "".join(notes)
    assert len(notes) == bool(note)


def test_sources_without_the_same_outputs_are_errors() -> None:
    model = ViTCLSForImageClassification(build_tiny_config())
    source: Any = StubSource("timm:vit", "timm")
    source.compute_outputs = lambda images: {"sequence": model.vitcls(images).last_hidden_state}
    with raises_one_line("only one of timm:vit"):
        compare_models(source, model)
    source.compute_outputs = lambda images: 1 / 0  # fails at the native size
    with pytest.raises(ZeroDivisionError):
        compare_models(source, model)
