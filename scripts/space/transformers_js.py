"""Write a classifier or an encoder to a folder that transformers.js loads in Node.js and browsers.

    python scripts/space/transformers_js.py --model runs/mine --output web
    // in JavaScript: const classify = await pipeline("image-classification", "web", {dtype: "fp32"});

    config.json                 model_type "vit", because transformers.js does not support "vitcls"
    preprocessor_config.json    ViTImageProcessor
    onnx/model.onnx             float32, compared with the model
    onnx/model_fp16.onnx        weights and computations in float16
    onnx/model_quantized.onnx   int8 weights of linear layers
    onnx/report.json            largest differences and equal labels on random images, and SHA-256 of the weights

The graph contains the complete model, including special tokens, pooling and heads. It also outputs
`cls_attention` [B, layers, CLS tokens, rows, columns], the attention of the CLS tokens to the
patches, averaged over the heads, which the page of static_space.py draws.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.image_utils import PILImageResampling

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.analysis.maps import extract_patch_maps
from modeling_vitcls.cli.export import silence_exporters
from modeling_vitcls.cli.parsing import run_script
from modeling_vitcls.conversion.parity_report import build_random_images
from modeling_vitcls.conversion.processors import select_settings
from modeling_vitcls.data.labels import is_multi_label
from modeling_vitcls.exporting.onnx_file import LIMITS, OnnxGraph, measure_differences, write_onnx
from modeling_vitcls.exporting.tracing import (
    GraphShape,
    NamedOutputsModel,
    Outputs,
    load_exportable_model,
)
from modeling_vitcls.hub.model_files import hash_files
from modeling_vitcls.runtime.files import write_json
from modeling_vitcls.runtime.flags import Options
from modeling_vitcls.runtime.staging import check_output_is_empty, create_output_folder


# File name -> limit of its differences; int8 has none.
FILES = {
    "model.onnx": LIMITS["float32"],
    "model_fp16.onnx": LIMITS["float16"],
    "model_quantized.onnx": float("inf"),
}
NUM_IMAGES = 64  # number of random images in the comparison
BATCH_SIZE = 16  # number of images per batch in the comparison


@dataclass(frozen=True)
class BrowserOptions(Options):
    """Write a model to a folder that transformers.js loads."""

    model: str
    """Folder or Hub id of a classifier for a single task, or of an encoder."""
    output: Path
    """A folder that does not exist or is empty."""


class BrowserModel(nn.Module):
    """A model with the output `cls_attention` in addition to its own outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.named_outputs = NamedOutputsModel(model)

    def forward(self, pixel_values: torch.Tensor) -> Outputs:
        """Return the outputs by name, for images [B, C, H, W]."""
        outputs = self.named_outputs(pixel_values)
        model = self.named_outputs.model
        if model.config.num_cls_tokens:
            rows = model.token_attention(pixel_values, tokens=["cls"]).mean(2)  # over the heads
            height, width = pixel_values.shape[-2:]
            maps = extract_patch_maps(rows, model.config, (height, width))
            outputs["cls_attention"] = maps.float()
        return outputs


