"""Class statistics of a model that was trained with steps, from one pass over some of its images."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..data.splits import TrainingData
from ..frozen.class_statistics import KNOWN_RECALL, ClassStatistics
from ..frozen.head_search import ignore_message
from ..frozen.heads import describe_unknown
from ..frozen.linear_probe import MIN_DISTANCE_IMAGES
from ..frozen.scenes import TrainedScenes, measure_limit
from ..inference.features import (
    NUM_LAST_LAYERS,
    FeatureLayout,
    Features,
    FrozenEncoder,
    Token,
)
from ..speed.packed import count_output_tokens
from .run_inputs import RunInputs


MAX_STATISTICS_IMAGES = 5000  # Maximum number of images for the statistics of a trained model


@dataclass(frozen=True)
class StoredStatistics:
    """What came of the statistics besides what is stored in the model.

    Attributes:
        trained_scenes: recognizes the training images; None if the run has no frozen start, which
            measures how near they are.
        unknown_text: about images that will be marked as unknown.
    """

    trained_scenes: TrainedScenes | None
    unknown_text: str


def store_statistics(inputs: RunInputs, data: TrainingData) -> StoredStatistics:
    """Store class statistics in a trained model, from one pass over some of its training images.

    An image is unknown if it is farther away than most images that the model was not trained on.
    """
    model = inputs.model.eval()
    # The steps and evaluations have named the unreadable images
    encoder = FrozenEncoder(model, **inputs.pass_arguments | {"warn": ignore_message})
    layout = FeatureLayout.for_extra_heads(model.config, NUM_LAST_LAYERS)
    compute = partial(encoder.compute_labeled_features, layout=layout)
    images = data.train.draw(MAX_STATISTICS_IMAGES)
    features = compute(images)
    tokens = select_tokens(model, features)
    statistics = ClassStatistics.fit(tokens, features.labels, model.config.num_labels)
    other_images = data.held_out if data.selection is None else data.selection
    # The threshold comes from images that the model was not trained on: training images lie closer
    # to the means of their classes than any new image does.
    if len(other_images) >= MIN_DISTANCE_IMAGES:
        others = compute(other_images.draw(MAX_STATISTICS_IMAGES))
        distances = statistics.compute_distances(select_tokens(model, others))
        threshold = float(np.quantile(distances, KNOWN_RECALL, method="higher"))
        model.config.distance_threshold = threshold
    statistics.set_in_model(model)
    unknown_text = describe_unknown(
        model.config.distance_threshold, f"{MIN_DISTANCE_IMAGES} held-out images"
    )
    trained_scenes = None
    if inputs.head_search is not None:
        limit = measure_limit(features, images, inputs.processor, compute)
        trained_scenes = TrainedScenes.of(features, limit)
    return StoredStatistics(trained_scenes, unknown_text)


def select_tokens(model: Any, features: Features) -> dict[Token, np.ndarray]:
    """Select the inputs of the class statistics: the features [N, D] of each token."""
    tokens = features.get_tokens()
    # A classifier on CLS skips the patches of the last layer, so at inference they have no
    # distance.
    if count_output_tokens(model.vitcls) is not None:
        del tokens[-1, "mean"]
    return tokens
