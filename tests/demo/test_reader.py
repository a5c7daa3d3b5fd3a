"""The results of the demo for an image, compared with the model's own outputs and with the analysis functions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import build_tiny_config, get_largest_difference, raises_one_line, randomize
from PIL import Image

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.analysis import compute_attention_rollout, compute_attribution
from modeling_vitcls.analysis.maps import VisibleRegion, overlay
from modeling_vitcls.analysis.patch_features import compute_patch_colors, draw_patch_colors
from modeling_vitcls.demo.reader import DemoModel, DemoResult, format_predictions, to_grayscale


NAMES = {0: "ant", 1: "bee", 2: "cow"}


def build_demo_model(model_class: type = ViTCLSForImageClassification, **fields: Any) -> DemoModel:
    """Return a demo model with random weights, for images of 32 x 64 pixels."""
    config = build_tiny_config(**{"image_size": [32, 64], "id2label": NAMES} | fields)
    processor = ViTCLSImageProcessor(size={"height": 32, "width": 64})
    model = randomize(model_class(config))
    return DemoModel(model, processor, "mine", None, None, is_classifier="Classification" in model_class.__name__)


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """Return an image file of 128 x 64 pixels, which is twice the size of the model's images."""
    file = tmp_path / "noise.png"
    Image.effect_noise((128, 64), 90).convert("RGB").save(file)
    return file


def test_each_task_has_the_attribution_of_its_own_label(tmp_path: Path) -> None:
    tasks = {"species": ["oak", "elm", "ash"], "age": ["young", "old"]}
    model = randomize(ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=tasks)))
    processor = ViTCLSImageProcessor(size=32)
    file = tmp_path / "noise.png"
    Image.effect_noise((32, 32), 90).convert("RGB").save(file)
    demo_model = DemoModel(model, processor, "mine", None, None, is_classifier=True)
    result = demo_model.predict(file)
    pixel_values = processor(file, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values).logits
    expected = {}
    for task, labels in tasks.items():
        best = int(logits[task].argmax())
        (tokens,) = compute_attribution(model, pixel_values, best, task)
        expected[f"{task}: {labels[best]}"] = tokens[model.config.token_layout.patches].view(4, 4)
        probabilities = dict(zip(labels, logits[task][0].softmax(0).tolist(), strict=True))
        assert result.predictions[task] == pytest.approx(probabilities, abs=1e-6)
    assert list(result.predictions) == demo_model.output_names == sorted(tasks)
    assert result.attributions.keys() == expected.keys()
    for name, values in expected.items():
        assert get_largest_difference(result.attributions[name], values) <= 1e-6 * values.max().item(), name


