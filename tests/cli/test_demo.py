"""The page of `vitcls demo`: answers, the sheet, and files that are refused.

integration/test_doors.py compares its probabilities with those of `predict`.

gradio is imported where it is used: each process that collects the tests would spend 4 s.
"""

import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.demo_page import open_page
from helpers.photo_folders import draw_noise
from helpers.tiny_models import (
    KINDS,
    raises_one_line,
    save_classifier,
    save_encoder,
    save_with_processor,
)
from PIL import Image
from playwright.sync_api import Browser
from pytest import CaptureFixture, MonkeyPatch

from modeling_vitcls import ViTCLSForImageClassification, look, predict
from modeling_vitcls.cli.demo import DemoOptions, build_page, run_demo


NAMES = ("cat", "dog", "fox")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    draw_noise((40, 50))[0].save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def ask(model: Path, photo: Path) -> list[Any]:
    """Call the function of the page with an uploaded file."""
    return open_page(model)(str(photo))


def test_the_sheet_has_the_numbers_of_the_answer(
    tmp_path: Path, photo: Path, monkeypatch: MonkeyPatch
) -> None:
    """The pass of the sheet may be of another precision."""
    measured = {None: [("dog", 0.6149), ("cat", 0.38)]}
    monkeypatch.setattr(
        "modeling_vitcls.analysis.photo.predict_photo", lambda *arguments: (measured, [])
    )
    answer, sheet = ask(save_classifier(tmp_path / "model"), photo)
    texts = [f"{name} {probability:.0%}" for name, probability in answer.items()]
    assert f"prediction: {', '.join(texts)}" in sheet


def test_an_unknown_photo_shows_none_of_the_labels_on_the_page_and_the_sheet(
    tmp_path: Path, photo: Path
) -> None:
    tokens = {"tokens": [[-1, "cls"]], "num_classes": len(NAMES)}
    fields = {"class_statistics": tokens, "distance_threshold": -1.0}
    model = save_classifier(tmp_path / "model", *NAMES, **fields)
    classifier = ViTCLSForImageClassification.from_pretrained(model)
    classifier.class_distance.counts.fill_(1)
    classifier.class_distance.claim(classifier.vitcls)
    classifier.save_pretrained(model)
    answer, sheet = ask(model, photo)
    assert answer == "none of these: cat, dog, fox"
    look(model, Image.open(photo), output=tmp_path / "sheet.html")
    for page in (sheet, (tmp_path / "sheet.html").read_text()):
        assert "prediction: none of these. The nearest of the classes: " in page


def test_each_task_has_an_answer(tmp_path: Path, photo: Path) -> None:
    model = save_with_processor(KINDS["multi_task"].build(), tmp_path / "m")
    (row,) = predict(model, photo)
    *answers, _ = ask(model, photo)
    labels = [row[name] for name in row if name.endswith("_label")]
    assert [max(answer, key=answer.get) for answer in answers] == labels


def test_several_labels_are_those_above_the_threshold(tmp_path: Path, photo: Path) -> None:
    fields = {"problem_type": "multi_label_classification"}
    model = save_classifier(tmp_path / "model", *NAMES, **fields)
    (row,) = predict(model, photo)
    assert list(ask(model, photo)[0]) == row["labels"]


def test_a_model_without_labels_is_refused(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    with raises_one_line("classifier"):
        build_page(DemoOptions(model=str(encoder)))


@pytest.fixture
def address(tmp_path: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture) -> Iterator[str]:
    """Serve the page of a classifier to the network while the test runs; return its address."""
    import gradio

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda page: None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # Restored
    run_demo(DemoOptions(model=str(save_classifier(tmp_path / "model", *NAMES)), host="0.0.0.0"))
    yield capsys.readouterr().out.splitlines()[-1].rpartition(" ")[2]
    gradio.close_all()


def test_files_that_are_no_photos_or_beyond_a_limit_get_a_message(
    address: str, tmp_path: Path
) -> None:
    """A PNG of 60 KB has 64 megapixels."""
    from gradio_client import Client, handle_file

    Image.fromarray(np.linspace(0, 9, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "a.tif")
    (tmp_path / f"{'b' * 150}.png").write_bytes(b"\x89PNG of nothing")
    Image.new("L", (8000, 8000)).save(tmp_path / "wide.png")
    (tmp_path / "long.png").write_bytes(bytes(21_000_000))
    client = Client(address, verbose=False)
    for name, words in (
        ("a.tif", "image"),
        (f"{'b' * 150}.png", "image"),
        ("wide.png", "64000000 pixels"),
        ("long.png", "exceeds the maximum file size"),
    ):
        with pytest.raises(ValueError, match=words) as raised:
            client.predict(handle_file(tmp_path / name), api_name="/predict")
        assert str(tmp_path / "uploads") not in str(raised.value)


def test_a_phone_finds_the_page_and_its_heic_photo_has_a_legible_sheet(
    browser: Browser, tmp_path: Path, photo: Path, address: str
) -> None:
    register_heif_opener = pytest.importorskip("pillow_heif").register_heif_opener
    register_heif_opener()
    Image.open(photo).resize((640, 480)).save(tmp_path / "IMG_4711.HEIC", format="HEIF")
    assert httpx.get(address).status_code == 200

    page = browser.new_page(viewport={"width": 1366, "height": 768})
    page.goto(address)
    page.locator("input[type=file]").first.set_input_files(tmp_path / "IMG_4711.HEIC")
    page.get_by_role("button", name="Submit").click()
    tiles = page.locator("#sheet .tile")
    tiles.first.wait_for(timeout=60_000)
    assert page.locator("#sheet").bounding_box()["width"] > 1000
    # gradio has styles for some names of classes
    assert page.locator("#sheet .name").first.bounding_box()["height"] < 80
    page.set_viewport_size({"width": 390, "height": 800})
    boxes = [tile.bounding_box() for tile in tiles.all()]
    assert len(boxes) > 10
    assert min(box["x"] for box in boxes) >= 0
    assert max(box["x"] + box["width"] for box in boxes) <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_files_of_the_server_are_not_opened(address: str, photo: Path) -> None:
    """The client would upload a path, so that the request is sent without it."""
    for path in (str(photo), "/etc/hostname"):
        data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
        call = f"{address}gradio_api/call/predict"
        event = httpx.post(call, json=data).json()["event_id"]
        assert "event: error" in httpx.get(f"{call}/{event}", timeout=60).text


def test_a_port_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    model = save_classifier(tmp_path / "model", *NAMES)
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for port in (taken.getsockname()[1], 99_999):
            with raises_one_line("--port", error=OSError):
                run_demo(DemoOptions(model=str(model), port=port))
