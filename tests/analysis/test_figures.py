"""The curve of the entropy of attention, compared with the statistics."""

import pytest
from helpers.tiny_models import build_images, build_tiny_config, randomize
from helpers.varied_models import collect_findings

from modeling_vitcls import ViTCLSModel
from modeling_vitcls.analysis.figures import plot_entropy
from modeling_vitcls.inference.token_names import get_token_names


def test_the_curve_shows_the_mean_over_heads_for_each_token() -> None:
    config = build_tiny_config(
        num_hidden_layers=3, num_cls_tokens=2, num_distillation_tokens=1, num_register_tokens=5
    )
    findings = collect_findings(randomize(ViTCLSModel(config)), build_images(4))
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
