"""Masked image modelling from options to output folder: images without labels -> an encoder to fine-tune.

    options -> images, model, batch plan -> patches are hidden, and the model fills them in -> model folder

The folder then holds what fine-tuning leaves behind (finetune.py): the encoder with its decoder, which `--model` of
fine-tuning, AutoModel and AutoModelForMaskedImageModeling take, its image processor, card, results and checkpoints.
The CLS token answers nothing here. It learns from being attended to: patches can use it as a place to note things.
"""

import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..configuration_vitcls import ViTCLSConfig
from ..data.augmentation import build_augmentation
from ..data.batches import BatchPlan, Normaliser, TrainingPictures, training_batches
from ..data.held_out import RECORD
from ..data.masking import MaskChooser
from ..data.splits import TrainingData, describe_data, load_unlabelled_data
from ..data.streaming import TrainingStream, training_pictures
from ..files import write_json
from ..hub.card import build_encoder_card
from ..hub.loading import local_copy
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.load_model import check_is_vitcls, is_preset
from ..inference.reconstruction import ReconstructionEvaluator
from ..modeling_vitcls import ViTCLSForMaskedImageModeling
from ..options import ModelOptions, PretrainOptions, as_flags
from .branch_uploads import branch_uploads
from .distributed_state import gather, named_tensors
from .finish import conclude, find_repository, finished_before, write_model, write_output
from .loop import Metrics
from .losses import Batch, MaskedImages
from .model import fit_processor
from .model_report import look_at_saved, may_show_samples, origin_of_run, write_card
from .reporter import shown_metric
from .results import facts_of_run, model_lines, plan_lines
from .runner import Session, dry_run, open_session
from .token_monitor import build_attention_measure


@dataclass
class Run:
    """Everything that a run needs, checked and loaded."""

    options: PretrainOptions
    session: Session
    data: TrainingData
    model: ViTCLSForMaskedImageModeling
    processor: ViTCLSImageProcessor
    choose_masks: MaskChooser
    plan: BatchPlan
    hub_model_id: str | None  # to push to


def prepare(options: PretrainOptions) -> Run:
    """Load images and model and write config.resolved.yaml. What is wrong with the options shows here.

    The run holds the lock of its output folder from now on; `pretrain` releases it.

    Raises:
        ValueError, OSError: in one line, for data or models that cannot be read or do not fit the options.
    """
    check_combinations(options)
    session = open_session(options)
    with session.unlocked_on_error():
        return load_run(session)


def load_run(session: Session) -> Run:
    """Load images and model for a session of pre-training, and claim its output folder."""
    options, accelerator = session.options, session.accelerator
    hub_model_id = find_repository(options, accelerator)
    with accelerator.main_process_first():  # downloads once
        data = load_unlabelled_data(options.data)
        session.check_data(describe_data(data))
        plan = build_plan(options, data, accelerator.num_processes)
        model, processor = build_model(options.model)
    choose_masks = MaskChooser(options.masking, model.config.grid_size)
    if options.training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    session.check_plan(plan)
    session.claim_folder()
    return Run(options, session, data, model, processor, choose_masks, plan, hub_model_id)


def pretrain(run: Run) -> dict[str, Any]:
    """Train, evaluate, and write the output folder; returns what results.json holds.

    Raises:
        RunStopped: see `Session.train`; also for a result that cannot be written or pushed.
    """
    with run.session.lock:
        return train_and_save(run)


def train_and_save(run: Run) -> dict[str, Any]:
    """Do the work of `pretrain` while the output folder is locked."""
    session, model = run.session, run.model
    if session.is_finished:
        return finished_before(session, run.hub_model_id)
    for name, what in summary(run).items():
        session.reporter.say(name, what)
    normalise = Normaliser(run.processor, session.accelerator.device)
    pictures = build_pictures(run)
    metrics = session.train(
        model,
        MaskedImages(normalise, run.choose_masks),
        run.plan,
        partial(build_batches, run, pictures),
        build_evaluator(run),
        build_attention_measure(model, normalise),
        describe_broken=pictures.describe,
        uploads=branch_uploads(session, run.hub_model_id, model, partial(write_model, model, run.processor)),
    )
    results = describe(run) | metrics
    save(run, results)
    conclude(session, headline(metrics), run.hub_model_id)
    return results


def rehearse(options: PretrainOptions) -> None:
    """`--dry-run`: a few steps and one of everything else on a few images, in a folder that is removed again.

    Raises:
        ValueError, OSError, RunStopped: as `prepare` and `pretrain` would.
    """
    started = time.perf_counter()
    with dry_run(options) as short:
        run = prepare(short)
        num_held_out = len(run.data.held_out)
        few = range(min(num_held_out, run.plan.batch_size * run.plan.num_processes))
        run.data = replace(run.data, held_out=run.data.held_out.chosen(few))
        pretrain(run)
    plan = build_plan(options, run.data, run.plan.num_processes)
    run.session.report_rehearsal(started, plan, len(few) / num_held_out, run.hub_model_id)


# Parts ---------------------------------------------------------------------------------------------------------------


def check_combinations(options: PretrainOptions) -> None:
    """Raise ValueError for flags that need labels, that are for models that are trained already, or that leave out
    what is asked for."""
    flags = {
        "--mixup": bool(options.augmentation.mixup),
        "--cutmix": bool(options.augmentation.cutmix),
        "--class-balance": options.training.class_balance != "none",
        "--trainable": options.training.trainable != "full",
        "--eval-benchmark": options.run.eval_benchmark is not None,
    }
    for flag, is_set in flags.items():
        if is_set:
            raise ValueError(f"{flag} is for fine-tuning, and pre-training has no labels: leave it out")
    if options.model.patch_drop_rate:
        raise ValueError("--patch-drop-rate leaves patches out, and pre-training asks about all: leave it out")


