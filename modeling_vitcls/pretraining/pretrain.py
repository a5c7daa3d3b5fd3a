"""Pre-training on images without labels, with LeJEPA (lejepa.py).

run.py implements the complete run.

    images -> encoder -> projector -> loss
    held-out images -> encoder -> features -> accuracy of k-NN, or effective rank of the features without labels

The saved model is the encoder; the projector is only in checkpoints/. The features are measured before
and after training.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from ..data.batches import Normalizer
from ..data.images import LabeledImages
from ..data.labels import LabelSpace
from ..data.sources import Splits
from ..data.splits import TrainingData, load_undivided_images
from ..inference.image_pass import ImagePass
from ..inference.intervals import compute_proportion_interval
from ..inference.metrics import NOTHING_MEASURED, MetricValues
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import ViTCLSModel
from ..speed.lean_layers import use_fast_modules
from ..training.losses import Objective
from ..training.model import InitialModel, finish_loading
from ..training.options import PretrainOptions
from ..training.reporter import Reporter
from ..training.training_setup import TrainingSetup, build_pass_arguments
from .lejepa import NUM_GLOBAL, LeJEPA, compute_lejepa_losses


MAX_NEIGHBORS = 10_000  # Maximum number of training images for k-NN
# Effective rank below which the features have collapsed, as a fraction of the highest possible rank
MIN_RANK = 0.02


class PreTraining:
    """The recipe of `vitcls pretrain`: see `Recipe` in training_setup.py."""

    def load_images(self, options: PretrainOptions, initial: InitialModel) -> Splits:
        """Read the keys of the images, and the labels if the dataset has any."""
        reads_all = options.select == "best"
        try:
            return load_undivided_images(options, reads_all)
        except ValueError:  # No labels, or another problem, which the next call reports
            return load_undivided_images(options, reads_all, use_labels=False)

    def build_setup(
        self,
        options: PretrainOptions,
        initial: InitialModel,
        images: Splits,
        reporter: Reporter,
    ) -> TrainingSetup:
        """Load the model, and build loss and evaluation."""
        encoder, processor = build_encoder(
            initial, options.get_config_values(), options.resize, options.bit_depth
        )
        config = encoder.config
        device = reporter.accelerator.device
        normalize = Normalizer(processor, device)
        method = LeJEPA(encoder, options.projector_width)
        use_fast_modules(method)
        objective: Objective = partial(
            compute_lejepa_losses,
            normalize=normalize,
            patch_size=config.patch_height_width,
            num_local=options.local_crops,
        )
        summary = f"LeJEPA: {NUM_GLOBAL} global and {options.local_crops} local crops per image"

        labels = images.label_space
        has_labels = labels.kind == "single_label_classification" and bool(labels.columns)
        arguments = build_pass_arguments(options, labels, processor, config.num_channels, reporter)

        def build_evaluator(
            data: TrainingData, images: LabeledImages
        ) -> Callable[[Any], MetricValues]:
            neighbors = None
            if has_labels:
                drawn = data.train.draw(MAX_NEIGHBORS)
                neighbors = ImagePass(drawn, **arguments)
            return partial(
                measure_features,
                held_out=ImagePass(images, **arguments),
                neighbors=neighbors,
                warn=reporter.warn,
            )

        selection_metric = "knn_accuracy" if has_labels else "effective_rank"
        return TrainingSetup(
            method,
            method.vitcls,  # The projector stays in the checkpoints
            processor,
            build_objective=lambda data: objective,
            build_evaluator=build_evaluator,
            selection_metric=selection_metric,
            pass_arguments=arguments,
            random_parameters={
                name for name, _ in method.named_parameters() if not name.startswith("vitcls.")
            },
            summary_lines={"method": summary},
            results={"method": "lejepa"},
        )

    def build_frozen_encoder(
        self, options: PretrainOptions, initial: InitialModel, images: Splits, setup: TrainingSetup
    ) -> tuple[None, str]:
        """Build none: there are no heads to fit."""
        return None, "pre-training"

    def has_one_label(self, labels: LabelSpace) -> bool:
        """Whether the encoder predicts labels, which it never does, whatever the dataset has."""
        return False

    def list_warnings(self, data: TrainingData, group_column: str | None) -> list[str]:
        """Find nothing: images without labels may be anything."""
        return []

    def measure_start(
        self, setup: TrainingSetup, held_out: Callable[[Any], MetricValues]
    ) -> dict[str, Any]:
        """Measure the encoder: it has no accuracy of its own, and its result is the difference."""
        return {"before_steps": held_out(setup.model.to(PartialState().device).eval())}


# Quality of the features --------------------------------------------------------------------------


def compute_features(model: Any, method: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Compute the trained token and the mean of the patches of images: [B, token + D].

    The images are [B, C, H, W].

    The trained token is the CLS token, or the mean of the patches without CLS token. `model` is the
    method, which may be wrapped.
    """
    layout = method.config.token_layout
    states = model(pixel_values).last_hidden_state
    patches = states[:, layout.patches].mean(dim=1)
    token = states[:, layout.cls.start] if layout.cls.start < layout.cls.stop else patches
    return torch.cat([token, patches], dim=1)


