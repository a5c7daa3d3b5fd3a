"""Load a model with transformers, and check the accuracy in its results.json.

This is the second step of `make demo`.

    python scripts/demo_load.py runs/demo

The script imports nothing from this repository: the code of the model is in its folder.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.datasets import load_digits
from transformers import AutoModelForImageClassification, pipeline
from transformers.utils.logging import disable_progress_bar


def main(folder: str) -> None:
    """Load the model and classify images.

    If the accuracy differs from that in results.json, exit with status 1.
    """
    disable_progress_bar()  # hides the progress bar of weight loading
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    print(
        f"AutoModelForImageClassification: {type(model).__name__}, {model.num_parameters():,} "
        "parameters"
    )
    for name, group in model.config.token_layout.items():
        print(f"  config.token_layout.{name} = {group}")

    classifier = pipeline("image-classification", model=folder, trust_remote_code=True)
    images, labels = load_held_out_digits(folder)
    start_time = time.perf_counter()
    predictions = [top_labels[0] for top_labels in classifier(images, top_k=1, batch_size=60)]
    seconds = time.perf_counter() - start_time

    pairs = list(zip(predictions, labels, strict=True))
    for prediction, label in pairs[:5]:
        print(
            f"  a handwritten {label}: prediction {prediction['label']}, probability "
            f"{prediction['score']:.0%}"
        )
    num_correct = sum(prediction["label"] == label for prediction, label in pairs)
    images_per_second = len(labels) / seconds
    accuracy = num_correct / len(labels)
    print(
        f"accuracy {accuracy:.2%} on {len(labels)} held-out images, {images_per_second:.0f} "
        "images/s"
    )

    results = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
    if len(labels) != results["num_images"] or num_correct != round(
        results["accuracy"] * results["num_images"]
    ):
        raise SystemExit(
            f"error: the accuracy in results.json is {results['accuracy']:.2%} on "
            f"{results['num_images']} images"
        )
    print("This is also the accuracy in results.json.")


def load_held_out_digits(folder: str) -> tuple[list[Image.Image], list[str]]:
    """Return images and labels of the digits that the run in a folder held out."""
    digits = load_digits()
    pixel_values = (digits.images * (255 / 16)).round().astype(np.uint8)  # [1797, 8, 8]
    splits = pd.read_parquet(Path(folder, "splits.parquet"))
    held_out = set(splits["key"][splits["split"] == "test"])
    indices = [
        index
        for index, pixels in enumerate(pixel_values)
        if compute_key(b"P5 8 8 255\n" + pixels.tobytes()) in held_out  # As an image file
    ]
    images = [Image.fromarray(pixel_values[index]) for index in indices]
    return images, [str(digits.target[index]) for index in indices]


def compute_key(content: bytes) -> int:
    """Compute the key of an image in splits.parquet, a checksum of its content."""
    digest = hashlib.blake2b(content, digest_size=8)
    return int.from_bytes(digest.digest(), "little") >> 1


if __name__ == "__main__":
    main(sys.argv[1])
