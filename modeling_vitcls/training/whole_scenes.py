"""Fit the classifiers of the frozen encoder to images that are divided between scenes, not within them.

    divided images -> features -> near copies on both sides? -> divided again, with scenes as groups

A run divides its images before it has features. If it has drawn the held-out images itself, and many of
them nearly repeat training images, it draws them again, in the same way.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..data.images import LabeledImages
from ..data.splits import TrainingData, select_held_out
from ..data.splits_table import get_keys
from ..inference.frozen_features import Features
from ..inference.near_copies import MIN_SHARE, KnownScenes, keep_together
from ..runtime.distributed import run_on_main
from .frozen_encoder import MAX_START_IMAGES, ignore_message
from .heads import FrozenHead
from .plan import RunPlan
from .reporter import Reporter
from .run_inputs import RunInputs
from .summary import warn_about_images


def fit_frozen(
    inputs: RunInputs, plan: RunPlan, data: TrainingData, reporter: Reporter
) -> tuple[TrainingData, dict[str, FrozenHead], dict[str, Any], KnownScenes]:
    """Fit the classifiers, on another division of the images if near copies are on both sides.

    Returns:
        The division, and what `FrozenEncoder.fit` returns.
    """
    encoder = inputs.frozen_encoder
    assert encoder is not None, "the run has features"
    parts, warn, max_images = data.frozen_parts, reporter.warn, None
    if plan.kind == "steps":
        # The steps report the unreadable images.
        parts, warn, max_images = [data.train], ignore_message, MAX_START_IMAGES
    frozen, record, known = encoder.fit(parts, data.held_out, warn, max_images)
    near = record["near_copies"].get("near_held_out", ())
    images: Any = inputs.images.train
    # Groups that the dataset has stay, because their names are better evidence than features.
    has_groups = len(np.unique(images.groups)) < len(np.unique(images.keys))
    is_drawn = data.held_out_split is None and not has_groups
    has_few = len(near) <= MIN_SHARE * len(data.held_out)
    # A continued model is compared with itself, on images that its run held out, too.
    is_continued = inputs.fitted_rows is not None
    if is_continued or has_few or not is_drawn or "" not in frozen:
        return data, frozen, record, known

    head = frozen[""]
    assert head.held_out is not None, "near copies are held out"
    places = [
        locate(images, data.train)[head.features.indices],
        locate(images, data.held_out)[head.held_out.indices],
    ]
    features = replace(head.features.join(head.held_out), indices=np.concatenate(places))
    # On one process for all: rounding on another CPU could turn a close pair.
    fraction = len(data.held_out) / len(features.indices)
    scenes = run_on_main(partial(keep_together, features, known.max_distance, head.labels))[0]
    keys = images.keys[features.indices]
    drawn = LabeledImages(None, features.labels.tolist(), scenes.groups, keys)
    data = plan.divide(inputs.images, keys[select_held_out(drawn, fraction, 0, data.name)])
    reporter.print_line(
        "divided",
        f"again, because photos of one scene were on both sides: {len(data.train):,} training images, "
        f"{len(data.held_out):,} held-out images",
    )
    warn_about_images(inputs, plan, data, reporter)
    geometry = {name: record[name] for name in record if name in ("resize", "geometry", "seconds")}
    # Images without features are not drawn, so all unreadable ones are in the training part.
    train = take_part(features, images, data.train)
    held_out = replace(take_part(features, images, data.held_out), num_unreadable=0)
    return data, *encoder.fit_features(train, held_out, known.max_distance, geometry)


def locate(images: LabeledImages, part: LabeledImages) -> np.ndarray:
    """Find the indices of the images of a part, in ascending order."""
    return np.flatnonzero(np.isin(get_keys(images), get_keys(part)))


def take_part(features: Features, images: LabeledImages, part: LabeledImages) -> Features:
    """Take the features of the images of a part, with their indices in it."""
    places = locate(images, part)
    own = features.take(np.isin(features.indices, places))
    return replace(own, indices=np.searchsorted(places, own.indices))