def test_the_result_contains_the_outputs_of_the_model(noise: Path) -> None:
    demo_model = build_demo_model(num_cls_tokens=2, num_register_tokens=1)
    result = demo_model.predict(noise)
    model = demo_model.model
    pixel_values = demo_model.processor(noise, return_tensors="pt")["pixel_values"]
    rollout = compute_attention_rollout(model, pixel_values)[0]
    attribution = compute_attribution(model, pixel_values)[0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(pixel_values, output_attentions=True, output_hidden_states=True)
    attention = torch.stack(outputs.attentions)[:, 0, :, :3]  # [layer, head, special token, key]
    assert get_largest_difference(result.token_attention, attention) <= 1e-6
    assert get_largest_difference(result.attention_maps, attention[..., 3:].unflatten(-1, (4, 8))) <= 1e-6
    assert get_largest_difference(result.rollout, rollout[:, 3:].unflatten(-1, (4, 8))) <= 1e-6
    features = torch.stack(outputs.hidden_states)[1:, 0, 3:].unflatten(1, (4, 8))
    assert get_largest_difference(result.patch_features.float(), features) <= 1e-2  # float16
    probabilities = outputs.logits[0].softmax(0)
    expected = dict(zip(NAMES.values(), probabilities.tolist(), strict=True))
    assert result.predictions == {"Label": pytest.approx(expected, abs=1e-6)}
    label = NAMES[int(probabilities.argmax())]
    assert result.attributions.keys() == {label}
    assert torch.allclose(result.attributions[label], attribution[3:].unflatten(0, (4, 8)), rtol=1e-4, atol=1e-7)
    for head, weights in ((None, attention[1].mean(0)), (0, attention[1, 0]), (1, attention[1, 1])):
        fractions = result.compute_attention_fractions(2, 1, head)
        assert fractions == pytest.approx([*weights[2, :3].tolist(), weights[2, 3:].sum().item()], abs=1e-6)
    assert result.image.size == (128, 64) and result.visible_region == (0, 0, 128, 64)
    assert [[demo_model.is_token_output_used(token, layer) for layer in range(2)] for token in range(3)] == [
        [True, True],
        [True, False],
        [True, False],
    ]


def test_the_selected_map_is_drawn(noise: Path) -> None:
    result = build_demo_model(num_cls_tokens=2, num_register_tokens=1).predict(noise)
    original = Image.open(noise)

    def assert_draws(drawn: Image.Image, values: torch.Tensor, **options: Any) -> None:
        """Check that a map [gh, gw] is drawn over the whole image."""
        expected = overlay(original, values, VisibleRegion(0, 0, 128, 64), **options)
        assert np.array_equal(np.asarray(drawn), np.asarray(expected))

    for head, layers in ((None, result.attention_maps.mean(dim=1)), (1, result.attention_maps[:, 1])):
        assert_draws(result.draw_attention(2, 1, head), layers[1, 2], min_side=384)
        for drawn, values in zip(result.draw_all_layers(2, head), layers[:, 2], strict=True):
            assert_draws(drawn, values, min_side=160)
    (label,) = result.attributions
    (rollout, rollout_name), (attribution, attribution_name) = result.draw_rollout_and_attributions(1)
    assert (rollout_name, attribution_name) == ("rollout through all layers", f"attribution of {label}")
    assert_draws(rollout, result.rollout[1], min_side=384)
    assert_draws(attribution, result.attributions[label], min_side=384)
    features = result.patch_features[0].float()
    similarity = torch.nn.functional.cosine_similarity(features, features[3, 5], dim=-1)
    assert similarity.min() < 0
    assert_draws(result.draw_similarity(0, 3, 5), similarity.clamp(min=0), max_value=1, min_side=384)
    for foreground_only in (False, True):
        (colors,) = compute_patch_colors([features], foreground_only)
        expected = draw_patch_colors(original, colors, VisibleRegion(0, 0, 128, 64), min_side=384)
        assert np.array_equal(np.asarray(result.draw_principal_components(0, foreground_only)), np.asarray(expected))


@pytest.mark.parametrize(
    ("point", "patch"),
    [
        ((100, 20), (0, 0)),
        ((299, 20), (0, 7)),
        ((124, 69), (0, 0)),
        ((125, 70), (1, 1)),
        ((299, 219), (3, 7)),
        ((99, 20), None),
        ((300, 20), None),
        ((100, 19), None),
        ((100, 220), None),
    ],
)
def test_a_click_selects_the_patch_under_the_pointer(point: tuple[int, int], patch: tuple[int, int] | None) -> None:
    """The image of 200 x 120 pixels is displayed at 400 x 240; the model receives the region (50, 10, 150, 110)."""
    maps = torch.zeros(1, 1, 1, 4, 8)
    result = DemoResult(
        Image.new("RGB", (200, 120)),
        VisibleRegion(50, 10, 150, 110),
        {},
        torch.zeros(1, 1, 1, 33),
        maps,
        maps[0, 0],
        {},
        torch.zeros(1, 4, 8, 16),
    )
    assert result.find_patch(*point, width=400, height=240) == patch


def test_the_visible_region_is_the_crop_without_incomplete_patches(tmp_path: Path) -> None:
    """Of a crop of 36 x 36 pixels, the model receives 32 x 32."""
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    processor = ViTCLSImageProcessor(size={"shortest_edge": 40}, do_center_crop=True, crop_size=36)
    Image.new("RGB", (160, 80)).save(tmp_path / "black.png")
    result = DemoModel(model, processor, "mine", None, None, is_classifier=True).predict(tmp_path / "black.png")
    assert result.visible_region == (44, 4, 108, 68)
    Image.new("RGB", (3200, 1600)).save(tmp_path / "large.png")
    large = DemoModel(model, processor, "mine", None, None, is_classifier=True).predict(tmp_path / "large.png")
    assert large.image.size == (1024, 512)
    assert large.visible_region == pytest.approx((281.6, 25.6, 691.2, 435.2))
    assert {image.size for image in large.draw_all_layers(0, None)} == {(320, 160)}
    assert {image.size for image, _ in large.draw_rollout_and_attributions(0)} == {(1024, 512)}
    assert large.draw_attention(0, 0, None).size == large.draw_principal_components(0).size == (1024, 512)


# Predictions ---------------------------------------------------------------------------------------------------------


def test_each_problem_type_has_its_predictions() -> None:
    logits = torch.tensor([[1.5, -2.0, 0.25]])
    exponentials = logits[0].exp()
    softmax = dict(zip(NAMES.values(), (exponentials / exponentials.sum()).tolist(), strict=True))
    sigmoid = dict(zip(NAMES.values(), (1 / (1 + (-logits[0]).exp())).tolist(), strict=True))
    for problem_type, title, expected in (
        (None, "Label", pytest.approx(softmax, abs=1e-6)),
        ("single_label_classification", "Label", pytest.approx(softmax, abs=1e-6)),
        ("multi_label_classification", "Labels with independent probabilities", pytest.approx(sigmoid, abs=1e-6)),
        ("regression", "Regression values", "ant: 1.5, bee: -2, cow: 0.25"),
    ):
        demo_model = build_demo_model(problem_type=problem_type)
        assert format_predictions(logits, demo_model.model.config) == {title: expected}
        assert demo_model.output_names == [title]
        assert demo_model.has_top_label is (problem_type != "multi_label_classification")


def test_a_single_label_is_a_binary_classifier() -> None:
    binary = build_demo_model(id2label={0: "ant"}, num_labels=1)
    (prediction,) = format_predictions(torch.tensor([[0.5]]), binary.model.config).values()
    assert prediction == {"ant": pytest.approx(0.622459, abs=1e-6)}
    assert not binary.has_top_label
    value = build_demo_model(id2label={0: "age"}, num_labels=1, problem_type="regression")
    assert format_predictions(torch.tensor([[0.5]]), value.model.config) == {"Regression values": "age: 0.5"}


def test_an_encoder_has_attention_and_no_predictions(noise: Path) -> None:
    demo_model = build_demo_model(ViTCLSModel, num_register_tokens=1)
    assert not demo_model.has_labels and demo_model.output_names == []
    result = demo_model.predict(noise)
    assert (result.predictions, result.attributions) == ({}, {})
    pixel_values = demo_model.processor(noise, return_tensors="pt")["pixel_values"]
    demo_model.model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = demo_model.model(pixel_values, output_attentions=True).attentions
    assert get_largest_difference(result.token_attention, torch.stack(attentions)[:, 0, :, :2]) <= 1e-6
    assert demo_model.is_token_output_used(0, 1) and not demo_model.is_token_output_used(1, 1)


def test_gray_models_accept_images_of_any_mode(tmp_path: Path) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(num_channels=1)))
    processor = ViTCLSImageProcessor(size=32, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
    demo_model = DemoModel(model, processor, "mine", None, None, is_classifier=True)
    gray = Image.effect_noise((32, 32), 90)
    predictions = []
    for mode in ("L", "RGB", "P", "RGBA"):
        gray.convert(mode).save(tmp_path / f"{mode}.png")
        (prediction,) = demo_model.predict(tmp_path / f"{mode}.png").predictions.values()
        predictions.append(prediction)
    assert all(prediction == pytest.approx(predictions[0], abs=1e-6) for prediction in predictions)
    assert max(predictions[0].values()) > 0.34


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("1", "1"), ("L", "L"), ("LA", "LA"), ("I;16", "I;16"), ("RGB", "L"), ("P", "L"), ("RGBA", "LA"), ("CMYK", "L")],
)
def test_grayscale_keeps_transparency_and_gray_modes(mode: str, expected: str) -> None:
    assert to_grayscale(Image.new(mode, (2, 2))).mode == expected


