"""The page of the demo without a browser: its events, its functions and its address. test_space.py tests the page in a
browser.
"""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import gradio as gr
import numpy as np
import pytest
from helpers.demo_models import build_classifier_demo
from helpers.tiny_models import build_tiny_config, save_with_processor
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.demo.page import (
    AttentionView,
    ImageInput,
    PatchView,
    build_page,
    find_clicked_patch,
    get_clicked_layer,
    serve_demo,
)
from modeling_vitcls.demo.reader import DemoModel


@pytest.fixture(scope="module")
def demo_model() -> DemoModel:
    return build_classifier_demo()


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    file = tmp_path / "noise.png"
    Image.effect_noise((32, 32), 90).convert("RGB").save(file)
    return file


@pytest.mark.integration
def test_the_demo_prints_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_with_processor(ViTCLSForImageClassification(build_tiny_config()), tmp_path / "mine")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"

    def open_and_close(page: gr.Blocks) -> None:
        with urlopen(address, timeout=30) as response:
            assert response.status == 200
        page.close()

    monkeypatch.setattr(gr.Blocks, "block_thread", open_and_close)
    # Not the fixture capsys: it replaces sys.stderr, and absl, if an earlier test has imported it, then closes the
    # former stream when uvicorn configures logging.
    with redirect_stdout(StringIO()) as output:
        serve_demo(str(folder), port=port, host="127.0.0.1")
    assert f"{folder}: {address}\n" in output.getvalue()


# Image input ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder for uploaded files."""
    (tmp_path / "uploads").mkdir()
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    return tmp_path / "uploads"


def build_image_input(*examples: Path) -> ImageInput:
    with gr.Blocks():
        return ImageInput(examples)


def get_message(update: Any) -> str:
    """Return the text of the message for the user; "" if no message is shown."""
    return update.value if update.visible else ""


def test_only_uploaded_files_and_examples_are_opened(
    demo_model: DemoModel, noise: Path, uploads: Path, tmp_path: Path
) -> None:
    """A client may send any path or address."""
    Image.open(noise).save(uploads / "image.png")
    Image.open(noise).save(tmp_path / "secret.png")
    (uploads / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "linked.png").symlink_to(noise)
    image_input = build_image_input(tmp_path / "linked.png")
    expected = demo_model.predict(noise).predictions
    for file in (noise, tmp_path / "linked.png", uploads / "image.png"):
        _, problem, result = image_input.predict(demo_model, {"path": str(file)})
        assert result is not None and result.predictions == expected and get_message(problem) == ""
    for path in (
        *(str(tmp_path / "secret.png"), str(uploads / "link.png"), str(uploads / ".." / "secret.png")),
        *(str(uploads / "missing.png"), str(uploads), "a\0b", "", "http://127.0.0.1:9/image.png", None, 5),
    ):
        image, problem, result = image_input.predict(demo_model, {"path": path})
        assert image is None and result is None, path
        assert "upload an image to this page, or select an example image" in get_message(problem), path
    assert build_image_input().predict(demo_model, {"path": str(noise)})[2] is None  # not an example


def test_messages_about_unreadable_images_contain_no_path(demo_model: DemoModel, uploads: Path) -> None:
    (uploads / "notes.png").write_text("no picture")
    image_input = build_image_input()
    for sent, name in (({"orig_name": "my notes.png"}, "my notes.png"), ({}, "the file")):
        image, problem, result = image_input.predict(demo_model, {"path": str(uploads / "notes.png")} | sent)
        assert image is None and result is None
        message = get_message(problem)
        assert f"cannot read an image from '{name}'" in message and str(uploads) not in message


def test_a_removed_image_clears_the_result_without_a_message(demo_model: DemoModel) -> None:
    _, problem, result = build_image_input().predict(demo_model, None)
    assert result is None and get_message(problem) == ""


