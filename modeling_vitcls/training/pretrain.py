"""Masked image modeling, from options to output folder: images without labels -> an encoder to fine-tune.

    options -> images, model, batch plan -> patches are masked, and the model reconstructs them -> model folder

The folder contains the same files as after fine-tuning (finetune.py). The model is the encoder with its decoder;
`--model` of fine-tuning, AutoModel and AutoModelForMaskedImageModeling load it. The CLS token has no loss of its own.
It is trained through the patches that attend to it.
"""

from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from huggingface_hub import ModelCard

from ..configuration_vitcls import ViTCLSConfig
from ..data.augmentation import build_augmentation
from ..data.batches import BatchPlan, Normaliser, TrainingPictures, training_batches
from ..data.held_out import RECORD
from ..data.masking import MaskChooser
from ..data.splits import TrainingData, describe_data, load_unlabelled_data
from ..data.streaming import TrainingStream, training_pictures
from ..hub.card import build_encoder_card
from ..hub.loading import get_model_folder
from ..hub.provenance import Provenance
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.load_model import check_is_vitcls, is_preset
from ..inference.reconstruction import ReconstructionEvaluator
from ..modeling_vitcls import ViTCLSForMaskedImageModeling
from ..options import ModelOptions, PretrainOptions, as_flags
from .branch_uploads import build_branch_uploads
from .distributed_state import gather, get_named_tensors
from .finish import check_repository, finish_run, push_finished_run, save_output, write_model
from .loop import Metrics
from .losses import Batch, MaskedImages
from .model import fit_processor
from .reporter import format_metric
from .results import describe_batches, describe_model, describe_run
from .runner import Runner, build_runner, execute_dry_run
from .token_monitor import build_attention_measure


@dataclass
class PretrainSetup:
    """Checked options and loaded objects of a pre-training run."""

    options: PretrainOptions
    runner: Runner
    data: TrainingData
    model: ViTCLSForMaskedImageModeling
    processor: ViTCLSImageProcessor
    choose_masks: MaskChooser
    plan: BatchPlan
    hub_model_id: str | None  # repository to push to


def prepare(options: PretrainOptions) -> PretrainSetup:
    """Check the options, load images and model, and write config.resolved.yaml.

    The setup holds the lock of its output folder; `pretrain` releases it.

    Raises:
        ValueError, OSError: if data or models cannot be read or do not fit the options.
    """
    check_combinations(options)
    runner = build_runner(options)
    options, accelerator = runner.options, runner.accelerator
    with runner.release_lock_on_error():
        hub_model_id = check_repository(options, accelerator)
        with accelerator.main_process_first():  # downloads once
            data = load_unlabelled_data(options.data)
            runner.check_data(describe_data(data))
            plan = build_plan(options, data, accelerator.num_processes)
            model, processor = build_model(options.model)
        choose_masks = MaskChooser(options.masking, model.config.grid_size)
        if options.training.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        runner.check_plan(plan)
        runner.claim_folder()
        return PretrainSetup(options, runner, data, model, processor, choose_masks, plan, hub_model_id)


def pretrain(setup: PretrainSetup) -> dict[str, Any]:
    """Train, evaluate and write the output folder; return the content of results.json.

    Raises:
        RunStopped: see `Runner.train`; also if the result cannot be written or pushed.
    """
    with setup.runner.lock:
        return train_and_save(setup)


def train_and_save(setup: PretrainSetup) -> dict[str, Any]:
    """Train, evaluate and write the output folder while it is locked."""
    runner, model = setup.runner, setup.model
    if runner.is_finished:
        return push_finished_run(runner, setup.hub_model_id)
    for name, text in summarize(setup).items():
        runner.reporter.print_line(name, text)
    normalize = Normaliser(setup.processor, runner.accelerator.device)
    images = build_training_images(setup)
    metrics = runner.train(
        model,
        MaskedImages(normalize, setup.choose_masks),
        setup.plan,
        partial(build_batches, setup, images),
        build_evaluator(setup),
        build_attention_measure(model, normalize),
        describe_unreadable=images.describe,
        uploads=build_branch_uploads(runner, setup.hub_model_id, model, partial(write_model, model, setup.processor)),
    )
    results = collect_results(setup) | metrics
    save(setup, results)
    finish_run(runner, format_result(metrics), setup.hub_model_id)
    return results


def dry_run(options: PretrainOptions) -> None:
    """Run a few steps, an evaluation, a checkpoint and saving on a few images, in a temporary folder (`--dry-run`).

    Raises:
        ValueError, OSError, RunStopped: like `prepare` and `pretrain`.
    """
    execute_dry_run(options, prepare, pretrain, build_plan)


# Components ----------------------------------------------------------------------------------------------------------


def check_combinations(options: PretrainOptions) -> None:
    """Raise ValueError for flags that require labels, a trained model or all patches."""
    flags = {
        "--mixup": bool(options.augmentation.mixup),
        "--cutmix": bool(options.augmentation.cutmix),
        "--class-balance": options.training.class_balance != "none",
        "--trainable": options.training.trainable != "full",
        "--eval-benchmark": options.run.eval_benchmark is not None,
    }
    for flag, is_set in flags.items():
        if is_set:
            raise ValueError(f"{flag} is for fine-tuning, but pre-training uses no labels. Remove {flag}")
    if options.model.patch_drop_rate:
        raise ValueError("--patch-drop-rate drops patches, but pre-training requires all. Remove --patch-drop-rate")


