"""The frozen encoder of a run: the features of its images, and a model with classifiers of them.

    training images -> encoder, once -> choice of geometry -> classifiers (heads.py), which choose layers and tokens
    held-out images -> encoder, once -> result, nearest training images

The features are described in inference/frozen_features.py. A frozen run saves the classifiers, fitted to
every label, and their temperatures come from the images that each fold leaves out. Steps start from
them instead of random ones (linear probing, then fine-tuning: Kumar et al. 2022, arXiv 2202.10054).
"""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState

from ..data.aspect_ratio import get_output_size, get_resize, read_sizes, set_resize
from ..data.images import LabeledImages
from ..data.labels import LabelSpace
from ..inference.frozen_features import (
    OWN_POOLING,
    FeatureLayout,
    Features,
    FrozenPass,
)
from ..inference.linear_probe import (
    NUM_LAST_LAYERS,
    Candidate,
    LinearProbe,
    describe_inference,
)
from ..inference.near_copies import (
    KnownScenes,
    describe_scenes,
    find_pairs,
    keep_together,
    measure_limit,
)
from ..model.heads_vitcls import build_pooler
from ..runtime.distributed import run_on_main
from ..runtime.errors import format_name_list
from .border import describe_border, measure_border
from .heads import FrozenHead, Heads, describe_choice


# Maximum number of training images, drawn at random, for the classifiers of a run with steps. They
# are only their start, and the steps see all images.
MAX_START_IMAGES = 10_000
MAX_CHOICE_IMAGES = 5_000  # Maximum number of images for the choice by cross-validation
# Images whose features are computed with both geometries: a fraction, at most a number. The second
# pass costs no more than this, and its features are used if the second geometry wins.
SQUASHED_FRACTION = 0.4
MAX_SQUASHED_IMAGES = 500
# With fewer of each class, the comparison is noise: 32 photos of ten classes chose squash, and the
# accuracy of others fell from 65 to 45 %.
MIN_SQUASHED_PER_CLASS = 5
# Median of the longer side divided by the shorter. Below it, crop and squash see nearly the same pixels.
MIN_ASPECT_RATIO = 1.05
SQUASH = "squash"