def test_addresses_are_not_downloaded(noise: Path, uploads: Path) -> None:
    store_async = build_image_input().image.async_move_resource_to_block_cache

    def store(address: str) -> Any:
        # In another thread, because browser tests leave an event loop running in this thread.
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(asyncio.run, store_async(address)).result()

    for address in ("http://127.0.0.1:9/image.png", "https://127.0.0.1:9/image.png"):
        with pytest.raises(gr.Error, match="upload an image to this page"):
            store(address)
    assert list(uploads.iterdir()) == []
    stored = store(str(noise))
    assert stored is not None and Path(stored).is_relative_to(uploads)
    assert Path(stored).read_bytes() == noise.read_bytes()


# Functions of the page -----------------------------------------------------------------------------------------------


def list_components(page: gr.Blocks) -> dict[int, str]:
    """Return a dict from ids to labels of the components; the type if a component has no label."""
    return {
        component["id"]: component["props"].get("label") or component["type"]
        for component in page.get_config_file()["components"]
    }


def test_controls_redraw_their_output(demo_model: DemoModel, noise: Path) -> None:
    """Check which event of which component changes which outputs."""
    page = build_page(demo_model, [noise])
    labels = list_components(page)
    attention = ["Attention to the image", "markdown", "All layers for this token and head", "Through all layers"]
    patches = ["Patches as colors", "Similarity to a patch", "markdown"]
    prediction = ["Image", "markdown", "Label", "state"]
    found: dict[tuple[str, str], list[str]] = {}
    chained = []
    for dependency in page.get_config_file()["dependencies"]:
        outputs = [labels[output] for output in dependency["outputs"]]
        for component, event in dependency["targets"]:
            if dependency["trigger_after"] is None:
                found[labels.get(component, "page"), event] = outputs
            else:
                chained.append(outputs)
    (example,) = [target for target in found if target[1] == "click"]
    assert found.pop(example) == ["Image"]
    assert found == {
        ("page", "load"): ["Image"],
        ("Image", "input"): prediction,
        ("Token", "input"): attention,
        ("Heads", "input"): attention,
        ("Layer", "change"): attention[:2],
        (attention[2], "select"): ["Layer"],
        ("After layer", "change"): patches,
        ("Color only the foreground", "input"): patches,
        ("Patches as colors", "select"): ["state"],
    }
    # After each of the three predictions, both views are redrawn; a selected patch redraws its view.
    assert sorted(map(str, chained)) == sorted(map(str, [prediction] * 2 + [attention] * 3 + [patches] * 4))


@pytest.mark.parametrize(
    ("fields", "has_attention", "has_patches"),
    [
        ({}, True, True),
        ({"num_cls_tokens": 0, "pooling": "mean"}, False, True),
    ],
)
@pytest.mark.parametrize("model_class", [ViTCLSForImageClassification, ViTCLSModel])
def test_the_page_shows_the_views_that_the_model_supports(
    model_class: Any, fields: dict[str, Any], has_attention: bool, has_patches: bool
) -> None:
    model = model_class(build_tiny_config(num_hidden_layers=1, num_labels=7, **fields))
    is_classifier = model_class is ViTCLSForImageClassification
    page = build_page(DemoModel(model, ViTCLSImageProcessor(size=32), "mine", None, None, is_classifier))
    components = page.get_config_file()["components"]
    properties = {component["props"].get("label"): component["props"] for component in components}
    views = ("Token", "Through all layers", "Patches as colors")
    assert [name in properties for name in views] == [has_attention, has_attention, has_patches]
    assert ("Label" in properties) is is_classifier and page.title == "mine"
    if is_classifier:
        assert properties["Label"]["num_top_classes"] == 5
    if has_patches:
        assert properties["After layer"]["visible"] is False  # there is only one layer


def test_the_views_start_with_the_first_token_the_last_layer_and_all_heads(demo_model: DemoModel) -> None:
    properties = [component["props"] for component in build_page(demo_model).get_config_file()["components"]]
    values = {props.get("label"): (props.get("value"), props["visible"]) for props in properties if "visible" in props}
    assert values["Token"] == ("CLS", True) and values["Heads"] == ("mean of all heads", True)
    assert values["Layer"] == values["After layer"] == (2, True)


