"""The images of a model card, compared with the model and the results."""

from pathlib import Path

import numpy as np
from helpers.tiny_models import build_tiny_config
from matplotlib.figure import Figure
from PIL import Image

from modeling_vitcls.publishing.card_images import plot_confusion_matrix, write_card_images


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
