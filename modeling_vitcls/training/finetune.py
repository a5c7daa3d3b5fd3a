"""Fine-tuning from options to output folder.

    options -> data, model, batch plan -> training loop -> model folder

The folder then holds
    config.json, model.safetensors, preprocessor_config.json, *_vitcls.py    what from_pretrained loads
    README.md                                                                the model card
    results.json            what was measured
    metrics.jsonl           one object per logged step
    config.resolved.yaml    all flags; `--config` with it repeats the run
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn

from ..configuration_vitcls import ViTCLSConfig
from ..hub.card import build_card
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..modeling_vitcls import ViTCLSForImageClassification
from .augmentation import build_augmentation
from .batches import BatchPlan, Normaliser, TrainingPictures, training_batches
from .data import TrainingData, load_training_data
from .environment import build_accelerator, device_name, versions
from .evaluation import Evaluator
from .loop import TrainingState, train
from .losses import classification_loss
from .model import build_model
from .movement import movement, special_tokens, unmoved
from .optimisation import parameter_groups
from .options import FinetuneOptions, as_flags
from .reporting import Reporter


@dataclass
class Run:
    """Everything that a run needs, checked and loaded."""

    options: FinetuneOptions
    accelerator: Accelerator
    data: TrainingData
    model: ViTCLSForImageClassification
    processor: ViTCLSImageProcessor
    plan: BatchPlan


def prepare(options: FinetuneOptions) -> Run:
    """Load data and model and write config.resolved.yaml. What is wrong with the options shows here.

    Raises:
        ValueError, OSError: in one line, for data or models that cannot be read or do not fit the options.
    """
    training = options.training
    accelerator = build_accelerator(training.gradient_accumulation_steps)
    set_seed(training.seed)
    with accelerator.main_process_first():  # downloads once
        data = load_training_data(options.data)
        model, processor = build_model(options.model, data.label_names)
    plan = BatchPlan.from_options(len(data.train), training, accelerator.num_processes)
    if accelerator.is_main_process:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        flags = yaml.safe_dump(as_flags(options), sort_keys=False)
        (options.output_dir / "config.resolved.yaml").write_text(flags, encoding="utf-8")
    accelerator.wait_for_everyone()
    return Run(options, accelerator, data, model, processor, plan)


def finetune(run: Run) -> dict[str, Any]:
    """Train, evaluate, and write the output folder; returns what results.json holds."""
    accelerator, plan, training = run.accelerator, run.plan, run.options.training
    optimizer = torch.optim.AdamW(parameter_groups(run.model, training.weight_decay), lr=training.learning_rate)
    state = TrainingState(*accelerator.prepare(run.model, optimizer))
    evaluate = partial(build_evaluator(run), state.model)
    loss_function = classification_loss(Normaliser(run.processor, accelerator.device), training.label_smoothing)
    tokens_before = special_tokens(run.model)

    reporter = Reporter(run.options.output_dir / "metrics.jsonl", plan.num_steps, accelerator.is_main_process)
    for name, what in summary(run).items():
        reporter.say(name, what)
    started = time.perf_counter()
    with reporter:
        metrics = train(
            state, build_batches(run), loss_function, plan, training, accelerator, evaluate, log=reporter.log
        )
    seconds = time.perf_counter() - started

    tokens_after = special_tokens(run.model)
    for token in unmoved(tokens_before, tokens_after):
        reporter.warn(f"the token {token} did not move in {plan.num_steps} steps: it has learned nothing")
    results = metrics | describe(run, seconds) | {"token_movement": movement(tokens_before, tokens_after)}
    save(run, state.model, results)
    reporter.say("result", f"{metrics['accuracy']:.2%} of {metrics['num_images']} held-out images are right")
    reporter.say("saved", f"{run.options.output_dir} (model, image processor, README.md, results.json)")
    accelerator.end_training()
    return results


def build_batches(run: Run) -> Iterator[dict[str, torch.Tensor]]:
    """This process's training batches, augmented."""
    augmentation = build_augmentation(
        run.options.augmentation, run.model.config.image_height_width, run.processor.resample
    )
    to_rgb = bool(run.processor.do_convert_rgb)
    pictures = TrainingPictures(run.data.train, augmentation, to_rgb, run.options.training.seed)
    return training_batches(pictures, run.plan, run.accelerator.process_index, run.options.data.num_workers)


