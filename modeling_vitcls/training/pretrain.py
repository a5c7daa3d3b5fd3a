"""Pre-training on images without labels: LeJEPA (lejepa.py) or MAE (mae.py). run.py implements the complete run.

    images -> method (encoder, and a projector or a decoder) -> loss
    held-out images -> encoder -> features -> accuracy of k-NN, or effective rank of the features without labels

The saved model is the encoder; the projector and the decoder are only in checkpoints/. The accuracy of k-NN and of
logistic regression on frozen features is measured before and after training.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ..configuration_vitcls import ViTCLSConfig
from ..conversion.any_checkpoint import resolve_checkpoint
from ..data.batches import Normalizer
from ..data.fit import set_fit
from ..data.images import LabeledImages
from ..data.splits import TrainingData, load_training_data
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..inference.evaluator import HeldOutBatch
from ..inference.frozen import FeatureEvaluator, build_classifier
from ..inference.load_model import is_preset, load_processor
from ..modeling_vitcls import ViTCLSModel
from ..options import PretrainOptions
from .lejepa import LeJEPA, LeJEPAObjective
from .losses import Objective
from .mae import MAE, MAEObjective, build_decoder_config, draw_masks
from .reporter import Reporter
from .task import Task, get_evaluator_arguments


MAX_NEIGHBORS = 10_000  # maximum number of training images for k-NN and logistic regression
MIN_RANK = 0.02  # effective rank below which the features have collapsed, as a fraction of their width


def check_options(options: PretrainOptions) -> PretrainOptions:
    """Return the options with the method's defaults. Raise ValueError if a flag requires labels or drops patches."""
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
    if options.method == "lejepa":  # draws its own crops
        augmentation = options.augmentation
        crop_scale, shift = augmentation.crop_scale or 1.0, augmentation.shift or 0.0
        options = replace(options, augmentation=replace(augmentation, crop_scale=crop_scale, shift=shift))
    return options


def load_data(options: PretrainOptions) -> TrainingData:
    """Load the training images and the held-out images, with labels if the dataset has any."""
    should_select = options.training.select == "best" or (
        options.training.select is None and options.training.patience is not None
    )
    try:
        return load_training_data(options.data, should_select)
    except ValueError:  # no labels, or another problem, which the next call reports
        return load_training_data(options.data, should_select, use_labels=False)


def build_task(options: PretrainOptions, data: TrainingData, reporter: Reporter) -> Task:
    """Load the model, and build loss and evaluation."""
    method, processor = build_method(options)
    config, device = method.config, reporter.accelerator.device
    normalize = Normalizer(processor, device)
    rows, columns = config.grid_size
    objective: Objective = LeJEPAObjective(normalize, options.lejepa, config.patch_height_width)
    if options.method == "mae":
        objective = MAEObjective(normalize, rows * columns, options.mae.mask_ratio)
        num_masked = int(draw_masks(1, rows * columns, options.mae.mask_ratio, torch.device("cpu")).sum())
        summary = f"MAE: {num_masked} of {rows} x {columns} patches are masked"
    else:
        summary = (
            f"LeJEPA: {options.lejepa.global_crops} global and {options.lejepa.local_crops} local crops per image"
        )
    has_labels = data.label_space.kind == "single_label_classification" and bool(data.label_space.columns)
    arguments = {"processor": processor, "label_space": data.label_space}
    arguments |= get_evaluator_arguments(options, method, reporter)
    neighbors = None
    if has_labels and isinstance(data.train, LabeledImages):
        order = np.random.default_rng(options.data.split_seed).permutation(len(data.train))
        neighbors = TokenFeatures(data.train.select(sorted(order[:MAX_NEIGHBORS].tolist())), **arguments)

    def build_evaluator(images: LabeledImages, with_regression: bool = False) -> FeatureQuality:
        return FeatureQuality(TokenFeatures(images, **arguments), neighbors, reporter.warn, with_regression)

    return Task(
        method,
        processor,
        objective,
        build_evaluator,
        selection_metric="effective_rank" if neighbors is None else "knn_accuracy",
        result_metrics=("knn_accuracy", "knn_accuracy_of_patches", "effective_rank"),
        evaluated_text="{num_images:,} held-out images",
        labels_text="labels are used only to measure the features" if has_labels else "no labels",
        summary_lines={"method": summary},
        results={"method": options.method},
        encoder=method.vitcls,
        compare=FeatureComparison(partial(build_evaluator, data.held_out, with_regression=True)),
    )


# Quality of the features ---------------------------------------------------------------------------------------------


