"""Fine-tuning from options to output folder.

    options -> setup.py: data, model, teacher, batch plan -> components.py -> runner.py: training -> model folder

The folder then holds
    config.json, model.safetensors, preprocessor_config.json, *_vitcls.py    what from_pretrained loads
    README.md, pictures/                                                     the model card
    report.html                                                              what the special tokens do
    LICENSE*, NOTICE*       of the model that it started from, where that has them
    results.json            what was measured
    metrics.jsonl           one object per logged step
    checkpoints/            where --resume goes on
    config.resolved.yaml    all flags; `--config` with it repeats the run
"""

import time
from dataclasses import replace
from functools import partial
from typing import Any

from ..data.held_out import RECORD
from ..data.images import LabelledPictures
from ..data.splits import describe_missing_classes
from ..files import write_json
from ..hub.card import build_card
from ..hub.local_paths import without_folders
from ..inference.evaluator import Evaluator
from ..inference.metrics import without_large_matrices
from ..options import FinetuneOptions, as_flags
from .branch_uploads import branch_uploads
from .components import build_parts
from .distributed_state import gather, named_tensors
from .finish import conclude, finished_before, write_model, write_output
from .loop import Metrics
from .model_report import look_at_saved, may_show_samples, origin_of_run, teacher_of_run, write_card
from .reporter import shown_metric
from .results import facts_of_run, model_lines, plan_lines
from .runner import dry_run
from .setup import Run, build_plan, describe_other_split, prepare


def finetune(run: Run) -> dict[str, Any]:
    """Train, evaluate, and write the output folder; returns what results.json holds.

    Raises:
        RunStopped: see `Session.train`; also for a result that cannot be pushed.
    """
    with run.session.lock:
        return train_and_save(run)


def train_and_save(run: Run) -> dict[str, Any]:
    """Do the work of `finetune` while the output folder is locked."""
    session = run.session
    if session.is_finished:
        return finished_before(session, run.hub_model_id)
    for name, what in summary(run).items():
        session.reporter.say(name, what)
    other_split = describe_other_split(run.options.model.model, run.data)
    for warning in [*describe_missing_classes(run.data), *([other_split] if other_split else [])]:
        session.reporter.warn(warning)
    evaluator = build_evaluator(run)
    parts = build_parts(run, evaluator)
    metrics = session.train(
        parts.model,
        parts.objective,
        run.plan,
        parts.batches,
        parts.evaluate,
        parts.measure_attention,
        parts.describe_broken,
        branch_uploads(
            session, run.hub_model_id, run.model, partial(write_model, run.built.model, run.built.processor)
        ),
    )
    if parts.model is not run.model:  # the heads alone were trained: this is what their model is worth
        metrics |= evaluator(run.built.model.eval())
    results = describe(run) | without_large_matrices(metrics)
    save(run, results)
    conclude(session, headline(metrics), run.hub_model_id)
    return results


def rehearse(options: FinetuneOptions) -> None:
    """`--dry-run`: a few steps and one of everything else on a few images, in a folder that is removed again.

    Raises:
        ValueError, OSError, RunStopped: as `prepare` and `finetune` would.
    """
    started = time.perf_counter()
    with dry_run(options) as short:
        run = prepare(short)
        plan, num_held_out = build_plan(options, run.data, run.plan.num_processes), len(run.data.held_out)
        few = range(min(num_held_out, run.plan.batch_size * run.plan.num_processes))
        run.data = replace(run.data, held_out=run.data.held_out.chosen(few))
        if options.training.trainable == "head":
            shorten(run)
        finetune(run)
    run.session.report_rehearsal(started, plan, len(few) / num_held_out, run.hub_model_id)


def shorten(run: Run) -> None:
    """Leave only the training images of the planned steps: linear probing would encode all of them first."""
    if isinstance(run.data.train, LabelledPictures):
        plan = run.plan
        batches = [batch for process in range(plan.num_processes) for batch in plan.batches(process)]
        used = sorted({index for batch in batches for _, index in batch})
        run.data = replace(run.data, train=run.data.train.chosen(used))
        run.plan = build_plan(run.options, run.data, plan.num_processes)


def build_evaluator(run: Run) -> Evaluator:
    """Evaluation on the held-out images."""
    return Evaluator(
        run.data.held_out,
        run.built.processor,
        run.data.label_space,
        batch_size=run.options.training.batch_size,
        num_workers=run.options.data.num_workers,
        accelerator=run.session.accelerator,
        max_broken_images=run.options.data.max_broken_images,
        warn=run.session.reporter.warn,
        num_channels=run.built.model.config.num_channels,
    )


# Output --------------------------------------------------------------------------------------------------------------


def save(run: Run, results: dict[str, Any]) -> None:
    """Write model, image processor, card and results; results.json comes last, since it says that all is there."""
    accelerator, folder = run.session.accelerator, run.session.folder
    weights = gather(named_tensors(run.model), accelerator.is_main_process)  # all processes take part

    def write() -> None:
        write_model(run.built.model, run.built.processor, folder, weights)
        options, reporter, origin = run.options, run.session.reporter, origin_of_run(run.options)
        pictures = look_at_saved(
            folder,
            type(run.built.model),
            results,
            run.data.held_out,
            run.data.label_space,
            accelerator.device,
            options.run.report,
            reporter.warn,
            reporter.track,
            may_show_samples(options, run.hub_model_id, reporter.warn),
        )
        card = build_card(
            run.hub_model_id or folder.resolve().name,
            run.built.model.config,
            results,
            as_flags(options),
            origin,
            teacher_of_run(options),
            pictures,
        )
        write_card(folder, card, origin, results, options.run, reporter.warn)
        write_json(folder / "results.json", results)

    write_output(run.session, write)


# What is printed and recorded ----------------------------------------------------------------------------------------


def summary(run: Run) -> dict[str, str]:
    """The lines that are printed before training."""
    data, labels = run.data, run.data.label_space
    classes = " + ".join(f"{len(names)} of {column!r}" for column, names in labels.columns.items())
    number = "a stream of" if run.data.num_training_images is None else f"{run.data.num_training_images:,}"
    lines = {
        "data": f"{data.name}: {number} images to train on, {len(data.held_out):,} held out ({data.held_out_name}); "
        f"classes: {classes}, {labels.kind.replace('_', ' ')}",
        **model_lines(run.options.model.model, run.model, run.built.model.config),
    }
    if run.teacher is not None:
        lines["teacher"] = "; ".join(filter(None, [run.teacher.description, run.teacher.note]))
    return lines | plan_lines(run.plan, run.session.accelerator)


def describe(run: Run) -> dict[str, Any]:
    """What results.json says besides metrics."""
    session, teacher = run.session, run.options.distillation.teacher
    data = {
        "dataset": run.data.name,
        "split": run.data.held_out_name,
        RECORD: run.data.record.to_dict(),
        "num_training_images": run.data.num_training_images,
        "teacher": without_folders(teacher) if teacher else None,
    }
    config = run.built.model.config
    return data | facts_of_run(run.plan, run.built.model, config, session.accelerator, session.seconds)


def headline(metrics: Metrics) -> str:
    """The result in one line."""
    shown = [next(iter(metrics)), *(name for name in ("cls_accuracy", "distillation_accuracy") if name in metrics)]
    values = ", ".join(shown_metric(name, metrics[name]) for name in shown)
    return f"{values} on {metrics['num_images']:,} held-out images"
