"""Export a classifier or an encoder to a folder that transformers.js loads.

    report = export_for_transformers_js("runs/mine", Path("web"))
    // in JavaScript: const classify = await pipeline("image-classification", "web", {dtype: "fp32"});

    config.json                 model_type "vit", because transformers.js does not support "vitcls"
    preprocessor_config.json    ViTImageProcessor
    onnx/model.onnx             float32, compared with the model as in --format onnx
    onnx/model_fp16.onnx        weights and computations in float16
    onnx/model_quantized.onnx   int8 weights of linear layers
    onnx/report.json            differences, top-1 agreement, accuracy on a dataset (optional), and SHA-256 of the
                                weights of the model

The graph contains the complete model, including special tokens, pooling and heads. The graph also
outputs the attention of the CLS tokens, which static Spaces display
(scripts/space/static_space.py).
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.image_utils import PILImageResampling

from ..conversion.parity_report import build_random_images, get_max_magnitude
from ..conversion.processors import select_settings
from ..data.labels import is_multi_label
from ..hub.model_files import hash_files
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, ViTCLSPreTrainedModel
from ..runtime.files import write_json
from ..runtime.staging import check_output_is_empty, create_output_folder
from .exportable import Outputs, compute_named_outputs, load_exportable_model
from .exporter import export_model, get_report_path
from .formats import run_graph
from .measurement import compare_outputs_on_images, load_export_images
from .options import ExportOptions


# `dtype` in transformers.js -> file name.
FILE_NAMES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "q8": "model_quantized.onnx"}
NUM_IMAGES = 64  # number of random images in the comparison
BATCH_SIZE = 16  # number of images per batch in the comparison


def export_for_transformers_js(
    source: str, output: Path, dataset: str | None = None, split: str | None = None
) -> dict[str, Any]:
    """Export a classifier or an encoder for transformers.js.

    If an error is raised, nothing is written.

    Args:
        source: Folder or Hub id of a classifier for a single task or of an encoder, or a preset,
            which has random weights.
        output: A folder that does not exist or is empty.
        dataset: Dataset for evaluating a classifier and the files, as in `vitcls evaluate`.
            Default: no evaluation.
        split: Split of the dataset, as in `vitcls evaluate`.

    Returns:
        The contents of onnx/report.json: `comparisons` (one per file, on `num_images` random
        images), `labeled` (the metric of the model and of each file with one image per batch, as in
        a browser), and hashes.

    Raises:
        ValueError, OSError: If the model cannot be found or exported, if the model has several
            tasks, if transformers.js does not support the image processor, if the outputs of the
            float32 or float16 file differ from the outputs of the model by more than the limit, or
            if the labels of the dataset do not match the model. The message is one line.
    """
    check_output_is_empty(output)
    exportable = load_exportable_model(source)
    model = exportable.model
    processor = exportable.processor

    is_supported = isinstance(model, ViTCLSForImageClassification | ViTCLSModel)
    if not is_supported or model.config.problem_type == "regression" or processor is None:
        raise ValueError(
            "`format='transformers.js'` requires an encoder or a classifier for one task (not "
            f"regression) and its image processor, but {source} contains {type(model).__name__} "
            f"{'without' if processor is None else 'with'} an image processor. Set a different "
            "`model`"
        )
    if dataset is not None and isinstance(model, ViTCLSModel):
        raise ValueError(
            f"`dataset` requires a classifier, but {source} is an encoder. Remove `dataset`"
        )

    preprocessor_config = build_preprocessor_config(processor)
    batch_shape = (BATCH_SIZE, model.config.num_channels, *model.config.image_height_width)
    image_numbers = torch.arange(BATCH_SIZE).view(-1, 1, 1, 1)  # [B, 1, 1, 1]
    batches = [
        build_random_images(batch_shape) + image_numbers * index / BATCH_SIZE
        for index in range(NUM_IMAGES // BATCH_SIZE)
    ]
    reference_outputs = compute_named_outputs(model, batches)

    with create_output_folder(output) as output_folder:
        folder = output_folder / "onnx"
        folder.mkdir()
        dtypes: dict[str, Literal["float32", "float16"]] = {"fp32": "float32", "fp16": "float16"}
        for web_dtype, dtype in dtypes.items():
            file = folder / FILE_NAMES[web_dtype]
            options = ExportOptions(source, "onnx", file, dynamic=False, dtype=dtype)
            export_model(options, model.config.num_cls_tokens > 0, exportable)
            get_report_path(file).unlink()
        quantize_onnx_file(folder / FILE_NAMES["fp32"], folder / FILE_NAMES["q8"])

        labeled = None
        if dataset is not None:
            images = load_export_images(exportable.folder, dataset, split, batch_size=1)
            labeled = images.measure_accuracy({file: folder / file for file in FILE_NAMES.values()})

        report = {
            "comparisons": [
                compare_file(folder / file, web_dtype, batches, reference_outputs)
                for web_dtype, file in FILE_NAMES.items()
            ],
            "num_images": NUM_IMAGES,
            "labeled": labeled,
            "weights_sha256": exportable.folder.weights_sha256 if exportable.folder else {},
            "sha256": hash_files(folder.glob("*.onnx")),
        }

        write_json(folder / "report.json", report)
        write_json(output_folder / "config.json", build_config(model))
        write_json(output_folder / "preprocessor_config.json", preprocessor_config)
    return report


def build_config(model: ViTCLSPreTrainedModel) -> dict[str, Any]:
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
    """Return the contents of preprocessor_config.json.

    Raise ValueError if the image processor does not convert images to RGB.
    """
    if not processor.do_convert_rgb:
        raise ValueError(
            "`format='transformers.js'` requires do_convert_rgb=True, but do_convert_rgb is False. "
            "Set a different `format`"
        )
    settings = select_settings(processor)
    settings["resample"] = int(PILImageResampling(settings["resample"]))
    return json.loads(json.dumps(settings | {"image_processor_type": "ViTImageProcessor"}))


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


def compare_file(
    file: Path, web_dtype: str, batches: list[torch.Tensor], reference_outputs: list[Outputs]
) -> dict[str, Any]:
    """Run a file with onnxruntime and compare its outputs with those of the model.

    They are the logits of a classifier [B, labels], or the final hidden state of an encoder [B, N,
    D]. `dtype` is that of transformers.js.
    """
    outputs = run_graph(file, batches, list(reference_outputs[0]))
    difference = max(
        get_max_magnitude(next(iter(found.values())) - next(iter(expected.values())))
        for found, expected in zip(outputs, reference_outputs, strict=True)
    )
    return {
        "file": f"onnx/{file.name}",
        "dtype": web_dtype,
        "largest_difference": difference,
        "top1_agreement": compare_outputs_on_images(outputs, reference_outputs)["top1_agreement"],
    }
