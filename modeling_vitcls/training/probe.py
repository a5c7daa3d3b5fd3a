"""Probe of the frozen encoder before fine-tuning: a linear classifier.

    training images -> frozen encoder, once -> choice of geometry, head, layers, tokens -> classifier
    selection and held-out images -> the same encoder, once -> selection, result

The choice is made in inference/linear_probe.py, from features of inference/frozen_features.py.
Fine-tuning then starts from this classifier instead of a random one (linear probing, then
fine-tuning: Kumar et al. 2022, arXiv 2202.10054). With `--select best`, the frozen model takes part
in the selection: fine-tuning must be better than the frozen model by more than chance. If the
frozen model is the result, its classifier is fitted to the training and selection images, and its
temperature comes from the images that each fold leaves out. A run without steps holds out no
images, unless it is asked to: cross-validation measures its result.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import nn

from ..data.aspect_ratio import describe_fit, get_fit, read_sizes, set_fit
from ..data.images import LabeledImages
from ..data.splits import MAX_CLASS_RATIO
from ..inference.evaluator import round_floats
from ..inference.frozen_features import (
    OWN_POOLING,
    FeatureLayout,
    Features,
    FrozenPass,
    concatenate_features,
    ignore_message,
)
from ..inference.image_pass import ImageOutput
from ..inference.linear_probe import (
    MIN_DISTANCE_IMAGES,
    NUM_LAST_LAYERS,
    Candidate,
    LinearProbe,
    describe_candidate,
    is_clearly_worse,
    stack_tokens,
)
from ..model.heads_vitcls import build_pooler
from ..runtime.distributed import run_on_main
from ..runtime.progress import report_work
from .reporter import Reporter


MAX_PROBE_IMAGES = (
    10_000  # maximum number of training images for the probe of a run with steps, drawn at random
)
MAX_CHOICE_IMAGES = 5_000  # maximum number of images for the choice by cross-validation
# images whose features are computed with both geometries: a fraction, at most a number
SQUASHED_FRACTION = 0.4
MAX_SQUASHED_IMAGES = 500
# with fewer images, the accuracy of the frozen model has a standard error of up to 7 points
MIN_SELECTION_IMAGES = 50
FLOPS_OF_STEP = 3  # forward and backward pass of an image, relative to its forward pass
# of two cores with AVX-512; the estimate of a duration is within a factor of 3
CPU_FLOPS_PER_MINUTE = 60 * 150e9
MAX_CPU_FLOPS = 10 * CPU_FLOPS_PER_MINUTE  # of a run on a CPU whose length the user has not set
# difference of a class without training images to the smallest bias, in logits
ABSENT_CLASS_MARGIN = 100.0
MIN_PROBABILITY = 1e-30  # of stored out-of-fold predictions
NUM_NEAREST_IMAGES = 3  # nearest training images of a wrong prediction
# median of the longer side divided by the shorter, from which two geometries are compared
MIN_ASPECT_RATIO = 1.05
SQUASH = "squash"
# Settings of an image processor that `set_fit` changes
GEOMETRY_SETTINGS = ("do_resize", "size", "do_center_crop", "crop_size", "do_pad", "pad_size")


def explain_missing_probe(
    options: Any,
    model: Any,
    has_random_weights: bool,
    new_parameter_names: set[str],
    label_kind: str,
) -> str | None:
    """Return the reason why a run has no probe, or None if it has one."""
    reasons = {
        "the initial weights are random": has_random_weights,
        "`probe=False` is set": not options.probe,
        "the dataset is a stream": options.streaming,
        "the dataset does not have one label per image": label_kind
        != "single_label_classification",
        "the model has a distillation head": getattr(model, "distillation_classifier", None)
        is not None,
        "the head is an MLP": not isinstance(getattr(model, "classifier", None), nn.Linear),
        "the pooler has random weights": any(
            name.startswith("vitcls.pooler.") for name in new_parameter_names
        ),
        "the checkpoint has a classifier for these labels": "classifier.weight"
        not in new_parameter_names,
    }
    return next((reason for reason, is_true in reasons.items() if is_true), None)


def explain_missing_steps(
    options: Any, data: Any, forward_flops: int, device: torch.device, is_length_set: bool
) -> str | None:
    """Return why a run ends at its probe, or None if it trains.

    Args:
        options: options of the run, with all defaults.
        data: training data.
        forward_flops: floating-point operations of a forward pass of one image.
        device: device of the run.
        is_length_set: whether the user has set the number of epochs or steps.
    """
    if options.trainable == "head":
        return "none: `trainable='head'` keeps the encoder"

    num_selection = None if data.selection is None else len(data.selection)
    if num_selection is not None and num_selection < MIN_SELECTION_IMAGES:
        return (
            f"none: {num_selection} separate images are too few to compare fine-tuning with the "
            "frozen model"
        )

    flops = FLOPS_OF_STEP * forward_flops * data.num_training_images * options.epochs
    if device.type == "cpu" and not is_length_set and flops > MAX_CPU_FLOPS:
        return (
            f"none: {options.epochs:g} epochs would take more than "
            f"{MAX_CPU_FLOPS / CPU_FLOPS_PER_MINUTE:.0f} minutes on this CPU"
        )
    return None


@dataclass(frozen=True)
class FittedProbe:
    """A fitted probe, and the features that it is fitted to and evaluated on."""

    probe: LinearProbe
    record: dict[str, Any]  # for results.json
    features: Features  # of the N training images; the first ones are those of the choice
    sources: list[tuple[LabeledImages, np.ndarray]]  # datasets of the N images, and indices in each
    num_chosen_images: int  # of the choice
    selection: FrozenPass | None
    held_out: FrozenPass | None

    def refit(self, with_selection: bool) -> LinearProbe:
        """Fit the probe to the training images and, on request, to the selection images."""
        features = self.features
        if with_selection and self.selection is not None:
            features = concatenate_features(features, self.selection.features)
        if len(features.labels) > self.num_chosen_images:
            self.probe.refit(features.get_tokens(), features.labels)
        return self.probe

    def get_names(self) -> list[str]:
        """Return the names of the training images."""
        names: list[str] = []
        for dataset, indices in self.sources:
            names += dataset.select(indices.tolist()).images.get_names()
        return names

    def list_out_of_fold_rows(self, num_labels: int) -> list[ImageOutput]:
        """Return the training images with logits of a classifier that was not fitted to them."""
        probabilities = expand_classes(self.probe.out_of_fold_, self.probe.classes_, num_labels)
        logits = np.log(np.maximum(probabilities, MIN_PROBABILITY)).astype(np.float32)
        names = self.get_names()
        return [
            ImageOutput(
                index=int(self.features.indices[row]),
                label=torch.tensor(self.features.labels[row]),
                values=logits[row],
                name=names[row],
            )
            for row in np.flatnonzero(np.isfinite(logits[:, 0]))
        ]

    def find_nearest_images(self, rows: Sequence[ImageOutput]) -> dict[int, list[str]]:
        """Return the names of the nearest training images of some images, by the index of each.

        The images are held out or, without those, training images. The similarity is the cosine of
        the features that the classifier reads. The nearest image is the first.
        """
        if not rows:
            return {}
        is_held_out = self.held_out is not None
        features = self.held_out.features if self.held_out is not None else self.features
        features = features.take(np.isin(features.indices, [row.index for row in rows]))
        tokens = self.probe.candidate_.tokens
        own = stack_tokens(self.features.get_tokens(), tokens)
        num_nearest = min(NUM_NEAREST_IMAGES + (not is_held_out), len(own))
        neighbors = NearestNeighbors(n_neighbors=num_nearest, metric="cosine").fit(own)
        nearest = neighbors.kneighbors(
            stack_tokens(features.get_tokens(), tokens), return_distance=False
        )
        names = self.get_names()
        found = {}
        for index, columns in zip(features.indices.tolist(), nearest.tolist(), strict=True):
            others = [
                row for row in columns if is_held_out or int(self.features.indices[row]) != index
            ]
            found[index] = [names[row] for row in others[:NUM_NEAREST_IMAGES]]
        return found


@dataclass(frozen=True)
class Probe:
    """The probe of a classifier.

    Attributes:
        model: the classifier. The probe replaces its pooler and its classifier.
        arguments: arguments of `FrozenPass`, except for the images and the layout.
        max_images: maximum number of training images; None for all.
        fit, pooling, pooled_layers: settings of the user, which are not searched; None to choose.
        class_weight: as in `LinearProbe.fit`.
        has_statistics: whether class statistics are stored with the model.
    """

    model: Any
    arguments: dict[str, Any]
    max_images: int | None
    fit: str | None = None
    pooling: str | None = None
    pooled_layers: Sequence[int] | None = None
    class_weight: str | None = None
    has_statistics: bool = True

    @property
    def processor(self) -> Any:
        return self.arguments["processor"]

    @property
    def accelerator(self) -> Any:
        return self.arguments["accelerator"]

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Return the negative indices of the layers of the user."""
        if self.pooled_layers is None:
            return None
        config = self.model.config
        indices = config.resolve_layers(self.pooled_layers)
        return tuple(index - config.num_hidden_layers - 1 for index in indices)

    def run(self, data: Any, reporter: Reporter, is_final: bool) -> FittedProbe:
        """Choose and fit the classifier, and set it as that of the model.

        Args:
            data: training data. Selection and held-out images pass the encoder once, too.
            reporter: prints the choice.
            is_final: whether no training follows. The classifier is then also fitted to the
                selection images.
        """
        start_time = time.perf_counter()
        num_layers = max(NUM_LAST_LAYERS, *(-layer for layer in self.layers or (-1,)))
        layout = FeatureLayout.from_config(self.model.config, num_layers)
        images = data.train.draw(self.max_images)
        first_images, other_images = split_at_random(images, MAX_CHOICE_IMAGES)

        # Geometry, on training images
        features = self.compute_features(first_images, layout).features
        comparison = None
        if (
            self.fit is None
            and get_fit(self.processor) != SQUASH
            and has_various_shapes(first_images)
        ):
            features, comparison = self.compare_with_squash(first_images, features)

        # Head, layers and tokens, on all images that are not held out if no training follows
        sources = [(first_images, features.indices)]
        selection = None
        if data.selection is not None and len(data.selection):
            selection = self.compute_features(data.selection, layout, warn=reporter.warn)
            if is_final:
                features = concatenate_features(features, selection.features)
                sources.append((data.selection, selection.features.indices))
                selection = None
        groups = find_groups(sources)
        chosen = run_on_main(self.accelerator, lambda: self.choose(features, groups))
        num_chosen_images = len(features.labels)

        # The other images
        if len(other_images):
            others = self.compute_features(other_images, layout).features
            features = concatenate_features(features, others)
            sources.append((other_images, others.indices))
        held_out = None
        if len(data.held_out):
            held_out = self.compute_features(data.held_out, layout, warn=reporter.warn)
        record = build_probe_record(chosen, features, num_chosen_images)
        record |= {"fit": get_fit(self.processor)} | (
            {"geometry": comparison} if comparison else {}
        )
        if is_final and data.class_ratio > MAX_CLASS_RATIO and self.class_weight is None:
            record |= {"balanced": self.measure_class_weights(chosen, features, groups)}
        fitted = FittedProbe(
            probe=chosen,
            record=record,
            features=features,
            sources=sources,
            num_chosen_images=num_chosen_images,
            selection=selection,
            held_out=held_out,
        )
        self.set_pooling(chosen.candidate_)
        self.set_classifier(fitted, is_final)
        record["seconds"] = round(time.perf_counter() - start_time, 1)
        if reporter.printed_metrics:  # none in a dry run
            fit_text = describe_geometry(record) or describe_fit(self.processor, images.images)
            reporter.print_line("fit", fit_text)
            reporter.print_line("frozen", describe_probe(record))
            if is_final and self.has_statistics and chosen.distance_threshold_ is None:
                reporter.print_line(
                    "unknown",
                    f"predictions do not mark unknown images, which requires {MIN_DISTANCE_IMAGES} "
                    "cross-validated images, and CLS or the mean of the patches as pooling",
                )
        return fitted

    def compute_features(
        self,
        images: LabeledImages,
        layout: FeatureLayout,
        warn: Callable[[str], None] = ignore_message,
    ) -> FrozenPass:
        """Pass images through the encoder.

        Training reports unreadable images, so that the default does not.
        """
        frozen_pass = FrozenPass(images, layout, **(self.arguments | {"warn": warn}))
        frozen_pass(self.model.to(self.accelerator.device).eval())
        return frozen_pass

    def measure_class_weights(
        self, chosen: LinearProbe, features: Features, groups: np.ndarray | None
    ) -> dict[str, float]:
        """Return what class weights would change in cross-validation."""
        labels = features.labels[: len(chosen.losses_)]
        chosen_features = features.take(np.arange(len(features.labels)) < len(labels))
        weighted = replace(self, class_weight="balanced")
        other = run_on_main(self.accelerator, partial(weighted.choose, chosen_features, groups))
        record = {}
        for suffix, probe in (("_without", chosen), ("", other)):
            known = np.isfinite(probe.losses_)
            is_right = probe.out_of_fold_.argmax(axis=1) == np.searchsorted(probe.classes_, labels)
            classes = np.unique(labels[known])
            recalls = [is_right[known & (labels == label)].mean() for label in classes]
            record[f"balanced_accuracy{suffix}"] = float(np.mean(recalls))
            record[f"accuracy{suffix}"] = float(is_right[known].mean())
        return round_floats(record)

    def choose(self, features: Features, groups: np.ndarray | None) -> LinearProbe:
        """Choose and fit the classifier, by cross-validation."""
        # The matrices are small: with more threads, the fits take more time in total.
        with report_work("cross-validation"), threadpool_limits(limits=1):
            return LinearProbe(self.layers, self.pooling).fit(
                features.get_tokens(), features.labels, groups, self.class_weight
            )

    # Geometry -------------------------------------------------------------------------------------

    def compare_with_squash(
        self, images: LabeledImages, own: Features
    ) -> tuple[Features, dict[str, Any]]:
        """Compare the checkpoint's own geometry with squashing, on a part of the images.

        Squashing is chosen only if its loss is lower by more than one standard error. The image
        processor is set to the chosen geometry.

        Args:
            images: images of the choice.
            own: their features with the checkpoint's own geometry.

        Returns:
            The features of all images with the chosen geometry, and the record of the comparison.
        """
        own_fit = get_fit(self.processor)
        own_settings = {name: getattr(self.processor, name) for name in GEOMETRY_SETTINGS}
        num_compared = min(MAX_SQUASHED_IMAGES, round(SQUASHED_FRACTION * len(images)))
        is_compared = np.zeros(len(images), dtype=bool)
        is_compared[np.random.default_rng(0).permutation(len(images))[:num_compared]] = True
        self.set_geometry(SQUASH)
        squashed = self.compute_part(images, is_compared, own.layout)

        losses = {}
        shared = np.intersect1d(own.indices[is_compared[own.indices]], squashed.indices)
        for fit, features in ((own_fit, own), (SQUASH, squashed)):
            part = features.take(np.isin(features.indices, shared))
            probe = run_on_main(self.accelerator, partial(self.choose, part, None))
            if probe.num_folds_:
                losses[fit] = probe.losses_
        record: dict[str, Any] = {}
        is_squashed = False
        if len(losses) == 2:  # with fewer, there are too few images to compare
            is_squashed = is_clearly_worse(losses[own_fit], losses[SQUASH], 1.0)
            means = {fit: float(np.nanmean(values)) for fit, values in losses.items()}
            record = {"num_images": len(shared), "losses": means}

        if is_squashed:
            others = self.compute_part(images, ~is_compared, own.layout)
            return concatenate_features(squashed, others), record
        for name, value in own_settings.items():  # `set_fit` would not know the size before a crop
            setattr(self.processor, name, value)
        return own, record

    def compute_part(
        self, images: LabeledImages, is_chosen: np.ndarray, layout: FeatureLayout
    ) -> Features:
        """Compute the features of some of the images; the indices are those among all images."""
        indices = np.flatnonzero(is_chosen)
        features = self.compute_features(images.select(indices.tolist()), layout).features
        return replace(features, indices=indices[features.indices])

    def set_geometry(self, fit: str) -> None:
        set_fit(self.processor, fit, self.model.config.image_height_width)

    # Model ----------------------------------------------------------------------------------------

    def restore(self, record: dict[str, Any]) -> None:
        """Set the geometry and the pooling that an interrupted run chose."""
        self.set_geometry(record["fit"])
        self.set_pooling(Candidate(record["head"], tuple(record["layers"]), record["pooling"]))

    def set_pooling(self, candidate: Candidate) -> None:
        """Give the model a pooler and a classifier that read the tokens of a candidate."""
        config = self.model.config
        if candidate.pooling != OWN_POOLING:
            config.pooling = candidate.pooling
            config.pooled_layers = None if candidate.layers == (-1,) else list(candidate.layers)
            self.model.vitcls.pooler = build_pooler(config)
        self.model.build_classifiers()
        self.model.to(self.accelerator.device)

    def set_classifier(self, fitted: FittedProbe, is_final: bool) -> None:
        """Set the classifier of the model to the fitted one.

        A final classifier is fitted to the selection images, too, and has a temperature. If
        training follows, the temperature is part of the weights, so that the loss starts low.
        """
        with report_work("fitting the classifier"):
            probe = run_on_main(self.accelerator, partial(fitted.refit, with_selection=is_final))
        num_labels = self.model.config.num_labels
        scale = 1.0 if is_final else probe.temperature_
        weight = expand_classes(probe.weight_.T / scale, probe.classes_, num_labels).T
        bias = np.full(num_labels, probe.bias_.min() / scale - ABSENT_CLASS_MARGIN)
        bias[probe.classes_] = probe.bias_ / scale
        self.model.config.temperature = round(probe.temperature_, 4) if is_final else 1.0
        if is_final and self.has_statistics and probe.statistics_ is not None:
            probe.statistics_.expand(probe.classes_, num_labels).set_in_model(self.model)
            self.model.config.distance_threshold = probe.distance_threshold_
        with torch.no_grad():
            self.model.classifier.weight.copy_(torch.from_numpy(weight))
            self.model.classifier.bias.copy_(torch.from_numpy(bias))


