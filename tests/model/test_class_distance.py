"""Distance to the nearest class: stored with the weights, equal to that of the statistics."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import build_tiny_config, randomize

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference.class_statistics import ClassStatistics


TOKENS = ((-2, "cls"), (-2, "mean"), (-1, "cls"))


@torch.no_grad()
def compute_features(model: Any, pixel_values: torch.Tensor) -> dict[tuple[int, str], np.ndarray]:
    """Return the features of the tokens from the hidden states."""
    states = model.vitcls(pixel_values, output_hidden_states=True).hidden_states
    num_prefix_tokens = model.config.token_layout.num_prefix_tokens
    features = {}
    for layer, kind in TOKENS:
        tokens = model.vitcls.normalize(states[layer])
        pooled = tokens[:, 0] if kind == "cls" else tokens[:, num_prefix_tokens:].mean(dim=1)
        features[layer, kind] = pooled.numpy()
    return features


def build_model(**fields: Any) -> tuple[Any, torch.Tensor, ClassStatistics]:
    """Return a classifier with the statistics of random images, the images, and the statistics."""
    model = randomize(ViTCLSForImageClassification(build_tiny_config(num_labels=3, **fields)))
    pixel_values = torch.randn(60, 3, *model.config.image_height_width)
    labels = np.arange(60) % 3
    statistics = ClassStatistics.fit(compute_features(model, pixel_values), labels, 3)
    statistics.set_in_model(model)
    return model.eval(), pixel_values, statistics


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["cls", "cls_mean"])
def test_the_distance_of_a_model_is_that_of_its_statistics(pooling: str) -> None:
    model, images, statistics = build_model(pooling=pooling)
    expected = statistics.compute_distances(compute_features(model, images[:4]))
    np.testing.assert_allclose(model(images[:4]).distance.numpy(), expected, rtol=1e-3)


@torch.no_grad()
def test_statistics_are_saved_and_loaded_with_the_weights(tmp_path: Path) -> None:
    model, images, statistics = build_model()
    model.save_pretrained(tmp_path)
    loaded = ViTCLSForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(images[:4]).distance, model(images[:4]).distance)
    stored = ClassStatistics.from_model(loaded)
    assert stored is not None
    np.testing.assert_allclose(stored.means[0], statistics.means[0], rtol=1e-5)


@torch.no_grad()
def test_logits_have_the_same_bits_with_and_without_statistics() -> None:
    model, images, _ = build_model()
    logits = model(images[:4]).logits
    model.remove_class_statistics()
    outputs = model(images[:4])
    assert torch.equal(outputs.logits, logits)
    assert outputs.distance is None


@torch.no_grad()
def test_statistics_survive_an_adaptation() -> None:
    model, images, _ = build_model()
    adapted = model.adapt(num_register_tokens=2).eval()
    difference = adapted(images[:4]).distance - model(images[:4]).distance
    assert difference.abs().max() < 0.01


def test_statistics_are_not_counted_as_parameters(tmp_path: Path) -> None:
    model, _, _ = build_model()
    model.save_pretrained(tmp_path)
    assert ModelFolder(tmp_path).num_parameters == model.num_parameters()
