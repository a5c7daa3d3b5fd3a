"""Effects of ablations in numbers, and their intervals, compared with SciPy and direct computations."""

import numpy as np
import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config
from helpers.varied_models import collect_findings
from scipy import stats
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn

from modeling_vitcls import ViTCLSModel
from modeling_vitcls.analysis.ablation import replace_by_means
from modeling_vitcls.analysis.effects import compute_effect
from modeling_vitcls.analysis.model_outputs import Features, Predictions, collect_outputs
from modeling_vitcls.conversion.random_weights import randomize_weights
from modeling_vitcls.heads_vitcls import IGNORED_LABEL


def test_effects_in_numbers() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    before = Predictions(logits, torch.tensor([[0], [1]]), torch.tensor([[0], [0]]))
    after = Predictions(logits + torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.tensor([[0], [0]]), before.labels)
    found = compute_effect(before, after)
    assert (found.changed_answers, found.logit_change, found.accuracy_change, found.num_images) == (0.5, 2.0, 0.5, 2)
    assert (found.improvement, found.is_better_than_chance) == (0.5, False)
    assert found.changed_interval == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert found.logit_interval == pytest.approx((0.0, 8**0.5)) and found.interval == found.logit_interval
    alike = Predictions(torch.full((2, 2), 100.0), before.predicted, None)
    rounding = Predictions(alike.logits + 1e-5, before.predicted, None)
    same = compute_effect(alike, alike)
    assert (same.changed_answers, same.logit_change, same.accuracy_change, same.improvement) == (0.0, 0.0, None, None)
    assert compute_effect(alike, rounding).logit_change < 1e-3  # not divided by a variation of zero
    nothing = Predictions(torch.zeros(2, 2), before.predicted, None)
    assert compute_effect(nothing, nothing).logit_change == 0


def test_the_improvement_is_an_exact_test_of_the_images_whose_correctness_changes() -> None:
    """Five images are gained and one is lost. Unknown labels do not count."""
    right = torch.tensor([[0]] * 9 + [[IGNORED_LABEL]] * 3)
    first = Predictions(torch.zeros(12, 2), torch.tensor([[1]] * 5 + [[0]] * 4 + [[1]] * 3), right)
    second = Predictions(torch.zeros(12, 2), torch.tensor([[0]] * 5 + [[1]] + [[0]] * 6), right)
    assert compute_effect(first, second).improvement == pytest.approx(7 / 64)
    assert compute_effect(second, first).improvement == pytest.approx(63 / 64)
    assert compute_effect(first, first).improvement == 1
    assert compute_effect(first, second).accuracy_change == pytest.approx(4 / 9)
    balanced = torch.arange(20)[:, None] % 2
    wrong, correct = (Predictions(torch.zeros(20, 2), labels, balanced) for labels in (1 - balanced, balanced))
    assert compute_effect(wrong, correct).is_better_than_chance is True  # after the ablation
    assert compute_effect(correct, wrong).is_better_than_chance is False


def test_intervals_are_bootstrap_intervals_over_images() -> None:
    """The logits have a standard deviation of 1 over images. Compare with the bootstrap of SciPy."""
    signs, changes = torch.tensor([1.0, -1.0]).repeat(200), torch.rand(400, generator=torch.Generator().manual_seed(0))
    before = Predictions(signs[:, None].repeat(1, 2), torch.zeros(400, 1), None)
    after = Predictions(before.logits + changes[:, None], before.predicted, None)
    expected = stats.bootstrap([changes.square().numpy()], np.mean, method="percentile", rng=0).confidence_interval
    found = compute_effect(before, after)
    assert found.logit_change == pytest.approx(changes.square().mean().sqrt().item(), rel=1e-5)
    assert found.logit_interval == pytest.approx([end**0.5 for end in expected], rel=0.01)


def test_features_of_encoders_are_compared_by_cosine_similarity() -> None:
    encoder = randomize_weights(ViTCLSModel(build_tiny_config(num_register_tokens=1)))
    before = collect_outputs(encoder, lambda: [(build_images(20), None)])
    assert set(before.vectors) == {"cls", "pooled", "patches"} and len(before) == 20
    with replace_by_means(encoder, [1], collect_findings(encoder, build_images(20)).mean_states[:, [1]]):
        after = collect_outputs(encoder, lambda: [(build_images(20), None)])
    found = compute_effect(before, after)
    for name, rows in before.vectors.items():
        cosines = [
            nn.functional.cosine_similarity(*pair, dim=-1).mean()
            for pair in zip(rows, after.vectors[name], strict=True)
        ]
        assert found.cosine_change[name] == pytest.approx(1 - torch.stack(cosines).mean().item(), abs=1e-5)
    assert found.size == max(found.cosine_change.values()) and found.num_images == 20
    largest = max(found.cosine_change, key=lambda name: found.cosine_change[name])
    changes = [
        1 - nn.functional.cosine_similarity(*pair, dim=-1).mean().item()
        for pair in zip(before.vectors[largest], after.vectors[largest], strict=True)
    ]
    expected = stats.bootstrap([changes], np.mean, method="percentile", rng=0).confidence_interval
    assert found.interval == pytest.approx(list(expected), rel=0.1)
    nearest = []  # the 5 most similar other images before and after
    for features in (before, after):
        similarities = cosine_similarity(torch.stack(features.vectors["cls"]).flatten(1))
        np.fill_diagonal(similarities, -1)
        nearest.append([set(row) for row in similarities.argsort(axis=1)[:, -5:].tolist()])
    num_same = sum(len(one & other) for one, other in zip(*nearest, strict=True))
    assert found.knn_agreement == pytest.approx(num_same / (5 * 20)) and num_same < 5 * 20
    assert compute_effect(before, before).knn_agreement == 1
    assert compute_effect(before.select(range(4)), after.select(range(4))).knn_agreement is None


def test_the_interval_of_features_is_the_interval_of_the_largest_mean_distance() -> None:
    """The CLS features of all images change by 0.4; the pooled features of one image change by 1."""
    unit, turned = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]])
    before = Features({name: [unit] * 4 for name in ("cls", "pooled", "patches")})
    pooled = [torch.tensor([[0.0, 1.0]]), unit, unit, unit]
    found = compute_effect(before, Features({"cls": [turned] * 4, "pooled": pooled, "patches": [unit] * 4}))
    assert found.cosine_change == pytest.approx({"cls": 0.4, "pooled": 0.25, "patches": 0.0})
    assert found.interval == pytest.approx((0.4, 0.4))
