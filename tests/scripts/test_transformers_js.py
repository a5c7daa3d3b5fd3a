"""The folder for transformers.js, and predictions in node by the npm package.

The npm package is installed into a folder of its own by the slow test, which is skipped without
node, npm or network.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers.fresh_processes import run_program
from helpers.photo_folders import draw_noise
from helpers.scripts_in_process import run_in_process
from helpers.tiny_models import (
    PROCESSOR,
    build_images,
    build_tiny_config,
    get_largest_difference,
    save_both,
)
from helpers.varied_models import center_logits
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.exporting.onnx_file import OnnxGraph
from modeling_vitcls.runtime.files import write_json
from scripts.space.static_space import TRANSFORMERS_JS_VERSION


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


def build_photos() -> list[Image.Image]:
    """Return noise in the size of the model: no image is resized."""
    return draw_noise(*[(32, 32)] * 60)


@pytest.fixture(scope="module")
def web(module_path: Path) -> Path:
    """Return the folder of an exported classifier, next to its weights."""
    config = build_tiny_config(num_hidden_layers=1, num_register_tokens=2, num_labels=10)
    pixel_values = PROCESSOR(build_photos(), return_tensors="pt")["pixel_values"]
    model = center_logits(ViTCLSForImageClassification(config), pixel_values)
    flags = [
        "--model",
        save_both(model, module_path / "mine", PROCESSOR),
        "--output",
        module_path / "web",
    ]
    assert run_in_process("space/transformers_js.py", *flags) == 0
    return module_path / "web"


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
        assert get_largest_difference(outputs["logits"], logits) <= limit, name
        # Rows of attention are small, so an absolute limit would allow zeros
        difference = get_largest_difference(outputs["cls_attention"], attention)
        assert difference <= min(limit, 0.1) * attention.max(), name


@torch.no_grad()
def test_node_predicts_the_labels_of_the_model(web: Path, tmp_path: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    package = f"@huggingface/transformers@{TRANSFORMERS_JS_VERSION}"
    command = ["npm", "install", "--no-fund", "--no-audit", "--ignore-scripts", package]
    installed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"npm cannot install {package}: {installed.stderr.strip()[-200:]}")
    photos = build_photos()
    images = [{"data": list(photo.tobytes()), "width": 32, "height": 32} for photo in photos]
    write_json(tmp_path / "images.json", images)
    (tmp_path / "predict.mjs").write_text(PREDICT)
    ran = run_program("node", "predict.mjs", web.parent, "images.json", cwd=tmp_path)

    labels = json.loads(ran.stdout.splitlines()[-1])
    model = ViTCLSForImageClassification.from_pretrained(web.parent / "mine")
    processor = ViTCLSImageProcessor.from_pretrained(web.parent / "mine")
    logits = model(**processor(photos, return_tensors="pt")).logits
    assert len(set(labels)) > 1
    assert labels == [model.config.id2label[index] for index in logits.argmax(-1).tolist()]
