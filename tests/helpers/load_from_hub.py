"""Loads models from a Hub as users without this package do. Run by test_loading.py in a process of its own:

    python -I load_from_hub.py REQUESTS.json TARGET

REQUESTS.json names the file of inputs and lists what to load: {"name", "loader", "source", "options"}, where `loader`
is an Auto class, "pipeline", or "marker", which only lets the Hub know how far it is. TARGET/answers.safetensors then
has what came out by name, and TARGET/report.json where the code was, or the error, and the seconds that it took.
"""

import contextlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import torch
import transformers
from load_without_package import PackageBlocker
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import to_pil_image


def main(requests_file: str, target: Path) -> None:
    """Load and ask one after the other."""
    request = json.loads(Path(requests_file).read_text())
    inputs = load_file(request["inputs"])
    answers: dict[str, torch.Tensor] = {}
    report: dict[str, Any] = {}
    for asked in request["requests"]:
        if asked["loader"] == "marker":
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(f"{os.environ['HF_ENDPOINT']}/{asked['name']}")
            continue
        started = time.perf_counter()
        try:
            answers[asked["name"]], module = answer(inputs, asked["loader"], asked["source"], asked["options"])
            report[asked["name"]] = {"module": module}
        except Exception as error:
            report[asked["name"]] = {"error": f"{type(error).__name__}: {error}"}
        report[asked["name"]]["seconds"] = time.perf_counter() - started
    save_file(answers, target / "answers.safetensors")
    (target / "report.json").write_text(json.dumps(report))


@torch.no_grad()
def answer(inputs: dict[str, torch.Tensor], loader: str, source: str, options: Any) -> tuple[torch.Tensor, str]:
    """What it makes of the inputs, and the module that its class is from."""
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
