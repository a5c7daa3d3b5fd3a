"""Photos that nearly repeat another one: several shots of one scene, found by a frozen encoder.

    features -> fit_finder -> CopyFinder.keep_together -> groups, so that no fold divides a scene
                                        .find_pairs    -> held-out photos that repeat training photos

Classifiers recognize a scene that they were trained on, whatever its label: sixteen objects with
five shots each and random labels had an accuracy of 100 % in folds that divide them.

The cosine is that of whitened features of the earliest layer, which tell scenes apart better than
those of the last layer, which tell classes apart. How near is near depends on the encoder and on the
photos, so it is measured: photos are near if their cosine is above `NEAR_PART` of that of a photo and
itself mirrored, or moved. With a trained ViT-S/14, this keeps 96 % of the pairs of such shots together, and
joins 2 of 250 photos of clothing and none of CIFAR-10.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.covariance import ledoit_wolf
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from ..data.splits import join_groups
from ..runtime.errors import format_name_list
from .frozen_features import Features


NUM_CHANGED = 5  # Photos that pass the encoder again, after each change
MOVED_PART = 0.05  # Part of each side that is cut off
NEAR_PART = 0.4
NUM_NEIGHBORS = 10  # A scene is a chain of neighbors, so a few of each photo connect it
NUM_NAMED_PAIRS = 3
MIN_SHARE = 0.05  # Part of the photos from which a run says that it has kept scenes together


@dataclass(frozen=True)
class CopyFinder:
    """Finds the photos that show one scene.

    Attributes:
        whitenings: mean [D] and matrix [D, D] for each token of the earliest layer.
        min_cosine: from which photos are near.
    """

    whitenings: Sequence[tuple[np.ndarray, np.ndarray]]
    min_cosine: float

    def describe(self, features: Features) -> np.ndarray:
        """Compute vectors [N, F] whose products are cosines, the mean over the tokens."""
        parts = [
            normalize((values - mean) @ matrix)
            for values, (mean, matrix) in zip(list_earliest(features), self.whitenings, strict=True)
        ]
        return np.concatenate(parts, axis=1) / np.sqrt(len(parts))

    def find_pairs(self, features: Features, others: Features | None = None) -> np.ndarray:
        """Find near photos: pairs [P, 2] of rows, the nearest pair first.

        Each pair is a row of `others`, or of the features without them, and a row of the features.
        """
        vectors = self.describe(features)
        num_neighbors = min(NUM_NEIGHBORS, len(vectors) - (others is None))
        neighbors = NearestNeighbors(n_neighbors=num_neighbors, algorithm="brute").fit(vectors)
        distances, columns = neighbors.kneighbors(others and self.describe(others))
        rows, places = np.nonzero(distances**2 < 2 - 2 * self.min_cosine)
        order = distances[rows, places].argsort(kind="stable")
        return np.stack([rows, columns[rows, places]], axis=1)[order]

    def name_near(self, features: Features, held_out: Features) -> list[str]:
        """Name the held-out photos that nearly repeat a photo."""
        near = np.unique(self.find_pairs(features, held_out)[:, 0])
        return held_out.names[near].tolist()  # type: ignore[no-any-return]

    def keep_together(
        self, features: Features, names: Sequence[str] | None
    ) -> tuple[Features, dict[str, Any]]:
        """Join the groups of photos with scenes, and record what was found.

        A scene that contains a whole class stays divided, because the class could not be measured
        otherwise.

        Args:
            features: of the photos.
            names: of the labels; None if photos have several.
        """
        pairs = self.find_pairs(features)
        num_photos = len(features.names)
        scenes = number_scenes(pairs, num_photos)
        labels = np.zeros(num_photos, int) if names is None else features.labels
        sizes = np.bincount(scenes)[scenes]
        class_sizes = np.bincount(labels)[labels]
        _, part, counts = np.unique(
            [scenes, labels], axis=1, return_inverse=True, return_counts=True
        )
        is_whole_class = (counts[part] == class_sizes) & (class_sizes > 1)
        is_kept = (sizes > 1) & ~np.isin(scenes, scenes[is_whole_class])
        _, known = np.unique(features.groups, return_inverse=True)
        groups = join_groups(known, np.where(is_kept, scenes, num_photos + np.arange(num_photos)))

        # One pair of a scene, the nearest ones; photos with two labels come first.
        has_one_label = labels[pairs[:, 0]] == labels[pairs[:, 1]]
        # Among many shots, a photo may be a neighbor of one that is no neighbor of it.
        num_contradictions = len(np.unique(np.sort(pairs[~has_one_label]), axis=0))
        pairs = pairs[np.argsort(has_one_label, kind="stable")]
        nearest = np.sort(np.unique(scenes[pairs[:, 0]], return_index=True)[1])[:NUM_NAMED_PAIRS]
        record = {
            "num_photos": num_photos,
            "are_alike": self.min_cosine == 1,
            "num_near": int(is_kept.sum()),
            "num_groups": len(np.unique(scenes[is_kept])),
            "divided_classes": [
                (names or [""])[label] for label in np.unique(labels[is_whole_class])
            ],
            "num_contradictions": num_contradictions,
            "pairs": features.names[pairs[nearest]].tolist(),
        }
        return replace(features, groups=groups), record


def move(image: Image.Image) -> Image.Image:
    """Cut off a part of a photo at the left and at the top."""
    width, height = image.size
    return image.crop((int(MOVED_PART * width), int(MOVED_PART * height), width, height))


CHANGES = (ImageOps.mirror, move)


def fit_finder(features: Features, own: Features, changed: Sequence[Features]) -> CopyFinder:
    """Whiten features, and measure how near photos are to themselves after each change.

    Args:
        features: of all photos.
        own, changed: of some photos and of each change of them, in the same order.
    """
    whitenings = []
    for values in list_earliest(features):
        mean = values.mean(axis=0)
        variances, axes = np.linalg.eigh(ledoit_wolf(values - mean, assume_centered=True)[0])
        # Equal photos have no variance.
        smallest = max(variances.max() * 1e-6, 1e-12)
        whitenings.append((mean, axes / np.sqrt(np.maximum(variances, smallest))))
    finder = CopyFinder(whitenings, min_cosine=0)
    vectors = finder.describe(own)
    cosines = [np.median((vectors * finder.describe(each)).sum(axis=1)) for each in changed]
    finder = replace(finder, min_cosine=NEAR_PART * float(max(cosines)))
    scenes = number_scenes(finder.find_pairs(features), len(features.names))
    # Where most photos are alike, as digits are, the features do not tell scenes apart.
    are_alike = np.bincount(scenes).max() > len(scenes) / 2
    return replace(finder, min_cosine=1) if are_alike else finder


def number_scenes(pairs: np.ndarray, num_photos: int) -> np.ndarray:
    """Number the scenes [N] of photos: each pair is in one."""
    graph = coo_array((np.ones(len(pairs), bool), pairs.T), shape=(num_photos, num_photos))
    return connected_components(graph, directed=False)[1]  # type: ignore[no-any-return]


def list_earliest(features: Features) -> list[np.ndarray]:
    """List the features [N, D] of each token of the earliest layer."""
    tokens = features.get_tokens()
    earliest = min(layer for layer, _ in tokens)
    return [values for (layer, _), values in tokens.items() if layer == earliest]


def describe_scenes(record: Mapping[str, Any]) -> str | None:
    """Say how many photos nearly repeat another one, or that it is unknown; None if there are few."""
    lines = []
    if record["are_alike"]:
        lines.append(
            "more than half of the photos are alike to this encoder, so scenes cannot be told apart, and "
            "none is kept together. If these are shots of one scene, the result is too good: name "
            "scenes with sub-folders or `group_column`"
        )
    if record["num_near"] > MIN_SHARE * record["num_photos"]:
        lines.append(
            f"{record['num_near']:,} of {record['num_photos']:,} photos nearly repeat another one, in "
            f"{record['num_groups']:,} groups; each group is kept together"
        )
    if classes := record["divided_classes"]:
        lines.append(
            f"all photos of {format_name_list(classes)} nearly repeat one another and cannot be kept "
            "together, so the result only holds for further shots of one scene. Add photos of others"
        )
    if number := record["num_contradictions"]:
        first, second = record["pairs"][0]
        lines.append(
            f"{number:,} pairs of photos that nearly repeat one another have two labels, such as "
            f"{first} and {second}. Check their labels"
        )
    if near := record.get("near_held_out"):
        lines.append(
            f"{len(near):,} held-out photos nearly repeat training photos, such as {near[0]}, so the "
            "result is better than for new photos"
        )
    return "\n".join(lines) or None
