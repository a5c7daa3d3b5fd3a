"""The folder for transformers.js: its files, and predictions in node by the npm package.

The npm package is installed into a folder of its own by the slow test, which is skipped without
node, npm or network.
"""

import json
import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from helpers.command_in_process import run_here
from helpers.tiny_models import (
    KINDS,
    build_images,
    build_tiny_config,
    raises_one_line,
    randomize,
    save_with_processor,
)
from helpers.transformers_js import (
    install_transformers_js,
    load_digit_images,
    save_digits_classifier,
)
from PIL import Image

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, ViTCLSModel, predict
from modeling_vitcls.export.exportable import compute_named_outputs
from modeling_vitcls.export.formats import run_graph
from modeling_vitcls.export.transformers_js import (
    build_config,
    compare_file,
    export_for_transformers_js,
)


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate")]


onnx, *_ = (
    pytest.importorskip(library, reason=f"{library} is not installed")
    for library in ("onnx", "onnxscript", "onnxruntime")
)

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
    """Return the folder of an exported classifier, next to its weights and six images.

    Four of the images have the label that the model predicts.
    """
    folder = tmp_path_factory.mktemp("models")
    source = save_digits_classifier(folder / "mine")
    digits = load_digit_images()[:6]
    for number, (digit, row) in enumerate(zip(digits, predict(source, digits), strict=True)):
        label = row["label"] if number < 4 else f"digit {(int(row['label'][-1]) + 1) % 10}"
        (folder / "images" / "train" / label).mkdir(parents=True, exist_ok=True)
        digit.save(folder / "images" / "train" / label / f"{number}.png")
    # the default
    shutil.copytree(folder / "images" / "train" / label, folder / "images" / "test" / label)
    flags = ["--format", "transformers.js", "--output", str(folder / "web"), "--split", "train"]
    dataset = str(folder / "images")
    assert run_here("export", "--model", str(source), "--dataset", dataset, *flags) == 0
    return folder / "web"


