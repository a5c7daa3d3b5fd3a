"""A fine-tuning run before it starts: its options checked, everything it needs loaded."""

from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from ..data.batches import BatchPlan
from ..data.held_out import RESULTS_FILE, read_record
from ..data.images import LabelledPictures
from ..data.splits import TrainingData, describe_data, load_training_data
from ..files import read_json
from ..hub.loading import MODEL_FILES, local_copy
from ..inference.load_model import is_preset
from ..options import FinetuneOptions
from .finish import find_repository
from .model import BuiltModel, build_model
from .runner import Session, open_session
from .teacher import Teacher, check_teacher_views, load_teacher
from .trainable import apply_trainable, drops_patches


@dataclass
class Run:
    """Everything that a run needs, checked and loaded."""

    options: FinetuneOptions
    session: Session
    data: TrainingData
    built: BuiltModel
    model: nn.Module  # the built model with what is trained in it
    teacher: Teacher | None
    plan: BatchPlan
    hub_model_id: str | None  # to push to


def prepare(options: FinetuneOptions) -> Run:
    """Load data, model and teacher and write config.resolved.yaml. What is wrong with the options shows here.

    The run holds the lock of its output folder from now on; `finetune` releases it.

    Raises:
        ValueError, OSError: in one line, for data or models that cannot be read or do not fit the options.
    """
    options = with_distillation_token(options)
    check_combinations(options)
    session = open_session(options)
    with session.unlocked_on_error():
        return load_run(session)


def load_run(session: Session) -> Run:
    """Load data, model and teacher for a session of fine-tuning, and claim its output folder."""
    options, accelerator = session.options, session.accelerator
    hub_model_id = find_repository(options, accelerator)
    with accelerator.main_process_first():  # downloads once
        data = load_training_data(options.data)
        session.check_data(describe_data(data))
        check_labels(options, data.label_space.kind)
        plan = build_plan(options, data, accelerator.num_processes)
        built = build_model(options.model, data.label_space)
        teacher = load_distiller(options, data, built, accelerator)
    model = apply_trainable(built.model, options.training.trainable, options.training.lora_rank, built.fresh)
    if options.model.patch_drop_rate and not drops_patches(built.model.vitcls):
        raise ValueError(useless_patch_dropout(options))
    if options.training.gradient_checkpointing:
        built.model.gradient_checkpointing_enable()
    session.check_plan(plan)
    session.claim_folder()
    return Run(options, session, data, built, model, teacher, plan, hub_model_id)


# Checks --------------------------------------------------------------------------------------------------------------


def with_distillation_token(options: FinetuneOptions) -> FinetuneOptions:
    """With a teacher there is one distillation token, unless the flags say how many."""
    if options.distillation.teacher is None or options.model.num_distillation_tokens is not None:
        return options
    return replace(options, model=replace(options.model, num_distillation_tokens=1))


def check_combinations(options: FinetuneOptions) -> None:
    """Raise ValueError for flags that contradict each other, before anything is loaded."""
    training = options.training
    if options.distillation.teacher is not None and not options.model.num_distillation_tokens:
        raise ValueError("--teacher needs a distillation token to teach: leave out --num-distillation-tokens 0")
    if training.trainable != "full" and is_preset(options.model.model):
        raise ValueError(
            f"--trainable {training.trainable} is for a trained checkpoint, and {options.model.model} starts from "
            "random weights: name a checkpoint with --model"
        )
    if options.model.patch_drop_rate and training.trainable == "head" and options.distillation.teacher is None:
        raise ValueError(useless_patch_dropout(options))
    if training.feature_views and training.trainable != "head":
        raise ValueError("--feature-views is for --trainable head: leave one out, or give both")
    if options.data.streaming and options.distillation.teacher_views:
        raise ValueError(
            "--teacher-views keeps an answer for each image, and a stream has no known number: leave one out"
        )
    if options.data.streaming and training.class_balance != "none":
        raise ValueError("--class-balance needs to know all labels, and a stream does not: leave one out")
    check_teacher_views(options.distillation.teacher_views, options.augmentation)


def useless_patch_dropout(options: FinetuneOptions) -> str:
    """What is wrong with --patch-drop-rate where the first layers are frozen: they see whole images."""
    return (
        f"--patch-drop-rate leaves patches out of layers that learn, and --trainable {options.training.trainable} "
        "freezes the first ones: leave one out"
    )


def check_labels(options: FinetuneOptions, kind: str) -> None:
    """Raise ValueError for flags that are for one label per picture, where there are several."""
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
            raise ValueError(f"{flag} is for one label per picture, and the data set is {kind}: leave it out")


def describe_other_split(source: str, data: TrainingData) -> str | None:
    """Return a warning if the starting model was trained on images of this data set that are held out now.

    Args:
        source: `--model`.
        data: the data of this run.

    Raises:
        ValueError, OSError: if the model cannot be found, or its results.json is damaged.
    """
    if is_preset(source) or data.record.part is None:
        return None
    folder = local_copy(source, [*MODEL_FILES, RESULTS_FILE])
    record, part = read_record(folder), data.record.part
    if record is None or record.part is None or read_json(Path(folder, RESULTS_FILE)).get("dataset") != data.name:
        return None
    if part.seed == record.part.seed and part.fraction <= record.part.fraction:
        return None
    return (
        f"{source} was trained on {data.name} with other images held out, so it may have been trained on images that "
        f"this run evaluates. Set --split-seed {record.part.seed} --held-out-fraction {record.part.fraction}"
    )


# Parts ---------------------------------------------------------------------------------------------------------------


def build_plan(options: FinetuneOptions, data: TrainingData, num_processes: int) -> BatchPlan:
    """Which picture comes when."""
    labels = data.train.labels if isinstance(data.train, LabelledPictures) else None
    copies = options.augmentation.repeated_augmentation
    return BatchPlan.from_options(data.num_training_images, options.training, num_processes, labels, copies)


def load_distiller(
    options: FinetuneOptions, data: TrainingData, built: BuiltModel, accelerator: Accelerator
) -> Teacher | None:
    """The teacher of `--teacher`."""
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
