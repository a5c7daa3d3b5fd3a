"""The static Space: its page runs in Chromium, served by this machine, with its own copy of transformers.js."""

import base64
import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from helpers.local_hub import LocalHub
from helpers.scripts_in_process import run_in_process
from helpers.transformers_js import install_transformers_js, load_digit_images, save_digits_classifier
from huggingface_hub import constants
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.export.transformers_js import export_for_transformers_js
from modeling_vitcls.hub.revisions import HubCommit
from modeling_vitcls.publishing.publish import push_folder
from modeling_vitcls.publishing.space import PublishedModel, write_space
from modeling_vitcls.publishing.static_space import LIBRARY_FILES, build_static_space_files


pytestmark = pytest.mark.integration


for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason=f"{library} is not installed")

MODEL = PublishedModel(HubCommit("ann/mine", "0" * 40, needs_token=False))
PATIENCE = 60_000  # milliseconds that the browser waits

PREDICT = """async (images) => {
  const { predict } = await import("./app.js");
  const results = [];
  for (const image of images) {
    const { predictions, attention } = await predict(image);
    results.push({ label: predictions[0].label, score: predictions[0].score, shape: attention.dims,
                   attention: Array.from(attention.data) });
  }
  return results;
}"""
READ_CANVAS = """() => {
  const canvas = document.getElementById("map");
  return Array.from(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data);
}"""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_digits_classifier(tmp_path_factory.mktemp("models") / "mine", num_cls_tokens=2)


@pytest.fixture(scope="module")
def exported(classifier: Path) -> Path:
    folder = classifier.with_name("web")
    export_for_transformers_js(str(classifier), folder)
    return folder


@contextmanager
def open_space(browser: Browser, folder: Path) -> Iterator[Page]:
    """Serve a folder and open its page. Every request must be to this server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    try:
        page.goto(f"http://127.0.0.1:{server.server_port}/index.html")
        yield page
        hosts = {urlsplit(url).netloc for url in requests if not url.startswith(("data:", "blob:"))}
        assert hosts == {f"127.0.0.1:{server.server_port}"}
    finally:
        page.close()
        server.shutdown()
        server.server_close()


def to_data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@pytest.mark.slow
def test_the_browser_predicts_the_labels_and_the_attention_of_500_digits(
    browser: Browser,
    classifier: Path,
    exported: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    packages = install_transformers_js(tmp_path_factory)
    files = build_static_space_files(MODEL, exported, "Digits & more", packages / "node_modules")
    write_space(files, tmp_path / "space")
    digits = load_digit_images()
    digits[7].save(tmp_path / "digit.png")
    with open_space(browser, tmp_path / "space") as page:
        expect(page.get_by_role("heading", name="Digits & more")).to_be_visible()
        expect(page.locator("#status")).to_have_text("Select an image.")
        results = page.evaluate(PREDICT, list(map(to_data_url, digits)))
        page.locator("#file").set_input_files(tmp_path / "digit.png")
        expect(page.locator("#labels tr")).to_have_count(5)
        expect(page.locator("#number")).to_have_text("2 of 2")
        expect(page.locator("#labels tr").first).to_contain_text(results[7]["label"])
        last_layer = page.evaluate(READ_CANVAS)
        page.locator("#layer").fill("1")
        expect(page.locator("#number")).to_have_text("1 of 2")
        first_layer = page.evaluate(READ_CANVAS)
        (tmp_path / "notes.png").write_text("not an image")
        page.locator("#file").set_input_files(tmp_path / "notes.png")
        expect(page.locator("#status")).to_contain_text("No prediction")
        expect(page.locator("#labels tr")).to_have_count(0)

    model = ViTCLSForImageClassification.from_pretrained(classifier)
    pixel_values = ViTCLSImageProcessor.from_pretrained(classifier)(digits, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        scores, labels = model(pixel_values).logits.softmax(-1).max(-1)
        rows = model.token_attention(pixel_values, tokens=["cls"])  # [B, layers, heads, CLS tokens, keys]
    assert len(set(labels.tolist())) > 1
    assert [result["label"] for result in results] == [f"digit {index}" for index in labels.tolist()]
    assert [result["score"] for result in results] == pytest.approx(scores.tolist(), abs=1e-4)
    assert results[0]["shape"] == [1, 2, 2, 4, 4]
    attention = torch.tensor([result["attention"] for result in results])
    expected = rows.mean(2)[..., model.config.token_layout.patches].flatten(1)
    torch.testing.assert_close(attention, expected, atol=1e-4, rtol=0)
    for drawn, layer in ((first_layer, 0), (last_layer, 1)):  # of the first CLS token
        assert_is_darkened(drawn, digits[7], expected[7].view(2, 2, 4, 4)[layer, 0])


def assert_is_darkened(drawn: list[int], image: Image.Image, attention: torch.Tensor) -> None:
    """Check that the patch with the most attention is drawn as it is, and others are darker."""
    canvas = torch.tensor(drawn).view(32, 32, 4)[..., :3].float()
    original = torch.tensor(list(image.tobytes())).view(32, 32, 3).float()
    assert (canvas <= original + 2).all()
    brightness = 0.15 + 0.85 * attention / attention.max()  # [4, 4]
    centers = torch.arange(4) * 8 + 3  # next to the center of each patch, where interpolation changes little
    expected = original[centers][:, centers] * brightness[..., None]
    torch.testing.assert_close(canvas[centers][:, centers], expected, atol=30, rtol=0)
    assert not torch.allclose(canvas, original, atol=30, rtol=0)


@pytest.mark.slow
def test_the_command_pushes_a_static_space(
    hub: LocalHub,
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in LIBRARY_FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("library")
    push_folder(classifier, "ann/mine")
    flags = ["--model", "ann/mine", "--static", "--node-modules", tmp_path]
    assert run_in_process("push_space.py", *flags) == 0
    assert f": {hub.url}/spaces/ann/mine-demo" in capsys.readouterr().out
    pushed = set(hub.files("spaces/ann/mine-demo"))
    assert {"index.html", "app.js", "model/onnx/model.onnx", "transformers.js/transformers.min.js"} <= pushed

    push_folder(classifier, "ann/hidden", private=True)
    assert run_in_process("push_space.py", "--model", "ann/hidden", "--static") == 1
    assert "Set --private" in capsys.readouterr().err


def test_flags_of_a_static_space(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("push_space.py", "--model", "ann/mine", "--static", "--examples", "a.png") == 2
    assert "--static does not support --examples" in "".join(capsys.readouterr())
    assert run_in_process("push_space.py", "--model", "ann/mine", "--node-modules", "packages") == 2
    assert "--node-modules requires --static" in "".join(capsys.readouterr())
