"""Figures over depth: lines and bars equal the findings, for every layout, without pyplot."""

import math
from dataclasses import replace
from typing import Any

import matplotlib.pyplot
import numpy as np
import pytest
import torch
from helpers.measured_encoders import TOKENS, measure
from helpers.tiny_models import LAYOUTS, TASKS, build_tiny_config, raises_one_line, randomize
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from PIL import Image

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.analysis import (
    CURVES,
    GROUP_COLORS,
    Findings,
    build_image_report,
    overlay,
    plot_attention_by_layer,
    plot_attention_mass,
    plot_curve,
    plot_layer_similarity,
    plot_norm_histogram,
    plot_norms,
    plot_token_similarity,
    render_figure,
)
from modeling_vitcls.token_names import get_token_names


@pytest.fixture(scope="module")
def found() -> tuple[Any, Findings]:
    return measure(**TOKENS)


def get_lines(axes: Axes) -> dict[str, np.ndarray]:
    """Return the y values of the lines, by name."""
    return {str(line.get_label()): np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()}


def is_readable(figure: Figure) -> None:
    """Return whether all texts are inside the figure, and do not overlap texts of their kind."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    whole = figure.bbox
    for axes in figure.axes:
        for text in [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]:
            place = text.get_window_extent(canvas.get_renderer())
            assert not text.get_text() or (place.x0 >= -1 and place.y0 >= -1), text
            assert not text.get_text() or (place.x1 <= whole.x1 + 1 and place.y1 <= whole.y1 + 1), text
    for legend in figure.legends:
        place = legend.get_window_extent(canvas.get_renderer())
        assert place.x0 >= 0 and place.x1 <= whole.x1 and place.y0 >= 0 and place.y1 <= whole.y1


def shows_all_points(axes: Axes) -> bool:
    """Return whether all points of all lines are between the limits of the axes."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    points = np.concatenate([line.get_xydata() for line in axes.get_lines() if len(line.get_xydata()) > 2])
    return bool(((points >= (left, bottom)) & (points <= (right, top))).all())


# Curves --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CURVES)
def test_axes_show_all_values_and_zero_in_the_unit_of_the_curve(found: Any, name: str) -> None:
    (axes,) = plot_curve(*found, name).axes
    assert shows_all_points(axes) and axes.get_ylim()[0] <= 0
    assert (axes.get_title(), axes.get_ylabel()) == (CURVES[name].title, CURVES[name].y_label)
    assert isinstance(axes.yaxis.get_major_formatter(), PercentFormatter) == (name in ("variation", "received"))


@pytest.mark.parametrize("name", ["entropy", "spread", "received"])
def test_a_line_is_the_mean_of_the_heads_and_its_band_their_range(found: Any, name: str) -> None:
    config, findings = found
    (axes,) = plot_curve(config, findings, name).axes
    drawn, values = get_lines(axes), getattr(findings, name)  # [L, H, S]
    assert list(drawn) == [*get_token_names(config), "uniform"]
    for place, token in enumerate(get_token_names(config)):
        assert np.allclose(drawn[token], values[:, :, place].mean(dim=1))
        corners = axes.collections[place].get_paths()[0].vertices
        for layer in range(3):
            height = corners[corners[:, 0] == layer + 1][:, 1]
            assert math.isclose(height.min(), values[layer, :, place].min(), rel_tol=1e-5)
            assert math.isclose(height.max(), values[layer, :, place].max(), rel_tol=1e-5)
    equal = values.clone()
    equal[0] = values[0, :1]  # all heads are equal in layer 1 only
    bands = plot_curve(config, replace(findings, **{name: equal}), name).axes[0].collections
    assert len(bands) == len(axes.collections) == 6
    uniform = {"received": 1 / 22}.get(name) or findings.uniform[name]  # of 6 + 16 tokens
    assert np.allclose(drawn["uniform"], uniform, rtol=1e-4)


def test_tokens_have_the_color_of_their_group_and_differ_within_it(found: Any) -> None:
    config, findings = found
    (axes,) = plot_curve(config, findings, "entropy").axes
    drawn = axes.get_lines()
    assert to_rgb(drawn[0].get_color()) == to_rgb(GROUP_COLORS["cls"])
    assert to_rgb(drawn[2].get_color()) == to_rgb(GROUP_COLORS["distillation"])
    assert to_rgb(drawn[3].get_color()) == to_rgb(GROUP_COLORS["registers"])
    assert len({(line.get_color(), line.get_linestyle(), line.get_marker()) for line in drawn[:6]}) == 6


