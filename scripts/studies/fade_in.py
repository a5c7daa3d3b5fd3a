"""Study: are added registers in use after a run of transformers' Trainer with its default values?

The results are in model_cards/studies/tokens.md.

    python scripts/studies/fade_in.py --encoder ENCODER --photos PHOTOS --output runs/fade-in

For each seed, `finetune` fits a classifier of the frozen encoder. Then Trainer trains all weights on
the same photographs, with four new registers (faded in, or ordinary tokens at once) and without any.
The page says what these runs reach on all test photographs, and what hiding the registers changes.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import tyro
from photos import (
    PhotoOptions,
    add_row,
    draw_photos,
    has_row,
    link_photos,
    list_photos,
    read_rows,
    write_page,
)
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments, set_seed

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, finetune


ARMS: dict[str, dict[str, int]] = {
    "no register": {},
    "4 registers, faded in": {"num_register_tokens": 4},
    "4 registers at once": {"num_register_tokens": 4, "token_fade_in_steps": 0},
}


@dataclass(frozen=True)
class Options(PhotoOptions):
    """Measure what registers do after a run of Trainer."""

    num_labels: int = 20
    """Photographs of each class."""
    num_steps: int = 125
    """Steps of 8 photographs, Trainer's default."""
    seeds: tuple[int, ...] = (0, 1, 2)
    image_size: int = 98


def main() -> None:
    options = tyro.cli(Options)
    for seed, name in product(options.seeds, ARMS):
        if not has_row(options.output, {"seed": seed, "name": name}):
            add_row(options.output, run_arm(options, seed, name))
    write_page(options.output, format_page(read_rows(options.output)))


def run_arm(options: Options, seed: int, name: str) -> dict[str, Any]:
    """Train and measure one model."""
    start = options.output / str(seed)
    if not (start / "model").exists():
        link_photos(
            draw_photos(options.photos / "train", options.num_labels, seed), start / "train"
        )
        finetune(
            options.encoder,
            str(start / "train"),
            start / "model",
            image_size=options.image_size,
            pooling="cls",
            trainable="head",
            report=False,
        )
    set_seed(seed)
    model = ViTCLSForImageClassification.from_pretrained(start / "model", **ARMS[name])
    arguments = TrainingArguments(
        str(options.output / "trainer"),
        max_steps=options.num_steps,
        seed=seed,
        save_strategy="no",
        report_to=[],
    )
    pixels, labels = read_photos(start / "model", list_photos(start / "train"))
    data = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(pixels, labels, strict=True)
    ]
    trainer = Trainer(model, arguments, train_dataset=data)  # type: ignore[arg-type]
    trainer.train()

    pixels, labels = read_photos(start / "model", list_photos(options.photos / "test"))
    logits = compute_logits(model, pixels)
    row = {
        "seed": seed,
        "name": name,
        "accuracy": (logits.argmax(dim=1) == labels).float().mean().item(),
        "loss": cross_entropy(logits, labels).item(),
    }
    if ARMS[name]:
        hidden = compute_logits(model.adapt(num_register_tokens=0), pixels)
        row["moved"] = ((hidden - logits).abs().mean() / logits.std()).item()
        row["changed"] = (hidden.argmax(dim=1) != logits.argmax(dim=1)).sum().item()
    return row


def read_photos(folder: Path, files: list[Path]) -> tuple[Tensor, Tensor]:
    """Read photographs as the model of the folder does, and their labels."""
    processor = ViTCLSImageProcessor.from_pretrained(folder)
    classes = sorted({file.parent.name for file in files})
    images = [processor(Image.open(file), return_tensors="pt").pixel_values for file in files]
    return torch.cat(images), torch.tensor([classes.index(file.parent.name) for file in files])


@torch.no_grad()
def compute_logits(model: ViTCLSForImageClassification, pixels: Tensor) -> Tensor:
    """Compute logits [images, labels] in batches."""
    model.eval()
    device = model.device
    return torch.cat([model(batch.to(device)).logits.cpu() for batch in pixels.split(64)])


def format_page(rows: list[dict[str, Any]]) -> str:
    """Format a table of the arms: means over the seeds."""
    lines = [
        "| after Trainer | accuracy, each draw | log loss | hiding them moves the logits by, of their spread "
        "| answers that change |",
        "|---|---|---:|---|---|",
    ]
    for name in ARMS:
        own = [row for row in rows if row["name"] == name]
        cells = [
            name,
            ", ".join(f"{100 * row['accuracy']:.1f}%" for row in own),
            f"{fmean(row['loss'] for row in own):.3f}",
            ", ".join(f"{row['moved']:.3f}" for row in own if "moved" in row),
            ", ".join(str(row["changed"]) for row in own if "changed" in row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
