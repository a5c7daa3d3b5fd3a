"""Study: labels are looked at and corrected in rounds (model_cards/studies/rounds.md).

    python scripts/studies/rounds.py --encoder ENCODER --photos PHOTOS --output runs/rounds

ENCODER is a vitcls model, and PHOTOS has folders such as train and test with a folder per class. Every
image passes the encoder once. A person answers what a photo shows or, as a believer, what the classifier says.

run           30 photos of each class are a run, of which some labels are wrong, and the others measure it.
              Two rounds look at 60 photos each; the third has the right labels.
collection    20 photos of each class have labels. A third of the others is never looked at, and measures.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import tyro
from photos import (
    PhotoOptions,
    add_row,
    compute_features,
    has_row,
    list_photos,
    read_rows,
    write_page,
)

from modeling_vitcls.frozen.class_statistics import TokenFeatures
from modeling_vitcls.frozen.linear_probe import LinearProbe


NUM_LOOKS = 60  # In a round of a run
# Photos of each class, part of the labels that is wrong, which photos are looked at, and who answers
RUNS = (
    (10, 0.1, "contradicted", "eye"),
    (30, 0.1, "contradicted", "eye"),
    (30, 0.2, "contradicted", "eye"),
    (60, 0.1, "contradicted", "eye"),
    (30, 0.1, "random", "eye"),
    (30, 0.1, "contradicted", "believer"),
)
# Photos in each round, and which part is drawn at random: of 300 looks
PLANS = {"random": (300, 1.0), "at once": (300, 0.25), "six rounds": (50, 0.25)}


@dataclass(frozen=True)
class Options(PhotoOptions):
    """Encoder, images and size of the study."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds that draw the photos."""


@dataclass(frozen=True)
class Images:
    """Features of N images, and what they show."""

    features: TokenFeatures
    truth: np.ndarray  # [N]

    def take(self, rows: np.ndarray) -> TokenFeatures:
        return {token: values[rows] for token, values in self.features.items()}

    def fit(self, rows: np.ndarray, labels: np.ndarray, is_counted: Any = None) -> LinearProbe:
        return LinearProbe().fit(self.take(rows), labels, is_counted=is_counted)

    def measure(self, probe: LinearProbe, others: np.ndarray) -> dict[str, float]:
        """Compare what is stated with the accuracy on others."""
        assert probe.estimate_ is not None
        accuracy = float((probe.predict(self.take(others)) == self.truth[others]).mean())
        low, high = probe.estimate_["accuracy_interval"]
        return {
            "others": 100 * accuracy,
            "stated": 100 * probe.estimate_["accuracy"],
            "holds": 100.0 * (low <= accuracy <= high),
        }


def main() -> None:
    options = tyro.cli(Options)
    files = [file for folder in sorted(options.photos.iterdir()) for file in list_photos(folder)]
    truth = np.unique([file.parent.name for file in files], return_inverse=True)[1]
    images = Images(compute_features(options.encoder, files), truth)
    for seed in options.seeds:
        for size, noise, shown, person in RUNS:
            key = {"size": size, "noise": noise, "shown": shown, "person": person, "seed": seed}
            if not has_row(options.output, key):
                correct_labels(options, images, key)
        for plan in PLANS:
            if not has_row(options.output, {"plan": plan, "seed": seed}):
                label_collection(options, images, plan, seed)
    rows = read_rows(options.output)
    run = ("size", "noise", "shown", "person", "round")
    tables = [
        format_rows([row for row in rows if "size" in row], run),
        format_rows([row for row in rows if "plan" in row], ("plan", "round")),
    ]
    write_page(options.output, "\n\n".join("\n".join(table) for table in tables))


def correct_labels(options: Options, images: Images, key: Mapping[str, Any]) -> None:
    """Look at the photos of a run twice."""
    generator = np.random.default_rng(key["seed"])
    classes = np.unique(images.truth)
    by_class = [generator.permutation(np.flatnonzero(images.truth == each)) for each in classes]
    rows = np.concatenate([each[: key["size"]] for each in by_class])
    others = np.setdiff1d(np.arange(len(images.truth)), rows)
    truth = images.truth[rows]
    labels = truth.copy()
    wrong = generator.permutation(len(rows))[: round(key["noise"] * len(rows))]
    labels[wrong] = (labels[wrong] + generator.integers(1, len(classes), len(wrong))) % len(classes)

    is_seen = np.zeros(len(rows), bool)
    for number in range(4):
        if number == 3:
            labels = truth
        probe = images.fit(rows, labels)
        num_wrong = int((labels != truth).sum())
        result = {"round": number, "wrong": num_wrong, **images.measure(probe, others)}
        add_row(options.output, {**key, **result})

        answers = probe.classes_[probe.out_of_fold_.argmax(axis=1)]
        doubt = np.where(is_seen | (answers == labels), -np.inf, probe.losses_)
        shown = doubt.argsort()[::-1][: min(NUM_LOOKS, np.isfinite(doubt).sum())]
        if key["shown"] == "random":
            shown = generator.permutation(np.flatnonzero(~is_seen))[:NUM_LOOKS]
        is_seen[shown] = True
        labels[shown] = (answers if key["person"] == "believer" else truth)[shown]


def label_collection(options: Options, images: Images, plan: str, seed: int) -> None:
    """Label a collection in rounds, and measure how much of its table is right."""
    order = np.random.default_rng(seed).permutation(len(images.truth))
    pool, others = np.split(order, [2 * len(order) // 3])
    starts = [pool[images.truth[pool] == each][:20] for each in np.unique(images.truth)]
    rows = np.concatenate(starts)
    is_counted = np.ones(len(rows), bool)
    count, part = PLANS[plan]
    for number in range(300 // count + 1):
        probe = images.fit(rows, images.truth[rows], is_counted)
        everyone = images.fit(rows, images.truth[rows])
        probabilities = probe.predict_proba(images.take(pool))
        is_given = np.isin(pool, rows)
        is_right = probe.classes_[probabilities.argmax(axis=1)] == images.truth[pool]
        result = {"round": number, "table": 100 * float((is_given | is_right).mean())}
        result |= images.measure(probe, others)
        of_all = images.measure(everyone, others)
        result |= {"stated, all": of_all["stated"], "holds, all": of_all["holds"]}
        add_row(options.output, {"plan": plan, "seed": seed, **result})

        left = np.flatnonzero(~is_given)
        drawn, left = np.split(left, [round(part * count)])  # The order of the photos is drawn
        unsure = left[probabilities[left].max(axis=1).argsort()][: count - len(drawn)]
        rows = np.concatenate([rows, pool[drawn], pool[unsure]])
        is_counted = np.append(is_counted, np.repeat([True, False], [len(drawn), len(unsure)]))


def format_rows(rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[str]:
    """Format a table of the mean values of the rows with equal keys."""
    names = [name for name in rows[0] if name not in (*keys, "seed")]
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines = [f"| {' | '.join((*keys, *names))} |", "|---" * (len(keys) + len(names)) + "|"]
    for group, own in groups.items():
        means = [f"{fmean(row[name] for row in own):.1f}" for name in names]
        lines.append(f"| {' | '.join([*map(str, group), *means])} |")
    return lines


if __name__ == "__main__":
    main()
