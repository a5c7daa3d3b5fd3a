"""Figures of statistics, compared with the statistics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.measured_encoders import TOKENS, measure
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.ticker import PercentFormatter

from modeling_vitcls.analysis.diagnosis import find_second_mode
from modeling_vitcls.analysis.figures import (
    CURVES,
    GROUP_COLORS,
    plot_curve,
    plot_norm_histogram,
    plot_norms,
    render_svg,
    shorten_text,
)
from modeling_vitcls.inference.token_names import get_token_names


@pytest.mark.parametrize("name", CURVES)
def test_curves_show_the_mean_over_heads_for_each_token(name):
    config, findings = measure(**TOKENS)
    values = getattr(findings, name)
    first_layer = int(name != "variation")
    means = values if name == "variation" else values.mean(dim=1)
    figure = plot_curve(config, findings, name)
    (axes,), (legend,) = figure.axes, figure.legends

    lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 2]
    assert [line.get_label() for line in lines] == get_token_names(config)
    for line, expected in zip(lines, means.T, strict=True):
        assert line.get_ydata().tolist() == pytest.approx(expected.tolist())
        assert list(line.get_xdata()) == list(range(first_layer, 4))

    ranges = (
        torch.stack([values.amin(dim=(0, 1)), values.amax(dim=(0, 1))], dim=-1).tolist()
        if first_layer
        else []
    )
    bands = [band.get_paths()[0].vertices[:, 1] for band in axes.collections]
    assert [[band.min(), band.max()] for band in bands] == [pytest.approx(each) for each in ranges]

    green = np.array(to_rgb(GROUP_COLORS["registers"]))
    for line, color in (
        (lines[3], green),
        (lines[7], 0.55 + 0.45 * green),
    ):  # the last one of five is the lightest
        assert line.get_color() == pytest.approx(color)
    assert axes.get_xlim() == pytest.approx((first_layer - 0.3, 3.3))
    assert axes.get_ylim()[0] <= 0
    assert axes.get_xlabel() == ("layer" if first_layer else "after layer")
    assert isinstance(axes.yaxis.get_major_formatter(), PercentFormatter) == CURVES[name][2]
    # the fifth register has the marker of the first
    assert len({line.get_marker() for line in lines[3:]}) == 4

    baselines = [line.get_ydata()[0] for line in axes.get_lines() if len(line.get_xdata()) == 2]
    uniform = [findings.uniform_entropy_by_token[0].item()] if name == "entropy" else []
    assert baselines == pytest.approx(uniform, rel=1e-4)
    assert [text.get_text() for text in legend.texts] == get_token_names(config) + [
        "uniform"
    ] * len(uniform)


def test_norms_are_drawn_as_medians_and_outliers_are_red_in_the_histogram():
    config, findings = measure(**TOKENS)
    (norms,) = plot_norms(config, findings).axes
    expected = torch.cat(
        [findings.patch_norms.quantile(0.5, dim=1)[:, None], findings.token_norms], dim=1
    ).T.tolist()
    assert [line.get_ydata().tolist() for line in norms.get_lines()] == [
        pytest.approx(each) for each in expected
    ]
    assert [line.get_label() for line in norms.get_lines()] == ["patches", *get_token_names(config)]

    band = norms.collections[0].get_paths()[0].vertices[:, 1]
    low, high = findings.patch_norms.quantile(torch.tensor([0.05, 0.95]), dim=1)
    assert [band.min(), band.max()] == pytest.approx([low.min().item(), high.max().item()])

    ratios = torch.linspace(0.9, 1.1, 2000).repeat(len(findings.patch_ratios), 1)
    ratios[1, :60] = 5.0
    planted = replace(findings, patch_ratios=ratios, token_norms=100 * findings.token_norms)
    assert (norms.get_yscale(), plot_norms(config, planted).axes[0].get_yscale()) == (
        "linear",
        "log",
    )

    without = replace(planted, token_norms=0 * findings.token_norms)  # zero has no logarithm
    (linear,) = plot_norms(config, without).axes
    assert linear.get_yscale() == "linear"
    assert linear.get_ylim()[0] == 0

    (axes,) = plot_norm_histogram(config, planted, layer=-3).axes
    triangles = next(
        line for line in axes.get_lines() if line.get_label() == "registers"
    ).get_xdata()
    medians = (
        100
        * findings.token_norms[1, config.token_layout.registers]
        / findings.patch_norms[1].median()
    )
    assert triangles == pytest.approx(medians.tolist())
    assert axes.get_xlim() == pytest.approx((0.5, max(triangles)))
    assert "layer 1" in axes.get_title()

    mode = find_second_mode(ratios[1])
    red = to_rgba("#B3261E")
    assert mode is not None
    assert mode.threshold in [line.get_xdata()[0] for line in axes.get_lines()]
    assert sum(bar.get_height() for bar in axes.patches) == 2000
    assert sum(bar.get_height() for bar in axes.patches if bar.get_facecolor() == red) == 60

    (axes,) = plot_norm_histogram(config, without, layer=0).axes  # has one mode
    assert red not in {bar.get_facecolor() for bar in axes.patches}
    assert axes.get_xlim() == pytest.approx((1e-3, 2))


def test_figures_are_svg():
    svg = render_svg(plot_curve(*measure(**TOKENS), "variation"))
    assert [shorten_text("abcdefghi", length) for length in (6, 9)] == ["abc…hi", "abcdefghi"]
    assert svg.startswith("<svg")
    assert svg.rstrip().endswith("</svg>")
    assert "<dc:date>" not in svg