def expand_classes(values: np.ndarray, classes: np.ndarray, num_labels: int) -> np.ndarray:
    """Return values [N, K] of some classes as [N, L] of all labels, 0 for the others."""
    expanded = np.zeros((len(values), num_labels))
    expanded[:, classes] = values
    return expanded


def find_groups(sources: list[tuple[LabeledImages, np.ndarray]]) -> np.ndarray | None:
    """Return the group [N] of each image: those of the data, or copies of an image.

    It is None if the images have no groups and cannot be compared.
    """
    parts = [dataset.select(indices.tolist()) for dataset, indices in sources]
    if all(part.groups is not None for part in parts):
        return np.concatenate([part.groups for part in parts])
    return np.concatenate([part.images.compute_content_keys() for part in parts])


def has_various_shapes(images: LabeledImages) -> bool:
    """Return whether the median image of a sample is clearly not square."""
    ratios = [max(size) / min(size) for size in read_sizes(images.images)]
    return bool(ratios) and median(ratios) >= MIN_ASPECT_RATIO


def split_at_random(images: LabeledImages, num_images: int) -> tuple[LabeledImages, LabeledImages]:
    """Return `num_images` random images, and the other images."""
    order = np.random.default_rng(0).permutation(len(images))
    first = np.sort(order[:num_images])
    others = np.sort(order[num_images:])
    return images.select(first.tolist()), images.select(others.tolist())


