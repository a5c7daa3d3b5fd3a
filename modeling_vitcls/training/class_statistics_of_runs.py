"""Class statistics of a model that was trained with steps."""

from typing import Any

import numpy as np

from ..data.images import LabeledImages
from ..data.splits import TrainingData
from ..inference.class_statistics import KNOWN_RECALL, ClassStatistics, Token
from ..inference.frozen_features import FeatureLayout
from ..inference.linear_probe import MIN_DISTANCE_IMAGES, NUM_LAST_LAYERS
from ..model.modeling_vitcls import count_output_tokens
from .frozen_encoder import ignore_message
from .training_setup import TrainingSetup


MAX_STATISTICS_IMAGES = 5000  # Maximum number of images for the statistics of a trained model


def store_statistics(setup: TrainingSetup, data: TrainingData) -> None:
    """Store class statistics in a trained model, from one pass over some of its training images.

    An image is unknown if it is farther away than most images that the model was not trained on.
    """
    if setup.build_pass is None:
        return
    model = setup.model.eval()
    tokens, labels = compute_tokens(setup.build_pass, model, data.train)
    statistics = ClassStatistics.fit(tokens, labels, model.config.num_labels)
    other_images = data.held_out if data.selection is None else data.selection
    # The threshold comes from images that the model was not trained on: training images lie closer
    # to the means of their classes than any new image does.
    if len(other_images) >= MIN_DISTANCE_IMAGES:
        other_tokens, _ = compute_tokens(setup.build_pass, model, other_images)
        distances = statistics.compute_distances(other_tokens)
        threshold = float(np.quantile(distances, KNOWN_RECALL, method="higher"))
        model.config.distance_threshold = threshold
    statistics.set_in_model(model)


def compute_tokens(
    build_pass: Any, model: Any, images: LabeledImages
) -> tuple[dict[Token, np.ndarray], np.ndarray]:
    """Compute the inputs of the class statistics: the features of each token, and the labels."""
    layout = FeatureLayout.for_extra_heads(model.config, NUM_LAST_LAYERS)
    # The steps and evaluations have named the unreadable images
    statistics_pass = build_pass(images.draw(MAX_STATISTICS_IMAGES), layout, warn=ignore_message)
    features = statistics_pass(model)
    # An image without a label (-100) belongs to no mean.
    features = features.take(features.labels >= 0)
    tokens = features.get_tokens()
    # A classifier on CLS skips the patches of the last layer, so at inference they have no
    # distance.
    if count_output_tokens(model.vitcls, None, {}) is not None:
        del tokens[-1, "mean"]
    return tokens, features.labels
