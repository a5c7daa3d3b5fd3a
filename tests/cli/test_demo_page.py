"""The demo: predictions, the attention of each special token, and the examples."""

import asyncio
import dataclasses
import importlib
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import (
    build_tiny_config,
    raises_one_line,
    randomize,
    save_classifier,
    save_with_processor,
)
from matplotlib import colormaps
from PIL import Image

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.cli.demo import DemoOptions, run, write_examples
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.sources import load_splits
from modeling_vitcls.data.splits import build_held_out_rule, select_held_out
from modeling_vitcls.hub.model_files import hash_weights
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.runtime.files import write_json


pytestmark = pytest.mark.integration

PROCESSOR = ViTCLSImageProcessor(size=32)


@pytest.fixture(scope="module")
def page() -> Any:
    """Return the module of the page. Importing gradio takes seconds in each test process."""
    return importlib.import_module("modeling_vitcls.cli.demo_page")


def build_classifier(**fields: Any) -> Any:
    return randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))


def fix_logits(model: Any, logits: list[float]) -> Any:
    """Return the model with a classifier that returns `logits` for every image."""
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor(logits))
    return model


def call_page(blocks: Any, *inputs: Any) -> list[Any]:
    """Call the function of the page with decoded inputs."""
    (function,) = {each.fn for each in blocks.fns.values() if each.api_name == "predict"}
    assert function is not None
    return function(*inputs)


def save_digits_run(folder: Path, dataset: str = "digits") -> Path:
    """Save a classifier as if a run on digits had written it, and return the folder."""
    save_classifier(folder)
    options = DataOptions("digits")
    (images,) = load_splits(options).images_by_split.values()
    _, record = select_held_out(images, build_held_out_rule(options))
    results = {
        "dataset": "digits",
        "weights_sha256": hash_weights(folder),
        "held_out": dataclasses.asdict(dataclasses.replace(record, dataset="digits")),
    }
    write_json(folder / "results.json", results)
    (folder / "config.resolved.yaml").write_text(f"dataset: {dataset}\n")
    return folder


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of uploaded files."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


@pytest.fixture
def photo(uploads: Path) -> dict[str, str]:
    """Upload an image of 50 x 40 pixels, and return the input of the page."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(uploads / "image.png")
    return {"path": str(uploads / "image.png")}


def read_pixels(photo: dict[str, str]) -> torch.Tensor:
    """Return the pixel values [1, C, H, W] of the uploaded image."""
    return PROCESSOR(Image.open(photo["path"]), return_tensors="pt")["pixel_values"]


def test_the_page_shows_the_prediction_and_a_map_per_token(
    page: Any, photo: dict[str, str]
) -> None:
    model = build_classifier(num_register_tokens=2)
    prediction, pictures = call_page(page.build_page(model, PROCESSOR, "mine"), photo, 1)
    with torch.no_grad():
        logits = model(read_pixels(photo)).logits[0]
    names = [model.config.id2label[index] for index in range(3)]
    expected = dict(zip(names, logits.softmax(0).tolist(), strict=True))
    assert prediction.probabilities == pytest.approx(expected)
    assert prediction.answer == names[int(logits.argmax())]
    assert [name for _, name in pictures] == ["image", "CLS", "register 1", "register 2"]


def test_a_page_without_an_image_is_empty(page: Any) -> None:
    assert call_page(page.build_page(build_classifier(), PROCESSOR, "mine"), None, 1) == [None, []]


def test_the_image_and_its_maps_have_the_same_size(page: Any) -> None:
    model = build_classifier(num_register_tokens=1)
    pixel_values = torch.randn(1, 3, 32, 32)
    image, *maps = page.draw_attention(model, PROCESSOR, pixel_values, 0)
    assert [each.size for each in maps] == [image.size] * 2
    shown = page.undo_normalization(PROCESSOR, pixel_values).resize(image.size)
    assert np.array_equal(np.asarray(image), np.asarray(shown))


def test_a_map_has_the_attention_of_its_token_and_layer(
    page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a white image, a patch is brighter the more attention it gets (averaged over heads).

    The map covers 60%.
    """
    model = build_classifier(num_register_tokens=1, image_size=[32, 40])
    pixel_values = torch.randn(1, 3, 32, 40)
    white = ViTCLSImageProcessor(size=32, image_mean=[100.0] * 3, image_std=[1.0] * 3)
    brightest = 0.4 * 255 + 0.6 * 255 * np.array(colormaps["inferno"](1.0)[:3])

    for layer in (0, 1):
        expected = (
            model.token_attention(pixel_values, layers=[layer])[0, 0]
            .mean(0)[:, 2:]
            .reshape(2, 4, 5)
        )
        maps = page.draw_attention(model, white, pixel_values, layer)[1:]
        assert maps[0].size == (320, 256)
        for drawn, values in zip(maps, expected, strict=True):
            brightness = (
                torch.tensor(np.asarray(drawn.convert("L")).astype(float))
                .reshape(4, 64, 5, 64)
                .mean((1, 3))
            )
            assert brightness.argmax() == values.argmax()
            assert brightness.argmin() == values.argmin()
            row, column = divmod(int(values.argmax()), 5)
            assert np.asarray(drawn)[64 * row + 32, 64 * column + 32] == pytest.approx(
                brightest, abs=1
            )

    monkeypatch.setattr(page, "MIN_SIDE", 16)  # large images are not scaled
    assert page.draw_attention(model, white, pixel_values, 0)[0].size == (40, 32)


