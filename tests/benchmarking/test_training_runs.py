"""Comparisons of training runs: equal settings and weights, and runs that are suspended between their turns."""

import json
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import raises_one_line
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms import v2
from transformers import ViTForImageClassification

from modeling_vitcls import ViTCLSImageProcessor
from modeling_vitcls.benchmarking import training_runs
from modeling_vitcls.benchmarking.peers import TOY_SIZE
from modeling_vitcls.benchmarking.training_runs import (
    CROP_AUGMENTATION,
    DIGITS_RUN,
    MAX_STEPS,
    SHIFT_AUGMENTATION,
    TRAINING_RUNS,
    LineWriter,
    SuspendedRun,
    build_finetune_command,
    build_trainer_command,
    build_transforms,
    collate_images,
    load_dataset,
    save_models,
)
from modeling_vitcls.commands.parsing import parse_with_recipe
from modeling_vitcls.options import FinetuneOptions


def test_both_sides_of_training_begin_with_the_same_weights(tmp_path: Path) -> None:
    from modeling_vitcls import ViTCLSForImageClassification

    run = replace(DIGITS_RUN, size=TOY_SIZE)
    names = ["a", "b", "c"]
    assert save_models(run, names, tmp_path, "row") < 1e-5
    ours = ViTCLSForImageClassification.from_pretrained(tmp_path / "our_model")
    assert ours.config.id2label == dict(enumerate(names))
    assert ours.config.hidden_size == TOY_SIZE.hidden_size
    theirs = ViTForImageClassification.from_pretrained(tmp_path / "their_model")
    processor = ViTCLSImageProcessor.from_pretrained(tmp_path / "our_model")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    transform = build_transforms({"crop_scale": 1.0, "flip": False, "rotation": 0}, TOY_SIZE.image_size)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    batch = collate_images([(image, 2), (image, 1)], transform)
    assert batch["labels"].tolist() == [2, 1] and torch.allclose(batch["pixel_values"][1:], pixel_values, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(ours(pixel_values).logits, theirs(pixel_values).logits, atol=1e-5)


@pytest.mark.parametrize("name", TRAINING_RUNS)
def test_our_run_has_the_settings_of_the_row_and_no_evaluation(name: str, tmp_path: Path) -> None:
    run = TRAINING_RUNS[name]
    command = build_finetune_command(run, "digits", tmp_path)
    options = parse_with_recipe(FinetuneOptions, command[command.index("finetune") + 1 :])
    training = options.training
    assert training.evaluate_every >= training.max_steps == MAX_STEPS
    assert (training.batch_size, training.learning_rate) == (run.batch_size, run.learning_rate)
    assert (training.mixed_precision, training.log_every) == (run.mixed_precision, run.log_every)
    assert options.data.num_workers == run.num_workers
    assert {field: getattr(options.augmentation, field) for field in run.augmentation} == run.augmentation


def test_their_run_has_the_settings_of_the_row(tmp_path: Path) -> None:
    run = replace(DIGITS_RUN, size=TOY_SIZE, num_workers=3)
    *program, file = build_trainer_command(run, "digits", tmp_path)
    assert program[1:] == ["-m", "modeling_vitcls.benchmarking.training_runs"]
    settings = json.loads(Path(file).read_text())
    for name in ("batch_size", "mixed_precision", "num_workers", "log_every", "learning_rate", "augmentation"):
        assert settings[name] == getattr(run, name), name
    assert (settings["dataset"], settings["image_size"]) == ("digits", 32)
    paths = [settings[name] for name in ("model", "output_dir", "metrics")]
    assert paths == [str(tmp_path / name) for name in ("their_model", "theirs", "theirs.jsonl")]


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_both_runs_have_the_same_hyperparameters(
    mixed_precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is trained: Trainer is replaced by a function that returns its arguments."""
    run = replace(DIGITS_RUN, size=TOY_SIZE, mixed_precision=mixed_precision, num_workers=2)
    save_models(run, [str(digit) for digit in range(10)], tmp_path, "row")
    calls: list[dict[str, Any]] = []

    def build_trainer(model: Any, arguments: Any, **others: Any) -> Any:
        return SimpleNamespace(train=lambda: calls.append({"model": model, "arguments": arguments, **others}))

    monkeypatch.setattr(training_runs, "Trainer", build_trainer)
    training_runs.main(json.loads(Path(build_trainer_command(run, "digits", tmp_path)[-1]).read_text()))
    (call,) = calls
    command = build_finetune_command(run, "digits", tmp_path)
    ours, theirs = (
        parse_with_recipe(FinetuneOptions, command[command.index("finetune") + 1 :]).training,
        call["arguments"],
    )
    assert (theirs.max_steps, theirs.per_device_train_batch_size) == (ours.max_steps, ours.batch_size)
    assert (theirs.learning_rate, theirs.weight_decay) == (ours.learning_rate, ours.weight_decay)
    assert theirs.warmup_steps == ours.warmup * ours.max_steps and theirs.lr_scheduler_type == "cosine"
    assert (theirs.label_smoothing_factor, theirs.max_grad_norm) == (ours.label_smoothing, ours.max_gradient_norm)
    assert theirs.bf16 == (mixed_precision == "bf16") == (ours.mixed_precision == "bf16") and not theirs.fp16
    assert theirs.optim == "adamw_torch_fused" and theirs.dataloader_num_workers == 2
    assert theirs.dataloader_drop_last and not theirs.remove_unused_columns
    assert (theirs.save_strategy.value, theirs.logging_strategy.value) == ("no", "no")
    batch = call["data_collator"]([call["train_dataset"][index] for index in (0, 5)])
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["labels"].tolist() == [0, 5]
    assert call["model"].config.hidden_size == TOY_SIZE.hidden_size and len(call["train_dataset"]) == 1797
    call["callbacks"][0].on_step_end(theirs, SimpleNamespace(global_step=run.log_every), None)
    assert (tmp_path / "theirs.jsonl").read_text().count("\n") == 1


def test_the_speed_is_measured_between_two_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without a process: while it is not suspended, it writes a line every 0.5 seconds of a simulated clock."""
    file, clock, signals = tmp_path / "lines", [0.0], []
    run = SuspendedRun([], file, replace(DIGITS_RUN, log_every=20, batch_size=64, lines_per_turn=3))
    run.process = SimpleNamespace(poll=lambda: None)

    def sleep(seconds: float) -> None:
        clock[0] += 0.5
        with file.open("a") as lines:
            lines.write("line\n")

    monkeypatch.setattr(training_runs, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(run, "send_signal", signals.append)
    file.write_text("line\n" * 7)
    assert run.measure_throughput() == 20 * 64 / 0.5
    assert signals == [signal.SIGCONT, signal.SIGSTOP] and run.count_lines() == 7 + 1 + 3
    run.log.write(b"one\nthe last line\n")
    monkeypatch.setattr(training_runs, "MAX_WAIT_SECONDS", 10)
    with raises_one_line("the last line"):
        run.wait_for_lines(11 + 22)  # after 11 seconds
    run.log.close()


def test_both_runs_train_on_the_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two processes are replaced by constant speeds."""
    runs: list[tuple[list[str], Path]] = []

    class Run:
        def __init__(self, command: list[str], metrics_file: Path, run: Any) -> None:
            runs.append((command, metrics_file))
            self.speed = {"ours": 3.0, "theirs": 2.0}[metrics_file.relative_to(tmp_path).parts[0].partition(".")[0]]

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *exc_info: object) -> None:
            pass

        def measure_throughput(self) -> float:
            return self.speed

    monkeypatch.setattr(training_runs, "SuspendedRun", Run)
    monkeypatch.setattr(training_runs, "PHOTOGRAPHS_PER_CLASS", 2)
    run = replace(TRAINING_RUNS["ViT-S/16 at 224, fp32"], size=TOY_SIZE)
    result = training_runs.compare_runs("row", run, 2, tmp_path)
    assert (result.ours, result.theirs, result.details) == ([3.0] * 2, [2.0] * 2, asdict(run))
    assert 0 < result.difference < 1e-4
    dataset = str(tmp_path / "photographs")
    (ours, our_metrics), (theirs, their_metrics) = runs
    assert ours[ours.index("--dataset") + 1] == json.loads(Path(theirs[-1]).read_text())["dataset"] == dataset
    assert (our_metrics, their_metrics) == (tmp_path / "ours" / "metrics.jsonl", tmp_path / "theirs.jsonl")
    for folder in ("our_model", "their_model"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["id2label"] == {"0": "china", "1": "flower"} and config["hidden_size"] == TOY_SIZE.hidden_size
    images = load_dataset(dataset, 0)
    assert [label for _, label in images] == [0, 0, 1, 1] and images[0][0].size == (500, 375)


def test_their_augmentation_has_the_strength_of_the_row() -> None:
    """Check the ranges of the random transforms, and that the crop has the size of the model."""
    crops = build_transforms(CROP_AUGMENTATION, 32).transforms
    (crop,) = [one for one in crops if isinstance(one, v2.RandomResizedCrop)]
    (flip,) = [one for one in crops if isinstance(one, v2.RandomHorizontalFlip)]
    assert (crop.size, crop.scale, flip.p) == ((32, 32), (0.35, 1.0), 0.5)
    assert not any(isinstance(one, v2.RandomAffine) for one in crops)
    shifts = build_transforms(SHIFT_AUGMENTATION | {"shift": 0.2}, 32).transforms
    (affine,) = [one for one in shifts if isinstance(one, v2.RandomAffine)]
    assert (affine.degrees, affine.translate, affine.scale) == ([-10, 10], (0.2, 0.2), pytest.approx((0.9, 1.1)))
    assert not any(isinstance(one, (v2.RandomResizedCrop, v2.RandomHorizontalFlip)) for one in shifts)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    pixel_values = v2.Compose(crops)(image)
    assert pixel_values.shape == (3, 32, 32) and -1 <= pixel_values.min() < -0.5 < 0.5 < pixel_values.max() <= 1


def test_digits_are_images_of_the_size_of_the_model() -> None:
    images = load_dataset("digits", 32)
    digits = load_digits()
    assert len(images) == 1797 and [label for _, label in images[:20]] == digits.target[:20].tolist()
    image = images[7][0]
    assert (image.mode, image.size) == ("RGB", (32, 32))
    small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float)[..., 0]
    assert np.abs(small - digits.images[7] * 255 / 16).mean() < 20


def test_a_line_is_written_after_every_few_steps(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path / "lines", log_every=3)
    for step in range(1, 8):
        writer.on_step_end(None, SimpleNamespace(global_step=step), None)
    assert [json.loads(line) for line in (tmp_path / "lines").read_text().splitlines()] == [{"step": 3}, {"step": 6}]


def test_the_last_line_of_a_run_that_ends_is_reported(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('first'); raise SystemExit('no such model')"]
    with raises_one_line("failed: no such model"), SuspendedRun(command, tmp_path / "lines", DIGITS_RUN):
        pass


def test_a_suspended_run_runs_only_in_its_turns(tmp_path: Path) -> None:
    lines = tmp_path / "lines"
    loop = "import sys, time\nwhile True:\n print('x', file=open(sys.argv[1], 'a')); time.sleep(0.01)"
    with SuspendedRun([sys.executable, "-c", loop, str(lines)], lines, DIGITS_RUN) as run:
        before = run.count_lines()
        subprocess.run(["sleep", "0.2"], check=True)
        assert run.count_lines() - before <= 1  # suspended
        assert run.measure_throughput() > 0
        assert run.count_lines() >= before + 1 + DIGITS_RUN.lines_per_turn
    assert run.process.poll() is not None