# Record -------------------------------------------------------------------------------------------


def build_probe_record(
    probe: LinearProbe, features: Features, num_chosen_images: int
) -> dict[str, Any]:
    """Return the choice and the results of all candidates for results.json."""
    record: dict[str, Any] = {
        "num_training_images": len(features.labels),
        "num_images_of_choice": num_chosen_images,
        "num_folds": probe.num_folds_,
        "head": probe.candidate_.head,
        "layers": list(probe.candidate_.layers),
        "pooling": probe.candidate_.pooling,
        "strength": probe.strength_,
    }
    if probe.estimate_ is not None:
        record |= {
            "accuracy": probe.estimate_.accuracy,
            "accuracy_interval": probe.estimate_.interval,
            "loss": float(np.nanmean(probe.losses_)),
        }
    return round_floats(record | {"candidates": probe.table_})


def describe_probe(record: dict[str, Any]) -> str:
    """Return the choice as text, with the result of the simplest candidate for comparison."""
    chosen = describe_candidate(record)
    if not record["num_folds"]:
        return (
            f"{chosen}, without cross-validation, which requires two images of each of two classes"
        )
    default = record["candidates"][0]
    return (
        f"{chosen}, log loss {record['loss']:.2f}: the lowest of {len(record['candidates'])} "
        f"candidates in {record['num_folds']}-fold cross-validation "
        f"({describe_candidate(default)}: {default['loss']:.2f})"
    )


def describe_geometry(record: dict[str, Any]) -> str | None:
    """Return the comparison of the two geometries as text, or None if they were not compared."""
    if "geometry" not in record:
        return None
    losses = ", ".join(f"{fit} {loss:.2f}" for fit, loss in record["geometry"]["losses"].items())
    return (
        f"{record['fit']}; log loss on {record['geometry']['num_images']:,} images: {losses}. Set "
        "`fit` to choose"
    )