@pytest.mark.parametrize("layer", [0, -1, 99, 1.5, float("nan"), float("inf"), None, "2", [1]])
def test_other_layers_are_errors_of_one_line_without_a_traceback(
    page: Any, photo: dict[str, str], layer: Any
) -> None:
    blocks = page.build_page(build_classifier(), PROCESSOR, "mine")
    with pytest.raises(page.gr.Error, match="from 1 to 2") as raised:
        call_page(blocks, photo, layer)
    assert not raised.value.print_exception
    assert "\n" not in raised.value.message


@pytest.mark.parametrize("number", [1, 2])
def test_layers_count_from_1(page: Any, photo: dict[str, str], number: int) -> None:
    model = build_classifier()
    _, pictures = call_page(page.build_page(model, PROCESSOR, "mine"), photo, number)
    expected = page.draw_attention(model, PROCESSOR, read_pixels(photo), number - 1)
    assert np.array_equal(np.asarray(pictures[1][0]), np.asarray(expected[1]))


def test_the_image_is_shown_as_the_model_sees_it(page: Any) -> None:
    size = {"shortest_edge": 40}
    crop = {"height": 32, "width": 32}
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for fields in ({}, {"do_normalize": False}, {"do_normalize": False, "do_rescale": False}):
        processor = ViTCLSImageProcessor(size=size, do_center_crop=True, crop_size=crop, **fields)
        pixel_values = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        shown = np.asarray(page.undo_normalization(processor, pixel_values)).astype(int)
        assert np.abs(shown - pixels[4:36, 14:46]).max() <= 1


def test_each_task_has_its_prediction(page: Any) -> None:
    tasks = {"species": ["oak", "elm"], "age": ["young", "old", "ancient"]}
    model: Any = randomize(
        ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=tasks))
    )
    predictions = page.compute_predictions(model, torch.randn(1, 3, 32, 32))
    assert page.list_classifiers(model) == ["age", "species"]
    assert [list(each.probabilities) for each in predictions] == [tasks["age"], tasks["species"]]
    assert all(sum(each.probabilities.values()) == pytest.approx(1) for each in predictions)


def test_several_labels_are_those_with_at_least_half_the_probability(page: Any) -> None:
    model = build_classifier(problem_type="multi_label_classification")
    images = torch.randn(1, 3, 32, 32)
    (prediction,) = page.compute_predictions(model, images)
    probabilities = model(images).logits[0].sigmoid().tolist()
    assert list(prediction.probabilities.values()) == pytest.approx(probabilities)
    (found,) = page.compute_predictions(fix_logits(model, [2.0, -1.0, 1.0]), images)
    assert found.answer == "LABEL_0, LABEL_2"
    (found,) = page.compute_predictions(fix_logits(model, [-2.0, -1.0, -1.0]), images)
    assert found.answer == "none of these"


def test_a_regression_shows_its_value_and_a_single_label_its_probability(page: Any) -> None:
    images = torch.randn(1, 3, 32, 32)
    regression = build_classifier(problem_type="regression", num_labels=1)
    (prediction,) = page.compute_predictions(regression, images)
    assert prediction.answer == f"LABEL_0: {regression(images).logits.item():.4g}"
    (binary,) = page.compute_predictions(build_classifier(num_labels=1), images)
    assert 0 < binary.probabilities["LABEL_0"] < 1


