"""What a run says of itself after a person has answered: three cases with a known truth.

Photos are points of four classes, and 4,000 others tell how many are really right.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest

from modeling_vitcls.data.answers import CHANGED, CONTRADICTED, find_counted
from modeling_vitcls.data.labels import OneLabel
from modeling_vitcls.frozen.curve import measure_learning_curve
from modeling_vitcls.frozen.heads import FrozenHead
from modeling_vitcls.frozen.linear_probe import LinearProbe
from modeling_vitcls.inference.features import FeatureLayout, Features
from modeling_vitcls.inference.stated_result import Measurement, state_result
from modeling_vitcls.training.answered import judge_answers


TOKEN = (-1, "cls")
NUM_DIMENSIONS = 12


@dataclass(frozen=True)
class Photos:
    points: np.ndarray
    labels: np.ndarray

    @classmethod
    def draw(cls, number: int, seed: int) -> "Photos":
        generator = np.random.default_rng(seed)
        labels = np.arange(number) % 4
        centers = 2.1 * np.eye(4, NUM_DIMENSIONS)
        return cls(centers[labels] + generator.normal(size=(number, NUM_DIMENSIONS)), labels)

    def join(self, other: "Photos") -> "Photos":
        return Photos(
            *map(np.concatenate, zip(vars(self).values(), vars(other).values(), strict=True))
        )

    def take(self, rows: np.ndarray) -> "Photos":
        return Photos(self.points[rows], self.labels[rows])


OTHERS = Photos.draw(4000, 1)


def fit(photos: Photos, chosen: np.ndarray | None = None) -> LinearProbe:
    probe = LinearProbe(layers=(-1,), pooling="cls")
    return probe.fit({TOKEN: photos.points}, photos.labels, is_counted=find_counted(chosen))


def measure(probe: LinearProbe) -> float:
    return float((probe.predict({TOKEN: OTHERS.points}) == OTHERS.labels).mean())


def build_head(photos: Photos, chosen: np.ndarray) -> FrozenHead:
    number = len(photos.labels)
    return FrozenHead(
        task="",
        probe=fit(photos, chosen),
        tokens=(TOKEN,),
        labels=OneLabel({"label": list("abcd")}),
        features=Features(
            labels=photos.labels,
            indices=np.arange(number),
            names=np.arange(number).astype(str),
            groups=np.arange(number),
            chosen=chosen,
            features=photos.points,
            layout=FeatureLayout(1, {"cls": NUM_DIMENSIONS}),
        ),
        held_out=None,
    )


def judge(photos: Photos, chosen: np.ndarray) -> tuple[dict[str, Any], str | None]:
    """Fit a run, and return its metrics and the line about those that do not measure it."""
    head = build_head(photos, chosen)
    assert head.probe.estimate_ is not None
    counted = int(head.probe.is_counted_.sum())
    assert len(head.predict_out_of_fold().labels) == counted
    metrics = {"num_images": counted, **head.probe.estimate_}
    return metrics, judge_answers(head, metrics)


def is_within(truth: float, metrics: dict[str, Any]) -> bool:
    low, high = metrics["accuracy_interval"]
    return bool(low <= truth <= high)


@cache
def add_unsure() -> tuple[Photos, np.ndarray]:
    """Add the photos that a model is least sure about, and some that are drawn at random."""
    photos = Photos.draw(120, 2)
    collection = Photos.draw(600, 3)
    confidence = fit(photos).predict_proba({TOKEN: collection.points}).max(axis=1)
    drawn = np.arange(40)
    unsure = 40 + confidence[40:].argsort()[:120]
    chosen = np.array([""] * 120 + ["random"] * 40 + ["unsure"] * 120, object)
    return photos.join(collection.take(np.concatenate([drawn, unsure]))), chosen


def test_photos_that_a_model_was_unsure_about_train_and_do_not_measure() -> None:
    photos, chosen = add_unsure()
    metrics, text = judge(photos, chosen)
    truth = measure(fit(photos, chosen))
    assert is_within(truth, metrics)
    assert metrics["num_images"] == 160
    assert text is not None
    assert text.startswith("120 photos train the classifier and do not measure it")
    # Without the rule, the estimate is of harder photos
    assert not is_within(truth, judge(photos, np.full(280, "", object))[0])
    # They do train: the classifier differs from one without them
    assert len(fit(photos, chosen).out_of_fold_) == 280


def test_probabilities_and_the_limit_of_unknown_photos_are_measured_on_the_same_photos() -> None:
    photos, chosen = add_unsure()
    everyone, counted = fit(photos), fit(photos, chosen)
    assert np.isfinite(counted.losses_).sum() == 160
    assert counted.temperature_ < everyone.temperature_  # It is surer of photos that are easier

    def compute_loss(probe: LinearProbe) -> float:
        probabilities = probe.predict_proba({TOKEN: OTHERS.points})
        return float(-np.log(probabilities[np.arange(4000), OTHERS.labels]).mean())

    assert compute_loss(counted) < compute_loss(everyone)


def test_the_curve_is_measured_on_the_same_photos() -> None:
    photos, chosen = add_unsure()
    curves = []
    for each in (chosen, np.full(280, "", object)):
        curve = measure_learning_curve(None, build_head(photos, each))
        assert curve is not None
        curves.append(curve["accuracy"][-1])
    truth = measure(fit(photos, chosen))
    assert abs(curves[0] - truth) < abs(curves[1] - truth) - 0.05


@pytest.fixture(scope="module")
def planted() -> tuple[Photos, np.ndarray, np.ndarray]:
    """Return 240 photos of which a tenth has a wrong label, what they show, and the 60 most doubtful."""
    photos = Photos.draw(240, 4)
    labels = photos.labels.copy()
    labels[::10] = (labels[::10] + 1) % 4
    probe = fit(Photos(photos.points, labels))
    answers = probe.out_of_fold_.argmax(axis=1)
    doubt = np.where(answers == labels, -1, probe.losses_)
    shown = doubt.argsort()[::-1][:60]
    return Photos(photos.points, labels), photos.labels, shown[doubt[shown] > 0]


def test_labels_that_were_corrected_by_what_the_photos_show_are_counted(
    planted: tuple[Photos, np.ndarray, np.ndarray],
) -> None:
    photos, truth, shown = planted
    labels = photos.labels.copy()
    labels[shown] = truth[shown]
    chosen = np.full(240, "", object)
    chosen[shown] = np.where(truth[shown] == photos.labels[shown], CONTRADICTED, CHANGED)
    corrected = Photos(photos.points, labels)
    metrics, text = judge(corrected, chosen)
    assert text is None
    assert metrics["num_images"] == 240
    assert is_within(measure(fit(corrected)), metrics)


def test_who_believes_the_model_gets_no_estimate(
    planted: tuple[Photos, np.ndarray, np.ndarray],
) -> None:
    photos, _, shown = planted
    labels = photos.labels.copy()
    labels[shown] = fit(photos).out_of_fold_.argmax(axis=1)[shown]
    chosen = np.full(240, "", object)
    chosen[shown] = CHANGED
    metrics, _ = judge(Photos(photos.points, labels), chosen)
    assert "accuracy_interval" not in metrics
    statement = Measurement("", "accuracy", metrics, 10).statement
    assert "%" not in statement
    assert "No estimate: " in statement
    count = f"{len(shown)} of {len(shown)} labels that a classifier contradicted were changed"
    assert count in statement


def test_photos_that_a_model_was_unsure_about_alone_are_no_estimate() -> None:
    photos, _ = add_unsure()
    metrics, _ = judge(photos, np.full(280, "unsure", object))
    assert "a model was unsure about all of these photos" in state_result(metrics)


def test_the_result_says_that_only_photos_drawn_from_a_collection_measure_it() -> None:
    photos, _ = add_unsure()
    chosen = np.array(["random"] * 50 + ["unsure"] * 230, object)
    statement = state_result(judge(photos, chosen)[0])
    assert " of this collection (" in statement
    assert statement.endswith("): photos drawn at random from it")


def test_few_photos_that_were_drawn_are_a_count_and_how_many_more_to_look_at() -> None:
    photos, _ = add_unsure()
    chosen = np.array(["random"] * 24 + ["unsure"] * 256, object)
    statement = state_result(judge(photos, chosen)[0])
    assert " of 24 right (95%: " in statement
    assert statement.endswith(
        "photos drawn at random from it. Look at 6 more such photos for an estimate"
    )
