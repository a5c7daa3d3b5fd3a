"""Export a classifier to a folder that transformers.js loads in Node.js and in browsers.

    report = export_for_transformers_js("runs/mine", Path("web"))
    // in JavaScript: const classify = await pipeline("image-classification", "web", {dtype: "fp32"});

    config.json                 model_type "vit", because transformers.js does not support "vitcls"
    preprocessor_config.json    ViTImageProcessor
    onnx/model.onnx             float32, compared with the model as in --format onnx
    onnx/model_fp16.onnx        weights and computations in float16
    onnx/model_quantized.onnx   int8 weights of linear layers
    onnx/report.json            differences, top-1 agreement, accuracy on a dataset (optional), and SHA-256 of the
                                weights of the model

The graph contains the complete model, including special tokens, pooling and heads. The graph also outputs the
attention of the CLS tokens, which static Spaces display (publishing/static_space.py).
"""

import dataclasses
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers.image_utils import PILImageResampling

from ..conversion.parity_report import build_random_images, get_max_magnitude, hash_files
from ..conversion.processors import select_settings
from ..data.labels import is_multi_label
from ..files import write_json
from ..hub.local_paths import check_output_is_empty, strip_folders
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.exported_graphs import ExportedGraph
from ..modeling_vitcls import ViTCLSForImageClassification, ViTCLSPreTrainedModel
from ..options import DataOptions, EvaluateOptions
from .exportable import ExportableModel, Outputs, compute_named_outputs, load_exportable_model
from .exporter import export_model, get_report_path, move_files
from .formats import FORMATS


# `dtype` in transformers.js -> file name.
FILE_NAMES = {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "q8": "model_quantized.onnx"}
NUM_IMAGES = 64  # number of random images in the comparison
BATCH_SIZE = 16  # number of images per batch in the comparison


@dataclasses.dataclass(frozen=True)
class FileComparison:
    """Comparison of the outputs of a file with the outputs of the float32 model on random images."""

    file: str  # path in the folder
    dtype: str  # `dtype` in transformers.js
    largest_difference: float  # largest absolute difference between logits
    top1_agreement: float  # fraction of images for which the file and the model predict the same top-1 class


@dataclasses.dataclass(frozen=True)
class LabeledImageScores:
    """Scores of the model and of each file on labeled images, with a batch size of 1 as in a browser."""

    dataset: str
    split: str
    num_images: int
    metric: str  # accuracy, or mean_average_precision for several labels per image
    model: float  # score of the model in PyTorch
    files: dict[str, float]  # file name -> score


@dataclasses.dataclass(frozen=True)
class TransformersJsReport:
    """The contents of onnx/report.json."""

    comparisons: list[FileComparison]  # one comparison per file
    num_images: int  # number of random images in each comparison
    labeled: LabeledImageScores | None  # scores on labeled images; None without a dataset
    weights_sha256: dict[str, str]  # weight file name -> SHA-256; empty unless `source` is a folder
    sha256: dict[str, str]  # ONNX file name -> SHA-256


