"""The folder for transformers.js: its files, and predictions in node by the npm package.

The npm package is installed into a folder of its own by the slow test, which is skipped without node, npm or network.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from scripts_in_process import run_in_process
from tiny_models import KINDS, build_tiny_config, raises_one_line, randomize
from transformers_js import install_transformers_js, load_digit_images, save_digits_classifier

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.export.formats import FORMATS
from modeling_vitcls.export.transformers_js import export_for_transformers_js


for library in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(library, reason=f"{library} is not installed")

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


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    export_for_transformers_js(str(save_digits_classifier(folder / "mine")), folder / "web")
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
    folder = save_digits_classifier(tmp_path / "gray", num_channels=1)
    ViTCLSImageProcessor(size=32, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5]).save_pretrained(folder)
    with raises_one_line("do_convert_rgb is False"):
        export_for_transformers_js(str(folder), tmp_path / "web")
    assert not (tmp_path / "web").exists()


def test_files_are_evaluated_on_labeled_images(web: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """30 of 40 images have the label that the model predicts, 10 have another label."""
    model = ViTCLSForImageClassification.from_pretrained(web.parent / "mine")
    processor = ViTCLSImageProcessor.from_pretrained(web.parent / "mine")
    digits = load_digit_images()[:40]
    pixel_values = processor(digits, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        predicted = model(pixel_values).logits.argmax(-1).tolist()
    labels = [(index + (number >= 30)) % 10 for number, index in enumerate(predicted)]
    for number, (digit, label) in enumerate(zip(digits, labels, strict=True)):
        folder = tmp_path / "images" / "test" / f"digit {label}"
        folder.mkdir(parents=True, exist_ok=True)
        digit.save(folder / f"{number}.png")
    (tmp_path / "images" / "test" / "digit 0").mkdir(exist_ok=True)
    flags = ["--model", web.parent / "mine", "--format", "transformers.js", "--output", tmp_path / "web"]
    assert run_in_process("export.py", *flags, "--dataset", tmp_path / "images") == 0
    labeled = json.loads((tmp_path / "web" / "onnx" / "report.json").read_text())["labeled"]
    assert (labeled["dataset"], labeled["split"], labeled["num_images"]) == ("images", "test", 40)
    assert labeled["metric"] == "accuracy" and labeled["model"] == labeled["files"]["model.onnx"] == 0.75
    quantized = web / "onnx" / "model_quantized.onnx"
    outputs = FORMATS["onnx"].run(quantized, list(pixel_values.split(1)), ["logits"])
    logits = torch.cat([output["logits"] for output in outputs])
    correct = (logits.argmax(-1) == torch.tensor(labels)).float().mean().item()
    assert labeled["files"]["model_quantized.onnx"] == pytest.approx(correct)
    assert "accuracy on 40 images of images (test):\nPyTorch                    75.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--format onnx --dataset digits", "--dataset requires"),
        ("--format transformers.js --split test", "--split"),
    ],
)
def test_flags_of_labeled_images(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_in_process("export.py", "--model", "mine", "--output", "web", *flags.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "q8"])
def test_node_predicts_the_same_labels_for_500_digits(
    web: Path, tmp_path: Path, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The reference is the model itself for fp32, and onnxruntime with the same file for q8."""
    packages = install_transformers_js(tmp_path_factory)
    digits = load_digit_images()
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
