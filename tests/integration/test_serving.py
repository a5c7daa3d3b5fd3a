"""The server of docs/serving.md answers over the network as `predict` does."""

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from accelerate.utils.other import get_free_port
from helpers.doc_pages import ROOT, read_blocks
from helpers.tiny_models import build_tiny_config, save_with_processor
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, predict


pytestmark = pytest.mark.slow

SIZES = ((40, 30), (24, 56), (32, 32), (8, 90))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the page's program and a model."""
    folder = tmp_path_factory.mktemp("served")
    blocks = read_blocks(ROOT / "docs" / "serving.md")
    source = next(block.text for block in blocks if block.language == "python")
    (folder / "serve.py").write_text(source)
    model = ViTCLSForImageClassification(build_tiny_config(num_labels=3))
    processor = ViTCLSImageProcessor(size={"height": 32, "width": 32})
    save_with_processor(model, folder / "runs" / "photos", processor)
    return folder


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
        for _ in range(600):
            assert server.poll() is None, "the server has ended"
            try:
                httpx.get(f"{url}/docs", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield f"{url}/predict"
    finally:
        server.terminate()
        server.wait(timeout=30)


def encode(size: tuple[int, int], seed: int) -> bytes:
    """Return a PNG file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def ask(address: str, photos: list[bytes]) -> httpx.Response:
    files = [("photos", photo) for photo in photos]
    return httpx.post(address, files=files, timeout=60, trust_env=False)


def test_requests_of_several_threads_get_the_predictions_of_the_command(
    address: str, folder: Path
) -> None:
    """Each request is a batch of photos of several sizes."""
    batches = [[encode(size, seed) for size in SIZES] for seed in range(8)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda photos: ask(address, photos).json(), batches))
    for photos, found in zip(batches, answers, strict=True):
        expected: Any = predict(str(folder / "runs" / "photos"), photos, mixed_precision="no")
        assert [row["label"] for row in found] == [row["label"] for row in expected]
        probabilities = [row["probability"] for row in expected]
        assert [row["probability"] for row in found] == pytest.approx(probabilities, abs=1e-5)


def test_a_file_that_is_no_photo_is_the_clients_error(address: str) -> None:
    answer = ask(address, [encode((8, 8), 0), b"not a photo"])
    assert answer.status_code == 400
    assert "image" in answer.json()["detail"]
