"""Load models from a Hub without this package. test_loading.py runs the script in a separate process:

    python -I load_from_hub.py REQUESTS.json TARGET

REQUESTS.json contains the path of the inputs and a list of requests {"name", "loader", "source", "options"}. `loader`
is an Auto class or "pipeline". The script writes the outputs by name to TARGET/answers.safetensors. For each request,
TARGET/report.json contains the module of the class or the error, and the duration in seconds.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image

from helpers.load_without_package import PackageBlocker


def main(requests_file: str, target: Path) -> None:
    """Load all requested models and compute their outputs."""
    contents = json.loads(Path(requests_file).read_text())
    inputs = load_file(contents["inputs"])
    outputs: dict[str, torch.Tensor] = {}
    report: dict[str, Any] = {}
    for request in contents["requests"]:
        started = time.perf_counter()
        try:
            outputs[request["name"]], module = compute_output(
                inputs, request["loader"], request["source"], request["options"]
            )
            report[request["name"]] = {"module": module}
        except Exception as error:
            report[request["name"]] = {"error": f"{type(error).__name__}: {error}"}
        report[request["name"]]["seconds"] = time.perf_counter() - started
    save_file(outputs, target / "answers.safetensors")
    (target / "report.json").write_text(json.dumps(report))


@torch.no_grad()
def compute_output(
    inputs: dict[str, torch.Tensor], loader: str, source: str, options: Any
) -> tuple[torch.Tensor, str]:
    """Return the output for the inputs, and the module of the loaded class."""
    options = {"trust_remote_code": True, **options}
    if loader == "pipeline":
        classify = transformers.pipeline("image-classification", model=source, **options)
        labels = classify.model.config.id2label
        entries = classify(to_pil_image(inputs["image"]), top_k=len(labels))
        scores = {entry["label"]: entry["score"] for entry in entries}
        return torch.tensor([scores[labels[index]] for index in sorted(labels)]), type(classify.model).__module__
    loaded = getattr(transformers, loader).from_pretrained(source, **options)
    if loader == "AutoImageProcessor":
        return loaded(inputs["image"], return_tensors="pt")["pixel_values"].clone(), type(loaded).__module__
    outputs = loaded.eval()(inputs["pixel_values"])
    return outputs.get("logits", outputs.get("last_hidden_state")).clone(), type(loaded).__module__


if __name__ == "__main__":
    sys.meta_path.insert(0, PackageBlocker())
    main(sys.argv[1], Path(sys.argv[2]))
