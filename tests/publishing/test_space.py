"""The page of the demo in a real browser: on this machine, and as a Space that is pushed to a local Hub."""

import ast
import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from helpers.local_hub import LocalHub
from helpers.scripts_in_process import SCRIPTS, run_in_process
from helpers.tiny_models import build_tiny_config, raises_one_line, save_with_processor
from huggingface_hub import HfApi, constants, snapshot_download
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from sklearn.datasets import load_sample_images

import modeling_vitcls as vitcls
from modeling_vitcls.demo.page import build_page, launch_page
from modeling_vitcls.demo.reader import DemoModel, DemoResult
from modeling_vitcls.demo.text import build_loading_code
from modeling_vitcls.hub import connection
from modeling_vitcls.publishing.code_files import PACKAGE_FOLDER
from modeling_vitcls.publishing.publish import PushError, push_folder
from modeling_vitcls.publishing.shared_code import use_shared_code
from modeling_vitcls.publishing.space import (
    PAGE_FILES,
    PublishedModel,
    build_space_files,
    find_published_model,
    push_space,
    write_space,
)


NAMES = ["temple", "flower", "cat", "seven", "bird", "ship"]
PATIENCE = 60_000  # timeout of the browser in milliseconds

pytestmark = pytest.mark.slow  # each demo is a process of its own, and most tests use a browser

# Runs a file like `python FILE`, in a process that cannot import modeling_vitcls.
WITHOUT_PACKAGE = """
import runpy, sys
sys.path.insert(0, {tests!r})
from helpers.load_without_package import PackageBlocker
sys.meta_path.insert(0, PackageBlocker())
sys.path[0] = {folder!r}
runpy.run_path("app.py", run_name="__main__")
"""


# Test inputs and helpers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a real photograph of 640 x 427 pixels."""
    file = tmp_path_factory.mktemp("pictures") / "temple.png"
    Image.fromarray(load_sample_images().images[0]).save(file)
    return file


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a classifier with special tokens of all kinds, whose image processor crops images."""
    config = build_tiny_config(
        num_cls_tokens=2,
        num_distillation_tokens=1,
        num_register_tokens=2,
        num_hidden_layers=3,
        id2label=dict(enumerate(NAMES)),
        num_labels=len(NAMES),
    )
    processor = vitcls.ViTCLSImageProcessor(
        size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 32}
    )
    return save_with_processor(
        vitcls.ViTCLSForImageClassification(config), tmp_path_factory.mktemp("models") / "mine", processor
    )


def predict_top_labels(folder: Path, picture: Path) -> dict[str, float]:
    """Return the model's prediction without the demo: the five most probable labels."""
    model = vitcls.ViTCLSForImageClassification.from_pretrained(folder).eval()
    pixel_values = vitcls.ViTCLSImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        top = model(pixel_values).logits[0].softmax(dim=0).topk(5)
    return {NAMES[index]: value for index, value in zip(top.indices.tolist(), top.values.tolist(), strict=True)}


