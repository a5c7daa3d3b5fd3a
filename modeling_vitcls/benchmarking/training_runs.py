"""Speed of training, from images to updated weights: `vitcls finetune`, compared with transformers' Trainer.

    python -m modeling_vitcls.benchmarking.training_runs SETTINGS.json    run transformers' Trainer until stopped

Each program runs in a separate process and appends a line to a file every `log_every` steps. While one program is
measured, the other program is suspended. The speed is computed from the time between lines. Suspending a process
requires POSIX signals.
"""

import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTForImageClassification

from ..conversion.from_transformers import convert_from_transformers
from ..image_processing_vitcls import ViTCLSImageProcessor
from .comparison import BenchmarkSettings, Comparison, LoggedProcess, check_logits, measure_alternately
from .image_files import write_photographs
from .peers import SMALL_SIZE, ModelSize, build_transformers_vit


@dataclass(frozen=True)
class TrainingRun:
    """Settings of a training run, in one row of the benchmark report. Both programs use AdamW, warmup and cosine
    decay, label smoothing and gradient clipping."""

    dataset: str  # name of the dataset, "digits" or "photographs"
    size: ModelSize
    batch_size: int  # number of images per step
    mixed_precision: str  # autocast precision: "no" (no autocast) or "bf16"
    num_workers: int  # number of data loader workers
    log_every: int  # number of steps per line of metrics
    lines_per_turn: int  # number of lines of metrics per measurement
    learning_rate: float  # peak learning rate
    augmentation: dict[str, Any]  # field values of `AugmentationOptions`


CROP_AUGMENTATION = {"crop_scale": 0.35, "flip": True, "rotation": 0, "shift": 0.0, "zoom": 0.0}
SHIFT_AUGMENTATION = {"crop_scale": 1.0, "flip": False, "rotation": 10, "shift": 0.1, "zoom": 0.1}

PHOTOGRAPHS_RUN = TrainingRun("photographs", SMALL_SIZE, 16, "bf16", 1, 1, 3, 5e-4, CROP_AUGMENTATION)
# Settings of scripts/recipes/digits.yaml without registers, which transformers' ViT does not support.
DIGITS_RUN = TrainingRun("digits", ModelSize(32, 8, 64, 4, 4), 64, "no", 0, 20, 3, 2e-3, SHIFT_AUGMENTATION)

TRAINING_RUNS = {
    "ViT-S/16 at 224, bf16": PHOTOGRAPHS_RUN,
    "ViT-S/16 at 224, fp32": replace(PHOTOGRAPHS_RUN, mixed_precision="no"),
    "digits, fp32": DIGITS_RUN,
    "digits, bf16": replace(DIGITS_RUN, mixed_precision="bf16"),
}
TOY_RUNS = {"toy": replace(DIGITS_RUN, size=ModelSize(32, 8, 32, 2, 2), log_every=1, lines_per_turn=1)}

MAX_STEPS = 1_000_000  # number of steps of a run, larger than any benchmark requires
# Number of crops per class, so large that no epoch ends during a measurement (Trainer restarts the workers after each
# epoch).
PHOTOGRAPHS_PER_CLASS = 512
NUM_WARMUP_LINES = 2  # number of lines of metrics before the first measurement
MAX_WAIT_SECONDS = 600  # maximum time to wait for lines of metrics, in seconds


def compare_training(rows: dict[str, TrainingRun], settings: BenchmarkSettings) -> Iterator[Comparison]:
    """Compare `vitcls finetune` with transformers' Trainer, for each row."""
    for name, run in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            yield compare_runs(name, run, settings.num_pairs, Path(folder))


def compare_runs(name: str, run: TrainingRun, num_pairs: int, folder: Path) -> Comparison:
    """Compare `vitcls finetune` with transformers' Trainer, for one row. Write data and models to `folder`."""
    dataset, label_names = "digits", [str(digit) for digit in range(10)]
    if run.dataset == "photographs":
        dataset = str(write_photographs(folder / "photographs", PHOTOGRAPHS_PER_CLASS))
        label_names = ["china", "flower"]
    difference = save_models(run, label_names, folder, name)
    with (
        SuspendedRun(build_finetune_command(run, dataset, folder), folder / "ours" / "metrics.jsonl", run) as ours,
        SuspendedRun(build_trainer_command(run, dataset, folder), folder / "theirs.jsonl", run) as theirs,
    ):
        throughputs = measure_alternately(ours.measure_throughput, theirs.measure_throughput, num_pairs)
    return Comparison("training", name, "transformers", *throughputs, difference, asdict(run))


