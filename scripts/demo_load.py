"""Load a model folder with transformers and check the accuracy in its results.json (second step of `make demo`).

    python scripts/demo_load.py runs/demo

The script imports nothing from this repository: the code of the model is in its folder.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification, pipeline
from transformers.utils.logging import disable_progress_bar


def main(folder: str) -> None:
    """Load the model, predict, and compare with results.json. Exits with status 1 if they differ."""
    disable_progress_bar()  # shown while weights are loaded
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    print(f"AutoModelForImageClassification: {type(model).__name__}, {model.num_parameters():,} parameters")
    for name, group in model.config.token_layout.items():
        print(f"  config.token_layout.{name} = {group}")

    classify = pipeline("image-classification", model=folder, trust_remote_code=True)
    images, labels = load_held_out_digits()
    start_time = time.perf_counter()
    predictions = [top_labels[0] for top_labels in classify(images, top_k=1, batch_size=60)]
    seconds = time.perf_counter() - start_time

    pairs = list(zip(predictions, labels, strict=True))
    for prediction, label in pairs[:5]:
        print(f"  a handwritten {label}: prediction {prediction['label']}, probability {prediction['score']:.0%}")
    num_correct = sum(prediction["label"] == label for prediction, label in pairs)
    speed = len(labels) / seconds
    print(f"accuracy {num_correct / len(labels):.2%} on {len(labels)} held-out images, {speed:.0f} images/s")

    results = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
    if len(labels) != results["num_images"] or num_correct != round(results["accuracy"] * results["num_images"]):
        raise SystemExit(f"error: results.json has {results['accuracy']:.2%} on {results['num_images']} images")
    print("equal to the accuracy in results.json")


def load_held_out_digits() -> tuple[list[Image.Image], list[str]]:
    """Return images and labels of the held-out split of the digits recipe."""
    digits = load_digits()
    levels = (digits.images * (255 / 16)).round().astype(np.uint8)  # [1797, 8, 8]
    held_out = [index for index, pixels in enumerate(levels) if is_held_out(pixels.tobytes())]
    return [Image.fromarray(levels[index]) for index in held_out], [str(digits.target[index]) for index in held_out]


def is_held_out(content: bytes, fraction: float = 0.2, seed: int = 0) -> bool:
    """Return whether an image is held out: a hash of its bytes and the seed, scaled to 0 to 1, is below `fraction`."""
    key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
    bits = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(bits, "big") / 2**64 < fraction


if __name__ == "__main__":
    main(sys.argv[1])
