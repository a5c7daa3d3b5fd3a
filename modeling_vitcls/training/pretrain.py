"""Pre-training by masked image modeling, on images without labels. task.py implements the complete run.

    images with masked patches -> encoder and decoder -> reconstruction of the masked patches

The output folder contains the same files as after fine-tuning (finetune.py). The saved model contains the encoder and
the decoder, and can be loaded with AutoModel, AutoModelForMaskedImageModeling, or the flag `--model` of fine-tuning.
No loss is computed on the CLS token, which is trained only through the patches that attend to the CLS token.
"""

from typing import Any

import torch

from ..configuration_vitcls import ViTCLSConfig
from ..conversion.any_checkpoint import resolve_checkpoint
from ..data.augmentation import MaskGenerator
from ..data.batches import Normalizer
from ..data.fit import set_fit
from ..data.images import LabeledImages
from ..data.splits import TrainingData, load_training_data
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.evaluator import Evaluator, ReconstructionEvaluator
from ..inference.load_model import is_preset, load_processor
from ..modeling_vitcls import ViTCLSForMaskedImageModeling
from ..options import ModelOptions, PretrainOptions
from .loop import Metrics
from .losses import MaskedImageModelingObjective, Objective
from .task import NO_EVALUATION_TEXT, Task, format_metrics


class PretrainTask(Task):
    """Pre-training of an encoder by masked image modeling."""

    options: PretrainOptions
    mask_generator: MaskGenerator  # set by `load_model`
    selection_metric = "reconstruction_loss"

    @staticmethod
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
                raise ValueError(
                    f"{flag} is supported only in fine-tuning, but this is a pre-training run. Remove {flag}"
                )
        if options.model.patch_drop_rate:
            raise ValueError(
                "--patch-drop-rate drops patches, but pre-training requires all patches. Remove --patch-drop-rate"
            )
        return options

    def load_data(self) -> TrainingData:
        return load_training_data(self.options.data, self.options.training.select == "best", use_labels=False)

    def load_model(self) -> None:
        self.model, self.processor = build_pretraining_model(self.options.model)
        self.mask_generator = MaskGenerator(self.options.masking, self.model.config.grid_size)

    def build_objective(self, normalize: Normalizer) -> Objective:
        return MaskedImageModelingObjective(normalize, self.mask_generator)

    def build_evaluator(self, images: LabeledImages) -> Evaluator:
        return ReconstructionEvaluator(
            images.images,
            self.processor,
            self.mask_generator,
            mask_seed=self.options.data.split_seed,
            **self.get_evaluator_arguments(),
        )

    def describe_labels(self) -> str:
        return "labels are not used"

    def get_summary_lines(self) -> dict[str, str]:
        generator = self.mask_generator
        rows, columns = generator.grid_size
        return {
            "masks": f"{generator.num_masked} of {rows} x {columns} patches are masked, in squares of "
            f"{generator.block_size} x {generator.block_size} patches"
        }

    def get_task_results(self) -> dict[str, Any]:
        return {"num_hidden_patches": self.mask_generator.num_masked}

    def format_result(self, metrics: Metrics) -> str:
        text = format_metrics(metrics, self.selection_metric)
        if not text:
            return NO_EVALUATION_TEXT
        return f"{text} on the masked patches of {metrics['num_images']:,} held-out images"


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
