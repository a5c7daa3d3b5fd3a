"""The images of a model card: their files, and the attention of samples compared with the model."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.figure_titles import get_titles
from helpers.tiny_models import build_tiny_config, randomize
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.publishing import card_images
from modeling_vitcls.publishing.card_images import (
    MAX_BYTES,
    Sample,
    build_attention_samples,
    build_figures,
    encode_small_png,
    format_title,
    write_card_images,
)


MANY = {"num_cls_tokens": 3, "num_distillation_tokens": 2, "num_register_tokens": 8}
FITTING = {"size": {"height": 32, "width": 32}}
GREY = {"do_convert_rgb": False, "image_mean": [0.5], "image_std": [0.5]}


def load_digit_images(count: int = 5) -> list[tuple[Image.Image, str]]:
    """Return handwritten digits, 8 x 8 gray pixels, with their labels."""
    data = load_digits()
    pictures = [Image.fromarray((values * 15).astype(np.uint8)) for values in data.images[:count]]
    return [(picture, str(label)) for picture, label in zip(pictures, data.target[:count], strict=True)]


def check_files(folder: Path, paths: dict[str, str]) -> dict[str, Image.Image]:
    """Return the written images, after a check of their files."""
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == set(paths.values())
    assert all((folder / path).stat().st_size < MAX_BYTES for path in paths.values())
    opened = {name: Image.open(folder / path) for name, path in paths.items()}
    assert all(
        picture.format == "PNG" and picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
        for picture in opened.values()
    )
    return opened


def test_a_classifier_has_all_images_and_is_not_changed(tmp_path):
    config = build_tiny_config(num_register_tokens=1, num_channels=1, hidden_dropout_prob=0.5)
    model = randomize(ViTCLSForImageClassification(config)).train()
    results = {"accuracy": 0.9, "confusion_matrix": [[3, 0, 0], [1, 2, 0], [0, 0, 4]]}
    folder = tmp_path / "new" / "card"
    paths = write_card_images(folder, model, ViTCLSImageProcessor(**FITTING, **GREY), results, load_digit_images())
    assert paths == {
        "token_layout": "images/token_layout.png",
        "confusion_matrix": "images/confusion_matrix.png",
        "attention": "images/attention.png",
    }
    assert check_files(folder, paths)["token_layout"].width > 800
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_task_has_a_matrix_unless_no_image_was_counted(tmp_path):
    model = randomize(
        ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=3, tasks={"age": 2, "kind": 60, "x": 2}))
    )
    results = {
        "age_confusion_matrix": [[3, 1], [0, 0]],  # there are no images of the second class
        "kind_confusion_matrix": np.eye(60, dtype=int).tolist(),
        "x_confusion_matrix": [[0, 0], [0, 0]],
    }
    paths = write_card_images(tmp_path, model, ViTCLSImageProcessor(**FITTING), results)
    assert list(paths) == ["token_layout", "confusion_matrix_age", "confusion_matrix_kind"]
    check_files(tmp_path, paths)


@pytest.mark.parametrize("model_class", [ViTCLSModel, ViTCLSForMaskedImageModeling])
def test_an_encoder_has_attention_without_predictions(model_class):
    """All CLS tokens of the last layer are outputs of the model."""
    model = randomize(model_class(build_tiny_config(num_cls_tokens=2)))
    processor = ViTCLSImageProcessor(**FITTING)
    samples = list(build_attention_samples(model, processor, load_digit_images(3)))
    assert [sample.title for sample in samples] == ["0", "1", "2"]
    for sample, (image, _) in zip(samples, load_digit_images(3), strict=True):
        rows = model.token_attention(processor(image, return_tensors="pt")["pixel_values"])[0, -1].mean(dim=0)
        assert torch.allclose(sample.maps, rows[:, 2:].unflatten(1, (4, 4)), atol=1e-6)


def test_labels_in_titles_are_predicted_from_one_half():
    config = build_tiny_config(num_labels=5, problem_type="multi_label_classification")
    model, processor = randomize(ViTCLSForImageClassification(config)), ViTCLSImageProcessor(**FITTING)
    (image, _), *_ = load_digit_images(1)
    with torch.no_grad():
        logits = model(processor(image, return_tensors="pt")["pixel_values"]).logits[0]
        model.classifier.bias += torch.tensor([0.1, -0.1, 3.0, -3.0, 0.1]) - logits
    (sample,) = build_attention_samples(model, processor, [(image, "LABEL_0")])
    before, _, labels = sample.title.partition(", predicted ")
    assert before == "LABEL_0" and set(labels.split(", ")) == {"LABEL_0", "LABEL_2", "LABEL_4"}


@pytest.mark.parametrize(("num_registers", "num_images"), [(0, 3), (2, 2), (6, 1)])
def test_the_attention_figure_of_a_card_has_few_overlays(num_registers, num_images, monkeypatch):
    """The numbers of images and overlays are limited, but at least one image is drawn."""
    monkeypatch.setattr(card_images, "MAX_SAMPLES", 3)
    monkeypatch.setattr(card_images, "MAX_OVERLAYS", 6)
    model = randomize(ViTCLSModel(build_tiny_config(num_register_tokens=num_registers)))
    figures = dict(build_figures(model, ViTCLSImageProcessor(**FITTING), {}, load_digit_images(5)))
    titles = [row[0] for row in get_titles(figures["attention"]) if row[0]]
    assert titles == [str(index) for index in range(num_images)]


def test_images_of_an_earlier_model_are_removed(tmp_path):
    processor = ViTCLSImageProcessor(**FITTING)
    classifier = randomize(ViTCLSForImageClassification(build_tiny_config(num_labels=1)))
    write_card_images(tmp_path, classifier, processor, {"confusion_matrix": [[1]]}, load_digit_images())
    (tmp_path / "images" / "mine.png").write_bytes(b"")
    no_tokens = randomize(ViTCLSForImageClassification(build_tiny_config(num_cls_tokens=0, pooling="mean")))
    assert set(write_card_images(tmp_path, no_tokens, processor, {}, load_digit_images())) == {"token_layout"}
    assert {file.name for file in (tmp_path / "images").iterdir()} == {"token_layout.png", "mine.png"}


def test_attention_samples_show_the_last_layer_that_is_read_with_label_and_prediction():
    fields = {"num_distillation_tokens": 1, "num_register_tokens": 2, "patch_size": [8, 4]}
    config = build_tiny_config(**fields, hidden_dropout_prob=0.5)
    config._attn_implementation = "eager"
    model = randomize(ViTCLSForImageClassification(config)).train()
    processor = ViTCLSImageProcessor(size={"shortest_edge": 40}, do_center_crop=True, crop_size=[33, 38])
    picture = Image.fromarray(load_sample_images().images[0])
    look = next(build_attention_samples(model, processor, [(picture, None)]))
    pixel_values = processor(picture, return_tensors="pt")["pixel_values"]
    outputs = model.eval()(pixel_values, output_attentions=True)
    first, last = (layer[0].mean(dim=0)[:4, 4:].unflatten(1, (4, 9)) for layer in outputs.attentions)
    expected = torch.cat([last[:2], first[2:]])  # the registers of the last layer are not used
    assert torch.allclose(look.maps, expected, atol=1e-6)
    assert look.title == f"predicted LABEL_{outputs.logits.argmax()}"
    assert look.image.size == picture.size
    scale = picture.height / 40
    assert look.visible_region.bottom - look.visible_region.top == pytest.approx(32 * scale)  # whole patches
    assert look.visible_region.right - look.visible_region.left == pytest.approx(36 * picture.width / 59)


def test_a_rotated_photograph_is_shown_upright():
    """The image of a sample has the orientation of its map and of the model input."""
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    photograph = Image.fromarray(load_sample_images().images[0])
    photograph.getexif()[0x0112] = 6  # the EXIF tag of the orientation: rotate clockwise
    (sample,) = build_attention_samples(model, ViTCLSImageProcessor(size=32), [(photograph, None)])
    assert np.array_equal(np.asarray(sample.image), np.rot90(np.asarray(photograph), -1))


def test_unsupported_samples_are_skipped():
    model = randomize(ViTCLSForImageClassification(build_tiny_config(num_channels=1)))
    samples = [(Image.new("RGB", (9, 9)), "colour"), (Image.new("F", (9, 9)), "floats"), *load_digit_images(1)]
    looks = list(build_attention_samples(model, ViTCLSImageProcessor(**FITTING, **GREY), samples))
    assert [look.title[:12] for look in looks] == ["0, predicted"]


TITLES = {
    "one_label": ("7", {"label": "1", "probability": 0.5}, "7, predicted 1"),
    "no_truth": (None, {"label": "1", "probability": 0.5}, "predicted 1"),
    "no_answer": ("7", {}, "7"),
    "neither": (None, {}, ""),
    "tasks": (
        "old cat",
        {"age_label": "old", "age_probability": 0.5, "kind_label": "cat"},
        "old cat, predicted age old, kind cat",
    ),
    "several": ("cat, dog", {"labels": ["cat", "cow"], "probabilities": [1, 1]}, "cat, dog, predicted cat, cow"),
    "none_of_several": ("cat", {"labels": [], "probabilities": []}, "cat, predicted nothing"),
}


@pytest.mark.parametrize(("label", "answer", "expected"), TITLES.values(), ids=TITLES)
def test_titles(label, answer, expected):
    assert format_title(label, answer) == expected


@pytest.mark.slow
@pytest.mark.integration
def test_large_photographs_and_many_tokens_make_small_files(tmp_path):
    photograph = Image.fromarray(load_sample_images().images[0]).resize((4000, 3000), Image.Resampling.BILINEAR)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (750, 1000, 3)).astype(np.uint8))
    samples: list[Sample] = [(noise, None), (photograph, None)]
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**MANY)))
    processor = ViTCLSImageProcessor(size={"shortest_edge": 36}, do_center_crop=True, crop_size=32)
    opened = check_files(tmp_path, write_card_images(tmp_path, model, processor, {}, samples))
    assert opened["attention"].width > 400


def test_the_quality_of_a_figure_is_reduced_until_its_file_is_small():
    figure = Figure(figsize=(7, 7), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(np.random.default_rng(0).random((900, 900, 3)))
    png = encode_small_png(figure)
    assert MAX_BYTES / 3 < len(png) < MAX_BYTES
    assert Image.open(BytesIO(png)).width >= 400
