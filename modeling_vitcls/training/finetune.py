"""Fine-tuning on labeled images. run.py implements the complete run.

    frozen model       linear classifier of frozen features (heads.py): saved by a frozen run, and the start of steps
    steps              trained on pixels, with --teacher also on the teacher's logits (losses.py)
    --trainable head   the frozen model; without one, the head is trained on pixels with a frozen encoder

After the run, the output folder contains:
    config.json, model.safetensors, preprocessor_config.json, *_vitcls.py    files for from_pretrained
    results.json, metrics.jsonl                                              final results, metrics of logged steps
    checkpoints/, config.resolved.yaml                                       state for --resume, all flags
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from ..data.aspect_ratio import get_resize
from ..data.augmentation import build_mixer
from ..data.batches import Batch, Normalizer
from ..data.sampling import compute_class_weights
from ..data.sources import Splits
from ..data.splits import (
    TrainingData,
    describe_leaks,
    describe_missing_classes,
    load_undivided_images,
)
from ..inference.evaluator import Evaluator
from ..inference.frozen_features import FrozenPass
from ..inference.metrics import SELECTION_METRICS
from . import losses
from .frozen_encoder import FrozenEncoder, explain_missing_start
from .model import InitialModel, build_model, set_trainable_parameters
from .options import FinetuneOptions
from .reporter import Reporter
from .teacher import Teacher, load_teacher, measure
from .training_setup import TrainingSetup, build_evaluator_arguments


class FineTuning:
    """The recipe of `vitcls finetune`: see `Recipe` in training_setup.py."""

    def load_images(self, options: FinetuneOptions, initial: InitialModel) -> Splits:
        """Read the labels and keys of the images. Steps that select read validation and test."""
        # A frozen run is fitted to the validation labels and measured on the test split. Whether
        # the run is frozen is decided later, so both splits are read if it may be.
        can_be_frozen = not initial.has_random_weights
        images = load_undivided_images(options, options.select == "best" or can_be_frozen)
        check_label_kind(
            images.label_space.kind,
            mixup=options.mixup,
            class_balance=options.class_balance,
            teacher=options.teacher,
            **{"augment cutmix": get_cutmix(options)},
        )
        return images

    def build_setup(
        self,
        options: FinetuneOptions,
        initial: InitialModel,
        images: Splits,
        reporter: Reporter,
    ) -> TrainingSetup:
        """Load the model and the teacher, freeze parameters, and prepare loss and evaluation."""
        accelerator = reporter.accelerator
        labels = images.label_space
        model, processor, new_parameter_names = build_model(
            initial, labels, options.get_config_values(), options.resize, options.bit_depth
        )
        teacher = None
        if options.teacher is not None:
            teacher = load_teacher(options.teacher, labels, model.config, accelerator.device)

        set_trainable_parameters(model, options.trainable, new_parameter_names)
        evaluator_arguments = build_evaluator_arguments(
            options, labels, processor, model.config.num_channels, reporter
        )
        missing_start_reason = explain_missing_start(
            is_wanted=options.probe,
            model=model,
            has_random_weights=initial.has_random_weights,
            new_parameter_names=new_parameter_names,
        )
        frozen_encoder = None
        build_pass = partial(FrozenPass, **evaluator_arguments)
        if missing_start_reason is None:
            frozen_encoder = FrozenEncoder(
                model=model,
                processor=processor,
                label_space=labels,
                build_pass=build_pass,
                resize=options.resize,
                pooling=options.pooling,
                pooled_layers=options.pooled_layers,
                class_weight="balanced" if options.class_balance == "weights" else None,
            )
        metric = SELECTION_METRICS[labels.kind]
        is_single_label = labels.kind == "single_label_classification"
        # A head is known if the checkpoint has it, or if it is going to be fitted.
        new_heads = [name for name in new_parameter_names if not name.startswith("vitcls.")]
        return TrainingSetup(
            model,
            model,
            processor,
            build_objective=partial(
                build_objective,
                options,
                teacher=teacher,
                normalize=Normalizer(processor, accelerator.device),
                accelerator=accelerator,
            ),
            build_evaluator=lambda data, images: Evaluator(images, **evaluator_arguments),
            selection_metric=metric,
            resize=get_resize(processor) if frozen_encoder is None else None,
            has_known_head=frozen_encoder is not None or not new_heads,
            summary_lines={} if teacher is None else {"teacher": teacher.description},
            missing_start_reason=missing_start_reason or "",
            results={
                "label_column": list(options.label_column or labels.columns),
                "label_separator": labels.separator,
                # New tokens are trained although `trainable` is "head"
                "steps_train_encoder": any(
                    each.requires_grad for each in model.vitcls.parameters()
                ),
            },
            build_pass=build_pass if is_single_label else None,
            frozen_encoder=frozen_encoder,
            teacher=teacher,
        )

    def list_warnings(self, options: FinetuneOptions, data: TrainingData) -> list[str]:
        """List missing classes, and images on both sides."""
        return [*describe_missing_classes(data), *describe_leaks(data, options.group_column)]

    def measure_start(self, setup: TrainingSetup, held_out: Evaluator) -> dict[str, Any]:
        """Measure the teacher, if there is one. The frozen model is measured when it is fitted."""
        if setup.teacher is None:
            return {}
        return {"teacher_accuracy": measure(setup.teacher, setup.model, held_out)["accuracy"]}


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
    cutmix = get_cutmix(options)
    if options.mixup or cutmix:
        mixer = build_mixer(options.mixup, cutmix, len(labels.names))
    class_weights = None
    if options.class_balance == "weights":
        class_weights = compute_class_weights(data.train.labels, len(labels.names))
        class_weights = class_weights.to(accelerator.device)
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "single_label_classification": partial(
            losses.compute_single_label_loss, class_weights=class_weights
        ),
        "multi_label_classification": losses.compute_multi_label_loss,
        "multi_task": losses.compute_multi_task_loss,
    }
    label_loss = partial(functions[labels.kind], label_smoothing=options.label_smoothing)
    if teacher is None:
        return losses.LabelObjective(normalize, label_loss, mixer)

    def compute_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        # Accelerate runs only the prepared model under autocast by itself, and the teacher is not
        # one.
        with accelerator.autocast():
            teacher_logits = teacher(batch["pixels"])
        return losses.compute_distillation_loss(options.distillation, logits, teacher_logits)

    return losses.LabelObjective(normalize, label_loss, mixer, compute_loss)


# Checks -------------------------------------------------------------------------------------------


def get_cutmix(options: FinetuneOptions) -> float:
    """Get the alpha of CutMix; 0 without it."""
    return float((options.augment or {}).get("cutmix", 0))


def check_label_kind(kind: str, **flags: Any) -> None:
    """Raise ValueError for a flag that requires one label per image, if the labels are others."""
    for flag, value in flags.items():
        if value not in (0, None, "none") and kind != "single_label_classification":
            raise ValueError(
                f"`{flag}` requires one label per image, but the labels are {kind}. Remove `{flag}`"
            )
