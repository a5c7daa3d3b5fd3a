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

from ..data.augmentation import build_mixer
from ..data.batches import Batch, Normalizer
from ..data.labels import LabelSpace
from ..data.sampling import compute_class_weights
from ..data.sources import Splits
from ..data.splits import (
    TrainingData,
    describe_leaks,
    describe_missing_classes,
    load_undivided_images,
)
from ..inference.evaluator import Evaluator
from ..inference.frozen_features import FrozenPass, has_searchable_pooling
from ..inference.metrics import SELECTION_METRICS
from . import losses
from .frozen_encoder import FrozenEncoder
from .model import InitialModel, build_model, set_trainable_parameters
from .options import FinetuneOptions
from .reporter import Reporter
from .teacher import Teacher, load_teacher, measure
from .training_setup import TrainingSetup, build_pass_arguments


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
            **{"augment cutmix": (options.augment or {}).get("cutmix", 0)},
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
        arguments = build_pass_arguments(
            options, labels, processor, model.config.num_channels, reporter
        )
        return TrainingSetup(
            model,
            processor,
            build_objective=partial(
                build_objective,
                options,
                teacher=teacher,
                normalize=Normalizer(processor, accelerator.device),
                accelerator=accelerator,
            ),
            build_evaluator=lambda data, images: Evaluator(images, **arguments),
            selection_metric=SELECTION_METRICS[labels.kind],
            pass_arguments=arguments,
            random_parameters=new_parameter_names,
            summary_lines={} if teacher is None else {"teacher": teacher.description},
            results={
                "label_column": list(options.label_column or labels.columns),
                "label_separator": labels.separator,
                # New tokens are trained although `trainable` is "head"
                "steps_train_encoder": any(
                    each.requires_grad for each in model.vitcls.parameters()
                ),
            },
            teacher=teacher,
        )

    def build_frozen_encoder(
        self,
        options: FinetuneOptions,
        initial: InitialModel,
        images: Splits,
        setup: TrainingSetup,
    ) -> tuple[FrozenEncoder | None, str]:
        """Build what fits linear classifiers of frozen features, or say why there is none."""
        model = setup.model
        has_distillation_head = getattr(model, "distillation_classifier", None) is not None
        has_new_pooler = any(name.startswith("vitcls.pooler.") for name in setup.random_parameters)
        reasons = {
            "the initial weights are random": initial.has_random_weights,
            "`probe=False` is set": not options.probe,
            "the distillation head has no features": has_distillation_head
            and not has_searchable_pooling(model.config),
            "the head is an MLP": model.config.head_type != "linear",
            "the pooler has random weights": has_new_pooler,
        }
        for reason, applies in reasons.items():
            if applies:
                return None, reason

        encoder = FrozenEncoder(
            model=model,
            processor=setup.processor,
            label_space=images.label_space,
            build_pass=partial(FrozenPass, **setup.pass_arguments),
            resize=options.resize,
            pooling=options.pooling,
            pooled_layers=options.pooled_layers,
            class_weight="balanced" if options.class_balance == "weights" else None,
        )
        return encoder, ""

    def has_one_label(self, labels: LabelSpace) -> bool:
        """Whether images have one label each, not several or one per task."""
        return labels.kind == "single_label_classification"

    def list_warnings(self, data: TrainingData, group_column: str | None) -> list[str]:
        """List missing classes, and images on both sides."""
        return [*describe_missing_classes(data), *describe_leaks(data, group_column)]

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
    cutmix = float((options.augment or {}).get("cutmix", 0))
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


def check_label_kind(kind: str, **flags: Any) -> None:
    """Raise ValueError for a flag that requires one label per image, if the labels are others."""
    for flag, value in flags.items():
        if value not in (0, None, "none") and kind != "single_label_classification":
            raise ValueError(
                f"`{flag}` requires one label per image, but the labels are {kind}. Remove `{flag}`"
            )