def test_an_image_above_the_energy_threshold_shows_none_of_the_labels(page: Any) -> None:
    """The energy is that of the calibrated logits, as in `vitcls predict`.

    The probabilities are still shown.
    """
    images = torch.randn(1, 3, 32, 32)
    model = fix_logits(build_classifier(temperature=2.0), [8.0, 4.0, 0.0])
    energy = -float(np.log(np.exp([4.0, 2.0, 0.0]).sum()))

    for threshold, answer in ((energy + 0.1, "LABEL_0"), (energy - 0.1, "none of these")):
        model.config.energy_threshold = threshold
        (prediction,) = page.compute_predictions(model, images)
        assert prediction.answer == answer
        expected = torch.tensor([4.0, 2.0, 0.0]).softmax(0).tolist()
        assert list(prediction.probabilities.values()) == pytest.approx(expected)
        shown = page.show_prediction(prediction)
        assert shown.label == answer
        assert [each.label for each in shown.confidences] == ["LABEL_0", "LABEL_1", "LABEL_2"]


def test_each_extra_head_has_a_panel(page: Any, photo: dict[str, str]) -> None:
    heads = {
        "weather": {"labels": ["sun", "rain"], "temperature": 3.0},
        "tags": {"labels": ["a", "b", "c"], "problem_type": "multi_label_classification"},
    }
    model = build_classifier(extra_heads=heads)
    blocks = page.build_page(model, PROCESSOR, "mine")

    _, tags, weather, pictures = call_page(blocks, photo, 1)
    panels = [each.label for each in blocks.blocks.values() if isinstance(each, page.gr.Label)]
    assert panels == ["Prediction", "tags", "weather"]

    with torch.no_grad():
        logits = model(read_pixels(photo)).task_logits
    expected = logits["weather"][0].softmax(0).tolist()
    assert list(weather.probabilities.values()) == pytest.approx(expected)
    expected = logits["tags"][0].sigmoid().tolist()
    assert list(tags.probabilities.values()) == pytest.approx(expected)
    assert len(pictures) == 2


def test_added_classes_are_shown_with_the_others(page: Any) -> None:
    heads = {"added_classes_001": {"labels": ["sun"], "adds_classes": True}}
    id2label = {0: "rain", 1: "snow", 2: "sun"}
    model = build_classifier(extra_heads=heads, id2label=id2label)
    assert page.list_classifiers(model) == ["Prediction"]
    (prediction,) = page.compute_predictions(model, torch.randn(1, 3, 32, 32))
    assert list(prediction.probabilities) == ["rain", "snow", "sun"]


