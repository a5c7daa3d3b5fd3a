"""Fine-tuning on labeled images. task.py implements the complete run.

    full model         trained on pixels; with --teacher, the distillation token is trained on the teacher's logits
    linear probing     heads trained on cached features; the encoder encodes each image once (linear_probe.py)

After the run, the output folder contains:
    config.json, model.safetensors, preprocessor_config.json, *_vitcls.py    files for from_pretrained
    README.md, images/, report.html                                        model card, analysis of the special tokens
    LICENSE*, NOTICE*                                                        license files of the initial model
    results.json, metrics.jsonl                                              final results, metrics of logged steps
    checkpoints/, config.resolved.yaml                                       state for --resume, all flags
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType

from ..conversion.any_checkpoint import resolve_checkpoint
from ..data.augmentation import BatchMixer
from ..data.batches import Batch, Normalizer, TrainingImages
from ..data.held_out import RESULTS_FILE, read_held_out_record
from ..data.images import LabeledImages
from ..data.sampling import compute_class_weights
from ..data.splits import TrainingData, describe_missing_classes, load_training_data
from ..files import read_json
from ..hub.loading import MODEL_FILE_PATTERNS
from ..hub.local_paths import strip_folders
from ..inference.evaluator import Evaluator
from ..inference.load_model import is_preset
from ..inference.metrics import SELECTION_METRICS
from ..options import AugmentationOptions, FinetuneOptions
from . import losses
from .linear_probe import (
    build_classifier_heads,
    build_probe_evaluator,
    cache_features,
    find_trainable_parameters_outside_heads,
    iterate_feature_batches,
)
from .loop import Metrics
from .model import build_model, set_trainable_parameters, uses_patch_dropout
from .runner import TrainingComponents
from .task import NO_EVALUATION_TEXT, EvaluationFunction, Task, format_metrics
from .teacher import Teacher, TeacherCache, load_teacher


MAX_CLASS_RATIO = 10  # ratio of the largest to the smallest class, above which macro F1 is reported in step lines


class FinetuneTask(Task):
    """Fine-tuning of a classifier, optionally with a teacher."""

    options: FinetuneOptions
    teacher: Teacher | None  # set by `load_model`; None if --teacher is not set

    # Options, data and model -----------------------------------------------------------------------------------------

    @staticmethod
    def check_options(options: FinetuneOptions) -> FinetuneOptions:
        """Check and return the options. With a teacher, the default of num_distillation_tokens is 1."""
        if options.distillation.teacher is not None and options.model.num_distillation_tokens is None:
            options = replace(options, model=replace(options.model, num_distillation_tokens=1))
        check_flag_combinations(options)
        return options

    def load_data(self) -> TrainingData:
        data = load_training_data(self.options.data, self.options.training.select == "best")
        check_label_kind(self.options, data.label_space.kind)
        self.selection_metric = SELECTION_METRICS[data.label_space.kind]
        return data

    def load_model(self) -> None:
        """Load the model and the teacher, and freeze the parameters that are not trained."""
        options, training_options = self.options, self.options.training
        model, self.processor, new_parameter_names = build_model(options.model, self.data.label_space)
        self.teacher = None
        if options.distillation.teacher is not None:
            self.teacher = load_teacher(
                options.distillation.teacher,
                self.data.label_space,
                model.config.num_channels,
                model.config.image_height_width,
                self.runner.accelerator.device,
            )
        self.model = set_trainable_parameters(
            model, training_options.trainable, training_options.lora_rank, new_parameter_names
        )
        if options.model.patch_drop_rate and not uses_patch_dropout(self.model.vitcls):
            raise ValueError(format_patch_dropout_error(options))

    def find_warnings(self) -> list[str]:
        split_warning = get_split_warning(self.options.model.model, self.data)
        warnings = [*describe_missing_classes(self.data), split_warning, self.describe_imbalance()]
        return [warning for warning in warnings if warning]

    def describe_imbalance(self) -> str | None:
        """Return a warning if the largest class has more than `MAX_CLASS_RATIO` times the images of the smallest."""
        ratio = self.data.class_ratio
        if ratio > MAX_CLASS_RATIO:
            self.runner.reporter.additional_metric = "macro_f1"
        if ratio <= MAX_CLASS_RATIO or self.options.training.class_balance != "none":
            return None
        return (
            f"the largest class has {ratio:.0f} times as many training images as the smallest. The accuracy hardly "
            "depends on small classes: compare macro F1, and set --class-balance weights or sampling"
        )

    # Training --------------------------------------------------------------------------------------------------------

    def build_components(self, evaluator: EvaluationFunction) -> TrainingComponents:
        """Build components that train the heads on cached features if possible, or else the model on pixels."""
        if self.options.training.trainable != "head":
            return super().build_components(evaluator)
        if reason := self.explain_unsupported_caching():
            self.runner.reporter.print_line("features", f"computed in every step, because {reason}")
            return super().build_components(evaluator)
        return self.build_head_components(evaluator)

    def explain_unsupported_caching(self) -> str | None:
        """Return the reason why linear probing must run the encoder in every step, or None if features can be
        cached."""
        augmentation = self.options.augmentation
        if self.teacher is not None:
            return "the teacher requires images"
        if self.data.num_training_images is None:
            return "the dataset is a stream"
        if augmentation.mixup or augmentation.cutmix:
            return "images are mixed"
        if self.runner.accelerator.distributed_type == DistributedType.FSDP:
            return "the model is sharded"
        trainable_names = find_trainable_parameters_outside_heads(self.model)
        return f"{trainable_names[0]} is trained" if trainable_names else None

    def build_head_components(self, evaluator: EvaluationFunction) -> TrainingComponents:
        """Encode the images once and build the components that train the heads on these features."""
        accelerator, options = self.runner.accelerator, self.options
        model = self.model.to(accelerator.device)
        is_augmented, num_views = options.training.feature_views > 0, max(options.training.feature_views, 1)
        augmentation = (
            options.augmentation if is_augmented else AugmentationOptions(crop_scale=1.0, flip=False, shift=0.0)
        )
        images = self.build_training_images(augmentation, num_views)
        assert isinstance(images, TrainingImages), "features of streams cannot be cached"
        keys = [(view, index) for view in range(num_views) for index in range(self.data.num_training_images or 0)]
        augmentation_note = "" if is_augmented else " without augmentation (set --feature-views to augment the images)"
        self.runner.reporter.print_line(
            "features", f"encoding {len(keys):,} images once{augmentation_note}; then only the heads are trained"
        )
        normalize = Normalizer(self.processor, accelerator.device)
        num_workers, batch_size = options.data.num_workers, self.plan.batch_size
        cached_batch = cache_features(model, images, keys, normalize, batch_size, num_workers, accelerator)
        iterate_batches = partial(
            iterate_feature_batches, cached_batch, self.plan, accelerator.process_index, num_views
        )
        objective = losses.ClassificationObjective(losses.add_feature_inputs, self.build_label_loss())
        return TrainingComponents(
            build_classifier_heads(model),
            objective,
            iterate_batches,
            build_probe_evaluator(evaluator, model) if isinstance(evaluator, Evaluator) else evaluator,
            images.describe_unreadable_image,
        )

    def get_num_views(self) -> int:
        """Return the number of views per image for which the teacher's logits are cached (`--teacher-views`)."""
        return self.options.distillation.teacher_views

    def build_objective(self, normalize: Normalizer) -> losses.Objective:
        """Build the label loss, combined with the distillation loss if a teacher is set."""
        augmentation = self.options.augmentation
        mixer = None
        if augmentation.mixup or augmentation.cutmix:
            mixer = BatchMixer(augmentation, len(self.data.label_space.names))
        prepare_batch = losses.PixelTransform(normalize, mixer, self.model.config.num_head_tokens)
        if self.teacher is None:
            return losses.ClassificationObjective(prepare_batch, self.build_label_loss())
        predict = self.teacher.predict
        if num_views := self.get_num_views():
            num_images, num_labels = self.data.num_training_images or 0, len(self.data.label_space.names)
            predict = TeacherCache(self.teacher, num_images, num_views, num_labels).predict

        def compute_teacher_logits(batch: Batch) -> torch.Tensor:
            with self.runner.accelerator.autocast():
                return predict(batch)

        return losses.DistillationObjective(
            prepare_batch, self.build_label_loss(), compute_teacher_logits, self.options.distillation
        )

    def build_label_loss(self) -> losses.LabelLossFunction:
        label_smoothing, labels = self.options.training.label_smoothing, self.data.label_space
        if labels.kind == "multi_task":
            return losses.MultiTaskLoss(label_smoothing)
        if labels.kind == "multi_label_classification":
            return losses.MultiLabelLoss(label_smoothing)
        class_weights = None
        if self.options.training.class_balance == "weights" and isinstance(self.data.train, LabeledImages):
            class_weights = compute_class_weights(self.data.train.labels, len(labels.names))
            class_weights = class_weights.to(self.runner.accelerator.device)
        return losses.SingleLabelLoss(label_smoothing, class_weights)

    # Evaluation and output -------------------------------------------------------------------------------------------

    def build_evaluator(self, images: LabeledImages) -> Evaluator:
        return Evaluator(images, self.processor, self.data.label_space, **self.get_evaluator_arguments())

    def describe_labels(self) -> str:
        labels = self.data.label_space
        class_count_text = " + ".join(f"{len(names)} of {column!r}" for column, names in labels.columns.items())
        return f"classes: {class_count_text}, {labels.kind.replace('_', ' ')}"

    def get_summary_lines(self) -> dict[str, str]:
        return {} if self.teacher is None else {"teacher": self.teacher.description}

    def get_task_results(self) -> dict[str, Any]:
        teacher = self.options.distillation.teacher
        return {
            "teacher": strip_folders(teacher) if teacher else None,
            "label_column": list(self.data.label_space.columns),
            "label_separator": self.options.data.label_separator,
        }

    def format_result(self, metrics: Metrics) -> str:
        text = format_metrics(metrics, self.selection_metric, "cls_accuracy", "distillation_accuracy")
        return f"{text} on {metrics['num_images']:,} held-out images" if text else NO_EVALUATION_TEXT