def measure_features(
    model: Any,
    held_out: ImagePass,
    neighbors: ImagePass | None,
    warn: Callable[[str], None],
) -> MetricValues:
    """Measure frozen features: the accuracy of k-NN on held-out images, and their effective rank.

    All processes must call this function.

    Args:
        model: the method, wrapped or not.
        held_out: images to measure.
        neighbors: labeled training images; None without labels.
        warn: is called if the features have collapsed.
    """
    if not len(held_out.images):
        return NOTHING_MEASURED
    method = held_out.accelerator.unwrap_model(model)
    compute = partial(compute_features, model, method)
    measured = held_out.collect(model, compute)
    features = measured.values  # [images, token + D]
    counts = {
        "num_images": len(features),
        "num_unreadable_images": held_out.num_unreadable,
    }
    patch_width = method.config.hidden_size
    parts = {"": np.s_[:, :-patch_width], "_of_patches": np.s_[:, -patch_width:]}

    metrics: MetricValues = {}
    if neighbors is not None:
        from sklearn.neighbors import KNeighborsClassifier

        train = neighbors.collect(model, compute)
        num_neighbors = min(10, len(train.labels))
        classifier = KNeighborsClassifier(num_neighbors, weights="distance", metric="cosine")
        for suffix, part in parts.items():
            classifier.fit(train.values[part], train.labels)
            accuracy = classifier.score(features[part], measured.labels)
            metrics[f"knn_accuracy{suffix}"] = round(float(accuracy), 6)
            metrics[f"knn_accuracy{suffix}_interval"] = compute_proportion_interval(
                round(accuracy * len(features)), len(features)
            )

    rank = compute_effective_rank(features[parts[""]])
    width = features.shape[-1] - patch_width
    max_rank = min(width, len(features) - 1)  # The rank of centered features
    if rank < max(MIN_RANK * max_rank, 1.5):
        warn(
            f"the features have collapsed: their effective rank is {rank:.1f} of {width} "
            "channels, so images have nearly the same features. Set a lower `learning_rate`"
        )
    return metrics | {"effective_rank": round(rank, 2)} | counts


def compute_effective_rank(features: np.ndarray) -> float:
    """Measure in how many directions features [images, D] differ: their effective rank, 1 to D.

    It is the exponential of the entropy of the singular values of the centered features.

    Source: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    total = values.sum()
    if total <= 1e-7 * np.abs(features).max() * len(features):
        return 1.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


# Models -------------------------------------------------------------------------------------------


def build_encoder(
    initial: InitialModel,
    config_values: dict[str, Any],
    resize: str | None = None,
    bit_depth: int | None = None,
) -> tuple[ViTCLSModel, ViTCLSImageProcessor]:
    """Build the encoder from a preset or a checkpoint; the other arguments as in `build_model`."""
    if initial.folder is None:
        encoder = ViTCLSModel(ViTCLSConfig.from_preset(initial.name, **config_values))
        processor = ViTCLSImageProcessor()
    else:
        encoder, _ = initial.folder.load_partly(
            ViTCLSModel,
            dtype=torch.float32,
            **config_values,
        )
        processor = initial.folder.load_processor()

    finish_loading(encoder, processor, resize, bit_depth)
    return encoder, processor
