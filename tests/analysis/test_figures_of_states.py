"""Figures of states: the bars and cells equal the findings."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.measured_encoders import TOKENS, measure
from helpers.tiny_models import build_tiny_config, raises_one_line
from matplotlib.colors import to_rgb

from modeling_vitcls.analysis import (
    GROUP_COLORS,
    AblationEffect,
    Findings,
    plot_ablation_effects,
    plot_layer_similarity,
    plot_norm_histogram,
    plot_token_similarity,
)
from modeling_vitcls.analysis.figures_of_states import compute_norm_histogram
from modeling_vitcls.token_names import get_token_names


@pytest.fixture(scope="module")
def found() -> tuple[Any, Findings]:
    return measure(**TOKENS)


def test_the_histogram_marks_outliers(found: Any) -> None:
    config, findings = found
    ratios = torch.ones(4, 1000)
    ratios[3, :50] = 20
    planted = replace(findings, patch_norms=2 * ratios, patch_ratios=ratios, token_norms=torch.full((4, 6), 9.0))
    figure = plot_norm_histogram(config, planted)
    (axes,) = figure.axes
    (bars,) = axes.containers
    counted = {bar.get_height(): bar.get_facecolor() for bar in bars if bar.get_height()}
    assert set(counted) == {950, 50} and to_rgb(counted[950]) == to_rgb(GROUP_COLORS["patches"])
    edges = {bar.get_height(): (bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars if bar.get_height()}
    assert edges[950][0] < 1 < edges[950][1] and edges[50][0] < 20 < 1.05 * edges[50][1]
    low, high = axes.get_xlim()
    assert low <= edges[950][0] and high == pytest.approx(20) and axes.get_ylim()[1] > 950
    assert to_rgb(counted[50]) != to_rgb(counted[950])
    limit, registers = axes.get_lines()[:2]
    assert 1 < limit.get_xdata()[0] < 20 and "5.00% of the patches, at 20.0 × median" in axes.texts[0].get_text()
    assert list(registers.get_xdata()) == pytest.approx([4.5] * 3)
    one_mode = plot_norm_histogram(config, planted, 0).axes[0]
    assert not one_mode.texts and len({bar.get_facecolor() for bar in one_mode.containers[0]}) == 1
    assert axes.get_title() == "Norms of the patches, after layer 3"
    assert plot_norm_histogram(config, planted, 0).axes[0].get_title() == "Norms of the patches, embeddings"
    ratios[0, :10] = 0
    extreme = replace(planted, patch_ratios=ratios, token_norms=torch.full((4, 6), 90.0))
    histogram = compute_norm_histogram(config, extreme, 0)
    assert (histogram.low, histogram.high) == pytest.approx((1e-3, 45)) and histogram.registers == [45] * 3
    assert (histogram.counts[0], sum(histogram.counts)) == (10, 1000)
    with raises_one_line("layer is 4", "the model has 3 layers"):
        plot_norm_histogram(config, planted, 4)


def test_similarities_are_the_cosines(found: Any) -> None:
    config, findings = found
    axes, _ = plot_token_similarity(config, findings, 2).axes
    assert np.allclose(axes.images[0].get_array(), findings.between_tokens[2])
    assert axes.images[0].get_clim() == (-1, 1)
    assert axes.texts[1].get_text() == f"{findings.between_tokens[2, 0, 1]:.2f}"
    figure = plot_layer_similarity(config, findings)
    for place in range(6):
        assert np.allclose(figure.axes[place].images[0].get_array(), findings.across_layers[place])
    with raises_one_line("layer is -5"):
        plot_token_similarity(config, findings, -5)


def test_effects_are_bars_with_accuracy_only_if_it_is_known(found: Any) -> None:
    config, _ = found
    keys = ["cls[0]", "cls[1]", "distillation[0]", "registers[0]", "registers[1]", "registers[2]"]
    effects = {key: AblationEffect(0.1 * place, place, -0.05 * place, 10) for place, key in enumerate(keys)}
    axes = plot_ablation_effects(config, effects).axes
    assert len(axes) == 3
    widths = [[bar.get_width() for bar in one.containers[0]] for one in axes]
    for one, values in zip(axes, widths, strict=True):
        assert one.get_xlim()[0] <= min(values) and one.get_xlim()[1] >= max(values)
    assert [text.get_text() for text in axes[0].texts] == ["0%", "10%", "20%", "30%", "40%", "50%"]
    colors = [to_rgb(bar.get_facecolor()) for bar in axes[0].containers[0]]
    assert colors == [to_rgb(GROUP_COLORS[key.partition("[")[0]]) for key in keys]
    assert np.allclose(widths, [[0.1 * n for n in range(6)], range(6), [-0.05 * n for n in range(6)]])
    assert [label.get_text() for label in axes[0].get_yticklabels()] == get_token_names(config)
    unknown = {key: replace(effect, accuracy_change=None) for key, effect in effects.items()}
    assert len(plot_ablation_effects(config, unknown).axes) == 2
    assert len(plot_ablation_effects(config, effects | {"cls[0]": unknown["cls[0]"]}).axes) == 2
    assert axes[0].yaxis_inverted()  # the first token is at the top
    with raises_one_line("no tokens", "cls[0]"):
        plot_ablation_effects(config, {})
    with raises_one_line("contains registers[2], registers[1]"):
        plot_ablation_effects(config, dict(reversed(effects.items())))
    with raises_one_line("requires effects of special tokens"):
        plot_ablation_effects(build_tiny_config(num_cls_tokens=0, pooling="mean"), {})