def build_model(options: ModelOptions) -> tuple[ViTCLSForMaskedImageModeling, ViTCLSImageProcessor]:
    """Build a model from a preset with random weights, or load a checkpoint. Parameters that a checkpoint lacks (the
    mask token, the decoder) are initialized.

    Raises:
        ValueError: if values contradict each other, or the checkpoint is another kind of model.
        OSError: if the checkpoint cannot be found or read.
    """
    values = options.config_values()
    if is_preset(options.model):
        model = ViTCLSForMaskedImageModeling(ViTCLSConfig.from_preset(options.model, **values))
        processor = ViTCLSImageProcessor()
    else:
        folder = get_model_folder(options.model)
        check_is_vitcls(options.model, folder)
        model = ViTCLSForMaskedImageModeling.from_pretrained(folder, dtype=torch.float32, **values)
        processor = ViTCLSImageProcessor.from_pretrained(folder)
        if rate := model.config.patch_drop_rate:
            raise ValueError(
                f"{options.model} has a patch_drop_rate of {rate}, but pre-training requires all patches. "
                "Set --patch-drop-rate 0"
            )
    fit_processor(processor, model.config)
    return model, processor


def build_plan(options: PretrainOptions, data: TrainingData, num_processes: int) -> BatchPlan:
    """Build the batch plan, which determines the order of the training images."""
    copies = options.augmentation.repeated_augmentation
    return BatchPlan.from_options(data.num_training_images, options.training, num_processes, copies=copies)


def build_training_images(setup: PretrainSetup) -> TrainingPictures | TrainingStream:
    """Build the augmented training images."""
    processor, config = setup.processor, setup.model.config
    augmentation = build_augmentation(setup.options.augmentation, config.image_height_width, processor.resample)
    to_rgb, seed = bool(processor.do_convert_rgb), setup.options.training.seed
    return training_pictures(setup.data.train, augmentation, to_rgb, seed, num_channels=config.num_channels)


def build_batches(
    setup: PretrainSetup, images: TrainingPictures | TrainingStream, first_step: int
) -> Generator[Batch, None, None]:
    """Return this process's training batches from a given step."""
    process, num_workers = setup.runner.accelerator.process_index, setup.options.data.num_workers
    return training_batches(images, setup.plan, process, num_workers, first_step)


def build_evaluator(setup: PretrainSetup) -> ReconstructionEvaluator:
    """Build the evaluator on the held-out images. `--split-seed` determines their masks."""
    return ReconstructionEvaluator(
        setup.data.held_out.pictures,
        setup.processor,
        setup.choose_masks,
        mask_seed=setup.options.data.split_seed,
        batch_size=setup.options.training.batch_size,
        num_workers=setup.options.data.num_workers,
        accelerator=setup.runner.accelerator,
        max_broken_images=setup.options.data.max_broken_images,
        warn=setup.runner.reporter.warn,
        num_channels=setup.model.config.num_channels,
    )


# Output --------------------------------------------------------------------------------------------------------------


def save(setup: PretrainSetup, results: dict[str, Any]) -> None:
    """Write model, image processor, card and results to the output folder."""
    model, options = setup.model, setup.options

    def build(name: str, provenance: Provenance | None, images: dict[str, str]) -> ModelCard:
        return build_encoder_card(name, model.config, results, as_flags(options), provenance, images)

    weights = gather(get_named_tensors(model), setup.runner.accelerator.is_main_process)  # collective
    save_output(setup.runner, model, setup.processor, weights, setup.data, results, setup.hub_model_id, build)


def summarize(setup: PretrainSetup) -> dict[str, str]:
    """Return the lines that are printed before training."""
    data, masks = setup.data, setup.choose_masks
    rows, columns = masks.grid
    number = "a stream of" if data.num_training_images is None else f"{data.num_training_images:,}"
    return {
        "data": f"{data.name}: {number} images to train on, {len(data.held_out):,} held out "
        f"({data.held_out_name}); their labels are not used",
        **describe_model(setup.options.model.model, setup.model, setup.model.config),
        "masks": f"{masks.num_hidden} of {rows} x {columns} patches are masked, in squares of {masks.block} x "
        f"{masks.block}",
        **describe_batches(setup.plan, setup.runner.accelerator),
    }


def collect_results(setup: PretrainSetup) -> dict[str, Any]:
    """Return the content of results.json except the metrics."""
    runner = setup.runner
    data = {
        "dataset": setup.data.name,
        "split": setup.data.held_out_name,
        RECORD: setup.data.record.to_dict(),
        "num_training_images": setup.data.num_training_images,
        "num_hidden_patches": setup.choose_masks.num_hidden,
    }
    return data | describe_run(setup.plan, setup.model, setup.model.config, runner.accelerator, runner.seconds)


def format_result(metrics: Metrics) -> str:
    """Format the result in one line."""
    loss = format_metric("reconstruction_loss", metrics["reconstruction_loss"])
    return f"{loss} on the masked patches of {metrics['num_images']:,} held-out images"
