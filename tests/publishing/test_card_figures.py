"""Figures of tokens and predictions, compared with the model."""

import numpy as np
import pytest
import torch
from helpers.figure_titles import get_titles
from helpers.tiny_models import TASKS, build_images, build_tiny_config, raises_one_line, randomize
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import nn

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
)
from modeling_vitcls.analysis.figures import GROUP_COLORS
from modeling_vitcls.analysis.maps import VisibleRegion, is_used_by_head
from modeling_vitcls.publishing.card_figures import plot_attention, plot_confusion_matrix, plot_token_layout
from modeling_vitcls.token_names import get_token_names


MANY = {"num_cls_tokens": 3, "num_distillation_tokens": 2, "num_register_tokens": 8}


def draw(figure: Figure) -> FigureCanvasAgg:
    """Draw the figure and return it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def get_texts(figure: Figure) -> list[str]:
    """Return all texts of a figure, without axis labels."""
    return [text.get_text() for axes in figure.axes for text in axes.texts if text.get_text()]


def get_boxes(figure: Figure, group: str) -> list[Rectangle]:
    """Return the boxes in the color of a group."""
    patches = [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    return [patch for patch in patches if patch.get_facecolor() == to_rgba(GROUP_COLORS[group])]


# Token layout ----------------------------------------------------------------------------------------------------

LAYOUTS = {
    "one": {},
    "many": MANY,
    "tasks": {"num_cls_tokens": 2, "tasks": {"species": 3, "age": 2}, "num_register_tokens": 2},
    "scopes": {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]},
    "none": {"num_cls_tokens": 0, "pooling": "mean"},
    "flat": {"image_size": [32, 256], "patch_size": [8, 16]},
}


def test_the_palette_has_a_color_for_each_group():
    assert list(GROUP_COLORS) == [name for name, _ in build_tiny_config().token_layout.items()]
    assert len(set(GROUP_COLORS.values())) == len(GROUP_COLORS)


@pytest.mark.parametrize("fields", LAYOUTS.values(), ids=LAYOUTS)
def test_the_layout_names_every_token_in_order_and_the_patches(fields):
    config = build_tiny_config(**fields)
    figure = plot_token_layout(config)
    names = [name.replace(" (", "\n(") for name in get_token_names(config)]
    check_files = get_texts(figure)
    assert [text for text in check_files if text in names] == names
    rows, columns = config.grid_size
    assert any(text.endswith(f"{rows} × {columns} = {rows * columns}") for text in check_files)
    special = range(config.token_layout.num_prefix_tokens)
    for group, tokens in config.token_layout.items():
        expected = 1 if group == "patches" else len(special[tokens])
        assert len(get_boxes(figure, group)) == expected
    left_edges = [box.get_x() for group in GROUP_COLORS for box in get_boxes(figure, group)]
    assert left_edges == sorted(left_edges)


def test_the_layout_omits_some_of_very_many_tokens():
    figure = plot_token_layout(build_tiny_config(num_register_tokens=100))
    assert len(get_boxes(figure, "registers")) == 12
    assert {"register 1", "register 10", "…", "register 100", "registers\n100"} <= set(get_texts(figure))
    twelve = get_texts(plot_token_layout(build_tiny_config(num_register_tokens=12)))
    assert "…" not in twelve and "register 11" in twelve


@pytest.mark.parametrize(("pooled", "num_arrows"), [([0, 19], 2), ([0, 10], 1)])
def test_arrows_start_at_drawn_tokens(pooled, num_arrows):
    """CLS tokens 1 to 10 and the last token are drawn. The token of index 10 is omitted."""
    config = build_tiny_config(num_cls_tokens=20, pooled_cls_tokens=pooled, cls_pooling="mean")
    axes = plot_token_layout(config).axes[0]
    boxes = sorted(box.get_x() + box.get_width() / 2 for box in get_boxes(axes.figure, "cls"))
    starts = [text.xyann[0] for text in axes.texts if getattr(text, "arrow_patch", None) is not None]
    assert starts == pytest.approx([boxes[0], boxes[-1]][:num_arrows])


DESCRIPTIONS = {
    "cls": ({}, 'used by the head (pooling "cls")'),
    "distillation": ({"num_distillation_tokens": 1}, 'used by the head (pooling "cls") and the distillation head'),
    "distillation_without_head": (
        {"num_distillation_tokens": 1, "distillation_head": False},
        'used by the head (pooling "cls")',
    ),
    "tasks": ({"num_cls_tokens": 2, "tasks": TASKS}, "used by one head per task: age, species"),
    "masked": ({"architectures": ["ViTCLSForMaskedImageModeling"]}, "used by the decoder of masked patches"),
}


@pytest.mark.parametrize(("fields", "description"), DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_the_layout_describes_the_head(fields, description):
    assert get_texts(plot_token_layout(build_tiny_config(**fields)))[-1] == description


POOLINGS = {
    "cls": {},
    "several_cls": {"num_cls_tokens": 3, "cls_pooling": "mean"},
    "first_of_pooled": {"num_cls_tokens": 3, "pooled_cls_tokens": [1, 2]},
    "concat_of_pooled": {"num_cls_tokens": 3, "pooled_cls_tokens": [2, 0], "cls_pooling": "concat"},
    "distillation": {"num_distillation_tokens": 2, "num_register_tokens": 1},
    "distillation_without_head": {"num_distillation_tokens": 1, "distillation_head": False},
    "mean": {"pooling": "mean", "num_register_tokens": 2},
    "cls_mean": {"pooling": "cls_mean", "num_cls_tokens": 2},
    "max": {"pooling": "max"},
    "attention": {"pooling": "attention", "num_register_tokens": 1},
    "attention_to_all": {"pooling": "attention", "attention_pool_tokens": "all", "num_register_tokens": 1},
    "tasks": {"num_cls_tokens": 2, "tasks": TASKS, "num_distillation_tokens": 1},
    "masked": {"num_register_tokens": 1, "architectures": ["ViTCLSForMaskedImageModeling"]},
}


@pytest.mark.parametrize("fields", POOLINGS.values(), ids=POOLINGS)
def test_arrows_start_at_the_tokens_that_the_head_reads(fields):
    """The gradient of the output with respect to these final tokens is not zero."""
    config = build_tiny_config(**fields)
    kinds = {"tasks": ViTCLSForMultiTaskClassification, "architectures": ViTCLSForMaskedImageModeling}
    kind = next((kinds[name] for name in kinds if name in fields), ViTCLSForImageClassification)
    model = randomize(kind(config))
    sequences: list[torch.Tensor] = []

    def record(norm: nn.Module, args: tuple, sequence: torch.Tensor) -> None:
        sequence.retain_grad()
        sequences.append(sequence)

    model.vitcls.layernorm.register_forward_hook(record)
    answers = model(build_images(batch=1))
    answers = answers.reconstruction if kind is ViTCLSForMaskedImageModeling else answers.logits
    parts = answers.values() if isinstance(answers, dict) else [answers]
    torch.stack([part.square().sum() for part in parts]).sum().backward()
    gradient = sequences[0].grad[0].abs().sum(dim=1)  # one value per computed token
    layout = config.token_layout
    special = range(layout.num_prefix_tokens)
    for group, tokens in layout.items():
        if group == "patches":
            assert is_used_by_head(config, group, 0) == bool(gradient[tokens].sum() > 0)
            continue
        for place, index in enumerate(special[tokens]):
            read = index < len(gradient) and gradient[index] > 0
            assert is_used_by_head(config, group, place) == bool(read), (group, place)
    figure = plot_token_layout(config)
    arrows = [text for text in figure.axes[0].texts if getattr(text, "arrow_patch", None) is not None]
    groups = [(group, place) for group, tokens in layout.items() for place in range(len(special[tokens]) or 1)]
    assert len(arrows) == sum(
        is_used_by_head(config, group, place) for group, place in set(groups) if has_tokens(config, group)
    )


def has_tokens(config, group: str) -> bool:
    """Return whether there are tokens in this group."""
    tokens = getattr(config.token_layout, group)
    return tokens.stop is None or tokens.stop > tokens.start


# Confusion matrix ------------------------------------------------------------------------------------------------


def test_a_confusion_matrix_shows_counts_and_shares_of_the_true_class():
    matrix = [[8, 2, 0], [0, 0, 0], [1, 0, 3]]
    figure = plot_confusion_matrix(matrix, ["cat", "dog", "a very long name of a horse"])
    axes = figure.axes[0]
    assert get_texts(figure) == ["8", "2", "0", "0", "0", "0", "1", "0", "3"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    shares = axes.images[0].get_array()
    assert np.allclose(shares, [[0.8, 0.2, 0], [0, 0, 0], [0.25, 0, 0.75]])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[:2] == ["cat", "dog"]
    assert names == [label.get_text() for label in axes.get_xticklabels()]
    assert names[2].startswith("a very l") and names[2].endswith("a horse") and len(names[2]) == 18
    positions = [text.get_position() for text in axes.texts]
    assert positions == [(column, row) for row in range(3) for column in range(3)]


@pytest.mark.parametrize(("num_classes", "has_numbers", "has_names"), [(20, 1, 1), (21, 0, 1), (50, 0, 1), (51, 0, 0)])
def test_numbers_and_names_are_written_if_there_is_space(num_classes, has_numbers, has_names):
    figure = plot_confusion_matrix(np.eye(num_classes, dtype=int), [f"class {i}" for i in range(num_classes)])
    assert len(get_texts(figure)) == has_numbers * num_classes**2
    assert len(figure.axes[0].get_xticks()) == has_names * num_classes
    draw(figure)


def test_too_large_matrices_and_too_many_names_are_errors():
    with raises_one_line("(2, 2)", "3 class names"):
        plot_confusion_matrix([[1, 0], [0, 1]], ["a", "b", "c"])


# Attention -------------------------------------------------------------------------------------------------------


def test_tokens_beyond_the_width_continue_in_the_next_row():
    names = [str(place) for place in range(13)]
    pictures = [Image.new("RGB", (60, 40)), Image.new("L", (8, 8))]
    figure = plot_attention(pictures, torch.rand(2, 13, 4, 4), names, ["a", "b"])
    first = [["a", *"01234"], ["", *"56789"], ["", "10", "11", "12", "", ""]]
    assert get_titles(figure) == [*first, ["b", *"01234"], *first[1:]]
    heights = figure.axes[0].get_gridspec().get_height_ratios()
    assert heights == pytest.approx([1.45 * 40 / 60 + 0.35] * 3 + [1.45 + 0.35] * 3)  # inches, with the title
    assert get_titles(plot_attention(pictures, torch.rand(2, 0, 4, 4), [], ["a", "b"])) == [["a"], ["b"]]


def test_an_attention_figure_draws_each_map_over_its_own_image():
    black, white = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")
    maps = torch.zeros(2, 1, 4, 4)
    maps[0, 0, 0, 0] = maps[1, 0, 3, 3] = 1
    figure = plot_attention([black, white], maps, ["CLS"], ["", ""], [None, VisibleRegion(0, 0, 32, 64)])
    first, second = (np.asarray(axes.images[0].get_array(), dtype=float).mean(axis=2) for axes in figure.axes[1::2])
    place = np.unravel_index(first.argmax(), first.shape)
    assert max(place) < len(first) / 4
    row, column = np.unravel_index(second.argmax(), second.shape)
    assert row >= len(second) * 3 / 4 and len(second) * 3 / 8 <= column < len(second) / 2


def test_attention_of_a_wrong_shape_is_an_error():
    picture, maps = Image.new("L", (8, 8)), torch.rand(1, 2, 4, 4)
    with raises_one_line("1, 1, 2 and 1"):
        plot_attention([picture], maps, ["CLS", "register"], ["a", "b"])
    with raises_one_line("1, 1, 1 and 2"):
        plot_attention([picture], maps, ["CLS", "register"], ["a"], [None, None])
    with raises_one_line("number of names is 1", "[2]"):
        plot_attention([picture], maps, ["CLS"], ["a"])
    with raises_one_line("number of names is 1", "[1, 2]"):
        plot_attention([picture] * 2, [maps[0, :1], maps[0]], ["CLS"], ["a", "b"])
    with raises_one_line("at least one"):
        plot_attention([], [], ["CLS"], [])
