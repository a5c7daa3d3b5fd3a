"""The frozen model of a run: a linear classifier of the features of the encoder.

    training images -> encoder, once -> choice of geometry, layers, tokens -> classifier
    held-out images -> encoder, once -> result, nearest training images

The choice is made in inference/linear_probe.py, from features of inference/frozen_features.py. A
frozen run saves this classifier, fitted to every label, and its temperature comes from the images
that each fold leaves out. Steps start from it instead of a random one (linear probing, then
fine-tuning: Kumar et al. 2022, arXiv 2202.10054). Each of several tasks has a classifier of its own,
of the same features.
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
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits
from torch import nn

from ..data.aspect_ratio import get_resize, read_sizes, set_resize
from ..data.images import LabeledImages
from ..data.labels import LabelSpace
from ..inference.class_statistics import Token, expand_rows
from ..inference.evaluator import Predictions, build_predictions, round_floats
from ..inference.frozen_features import (
    BORDER,
    OWN_POOLING,
    FeatureLayout,
    Features,
    FrozenPass,
    has_searchable_pooling,
)
from ..inference.intervals import Estimate
from ..inference.linear_probe import (
    MIN_DISTANCE_IMAGES,
    NUM_LAST_LAYERS,
    Candidate,
    LinearProbe,
    describe_candidate,
    stack_tokens,
    to_logits,
)
from ..model.heads_vitcls import build_pooler
from ..runtime.distributed import run_on_main
from ..runtime.errors import format_name_list
from .distillation_head import DistillationHead, describe_inference, split_kinds


# Maximum number of training images, drawn at random, for the probe of a run with steps. It is only
# their start, and they see all images.
MAX_PROBE_IMAGES = 10_000
MAX_CHOICE_IMAGES = 5_000  # Maximum number of images for the choice by cross-validation
# Images whose features are computed with both geometries: a fraction, at most a number. The second
# pass costs no more than this, and its features are used if the second geometry wins.
SQUASHED_FRACTION = 0.4
MAX_SQUASHED_IMAGES = 500
# With fewer of each class, the comparison is noise: 32 photos of ten classes chose squash, and the
# accuracy of others fell from 65 to 45 %.
MIN_SQUASHED_PER_CLASS = 5
# Distance of a class without training images below the smallest bias, in logits. Finite, because the
# loss of a held-out image of such a class would be infinite otherwise.
ABSENT_CLASS_MARGIN = 100.0
NUM_NEAREST_IMAGES = 3  # Nearest training images of a wrong prediction
# Median of the longer side divided by the shorter. Below it, crop and squash see nearly the same pixels.
MIN_ASPECT_RATIO = 1.05
SQUASH = "squash"


def explain_missing_probe(
    is_wanted: bool,
    model: Any,
    has_random_weights: bool,
    new_parameter_names: set[str],
) -> str | None:
    """Say why a run has no frozen model; None if it has one."""
    has_new_pooler = any(name.startswith("vitcls.pooler.") for name in new_parameter_names)
    distillation_classifier = getattr(model, "distillation_classifier", None)
    reasons = {
        "the initial weights are random": has_random_weights,
        "`probe=False` is set": not is_wanted,
        "the distillation head has no features": distillation_classifier is not None
        and not has_searchable_pooling(model.config),
        "the head is an MLP": model.config.head_type != "linear",
        "the pooler has random weights": has_new_pooler,
    }
    return next((reason for reason, is_true in reasons.items() if is_true), None)


@dataclass(frozen=True)
class FrozenModel:
    """The classifier of a task on a frozen encoder, and the features that it was fitted to.

    Attributes:
        probe: the classifier.
        tokens: what the head of the model reads. With several tasks, the classifier reads a part of
            it, and the weights of the others are zero.
        labels: of the task.
        features: of the training images, the images of the choice first.
        held_out: of the held-out images, if there are any.
        second: the distillation head, if the model has one.
    """

    probe: LinearProbe
    tokens: tuple[Token, ...]
    labels: LabelSpace
    features: Features
    held_out: Features | None
    second: DistillationHead | None

    @property
    def estimate(self) -> Estimate | None:
        """The cross-validated accuracy of the logits that the model returns; None without folds."""
        return self.probe.estimate_ if self.second is None else self.second.estimate

    def predict_out_of_fold(self) -> Predictions:
        """Predict the training images with classifiers that were not fitted to them.

        The accuracy is corrected for the choice among the candidates.
        """
        assert self.estimate is not None, "there are folds"
        own = self.probe.out_of_fold_ if self.second is None else self.second.out_of_fold
        num_labels = len(self.labels.names)
        probabilities = expand_rows(own.T, self.probe.classes_, num_labels).T  # [N, L]
        known = np.flatnonzero(np.isfinite(probabilities).all(axis=1))
        features = self.features.take(known)
        # Logarithms of the probabilities are logits: softmax gives the same probabilities back.
        logits = to_logits(probabilities[known], features.labels).astype(np.float32)
        predictions = build_predictions(self.labels, replace(features, values=logits))
        predictions.metrics.update(round_floats(self.estimate.to_metrics()))
        return predictions

    def find_nearest_images(self, images: np.ndarray) -> dict[int, list[str]]:
        """Find the training images that explain predictions: the nearest ones, by image index.

        The images are held out or, without those, training images. The similarity is the cosine of
        the features that the classifier reads. The nearest image is the first.

        Args:
            images: indices of the predicted images.
        """
        if not len(images):
            return {}
        tokens = self.probe.candidate_.tokens
        own = stack_tokens(self.features.get_tokens(), tokens)
        others = self.features if self.held_out is None else self.held_out
        others = others.take(np.isin(others.indices, images))
        # Among the training images, the nearest one is the image itself, so one more is needed.
        num_nearest = min(NUM_NEAREST_IMAGES + (self.held_out is None), len(own))
        neighbors = NearestNeighbors(n_neighbors=num_nearest, metric="cosine").fit(own)
        nearest = neighbors.kneighbors(
            stack_tokens(others.get_tokens(), tokens), return_distance=False
        )
        found = {}
        for index, columns in zip(others.indices.tolist(), nearest, strict=True):
            if self.held_out is None:
                columns = columns[self.features.indices[columns] != index]
            found[index] = self.features.names[columns[:NUM_NEAREST_IMAGES]].tolist()
        return found


@dataclass(frozen=True)
class Probe:
    """The probe of a classifier.

    Attributes:
        model: the classifier. The probe replaces its pooler and its classifier.
        processor: image processor. The probe may change its geometry.
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
    ) -> tuple[dict[str, FrozenModel], dict[str, Any]]:
        """Choose and fit the classifiers, and set the geometry and the pooling that they read.

        Args:
            parts: images to fit it to. The geometry is chosen on the first part.
            held_out: images whose features are computed as well.
            warn: prints a warning about an unreadable image.
            max_images: number of images of the first part, drawn at random; None for all.

        Returns:
            The classifier of each task, and what was chosen, for results.json.
        """
        start_time = time.perf_counter()
        train, *others = parts
        # Four layers in any case: the class statistics are of these, whatever the classifier reads.
        num_layers = max(NUM_LAST_LAYERS, *(-layer for layer in self.layers or (-1,)))
        layout = self.build_layout(num_layers)
        labels: Any = self.label_space.collate(train.labels)
        classes = np.unique(labels.numpy(), axis=0, return_inverse=True)[1].ravel()
        first, rest = sample_parts(classes, max_images)
        features = self.compute_features(train, layout, warn, first)
        # The geometry is settled first, on a part of the images: all features depend on it, and to
        # compute them twice would double the longest part of the run.
        features, comparison = self.choose_geometry(train, features)

        for part in others:
            features = features.join(self.compute_features(part, layout, warn))
        # On one process for all: rounding on another CPU could turn a close choice.
        chosen, second = run_on_main(partial(self.fit_heads, features))
        # These images were kept out of the choice, whose time grows with their number, but not of
        # the fit.
        if len(rest):
            more = self.compute_features(train, layout, warn, rest)
            features = features.join(more)
            chosen, second = run_on_main(partial(self.refit, chosen, second, features))
        if train.is_stratified and max_images is None:
            warn_about_unreadable_classes(train.labels, features.labels, self.label_space, warn)
        held_out_parts: dict[str, Features] = {}
        if len(held_out):
            parts_of_tasks = self.split_tasks(self.compute_features(held_out, layout, warn))
            held_out_parts = {task: own for task, own in parts_of_tasks.items() if len(own.labels)}

        read = join_candidates([each.candidate_ for each in chosen.values()])
        self.set_pooling(read)
        frozen = {}
        records = {}
        for task, own in self.split_tasks(features).items():
            records[task] = build_probe_record(chosen[task], len(own.labels))
            frozen[task] = FrozenModel(
                probe=chosen[task],
                tokens=read.tokens,
                labels=self.label_space.tasks[task],
                features=own,
                held_out=held_out_parts.get(task),
                second=second,
            )
        # The only task is the record itself.
        all_tasks: dict[str, Any] = {"layers": list(read.layers), "pooling": read.pooling}
        record = records.get("", all_tasks | {"tasks": records})
        record["resize"] = get_resize(self.processor)
        if comparison:
            record["geometry"] = comparison
        if second is not None:
            record["distillation_inference"] = second.inference
            record["distillation_losses"] = round_floats(second.losses)
        record["seconds"] = round(time.perf_counter() - start_time, 1)
        return frozen, record

    def build_layout(self, num_layers: int) -> FeatureLayout:
        """Build the layout of the features for the heads of the model."""
        config = self.model.config
        if config.tasks:  # They have no pooler
            return FeatureLayout.for_extra_heads(config, num_layers)
        has_second_head = self.model.distillation_classifier is not None
        layout = FeatureLayout.from_config(config, num_layers, has_second_head)
        if "mean" in layout.widths:
            layout.widths[BORDER] = config.hidden_size
        return layout

    def split_tasks(self, features: Features) -> dict[str, Features]:
        """Take, for each task, the features of the images that have its label."""
        if not self.model.config.tasks:
            return {"": features}
        parts = {}
        for index, task in enumerate(self.label_space.tasks):
            labels = features.labels[:, index]
            parts[task] = replace(features, labels=labels).take(labels >= 0)
        return parts

    def compute_features(
        self,
        images: LabeledImages,
        layout: FeatureLayout,
        warn: Callable[[str], None],
        indices: np.ndarray | None = None,
    ) -> Features:
        """Pass images, or some of them, through the encoder."""
        part = images if indices is None else images.select(indices)
        features = self.build_pass(part, layout, warn=warn)(
            self.model.to(PartialState().device).eval()
        )
        return features if indices is None else replace(features, indices=indices[features.indices])

    @torch.no_grad()
    def predict_held_out(self, task: str, frozen: FrozenModel) -> Predictions:
        """Predict the held-out images: only the classifier runs, not the encoder."""
        features = frozen.held_out
        assert features is not None, "there are held-out images"

        def apply(head: nn.Module, tokens: Sequence[Token]) -> torch.Tensor:
            inputs = stack_tokens(features.get_tokens(), tokens)
            output: torch.Tensor = head(torch.from_numpy(inputs).float().to(PartialState().device))
            return output

        logits = apply(self.get_head(task), frozen.tokens)
        if frozen.second is not None:
            second_tokens = frozen.second.probe.candidate_.tokens
            second_logits = apply(self.model.distillation_classifier, second_tokens)
            logits = self.model.combine_heads(logits, second_logits)
        return build_predictions(frozen.labels, replace(features, values=logits.cpu().numpy()))

    def choose(self, features: Features) -> dict[str, LinearProbe]:
        """Choose and fit the classifier of each task, by cross-validation."""
        chosen = {}
        # The matrices are small: with more threads, the fits take more time in total.
        with threadpool_limits(limits=1):
            for task, own in self.split_tasks(features).items():
                tokens, _ = split_kinds(own.get_tokens())
                probe = LinearProbe(self.layers, self.read_pooling, self.class_weight)
                chosen[task] = probe.fit(tokens, own.labels, own.groups)
        return chosen

    def fit_heads(
        self, features: Features
    ) -> tuple[dict[str, LinearProbe], DistillationHead | None]:
        """Choose and fit the classifiers, and then the distillation head, if the model has one."""
        chosen = self.choose(features)
        _, tokens = split_kinds(features.get_tokens())
        if not tokens:
            return chosen, None
        with threadpool_limits(limits=1):
            head = DistillationHead.fit(tokens, chosen[""], features.labels, features.groups)
        return chosen, head

    def refit(
        self, chosen: dict[str, LinearProbe], second: DistillationHead | None, features: Features
    ) -> tuple[dict[str, LinearProbe], DistillationHead | None]:
        """Fit the chosen classifiers to all features."""
        for task, own in self.split_tasks(features).items():
            tokens, distillation_tokens = split_kinds(own.get_tokens())
            chosen[task].refit(tokens, own.labels)
            if second is not None:
                second = second.refit(distillation_tokens, own.labels)
        return chosen, second

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
            The features of these images with the chosen geometry, and the record of the comparison.
        """
        if not self.can_compare_geometries(images, own):
            return own, {}

        own_resize = get_resize(self.processor)
        num_compared = min(MAX_SQUASHED_IMAGES, round(SQUASHED_FRACTION * len(own.labels)))
        order = np.random.default_rng(0).permutation(len(own.labels))
        compared = np.sort(own.indices[order[:num_compared]])
        processor = copy.deepcopy(self.processor)
        set_resize(processor, SQUASH, self.model.config.image_height_width)
        squashing = replace(self, build_pass=partial(self.build_pass, processor=processor))
        squashed = squashing.compute_features(images, own.layout, ignore_message, compared)

        part = own.take(np.isin(own.indices, squashed.indices))
        losses = {}
        for resize, features in ((own_resize, part), (SQUASH, squashed)):
            chosen = run_on_main(partial(self.choose, features))
            losses[resize] = np.concatenate([each.losses_ for each in chosen.values()])
        # Both are losses of the same images, so their differences have the error. Too few images for
        # folds have none.
        differences = losses[own_resize] - losses[SQUASH]
        differences = differences[np.isfinite(differences)]
        if not len(differences):
            return own, {}
        means = {resize: float(np.nanmean(values)) for resize, values in losses.items()}
        record = {"num_images": len(squashed.labels), "losses": means}
        # A tie goes to the checkpoint's own geometry, with which its encoder was trained.
        if differences.mean() <= differences.std() / np.sqrt(len(differences)):
            return own, record
        set_resize(self.processor, SQUASH, self.model.config.image_height_width)
        # The compared images have their new features already.
        remaining = np.setdiff1d(own.indices, compared)
        others = self.compute_features(images, own.layout, ignore_message, remaining)
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

    def set_frozen(self, frozen: dict[str, FrozenModel]) -> None:
        """Make the model the frozen one: with its heads, class statistics and threshold."""
        self.set_heads(frozen)
        config = self.model.config
        probe = frozen[""].probe if "" in frozen else None
        if probe is not None and probe.statistics_ is not None:
            # A label without training images keeps its place, so the rows stay aligned with the
            # classifier.
            probe.statistics_.expand(probe.classes_, config.num_labels).set_in_model(self.model)
            config.distance_threshold = probe.distance_threshold_

    def set_heads(self, frozen: dict[str, FrozenModel]) -> None:
        """Set the weights of the heads, and which of them the model returns."""
        for task, each in frozen.items():
            copy_weights(each.probe, self.get_head(task), each.tokens)
            if each.second is not None:
                second = each.second.probe
                copy_weights(second, self.model.distillation_classifier, second.candidate_.tokens)
                self.model.config.distillation_inference = each.second.inference

    def get_head(self, task: str) -> nn.Linear:
        """Get the classifier of a task, or the only one."""
        head: nn.Linear = self.model.classifiers[f"task_{task}"] if task else self.model.classifier
        return head


def join_candidates(candidates: Sequence[Candidate]) -> Candidate:
    """Find what a model reads for the candidates of all its tasks."""
    if len(candidates) == 1:
        return candidates[0]
    layers = max((each.layers for each in candidates), key=len)
    reads_patches = any(each.pooling != "cls" for each in candidates)
    return Candidate(layers, "cls_mean" if reads_patches else "cls")


@torch.no_grad()
def copy_weights(probe: LinearProbe, head: nn.Linear, tokens: Sequence[Token]) -> None:
    """Copy the calibrated weights of a probe into a head of the model that reads some tokens."""
    weight, bias = build_linear(probe, head.out_features)
    read = probe.candidate_.tokens
    if read != tokens:
        blocks = dict(zip(read, np.split(weight, len(read), axis=1), strict=True))
        assert blocks.keys() <= set(tokens), "the head reads every token of the classifier"
        zeros = np.zeros_like(blocks[read[0]])
        weight = np.concatenate([blocks.get(token, zeros) for token in tokens], axis=1)
    head.weight.copy_(torch.from_numpy(weight))
    head.bias.copy_(torch.from_numpy(bias))


def build_linear(probe: LinearProbe, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Build the calibrated linear layer of a probe for all labels: weight [L, F] and bias [L].

    Labels without images are never predicted.
    """
    scale = probe.temperature_
    weight = expand_rows(probe.weight_ / scale, probe.classes_, num_labels)
    bias = np.full(num_labels, probe.bias_.min() / scale - ABSENT_CLASS_MARGIN)
    bias[probe.classes_] = probe.bias_ / scale
    return weight, bias


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
) -> None:
    """Name the classes whose images are all unreadable, because the model cannot predict them."""
    missing = sorted(set(labels) - set(readable.tolist()))
    if missing:
        names = format_name_list([label_space.names[index] for index in missing])
        warn(f"no image of {names} can be read, so the model never predicts it. Check the files")