def test_the_folder_has_the_layout_of_transformers_js(web: Path) -> None:
    names = {file.relative_to(web).as_posix() for file in web.rglob("*") if file.is_file()}
    assert names == {
        *("config.json", "preprocessor_config.json", "onnx/report.json"),
        *("onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx"),
    }

    names = {index: f"digit {index}" for index in range(10)}
    assert json.loads((web / "config.json").read_text()) == {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "id2label": {str(index): name for index, name in names.items()},
        "label2id": {name: index for index, name in names.items()},
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_channels": 3,
        "problem_type": "single_label_classification",
    }

    config = build_config(ViTCLSModel(build_tiny_config(problem_type="multi_label_classification")))
    assert config["architectures"] == ["ViTModel"]
    assert "id2label" not in config
    assert config["problem_type"] == "multi_label_classification"
    assert json.loads((web / "preprocessor_config.json").read_text()) == {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": 32, "width": 32},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }


def test_the_report_describes_the_files(web: Path) -> None:
    report = json.loads((web / "onnx" / "report.json").read_text())
    processor = ViTCLSImageProcessor.from_pretrained(web.parent / "mine")
    images = list((web.parent / "images" / "train").rglob("*.png"))
    pixels = [processor(Image.open(image), return_tensors="pt")["pixel_values"] for image in images]
    # one image per batch
    int8_outputs = run_graph(web / "onnx" / "model_quantized.onnx", pixels, ["logits"])
    labels = [f"digit {outputs['logits'].argmax()}" for outputs in int8_outputs]
    int8_accuracy = (
        sum(label == image.parent.name for label, image in zip(labels, images, strict=True)) / 6
    )
    accuracies = {
        "model.onnx": 4 / 6,
        "model_fp16.onnx": 4 / 6,
        "model_quantized.onnx": int8_accuracy,
    }

    scores = {"dataset": "path/to/images", "split": "train", "num_images": 6, "metric": "accuracy"}
    assert report["labeled"].pop("files") == pytest.approx(accuracies, abs=1e-6)
    assert report["labeled"] == scores | {"model": pytest.approx(4 / 6, abs=1e-6)}
    assert report["num_images"] == 64

    folders = {"sha256": web / "onnx", "weights_sha256": web.parent / "mine"}
    files = {
        "sha256": ["model.onnx", "model_fp16.onnx", "model_quantized.onnx"],
        "weights_sha256": ["model.safetensors"],
    }
    for key, names in files.items():
        assert report[key] == {
            name: sha256((folders[key] / name).read_bytes()).hexdigest() for name in names
        }

    fp32, fp16, int8 = report["comparisons"]
    assert [(each["file"], each["dtype"]) for each in report["comparisons"]] == [
        ("onnx/model.onnx", "fp32"),
        ("onnx/model_fp16.onnx", "fp16"),
        ("onnx/model_quantized.onnx", "q8"),
    ]

    sizes = [(web / each["file"]).stat().st_size for each in (fp32, fp16)]
    assert sizes[1] < sizes[0]
    assert fp32["largest_difference"] <= 1e-4
    assert fp32["top1_agreement"] == 1
    assert fp32["largest_difference"] < fp16["largest_difference"] < int8["largest_difference"]
    assert int8["top1_agreement"] > 0.5


def test_the_files_have_the_logits_and_the_attention_of_the_model(web: Path) -> None:
    """int8 weights are symmetric, so that 0 is exact.

    The attention of the CLS token is an output of every file.
    """
    model = ViTCLSForImageClassification.from_pretrained(web.parent / "mine")
    pixel_values = build_images(4)
    (reference,) = compute_named_outputs(model, [pixel_values], output_attentions=True)
    for name, limit in (
        ("model.onnx", 1e-4),
        ("model_fp16.onnx", 0.1),
        ("model_quantized.onnx", 1.0),
    ):
        (outputs,) = run_graph(web / "onnx" / name, [pixel_values], ["logits", "cls_attention"])
        for output, expected in reference.items():
            assert outputs[output].shape == expected.shape
            assert (outputs[output] - expected).abs().max() <= limit, (name, output)
    other = [reference, {"logits": reference["logits"] + 1}, reference]
    compared = compare_file(web / "onnx" / "model.onnx", "fp32", [pixel_values] * 3, other)
    assert compared["largest_difference"] == pytest.approx(1, abs=1e-4)

    (graph_input,) = onnx.load(web / "onnx" / "model.onnx").graph.input
    assert [axis.dim_value for axis in graph_input.type.tensor_type.shape.dim] == [
        0,
        3,
        32,
        32,
    ]  # 0 is any

    for name, dtypes in (("model_fp16.onnx", {"FLOAT16"}), ("model_quantized.onnx", {"INT8"})):
        weights = onnx.load(web / "onnx" / name).graph.initializer
        found = {
            onnx.TensorProto.DataType.Name(weight.data_type)
            for weight in weights
            if len(weight.dims) == 2
        }
        assert found - {"INT64"} == dtypes, name


@pytest.mark.slow
def test_an_encoder_has_features_instead_of_labels(tmp_path: Path) -> None:
    model = randomize(ViTCLSModel(build_tiny_config(num_cls_tokens=0, pooling="mean")))
    save_with_processor(model, tmp_path / "mine")
    report = export_for_transformers_js(str(tmp_path / "mine"), tmp_path / "web")
    assert all(comparison["top1_agreement"] is None for comparison in report["comparisons"])
    names = ["last_hidden_state", "pooler_output"]
    (outputs,) = run_graph(tmp_path / "web" / "onnx" / "model.onnx", [build_images()], names)
    with torch.no_grad():
        assert (outputs["pooler_output"] - model(build_images()).pooler_output).abs().max() <= 1e-4


def test_other_models_and_gray_images_are_refused(tmp_path: Path) -> None:
    model_class, fields, _ = KINDS["multi_task"]
    randomize(model_class(build_tiny_config(**fields))).save_pretrained(tmp_path / "tasks")
    ViTCLSImageProcessor(size=32).save_pretrained(tmp_path / "tasks")
    with raises_one_line("classifier for one task"):
        export_for_transformers_js(str(tmp_path / "tasks"), tmp_path / "web")

    for name, fields in (("regression", {"problem_type": "regression"}), ("no processor", {})):
        randomize(ViTCLSForImageClassification(build_tiny_config(**fields))).save_pretrained(
            tmp_path / name
        )
        if fields:
            ViTCLSImageProcessor(size=32).save_pretrained(tmp_path / name)
        noun = "with" if fields else "without"
        with raises_one_line(f"contains ViTCLSForImageClassification {noun} an image processor"):
            export_for_transformers_js(str(tmp_path / name), tmp_path / "web")
    with raises_one_line("not empty"):
        export_for_transformers_js(str(tmp_path / "tasks"), tmp_path / "regression")

    encoder = save_with_processor(ViTCLSModel(build_tiny_config()), tmp_path / "encoder")
    with raises_one_line("`dataset`"):
        export_for_transformers_js(str(encoder), tmp_path / "web", dataset="digits")

    folder = save_digits_classifier(tmp_path / "gray", num_channels=1)
    ViTCLSImageProcessor(
        size=32, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5]
    ).save_pretrained(folder)
    with raises_one_line("do_convert_rgb is False"):
        export_for_transformers_js(str(folder), tmp_path / "web")
    assert not (tmp_path / "web").exists()


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
        # int8 inputs are scaled by the largest value of a batch
        batches = list(pixel_values.split(1))
        outputs = run_graph(web / "onnx" / "model_quantized.onnx", batches, ["logits"])
        logits = torch.cat([output["logits"] for output in outputs])
    assert len(set(labels)) > 1
    assert labels == [f"digit {index}" for index in logits.argmax(-1).tolist()]