def save_models(run: TrainingRun, label_names: list[str], folder: Path, name: str) -> float:
    """Save transformers' ViT and a vitcls model with the same weights. Return the largest logit difference."""
    torch.manual_seed(0)
    label2id = {label: index for index, label in enumerate(label_names)}
    theirs = build_transformers_vit(run.size, id2label=dict(enumerate(label_names)), label2id=label2id).eval()
    ours = convert_from_transformers(theirs)
    pixel_values = torch.randn(2, 3, run.size.image_size, run.size.image_size)
    difference = check_logits(ours, theirs, pixel_values, name)
    theirs.save_pretrained(folder / "their_model")
    ours.save_pretrained(folder / "our_model")
    size = {"height": run.size.image_size, "width": run.size.image_size}
    ViTCLSImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(folder / "our_model")
    return difference


# Processes -----------------------------------------------------------------------------------------------------------


def build_finetune_command(run: TrainingRun, dataset: str, folder: Path) -> list[str]:
    """Return the command line that runs `vitcls finetune` without evaluations or checkpoints."""
    flags = {
        "model": folder / "our_model",
        "dataset": dataset,
        "output-dir": folder / "ours",
        "max-steps": MAX_STEPS,
        "evaluate-every": MAX_STEPS,
        "batch-size": run.batch_size,
        "learning-rate": run.learning_rate,
        "mixed-precision": run.mixed_precision,
        "num-workers": run.num_workers,
        "log-every": run.log_every,
        "held-out-fraction": 0.1,
        **{name.replace("_", "-"): value for name, value in run.augmentation.items() if name != "flip"},
    }
    arguments = [argument for name, value in flags.items() for argument in (f"--{name}", str(value))]
    program = [sys.executable, "-m", "modeling_vitcls.cli", "finetune"]
    return [*program, *arguments, "--flip" if run.augmentation["flip"] else "--no-flip"]


def build_trainer_command(run: TrainingRun, dataset: str, folder: Path) -> list[str]:
    """Write the settings of transformers' Trainer to a file, and return the command line that runs Trainer."""
    settings = {
        **{name: value for name, value in vars(run).items() if name != "size"},
        "model": str(folder / "their_model"),
        "image_size": run.size.image_size,
        "dataset": dataset,
        "output_dir": str(folder / "theirs"),
        "metrics": str(folder / "theirs.jsonl"),
    }
    file = folder / "theirs.json"
    file.write_text(json.dumps(settings), encoding="utf-8")
    return [sys.executable, "-m", __name__, str(file)]


class SuspendedRun(LoggedProcess):
    """A training run that is suspended except during measurements."""

    def __init__(self, command: list[str], metrics_file: Path, run: TrainingRun) -> None:
        super().__init__(command)
        self.metrics_file = metrics_file
        self.run = run

    def __enter__(self) -> Self:
        """Start the run, wait for the first lines of metrics, and suspend the run."""
        super().__enter__()
        try:
            self.wait_for_lines(NUM_WARMUP_LINES)
            self.send_signal(signal.SIGSTOP)
        except BaseException:
            self.__exit__()
            raise
        return self

    def measure_throughput(self) -> float:
        """Resume the run, and return the images per second over `lines_per_turn` lines of metrics.

        The first line is excluded, because the run was suspended during the steps of that line.
        """
        num_lines = self.count_lines()
        self.send_signal(signal.SIGCONT)
        start_time = self.wait_for_lines(num_lines + 1)
        num_lines = self.count_lines()
        end_time = self.wait_for_lines(num_lines + self.run.lines_per_turn)
        num_images = (self.count_lines() - num_lines) * self.run.log_every * self.run.batch_size
        self.send_signal(signal.SIGSTOP)
        return num_images / (end_time - start_time)

    def wait_for_lines(self, num_lines: int) -> float:
        """Wait until the run has written `num_lines` lines, and return the current time in seconds.
        Raise ValueError if the run ends, or if the wait exceeds `MAX_WAIT_SECONDS`."""
        start_time = time.perf_counter()
        while self.count_lines() < num_lines:
            if self.process.poll() is not None or time.perf_counter() - start_time > MAX_WAIT_SECONDS:
                raise self.build_error()
            time.sleep(0.001)
        return time.perf_counter()

    def count_lines(self) -> int:
        """Return the number of lines that the run has written."""
        return self.metrics_file.read_bytes().count(b"\n") if self.metrics_file.is_file() else 0