def ignore_message(message: str) -> None:
    """Ignore a warning about an image that is reported elsewhere."""


# Record -------------------------------------------------------------------------------------------


def build_probe_record(probe: LinearProbe, num_images: int) -> dict[str, Any]:
    """Record the choice and the results of all candidates for results.json."""
    record: dict[str, Any] = {
        "num_training_images": num_images,
        "num_folds": probe.num_folds_,
        "layers": list(probe.candidate_.layers),
        "pooling": probe.candidate_.pooling,
    }
    if probe.estimate_ is not None:
        record |= {**probe.estimate_.to_metrics(), "loss": float(np.nanmean(probe.losses_))}
    return round_floats(record | {"candidates": probe.table_})


def describe_probe(record: dict[str, Any]) -> str:
    """Describe the choice, with the result of the simplest candidate for comparison."""
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


def describe_frozen(record: dict[str, Any]) -> dict[str, str | None]:
    """Say what was chosen for a frozen model: its geometry and its classifiers."""
    records = record.get("tasks", {"": record})
    chosen = join_texts({task: describe_probe(each) for task, each in records.items()})
    heads = None
    if "distillation_inference" in record:
        heads = describe_inference(
            record["distillation_inference"], record["distillation_losses"], "out of fold"
        )
    return {"resize": describe_geometry(record), "frozen": chosen, "heads": heads}


