"""The second half of `make demo`: load a model folder as any user of transformers would, and check what it claims.

    python scripts/demo_load.py runs/demo

Nothing of this repository is imported: the code comes from the model's own folder.
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
    """Load, predict, compare with results.json. Ends with status 1 if they differ."""
    disable_progress_bar()  # of "Loading weights"
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    print(f"AutoModelForImageClassification: {type(model).__name__}, {model.num_parameters():,} parameters")
    for name, group in model.config.token_layout.items():
        print(f"  config.token_layout.{name} = {group}")

    classify = pipeline("image-classification", model=folder, trust_remote_code=True)
    pictures, labels = held_out_digits()
    started = time.perf_counter()
    answers = [best[0] for best in classify(pictures, top_k=1, batch_size=60)]
    seconds = time.perf_counter() - started

    for answer, label in list(zip(answers, labels, strict=True))[:5]:
        print(f"  a handwritten {label}: the model says {answer['label']} ({answer['score']:.0%} sure)")
    num_right = sum(answer["label"] == label for answer, label in zip(answers, labels, strict=True))
    speed = len(labels) / seconds
    print(f"accuracy {num_right / len(labels):.2%} on {len(labels)} held-out images, {speed:.0f} images/s")

    claimed = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
    if len(labels) != claimed["num_images"] or num_right != round(claimed["accuracy"] * claimed["num_images"]):
        raise SystemExit(f"results.json says {claimed['accuracy']:.2%} of {claimed['num_images']}: that is not equal")
    print("equal to what training reported in results.json")


def held_out_digits() -> tuple[list[Image.Image], list[str]]:
    """The pictures and labels that the digits recipe holds out."""
    digits = load_digits()
    levels = (digits.images * (255 / 16)).round().astype(np.uint8)  # [1797, 8, 8]
    held_out = [index for index, pixels in enumerate(levels) if is_held_out(pixels.tobytes())]
    return [Image.fromarray(levels[index]) for index in held_out], [str(digits.target[index]) for index in held_out]


def is_held_out(content: bytes, fraction: float = 0.2, seed: int = 0) -> bool:
    """Return whether an image is held out: if a hash of its bytes and the seed is below the fraction."""
    key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1
    bits = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(bits, "big") / 2**64 < fraction


if __name__ == "__main__":
    main(sys.argv[1])