# Loading -------------------------------------------------------------------------------------------------------------


def test_unsupported_models_are_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    with raises_one_line("model type 'vit'", "`vitcls convert`"):
        DemoModel.load(str(tmp_path / "other"))
    with raises_one_line("there is no folder", error=OSError):
        DemoModel.load(str(tmp_path / "nowhere"))
    with raises_one_line("1 or 3 channels", "mine requires images with 4 channels"):
        build_demo_model(num_channels=4).check_is_supported()
    build_demo_model(num_channels=1).check_is_supported()


def test_a_checkpoint_without_classifier_weights_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("classifier")}
    model.save_pretrained(folder, state_dict=weights)
    ViTCLSImageProcessor(size=32).save_pretrained(folder)
    with raises_one_line(f"{folder} has no weights for classifier.bias. Train the model first"):
        DemoModel.load(str(folder))
    model.save_pretrained(folder)
    assert DemoModel.load(str(folder)).has_labels


def test_an_encoder_is_loaded_without_pooler(tmp_path: Path) -> None:
    encoder = randomize(ViTCLSModel(build_tiny_config(pooling="attention"), add_pooling_layer=False))
    encoder.save_pretrained(tmp_path)
    ViTCLSImageProcessor(size=32).save_pretrained(tmp_path)
    demo_model = DemoModel.load(str(tmp_path))
    assert (demo_model.source, demo_model.commit, demo_model.is_classifier) == (str(tmp_path), None, False)
    loaded = demo_model.model.state_dict()
    assert loaded.keys() == encoder.state_dict().keys()
    assert all(torch.equal(weight, encoder.state_dict()[name]) for name, weight in loaded.items())
