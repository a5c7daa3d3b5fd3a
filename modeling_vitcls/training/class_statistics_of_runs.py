"""Class statistics of a model that was trained with steps."""

from typing import Any

import numpy as np

from ..data.images import LabeledImages
from ..data.splits import TrainingData
from ..frozen.class_statistics import KNOWN_RECALL, ClassStatistics, Token
from ..frozen.encoder import ignore_message
from ..frozen.features import FeatureLayout, Features, FrozenPass
from ..frozen.linear_probe import MIN_DISTANCE_IMAGES, NUM_LAST_LAYERS
from ..frozen.scenes import TrainedScenes
from ..model.modeling_vitcls import count_output_tokens
from .run_inputs import RunInputs


MAX_STATISTICS_IMAGES = 5000  # Maximum number of images for the statistics of a trained model


def store_statistics(inputs: RunInputs, data: TrainingData) -> TrainedScenes | None:
    """Store class statistics in a trained model, from one pass over some of its training images.

    An image is unknown if it is farther away than most images that the model was not trained on.

    Returns:
        What recognizes these training images, if the frozen encoder of the run measures how near they are.
    """
    model = inputs.model.eval()
    images = data.train.draw(MAX_STATISTICS_IMAGES)
    features = compute_labeled_features(inputs, images)
    tokens = select_tokens(model, features)
    statistics = ClassStatistics.fit(tokens, features.labels, model.config.num_labels)
    other_images = data.held_out if data.selection is None else data.selection
    # The threshold comes from images that the model was not trained on: training images lie closer
    # to the means of their classes than any new image does.
    if len(other_images) >= MIN_DISTANCE_IMAGES:
        others = compute_labeled_features(inputs, other_images.draw(MAX_STATISTICS_IMAGES))
        distances = statistics.compute_distances(select_tokens(model, others))
        threshold = float(np.quantile(distances, KNOWN_RECALL, method="higher"))
        model.config.distance_threshold = threshold
    statistics.set_in_model(model)
    if inputs.frozen_encoder is None:
        return None
    limit = inputs.frozen_encoder.measure_limit(images, features, inputs.processor)
    return TrainedScenes.of(features, limit)


def compute_labeled_features(inputs: RunInputs, images: LabeledImages) -> Features:
    """Compute the features of the images that have a label: others (-100) belong to no mean."""
    layout = FeatureLayout.for_extra_heads(inputs.model.config, NUM_LAST_LAYERS)
    # The steps and evaluations have named the unreadable images
    arguments = inputs.pass_arguments | {"warn": ignore_message}
    features = FrozenPass(images, layout, **arguments)(inputs.model)
    return features.take(features.labels >= 0)


def select_tokens(model: Any, features: Features) -> dict[Token, np.ndarray]:
    """Select the inputs of the class statistics: the features [N, D] of each token."""
    tokens = features.get_tokens()
    # A classifier on CLS skips the patches of the last layer, so at inference they have no
    # distance.
    if count_output_tokens(model.vitcls, {}) is not None:
        del tokens[-1, "mean"]
    return tokens
