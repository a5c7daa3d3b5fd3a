"""Fine-tuning on labeled images. run.py implements the complete run.

    probe              linear classifier on frozen features, from which the classifier starts (probe.py)
    fine-tuning        trained on pixels; with --teacher, the distillation token is trained on the teacher's logits
    --refit            fits the classifier again after fine-tuning, to the features of the trained encoder
    --trainable head   stops after the probe; without a probe, the head is trained on pixels with a frozen encoder

After the run, the output folder contains:
    config.json, model.safetensors, preprocessor_config.json, *_vitcls.py    files for from_pretrained
    results.json, metrics.jsonl                                              final results, metrics of logged steps
    checkpoints/, config.resolved.yaml                                       state for --resume, all flags
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator

from ..conversion.open_model import is_preset
from ..data.augmentation import BatchMixer
from ..data.batches import Batch, Normalizer
from ..data.images import LabeledImages
from ..data.sampling import compute_class_weights
from ..data.splits import (
    MAX_CLASS_RATIO,
    TrainingData,
    describe_leaks,
    describe_missing_classes,
    load_training_data,
)
from ..data.splits_table import find_trained_images, read_splits, select_task
from ..hub.local_paths import strip_folders
from ..inference.evaluator import Evaluator
from ..inference.frozen_features import FrozenPass
from ..inference.metrics import SELECTION_METRICS
from . import losses
from .model import InitialModel, build_model, set_trainable_parameters
from .options import FinetuneOptions
from .probe import MAX_PROBE_IMAGES, Probe, explain_missing_probe
from .reporter import Reporter
from .teacher import Teacher, load_teacher
from .training_setup import TrainingSetup, build_evaluator_arguments


class FineTuning:
    """The recipe of `vitcls finetune`: see `Recipe` in training_setup.py."""

    def check_options(self, options: FinetuneOptions) -> FinetuneOptions:
        """Check and return the options, before data and models are loaded.

        With a teacher, the default of num_distillation_tokens is 1. Raise ValueError if flags
        contradict each other.
        """
        if options.teacher is not None and options.num_distillation_tokens is None:
            options = replace(options, num_distillation_tokens=1)
        if options.teacher is not None and not options.num_distillation_tokens:
            raise ValueError(
                "`teacher` requires `num_distillation_tokens=1` or more. Change it, or remove "
                "`teacher`"
            )

        if options.trainable != "full" and is_preset(options.model):
            raise ValueError(
                f"`trainable={options.trainable!r}` requires trained weights, but "
                f"{options.model} has random weights. Set `model` to a checkpoint"
            )

        if options.streaming and options.class_balance != "none":
            raise ValueError(
                "`class_balance` requires all labels, which `streaming=True` does not read. Remove "
                "one flag"
            )
        return options

    def load_data(self, options: FinetuneOptions, initial: InitialModel) -> TrainingData:
        """Load the training images and the held-out images.

        For pre-trained weights, `--select` is best by default if the dataset has enough images for
        a selection split.
        """
        is_pretrained = not initial.has_random_weights and options.trainable != "head"
        can_select = options.held_out_fraction != 0 and not options.streaming

        data = None
        if options.select is None and is_pretrained and can_select:
            with suppress(ValueError):  # too few images; other errors are raised again below
                data = load_training_data(options, True)
        if data is None:
            data = load_training_data(options, options.needs_selection)

        check_label_kind(options, data.label_space.kind)
        return data

    def build_setup(
        self,
        options: FinetuneOptions,
        initial: InitialModel,
        data: TrainingData,
        reporter: Reporter,
    ) -> TrainingSetup:
        """Load the model and the teacher, freeze parameters, and build loss and evaluation."""
        accelerator = reporter.accelerator
        labels = data.label_space
        model, processor, new_parameter_names = build_model(options, initial, labels)
        teacher = None
        if options.teacher is not None:
            teacher = load_teacher(options.teacher, labels, model.config, accelerator.device)

        set_trainable_parameters(model, options.trainable, options.lora_rank, new_parameter_names)

        evaluator_arguments = build_evaluator_arguments(
            options, data, processor, model.config.num_channels, reporter
        )

        missing_probe_reason = explain_missing_probe(
            is_wanted=options.probe,
            is_stream=options.streaming,
            model=model,
            has_random_weights=initial.has_random_weights,
            new_parameter_names=new_parameter_names,
            label_kind=labels.kind,
        )
        probe = None
        build_pass = partial(FrozenPass, **evaluator_arguments)
        summary_lines = {}
        if missing_probe_reason is None:
            probe = Probe(
                model=model,
                processor=processor,
                accelerator=accelerator,
                build_pass=build_pass,
                max_images=None
                if options.trainable == "head" or options.refit
                else MAX_PROBE_IMAGES,
                resize=options.resize,
                pooling=options.pooling,
                pooled_layers=options.pooled_layers,
                has_statistics=options.statistics,
                class_weight="balanced" if options.class_balance == "weights" else None,
            )
        else:
            summary_lines["probe"] = f"off, because {missing_probe_reason}"
        if teacher is not None:
            summary_lines["teacher"] = teacher.description
        normalize = Normalizer(processor, accelerator.device)
        metric = SELECTION_METRICS[labels.kind]
        class_count_text = " + ".join(
            f"{len(names)} of {column!r}" for column, names in labels.columns.items()
        )

        has_statistics = labels.kind == "single_label_classification" and options.statistics
        teacher_name = options.teacher
        return TrainingSetup(
            model,
            processor,
            build_objective(options, data, teacher, normalize, accelerator),
            build_evaluator=partial(Evaluator, **evaluator_arguments),
            selection_metric=metric,
            printed_metrics=(metric, "macro_f1")
            if data.class_ratio > MAX_CLASS_RATIO
            else (metric,),
            result_metrics=(metric, "cls_accuracy", "distillation_accuracy"),
            labels_text=f"classes: {class_count_text}, {labels.kind.replace('_', ' ')}",
            can_calibrate=labels.kind == "single_label_classification",
            summary_lines=summary_lines,
            results={
                "teacher": strip_folders(teacher_name) if teacher_name else None,
                "label_column": list(options.label_column or labels.columns),
                "label_separator": options.label_separator,
            },
            build_pass=build_pass if has_statistics else None,
            probe=probe,
        )

    def describe_data(
        self, options: FinetuneOptions, initial: InitialModel, data: TrainingData, has_steps: bool
    ) -> list[str]:
        """Return warnings about the data."""
        return [
            *describe_missing_classes(data),
            *describe_leaks(data, options.group_column),
            *describe_overlap(initial, data),
            *describe_imbalance(options.class_balance, data, has_steps),
        ]


def build_objective(
    options: FinetuneOptions,
    data: TrainingData,
    teacher: Teacher | None,
    normalize: Normalizer,
    accelerator: Accelerator,
) -> losses.LabelObjective:
    """Build the label loss, combined with the distillation loss if a teacher is set."""
    labels = data.label_space
    mixer = None
    if options.mixup or options.cutmix:
        mixer = BatchMixer(options, len(labels.names))
    label_loss = build_label_loss(options, data, accelerator.device)
    if teacher is None:
        return losses.LabelObjective(normalize, label_loss, mixer)

    def compute_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        with accelerator.autocast():
            teacher_logits = teacher(batch["pixels"])
        return losses.compute_distillation_loss(
            options.distillation, logits, teacher_logits, options.distillation_tau
        )

    alpha = options.distillation_alpha
    return losses.LabelObjective(normalize, label_loss, mixer, compute_loss, alpha)


def build_label_loss(
    options: FinetuneOptions, data: TrainingData, device: torch.device
) -> losses.LabelLossFunction:
    labels = data.label_space
    class_weights = None
    if options.class_balance == "weights" and isinstance(data.train, LabeledImages):
        class_weights = compute_class_weights(data.train.labels, len(labels.names)).to(device)
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "single_label_classification": partial(
            losses.compute_single_label_loss, class_weights=class_weights
        ),
        "multi_label_classification": losses.compute_multi_label_loss,
        "multi_task": losses.compute_multi_task_loss,
    }
    return partial(functions[labels.kind], label_smoothing=options.label_smoothing)


# Checks -------------------------------------------------------------------------------------------


def check_label_kind(options: FinetuneOptions, kind: str) -> None:
    """Raise ValueError for a flag that requires one label per image, if the labels are others."""
    flags = {
        "mixup": bool(options.mixup),
        "cutmix": bool(options.cutmix),
        "class_balance": options.class_balance != "none",
        "teacher": options.teacher is not None,
    }
    for flag, is_set in flags.items():
        if is_set and kind != "single_label_classification":
            raise ValueError(
                f"`{flag}` requires one label per image, but the labels are {kind}. Remove `{flag}`"
            )


def describe_imbalance(class_balance: str, data: TrainingData, has_steps: bool) -> list[str]:
    """Return a warning about classes of very different sizes.

    The largest then has more than `MAX_CLASS_RATIO` times as many training images as the smallest.
    A run without steps measures what class weights would change.
    """
    if class_balance != "none" or not has_steps:
        return []
    if data.class_ratio <= MAX_CLASS_RATIO:
        return []

    advice = "The accuracy hardly depends on small classes: compare macro F1"
    if describe_missing_classes(data):
        advice = "No result measures the classes without held-out images: add images of them"
    advice += ", and set `class_balance='weights'`"
    return [
        f"the largest class has {data.class_ratio:.0f} times as many training images as the "
        f"smallest. {advice}"
    ]


def describe_overlap(initial: InitialModel, data: TrainingData) -> list[str]:
    """Return a warning if the initial model was trained on held-out images of this run.

    Raise ValueError if its splits.parquet is damaged.
    """
    if initial.folder is None or not isinstance(data.held_out, LabeledImages):
        return []
    splits = select_task(read_splits(initial.folder), None)
    num_trained = int(find_trained_images(data.held_out, splits).sum())
    if not num_trained:
        return []
    return [
        f"{initial.name} was trained on {num_trained:,} of the {len(data.held_out):,} held-out "
        "images of this run, so the result is better than for new images. Set "
        "`held_out_fraction` and `split_seed` as in its run, or choose other images"
    ]
