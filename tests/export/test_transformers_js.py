"""The folder for transformers.js: its files, and predictions in node by the npm package.

The npm package is installed into a folder of its own by the slow test, which is skipped without node, npm or network.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny_models import KINDS, build_tiny_config, raises_one_line, randomize

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.export.formats import FORMATS
from modeling_vitcls.export.transformers_js import export_for_transformers_js


for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason=f"{library} is not installed")

NUM_DIGITS = 500
PREDICT = """
import { env, pipeline, RawImage } from "@huggingface/transformers";
import fs from "node:fs";

env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
const images = JSON.parse(fs.readFileSync(process.argv[3]));
const classify = await pipeline("image-classification", "web", { dtype: process.argv[4], device: "cpu" });
const labels = [];
for (const { data, width, height } of images) {
  const image = new RawImage(Uint8ClampedArray.from(data), width, height, 3);
  const [best] = await classify(image, { top_k: 1 });
  labels.push(best.label);
}
console.log(JSON.stringify(labels));
"""


def load_images() -> list[Image.Image]:
    """Return digits in the size of the model, so that no image is resized."""
    return [
        Image.fromarray((digit * 15.9).astype("uint8")).resize((32, 32), Image.Resampling.NEAREST).convert("RGB")
        for digit in load_digits().images[:NUM_DIGITS]
    ]


def save(folder: Path, **fields: Any) -> Path:
    config = build_tiny_config(
        num_register_tokens=2, id2label={index: f"digit {index}" for index in range(10)}, **fields
    )
    config.num_labels = 10
    model = randomize(ViTCLSForImageClassification(config))
    processor = ViTCLSImageProcessor(size={"height": 32, "width": 32})
    if config.num_channels == 3:
        with torch.no_grad():  # without this, all images would have one label
            model.classifier.bias -= model(**processor(load_images(), return_tensors="pt")).logits.mean(0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    export_for_transformers_js(str(save(folder / "mine", num_labels=10)), folder / "web")
    return folder / "web"


def test_the_folder_has_the_layout_of_transformers_js(web: Path) -> None:
    names = {file.relative_to(web).as_posix() for file in web.rglob("*") if file.is_file()}
    assert names == {
        *("config.json", "preprocessor_config.json", "onnx/report.json"),
        *("onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx"),
    }
    config = json.loads((web / "config.json").read_text())
    assert config["model_type"] == "vit" and config["id2label"]["3"] == "digit 3"
    assert json.loads((web / "preprocessor_config.json").read_text())["size"] == {"height": 32, "width": 32}
    report = json.loads((web / "onnx" / "report.json").read_text())
    fp32, fp16, int8 = report["comparisons"]
    assert fp32["largest_difference"] <= 1e-4 and fp32["top1_agreement"] == 1
    assert fp32["largest_difference"] < fp16["largest_difference"] < int8["largest_difference"]
    assert int8["top1_agreement"] > 0.5
    sizes = [(web / each["file"]).stat().st_size for each in report["comparisons"]]
    assert sizes[0] > sizes[1]
    assert set(report["weights_sha256"]) == {"model.safetensors"}


def test_other_models_and_gray_images_are_refused(tmp_path: Path) -> None:
    model_class, fields, _ = KINDS["multi_task"]
    randomize(model_class(build_tiny_config(**fields))).save_pretrained(tmp_path / "tasks")
    ViTCLSImageProcessor(size=32).save_pretrained(tmp_path / "tasks")
    with raises_one_line("requires a classifier for one task"):
        export_for_transformers_js(str(tmp_path / "tasks"), tmp_path / "web")
    folder = save(tmp_path / "gray", num_labels=10, num_channels=1)
    ViTCLSImageProcessor(size=32, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    with raises_one_line("do_convert_rgb is False"):
        export_for_transformers_js(str(folder), tmp_path / "web")
    assert not (tmp_path / "web").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "q8"])
def test_node_predicts_the_same_labels_for_500_digits(
    web: Path, tmp_path: Path, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The reference is the model itself for fp32, and onnxruntime with the same file for q8."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    packages = tmp_path_factory.getbasetemp() / "npm"
    if not (packages / "node_modules").is_dir():
        packages.mkdir(exist_ok=True)
        command = ["npm", "install", "--no-fund", "--no-audit", "--ignore-scripts", "@huggingface/transformers"]
        installed = subprocess.run(command, cwd=packages, capture_output=True, text=True)
        if installed.returncode:
            pytest.skip(f"npm cannot install @huggingface/transformers: {installed.stderr.strip().splitlines()[-1:]}")
    digits = load_images()
    images = [{"data": list(image.tobytes()), "width": 32, "height": 32} for image in digits]
    (tmp_path / "images.json").write_text(json.dumps(images))
    (packages / "predict.mjs").write_text(PREDICT)
    words = ["node", "predict.mjs", str(web.parent), str(tmp_path / "images.json"), dtype]
    ran = subprocess.run(words, cwd=packages, capture_output=True, text=True, env=os.environ)
    assert ran.returncode == 0, ran.stderr[-2000:]
    labels = json.loads(ran.stdout.splitlines()[-1])
    model = ViTCLSForImageClassification.from_pretrained(web.parent / "mine")
    processor = ViTCLSImageProcessor.from_pretrained(web.parent / "mine")
    pixel_values = processor(digits, return_tensors="pt")["pixel_values"]
    if dtype == "fp32":
        with torch.no_grad():
            logits = model(pixel_values).logits
    else:
        batches = list(pixel_values.split(1))  # int8 inputs are scaled by the largest value of a batch
        outputs = FORMATS["onnx"].run(web / "onnx" / "model_quantized.onnx", batches, ["logits"])
        logits = torch.cat([output["logits"] for output in outputs])
    assert len(set(labels)) > 1
    assert labels == [f"digit {index}" for index in logits.argmax(-1).tolist()]
