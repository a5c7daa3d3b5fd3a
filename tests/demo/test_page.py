"""The page of the demo without a browser: its events and its address. test_space.py tests the page in a browser."""

import socket
from pathlib import Path
from urllib.request import urlopen

import pytest
from PIL import Image
from tiny_models import build_tiny_config, randomize

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.demo.page import build_page, launch_page
from modeling_vitcls.demo.reader import DemoModel


@pytest.fixture(scope="module")
def demo_model() -> DemoModel:
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    return DemoModel(model, ViTCLSImageProcessor(size=32), "mine", None, None, is_classifier=True)


def test_the_first_example_is_predicted_when_the_page_is_opened(demo_model: DemoModel, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "black.png")
    config = build_page(demo_model, [tmp_path / "black.png"]).get_config_file()
    events = config["dependencies"]
    (labels,) = [component["id"] for component in config["components"] if component["type"] == "label"]
    loads = {event["id"] for event in events if any(name == "load" for _, name in event["targets"])}
    (prediction,) = [event for event in events if event["trigger_after"] in loads]
    assert labels in prediction["outputs"]


@pytest.mark.integration
def test_the_page_is_served_at_the_given_port(demo_model: DemoModel) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    page = build_page(demo_model)
    try:
        assert launch_page(page, "127.0.0.1", port) == f"http://127.0.0.1:{port}/"
        with urlopen(f"http://127.0.0.1:{port}/", timeout=30) as response:
            assert response.status == 200
    finally:
        page.close()