def build_evaluator(run: Run) -> Evaluator:
    """Evaluation on the held-out images."""
    return Evaluator(
        run.data.held_out,
        run.processor,
        num_labels=len(run.data.label_names),
        batch_size=run.options.training.batch_size,
        num_workers=run.options.data.num_workers,
        accelerator=run.accelerator,
    )


def save(run: Run, model: nn.Module, results: dict[str, Any]) -> None:
    """Write model, image processor, card and results; `model` is the prepared one."""
    accelerator, folder = run.accelerator, run.options.output_dir
    state_dict = accelerator.get_state_dict(model)  # gathers the parts of a sharded model: all processes take part
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=state_dict)
        run.processor.save_pretrained(folder)
        write(folder / "results.json", json.dumps(results, indent=2) + "\n")
        build_card(folder.resolve().name, run.model.config, results, as_flags(run.options)).save(folder / "README.md")
    accelerator.wait_for_everyone()


def write(file: Path, text: str) -> None:
    """Write a text file."""
    file.write_text(text, encoding="utf-8")


# What is printed and recorded about a run ----------------------------------------------------------------------------


def summary(run: Run) -> dict[str, str]:
    """The lines that are printed before training."""
    data, plan, config = run.data, run.plan, run.model.config
    counts = {name: count for name, count in token_counts(config).items() if count}
    tokens = " | ".join(f"{count} {name}" for name, count in counts.items())
    height, width = config.image_height_width
    batch = f"{plan.batch_size} x {plan.accumulation_steps} accumulated x {plan.num_processes} process(es)"
    return {
        "data": f"{data.name}: {len(data.train):,} images of {len(data.label_names)} classes to train on, "
        f"{len(data.held_out):,} held out ({data.held_out_name})",
        "model": f"{run.options.model.model}: {num_parameters(run.model):,} parameters, {config.num_hidden_layers} "
        f"layers of width {config.hidden_size}, pooling {config.pooling}",
        "tokens": f"[ {tokens} ] = {sum(counts.values())} for {height} x {width} pixels",
        "batches": f"{plan.pictures_per_step} images a step = {batch}; {plan.num_steps:,} steps = "
        f"{plan.epochs_after(plan.num_steps):.1f} epochs",
        "device": f"{device_name(run.accelerator)}, mixed precision: {run.accelerator.mixed_precision}",
    }


def describe(run: Run, seconds: float) -> dict[str, Any]:
    """What results.json says besides metrics: data, effort, model, and where it ran."""
    plan, counts = run.plan, token_counts(run.model.config)
    return {
        "dataset": run.data.name,
        "split": run.data.held_out_name,
        "num_training_images": len(run.data.train),
        "steps": plan.num_steps,
        "epochs": round(plan.epochs_after(plan.num_steps), 4),
        "seconds": round(seconds, 2),
        "images_per_second": round(plan.num_steps * plan.pictures_per_step / seconds, 1),
        "num_parameters": num_parameters(run.model),
        "token_layout": counts,
        "sequence_length": sum(counts.values()),
        "device": device_name(run.accelerator),
        "mixed_precision": run.accelerator.mixed_precision,
        "num_processes": run.accelerator.num_processes,
        "versions": versions(),
    }


def token_counts(config: ViTCLSConfig) -> dict[str, int]:
    """Tokens in each group, for images of the configured size."""
    num_patches = math.prod(config.grid_size)
    sequence = range(config.token_layout.num_prefix_tokens + num_patches)
    return {name: len(sequence[group]) for name, group in config.token_layout.items()}


def num_parameters(model: nn.Module) -> int:
    """All parameters, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())