# Checks --------------------------------------------------------------------------------------------------------------


def check_flag_combinations(options: FinetuneOptions) -> None:
    """Raise ValueError if flags contradict each other. The check runs before data and models are loaded."""
    training_options = options.training
    if options.distillation.teacher is not None and not options.model.num_distillation_tokens:
        raise ValueError(
            "--teacher requires a distillation token, but --num-distillation-tokens is 0. Set "
            "--num-distillation-tokens 1, or remove --teacher"
        )
    if training_options.trainable != "full" and is_preset(options.model.model):
        raise ValueError(
            f"--trainable {training_options.trainable} requires a trained checkpoint, but {options.model.model} has "
            "random weights. Set --model to a checkpoint"
        )
    if options.model.patch_drop_rate and training_options.trainable == "head" and options.distillation.teacher is None:
        raise ValueError(format_patch_dropout_error(options))
    if training_options.feature_views and training_options.trainable != "head":
        raise ValueError(
            f"--feature-views requires --trainable head, but --trainable is {training_options.trainable}. Set "
            "--trainable head, or remove --feature-views"
        )
    if options.data.streaming and options.distillation.teacher_views:
        raise ValueError(
            "--teacher-views caches the teacher's logits for each image, but the number of images in a stream is "
            "unknown. Remove --teacher-views or --streaming"
        )
    if options.data.streaming and training_options.class_balance != "none":
        raise ValueError(
            "--class-balance requires all labels before training, but a stream provides labels only during training. "
            "Remove --class-balance or --streaming"
        )
    for flag in ("mixup", "cutmix"):
        if options.distillation.teacher_views and getattr(options.augmentation, flag):
            raise ValueError(
                f"--teacher-views caches the logits of individual images, but --{flag} mixes images. "
                "Remove one of the two flags"
            )


