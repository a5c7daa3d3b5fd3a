"""handler.py for Inference Endpoints: pushed with the model, and run in a process without the package."""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fresh_processes import run_fresh
from huggingface_hub import snapshot_download
from local_hub import LocalHub
from PIL import Image
from tiny_models import KINDS, build_tiny_config, randomize

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.hub.code_files import describe_code_differences
from modeling_vitcls.hub.publish import build_push_command, push_folder


# Calls handler.py with each request in a file, and prints the responses or errors.
SERVE = """
import base64, importlib.util, json, sys
spec = importlib.util.spec_from_file_location("handler", sys.argv[1] + "/handler.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
handler = module.EndpointHandler(sys.argv[1])
for request in json.load(open(sys.argv[2])):
    if "bytes" in request:
        request["inputs"] = base64.b64decode(request.pop("bytes"))
    try:
        print(json.dumps(handler(request)))
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
assert "modeling_vitcls" not in sys.modules
"""


def encode_png(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    pixels = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return file.getvalue()


def call_handler(tmp_path: Path, model: Any, requests: list[dict[str, Any]], **environment: str) -> list[Any]:
    """Push a model with its handler, download the repository, and return the responses of the handler."""
    folder = tmp_path / "mine"
    randomize(model).save_pretrained(folder)
    ViTCLSImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    pushed = push_folder(folder, "ann/mine", with_handler=True)
    downloaded = snapshot_download("ann/mine", revision=pushed.commit, local_dir=tmp_path / "repository")
    assert describe_code_differences(Path(downloaded)).startswith("code identical")
    (tmp_path / "requests.json").write_text(json.dumps(requests))
    words = ["-I", "-c", SERVE, downloaded, tmp_path / "requests.json"]
    ran = run_fresh(*words, environment=os.environ | {"HF_HUB_OFFLINE": "1"} | environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_a_classifier(hub: LocalHub, tmp_path: Path) -> None:
    """Bytes, base64, a data URL and a list have the same predictions as the model itself."""
    contents = [encode_png(seed) for seed in range(2)]
    texts = [base64.b64encode(content).decode() for content in contents]
    url = "http://127.0.0.1:9/image.png"
    requests: list[dict[str, Any]] = [
        {"bytes": texts[0]},
        {"inputs": texts[0]},
        {"inputs": f"data:image/png;base64,{texts[0]}"},
        {"inputs": texts, "parameters": {"top_k": 1}},
        {"inputs": url},
        {"inputs": [url]},
        {"inputs": "/etc/hostname"},
        {"inputs": base64.b64encode(b"not an image").decode()},
        {"inputs": texts * 40},
        {"inputs": texts[0], "parameters": {"top_k": 0}},
        {"inputs": None},
    ]
    model = ViTCLSForImageClassification(build_tiny_config(num_register_tokens=1, id2label={0: "a", 1: "b", 2: "c"}))
    answers = call_handler(tmp_path, model, requests)
    processor = ViTCLSImageProcessor.from_pretrained(tmp_path / "mine")
    with torch.no_grad():
        probabilities = model(processor(contents, return_tensors="pt")["pixel_values"]).logits.softmax(-1)
    expected = sorted(zip("abc", probabilities[0].tolist(), strict=True), key=lambda pair: -pair[1])
    for answer in answers[:3]:
        assert [entry["label"] for entry in answer] == [label for label, _ in expected]
        assert [entry["score"] for entry in answer] == pytest.approx([score for _, score in expected], abs=1e-6)
    assert [[entry["label"] for entry in labels] for labels in answers[3]] == [
        ["abc"[index]] for index in probabilities.argmax(-1).tolist()
    ]
    errors = [answer["error"] for answer in answers[4:]]
    assert all("URLs are disabled" in error for error in errors[:2])
    assert "must be base64" in errors[2] and "cannot read an image" in errors[3]
    assert "1 to 64 images" in errors[4] and "top_k" in errors[5] and "NoneType" in errors[6]
    assert not any("\n" in error for error in errors)


@pytest.mark.slow
def test_urls_are_fetched_only_if_they_are_enabled(hub: LocalHub, tmp_path: Path) -> None:
    model = ViTCLSForImageClassification(build_tiny_config())
    (answer,) = call_handler(tmp_path, model, [{"inputs": "http://127.0.0.1:9/image.png"}], VITCLS_ENDPOINT_URLS="1")
    assert "cannot fetch the image" in answer["error"]


@pytest.mark.slow
def test_other_models(hub: LocalHub, tmp_path: Path) -> None:
    """One list of labels per task; features of an encoder."""
    image = encode_png(0)
    request = {"inputs": base64.b64encode(image).decode()}
    model_class, fields, _ = KINDS["multi_task"]
    (answer,) = call_handler(tmp_path / "tasks", model_class(build_tiny_config(**fields)), [request])
    assert {task: len(labels) for task, labels in answer.items()} == {"species": 4, "age": 2}
    assert sum(entry["score"] for entry in answer["species"]) == pytest.approx(1, abs=1e-6)
    encoder = ViTCLSModel(build_tiny_config())
    (features,) = call_handler(tmp_path / "encoder", encoder, [request])
    pixel_values = ViTCLSImageProcessor(size={"height": 32, "width": 32})(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert features == pytest.approx(encoder(pixel_values).pooler_output[0].tolist(), abs=1e-5)


def test_the_handler_is_pushed_on_request_only(hub: LocalHub, tmp_path: Path) -> None:
    randomize(ViTCLSModel(build_tiny_config())).save_pretrained(tmp_path / "mine")
    push_folder(tmp_path / "mine", "ann/mine")
    assert "handler.py" not in hub.files("ann/mine")
    assert "--endpoint-handler" in build_push_command(tmp_path / "mine", "ann/mine", with_handler=True)