def test_states_have_no_band_and_no_baseline_and_begin_with_the_embeddings(found: Any) -> None:
    config, findings = found
    for name, values in {"variation": findings.variation, "to_patches": findings.to_patches}.items():
        (axes,) = plot_curve(config, findings, name).axes
        drawn = get_lines(axes)
        assert list(drawn) == get_token_names(config) and not axes.collections
        assert np.allclose(drawn["register 2"], values[:, 4]) and len(values) == 4
        assert axes.get_xlabel() == "after layer"


def test_patches_have_one_line(found: Any) -> None:
    config, findings = found
    (axes,) = plot_curve(config, findings, "patch_distance").axes
    drawn = get_lines(axes)
    assert np.allclose(drawn["patches"], findings.patch_distance.mean(dim=1))
    assert np.allclose(drawn["uniform"], findings.uniform["patch_distance"])
    legend = axes.figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["patches", "uniform"]


def test_scoped_tokens_have_their_own_baselines() -> None:
    config, findings = measure(num_cls_tokens=2, cls_scopes=["image", [2, 2, 0, 1]])
    (axes,) = plot_curve(config, findings, "entropy").axes
    baselines = {round(float(line.get_ydata()[0]), 4) for line in axes.get_lines() if line.get_linewidth() == 1}
    assert baselines == {round(value, 4) for value in findings.uniform_by_token["entropy"].tolist()}
    assert len(baselines) == 2


def test_unknown_names_are_errors(found: Any) -> None:
    with raises_one_line("no figure 'entropies'", "patch_distance"):
        plot_curve(*found, "entropies")


# Attention targets and norms -----------------------------------------------------------------------------------------


def test_bars_of_mass_are_the_shares_and_fill_the_whole(found: Any) -> None:
    config, findings = found
    figure = plot_attention_mass(config, findings)
    shares = findings.attention_fractions.mean(dim=1)  # [L, S, 4]
    for place, axes in enumerate(figure.axes[:6]):
        assert axes.get_title() == get_token_names(config)[place]
        bars = [one for one in axes.containers if isinstance(one, BarContainer)]
        heights = np.array([[bar.get_height() for bar in group] for group in bars])  # [4, L]
        assert np.allclose(heights.T, shares[:, place]) and np.allclose(heights.sum(axis=0), 1, atol=1e-5)
        bottoms = np.array([[bar.get_y() for bar in group] for group in bars])
        assert np.allclose(bottoms, heights.cumsum(axis=0) - heights, atol=1e-5) and axes.get_ylim() == (0, 1)
        assert [to_rgb(group[0].get_facecolor()) for group in bars] == list(map(to_rgb, GROUP_COLORS.values()))
    handles = {handle.get_label(): to_rgb(handle.get_facecolor()) for handle in figure.legends[0].legend_handles}
    colors = {"CLS": "cls", "distillation": "distillation", "registers": "registers", "patches": "patches"}
    assert handles == {label: to_rgb(GROUP_COLORS[group]) for label, group in colors.items()}


@pytest.mark.parametrize("plot", [plot_attention_mass, plot_layer_similarity, plot_token_similarity])
def test_figures_of_tokens_require_special_tokens(plot: Any) -> None:
    with raises_one_line("special tokens, but the model has"):
        plot(*measure(num_cls_tokens=0, pooling="mean", num_hidden_layers=1))