@contextmanager
def run_page(command: list[str], folder: Path, **environment: str) -> Iterator[str]:
    """Run a page in a separate process and yield its address."""
    child = subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | environment | {"PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(folder / "uploads")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None and child.stderr is not None
        line = child.stdout.readline()
        assert "http://" in line, child.stderr.read()
        yield line.split()[-1]
    finally:
        child.terminate()
        child.communicate(timeout=60)


@pytest.fixture(scope="module")
def demo(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start scripts/demo_app.py with the classifier, and yield the address."""
    with run_page(
        [str(SCRIPTS / "demo_app.py"), "--model", str(classifier)], tmp_path_factory.mktemp("elsewhere")
    ) as at:
        yield at


@contextmanager
def open_page(browser: Browser, address: str, width: int = 1280) -> Iterator[Page]:
    """Open the page and yield it. The page may send requests only to its own server."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.set_default_timeout(PATIENCE)
    requested_urls: list[str] = []
    page.on("request", lambda request: requested_urls.append(request.url))
    try:
        page.goto(address)
        yield page
        hosts = {urlsplit(url).netloc for url in requested_urls if not url.startswith(("data:", "blob:"))}
        assert hosts == {urlsplit(address).netloc}
    finally:
        page.close()


def upload_on_page(page: Page, picture: Path) -> None:
    """Upload a file with the file input of the page."""
    page.locator("input[type=file]").first.set_input_files(picture)


def read_labels(page: Page, count: int = 5) -> dict[str, str]:
    """Return the displayed labels with percentages, as soon as there are `count`."""
    shown = page.locator("[data-testid$=-confidence-set]")
    expect(shown).to_have_count(count)
    lines = [line.strip().split("\n") for line in shown.all_inner_texts()]
    return {parts[0].strip(): parts[-1].strip() for parts in lines}


def assert_shows(labels: dict[str, str], wanted: dict[str, float]) -> None:
    """Check that the labels, their order and their probabilities are equal."""
    assert list(labels) == list(wanted)
    assert [int(text.rstrip("%")) for text in labels.values()] == pytest.approx(
        [value * 100 for value in wanted.values()], abs=0.5001
    )


def get_map_address(page: Page) -> str:
    """Return the address of the displayed map."""
    return page.locator("#map img").get_attribute("src") or ""


def wait_for_change(page: Page, before: str) -> str:
    """Wait until another map is displayed, and return its address."""
    expect(page.locator("#map img")).not_to_have_attribute("src", before)
    return get_map_address(page)


# Local demo ----------------------------------------------------------------------------------------------------------


def test_a_photograph_gets_labels_and_a_map_on_its_own_pixels(
    browser: Browser, demo: str, classifier: Path, photo: Path
) -> None:
    with open_page(browser, demo) as page:
        upload_on_page(page, photo)
        assert_shows(read_labels(page), predict_top_labels(classifier, photo))
        expect(page.locator("#shares")).to_contain_text("CLS 1, layer 3 of 3, mean of all heads")
        drawn = page.locator("#map img")
        expect(drawn).to_have_js_property("naturalWidth", 640)  # 0 until the browser has decoded the image
        expect(drawn).to_have_js_property("naturalHeight", 427)
        expect(page.locator("#layers img")).to_have_count(3)


@pytest.mark.slow
def test_token_layer_and_head_change_the_map(browser: Browser, demo: str, photo: Path) -> None:
    with open_page(browser, demo) as page:
        upload_on_page(page, photo)
        expect(page.locator("#layers img")).to_have_count(3)
        first = get_map_address(page)
        of_cls = page.locator("#layers img").first.get_attribute("src") or ""

        page.get_by_label("register 2").check()
        expect(page.locator("#shares")).to_contain_text("register 2, layer 3 of 3")
        second = wait_for_change(page, first)
        expect(page.locator("#layers img").first).not_to_have_attribute("src", of_cls)
        of_register = page.locator("#layers img").first.get_attribute("src") or ""

        slider = page.get_by_label("number input for Layer", exact=True)
        slider.fill("1")
        slider.press("Enter")
        expect(page.locator("#shares")).to_contain_text("register 2, layer 1 of 3")
        third = wait_for_change(page, second)

        page.get_by_label("Heads").click()
        page.get_by_role("option", name="head 2").click()
        expect(page.locator("#shares")).to_contain_text("register 2, layer 1 of 3, head 2")
        fourth = wait_for_change(page, third)

        # a new one has not been clicked
        expect(page.locator("#layers img").first).not_to_have_attribute("src", of_register)
        page.locator("#layers button").nth(1).click()
        expect(page.locator("#shares")).to_contain_text("register 2, layer 2 of 3, head 2")
        fifth = wait_for_change(page, fourth)
        assert len({first, second, third, fourth, fifth}) == 5


def test_all_images_are_loaded_and_complete_in_a_narrow_window(browser: Browser, demo: str, photo: Path) -> None:
    with open_page(browser, demo, width=390) as page:
        upload_on_page(page, photo)
        for name in ("#map", "#through", "#patches", "#similarity"):  # without scrolling to the image
            expect(page.locator(f"{name} img").last).not_to_have_js_property("naturalWidth", 0)
        box = page.locator("#through .grid-wrap")
        assert box.evaluate("box => box.scrollHeight <= box.clientHeight")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.slow
def test_unreadable_image_clears_the_previous_result(browser: Browser, demo: str, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.png").write_text("no picture")
    with open_page(browser, demo) as page:
        upload_on_page(page, photo)
        assert read_labels(page)
        page.get_by_label("Remove Image").first.click()
        expect(page.locator("[data-testid$=-confidence-set]")).to_have_count(0)
        upload_on_page(page, tmp_path / "notes.png")
        problem = page.locator("#problem")
        expect(problem).to_contain_text(
            "No prediction: cannot read an image from 'notes.png': it is not an image in a supported format"
        )
        expect(page.locator("#map img")).to_have_count(0)
        upload_on_page(page, photo)
        assert read_labels(page)
        expect(problem).to_be_hidden()


def test_programs_can_call_one_function(demo: str, classifier: Path, photo: Path) -> None:
    with urlopen(f"{demo.rstrip('/')}/gradio_api/info", timeout=60) as answer:
        assert set(json.load(answer)["named_endpoints"]) == {"/predict"}
    client = Client(demo, verbose=False)
    *_, label = client.predict(handle_file(photo), api_name="/predict")
    confidences = {entry["label"]: entry["confidence"] for entry in label["confidences"]}
    assert confidences == pytest.approx(predict_top_labels(classifier, photo), abs=1e-4)
    with pytest.raises(ValueError, match="draw_all"):
        client.predict(1, 1, 1, api_name="/draw_all")


def assert_opens_only_uploads(at: str, photo: Path, folder: Path) -> None:
    """Check that the server only opens uploaded images, and does not reveal whether other files exist."""
    uploaded = upload(at, photo)
    assert "confidences" in json.dumps(request_prediction(at, {"path": uploaded}))
    secret = folder / "secret.png"
    secret.write_bytes(photo.read_bytes())
    link = Path(uploaded).with_name("link.png")
    link.symlink_to(secret)
    above = os.path.relpath(secret, Path(uploaded).parent)
    with record_requests() as (address, requests):
        files: list[dict[str, Any]] = [
            {"path": str(path)}
            for path in (secret, folder / "missing.png", f"{Path(uploaded).parent}/{above}", link, folder, "a\0b", "")
        ]
        files += [
            {"path": f"{address}/picture.png"},
            {"path": None, "url": f"{address}/picture.png"},
            {"orig_name": "x"},
        ]
        files += [{"path": "data:image/png;base64," + base64.b64encode(photo.read_bytes()).decode()}]
        answers = {json.dumps(request_prediction(at, file)["data"]) for file in files}
        assert len(answers) == 1 and "upload an image to this page" in answers.pop()
        as_page = {"meta": {"_type": "gradio.FileData"}}
        for more in ({}, {"is_stream": True}, {"url": f"{address}/picture.png"}):
            assert "confidences" not in json.dumps(request_prediction(at, {"path": str(secret)} | as_page | more))
            fetched = json.dumps(request_prediction(at, {"path": f"{address}/picture.png"} | as_page | more))
            assert "upload an image to this page" in fetched
        assert not requests


def upload(at: str, file: Path) -> str:
    """Upload a file as the page does, and return its path on the server."""
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    body = form + file.read_bytes() + b"\r\n--x--\r\n"
    request = Request(f"{at.rstrip('/')}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)[0]


def request_prediction(at: str, file: dict[str, Any]) -> Any:
    """Return the server's response for a file, through its queue."""
    at = at.rstrip("/")
    with urlopen(f"{at}/config", timeout=60) as answer:
        events = {event["api_name"]: event["id"] for event in json.load(answer)["dependencies"]}
    session = uuid.uuid4().hex
    event = {"data": [file], "fn_index": events["predict"], "session_hash": session}
    request = Request(f"{at}/gradio_api/queue/join", json.dumps(event).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60):
        pass
    with urlopen(f"{at}/gradio_api/queue/data?session_hash={session}", timeout=60) as lines:
        for line in lines:
            if line.startswith(b"data:"):
                message = json.loads(line[5:])
                if message["msg"] == "process_completed":
                    return message["output"]
    raise AssertionError("no answer")


@contextmanager
def record_requests() -> Iterator[tuple[str, list[str]]]:
    """Start a server to which no requests should be sent; yield its address and the received requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            """Log nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
def test_the_model_runs_once_per_image_also_for_several_tasks(browser: Browser, photo: Path, tmp_path: Path) -> None:
    tasks = {"species": ["oak", "elm", "ash"], "age": ["young", "old"]}
    config = build_tiny_config(num_cls_tokens=2, tasks=tasks)
    folder = save_with_processor(vitcls.ViTCLSForMultiTaskClassification(config), tmp_path / "tasks")
    reader = DemoModel.load(str(folder))
    runs: list[int] = []
    reader.model.vitcls.layers[0].register_forward_hook(lambda *_: runs.append(1))
    page_of_model = build_page(reader, [photo])
    address = launch_page(page_of_model)
    try:
        with open_page(browser, address, width=390) as page:
            names = {*tasks["species"], *tasks["age"]}
            assert set(read_labels(page, len(names))) == names  # of the example, without a click
            expect(page.locator("#shares")).to_contain_text("CLS age, layer 2 of 2")
            num_runs = len(runs)
            before = get_map_address(page)
            page.get_by_label("CLS species").check()
            expect(page.locator("#shares")).to_contain_text("CLS species, layer 2 of 2")
            wait_for_change(page, before)
            assert len(runs) == num_runs == 1  # for labels, attention, attribution and patches
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
    finally:
        page_of_model.close()


@pytest.mark.slow
def test_the_last_request_is_displayed_in_the_end(
    browser: Browser, classifier: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn_at_once = DemoResult.draw_all_layers

    def draw_slowly(self: DemoResult, *args: Any) -> list[Image.Image]:
        time.sleep(0.7)
        return drawn_at_once(self, *args)

    monkeypatch.setattr(DemoResult, "draw_all_layers", draw_slowly)
    page_of_model = build_page(DemoModel.load(str(classifier)))
    address = launch_page(page_of_model)
    try:
        with open_page(browser, address) as page:
            upload_on_page(page, photo)
            assert read_labels(page)
            page.get_by_label("CLS 2").check()
            page.get_by_label("register 1").check()
            expect(page.locator("#shares")).to_contain_text("register 1, layer 3 of 3")
            page.get_by_label("register 2").check()
            page.get_by_label("Remove Image").first.click()
            expect(page.locator("[data-testid$=-confidence-set]")).to_have_count(0)
            expect(page.locator("#map img")).to_have_count(0)
    finally:
        page_of_model.close()


# Predictions ---------------------------------------------------------------------------------------------------------


def test_a_click_on_a_patch_changes_the_similarity(browser: Browser, demo: str, photo: Path) -> None:
    with open_page(browser, demo) as page:
        upload_on_page(page, photo)
        expect(page.locator("#similar")).to_contain_text("row 3, column 3")
        before = page.locator("#similarity img").get_attribute("src") or ""
        patches = page.locator("#patches img")
        patches.scroll_into_view_if_needed()
        box = patches.bounding_box()
        assert box is not None
        patches.click(position={"x": box["width"] * 0.35, "y": box["height"] * 0.3})
        expect(page.locator("#similar")).not_to_contain_text("row 3, column 3")
        expect(page.locator("#similarity img")).not_to_have_attribute("src", before)
        expect(page.locator("#through img")).to_have_count(2)


def test_a_map_covers_the_model_input_and_its_values_sum_to_one(classifier: Path, photo: Path) -> None:
    reader = DemoModel.load(str(classifier))
    reading = reader.predict(photo)
    assert reader.token_names == ["CLS 1", "CLS 2", "distillation", "register 1", "register 2"]
    assert sum(reading.compute_attention_fractions(3, 1, None)) == pytest.approx(1)
    head = torch.stack([reading.maps[1, head, 3] for head in (0, 1)]).mean(dim=0)
    shares = reading.compute_attention_fractions(3, 1, None)
    assert shares[-1] == pytest.approx(head.sum().item(), abs=1e-5)
    drawn = np.asarray(reading.draw_attention(3, 1, 0)).astype(int)  # [427, 640, 3]
    assert drawn.shape == (427, 640, 3)
    spread = drawn.max(axis=2) - drawn.min(axis=2)  # [427, 640]; 0 is gray
    # The crop keeps 60 x 40 of 640 x 427 pixels, of which the model receives 32 x 32.
    assert spread[50:376, 160:480].any()
    for unseen in (spread[:40], spread[388:], spread[:, :135], spread[:, 505:]):
        assert not unseen.any()


def test_gray_and_color_models_accept_images_of_any_mode(photo: Path, tmp_path: Path) -> None:
    grey = vitcls.ViTCLSImageProcessor(
        size={"height": 32, "width": 32}, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5]
    )
    of_grey = vitcls.ViTCLSForImageClassification(build_tiny_config(num_channels=1))
    of_colour = vitcls.ViTCLSForImageClassification(build_tiny_config())
    readers = [
        DemoModel.load(str(save_with_processor(of_grey, tmp_path / "grey", grey))),
        DemoModel.load(str(save_with_processor(of_colour, tmp_path / "colour"))),
    ]
    picture = Image.open(photo).resize((64, 48))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I;16"):
        file = tmp_path / "picture.tiff"
        (picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)).save(file)
        for reader in readers:
            drawn = reader.predict(file).draw_attention(0, 0, None)
            assert drawn.size == (384, 288), mode  # 64 x 48, scaled by an integer factor to 384


def test_errors_of_the_script_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("demo_app.py", "--model", tmp_path) == 1
    assert capsys.readouterr().err.strip().startswith("error: there is no config.json in")


# The Space -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    """Start an empty Hub for this process, as ann."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(connection, "RETRY_WAITS", (0.01, 0.02))
    return hub


@pytest.fixture
def model(hub: LocalHub, classifier: Path) -> PublishedModel:
    """Push the classifier to that Hub and return its id."""
    push_folder(classifier, "ann/mine")
    return find_published_model("ann/mine")


@pytest.mark.slow
def test_the_pushed_space_runs_without_this_package(
    browser: Browser,
    hub: LocalHub,
    classifier: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The model's code is in another repository. Later commits to either repository have no effect."""
    mine = tmp_path / "mine"
    shutil.copytree(classifier, mine)
    code = push_folder(mine, "ann/code").commit
    use_shared_code(mine, "ann/code")
    push_folder(mine, "ann/mine")
    model = find_published_model("ann/mine")
    assert model.code_commit is not None and model.code_commit.sha == code
    flags = ["--model", "ann/mine", "--space-id", "ann/try-mine", "--examples", str(photo)]
    assert run_in_process("push_space.py", *flags) == 0
    assert capsys.readouterr().out == f"pushed a Space for ann/mine at {model.commit}: {hub.url}/spaces/ann/try-mine\n"
    assert (
        f"[ann/code]({hub.url}/ann/code) at commit [`{code}`]" in hub.read("spaces/ann/try-mine", "README.md").decode()
    )
    HfApi().upload_file(path_or_fileobj=b"raise SystemExit", path_in_repo="modeling_vitcls.py", repo_id="ann/code")
    save_with_processor(vitcls.ViTCLSForImageClassification(build_tiny_config(num_labels=1)), tmp_path / "newer")
    push_folder(tmp_path / "newer", "ann/mine")  # the Space uses the commit for which it was created

    space = Path(snapshot_download("ann/try-mine", repo_type="space", local_dir=tmp_path / "space"))
    command = WITHOUT_PACKAGE.format(tests=str(Path(__file__).parents[1]), folder=str(space))
    with run_page(["-P", "-c", command], space, HF_HOME=str(tmp_path / "empty")) as at, open_page(browser, at) as page:
        expect(page.get_by_text("ann/mine at commit")).to_contain_text(model.commit[:7])
        assert_shows(read_labels(page), predict_top_labels(classifier, photo))  # of the example
        expect(page.locator("#patches img")).to_be_visible()
        page.get_by_label("distillation").check()
        expect(page.locator("#shares")).to_contain_text("distillation, layer 3 of 3")
        page.get_by_role("button", name="How to load this model").click()
        expect(page.locator("pre code")).to_contain_text(f'revision="{model.commit}", code_revision="{code}"')
        assert_opens_only_uploads(at, photo, tmp_path)


def test_shipped_files_import_only_shipped_modules(model: PublishedModel) -> None:
    listed = {line.partition(">=")[0] for line in build_space_files(model)["requirements.txt"].decode().splitlines()}  # type: ignore[union-attr]
    available = listed - {"pillow", "scikit-learn"} | {"PIL", "sklearn", "gradio"} | set(sys.stdlib_module_names)
    for name in PAGE_FILES:
        tree = ast.parse((PACKAGE_FOLDER / name).read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        # imports all models, and is not called in a Space
        skipped = {node for found in functions if found.name == "register_auto_classes" for node in ast.walk(found)}
        for node in set(ast.walk(tree)) - skipped:
            if isinstance(node, ast.ImportFrom) and node.level:
                target = (
                    PACKAGE_FOLDER.joinpath(name).parents[node.level - 1]
                    / f"{(node.module or '').replace('.', '/')}.py"
                )
                assert target.relative_to(PACKAGE_FOLDER).as_posix() in PAGE_FILES, f"{name} imports {target.name}"
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] in available
            elif isinstance(node, ast.Import):
                assert all(alias.name.partition(".")[0] in available for alias in node.names)


def test_temporary_faults_are_retried_and_others_print_a_command_to_finish(
    hub: LocalHub, model: PublishedModel, photo: Path
) -> None:
    hub.fail("POST", "/spaces/ann/demo/commit/", 503)
    push_space(build_space_files(model), model, "ann/demo")
    hub.fail("POST", "/spaces/ann/other/commit/", 500, times=3)
    contents = build_space_files(model, title="Ann's own", examples=[photo])
    with pytest.raises(PushError) as failed:
        push_space(
            contents, model, "ann/other", private=True, flags=["--title", "Ann's own", "--examples", str(photo)]
        )
    assert hub.repositories["spaces/ann/other"].private
    message = str(failed.value)
    assert message.startswith("the push to the Space ann/other failed: HTTP 500") and "\n" not in message
    program, script, *flags = shlex.split(message.partition("Finish with: ")[2])
    assert (program, script) == ("vitcls", "space")
    assert run_in_process("push_space.py", *flags) == 0
    assert {name: hub.read("spaces/ann/other", name) for name in contents} == {
        name: content if isinstance(content, bytes) else content.read_bytes() for name, content in contents.items()
    }
    assert "title: Ann's own" in hub.read("spaces/ann/other", "README.md").decode()


@pytest.mark.parametrize("more", ["--space-id ann/demo", "--private"])
def test_incompatible_flags_exit_with_status_2(more: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "ann/mine", "--output", "space", *more.split()]
    assert run_in_process("push_space.py", *flags) == 2
    assert f"--output pushes nothing, but {more.split()[0]}" in "".join(capsys.readouterr())


def test_a_private_model_requires_a_secret(
    hub: LocalHub, classifier: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push_folder(classifier, "ann/hidden", private=True)
    assert run_in_process("push_space.py", "--model", "ann/hidden", "--private") == 0
    assert hub.repositories["spaces/ann/hidden-demo"].private
    last = capsys.readouterr().out.splitlines()[-1]
    assert "secret HF_TOKEN" in last and f"{hub.url}/spaces/ann/hidden-demo/settings" in last


def test_the_files_can_be_written_without_a_push(hub: LocalHub, model: PublishedModel, tmp_path: Path) -> None:
    target = tmp_path / "space"
    assert run_in_process("push_space.py", "--model", "ann/mine", "--output", target) == 0
    written = {file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file()}
    assert written == set(build_space_files(model))
    assert not [name for name in hub.repositories if name.startswith("spaces/")]
    with raises_one_line(str(target), "not empty", "--output"):
        write_space(build_space_files(model), target)


def test_the_printed_line_loads_the_model(classifier: Path) -> None:
    code = re.search(r"```python\n(.*)```", build_loading_code(DemoModel.load(str(classifier))), re.DOTALL)
    assert code is not None
    found: dict[str, Any] = {}
    exec(code[1], found)
    assert type(found["model"]).__name__ == "ViTCLSForImageClassification" and found["processor"] is not None