# transformers' Trainer, used as in the image classification example of transformers ----------------------------------


LabeledImage = tuple[Image.Image, int]  # image and label index


def collate_images(labeled_images: list[LabeledImage], transform: v2.Transform) -> dict[str, torch.Tensor]:
    """Return a batch of transformed images and their labels."""
    pixel_values = torch.stack([transform(image) for image, _ in labeled_images])  # [B, 3, H, W]
    return {"pixel_values": pixel_values, "labels": torch.tensor([label for _, label in labeled_images])}


class LineWriter(TrainerCallback):
    """Trainer callback that appends a line to a file every `log_every` steps."""

    def __init__(self, file: Path, log_every: int) -> None:
        self.file = file
        self.log_every = log_every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append a line after each multiple of `log_every` steps."""
        if state.global_step % self.log_every == 0:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step}) + "\n")


def load_dataset(name: str, image_size: int) -> Sequence[LabeledImage] | ImageFolder:
    """Return the resized digits of scikit-learn, or the images of a folder with a subfolder per class."""
    if name != "digits":
        return ImageFolder(name)
    from sklearn.datasets import load_digits

    digits = load_digits()
    arrays = (digits.images * (255 / 16)).round().astype("uint8")  # [1797, 8, 8]
    images = (
        Image.fromarray(array).convert("RGB").resize((image_size, image_size), Image.Resampling.BILINEAR)
        for array in arrays
    )
    return list(zip(images, digits.target.tolist(), strict=True))


def build_transforms(augmentation: dict[str, Any], image_size: int) -> v2.Transform:
    """Build transforms that augment individual images in the same way as data/augmentation.py."""
    transforms: list[v2.Transform] = [v2.PILToTensor()]
    if augmentation["crop_scale"] < 1:
        transforms.append(v2.RandomResizedCrop((image_size, image_size), scale=(augmentation["crop_scale"], 1.0)))
    if augmentation["flip"]:
        transforms.append(v2.RandomHorizontalFlip())
    if augmentation["rotation"]:
        shift, zoom = augmentation["shift"], augmentation["zoom"]
        transforms.append(
            v2.RandomAffine(
                degrees=augmentation["rotation"],
                translate=(shift, shift),
                scale=(1 - zoom, 1 + zoom),
                interpolation=v2.InterpolationMode.BILINEAR,
            )
        )
    return v2.Compose([*transforms, v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)])


def main(settings: dict[str, Any]) -> None:
    """Train with transformers' Trainer until the process is stopped."""
    model = ViTForImageClassification.from_pretrained(settings["model"])
    image_size = settings["image_size"]
    training_arguments = TrainingArguments(
        output_dir=settings["output_dir"],
        max_steps=MAX_STEPS,
        per_device_train_batch_size=settings["batch_size"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=MAX_STEPS // 10,
        weight_decay=0.05,
        label_smoothing_factor=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=settings["mixed_precision"] == "bf16",
        use_cpu=not torch.accelerator.is_available(),
        dataloader_num_workers=settings["num_workers"],
        dataloader_drop_last=True,
        remove_unused_columns=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model,
        training_arguments,
        train_dataset=load_dataset(settings["dataset"], image_size),
        data_collator=partial(collate_images, transform=build_transforms(settings["augmentation"], image_size)),
        callbacks=[LineWriter(Path(settings["metrics"]), settings["log_every"])],
    )
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