def test_only_the_prediction_is_public(demo_model: DemoModel, noise: Path) -> None:
    listeners = build_page(demo_model, [noise]).fns.values()
    assert {listener.api_name for listener in listeners if listener.api_visibility == "public"} == {"predict"}
    predict = next(listener.fn for listener in listeners if listener.api_name == "predict")
    *_, label, result = predict({"path": str(noise)})
    assert label == result.predictions["Label"] == demo_model.predict(noise).predictions["Label"]
    assert predict(None)[2:] == [None, None]


def assert_same_image(first: Image.Image | None, second: Image.Image) -> None:
    assert first is not None and np.array_equal(np.asarray(first), np.asarray(second))


def test_the_attention_of_the_selected_token_layer_and_head_is_shown(demo_model: DemoModel, noise: Path) -> None:
    """Layers and heads are counted from 1; head 0 is the mean over the heads."""
    with gr.Blocks():
        view = AttentionView(demo_model, gr.State())
    result = demo_model.predict(noise)
    for choice, head, name in ((0, None, "mean of all heads"), (2, 1, "head 2")):
        selected = {"Token": 1, "Layer": 1, "Heads": choice}
        values = [selected[control.label] for control in view.inputs[1:]]
        heads = result.token_attention[0].mean(dim=0) if head is None else result.token_attention[0, head]
        cls, register, patches = *heads[1, :2].tolist(), heads[1, 2:].sum().item()
        caption = (
            f"**register**, layer 1 of 2, {name}: {patches:.1%} of its attention goes to the patches, "
            f"{cls + register:.1%} to special tokens (CLS {cls:.1%}, register {register:.1%})."
        )
        drawn, text = view.draw_layer(result, *values)
        assert_same_image(drawn, result.draw_attention(1, 0, head))
        assert text == caption
        drawn, text, gallery, through = view.draw_all(result, *values)
        assert_same_image(drawn, result.draw_attention(1, 0, head))
        assert text == caption
        assert [title for _, title in gallery] == ["layer 1", "layer 2"]
        for (small_map, _), expected in zip(gallery, result.draw_all_layers(1, head), strict=True):
            assert_same_image(small_map, expected)
        assert [title for _, title in through] == [title for _, title in result.draw_rollout_and_attributions(1)]
        assert_same_image(through[0][0], result.draw_rollout_and_attributions(1)[0][0])
    assert view.draw_layer(result, 1, 2, 0)[1].endswith(
        "The model does not use the output of this token in this layer."
    )
    assert view.draw_layer(None, 1, 1, 0) == (None, "")
    assert view.draw_all(None, 1, 1, 0) == (None, "", [], [])


def test_the_similarity_to_the_selected_patch_is_shown(demo_model: DemoModel, noise: Path) -> None:
    with gr.Blocks():
        view = PatchView(demo_model, gr.State())
    result = demo_model.predict(noise)
    for patch, (row, column) in (
        ((3, 0), (3, 0)),
        ((0, 3), (0, 3)),
        (None, (2, 2)),
        ((4, 0), (2, 2)),
        ((0, 4), (2, 2)),
    ):
        colors, similarity, caption = view.draw_all(result, 1, False, patch)
        assert_same_image(colors, result.draw_principal_components(0))
        assert_same_image(similarity, result.draw_similarity(0, row, column))
        assert f"in row {row + 1}, column {column + 1} " in caption
    assert_same_image(
        view.draw_all(result, 2, True, None)[0], result.draw_principal_components(1, foreground_only=True)
    )
    assert view.draw_all(None, 1, False, None) == (None, None, "")


def test_clicks_select_a_patch_or_a_layer(demo_model: DemoModel, noise: Path) -> None:
    result = demo_model.predict(noise)
    displayed = np.zeros((384, 384, 3))
    event: Any = SimpleNamespace(index=(100, 290))
    assert find_clicked_patch(result, displayed, event) == (3, 1)
    assert find_clicked_patch(result, displayed[:, :100], event) is None
    assert find_clicked_patch(result, displayed[:, :192], event) == (3, 2)
    assert find_clicked_patch(None, displayed, event) is None and find_clicked_patch(result, None, event) is None
    assert get_clicked_layer(SimpleNamespace(index=0)) == 1  # type: ignore[arg-type]