@dataclass(frozen=True)
class FrozenEncoder:
    """The encoder of a classifier, whose features fit its heads.

    Attributes:
        model: the classifier. Its pooler and its heads are replaced.
        processor: image processor, whose geometry may change.
        label_space: names of the labels.
        build_pass: returns a `FrozenPass` for images and a layout.
        resize, pooling, pooled_layers: settings of the user, which are not searched; None to choose.
        class_weight: as in `LinearProbe`.
    """

    model: Any
    processor: Any
    label_space: LabelSpace
    build_pass: Callable[..., FrozenPass]
    resize: str | None = None
    pooling: str | None = None
    pooled_layers: Sequence[int] | None = None
    class_weight: str | None = None

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Return the negative indices of the layers of the user."""
        if self.pooled_layers is None:
            return None
        config = self.model.config
        indices = config.resolve_layers(self.pooled_layers)
        return tuple(index - config.num_hidden_layers - 1 for index in indices)

    @property
    def read_pooling(self) -> str | None:
        """The pooling of the user, but only the patches if tasks have trained their CLS tokens apart.

        The features contain the mean of the CLS tokens, which is each of them while they are twins.
        """
        if not self.model.config.tasks:
            return self.pooling
        embeddings = dict(self.model.vitcls.embeddings.named_parameters())
        tokens = embeddings["cls_token"] + embeddings.get("position_embeddings.cls", 0)
        are_twins = torch.allclose(tokens, tokens[:, :1], atol=1e-6)
        return self.pooling if are_twins else "mean"

    def fit(
        self,
        parts: Sequence[LabeledImages],
        held_out: LabeledImages,
        warn: Callable[[str], None],
        max_images: int | None = None,
    ) -> tuple[dict[str, FrozenHead], dict[str, Any], KnownScenes]:
        """Choose and fit the classifiers, and set the geometry and the pooling that they read.

        Args:
            parts: images to fit it to. The geometry is chosen on the first part.
            held_out: images whose features are computed as well.
            warn: prints a warning about an unreadable image.
            max_images: number of images of the first part, drawn at random; None for all.

        Returns:
            The classifier of each task, what was chosen, for results.json, and the photos that it
            was fitted to.
        """
        start_time = time.perf_counter()
        train, *others = parts
        labels: Any = self.label_space.collate(train.labels)
        classes = np.unique(labels.numpy(), axis=0, return_inverse=True)[1].ravel()
        first, rest = sample_parts(classes, max_images)
        # The geometry is settled first, on a part of the images: all features depend on it, and to
        # compute them twice would double the longest part of the run.
        features, geometry = self.choose_geometry(train, self.compute_features(train, warn, first))

        limit = self.measure_limit(train, features)
        if len(rest):
            features = features.join(self.compute_features(train, warn, rest))
        for part in others:
            features = features.join(self.compute_features(part, warn))
        if train.is_stratified and max_images is None:
            warn_about_unreadable_classes(train.labels, features.labels, self.label_space, warn)

        held_out_features = self.compute_features(held_out, warn) if len(held_out) else None
        geometry["seconds"] = round(time.perf_counter() - start_time, 1)
        return self.fit_features(features, held_out_features, limit, geometry)

    def fit_features(
        self, features: Features, held_out: Features | None, limit: float, geometry: dict[str, Any]
    ) -> tuple[dict[str, FrozenHead], dict[str, Any], KnownScenes]:
        """Choose and fit the classifiers, and set the pooling that they read.

        Args:
            features, held_out: of the images.
            limit: of near copies, from `measure_limit`.
            geometry: record of the features, with the seconds that they took.

        Returns:
            As `fit` does.
        """
        start_time = time.perf_counter()
        classes = np.unique(features.labels, axis=0, return_inverse=True)[1].ravel()
        first, rest = sample_parts(classes, None)
        # Photos of one scene in several folds would measure how well the scene is recognized.
        chosen, scenes = keep_together(features.take(first), limit, self.label_space)
        # On one process for all: rounding on another CPU could turn a close choice.
        heads = run_on_main(lambda: self.fit_heads(chosen))
        # These images are kept out of the choice, whose time grows with their number, but not of
        # the fit.
        features = chosen.join(replace(features.take(rest), num_unreadable=0))
        if len(rest):
            heads = run_on_main(partial(heads.refit, features))

        if held_out is not None:
            pairs, _ = find_pairs(features, limit, held_out)
            scenes["near_held_out"] = np.unique(held_out.names[pairs[:, 0]]).tolist()
        self.set_pooling(heads.read)
        frozen = heads.freeze(features, held_out)
        seconds = round(time.perf_counter() - start_time + geometry["seconds"], 1)
        record = heads.build_record(frozen) | geometry | {"seconds": seconds}
        if features.layout.has_rings:
            config = self.model.config
            size = get_output_size(self.processor, config.image_height_width)
            record["border"] = measure_border(frozen.values(), config.get_grid_size(size))
        record["near_copies"] = scenes
        return frozen, record, KnownScenes.of(features, limit)

    @property
    def layout(self) -> FeatureLayout:
        """The features that the heads of the model may read."""
        config = self.model.config
        # Four layers in any case: the class statistics are of these, whatever the classifier reads.
        num_layers = max(NUM_LAST_LAYERS, *(-layer for layer in self.layers or (-1,)))
        if config.tasks:  # They have no pooler
            return replace(FeatureLayout.for_extra_heads(config, num_layers), has_rings=True)
        has_second_head = self.model.distillation_classifier is not None
        layout = FeatureLayout.from_config(config, num_layers, has_second_head)
        return replace(layout, has_rings="mean" in layout.widths)

    def compute_features(
        self,
        images: LabeledImages,
        warn: Callable[[str], None],
        indices: np.ndarray | None = None,
    ) -> Features:
        """Pass images, or some of them, through the encoder."""
        part = images if indices is None else images.select(indices)
        features = self.build_pass(part, self.layout, warn=warn)(
            self.model.to(PartialState().device).eval()
        )
        return features if indices is None else replace(features, indices=indices[features.indices])

    def measure_limit(self, images: LabeledImages, features: Features) -> float:
        """Measure how near photos of a scene are, with a pass of a few mirrored images."""

        def run_pass(part: LabeledImages, processor: Any) -> Features:
            # The layout of these features, which may be another than that of the heads
            one_pass = self.build_pass(
                part, features.layout, processor=processor, warn=ignore_message
            )
            return one_pass(self.model.to(PartialState().device).eval())

        return measure_limit(features, images, self.processor, run_pass)

    def fit_heads(self, features: Features) -> Heads:
        """Choose and fit the classifiers of the tasks, with the settings of the user."""
        probe = LinearProbe(self.layers, self.read_pooling, self.class_weight)
        return Heads.fit(self.label_space, features, probe)

    # Geometry -------------------------------------------------------------------------------------

    def choose_geometry(
        self, images: LabeledImages, own: Features
    ) -> tuple[Features, dict[str, Any]]:
        """Choose between the checkpoint's own geometry and squashing, on a part of the images.

        Squashing is chosen only if its loss is lower by more than one standard error. The image
        processor is set to the chosen geometry.

        Args:
            images: training images.
            own: features of the images of the choice, with the checkpoint's own geometry.

        Returns:
            The features of these images with the chosen geometry, and the record of the geometry.
        """
        own_resize = get_resize(self.processor)
        record: dict[str, Any] = {"resize": own_resize}
        if not self.can_compare_geometries(images, own):
            return own, record

        num_compared = min(MAX_SQUASHED_IMAGES, round(SQUASHED_FRACTION * len(own.labels)))
        order = np.random.default_rng(0).permutation(len(own.labels))
        compared = np.sort(own.indices[order[:num_compared]])
        processor = copy.deepcopy(self.processor)
        set_resize(processor, SQUASH, self.model.config.image_height_width)
        squashing = replace(self, build_pass=partial(self.build_pass, processor=processor))
        squashed = squashing.compute_features(images, ignore_message, compared)

        part = own.take(np.isin(own.indices, squashed.indices))
        losses = {}
        for resize, features in ((own_resize, part), (SQUASH, squashed)):
            heads = run_on_main(partial(self.fit_heads, features))
            losses[resize] = np.concatenate([each.losses_ for each in heads.probes.values()])
        # Both are losses of the same images, so their differences have the error. Too few images for
        # folds have none.
        differences = losses[own_resize] - losses[SQUASH]
        differences = differences[np.isfinite(differences)]
        if not len(differences):
            return own, record
        means = {resize: float(np.nanmean(values)) for resize, values in losses.items()}
        record["geometry"] = {"num_images": len(squashed.labels), "losses": means}
        # A tie goes to the checkpoint's own geometry, with which its encoder was trained.
        if differences.mean() <= differences.std() / np.sqrt(len(differences)):
            return own, record
        set_resize(self.processor, SQUASH, self.model.config.image_height_width)
        record["resize"] = SQUASH
        # The compared images have their new features already.
        remaining = np.setdiff1d(own.indices, compared)
        others = self.compute_features(images, ignore_message, remaining)
        return replace(squashed.join(others), num_unreadable=own.num_unreadable), record

    def can_compare_geometries(self, images: LabeledImages, own: Features) -> bool:
        """Whether the person left the choice open, and there are enough images, not all square."""
        if self.resize is not None or get_resize(self.processor) == SQUASH:
            return False
        num_classes = max(map(len, self.label_space.columns.values()))
        if SQUASHED_FRACTION * len(own.labels) < MIN_SQUASHED_PER_CLASS * num_classes:
            return False
        return has_various_shapes(images.select(own.indices))

    # Model ----------------------------------------------------------------------------------------

    def restore(self, record: dict[str, Any]) -> None:
        """Set the geometry and the pooling that an interrupted run chose."""
        if record["resize"] != get_resize(self.processor):
            set_resize(self.processor, record["resize"], self.model.config.image_height_width)
        self.set_pooling(Candidate(tuple(record["layers"]), record["pooling"]))
        if "distillation_inference" in record:
            self.model.config.distillation_inference = record["distillation_inference"]

    def set_pooling(self, candidate: Candidate) -> None:
        """Give the model a pooler and classifiers that read the tokens of a candidate."""
        config = self.model.config
        if candidate.pooling != OWN_POOLING:
            config.pooling = candidate.pooling
            config.pooled_layers = None if candidate.layers == (-1,) else list(candidate.layers)
        # Classifiers of several tasks pool their own CLS tokens.
        if candidate.pooling != OWN_POOLING and not config.tasks:
            self.model.vitcls.pooler = build_pooler(config)
        # The width of a classifier depends on the layers and tokens that it reads.
        self.model.build_classifiers()
        self.model.to(PartialState().device)

    def set_frozen(self, frozen: Mapping[str, FrozenHead]) -> None:
        """Make the model the frozen one: with its heads, class statistics and threshold."""
        self.set_heads(frozen)
        config = self.model.config
        probe = frozen[""].probe if "" in frozen else None
        if probe is not None and probe.statistics_ is not None:
            # A label without training images keeps its place, so the rows stay aligned with the
            # classifier.
            probe.statistics_.expand(probe.classes_, config.num_labels).set_in_model(self.model)
            config.distance_threshold = probe.distance_threshold_

    def set_heads(self, frozen: Mapping[str, FrozenHead]) -> None:
        """Give the model the weights of the heads."""
        for head in frozen.values():
            head.copy_to(self.model)


def has_various_shapes(images: LabeledImages) -> bool:
    """Decide whether squashing would change anything: is the median image clearly not square?"""
    # Sizes come from the headers of the files. One panorama among squares changes no median.
    ratios = [max(size) / min(size) for size in read_sizes(images.images)]
    return bool(ratios) and median(ratios) >= MIN_ASPECT_RATIO


def sample_parts(classes: np.ndarray, max_images: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Sample the images of the choice and the others; return the indices of both, in order.

    The choice has at least two images of each class that has two: cross-validation needs them.
    """
    order = np.random.default_rng(0).permutation(len(classes))
    ranks = pd.Series(order).groupby(classes[order]).cumcount()
    # The first two images of every class move to the front, where they survive both limits.
    order = order[np.argsort(ranks > 1, kind="stable")][:max_images]
    return np.sort(order[:MAX_CHOICE_IMAGES]), np.sort(order[MAX_CHOICE_IMAGES:])


