"""Components of a fine-tuning run: the trained module, its batches, loss and evaluator.

build_full_components    trains the model on pixels; with --teacher, the distillation token learns from the teacher
build_head_components    linear probing: encodes each image once, then trains only the heads on the cached features
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
from .linear_probe import (
    build_head_only,
    build_probe_evaluator,
    cache_features,
    find_trained_outside_heads,
    iterate_feature_batches,
)
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
    get_feature_inputs,
)
from .setup import FinetuneSetup
from .teacher import TeacherCache
from .token_monitor import build_attention_measure, measure_nothing


NO_AUGMENTATION = AugmentationOptions(crop_scale=1.0, flip=False)


@dataclass
class Components:
    """Arguments of `Runner.train`."""

    model: nn.Module
    objective: Objective
    batches: Callable[[int], Generator[Batch, None, None]]  # first step to batches
    evaluate: Callable[[nn.Module], Metrics]
    measure_attention: Callable[[Batch], Metrics]
    describe_unreadable: Callable[[int], str]


def build_components(setup: FinetuneSetup, evaluator: Evaluator) -> Components:
    """Build the components of linear probing on cached features if possible, or of the full model."""
    if setup.options.training.trainable != "head":
        return build_full_components(setup, evaluator)
    if reason := find_caching_obstacle(setup):
        setup.runner.reporter.print_line("features", f"computed in every step, because {reason}")
        return build_full_components(setup, evaluator)
    return build_head_components(setup, evaluator)


def build_full_components(setup: FinetuneSetup, evaluator: Evaluator) -> Components:
    """Build the components that train the model on pixels."""
    accelerator, model = setup.runner.accelerator, setup.built.model
    normalize = Normaliser(setup.built.processor, accelerator.device)
    images = build_training_images(setup, setup.options.augmentation, setup.options.distillation.teacher_views)

    def batches(first_step: int) -> Generator[Batch, None, None]:
        workers = setup.options.data.num_workers
        return training_batches(images, setup.plan, accelerator.process_index, workers, first_step)

    return Components(
        setup.model,
        build_objective(setup, normalize),
        batches,
        evaluator,
        build_attention_measure(model, normalize),
        images.describe,
    )


def build_head_components(setup: FinetuneSetup, evaluator: Evaluator) -> Components:
    """Build the components that train the heads on features that are computed once."""
    accelerator, options = setup.runner.accelerator, setup.options
    model = setup.built.model.to(accelerator.device)
    views = max(options.training.feature_views, 1)
    images = build_training_images(
        setup, options.augmentation if options.training.feature_views else NO_AUGMENTATION, views
    )
    assert isinstance(images, TrainingPictures), "streams cannot be cached"
    keys = [(view, index) for view in range(views) for index in range(setup.data.num_training_images or 0)]
    unaugmented = "" if options.training.feature_views else " without augmentation (--feature-views N augments them)"
    setup.runner.reporter.print_line(
        "features", f"encoding {len(keys):,} images once{unaugmented}; then only the heads are trained"
    )
    normalize = Normaliser(setup.built.processor, accelerator.device)
    workers, batch_size = options.data.num_workers, options.training.batch_size
    cached = cache_features(model, images, keys, normalize, batch_size, workers, accelerator)

    def batches(first_step: int) -> Generator[Batch, None, None]:
        return iterate_feature_batches(cached, setup.plan, accelerator.process_index, views, first_step)

    objective = Classification(get_feature_inputs, build_label_loss(setup))
    evaluate = build_probe_evaluator(evaluator, model)
    return Components(build_head_only(model), objective, batches, evaluate, measure_nothing, images.describe)


def find_caching_obstacle(setup: FinetuneSetup) -> str | None:
    """Return why linear probing must run the encoder in every step, or None if features can be cached."""
    augmentation = setup.options.augmentation
    if setup.teacher is not None:
        return "the teacher requires images"
    if setup.data.num_training_images is None:
        return "a stream is not cached"
    if augmentation.mixup or augmentation.cutmix:
        return "images are mixed"
    if setup.runner.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return "the model is sharded"
    trained = find_trained_outside_heads(setup.built.model)
    return f"{trained[0]} is trained" if trained else None


def build_objective(setup: FinetuneSetup, normalize: Normaliser) -> Objective:
    """Build the training objective."""
    augmentation, distillation = setup.options.augmentation, setup.options.distillation
    mixes = augmentation.mixup or augmentation.cutmix
    inputs = PixelInputs(normalize, BatchMixer(augmentation, len(setup.data.label_space.names)) if mixes else None)
    label_loss = build_label_loss(setup)
    if setup.teacher is None:
        return Classification(inputs, label_loss)
    return Distillation(
        inputs,
        label_loss,
        partial(compute_teacher_logits, setup, build_teacher_function(setup)),
        distillation.distillation,
        distillation.distillation_alpha,
        distillation.distillation_tau,
    )


def build_teacher_function(setup: FinetuneSetup) -> Callable[[Batch], torch.Tensor]:
    """Return the function that predicts the teacher's logits, with a cache for `--teacher-views`."""
    assert setup.teacher is not None
    views = setup.options.distillation.teacher_views
    if not views:
        return setup.teacher.predict
    return TeacherCache(
        setup.teacher, setup.data.num_training_images or 0, views, len(setup.data.label_space.names)
    ).predict


def compute_teacher_logits(
    setup: FinetuneSetup, predict: Callable[[Batch], torch.Tensor], batch: Batch
) -> torch.Tensor:
    """Return the teacher's logits [B, labels], computed in the run's precision."""
    with setup.runner.accelerator.autocast():
        return predict(batch)


def build_label_loss(setup: FinetuneSetup) -> LabelLoss:
    """Build the loss for the data set's kind of labels."""
    smoothing, labels = setup.options.training.label_smoothing, setup.data.label_space
    if labels.kind == "multi_task":
        return MultiTaskLoss(smoothing)
    if labels.kind == "multi_label_classification":
        return MultiLabelLoss(smoothing)
    weights = None
    if setup.options.training.class_balance == "weights" and isinstance(setup.data.train, LabelledPictures):
        weights = class_weights(setup.data.train.labels, len(labels.names)).to(setup.runner.accelerator.device)
    return SingleLabelLoss(smoothing, weights)


def build_training_images(
    setup: FinetuneSetup, options: AugmentationOptions, views: int
) -> TrainingPictures | TrainingStream:
    """Build the augmented training images.

    Args:
        views: number of different views of an image; 0 augments each image anew in every epoch.
    """
    processor = setup.built.processor
    config = setup.built.model.config
    augmentation = build_augmentation(options, config.image_height_width, processor.resample)
    to_rgb, seed = bool(processor.do_convert_rgb), setup.options.training.seed
    return training_pictures(setup.data.train, augmentation, to_rgb, seed, views, config.num_channels)
