"""Figures of statistics, compared with the statistics."""

from dataclasses import replace

import pytest
import torch
from helpers.measured_encoders import TOKENS, measure
from matplotlib.colors import to_rgba

from modeling_vitcls.analysis.diagnosis import find_second_mode
from modeling_vitcls.analysis.figures import CURVES, plot_curve, plot_norm_histogram, plot_norms, render_svg
from modeling_vitcls.token_names import get_token_names


@pytest.mark.parametrize("name", CURVES)
def test_curves_show_the_mean_over_heads_for_each_token(name):
    config, findings = measure(**TOKENS)
    values = getattr(findings, name)
    means = values if name == "variation" else values.mean(dim=1)
    axes = plot_curve(config, findings, name).axes[0]
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 2]
    assert [line.get_label() for line in lines] == get_token_names(config)
    for line, expected in zip(lines, means.T, strict=True):
        assert line.get_ydata().tolist() == pytest.approx(expected.tolist())
    baselines = [line for line in axes.get_lines() if len(line.get_xdata()) == 2]
    assert len(baselines) == (name == "entropy")  # uniform attention


def test_norms_and_their_histogram():
    config, findings = measure(**TOKENS)
    (norms,) = plot_norms(config, findings).axes
    medians = findings.patch_norms.quantile(0.5, dim=1).tolist()
    assert norms.get_lines()[0].get_ydata().tolist() == pytest.approx(medians)
    ratios = torch.linspace(0.9, 1.1, 2000).repeat(len(findings.patch_ratios), 1)
    ratios[:, :60] = 5.0
    planted = replace(findings, patch_ratios=ratios)
    (axes,) = plot_norm_histogram(config, planted).axes
    triangles = next(line for line in axes.get_lines() if line.get_label() == "registers").get_xdata()
    medians = findings.token_norms[-1, config.token_layout.registers] / findings.patch_norms[-1].median()
    assert triangles == pytest.approx(medians.tolist())
    mode, red = find_second_mode(ratios[-1]), to_rgba("#B3261E")
    assert mode is not None and sum(bar.get_height() for bar in axes.patches) == 2000
    assert sum(bar.get_height() for bar in axes.patches if bar.get_facecolor() == red) == 60


def test_figures_are_svg():
    svg = render_svg(plot_curve(*measure(**TOKENS), "variation"))
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>") and ">Variation between images<" in svg
