"""What a fine-tuning run hands to its session: what is trained, on which batches, with which loss.

whole_model    the model learns from pixels; with --teacher, its distillation token from a teacher
heads_alone    linear probing: the encoder sees each picture once, and the heads learn from what it made of them
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import DistributedType
from torch import nn

from ..data.augmentation import BatchMixer, build_augmentation
from ..data.batches import Normaliser, TrainingPictures, training_batches
from ..data.images import LabelledPictures
from ..data.ordering import class_weights
from ..data.streaming import TrainingStream, training_pictures
from ..inference.evaluator import Evaluator
from ..options import AugmentationOptions
from .linear_probe import build_head_only, cache_features, feature_batches, probe_evaluator, trained_outside_heads
from .loop import Metrics
from .losses import (
    Batch,
    Classification,
    Distillation,
    LabelLoss,
    MultiLabelLoss,
    MultiTaskLoss,
    Objective,
    PixelInputs,
    SingleLabelLoss,
    feature_inputs,
)
from .setup import Run
from .teacher import TeacherCache
from .token_monitor import build_attention_measure, nothing


AS_IT_IS = AugmentationOptions(crop_scale=1.0, flip=False)


@dataclass
class Parts:
    """What the session needs."""

    model: nn.Module
    objective: Objective
    batches: Callable[[int], Generator[Batch, None, None]]  # from a step on
    evaluate: Callable[[nn.Module], Metrics]
    measure_attention: Callable[[Batch], Metrics]
    describe_broken: Callable[[int], str]


def build_parts(run: Run, evaluator: Evaluator) -> Parts:
    """Those of the whole model, unless `--trainable head` can be done with its heads alone."""
    if run.options.training.trainable != "head":
        return whole_model(run, evaluator)
    if reason := why_not_heads_alone(run):
        run.session.reporter.say("features", f"computed anew in each step, since {reason}")
        return whole_model(run, evaluator)
    return heads_alone(run, evaluator)


def whole_model(run: Run, evaluator: Evaluator) -> Parts:
    """The model learns from pixels."""
    accelerator, model = run.session.accelerator, run.built.model
    normalise = Normaliser(run.built.processor, accelerator.device)
    pictures = build_pictures(run, run.options.augmentation, run.options.distillation.teacher_views)

    def batches(first_step: int) -> Generator[Batch, None, None]:
        workers = run.options.data.num_workers
        return training_batches(pictures, run.plan, accelerator.process_index, workers, first_step)

    return Parts(
        run.model,
        build_objective(run, normalise),
        batches,
        evaluator,
        build_attention_measure(model, normalise),
        pictures.describe,
    )


def heads_alone(run: Run, evaluator: Evaluator) -> Parts:
    """The heads learn from features that were computed once."""
    accelerator, options = run.session.accelerator, run.options
    model = run.built.model.to(accelerator.device)
    views = max(options.training.feature_views, 1)
    pictures = build_pictures(run, options.augmentation if options.training.feature_views else AS_IT_IS, views)
    assert isinstance(pictures, TrainingPictures), "a stream has no known pictures"
    keys = [(view, index) for view in range(views) for index in range(run.data.num_training_images or 0)]
    as_they_are = "" if options.training.feature_views else ", as they are (--feature-views N augments them)"
    run.session.reporter.say("features", f"encoding {len(keys):,} images once{as_they_are}; then only the heads run")
    normalise = Normaliser(run.built.processor, accelerator.device)
    workers, batch_size = options.data.num_workers, options.training.batch_size
    cached = cache_features(model, pictures, keys, normalise, batch_size, workers, accelerator)

    def batches(first_step: int) -> Generator[Batch, None, None]:
        return feature_batches(cached, run.plan, accelerator.process_index, views, first_step)

    objective = Classification(feature_inputs, build_label_loss(run))
    evaluate = probe_evaluator(evaluator, model)
    return Parts(build_head_only(model), objective, batches, evaluate, nothing, pictures.describe)


def why_not_heads_alone(run: Run) -> str | None:
    """What linear probing needs the encoder for in each step; None where features can be computed once."""
    augmentation = run.options.augmentation
    if run.teacher is not None:
        return "the teacher sees new pictures"
    if run.data.num_training_images is None:
        return "a stream is not kept"
    if augmentation.mixup or augmentation.cutmix:
        return "pictures are mixed"
    if run.session.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return "the model is in shards"
    trained = trained_outside_heads(run.built.model)
    return f"{trained[0]} is trained, too" if trained else None


def build_objective(run: Run, normalise: Normaliser) -> Objective:
    """What is minimised."""
    augmentation, distillation = run.options.augmentation, run.options.distillation
    mixes = augmentation.mixup or augmentation.cutmix
    inputs = PixelInputs(normalise, BatchMixer(augmentation, len(run.data.label_space.names)) if mixes else None)
    label_loss = build_label_loss(run)
    if run.teacher is None:
        return Classification(inputs, label_loss)
    return Distillation(
        inputs,
        label_loss,
        partial(teacher_logits, run, build_asking(run)),
        distillation.distillation,
        distillation.distillation_alpha,
        distillation.distillation_tau,
    )


def build_asking(run: Run) -> Callable[[Batch], torch.Tensor]:
    """The teacher, or what it said before."""
    assert run.teacher is not None
    views = run.options.distillation.teacher_views
    if not views:
        return run.teacher.ask
    return TeacherCache(run.teacher, run.data.num_training_images or 0, views, len(run.data.label_space.names)).ask


def teacher_logits(run: Run, ask: Callable[[Batch], torch.Tensor], batch: Batch) -> torch.Tensor:
    """The teacher's answer [B, labels], in the run's precision."""
    with run.session.accelerator.autocast():
        return ask(batch)


def build_label_loss(run: Run) -> LabelLoss:
    """The loss for the data set's kind of labels."""
    smoothing, labels = run.options.training.label_smoothing, run.data.label_space
    if labels.kind == "multi_task":
        return MultiTaskLoss(smoothing)
    if labels.kind == "multi_label_classification":
        return MultiLabelLoss(smoothing)
    weights = None
    if run.options.training.class_balance == "weights" and isinstance(run.data.train, LabelledPictures):
        weights = class_weights(run.data.train.labels, len(labels.names)).to(run.session.accelerator.device)
    return SingleLabelLoss(smoothing, weights)


def build_pictures(run: Run, options: AugmentationOptions, views: int) -> TrainingPictures | TrainingStream:
    """The training pictures, augmented; after `views` views of a picture they recur, 0: never."""
    processor = run.built.processor
    config = run.built.model.config
    augmentation = build_augmentation(options, config.image_height_width, processor.resample)
    to_rgb, seed = bool(processor.do_convert_rgb), run.options.training.seed
    return training_pictures(run.data.train, augmentation, to_rgb, seed, views, config.num_channels)