def export_for_transformers_js(source: str, output: Path) -> dict[str, Any]:
    """Export a classifier or an encoder, and return the contents of onnx/report.json.

    If an error is raised, nothing is written.

    Raises:
        ValueError, OSError: If the model cannot be found or exported, if it has several tasks, or
            if the outputs of the float32 or float16 file differ from those of the model by more
            than the limit. The message is one line.
    """
    check_output_is_empty(output)
    model, processor, source_folder = load_exportable_model(source)
    is_supported = isinstance(model, ViTCLSForImageClassification | ViTCLSModel)
    if not is_supported or not processor.do_convert_rgb:
        raise ValueError(
            "transformers.js requires an encoder or a classifier for one task, with an image "
            f"processor for RGB images, but {source} contains another {type(model).__name__}. Set "
            "a different --model"
        )

    if isinstance(model, ViTCLSForImageClassification):
        # pages show no distances, and int8 would make them wrong
        model.class_distance = model.config.class_statistics = None

    browser_model = BrowserModel(model).eval()
    batch_shape = (BATCH_SIZE, model.config.num_channels, *model.config.image_height_width)
    image_numbers = torch.arange(BATCH_SIZE).view(-1, 1, 1, 1)  # [B, 1, 1, 1]
    batches = [
        build_random_images(batch_shape) + image_numbers * index / BATCH_SIZE
        for index in range(NUM_IMAGES // BATCH_SIZE)
    ]
    with torch.no_grad():
        reference = [browser_model(batch) for batch in batches]
    names = list(reference[0])

    with create_output_folder(output) as output_folder:
        folder = output_folder / "onnx"
        folder.mkdir()
        write_graph(browser_model, torch.float32, names, folder / "model.onnx")
        write_graph(browser_model, torch.float16, names, folder / "model_fp16.onnx")
        quantize_onnx_file(folder / "model.onnx", folder / "model_quantized.onnx")

        comparisons = []
        for name, limit in FILES.items():
            outputs = list(map(OnnxGraph(folder / name), batches))
            differences = measure_differences(batches, reference, outputs, limit)
            first = names[0]
            comparison = {
                "file": f"onnx/{name}",
                "largest_difference": max(each["differences"][first] for each in differences),
                "top1_agreement": compare_labels(outputs, reference),
            }
            comparisons.append(comparison)

        report = {
            "comparisons": comparisons,
            "num_images": NUM_IMAGES,
            "weights_sha256": source_folder.weights_sha256 if source_folder else {},
            "sha256": hash_files(folder.glob("*.onnx")),
        }
        write_json(folder / "report.json", report)
        write_json(output_folder / "config.json", build_config(model))
        write_json(output_folder / "preprocessor_config.json", build_preprocessor_config(processor))
    return report


def write_graph(model: BrowserModel, dtype: torch.dtype, names: list[str], file: Path) -> None:
    """Write an ONNX file for images of the native size, with weights in a dtype."""
    model = copy.deepcopy(model).requires_grad_(False).to(dtype=dtype)
    encoder = model.named_outputs.model
    encoder.set_attn_implementation("sdpa")
    size = encoder.config.image_height_width
    shape = GraphShape(size, size, is_dynamic=False)
    images = torch.zeros(2, encoder.config.num_channels, *size)
    with torch.no_grad():
        graph = torch.export.export(model, (images,), dynamic_shapes=shape.dynamic_shapes)
    graph = graph.run_decompositions({})
    for node in graph.graph.nodes:
        node.meta.pop("stack_trace", None)  # stack traces contain local paths
    write_onnx(graph, shape, names, file, metadata={})


def compare_labels(outputs: list[Outputs], reference: list[Outputs]) -> float | None:
    """Return the fraction of images with the same label in two lists of batches; None of encoders."""
    if "logits" not in reference[0]:
        return None
    labels, expected = (
        torch.cat([batch["logits"].argmax(-1) for batch in batches])
        for batches in (outputs, reference)
    )
    return (labels == expected).float().mean().item()


def quantize_onnx_file(source: Path, target: Path) -> None:
    """Write a dynamically quantized copy of an ONNX file.

    The weights of linear layers are stored as int8, and the inputs of these layers are quantized at
    run time.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    # stored shapes do not match the transposed weights of the copy
    model.graph.ClearField("value_info")
    quantize_dynamic(
        model, target, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"]
    )


def build_config(model: Any) -> dict[str, Any]:
    """Return the contents of config.json, with the model type and the labels."""
    config = model.config
    is_classifier = isinstance(model, ViTCLSForImageClassification)
    labels = {"id2label": config.id2label, "label2id": config.label2id} if is_classifier else {}
    return labels | {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification" if is_classifier else "ViTModel"],
        "image_size": config.image_height_width[0],
        "patch_size": config.patch_height_width[0],
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_channels": config.num_channels,
        "problem_type": f"{'multi' if is_multi_label(config) else 'single'}_label_classification",
    }


def build_preprocessor_config(processor: ViTCLSImageProcessor) -> dict[str, Any]:
    """Return the contents of preprocessor_config.json."""
    settings = select_settings(processor)
    settings["resample"] = int(PILImageResampling(settings["resample"]))
    return json.loads(json.dumps(settings | {"image_processor_type": "ViTImageProcessor"}))


def run(options: BrowserOptions) -> None:
    """Export the model, and print the largest difference of each file."""
    silence_exporters()
    report = export_for_transformers_js(options.model, options.output)
    for comparison in report["comparisons"]:
        agreement = comparison["top1_agreement"]
        labels_text = "" if agreement is None else f", same label: {agreement:.1%}"
        print(
            f"{comparison['file']:26} largest difference "
            f"{comparison['largest_difference']:.1e}{labels_text}"
        )
    print(f"wrote {options.output}")


if __name__ == "__main__":
    run_script(BrowserOptions, run)