def join_texts(texts: Mapping[str, str]) -> str:
    """Join the texts of tasks as lines below one another; the text of the only one is as it is."""
    lines = [f"{task}: {text}" if task else text for task, text in texts.items()]
    return "\n".join(lines)


def describe_class_weights(frozen: FrozenModel) -> str | None:
    """Say what equal weights of the classes would change, from a second cross-validation.

    None if the classes have equal weights already, for several labels per image, and without folds.
    """
    probe = frozen.probe
    if probe.is_balanced or probe.lines_ is not None or not probe.num_folds_:
        return None
    # The images of the choice are the first ones.
    images = frozen.features.take(np.arange(len(probe.losses_)))
    tokens, _ = split_kinds(images.get_tokens())
    candidate = probe.candidate_
    weighted = LinearProbe(candidate.layers, candidate.pooling, "balanced")
    with threadpool_limits(limits=1):
        weighted.fit(tokens, images.labels, images.groups)

    known = np.isfinite(probe.losses_) & np.isfinite(weighted.losses_)
    labels = images.labels[known]
    classes, counts = np.unique(labels, return_counts=True)
    rarest = classes[counts.argmin()]
    rows = []
    for each in (probe, weighted):
        is_right = each.classes_[each.out_of_fold_[known].argmax(axis=1)] == labels
        measured = pd.DataFrame({"is_right": is_right, "loss": each.losses_[known]})
        means = measured.groupby(labels).mean()  # The means of each class
        rows.append(
            {
                f"recall of {frozen.labels.names[rarest]}": means["is_right"][rarest],
                "balanced accuracy": means["is_right"].mean(),
                "accuracy": is_right.mean(),
                "loss": means["loss"].mean(),
            }
        )
    before, after = rows
    advice = ""
    if after["loss"] < before["loss"] and after["balanced accuracy"] > before["balanced accuracy"]:
        advice = ". Choose it if rare classes matter as much as the others"
    texts = [f"{name} {before[name]:.1%} -> {after[name]:.1%}" for name in list(before)[:3]]
    return f"`class_balance='weights'` changes {', '.join(texts)}, in cross-validation{advice}"


def describe_threshold(probe: LinearProbe) -> str | None:
    """Say whether predictions mark images that show none of the classes, or what they lack.

    An image that shows none of several labels simply has none.
    """
    if probe.lines_ is not None:
        return None
    if probe.distance_threshold_ is not None:
        return (
            f"photos farther than {probe.distance_threshold_:.1f} from every class will be marked"
        )
    requirement = "CLS or the mean of the patches as pooling"
    # An image that every fold needs has no distance out of fold
    if np.isfinite(probe.losses_).sum() < MIN_DISTANCE_IMAGES:
        requirement = f"{MIN_DISTANCE_IMAGES} training images, in classes of two or more"
    elif probe.statistics_ is not None:
        requirement = "a class of three photos, which tell how much photos of a class differ"
    return f"photos that show none of the classes will not be marked: this requires {requirement}"


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
