"""The search for the classifiers of a run, on the features of its frozen encoder.

    images -> encode: geometry, features, scenes -> EncodedImages -> the run divides the images
    training and held-out images -> fit: the classifier of each task (heads.py), which chooses layers and tokens

The features are described in inference/features.py. A frozen run saves the classifiers, fitted to
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
from threadpoolctl import threadpool_limits

from ..data.aspect_ratio import get_output_size, get_resize, read_sizes, set_resize
from ..data.images import LabeledImages
from ..data.labels import LabelSpace
from ..data.sampling import draw_numbers
from ..data.splits import TrainingData
from ..data.splits_table import get_keys
from ..inference.features import (
    NUM_LAST_LAYERS,
    OWN_POOLING,
    FeatureLayout,
    Features,
    FrozenEncoder,
    has_searchable_pooling,
)
from ..model.heads_vitcls import build_pooler
from ..runtime.distributed import run_on_main
from ..runtime.errors import format_name_list
from .findings import FINDINGS, RUN, describe_findings, examine
from .heads import FrozenHead, build_heads, build_record, describe_choice, split_tasks
from .linear_probe import (
    DISTILLATION,
    LinearProbe,
    describe_inference,
)
from .scenes import TrainedScenes, keep_together, measure_limit


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
class EncodedImages:
    """What a frozen encoder says about the images that can train it, before they are divided.

    Attributes:
        indices: of the images that passed the encoder, in an order that was drawn from their content.
        features: of the readable ones, in this order.
        sample: the first of them, with rings if a classifier may read patches.
        groups: [N] of all images; photos of a scene are in one.
        max_distance: of photos of a scene, from `measure_limit`.
        processor: image processor with the chosen geometry.
        record: of the choice of the geometry, the scenes (frozen/scenes.py) and the duration in seconds.
        is_counted: [N] whether each of all images measures a classifier (data/answers.py).
    """

    indices: np.ndarray
    features: Features
    sample: Features
    groups: np.ndarray
    max_distance: float
    processor: Any
    record: dict[str, Any]
    is_counted: np.ndarray

    def select(self, indices: np.ndarray) -> Features:
        """Select the features of some images; the images of the choice come first."""
        rows = np.flatnonzero(np.isin(self.features.indices, indices))
        num_unreadable = int(np.isin(self.indices, indices).sum()) - len(rows)
        rows = rows[put_first(self.features.labels[rows], MAX_CHOICE_IMAGES)]
        return replace(self.features.take(rows), num_unreadable=num_unreadable)


@dataclass(frozen=True)
class FittedHeads:
    """The classifiers that were chosen for a run.

    Attributes:
        by_task: the classifier of each task; the only one has an empty name.
        record: of what was chosen, for results.json.
        trained_scenes: recognizes photos of the scenes that trained them.
        in_trained_scenes: indices of the held-out photos of such a scene.
    """

    by_task: dict[str, FrozenHead]
    record: dict[str, Any]
    trained_scenes: TrainedScenes
    in_trained_scenes: list[int]

    def examine(self, data: TrainingData, is_result: bool) -> None:
        """Record the findings of each classifier (findings.py).

        `data` are the images of the run; `is_result` is whether the run saves these classifiers.
        """
        records = self.record.get("tasks", {"": self.record})
        for task, head in self.by_task.items():
            records[task]["findings"] = examine(data, head, is_result and not task)


@dataclass(frozen=True)
class HeadSearch:
    """Chooses the geometry and the heads of a classifier whose encoder is frozen, and fits them.

    Attributes:
        encoder: of the classifier, whose pooler and heads are replaced.
        processor: image processor, whose geometry may change.
        label_space: names of the labels.
        resize, pooling, pooled_layers: settings of the user, which are not searched; None to choose.
        class_weight, inference: as in `LinearProbe`.
    """

    encoder: FrozenEncoder
    processor: Any
    label_space: LabelSpace
    resize: str | None
    pooling: str | None
    pooled_layers: Sequence[int] | None
    class_weight: str | None
    inference: str | None

    @property
    def model(self) -> Any:
        """The classifier."""
        return self.encoder.model

    @property
    def layers(self) -> tuple[int, ...] | None:
        """Return the negative indices of the layers of the user; a pooler reads its own."""
        config = self.model.config
        if self.pooled_layers is None or not has_searchable_pooling(config):
            return None
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

    @property
    def layout(self) -> FeatureLayout:
        """The features that the heads of the model may read.

        A pooler with weights, or the maximum, reads all of the last layer. Its output is then the
        only kind of token. A second head reads the mean of the distillation tokens.
        """
        config = self.model.config
        if not config.tasks and not has_searchable_pooling(config):  # Tasks have no pooler
            return FeatureLayout(1, {OWN_POOLING: config.pooled_size})
        # Four layers in any case: the class statistics are of these, whatever the classifier reads.
        num_layers = max(NUM_LAST_LAYERS, *(-layer for layer in self.layers or (-1,)))
        layout = FeatureLayout.for_extra_heads(config, num_layers)
        if getattr(self.model, "distillation_classifier", None) is not None:
            layout.widths[DISTILLATION] = config.hidden_size
        return layout

    # Images ---------------------------------------------------------------------------------------

    def encode(
        self,
        images: LabeledImages,
        warn: Callable[[str], None],
        max_images: int | None,
        is_divided: bool,
    ) -> EncodedImages:
        """Pass images through the encoder, each of them once, and find the scenes among them.

        The model and its processor stay as they are. A part of the images passes a second time, with
        another geometry, if that may be better.

        Args:
            images: the images.
            warn: prints a warning about an unreadable image.
            max_images: number of images, drawn from all; None for all.
            is_divided: whether the images will be divided. Otherwise, scenes matter only among the images
                of the choice of a classifier.
        """
        start_time = time.perf_counter()
        assert images.groups is not None, "`add_keys` sets the groups"
        labels: Any = self.label_space.collate(images.labels)
        # Drawn from their content, so the names of the images and their places change nothing
        order = np.argsort(draw_numbers(get_keys(images), 2), kind="stable")
        for number in (max_images or len(images), MAX_CHOICE_IMAGES):
            order = order[put_first(labels.numpy()[order], number)][:max_images]
        first, rest = np.split(order, [MAX_CHOICE_IMAGES])
        processor = copy.deepcopy(self.processor)
        compute = partial(self.compute_features, images, processor=processor, warn=warn)
        # The geometry is settled first, on a part of the images: all features depend on it, and to
        # compute them twice would double the longest part of the run.
        sample, geometry = self.choose_geometry(images, compute(first, has_rings=True), processor)
        features = replace(sample, rings=None)
        if len(rest):
            features = features.join(compute(rest))

        limit = measure_limit(
            sample,
            images,
            processor,
            lambda part, processor: self.compute_features(
                part, np.arange(len(part)), processor, ignore_message
            ),
        )
        compared = features if is_divided else features.take(slice(MAX_CHOICE_IMAGES))

        def find_scenes() -> tuple[np.ndarray, dict[str, Any]]:
            joined, record = keep_together(compared, limit, self.label_space)
            # The images of a group that were not compared follow the others.
            names = pd.Series(joined.groups, compared.groups).groupby(level=0).first()
            groups = pd.Series(images.groups)
            return groups.map(names).fillna(groups).astype(int).to_numpy(), record

        # On one process for all: rounding on another CPU could turn a close pair.
        groups, scenes = run_on_main(find_scenes)
        if is_divided:
            scenes["num_not_compared"] = len(images) - len(order)
        return EncodedImages(
            indices=order,
            features=replace(features, groups=groups[features.indices]),
            sample=sample,
            groups=groups,
            max_distance=limit,
            processor=processor,
            record=geometry | {"scenes": scenes, "seconds": time.perf_counter() - start_time},
            is_counted=images.is_counted,
        )

    def compute_features(
        self,
        images: LabeledImages,
        indices: np.ndarray,
        processor: Any,
        warn: Callable[[str], None],
        has_rings: bool = False,
    ) -> Features:
        """Pass the images at some indices through the encoder."""
        layout = self.layout
        self.model.to(PartialState().device).eval()
        features = self.encoder.compute_features(
            images.select(indices),
            layout,
            processor=processor,
            warn=warn,
            has_rings=has_rings and "mean" in layout.widths,
        )
        return replace(features, indices=indices[features.indices])

    def choose_geometry(
        self, images: LabeledImages, own: Features, processor: Any
    ) -> tuple[Features, dict[str, Any]]:
        """Choose between the checkpoint's own geometry and squashing, on a part of the images.

        They are compared if the person left the choice open, and there are enough images, not all
        square. Squashing is chosen only if its loss is lower by more than one standard error.

        Args:
            images: training images.
            own: features of the images of the choice, with the checkpoint's own geometry.
            processor: image processor, which is set to the chosen geometry.

        Returns:
            The features of these images with the chosen geometry, and the record of the geometry.
        """
        own_resize = get_resize(processor)
        record: dict[str, Any] = {"resize": own_resize}
        if self.resize is not None or own_resize == SQUASH:
            return own, record
        num_classes = max(map(len, self.label_space.columns.values()))
        if SQUASHED_FRACTION * len(own.labels) < MIN_SQUASHED_PER_CLASS * num_classes:
            return own, record
        # Sizes come from the headers of the files. One panorama among squares changes no median.
        ratios = [max(size) / min(size) for size in read_sizes(images.select(own.indices).images)]
        if not ratios or median(ratios) < MIN_ASPECT_RATIO:
            return own, record

        num_compared = min(MAX_SQUASHED_IMAGES, round(SQUASHED_FRACTION * len(own.labels)))
        # `select_held_out` holds out the images with the smallest numbers of each class. Images that
        # measure a run must not choose its geometry.
        numbers = draw_numbers(get_keys(images)[own.indices], 0)
        rows = np.argsort(numbers)[len(numbers) - num_compared :]
        squash = copy.deepcopy(processor)
        set_resize(squash, SQUASH, self.model.config.image_height_width)
        compute = partial(self.compute_features, images, warn=ignore_message, has_rings=True)
        squashed = compute(own.indices[rows], processor=squash)

        part = own.take(rows[np.isin(own.indices[rows], squashed.indices)])
        losses = {}
        for resize, features in ((own_resize, part), (SQUASH, squashed)):
            probes = run_on_main(self.fit_probes, features)
            losses[resize] = np.concatenate([each.losses_ for each in probes.values()])
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
        set_resize(processor, SQUASH, self.model.config.image_height_width)
        record["resize"] = SQUASH
        # The features of the compared images are kept (feature_store.py)
        return compute(own.indices, processor=processor), record

    # Classifiers ----------------------------------------------------------------------------------

    def fit(
        self, images: EncodedImages, data: TrainingData, warn: Callable[[str], None]
    ) -> FittedHeads:
        """Choose and fit the classifiers, and set the geometry and the pooling that they read.

        Args:
            images: the images before they were divided.
            data: the images.
            warn: prints a warning about an unreadable image of a held-out split.
        """
        start_time = time.perf_counter()
        train = images.select(data.train_indices)
        # On one process for all: rounding on another CPU could turn a close choice.
        probes = run_on_main(self.fit_probes, train, images.is_counted)

        places = data.held_out_indices
        held_out = images.select(places)
        held_out = replace(held_out, indices=np.searchsorted(places, held_out.indices))
        missing = np.flatnonzero(~np.isin(places, images.indices))
        if len(missing):
            others = self.compute_features(data.held_out, missing, images.processor, warn)
            held_out = held_out.join(others)
        held_out = held_out.take(np.argsort(held_out.indices))
        trained_scenes = TrainedScenes.of(train, images.max_distance)

        config = self.model.config
        sample = None
        if images.sample.rings is not None:
            sample = images.sample.take(np.isin(images.sample.indices, train.indices))
        heads = build_heads(
            probes,
            self.label_space,
            train,
            held_out,
            sample=sample,
            grid_size=config.get_grid_size(
                get_output_size(images.processor, config.image_height_width)
            ),
        )
        record = build_record(heads) | images.record
        self.set_choice(record)
        record["seconds"] = round(record["seconds"] + time.perf_counter() - start_time, 1)
        return FittedHeads(heads, record, trained_scenes, trained_scenes.recognize(held_out))

    def fit_probes(
        self, features: Features, is_counted: np.ndarray | None = None
    ) -> dict[str, LinearProbe]:
        """Choose and fit the classifier of each task, with the settings of the user.

        The images of the choice are the first ones.
        """
        images = features.take(slice(MAX_CHOICE_IMAGES))
        probes = {}
        # The matrices are small: with more threads, the fits take more time in total.
        with threadpool_limits(limits=1):
            for task, own in split_tasks(images, self.label_space).items():
                probe = LinearProbe(
                    self.layers, self.read_pooling, self.class_weight, self.inference
                )
                own_counted = None if is_counted is None else is_counted[own.indices]
                probes[task] = probe.fit(own.get_tokens(), own.labels, own.groups, own_counted)
        # The other images are kept out of the choice, whose time grows with their number, but not of
        # the fit.
        if len(features.labels) > MAX_CHOICE_IMAGES:
            for task, own in split_tasks(features, self.label_space).items():
                probes[task].refit(own.get_tokens(), own.labels)
        return probes

    # Model ----------------------------------------------------------------------------------------

    def set_choice(self, record: dict[str, Any]) -> None:
        """Set the geometry and the pooling of a record, which may come from an interrupted run.

        The model gets a pooler and classifiers that read what was chosen.
        """
        if record["resize"] != get_resize(self.processor):
            set_resize(self.processor, record["resize"], self.model.config.image_height_width)
        config = self.model.config
        if record["pooling"] != OWN_POOLING:
            config.pooling = record["pooling"]
            config.pooled_layers = None if record["layers"] == [-1] else record["layers"]
            # Classifiers of several tasks pool their own CLS tokens.
            if not config.tasks:
                self.model.vitcls.pooler = build_pooler(config)
        if "distillation_inference" in record:
            config.distillation_inference = record["distillation_inference"]
        # The width of a classifier depends on the layers and tokens that it reads.
        self.model.build_classifiers()
        self.model.to(PartialState().device)

    def set_heads(self, heads: Mapping[str, FrozenHead]) -> None:
        """Give the model its heads, class statistics and threshold."""
        config = self.model.config
        for task, head in heads.items():
            head.copy_to(self.model)
            statistics = head.probe.statistics_
            if not task and statistics is not None:
                # A label without training images keeps its place, so the rows stay aligned with the
                # classifier.
                statistics.expand(head.probe.classes_, config.num_labels).set_in_model(self.model)
                config.distance_threshold = head.probe.distance_threshold_


def put_first(labels: np.ndarray, number: int) -> np.ndarray:
    """Order images so that `number` of them come first, with two of each class: folds need these.

    Otherwise, their order stays.
    """
    classes = np.unique(labels, axis=0, return_inverse=True)[1].ravel()
    ranks = pd.Series(classes).groupby(classes).cumcount()
    order = np.argsort(ranks > 1, kind="stable")
    return np.concatenate([np.sort(order[:number]), np.sort(order[number:])])


def warn_about_unreadable_classes(
    data: TrainingData, readable: np.ndarray, warn: Callable[[str], None]
) -> list[int]:
    """Name the classes whose training images are all unreadable: the model cannot predict them.

    Args:
        data: the images.
        readable: labels of the training images that can be read.
        warn: prints a warning.

    Returns:
        The classes.
    """
    missing = sorted(set(data.train.labels) - set(readable.tolist()))
    if missing:
        names = format_name_list([data.label_space.names[index] for index in missing])
        warn(f"no image of {names} can be read, so the model never predicts it. Check the files")
    return missing


def ignore_message(message: str) -> None:
    """Ignore a warning about an image that is reported elsewhere."""


# Texts --------------------------------------------------------------------------------------------


def describe_frozen(record: dict[str, Any]) -> dict[str, str | None]:
    """Say which classifiers were chosen for a frozen model, and what was noticed about them."""
    records = record.get("tasks", {"": record})
    chosen = join_texts({task: describe_choice(each) for task, each in records.items()})
    heads = None
    if losses := record.get("distillation_losses"):
        heads = describe_inference(losses, "out of fold")
    findings = {
        task: describe_findings(each.get("findings", {}), RUN) for task, each in records.items()
    }
    return {"frozen": chosen, "heads": heads} | {
        each.name: join_texts({task: texts.get(each.name) for task, texts in findings.items()})
        for each in FINDINGS
    }


def join_texts(texts: Mapping[str, str | None]) -> str:
    """Join the texts of tasks as lines below one another; the text of the only one is as it is."""
    lines = [f"{task}: {text}" if task else text for task, text in texts.items() if text]
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
