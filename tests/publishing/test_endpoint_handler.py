"""handler.py for Inference Endpoints: pushed with the model and run in a process without the package, and its
functions in this process.
"""

import base64
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fresh_processes import run_fresh
from helpers.local_hub import LocalHub
from helpers.tiny_models import KINDS, build_tiny_config, raises_one_line, randomize, save_with_processor
from huggingface_hub import snapshot_download
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.publishing import endpoint_handler
from modeling_vitcls.publishing.code_files import describe_code_differences
from modeling_vitcls.publishing.endpoint_handler import EndpointHandler, decode_source
from modeling_vitcls.publishing.publish import build_push_command, push_folder


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
    save_with_processor(model, folder)
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


# In this process -----------------------------------------------------------------------------------------------------


def load_handler(folder: Path, model: Any) -> EndpointHandler:
    """Save a model with random weights, and return its handler."""
    save_with_processor(model, folder)
    return EndpointHandler(str(folder))


def preprocess(*contents: bytes) -> torch.Tensor:
    return ViTCLSImageProcessor(size=32)(list(contents), return_tensors="pt")["pixel_values"]


def assert_lists(answer: Any, labels: list[str], scores: torch.Tensor, top_k: int) -> None:
    """Check that the answer contains the labels with the highest scores in descending order."""
    expected = sorted(zip(scores.tolist(), labels, strict=True), reverse=True)[:top_k]
    assert [entry["label"] for entry in answer] == [label for _, label in expected]
    assert [entry["score"] for entry in answer] == pytest.approx([score for score, _ in expected], abs=1e-5)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_scores_of_each_problem_type(problem_type: str, tmp_path: Path) -> None:
    model = ViTCLSForImageClassification(
        build_tiny_config(problem_type=problem_type, num_labels=7, id2label=dict(enumerate("abcdefg")))
    )
    handler = load_handler(tmp_path, model)
    contents = [encode_png(0), encode_png(1)]
    with torch.no_grad():
        logits = model(preprocess(*contents)).logits
    scores = {
        "single_label_classification": logits.exp() / logits.exp().sum(-1, keepdim=True),
        "multi_label_classification": 1 / (1 + (-logits).exp()),
        "regression": logits,
    }[problem_type]
    for answer, values in zip(handler({"inputs": contents, "parameters": {"top_k": 2}}), scores, strict=True):
        assert_lists(answer, [*"abcdefg"], values, top_k=2)
    assert_lists(handler({"inputs": contents[1]}), [*"abcdefg"], scores[1], top_k=5)
    assert_lists(handler({"inputs": contents[1], "parameters": {"top_k": 9}}), [*"abcdefg"], scores[1], top_k=7)


def test_labels_of_each_task_and_image(tmp_path: Path) -> None:
    tasks = {"species": ["oak", "elm", "ash"], "age": ["young", "old"]}
    model_class = KINDS["multi_task"][0]
    model = model_class(build_tiny_config(num_cls_tokens=2, tasks=tasks))
    handler = load_handler(tmp_path, model)
    contents = [encode_png(0), encode_png(1)]
    with torch.no_grad():
        logits = model(preprocess(*contents)).logits
    answers = handler({"inputs": contents, "parameters": {"top_k": 2}})
    for image, answer in enumerate(answers):
        assert answer.keys() == tasks.keys()
        for task, labels in tasks.items():
            assert_lists(answer[task], labels, logits[task][image].softmax(-1), top_k=2)


@pytest.mark.parametrize("has_pooler", [True, False])
def test_features_of_an_encoder(tmp_path: Path, has_pooler: bool) -> None:
    """The checkpoint of an encoder may have no weights of a pooler, which would then be random."""
    encoder = ViTCLSModel(build_tiny_config(pooling="attention"), add_pooling_layer=has_pooler)
    save_with_processor(encoder, tmp_path)
    handler = EndpointHandler(str(tmp_path))
    contents = [encode_png(0), encode_png(1)]
    with torch.no_grad():
        outputs = encoder(preprocess(*contents))
    expected = outputs.pooler_output if has_pooler else outputs.last_hidden_state
    torch.testing.assert_close(torch.tensor(handler({"inputs": contents})), expected, rtol=1e-5, atol=1e-5)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    weights = {name: weight for name, weight in model.state_dict().items() if not name.startswith("classifier")}
    model.save_pretrained(tmp_path, state_dict=weights)
    with raises_one_line("the checkpoint has no weights for classifier.bias. Train the model first"):
        EndpointHandler(str(tmp_path))
    encoder = randomize(ViTCLSModel(build_tiny_config(pooling="attention")))
    weights = {
        name: weight for name, weight in encoder.state_dict().items() if not name.startswith(("pooler.", "layernorm."))
    }
    encoder.save_pretrained(tmp_path, state_dict=weights)
    with raises_one_line("the checkpoint has no weights for layernorm.bias. Train the model first"):
        EndpointHandler(str(tmp_path))


def test_invalid_requests_are_one_line_errors(tmp_path: Path) -> None:
    handler = load_handler(tmp_path, ViTCLSForImageClassification(build_tiny_config()))
    content = encode_png(0)
    for top_k in (0, -1, True, 1.5, "3", None):
        with raises_one_line(f"top_k must be a positive integer, but is {top_k!r}"):
            handler({"inputs": content, "parameters": {"top_k": top_k}})
    for number in (0, 65):
        with raises_one_line(f"a request must contain 1 to 64 images, but contains {number}"):
            handler({"inputs": [content] * number})
    assert len(handler({"inputs": [content] * 2, "parameters": None})) == 2


def test_only_images_in_the_request_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = encode_png(0)
    text = base64.b64encode(content).decode()
    for source in (content, bytearray(content), text, f"data:image/png;base64,{text}"):
        assert decode_source(source) == content
    image = Image.new("RGB", (2, 2))
    assert decode_source(image) is image
    (tmp_path / "image.png").write_bytes(content)
    for source in (str(tmp_path / "image.png"), "file:///etc/hostname", "not base64!", "ü", f"{text[:-2]}*="):
        with raises_one_line("an image given as a string must be base64 or a data URL"):
            decode_source(source)
    for source in (tmp_path / "image.png", None, {"url": "x"}):
        with raises_one_line("an image must be bytes, base64 or a PIL image, not"):
            decode_source(source)
    monkeypatch.setattr(endpoint_handler, "MAX_IMAGE_BYTES", len(content) - 1)
    for source in (content, text):
        with raises_one_line(f"an image must have at most {len(content) - 1:,} bytes, but has {len(content):,}"):
            decode_source(source)
    monkeypatch.setattr(endpoint_handler, "MAX_IMAGE_BYTES", len(content))
    assert decode_source(content) == content


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/image.png", "https://127.0.0.1:9/image.png"])
def test_urls_require_an_environment_variable(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "", "0", "true"):
        if value is not None:
            monkeypatch.setenv("VITCLS_ENDPOINT_URLS", value)
        with raises_one_line("URLs are disabled", "set VITCLS_ENDPOINT_URLS=1"):
            decode_source(url)
    monkeypatch.setenv("VITCLS_ENDPOINT_URLS", "1")
    assert decode_source(url) == url
