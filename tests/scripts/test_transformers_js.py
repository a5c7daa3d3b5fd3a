"""The folder for transformers.js, and predictions in node by the npm package.

The npm package is installed into a folder of its own by the slow test, which is skipped without
node, npm or network.
"""

import json
from pathlib import Path

import pytest
import torch
from helpers.fresh_processes import run_program
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import build_images
from helpers.transformers_js import (
    install_transformers_js,
    load_digit_images,
    save_digits_classifier,
)

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.export.onnx_file import OnnxGraph


pytestmark = pytest.mark.slow  # three graphs of a model

for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason=f"{library} is not installed")

PREDICT = """
import { env, pipeline, RawImage } from "@huggingface/transformers";
import fs from "node:fs";

env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const images = JSON.parse(fs.readFileSync(process.argv[3]));
const classify = await pipeline("image-classification", "web", { dtype: "fp32", device: "cpu" });
const labels = [];
for (const { data, width, height } of images) {
  const image = new RawImage(Uint8ClampedArray.from(data), width, height, 3);
  const [best] = await classify(image, { top_k: 1 });
  labels.push(best.label);
}
console.log(JSON.stringify(labels));
"""


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an exported classifier, next to its weights."""
    folder = tmp_path_factory.mktemp("models")
    model = save_digits_classifier(folder / "mine")
    flags = ["--model", model, "--output", folder / "web"]
    assert run_in_process("space/transformers_js.py", *flags) == 0
    return folder / "web"


@torch.no_grad()
def test_the_files_have_the_logits_and_the_attention_of_the_model(web: Path) -> None:
    model = ViTCLSForImageClassification.from_pretrained(web.parent / "mine")
    pixel_values = build_images(4)
    logits = model(pixel_values).logits
    rows = model.token_attention(pixel_values, tokens=["cls"]).mean(2)
    attention = rows[..., model.config.token_layout.patches].unflatten(-1, model.config.grid_size)

    limits = {"model.onnx": 1e-4, "model_fp16.onnx": 0.1, "model_quantized.onnx": 1.0}
    for name, limit in limits.items():
        outputs = OnnxGraph(web / "onnx" / name)(pixel_values)
        assert (outputs["logits"] - logits).abs().max() <= limit, name
        assert (outputs["cls_attention"] - attention).abs().max() <= limit, name


@torch.no_grad()
def test_node_predicts_the_labels_of_the_model(
    web: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    packages = install_transformers_js(tmp_path_factory)
    digits = load_digit_images()
    images = [{"data": list(image.tobytes()), "width": 32, "height": 32} for image in digits]
    (tmp_path / "images.json").write_text(json.dumps(images))
    (packages / "predict.mjs").write_text(PREDICT)
    words = ["node", "predict.mjs", web.parent, tmp_path / "images.json"]
    ran = run_program(*words, cwd=packages)

    labels = json.loads(ran.stdout.splitlines()[-1])
    model = ViTCLSForImageClassification.from_pretrained(web.parent / "mine")
    processor = ViTCLSImageProcessor.from_pretrained(web.parent / "mine")
    logits = model(**processor(digits, return_tensors="pt")).logits
    assert len(set(labels)) > 1
    assert labels == [f"digit {index}" for index in logits.argmax(-1).tolist()]
