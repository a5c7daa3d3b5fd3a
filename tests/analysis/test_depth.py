"""Sentences on the attention by layer, for attention maps that are known."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.tiny_models import build_tiny_config

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.analysis.depth import describe_attention_depth, format_layers
from modeling_vitcls.analysis.token_statistics import Findings, TokenStatistics
from modeling_vitcls.analysis.token_use import TokenUse


CONFIG = build_tiny_config(num_hidden_layers=4)


@pytest.fixture
def findings() -> Findings:
    """Return statistics of six images.

    The attention covers 16, 16, 4 and 8 of 17 tokens by layer, with the same map in layers 1 and 3.
    """
    statistics = TokenStatistics(ViTCLSForImageClassification(CONFIG).eval())
    statistics.update(torch.rand(6, CONFIG.num_channels, *CONFIG.image_height_width))
    found = statistics.compute()
    entropy = torch.tensor([16, 16, 4, 8]).log()[:, None, None].expand_as(found.entropy)
    return replace(
        found,
        uniform_entropy_by_token=torch.full_like(found.uniform_entropy_by_token, math.log(17)),
        entropy=entropy,
        map_variation=torch.tensor([0.1, 2.0, 0.05, 2.0])[:, None],
        map_selectivity=torch.tensor([0.5, 0.5, 0.5, 0.5])[:, None],
    )


def test_layers_are_described_in_numbers_of_tokens(findings: Findings) -> None:
    spread, selective, shared = describe_attention_depth(TokenUse(CONFIG), findings)
    assert "16 of 17 tokens in layer 1 and over 8 in layer 4" in spread
    assert "4, in layer 3" in spread
    assert "layer 3" in selective
    assert "layers 1 and 3" in shared


def test_uniform_attention_and_single_images_are_not_called_the_same_map(
    findings: Findings,
) -> None:
    uniform = replace(findings, map_selectivity=torch.zeros(4, 1))
    assert len(describe_attention_depth(TokenUse(CONFIG), uniform)) == 2
    single = replace(findings, num_images=1)
    assert len(describe_attention_depth(TokenUse(CONFIG), single)) == 2


def test_a_model_without_special_tokens_has_no_sentences(findings: Findings) -> None:
    config = build_tiny_config(num_cls_tokens=0, pooling="mean")
    assert describe_attention_depth(TokenUse(config), findings) == []


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([3], "layer 3"),
        ([1, 2], "layers 1 and 2"),
        ([1, 2, 3, 7], "layers 1 to 3 and 7"),
        ([1, 3, 5], "layers 1, 3 and 5"),
    ],
)
def test_consecutive_layers_are_ranges(layers: list[int], text: str) -> None:
    assert format_layers(layers) == text
