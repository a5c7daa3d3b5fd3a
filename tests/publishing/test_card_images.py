"""The images of a model card, compared with the model and the results."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_models import build_tiny_config, randomize
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.analysis.inspection import inspect_model
from modeling_vitcls.analysis.maps import overlay
from modeling_vitcls.analysis.report import iterate_overview
from modeling_vitcls.inference.token_names import get_token_names
from modeling_vitcls.publishing.card_images import (
    plot_attention,
    plot_confusion_matrix,
    write_card_images,
)


PROCESSOR = ViTCLSImageProcessor(
    size={"height": 40, "width": 40}, do_center_crop=True, crop_size=32
)


def load_digit_images(count: int) -> list[Image.Image]:
    """Return handwritten digits of 8 x 8 gray pixels."""
    return [
        Image.fromarray((values * 15).astype(np.uint8)) for values in load_digits().images[:count]
    ]


def get_matrix_texts(figure: Figure) -> list[str]:
    """Return the numbers in the cells of a confusion matrix."""
    return [text.get_text() for text in figure.axes[0].texts]


def test_each_task_has_a_matrix_unless_no_image_was_counted(tmp_path: Path) -> None:
    config = build_tiny_config(num_cls_tokens=3, tasks={"age": 2, "kind": 60, "x": 2})
    results = {
        "age_confusion_matrix": [[3, 1], [0, 0]],  # there are no images of the second class
        "kind_confusion_matrix": np.eye(60, dtype=int).tolist(),
        "x_confusion_matrix": [[0, 0], [0, 0]],
    }
    (tmp_path / "images").mkdir()
    for name in ("mine.png", "attention.png", "confusion_matrix_x.png"):
        (tmp_path / "images" / name).write_bytes(b"of an earlier run")
    write_card_images(tmp_path, config, results)
    names = {file.name for file in (tmp_path / "images").iterdir()}

    assert names == {"mine.png", "confusion_matrix_age.png", "confusion_matrix_kind.png"}
    assert Image.open(tmp_path / "images" / "confusion_matrix_age.png").format == "PNG"

    write_card_images(tmp_path / "new", build_tiny_config(), {})
    assert not (tmp_path / "new").exists()


def test_a_confusion_matrix_shows_counts_and_shares_of_the_true_class() -> None:
    figure = plot_confusion_matrix(
        [[8, 2, 0], [0, 0, 0], [1, 0, 3]], ["cat", "dog", "a very long name of a horse"]
    )
    axes = figure.axes[0]
    assert get_matrix_texts(figure) == ["8", "2", "0", "0", "0", "0", "1", "0", "3"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert np.allclose(axes.images[0].get_array(), [[0.8, 0.2, 0], [0, 0, 0], [0.25, 0, 0.75]])

    norm = axes.images[0].norm
    short = plot_confusion_matrix(np.eye(2, dtype=int), ["cat", "dog"]).axes[0]
    assert (norm.gamma, norm.vmin, norm.vmax) == (0.5, 0, 1)
    assert [each.get_xticklabels()[0].get_rotation() for each in (axes, short)] == [90, 0]

    names = [label.get_text() for label in axes.get_yticklabels()]
    assert figure.get_figheight() <= 4
    assert names == [label.get_text() for label in axes.get_xticklabels()]
    assert names[:2] == ["cat", "dog"]
    assert len(names[2]) == 18


@pytest.mark.parametrize(
    ("num_classes", "has_counts", "has_names"), [(20, 1, 1), (21, 0, 1), (51, 0, 0)]
)
def test_counts_and_names_are_shown_if_there_is_space(
    num_classes: int, has_counts: int, has_names: int
) -> None:
    figure = plot_confusion_matrix(
        np.eye(num_classes, dtype=int), [f"class {i}" for i in range(num_classes)]
    )
    assert len(get_matrix_texts(figure)) == has_counts * num_classes**2
    assert len(figure.axes[0].get_xticks()) == has_names * num_classes
    assert figure.get_figheight() == 8  # inches, for any number of classes


def test_the_attention_of_each_token_is_drawn_over_its_image() -> None:
    """The maps show the last layer that is read: for registers, the layer before the last."""
    model = randomize(ViTCLSForImageClassification(build_tiny_config(num_register_tokens=2)))
    images = load_digit_images(8)
    names = get_token_names(model.config)
    inspection = inspect_model(model, PROCESSOR, images, labels=[0, 1, 2, 0, 1, 2, 0, 1])
    overview = list(iterate_overview(inspection, 8))
    for image, (_, caption, maps) in zip(images, overview, strict=True):
        pixel_values = PROCESSOR(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            rows = model.token_attention(pixel_values)[0].mean(dim=1)  # [L, S, key]
            predicted = model.config.id2label[model(pixel_values).logits.argmax().item()]
        expected = torch.cat([rows[-1, :1], rows[-2, 1:]])[:, 3:].unflatten(1, (4, 4))
        assert torch.allclose(torch.stack(list(maps.values())), expected, atol=1e-6)
        assert caption.endswith(f" → {predicted}")

    grid = plot_attention(inspection).axes
    assert len(grid) == 4 * 4  # at most four images, each with three maps
    assert [axes.get_title() for axes in grid[1:4]] == names
    assert np.asarray(grid[0].images[0].get_array()).shape == (320, 320, 3)

    expected = overlay(images[1], overview[1][2]["CLS"], overview[1][0].visible_region, 320, 320)
    assert np.array_equal(grid[4 + 1].images[0].get_array(), np.asarray(expected))
    square, wide = (
        inspect_model(model, PROCESSOR, [images[0].resize((width, 8))]) for width in (8, 16)
    )
    assert plot_attention(wide).get_figheight() < plot_attention(square).get_figheight()


def test_a_model_without_special_tokens_has_no_attention_figure(tmp_path: Path) -> None:
    config = build_tiny_config(num_cls_tokens=0, pooling="mean")
    inspection = inspect_model(
        randomize(ViTCLSForImageClassification(config)), PROCESSOR, load_digit_images(5)
    )
    write_card_images(
        tmp_path, config, {"confusion_matrix": [[3, 1, 0], [0, 0, 0], [0, 0, 1]]}, inspection
    )
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["confusion_matrix.png"]
