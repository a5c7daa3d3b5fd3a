# SPDX-License-Identifier: Apache-2.0
"""Handler for Hugging Face Inference Endpoints, published as handler.py: images in, labels or features out.

    {"inputs": IMAGE, "parameters": {"top_k": 5}}    -> [{"label": "cat", "score": 0.9}, ...]
    {"inputs": [IMAGE, IMAGE]}                       -> [[{"label": ...}, ...], [...]]

An image is a PIL image, or the contents of an image file as bytes, base64 or a base64 data URL. http and https URLs
are disabled by default, because they let users make the endpoint send requests to any address. Set
VITCLS_ENDPOINT_URLS=1 to enable URLs. Local paths are never read. A multi-task model returns
{task: [{"label": ...}, ...]} per image. An encoder returns the pooled features per image, or the last hidden state if
the encoder has no pooler.

This file uses the code in the repository and does not import the package modeling_vitcls.
"""

import base64
import binascii
import os
from typing import Any

import PIL.Image
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification


ALLOW_URLS_VARIABLE = "VITCLS_ENDPOINT_URLS"
MAX_IMAGES = 64  # maximum number of images per request
MAX_IMAGE_BYTES = 20_000_000  # maximum size of an encoded image in bytes


class EndpointHandler:
    """Handler that Inference Endpoints create once and call for each request."""

    def __init__(self, path: str = "") -> None:
        """Load the model from a folder that contains the files of the repository. Raise ValueError if weights are
        missing. If only the weights of an encoder's pooler are missing, the pooler is removed."""
        options = {"trust_remote_code": True}
        config = AutoConfig.from_pretrained(path, **options)
        self.is_classifier = any("Classification" in name for name in config.architectures)
        auto_class = AutoModelForImageClassification if self.is_classifier else AutoModel
        model, loading_info = auto_class.from_pretrained(path, output_loading_info=True, **options)
        missing_weights = sorted(loading_info["missing_keys"])
        if missing_weights and not self.is_classifier and all(name.startswith("pooler.") for name in missing_weights):
            model.pooler, missing_weights = None, []
        if missing_weights:
            raise ValueError(f"the checkpoint has no weights for {missing_weights[0]}. Train the model first")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(device).eval()
        self.processor = AutoImageProcessor.from_pretrained(path, **options)

    def __call__(self, data: dict[str, Any]) -> list[Any]:
        """Return the predictions for one request. Raise ValueError with a one-line message if the request is invalid.

        Args:
            data: dict with "inputs" (an image or a list of images) and, optionally, "parameters" with "top_k" (the
                number of labels per image, default: 5).
        """
        inputs, top_k = data.get("inputs"), (data.get("parameters") or {}).get("top_k", 5)
        if type(top_k) is not int or top_k < 1:
            raise ValueError(f"top_k must be a positive integer, but is {top_k!r}")
        sources = inputs if isinstance(inputs, list) else [inputs]
        if not 1 <= len(sources) <= MAX_IMAGES:
            raise ValueError(f"a request must contain 1 to {MAX_IMAGES} images, but contains {len(sources)}")
        images = [self.processor.fetch_images(decode_source(source)) for source in sources]
        pixel_values = torch.cat([self.processor(image, return_tensors="pt")["pixel_values"] for image in images])
        with torch.inference_mode():
            outputs = self.model(pixel_values.to(self.model.device))
        predictions = self.format_outputs(outputs, top_k)
        return predictions if isinstance(inputs, list) else predictions[0]

    def format_outputs(self, outputs: Any, top_k: int) -> list[Any]:
        """Return one prediction per image: labels with scores, labels per task, or features."""
        config = self.model.config
        if not self.is_classifier:
            features = outputs.pooler_output if outputs.pooler_output is not None else outputs.last_hidden_state
            return features.float().tolist()
        if not isinstance(outputs.logits, dict):
            label_names = [config.id2label[index] for index in range(config.num_labels)]
            return select_top_labels(outputs.logits, label_names, top_k, config.problem_type)
        names_by_task = config.task_labels()
        labels_by_task = {
            task: select_top_labels(logits, names_by_task[task], top_k, None)
            for task, logits in outputs.logits.items()
        }
        num_images = len(next(iter(labels_by_task.values())))
        return [{task: labels[index] for task, labels in labels_by_task.items()} for index in range(num_images)]


def select_top_labels(logits: torch.Tensor, label_names: list[str], top_k: int, problem_type: str | None) -> list[Any]:
    """Return the `top_k` labels with the highest scores for each image, from logits [B, labels].

    Scores are sigmoid probabilities for "multi_label_classification", logits for "regression", and otherwise softmax
    probabilities.
    """
    scores = logits.float()
    if problem_type == "multi_label_classification":
        scores = scores.sigmoid()
    elif problem_type != "regression":
        scores = scores.softmax(dim=-1)
    top_scores, top_indices = scores.topk(min(top_k, len(label_names)), dim=-1)
    return [
        [{"label": label_names[index], "score": score} for score, index in zip(*row, strict=True)]
        for row in zip(top_scores.tolist(), top_indices.tolist(), strict=True)
    ]


def decode_source(source: Any) -> Any:
    """Convert an image in a request to a type that the image processor accepts: bytes, a PIL image or a URL."""
    if isinstance(source, PIL.Image.Image):
        return source
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        if os.environ.get(ALLOW_URLS_VARIABLE) != "1":
            raise ValueError(
                f"URLs are disabled. Send the image as base64, or set {ALLOW_URLS_VARIABLE}=1 on the endpoint"
            )
        return source
    if isinstance(source, str):
        content = source.partition(",")[2] if source.startswith("data:") else source
        try:
            source = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("an image given as a string must be base64 or a data URL") from None
    if not isinstance(source, bytes | bytearray):
        raise ValueError(f"an image must be bytes, base64 or a PIL image, not {type(source).__name__}")
    if len(source) > MAX_IMAGE_BYTES:
        raise ValueError(f"an image must have at most {MAX_IMAGE_BYTES:,} bytes, but has {len(source):,}")
    return bytes(source)
