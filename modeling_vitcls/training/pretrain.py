"""Pre-training by masked image modeling, on images without labels. run.py implements the complete run.

    images with masked patches -> encoder and decoder -> reconstruction of the masked patches

The output folder contains the same files as after fine-tuning (finetune.py). The saved model contains the encoder and
the decoder, and can be loaded with AutoModel, AutoModelForMaskedImageModeling, or the flag `--model` of fine-tuning.
No loss is computed on the CLS token, which is trained only through the patches that attend to the CLS token.
"""

import torch

from ..configuration_vitcls import ViTCLSConfig
from ..conversion.any_checkpoint import resolve_checkpoint
from ..data.augmentation import MaskGenerator
from ..data.batches import Normalizer
from ..data.fit import set_fit
from ..data.splits import TrainingData, load_training_data
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.evaluator import ReconstructionEvaluator
from ..inference.load_model import is_preset, load_processor
from ..modeling_vitcls import ViTCLSForMaskedImageModeling
from ..options import ModelOptions, PretrainOptions
from .losses import MaskedImageModelingObjective
from .reporter import Reporter
from .task import Task, get_evaluator_arguments


def check_options(options: PretrainOptions) -> PretrainOptions:
    """Return the options. Raise ValueError if a flag requires labels or a trained model, or drops patches."""
    flags = {
        "--mixup": bool(options.augmentation.mixup),
        "--cutmix": bool(options.augmentation.cutmix),
        "--class-balance": options.training.class_balance != "none",
        "--trainable": options.training.trainable != "full",
        "--eval-benchmark": options.run.eval_benchmark is not None,
    }
    for flag, is_set in flags.items():
        if is_set:
            raise ValueError(f"{flag} is supported only in fine-tuning, but this is a pre-training run. Remove {flag}")
    if options.model.patch_drop_rate:
        raise ValueError(
            "--patch-drop-rate drops patches, but pre-training requires all patches. Remove --patch-drop-rate"
        )
    return options


def load_data(options: PretrainOptions) -> TrainingData:
    """Load the training images and the held-out images, without labels."""
    should_select = options.training.select == "best" or (
        options.training.select is None and options.training.patience is not None
    )
    return load_training_data(options.data, should_select, use_labels=False)


def build_task(options: PretrainOptions, data: TrainingData, reporter: Reporter) -> Task:
    """Load the model, and build loss and evaluation."""
    model, processor = build_pretraining_model(options.model)
    masks = MaskGenerator(options.masking, model.config.grid_size)
    rows, columns = masks.grid_size
    arguments = get_evaluator_arguments(options, model, reporter)
    arguments |= {"processor": processor, "mask_generator": masks, "mask_seed": options.data.split_seed}
    return Task(
        model,
        processor,
        MaskedImageModelingObjective(Normalizer(processor, reporter.accelerator.device), masks),
        build_evaluator=lambda images: ReconstructionEvaluator(images.images, **arguments),
        selection_metric="reconstruction_loss",
        result_metrics=("reconstruction_loss",),
        evaluated_text="the masked patches of {num_images:,} held-out images",
        labels_text="labels are not used",
        summary_lines={
            "masks": f"{masks.num_masked} of {rows} x {columns} patches are masked, in squares of "
            f"{masks.block_size} x {masks.block_size} patches"
        },
        results={"num_hidden_patches": masks.num_masked},
    )


def build_pretraining_model(options: ModelOptions) -> tuple[ViTCLSForMaskedImageModeling, ViTCLSImageProcessor]:
    """Build a preset with random weights, or load a checkpoint. Parameters that are missing from the checkpoint, such
    as the mask token and the decoder, are initialized randomly."""
    config_values = options.get_config_values()
    if is_preset(options.model):
        model = ViTCLSForMaskedImageModeling(ViTCLSConfig.from_preset(options.model, **config_values))
        processor = ViTCLSImageProcessor()
    else:
        folder = resolve_checkpoint(options.model)
        model = ViTCLSForMaskedImageModeling.from_pretrained(folder, dtype=torch.float32, **config_values)
        processor = load_processor(options.model, folder)
        if rate := model.config.patch_drop_rate:
            raise ValueError(
                f"{options.model} has a patch_drop_rate of {rate}, but pre-training requires all patches. "
                "Set --patch-drop-rate 0"
            )
    set_fit(processor, options.fit, model.config.image_height_width)
    return model, processor