def build_model(options: ModelOptions) -> tuple[ViTCLSForMaskedImageModeling, ViTCLSImageProcessor]:
    """A preset with fresh weights, or a checkpoint to train further; what a checkpoint lacks (the mask token, the
    decoder) is fresh.

    Raises:
        ValueError: for values that contradict each other, or a checkpoint of another kind of model.
        OSError: for a checkpoint that cannot be found or read.
    """
    values = options.config_values()
    if is_preset(options.model):
        model = ViTCLSForMaskedImageModeling(ViTCLSConfig.from_preset(options.model, **values))
        processor = ViTCLSImageProcessor()
    else:
        folder = local_copy(options.model)
        check_is_vitcls(options.model, folder)
        model = ViTCLSForMaskedImageModeling.from_pretrained(folder, dtype=torch.float32, **values)
        processor = ViTCLSImageProcessor.from_pretrained(folder)
        if rate := model.config.patch_drop_rate:
            raise ValueError(
                f"{options.model} has a patch_drop_rate of {rate}, and pre-training asks about all patches: "
                "give --patch-drop-rate 0"
            )
    fit_processor(processor, model.config)
    return model, processor


def build_plan(options: PretrainOptions, data: TrainingData, num_processes: int) -> BatchPlan:
    """Which picture comes when."""
    copies = options.augmentation.repeated_augmentation
    return BatchPlan.from_options(data.num_training_images, options.training, num_processes, copies=copies)


def build_pictures(run: Run) -> TrainingPictures | TrainingStream:
    """The training pictures, augmented."""
    processor, config = run.processor, run.model.config
    augmentation = build_augmentation(run.options.augmentation, config.image_height_width, processor.resample)
    to_rgb, seed = bool(processor.do_convert_rgb), run.options.training.seed
    return training_pictures(run.data.train, augmentation, to_rgb, seed, num_channels=config.num_channels)


def build_batches(
    run: Run, pictures: TrainingPictures | TrainingStream, first_step: int
) -> Generator[Batch, None, None]:
    """This process's training batches from a step on."""
    process, num_workers = run.session.accelerator.process_index, run.options.data.num_workers
    return training_batches(pictures, run.plan, process, num_workers, first_step)


def build_evaluator(run: Run) -> ReconstructionEvaluator:
    """Evaluation on the held-out images; what is hidden of them is chosen with them, by `--split-seed`."""
    return ReconstructionEvaluator(
        run.data.held_out.pictures,
        run.processor,
        run.choose_masks,
        mask_seed=run.options.data.split_seed,
        batch_size=run.options.training.batch_size,
        num_workers=run.options.data.num_workers,
        accelerator=run.session.accelerator,
        max_broken_images=run.options.data.max_broken_images,
        warn=run.session.reporter.warn,
        num_channels=run.model.config.num_channels,
    )


# Output --------------------------------------------------------------------------------------------------------------


def save(run: Run, results: dict[str, Any]) -> None:
    """Write model, image processor, card and results; results.json comes last, since it says that all is there."""
    session, folder = run.session, run.session.folder
    weights = gather(named_tensors(run.model), session.accelerator.is_main_process)  # all processes take part

    def write() -> None:
        write_model(run.model, run.processor, folder, weights)
        pictures = look_at_saved(
            folder,
            type(run.model),
            results,
            run.data.held_out,
            run.data.label_space,
            session.accelerator.device,
            run.options.run.report,
            session.reporter.warn,
            session.reporter.track,
            may_show_samples(run.options, run.hub_model_id, session.reporter.warn),
        )
        name, origin = run.hub_model_id or folder.resolve().name, origin_of_run(run.options)
        card = build_encoder_card(name, run.model.config, results, as_flags(run.options), origin, pictures)
        write_card(folder, card, origin, results, run.options.run, session.reporter.warn)
        write_json(folder / "results.json", results)

    write_output(session, write)


def summary(run: Run) -> dict[str, str]:
    """The lines that are printed before training."""
    data, masks = run.data, run.choose_masks
    rows, columns = masks.grid
    number = "a stream of" if data.num_training_images is None else f"{data.num_training_images:,}"
    return {
        "data": f"{data.name}: {number} images to train on, {len(data.held_out):,} held out "
        f"({data.held_out_name}); their labels are not used",
        **model_lines(run.options.model.model, run.model, run.model.config),
        "masks": f"{masks.num_hidden} of {rows} x {columns} patches are hidden, in squares of {masks.block} x "
        f"{masks.block}",
        **plan_lines(run.plan, run.session.accelerator),
    }


def describe(run: Run) -> dict[str, Any]:
    """What results.json says besides metrics."""
    session = run.session
    data = {
        "dataset": run.data.name,
        "split": run.data.held_out_name,
        RECORD: run.data.record.to_dict(),
        "num_training_images": run.data.num_training_images,
        "num_hidden_patches": run.choose_masks.num_hidden,
    }
    return data | facts_of_run(run.plan, run.model, run.model.config, session.accelerator, session.seconds)


def headline(metrics: Metrics) -> str:
    """The result in one line."""
    loss = shown_metric("reconstruction_loss", metrics["reconstruction_loss"])
    return f"{loss} on the hidden patches of {metrics['num_images']:,} held-out images"