class TokenFeatures(FeatureEvaluator):
    """Computes two features of each image: its CLS token (or the mean of its patches), and the mean of its patches."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__([], *args, **kwargs)

    def compute_outputs(self, model: torch.nn.Module, batch: HeldOutBatch) -> torch.Tensor:
        """Return the features [G, 2, D] of the G readable images of a batch."""
        layout = self.accelerator.unwrap_model(model).config.token_layout
        with self.accelerator.autocast():
            states = model(self.pad_batch(model, batch.pixel_values)).last_hidden_state
        patches = states[:, layout.patches].mean(dim=1)
        token = states[:, layout.cls.start] if layout.cls.start < layout.cls.stop else patches
        return torch.stack([token, patches], dim=1)[: len(batch.labels)]


@dataclass
class FeatureQuality:
    """Measures frozen features: the accuracy of k-NN on held-out images, and their effective rank.

    `neighbors` computes the features of labeled training images; None without labels.
    """

    held_out: TokenFeatures
    neighbors: TokenFeatures | None
    warn: Callable[[str], None]
    with_regression: bool = False

    def __call__(self, model: Any) -> dict[str, Any]:
        """Return the metrics of a method, wrapped or not. All processes must call this method."""
        held_out = self.held_out(model)
        features, labels = held_out["features"], held_out["labels"]  # [images, 2, D]
        metrics: dict[str, Any] = {}
        if self.neighbors is not None:
            train = self.neighbors(model)
            kinds = {"knn_accuracy": "knn"} | ({"regression_accuracy": "logreg"} if self.with_regression else {})
            for (name, kind), (index, suffix) in itertools.product(kinds.items(), enumerate(("", "_of_patches"))):
                classifier = build_classifier(kind, len(train["labels"]))
                classifier.fit(train["features"][:, index], train["labels"])
                predictions = classifier.predict(features[:, index])
                metrics[name + suffix] = round(float((predictions == labels).mean()), 6)
        rank, width = compute_effective_rank(features[:, 0]), features.shape[-1]
        if rank < max(MIN_RANK * width, 1.5):
            self.warn(
                f"the features have collapsed: their effective rank is {rank:.1f} of {width} channels, so images "
                "have nearly the same features. Set a larger --sigreg-weight or a lower --learning-rate"
            )
        counts = {name: held_out[name] for name in ("num_images", "num_unreadable_images")}
        return metrics | {"effective_rank": round(rank, 2)} | counts


@dataclass
class FeatureComparison:
    """Compares the features before and after pre-training, on the held-out images."""

    build_evaluator: Callable[[], FeatureQuality]
    before: dict[str, Any] = field(default_factory=dict)

    def measure(self, model: Any) -> dict[str, Any]:
        """Return the metrics of k-NN and logistic regression. All processes must call this method."""
        return self.build_evaluator()(model.eval())

    def describe(self, after: dict[str, Any]) -> str:
        """Return a line that compares the metrics with those before training."""
        before, names = self.before, {"knn_accuracy": "k-NN", "regression_accuracy": "logistic regression"}
        texts = [f"{text} {before[name]:.1%} -> {after[name]:.1%}" for name, text in names.items() if name in after]
        if not texts:
            return f"effective rank {before['effective_rank']} -> {after['effective_rank']} (no labels)"
        is_worse = all(after[name] < before[name] for name in names)
        text = f"{', '.join(texts)} on {after['num_images']:,} held-out images, from before to after pre-training"
        return f"{text}. Pre-training made the features worse" if is_worse else text


def compute_effective_rank(features: np.ndarray) -> float:
    """Return the exponential of the entropy of the singular values of centered features [images, D], from 1 to D.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    total = values.sum()
    if total <= 1e-7 * np.abs(features).max() * len(features):
        return 1.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


# Models --------------------------------------------------------------------------------------------------------------


def build_method(options: PretrainOptions) -> tuple[LeJEPA | MAE, ViTCLSImageProcessor]:
    """Build the encoder from a preset or a checkpoint, with a projector or a decoder of random weights."""
    name, config_values = options.model.model, options.model.get_config_values()
    if is_preset(name):
        encoder, processor = ViTCLSModel(ViTCLSConfig.from_preset(name, **config_values)), ViTCLSImageProcessor()
    else:
        folder = resolve_checkpoint(name)
        encoder = ViTCLSModel.from_pretrained(folder, dtype=torch.float32, **config_values)
        processor = load_processor(name, folder)
    config = encoder.config
    if config.patch_drop_rate:
        raise ValueError(
            f"{name} has a patch_drop_rate of {config.patch_drop_rate}, but pre-training requires all patches. "
            "Set --patch-drop-rate 0"
        )
    set_fit(processor, options.model.fit, config.image_height_width)
    if options.method == "mae":
        return MAE(encoder, build_decoder_config(config, options.mae.decoder_layers)), processor
    return LeJEPA(encoder, options.lejepa.projector_width, options.lejepa.projector_features), processor
