"""Figures of statistics, compared with the statistics."""

from dataclasses import replace

import pytest
import torch
from helpers.measured_encoders import TOKENS, measure
from matplotlib.colors import to_rgba

from modeling_vitcls.analysis.diagnosis import find_second_mode
from modeling_vitcls.analysis.figures import (
    plot_entropy,
    plot_norm_histogram,
    render_svg,
    shorten_text,
)
from modeling_vitcls.inference.token_names import get_token_names


def test_the_curve_shows_the_mean_over_heads_for_each_token():
    config, findings = measure(**TOKENS)
    figure = plot_entropy(config, findings)
    (axes,), (legend,) = figure.axes, figure.legends
    *lines, uniform = axes.get_lines()
    for line, expected in zip(lines, findings.entropy.mean(dim=1).T, strict=True):
        assert list(line.get_xdata()) == [1, 2, 3]
        assert line.get_ydata().tolist() == pytest.approx(expected.tolist())
    expected = findings.uniform_entropy_by_token[0].item()
    assert uniform.get_ydata()[0] == pytest.approx(expected, rel=1e-4)
    names = [text.get_text() for text in legend.texts]
    assert names == [*get_token_names(config), "uniform"]


def test_outliers_are_red_in_the_histogram():
    config, findings = measure(**TOKENS)
    ratios = torch.linspace(0.9, 1.1, 2000).repeat(len(findings.patch_ratios), 1)
    ratios[1, :60] = 5.0
    (axes,) = plot_norm_histogram(config, replace(findings, patch_ratios=ratios), layer=1).axes
    registers = next(line for line in axes.get_lines() if line.get_label() == "registers")
    medians = findings.token_norms[1, config.token_layout.registers] / findings.patch_norms[1]
    assert registers.get_xdata() == pytest.approx(medians.tolist())

    mode = find_second_mode(ratios[1])
    red = to_rgba("#B3261E")
    assert mode is not None
    assert mode.threshold in [line.get_xdata()[0] for line in axes.get_lines()]
    assert sum(bar.get_height() for bar in axes.patches) == 2000
    assert sum(bar.get_height() for bar in axes.patches if bar.get_facecolor() == red) == 60


def test_figures_are_svg():
    svg = render_svg(plot_entropy(*measure(**TOKENS)))
    assert [shorten_text("abcdefghi", length) for length in (6, 9)] == ["abc…hi", "abcdefghi"]
    assert svg.startswith("<svg")
    assert svg.rstrip().endswith("</svg>")
    assert "<dc:date>" not in svg
