"""Setup of a fine-tuning run: check the options, and load data, model and teacher."""

from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from ..data.batches import BatchPlan
from ..data.held_out import RESULTS_FILE, read_record
from ..data.images import LabelledPictures
from ..data.splits import TrainingData, describe_data, load_training_data
from ..files import read_json
from ..hub.loading import MODEL_FILES, get_model_folder
from ..inference.load_model import is_preset
from ..options import FinetuneOptions
from .finish import check_repository
from .model import BuiltModel, build_model
from .runner import Runner, build_runner
from .teacher import Teacher, check_teacher_views, load_teacher
from .trainable import apply_trainable, uses_patch_dropout


@dataclass
class FinetuneSetup:
    """Checked options and loaded objects of a fine-tuning run."""

    options: FinetuneOptions
    runner: Runner
    data: TrainingData
    built: BuiltModel
    model: nn.Module  # the built model after --trainable is applied
    teacher: Teacher | None
    plan: BatchPlan
    hub_model_id: str | None  # repository to push to


def prepare(options: FinetuneOptions) -> FinetuneSetup:
    """Check the options, load data, model and teacher, and write config.resolved.yaml.

    The setup holds the lock of its output folder; `finetune` releases it.

    Raises:
        ValueError, OSError: if data or models cannot be read or do not fit the options.
    """
    options = add_distillation_token(options)
    check_combinations(options)
    runner = build_runner(options)
    options, accelerator = runner.options, runner.accelerator
    with runner.release_lock_on_error():
        hub_model_id = check_repository(options, accelerator)
        with accelerator.main_process_first():  # downloads once
            data = load_training_data(options.data)
            runner.check_data(describe_data(data))
            check_labels(options, data.label_space.kind)
            plan = build_plan(options, data, accelerator.num_processes)
            built = build_model(options.model, data.label_space)
            teacher = load_distillation_teacher(options, data, built, accelerator)
        model = apply_trainable(
            built.model, options.training.trainable, options.training.lora_rank, built.newly_initialized
        )
        if options.model.patch_drop_rate and not uses_patch_dropout(built.model.vitcls):
            raise ValueError(describe_useless_patch_dropout(options))
        if options.training.gradient_checkpointing:
            built.model.gradient_checkpointing_enable()
        runner.check_plan(plan)
        runner.claim_folder()
        return FinetuneSetup(options, runner, data, built, model, teacher, plan, hub_model_id)


# Checks --------------------------------------------------------------------------------------------------------------


def add_distillation_token(options: FinetuneOptions) -> FinetuneOptions:
    """Set one distillation token if a teacher is given and the number of distillation tokens is not."""
    if options.distillation.teacher is None or options.model.num_distillation_tokens is not None:
        return options
    return replace(options, model=replace(options.model, num_distillation_tokens=1))


def check_combinations(options: FinetuneOptions) -> None:
    """Raise ValueError for contradictory flags, before anything is loaded."""
    training = options.training
    if options.distillation.teacher is not None and not options.model.num_distillation_tokens:
        raise ValueError("--teacher requires a distillation token. Remove --num-distillation-tokens 0")
    if training.trainable != "full" and is_preset(options.model.model):
        raise ValueError(
            f"--trainable {training.trainable} requires a trained checkpoint, but {options.model.model} has random "
            "weights. Set --model to a checkpoint"
        )
    if options.model.patch_drop_rate and training.trainable == "head" and options.distillation.teacher is None:
        raise ValueError(describe_useless_patch_dropout(options))
    if training.feature_views and training.trainable != "head":
        raise ValueError("--feature-views requires --trainable head. Set --trainable head, or remove --feature-views")
    if options.data.streaming and options.distillation.teacher_views:
        raise ValueError(
            "--teacher-views caches the teacher's logits of each image, but a stream has an unknown number of images. "
            "Remove --teacher-views or --streaming"
        )
    if options.data.streaming and training.class_balance != "none":
        raise ValueError(
            "--class-balance requires all labels, but a stream provides them during training. "
            "Remove --class-balance or --streaming"
        )
    check_teacher_views(options.distillation.teacher_views, options.augmentation)


def describe_useless_patch_dropout(options: FinetuneOptions) -> str:
    """Return the error message for --patch-drop-rate with frozen first layers, which process whole images."""
    return (
        f"--patch-drop-rate requires trained first layers, but --trainable {options.training.trainable} freezes them. "
        "Remove one of the two flags"
    )


def check_labels(options: FinetuneOptions, kind: str) -> None:
    """Raise ValueError if a flag that requires one label per image is set for other labels."""
    if kind == "single_label_classification":
        return
    flags = {
        "--mixup": bool(options.augmentation.mixup),
        "--cutmix": bool(options.augmentation.cutmix),
        "--class-balance": options.training.class_balance != "none",
        "--teacher": options.distillation.teacher is not None,
    }
    for flag, is_set in flags.items():
        if is_set:
            raise ValueError(f"{flag} requires one label per image, but the data set is {kind}. Remove {flag}")


def describe_other_split(source: str, data: TrainingData) -> str | None:
    """Return a warning if the initial model was trained on images of this data set that are held out now.

    Args:
        source: value of `--model`.
        data: data of this run.

    Raises:
        ValueError, OSError: if the model cannot be found, or its results.json is damaged.
    """
    if is_preset(source) or data.record.part is None:
        return None
    folder = get_model_folder(source, [*MODEL_FILES, RESULTS_FILE])
    record, part = read_record(folder), data.record.part
    if record is None or record.part is None or read_json(Path(folder, RESULTS_FILE)).get("dataset") != data.name:
        return None
    if part.seed == record.part.seed and part.fraction <= record.part.fraction:
        return None
    return (
        f"{source} was trained on {data.name} with other images held out, so it may have been trained on images that "
        f"this run evaluates. Set --split-seed {record.part.seed} --held-out-fraction {record.part.fraction}"
    )


# Loading -------------------------------------------------------------------------------------------------------------


def build_plan(options: FinetuneOptions, data: TrainingData, num_processes: int) -> BatchPlan:
    """Build the batch plan, which determines the order of the training images."""
    labels = data.train.labels if isinstance(data.train, LabelledPictures) else None
    copies = options.augmentation.repeated_augmentation
    return BatchPlan.from_options(data.num_training_images, options.training, num_processes, labels, copies)


def load_distillation_teacher(
    options: FinetuneOptions, data: TrainingData, built: BuiltModel, accelerator: Accelerator
) -> Teacher | None:
    """Load the teacher of `--teacher`, or return None."""
    if options.distillation.teacher is None:
        return None
    config = built.model.config
    return load_teacher(
        options.distillation.teacher,
        data.label_space,
        config.num_channels,
        config.image_height_width,
        accelerator.device,
    )
