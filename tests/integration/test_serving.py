"""The server of docs/serving.md answers over the network as `predict` does."""

import io
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from accelerate.utils.other import get_free_port
from fastapi.testclient import TestClient
from helpers.doc_pages import ROOT, read_program
from helpers.fresh_processes import run_program
from helpers.photo_folders import draw_noise, encode_image
from helpers.tiny_models import save_classifier
from PIL import Image
from pytest import MonkeyPatch


pytestmark = pytest.mark.slow

PHOTO = encode_image(*draw_noise((8, 8)))


@pytest.fixture(scope="module")
def folder(module_path: Path) -> Path:
    """Return a folder with the page's program and a model."""
    (module_path / "serve.py").write_text(read_program("serve.py"))
    save_classifier(module_path / "runs/photos")
    return module_path


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """Start the server with two processes, and return the address of its page."""
    port = get_free_port()
    command = ["-m", "uvicorn", "serve:app", "--workers", "2", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, *command], cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    try:
        url = f"http://127.0.0.1:{port}"
        transport = httpx.HTTPTransport(retries=8)  # the last of them is after a minute
        with httpx.Client(transport=transport, trust_env=False, timeout=120) as client:
            client.get(f"{url}/docs")
        yield f"{url}/predict"
    finally:
        server.terminate()
        server.wait(timeout=30)


def build_icon(png: bytes) -> bytes:
    """Return an ICO file of 16 x 16 pixels, by its header, that contains a PNG."""
    entry = struct.pack("<4B2H2I", 16, 16, 0, 0, 1, 32, len(png), 22)
    return struct.pack("<3H", 0, 1, 1) + entry + png


def ask(address: str, photos: list[bytes]) -> httpx.Response:
    files = [("photos", (f"{index}.png", photo)) for index, photo in enumerate(photos)]
    return httpx.post(address, files=files, timeout=60, trust_env=False)


def test_a_bad_photo_of_two_is_named_and_the_other_one_answered(address: str) -> None:
    answer = ask(address, [PHOTO, b"not a photo"])
    good, bad = answer.json()["photos"]
    assert answer.status_code == 200
    assert (good["image"], good["error"]) == ("0: 0.png", None)
    assert bad["image"] == "1: 1.png"
    assert "image" in bad["error"]
    assert ask(address, [b"not a photo"]).status_code == 400


def test_a_request_beyond_a_limit_is_refused_and_the_server_lives(address: str) -> None:
    file = io.BytesIO()
    Image.new("L", (8000, 4000)).save(file, "PNG")  # 32 megapixels in 30 KB
    assert ask(address, [file.getvalue()]).status_code == 200
    too_large = ask(address, [file.getvalue()] * 2)
    assert too_large.status_code == 413
    assert "64,000,000 pixels" in too_large.json()["detail"]
    icon = ask(address, [build_icon(file.getvalue())])
    assert (icon.status_code, icon.json()["detail"][-4:]) == (413, "icon")
    assert ask(address, [b"0"] * 17).status_code == 413
    assert ask(address, [bytes(20_000_001)]).status_code == 413
    chunked = httpx.post(address, content=iter([b"0"]), trust_env=False)
    assert chunked.status_code == 411
    path = httpx.post(address, data={"photos": "/etc/passwd"}, trust_env=False)
    assert path.status_code == 422
    health = httpx.get(address.replace("predict", "health"), trust_env=False).json()
    assert health["waiting"] == 0
    assert len(health["version"]) == 64


def test_a_queue_that_is_full_says_so(folder: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    program = {}
    exec((folder / "serve.py").read_text().replace("MAX_WAITING = 32", "MAX_WAITING = 0"), program)
    answer = TestClient(program["app"]).post("/predict", files=[("photos", PHOTO)])
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.onnx"])
@pytest.mark.skipif(
    not shutil.which("docker")
    or bool(subprocess.run(["docker", "info"], capture_output=True).returncode),
    reason="no Docker daemon runs",
)
def test_the_images_are_built(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT, tmp_path / "modeling_vitcls", ignore=shutil.ignore_patterns(".*", "runs"))
    (tmp_path / "runs/photos").mkdir(parents=True)
    for file in ("serve.py", "answer.py", "model.onnx"):
        (tmp_path / file).touch()
    (tmp_path / name).write_text(read_program(name))
    run_program("docker", "build", "-f", tmp_path / name, tmp_path)