def warn_about_unreadable_classes(
    labels: Sequence[int], readable: np.ndarray, label_space: Any, warn: Callable[[str], None]
) -> list[int]:
    """Name the classes whose images are all unreadable, because the model cannot predict them.

    Args:
        labels: of all images.
        readable: labels of those that can be read.

    Returns:
        The classes.
    """
    missing = sorted(set(labels) - set(readable.tolist()))
    if missing:
        names = format_name_list([label_space.names[index] for index in missing])
        warn(f"no image of {names} can be read, so the model never predicts it. Check the files")
    return missing


def ignore_message(message: str) -> None:
    """Ignore a warning about an image that is reported elsewhere."""


# Texts --------------------------------------------------------------------------------------------


def describe_frozen(record: dict[str, Any]) -> dict[str, str | None]:
    """Say what was chosen for a frozen model: its geometry and its classifiers."""
    records = record.get("tasks", {"": record})
    chosen = join_texts({task: describe_choice(each) for task, each in records.items()})
    heads = None
    if losses := record.get("distillation_losses"):
        heads = describe_inference(losses, "out of fold")
    return {
        "resize": describe_geometry(record),
        "copies": describe_scenes(record["near_copies"]),
        "frozen": chosen,
        "heads": heads,
        "border": describe_border(record.get("border")),
    }


def join_texts(texts: Mapping[str, str]) -> str:
    """Join the texts of tasks as lines below one another; the text of the only one is as it is."""
    lines = [f"{task}: {text}" if task else text for task, text in texts.items()]
    return "\n".join(lines)


def describe_geometry(record: dict[str, Any]) -> str:
    """Name the geometry, with its comparison with squashing if the two were compared."""
    if "geometry" not in record:
        return str(record["resize"])
    losses = ", ".join(
        f"{resize} {loss:.2f}" for resize, loss in record["geometry"]["losses"].items()
    )
    reason = "" if record["resize"] == SQUASH else ", because squash is not clearly better"
    return (
        f"{record['resize']}{reason} (log loss on {record['geometry']['num_images']:,} images: "
        f"{losses}). Set `resize` to choose"
    )