def test_groups_without_tokens_have_no_bars() -> None:
    config, findings = measure(num_register_tokens=1)
    figure = plot_attention_mass(config, findings)
    for token, axes in enumerate(figure.axes):
        heights = np.array([[bar.get_height() for bar in group] for group in axes.containers])  # [3, L]
        assert np.allclose(heights.T, findings.attention_fractions.mean(dim=1)[:, token][:, [0, 2, 3]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["CLS", "registers", "patches"]


def test_norms_of_tokens_are_drawn_with_those_of_patches(found: Any) -> None:
    config, findings = found
    findings = replace(findings, outliers=torch.tensor([0.0, 0.1, 0.2, 0.3]))
    norms, outliers = plot_norms(config, findings).axes
    drawn = get_lines(norms)
    assert np.allclose(drawn["patches"], findings.patch_norms.median(dim=1).values, rtol=0.05)
    assert np.allclose(drawn["CLS 2"], findings.token_norms[:, 1])
    corners = norms.collections[0].get_paths()[0].vertices  # the central 90% of the patches
    for layer in range(4):
        height = corners[corners[:, 0] == layer][:, 1]
        low, high = np.quantile(findings.patch_norms[layer].numpy(), (0.05, 0.95))
        assert (height.min(), height.max()) == pytest.approx((low, high), rel=1e-4)
    assert shows_all_points(norms) and shows_all_points(outliers)
    shares = get_lines(outliers)
    assert np.allclose(shares["patches"], findings.outliers)
    assert np.allclose(shares["patches, registers hidden"], findings.outliers_without_registers)


def test_norms_far_apart_are_drawn_on_a_logarithmic_scale(found: Any) -> None:
    config, findings = found
    far = replace(findings, token_norms=findings.token_norms * 1000)
    near = replace(
        findings, token_norms=findings.token_norms.clamp(4, 5), patch_norms=findings.patch_norms.clamp(4, 5)
    )
    assert plot_norms(config, far).axes[0].get_yscale() == "log"
    assert plot_norms(config, near).axes[0].get_yscale() == "linear"
    assert [plot_norms(config, one).axes[0].get_ylabel() for one in (far, near)] == ["norm, logarithmic", "norm"]
    assert plot_norms(config, near).axes[0].get_ylim()[0] == 0
    zero = replace(far, token_norms=far.token_norms * torch.arange(4)[:, None])  # the embeddings are zero
    assert plot_norms(config, zero).axes[0].get_yscale() == "linear"


# One image -----------------------------------------------------------------------------------------------------------


def collect_image_report(model: Any) -> Any:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    return build_image_report(model, ViTCLSImageProcessor(size={"height": 32, "width": 32}), picture, "photo")


def test_an_image_over_depth_has_a_tile_per_layer_and_token() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(num_cls_tokens=2, num_hidden_layers=3)))
    report = collect_image_report(model)
    figure = plot_attention_by_layer(model.config, report)
    titles = [axes.get_title() for axes in figure.axes]  # two rows with five columns
    layers = ["layer 1", "layer 2", "layer 3", "rollout"]
    assert titles == ["photo", *layers, f"for {report.predictions[0].top_label}", "", "", "", ""]
    tile = figure.axes[1 * 5 + 3]  # token 2, layer 3
    assert tile.texts[0].get_text() == f"{report.attention[2, :, 1].mean(dim=0).sum():.0%}"
    picture = np.asarray(figure.axes[0].images[0].get_array())
    expected = overlay(Image.fromarray(picture), report.attention[2, :, 1].mean(dim=0))
    assert np.abs(np.asarray(tile.images[0].get_array()).astype(int) - np.asarray(expected)).max() <= 1
    for head in (2, -1):
        with raises_one_line(f"head is {head}", "the model has 2 heads"):
            plot_attention_by_layer(model.config, report, head=head)


def test_rollout_and_attribution_are_drawn_on_the_image() -> None:
    config = build_tiny_config(num_register_tokens=1, num_hidden_layers=1)
    model = randomize(ViTCLSForImageClassification(config))
    report = collect_image_report(model)
    axes = plot_attention_by_layer(config, report, head=0).axes  # columns: the image, layer 1, rollout
    picture = Image.fromarray(np.asarray(axes[0].images[0].get_array()))
    expected = {2: report.rollout[0], 3: report.attributions[0], 4: report.attention[0, 0, 1], 5: report.rollout[1]}
    for index, values in expected.items():
        drawn = np.asarray(axes[index].images[0].get_array()).astype(int)
        assert np.abs(drawn - np.asarray(overlay(picture, values))).max() <= 1, index
    assert axes[4].texts[0].get_text() == f"{report.attention[0, 0, 1].sum():.0%}"


def test_every_task_is_explained() -> None:
    model = randomize(ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS)))
    titles = [
        axes.get_title()
        for axes in plot_attention_by_layer(model.config, collect_image_report(model)).axes
        if axes.images
    ]
    assert {title.split()[1] for title in titles if title.startswith("for ")} == set(TASKS)


# All layouts ---------------------------------------------------------------------------------------------------------


DRAWN = {name: LAYOUTS[name] for name in ("one_cls", "no_cls", "no_special_tokens")} | {
    "many": {"num_cls_tokens": 3, "num_register_tokens": 10}
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", DRAWN.values(), ids=DRAWN)
def test_every_layout_is_drawn_or_raises_an_error(layout: dict[str, Any]) -> None:
    config, findings = measure(num_hidden_layers=2, **layout)
    num_tokens = config.token_layout.num_prefix_tokens
    for draw in (plot_norms, plot_norm_histogram):
        is_readable(draw(config, findings))
    for name in CURVES:
        if num_tokens or name == "patch_distance":
            is_readable(plot_curve(config, findings, name))
        else:
            with raises_one_line("no special tokens"):
                plot_curve(config, findings, name)
    for draw, least in ((plot_attention_mass, 1), (plot_layer_similarity, 1), (plot_token_similarity, 2)):
        if num_tokens >= least:
            is_readable(draw(config, findings))
    is_readable(plot_attention_by_layer(config, collect_image_report(randomize(ViTCLSModel(config)))))


def test_figures_are_not_registered_in_pyplot_and_can_be_saved(found: Any) -> None:
    picture = render_figure(plot_curve(*found, "entropy"), dpi=50)
    assert picture.mode == "RGB" and picture.width == 320
    assert not matplotlib.pyplot.get_fignums()