def export_for_transformers_js(
    source: str, output: Path, dataset: str | None = None, split: str | None = None
) -> TransformersJsReport:
    """Export a classifier for transformers.js and return the report. If an error is raised, nothing is written.

    Args:
        source: Folder or Hub id of a classifier for a single task, or a preset, which has random weights.
        output: A folder that does not exist or is empty.
        dataset: Dataset for evaluating the model and the files, as in `vitcls evaluate`. Default: no evaluation.
        split: Split of the dataset, as in `vitcls evaluate`.

    Raises:
        ValueError, OSError: If the model cannot be found or exported, if the model is not a classifier for a single
            task, if transformers.js does not support the image processor, if the outputs of the float32 or float16
            file differ from the outputs of the model by more than the limit, or if the labels of the dataset do not
            match the model. The message is one line.
    """
    check_output_is_empty(output)
    exportable_model = load_exportable_model(source)
    model, processor = exportable_model.model, exportable_model.processor
    is_classifier = isinstance(model, ViTCLSForImageClassification) and model.config.problem_type != "regression"
    if not is_classifier or processor is None:
        raise ValueError(
            "--format transformers.js requires a classifier for one task (not regression) and its image processor, "
            f"but {source} contains {type(model).__name__} {'without' if processor is None else 'with'} an image "
            "processor. Set a different --model"
        )
    preprocessor_config = build_preprocessor_config(processor)
    batches = [
        build_random_images((BATCH_SIZE, model.config.num_channels, *model.config.image_height_width))
        + torch.arange(BATCH_SIZE).view(-1, 1, 1, 1) * index / BATCH_SIZE
        for index in range(NUM_IMAGES // BATCH_SIZE)
    ]
    reference_outputs = compute_named_outputs(model, batches)
    with tempfile.TemporaryDirectory() as temporary_folder:
        folder = Path(temporary_folder, "onnx")
        folder.mkdir()
        for web_dtype, dtype in (("fp32", "float32"), ("fp16", "float16")):
            file = folder / FILE_NAMES[web_dtype]
            export_model(source, "onnx", file, dynamic=False, dtype=dtype, output_attentions=has_cls_attention(model))
            get_report_path(file).unlink()
        quantize_onnx_file(folder / FILE_NAMES["fp32"], folder / FILE_NAMES["q8"])
        comparisons = [
            compare_file(folder / file, web_dtype, batches, reference_outputs)
            for web_dtype, file in FILE_NAMES.items()
        ]
        scores = None if dataset is None else evaluate_files(source, folder, dataset, split)
        weight_files = Path(source).glob("*.safetensors") if Path(source).is_dir() else iter(())
        report = TransformersJsReport(
            comparisons, NUM_IMAGES, scores, hash_files(weight_files), hash_files(folder.glob("*.onnx"))
        )
        write_json(folder / "report.json", dataclasses.asdict(report))
        move_files(folder, output / "onnx")
    write_json(output / "config.json", build_config(exportable_model))
    write_json(output / "preprocessor_config.json", preprocessor_config)
    return report


def has_cls_attention(model: ViTCLSPreTrainedModel) -> bool:
    """Return whether the graph can output the attention of CLS tokens to all patches."""
    return model.config.num_cls_tokens > 0


def build_config(exportable_model: ExportableModel) -> dict[str, Any]:
    """Return the contents of config.json, from which transformers.js reads the model type and the labels."""
    config = exportable_model.model.config
    return {
        "model_type": "vit",
        "architectures": ["ViTForImageClassification"],
        "id2label": config.id2label,
        "label2id": config.label2id,
        "image_size": config.image_height_width[0],
        "patch_size": config.patch_height_width[0],
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_channels": config.num_channels,
        "problem_type": f"{'multi' if is_multi_label(config) else 'single'}_label_classification",
    }


def build_preprocessor_config(processor: ViTCLSImageProcessor) -> dict[str, Any]:
    """Return the contents of preprocessor_config.json. Raise ValueError if the image processor does not convert
    images to RGB."""
    if not processor.do_convert_rgb:
        raise ValueError(
            "--format transformers.js requires do_convert_rgb=True, but do_convert_rgb is False. Set a different "
            "--format"
        )
    settings = select_settings(processor)
    settings["resample"] = int(PILImageResampling(settings["resample"]))
    return json.loads(json.dumps(settings | {"image_processor_type": "ViTImageProcessor"}))


def quantize_onnx_file(source: Path, target: Path) -> None:
    """Write a dynamically quantized copy of an ONNX file. The weights of linear layers are stored as int8, and the
    inputs of these layers are quantized at run time."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    model.graph.ClearField("value_info")  # stored shapes do not match the transposed weights of the copy
    quantize_dynamic(model, target, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"])


def compare_file(
    file: Path, web_dtype: str, batches: list[torch.Tensor], reference_outputs: list[Outputs]
) -> FileComparison:
    """Run a file with onnxruntime and compare its logits [B, labels] with the logits of the model."""
    outputs = FORMATS["onnx"].run(file, batches, list(reference_outputs[0]))
    logits, reference = (torch.cat([batch["logits"] for batch in results]) for results in (outputs, reference_outputs))
    top1_agreement = (logits.argmax(-1) == reference.argmax(-1)).float().mean().item()
    return FileComparison(f"onnx/{file.name}", web_dtype, get_max_magnitude(logits - reference), top1_agreement)


# Labeled images ------------------------------------------------------------------------------------------------------


class OnnxClassifier(nn.Module):
    """Classifier that runs an ONNX file."""

    def __init__(self, file: Path, config: Any) -> None:
        super().__init__()
        self.graph = ExportedGraph(file)
        self.config = config

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        """Return the logits [B, labels] for images [B, C, H, W]."""
        logits = self.graph(pixel_values)["logits"].to(pixel_values.device)
        return SimpleNamespace(logits=logits, distillation_logits=None)


def evaluate_files(source: str, folder: Path, dataset: str, split: str | None) -> LabeledImageScores:
    """Evaluate the model and the files in the folder on labeled images."""
    from ..distributed import build_accelerator
    from ..inference.evaluate import load_evaluation

    options = EvaluateOptions(model=source, data=DataOptions(dataset=dataset), split=split, batch_size=1)
    evaluation = load_evaluation(options, build_accelerator(mixed_precision="no"), print)
    evaluator = evaluation.evaluator
    metrics = evaluator(evaluation.model)
    metric = next(iter(metrics))
    config = evaluation.model.config
    scores = {file: evaluator(OnnxClassifier(folder / file, config))[metric] for file in FILE_NAMES.values()}
    return LabeledImageScores(
        dataset=strip_folders(dataset),
        split=evaluation.split,
        num_images=metrics["num_images"],
        metric=metric,
        model=metrics[metric],
        files=scores,
    )
