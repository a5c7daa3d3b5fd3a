"""Class statistics of a model that was trained with steps, from one pass over some of its images."""

from functools import partial
from typing import Any

import numpy as np

from ..data.images import LabeledImages
from ..data.splits import TrainingData
from ..frozen.class_statistics import KNOWN_RECALL, ClassStatistics, Token
from ..frozen.encoder import ignore_message
from ..frozen.features import FeatureLayout, Features, compute_features
from ..frozen.heads import describe_unknown
from ..frozen.linear_probe import MIN_DISTANCE_IMAGES, NUM_LAST_LAYERS
from ..frozen.scenes import TrainedScenes, measure_limit
from ..model.modeling_vitcls import count_output_tokens
from .run_inputs import RunInputs


MAX_STATISTICS_IMAGES = 5000  # Maximum number of images for the statistics of a trained model


def store_statistics(inputs: RunInputs, data: TrainingData) -> tuple[TrainedScenes | None, str]:
    """Store class statistics in a trained model, from one pass over some of its training images.

    An image is unknown if it is farther away than most images that the model was not trained on.

    Returns:
        What recognizes these training images, if the frozen encoder of the run measures how near they
        are; and the line about images that will be marked as unknown.
    """
    model = inputs.model.eval()
    images = data.train.draw(MAX_STATISTICS_IMAGES)
    features = compute_labeled_features(inputs, images, inputs.processor)
    tokens = select_tokens(model, features)
    statistics = ClassStatistics.fit(tokens, features.labels, model.config.num_labels)
    other_images = data.held_out if data.selection is None else data.selection
    # The threshold comes from images that the model was not trained on: training images lie closer
    # to the means of their classes than any new image does.
    if len(other_images) >= MIN_DISTANCE_IMAGES:
        others = compute_labeled_features(
            inputs, other_images.draw(MAX_STATISTICS_IMAGES), inputs.processor
        )
        distances = statistics.compute_distances(select_tokens(model, others))
        threshold = float(np.quantile(distances, KNOWN_RECALL, method="higher"))
        model.config.distance_threshold = threshold
    statistics.set_in_model(model)
    unknown_text = describe_unknown(
        model.config.distance_threshold, f"{MIN_DISTANCE_IMAGES} held-out images"
    )
    if inputs.frozen_encoder is None:
        return None, unknown_text
    compute = partial(compute_labeled_features, inputs)
    limit = measure_limit(features, images, inputs.processor, compute)
    return TrainedScenes.of(features, limit), unknown_text


def compute_labeled_features(inputs: RunInputs, images: LabeledImages, processor: Any) -> Features:
    """Compute the features of the images that have a label: others (-100) belong to no mean."""
    layout = FeatureLayout.for_extra_heads(inputs.model.config, NUM_LAST_LAYERS)
    # The steps and evaluations have named the unreadable images
    arguments = inputs.pass_arguments | {"warn": ignore_message, "processor": processor}
    features = compute_features(inputs.model, images, layout, **arguments)
    return features.take(features.labels >= 0)


def select_tokens(model: Any, features: Features) -> dict[Token, np.ndarray]:
    """Select the inputs of the class statistics: the features [N, D] of each token."""
    tokens = features.get_tokens()
    # A classifier on CLS skips the patches of the last layer, so at inference they have no
    # distance.
    if count_output_tokens(model.vitcls, {}) is not None:
        del tokens[-1, "mean"]
    return tokens
