"""Fit the classifiers of the frozen encoder to images that are divided between scenes, not within them.

    divided images -> features -> near copies on both sides? -> divided again, with scenes as groups -> features

A run divides its images before it has features. If it has drawn the held-out images itself, and many of
them nearly repeat training images, it draws them again, in the same way.
"""

from functools import partial
from typing import Any

import numpy as np

from ..data.images import LabeledImages
from ..data.splits import TrainingData, select_held_out
from ..data.splits_table import get_keys
from ..inference.near_copies import MIN_SHARE, KnownScenes, keep_together
from ..runtime.distributed import run_on_main
from .frozen_encoder import MAX_START_IMAGES, ignore_message
from .heads import FrozenHead
from .plan import RunPlan
from .reporter import Reporter
from .run_inputs import RunInputs
from .summary import warn_about_images


def fit_frozen(
    inputs: RunInputs, plan: RunPlan, data: TrainingData, reporter: Reporter, is_last: bool = False
) -> tuple[TrainingData, dict[str, FrozenHead], dict[str, Any], KnownScenes]:
    """Fit the classifiers, on another division of the images if near copies are on both sides.

    Args:
        inputs, plan, data: of the run.
        reporter: output of the run.
        is_last: whether the division stays as it is.

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
    # A person knows better than features which images belong together.
    has_groups = len(np.unique(images.groups)) < len(np.unique(images.keys))
    is_drawn = data.held_out_split is None and not has_groups
    has_few = len(near) <= MIN_SHARE * len(data.held_out)
    # A continued model is compared with itself, on images that its run held out, too.
    is_continued = inputs.fitted_rows is not None
    if is_last or is_continued or has_few or not is_drawn or "" not in frozen:
        return data, frozen, record, known

    # On one process for all: rounding on another CPU could turn a close pair.
    keys = run_on_main(partial(hold_out_scenes, data, frozen[""], known.max_distance))
    data = plan.divide(inputs.images, keys)
    reporter.print_line(
        "divided",
        f"again, because photos of one scene were on both sides: {len(data.train):,} training images, "
        f"{len(data.held_out):,} held-out images",
    )
    warn_about_images(inputs, plan, data, reporter)
    return fit_frozen(inputs, plan, data, reporter, is_last=True)


def hold_out_scenes(data: TrainingData, head: FrozenHead, max_distance: float) -> np.ndarray:
    """Draw as many held-out images again, with scenes as groups, and return their keys.

    Training images without features are not drawn.

    Args:
        data: the division so far.
        head: with the features of both sides.
        max_distance: of near copies.
    """
    held_out = head.held_out
    assert held_out is not None, "near copies are held out"
    keys = get_keys(data.train)[head.features.indices]
    keys = np.append(keys, get_keys(data.held_out)[held_out.indices])
    features, _ = keep_together(head.features.join(held_out), max_distance, head.labels)
    images = LabeledImages(None, features.labels.tolist(), features.groups, keys)
    fraction = len(data.held_out) / len(keys)
    return keys[select_held_out(images, fraction, 0, data.name)]