def format_patch_dropout_error(options: FinetuneOptions) -> str:
    """Return the error message for --patch-drop-rate with frozen embeddings and a frozen first layer."""
    return (
        "--patch-drop-rate requires trainable embeddings or a trainable first layer, but --trainable "
        f"{options.training.trainable} freezes the embeddings and the first layer. Remove one of the two flags"
    )


def check_label_kind(options: FinetuneOptions, kind: str) -> None:
    """Raise ValueError if a flag requires one label per image, but the labels are of another kind."""
    flags = {
        "--mixup": bool(options.augmentation.mixup),
        "--cutmix": bool(options.augmentation.cutmix),
        "--class-balance": options.training.class_balance != "none",
        "--teacher": options.distillation.teacher is not None,
    }
    for flag, is_set in flags.items():
        if is_set and kind != "single_label_classification":
            raise ValueError(
                f"{flag} requires one label per image, but the label kind of the dataset is {kind}. Remove {flag}"
            )


def get_split_warning(source: str, data: TrainingData) -> str | None:
    """Return a warning if the initial model `source` may have been trained on held-out images of this run; otherwise
    return None. Raise ValueError or OSError if the model cannot be found, or if its results.json is damaged."""
    rule = data.record.rule
    if is_preset(source) or rule is None:
        return None
    folder = resolve_checkpoint(source, [*MODEL_FILE_PATTERNS, RESULTS_FILE])
    record = read_held_out_record(folder)
    recorded_rule = None if record is None else record.rule
    if recorded_rule is None or read_json(Path(folder, RESULTS_FILE)).get("dataset") != data.name:
        return None
    is_same_fold = (rule.num_folds, rule.fold) == (recorded_rule.num_folds, recorded_rule.fold)
    if rule.seed == recorded_rule.seed and is_same_fold and rule.fraction <= recorded_rule.fraction:
        return None
    flags_text = f"--folds {recorded_rule.num_folds} --fold {recorded_rule.fold}"
    if recorded_rule.num_folds is None:
        flags_text = f"--held-out-fraction {recorded_rule.fraction}"
    return (
        f"{source} was trained on {data.name} with a different held-out split, so the held-out images of this run may "
        f"include training images of {source}. Use the same split with --split-seed {recorded_rule.seed} {flags_text}"
    )
