"""The page of the demo: predictions, and the attention of each special token over the image that the model sees."""

import asyncio
import importlib
import socket
from concurrent.futures import ThreadPoolExecutor
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


pytestmark = pytest.mark.integration

PROCESSOR = ViTCLSImageProcessor(size=32)


@pytest.fixture(scope="module")
def page() -> Any:
    """Return the module of the page. Importing gradio takes seconds in each test process."""
    return importlib.import_module("modeling_vitcls.cli.demo_page")


def build_classifier(**fields: Any) -> Any:
    return randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))


def call_page(blocks: Any, *inputs: Any) -> list[Any]:
    """Call the function of the page with decoded inputs."""
    (function,) = {each.fn for each in blocks.fns.values() if each.api_name == "predict"}
    assert function is not None
    return function(*inputs)


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of uploaded files."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


def test_the_page_shows_the_prediction_and_a_map_per_token(page: Any, uploads: Path) -> None:
    model = build_classifier(num_register_tokens=2)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    image.save(uploads / "image.png")
    label, maps = call_page(
        page.build_page(model, PROCESSOR, "mine"), {"path": str(uploads / "image.png")}, 1
    )
    with torch.no_grad():
        logits = model(PROCESSOR(image, return_tensors="pt")["pixel_values"]).logits[0]
    names = [model.config.id2label[index] for index in range(3)]
    assert label == pytest.approx(dict(zip(names, logits.softmax(0).tolist(), strict=True)))
    assert [name for _, name in maps] == ["CLS", "register 1", "register 2"]
    assert call_page(page.build_page(model, PROCESSOR, "mine"), None, 1) == [None, []]


def test_a_map_has_the_attention_of_its_token_and_layer(
    page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a white image, a patch is brighter the more attention it gets (averaged over heads). The map covers 60%."""
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
        maps = page.draw_attention(model, white, pixel_values, layer)
        assert len(maps) == 2
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


def test_the_image_is_shown_as_the_model_sees_it(page: Any) -> None:
    size = {"shortest_edge": 40}
    crop = {"height": 32, "width": 32}
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for fields in ({}, {"do_normalize": False}, {"do_normalize": False, "do_rescale": False}):
        processor = ViTCLSImageProcessor(size=size, do_center_crop=True, crop_size=crop, **fields)
        pixel_values = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
        shown = np.asarray(page.undo_normalization(processor, pixel_values)).astype(int)
        assert np.abs(shown - pixels[4:36, 14:46]).max() <= 1


def test_each_problem_type_has_its_prediction(page: Any) -> None:
    tasks = {"species": ["oak", "elm"], "age": ["young", "old", "ancient"]}
    multi_task: Any = randomize(
        ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=tasks))
    )
    images = torch.randn(1, 3, 32, 32)
    predictions: Any = page.compute_predictions(multi_task, images)
    assert [list(each) for each in predictions] == list(multi_task.config.task_labels().values())
    assert all(sum(each.values()) == pytest.approx(1) for each in predictions)
    multi_label = build_classifier(problem_type="multi_label_classification")
    (prediction,) = page.compute_predictions(multi_label, images)
    assert isinstance(prediction, dict)
    assert list(prediction.values()) == pytest.approx(
        multi_label(images).logits[0].sigmoid().tolist()
    )
    regression = build_classifier(problem_type="regression", num_labels=1)
    assert page.compute_predictions(regression, images) == [
        f"LABEL_0: {regression(images).logits.item():.4g}"
    ]
    (binary,) = page.compute_predictions(build_classifier(num_labels=1), images)
    assert isinstance(binary, dict)
    assert 0 < next(iter(binary.values())) < 1


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
        with pytest.raises(page.gr.Error, match="upload an image"), ThreadPoolExecutor() as pool:
            pool.submit(
                asyncio.run, cached
            ).result()  # gradio would download the image to the server
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


def test_encoders_and_gray_images(page: Any, uploads: Path) -> None:
    encoder = randomize(ViTCLSModel(build_tiny_config(num_channels=1), add_pooling_layer=False))
    gray = ViTCLSImageProcessor(size=32, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
    Image.new("L", (40, 40), 128).save(uploads / "gray.png")
    (maps,) = call_page(
        page.build_page(encoder, gray, "encoder"), {"path": str(uploads / "gray.png")}, 2
    )
    assert [name for _, name in maps] == ["CLS"]


def test_models_of_the_hub(page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor")
    loaders = {name: Mock(wraps=getattr(page, name)) for name in names}
    for name, loader in loaders.items():
        monkeypatch.setattr(page, name, loader)
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
    for loader in loaders.values():
        options = loader.from_pretrained.call_args.kwargs
        assert (options["revision"], options["trust_remote_code"]) == ("v1", True)


def test_only_the_prediction_is_public(page: Any) -> None:
    """The functions receive the uploaded files. The slider starts at the last layer."""
    blocks = page.build_page(build_classifier(), PROCESSOR, "mine")
    (slider,) = (each for each in blocks.blocks.values() if isinstance(each, page.gr.Slider))
    assert (slider.minimum, slider.maximum, slider.value, slider.step) == (1, 2, 2, 1)
    assert slider.visible
    (label,) = (each for each in blocks.blocks.values() if isinstance(each, page.gr.Label))
    assert (label.label, label.num_top_classes) == ("Prediction", 5)
    assert (blocks.title, blocks.delete_cache) == (
        "mine",
        (3600, 3600),
    )  # uploads are deleted after an hour
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
    assert any(isinstance(each, page.gr.Dataset) for each in blocks.blocks.values())  # the examples
    with urlopen(blocks.local_url, timeout=60) as answer:
        assert answer.status == 200
        assert f"mine: {blocks.local_url}" in capsys.readouterr().out
    blocks.close()