def test_only_uploaded_images_and_examples_are_opened(
    page: Any, uploads: Path, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.png"
    example = tmp_path / "example.png"
    text = uploads / "notes.png"
    for file in (secret, example):
        Image.new("RGB", (40, 40)).save(file)
    text.write_text("no image")
    for url in ("http://127.0.0.1/image.png", "https://127.0.0.1/image.png"):
        cached = page.build_image_input().async_move_resource_to_block_cache(url)
        with ThreadPoolExecutor() as pool:
            error = pool.submit(asyncio.run, cached).exception()
        assert isinstance(error, page.gr.Error)  # gradio would download the image to the server
        assert not error.print_exception
    (uploads / "link.png").symlink_to(secret)
    blocks = page.build_page(build_classifier(), PROCESSOR, "mine", [example])
    assert call_page(blocks, {"path": str(example)}, 1)[0]

    paths = (
        secret,
        f"{uploads}/../secret.png",
        uploads / "link.png",
        uploads,
        tmp_path / "missing.png",
        "a\0b",
        "",
    )
    for path in (*map(str, paths), None, "http://127.0.0.1/image.png"):
        with pytest.raises(page.gr.Error, match="upload an image"):
            call_page(blocks, {"path": path}, 1)
    with pytest.raises(page.gr.Error, match=r"mine\.png") as raised:
        call_page(blocks, {"path": str(text), "orig_name": "mine.png"}, 1)
    assert str(uploads) not in str(raised.value)


def test_an_encoder_of_gray_images_shows_its_attention(page: Any, uploads: Path) -> None:
    encoder = randomize(ViTCLSModel(build_tiny_config(num_channels=1), add_pooling_layer=False))
    gray = ViTCLSImageProcessor(size=32, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
    Image.new("L", (40, 40), 128).save(uploads / "gray.png")
    (pictures,) = call_page(
        page.build_page(encoder, gray, "encoder"), {"path": str(uploads / "gray.png")}, 2
    )
    assert [name for _, name in pictures] == ["image", "CLS"]


def test_encoders_of_the_hub_have_no_pooler_and_classifiers_are_in_evaluation_mode(
    page: Any, tmp_path: Path
) -> None:
    folder = save_with_processor(
        ViTCLSModel(build_tiny_config(), add_pooling_layer=False), tmp_path / "encoder"
    )
    model, _ = page.load_from_hub(str(folder), "v1")
    assert type(model).__name__ == "ViTCLSModel"
    assert model.pooler is None

    model, processor = page.load_from_hub(str(save_classifier(tmp_path / "classifier")), "v1")
    assert type(model).__name__ == "ViTCLSForImageClassification"
    assert not model.training
    assert processor.size.height == 32


def test_only_the_prediction_is_public(page: Any) -> None:
    """The functions receive the uploaded files. The slider starts at the last layer."""
    blocks = page.build_page(build_classifier(), PROCESSOR, "mine")
    (slider,) = (each for each in blocks.blocks.values() if isinstance(each, page.gr.Slider))
    assert (slider.minimum, slider.maximum, slider.value, slider.step) == (1, 2, 2, 1)
    assert slider.visible

    assert blocks.title == "mine"
    assert blocks.delete_cache == (3600, 3600)  # uploads are deleted after an hour

    assert [each.preprocess for each in blocks.fns.values()] == [False, False]
    assert {each.api_name for each in blocks.fns.values() if each.api_visibility == "public"} == {
        "predict"
    }


def test_errors_are_one_line(page: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("demo_app.py", "--model", tmp_path) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with raises_one_line(f"port {port}", "--port", error=OSError):
            page.serve_demo(build_classifier(), PROCESSOR, "mine", port=port, host="127.0.0.1")


def test_the_page_is_served_until_the_process_is_stopped(
    page: Any, uploads: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 40)).save(uploads / "example.png")
    served: list[Any] = []
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda blocks: served.append(blocks))

    page.serve_demo(
        build_classifier(), PROCESSOR, "mine", [uploads / "example.png"], host="127.0.0.1"
    )
    (blocks,) = served

    with closing(blocks):
        # the examples
        assert any(isinstance(each, page.gr.Dataset) for each in blocks.blocks.values())
        with urlopen(blocks.local_url, timeout=60) as answer:
            assert answer.status == 200
        assert f"mine: {blocks.local_url}" in capsys.readouterr().out


def test_the_examples_are_images_that_training_held_out(tmp_path: Path) -> None:
    folder = save_digits_run(tmp_path / "run")
    options = DataOptions("digits")
    (images,) = load_splits(options).images_by_split.values()
    is_held_out, _ = select_held_out(images, build_held_out_rule(options))
    held_out = {images.images[index].tobytes() for index in np.flatnonzero(is_held_out).tolist()}
    files = write_examples(ModelFolder(folder), tmp_path)
    assert len(files) == 8
    for file in files:
        with Image.open(file) as image:
            assert image.tobytes() in held_out


@pytest.mark.parametrize("dataset", ["./gone", "someone/on-the-hub"])
def test_a_dataset_that_is_not_on_this_machine_has_no_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=AssertionError("network")))
    assert not write_examples(ModelFolder(save_digits_run(tmp_path / "run", dataset)), tmp_path)


def test_a_model_without_a_run_has_no_examples(tmp_path: Path) -> None:
    assert not write_examples(ModelFolder(save_classifier(tmp_path / "mine")), tmp_path)


def test_held_out_images_are_only_shown_on_this_machine(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Mock()
    monkeypatch.setattr(page, "serve_demo", served)
    folder = save_digits_run(tmp_path / "run")
    for host, num_examples in (("127.0.0.1", 8), ("0.0.0.0", 0)):
        run(DemoOptions(model=str(folder), host=host))
        assert len(served.call_args.kwargs["examples"]) == num_examples
