"""Fine-tuning, from options to output folder.

    options -> setup.py: data, model, teacher, batch plan -> components.py -> runner.py: training -> model folder

The folder then contains
    config.json, model.safetensors, preprocessor_config.json, *_vitcls.py    files for from_pretrained
    README.md, pictures/                                                     model card
    report.html                                                              analysis of the special tokens
    LICENSE*, NOTICE*       license files of the initial model, if it has any
    results.json            metrics and facts about the run
    metrics.jsonl           one object per logged step
    checkpoints/            state for --resume
    config.resolved.yaml    all flags; pass it to `--config` to repeat the run
"""

from dataclasses import replace
from functools import partial
from typing import Any

from huggingface_hub import ModelCard

from ..data.held_out import RECORD
from ..data.images import LabelledPictures
from ..data.splits import describe_missing_classes
from ..hub.card import build_card
from ..hub.local_paths import strip_folders
from ..hub.provenance import Provenance
from ..inference.evaluator import Evaluator
from ..inference.metrics import without_large_matrices
from ..options import FinetuneOptions, as_flags
from .branch_uploads import build_branch_uploads
from .components import build_components
from .distributed_state import gather, get_named_tensors
from .finish import finish_run, push_finished_run, save_output, write_model
from .loop import Metrics
from .model_report import (
    get_teacher_provenance,
)
from .reporter import format_metric
from .results import describe_batches, describe_model, describe_run
from .runner import execute_dry_run
from .setup import FinetuneSetup, build_plan, describe_other_split, prepare


def finetune(setup: FinetuneSetup) -> dict[str, Any]:
    """Train, evaluate and write the output folder; return the content of results.json.

    Raises:
        RunStopped: see `Runner.train`; also if the result cannot be written or pushed.
    """
    with setup.runner.lock:
        return train_and_save(setup)


def train_and_save(setup: FinetuneSetup) -> dict[str, Any]:
    """Train, evaluate and write the output folder while it is locked."""
    runner = setup.runner
    if runner.is_finished:
        return push_finished_run(runner, setup.hub_model_id)
    for name, text in summarize(setup).items():
        runner.reporter.print_line(name, text)
    other_split = describe_other_split(setup.options.model.model, setup.data)
    for warning in [*describe_missing_classes(setup.data), *([other_split] if other_split else [])]:
        runner.reporter.warn(warning)
    evaluator = build_evaluator(setup)
    components = build_components(setup, evaluator)
    metrics = runner.train(
        components.model,
        components.objective,
        setup.plan,
        components.batches,
        components.evaluate,
        components.measure_attention,
        components.describe_unreadable,
        build_branch_uploads(
            runner, setup.hub_model_id, setup.model, partial(write_model, setup.built.model, setup.built.processor)
        ),
    )
    if components.model is not setup.model:  # only the heads were trained: evaluate the whole model
        metrics |= evaluator(setup.built.model.eval())
    results = collect_results(setup) | without_large_matrices(metrics)
    save(setup, results)
    finish_run(runner, format_result(metrics), setup.hub_model_id)
    return results


def dry_run(options: FinetuneOptions) -> None:
    """Run a few steps, an evaluation, a checkpoint and saving on a few images, in a temporary folder (`--dry-run`).

    Raises:
        ValueError, OSError, RunStopped: like `prepare` and `finetune`.
    """
    execute_dry_run(options, prepare, finetune, build_plan, limit_training_images)


def limit_training_images(setup: FinetuneSetup) -> None:
    """Keep only the training images of the planned steps for linear probing, which encodes all images first."""
    if setup.options.training.trainable == "head" and isinstance(setup.data.train, LabelledPictures):
        plan = setup.plan
        batches = [batch for process in range(plan.num_processes) for batch in plan.batches(process)]
        indices = sorted({index for batch in batches for _, index in batch})
        setup.data = replace(setup.data, train=setup.data.train.chosen(indices))
        setup.plan = build_plan(setup.options, setup.data, plan.num_processes)


def build_evaluator(setup: FinetuneSetup) -> Evaluator:
    """Build the evaluator on the held-out images."""
    return Evaluator(
        setup.data.held_out,
        setup.built.processor,
        setup.data.label_space,
        batch_size=setup.options.training.batch_size,
        num_workers=setup.options.data.num_workers,
        accelerator=setup.runner.accelerator,
        max_broken_images=setup.options.data.max_broken_images,
        warn=setup.runner.reporter.warn,
        num_channels=setup.built.model.config.num_channels,
    )


# Output --------------------------------------------------------------------------------------------------------------


def save(setup: FinetuneSetup, results: dict[str, Any]) -> None:
    """Write model, image processor, card and results to the output folder."""
    options, config = setup.options, setup.built.model.config

    def build(name: str, provenance: Provenance | None, images: dict[str, str]) -> ModelCard:
        teacher = get_teacher_provenance(options)
        return build_card(name, config, results, as_flags(options), provenance, teacher, images)

    weights = gather(get_named_tensors(setup.model), setup.runner.accelerator.is_main_process)  # collective
    save_output(
        setup.runner, setup.built.model, setup.built.processor, weights, setup.data, results, setup.hub_model_id, build
    )


# Summary and results -------------------------------------------------------------------------------------------------


def summarize(setup: FinetuneSetup) -> dict[str, str]:
    """Return the lines that are printed before training."""
    data, labels = setup.data, setup.data.label_space
    classes = " + ".join(f"{len(names)} of {column!r}" for column, names in labels.columns.items())
    number = "a stream of" if setup.data.num_training_images is None else f"{setup.data.num_training_images:,}"
    lines = {
        "data": f"{data.name}: {number} images to train on, {len(data.held_out):,} held out ({data.held_out_name}); "
        f"classes: {classes}, {labels.kind.replace('_', ' ')}",
        **describe_model(setup.options.model.model, setup.model, setup.built.model.config),
    }
    if setup.teacher is not None:
        lines["teacher"] = "; ".join(filter(None, [setup.teacher.description, setup.teacher.note]))
    return lines | describe_batches(setup.plan, setup.runner.accelerator)


def collect_results(setup: FinetuneSetup) -> dict[str, Any]:
    """Return the content of results.json except the metrics."""
    runner, teacher = setup.runner, setup.options.distillation.teacher
    data = {
        "dataset": setup.data.name,
        "split": setup.data.held_out_name,
        RECORD: setup.data.record.to_dict(),
        "num_training_images": setup.data.num_training_images,
        "teacher": strip_folders(teacher) if teacher else None,
    }
    config = setup.built.model.config
    return data | describe_run(setup.plan, setup.built.model, config, runner.accelerator, runner.seconds)


def format_result(metrics: Metrics) -> str:
    """Format the result in one line."""
    names = [next(iter(metrics)), *(name for name in ("cls_accuracy", "distillation_accuracy") if name in metrics)]
    values = ", ".join(format_metric(name, metrics[name]) for name in names)
    return f"{values} on {metrics['num_images']:,} held-out images"
