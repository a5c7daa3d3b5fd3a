"""Scenes: photos that are near one another in the features of a frozen encoder, such as shots of one thing.

    features -> measure_limit -> keep_together -> groups, so that no fold divides a scene
                                 TrainedScenes, a file of the model -> held-out and evaluated photos of training scenes

Classifiers recognize a scene that they were trained on, whatever its label: sixteen objects with
five shots each and random labels had an accuracy of 100 % in folds that divide them.

What is compared are CLS and the mean of the patches in the earliest layer, which tell scenes apart
better than those of the last layer, which tell classes apart. How near is near depends on the encoder and
the photos, so it is measured, in units of the distance of a photo and its mirror image: photos nearer than 2
are shots of a scene. Many photos with such a neighbor are a set of scenes, whose shots by a moved camera
are farther apart, so the limit is then 4. With a trained ViT-S/14, this keeps 60 of 64 things whole, of which
a hand took five shots each (turned by up to 12 degrees; 22 with the limit 2 alone), and joins
0.4% of 450 photos of clothing, none of 300 of CIFAR-10 and 4% of 200 products on white.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.metrics.pairwise import cosine_distances
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from ..data.dataset import connect, join_groups
from ..data.images import LabeledImages
from ..data.labels import LabelSpace
from ..hub.model_files import SCENES_FILE
from ..hub.model_folder import ModelFolder
from ..inference.features import FeatureLayout, Features
from ..runtime.distributed import run_on_main
from ..runtime.errors import explain_damage, format_name_list, warn_on_first_process
from ..speed.fast_images import compute_pixels


NUM_MIRRORED = 8  # Photos whose mirror images pass the encoder
MIRROR_PARTS = (2.0, 4.0)  # Limits: of any photos, and of sets of scenes
MIN_SCENES_SHARE = 0.1  # Part of the photos in scenes from which a set is one of scenes
# Part of the limit below which two labels are doubtful. With random weights, 64 of 162 near pairs show two
# scenes, but none of 64 pairs that are nearer than half the distance of a mirror image.
CONTRADICTION_PART = 0.25
# Smallest median distance between photos of different scenes, in units of the mirror images' distance:
# 12 to 26 for photographs, and below 8 for most pairs of digits
MIN_CONTRAST = 8.0
MAX_COMPARED = (
    1000  # Number of photos, drawn at random, whose distances are compared with all others
)
NUM_NEIGHBORS = 10  # A scene is a chain of neighbors, so a few of each photo connect it
NUM_PROJECTIONS = 256  # Bytes of a stored photo
CODE_SCALE = 30  # Codes per standard deviation of a projection
NUM_NAMED_PAIRS = 3
MIN_SHARE = 0.05  # Part of the photos from which a run says that it has kept scenes together


def compute_vectors(features: Features) -> np.ndarray:
    """Compute vectors [N, F] whose products are cosines, the mean over the tokens."""
    tokens = features.get_tokens()
    earliest = min(layer for layer, _ in tokens)
    parts = [normalize(values) for (layer, _), values in tokens.items() if layer == earliest]
    return normalize(np.concatenate(parts, axis=1))  # type: ignore[no-any-return]


class MirroringProcessor:
    """An image processor of mirror images, whose features are kept like those of photos."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image, return_tensors: str) -> dict[str, Any]:
        return {"pixel_values": compute_pixels(self.processor, ImageOps.mirror(image))[None]}

    def to_dict(self) -> dict[str, Any]:
        return self.processor.to_dict() | {"is_mirrored": True}


def measure_limit(
    features: Features,
    images: LabeledImages,
    processor: Any,
    run_pass: Callable[..., Features],
) -> float:
    """Measure below which cosine distance photos are near; 0 if the encoder cannot tell scenes apart.

    A few photos pass the encoder again, as mirror images.

    Args:
        features: of the readable ones of the images.
        images: the photos.
        processor: their image processor.
        run_pass: computes these features of images with a `processor`.
    """
    drawn = np.random.default_rng(0).permutation(len(features.names))[:NUM_MIRRORED]
    own = features.take(drawn)
    mirrored = run_pass(images.select(own.indices), processor=MirroringProcessor(processor))
    # On one process for all: rounding on another CPU could turn a close pair.
    return run_on_main(compute_limit, features, own, mirrored)  # type: ignore[no-any-return]


def compute_limit(features: Features, own: Features, mirrored: Features) -> float:
    """Compute the limit from some photos and their mirror images, in the same order."""
    cosines = (compute_vectors(own) * compute_vectors(mirrored)).sum(axis=1)
    mirror_distance = float(1 - np.median(cosines))
    limit = 0.0
    for part in MIRROR_PARTS:
        wider = part * mirror_distance
        pairs, _ = find_pairs(features, wider)
        scenes = connect(pairs, len(features.names))
        if not are_distinct(features, scenes, wider, MIN_CONTRAST * mirror_distance):
            break
        limit = wider
        if np.mean(np.bincount(scenes)[scenes] > 1) < MIN_SCENES_SHARE:
            break
    return limit


def are_distinct(features: Features, scenes: np.ndarray, limit: float, min_contrast: float) -> bool:
    """Check that near photos are shots of scenes, and not photos of a kind that are all alike.

    Digits of one kind are a chain of neighbors, too. But shots of a scene are near to one another, not
    only to their neighbors, and photos of other scenes are far away.
    """
    sample = np.random.RandomState(0).permutation(len(scenes))[:MAX_COMPARED]
    distances = cosine_distances(compute_vectors(features)[sample])
    is_same = scenes[sample, None] == scenes[sample]
    within = distances[is_same & ~np.eye(len(sample), dtype=bool)]
    if not len(within):
        return True
    is_largest = scenes == np.bincount(scenes).argmax()
    # A class alone may be one scene.
    num_labels = len(np.unique(features.labels[is_largest], axis=0))
    if is_same.all() or (is_largest.mean() > 0.5 and num_labels > 1):
        return False

    density = (within < limit).mean()
    contrast = np.median(distances[~is_same])
    return bool(density > 0.9 or (density > 0.5 and contrast > min_contrast))


def find_pairs(features: Features, max_distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Find near photos: pairs [P, 2] of rows, the nearest pair first, and their cosine distances [P]."""
    vectors = compute_vectors(features)
    num_neighbors = min(NUM_NEIGHBORS, len(vectors) - 1)
    if not num_neighbors:  # A photo alone
        return np.zeros((0, 2), int), np.zeros(0)
    neighbors = NearestNeighbors(n_neighbors=num_neighbors, algorithm="brute").fit(vectors)
    distances, columns = neighbors.kneighbors()
    rows, places = np.nonzero(distances**2 < 2 * max_distance)
    order = distances[rows, places].argsort(kind="stable")
    pairs = np.stack([rows, columns[rows, places]], axis=1)
    return pairs[order], distances[rows, places][order] ** 2 / 2


def keep_together(
    features: Features, max_distance: float, label_space: LabelSpace
) -> tuple[Features, dict[str, Any]]:
    """Join the groups of photos with scenes, and record what was found.

    A scene that contains a whole class stays divided, because the class could not be measured
    otherwise. If all classes are scenes, nothing can be measured.

    Args:
        features: of the photos.
        max_distance: from `measure_limit`.
        label_space: of the labels. Photos with several have no classes.
    """
    pairs, distances = find_pairs(features, max_distance)
    num_photos = len(features.names)
    scenes = connect(pairs, num_photos)
    labels = features.labels if features.labels.ndim == 1 else np.zeros(num_photos, int)
    sizes = np.bincount(scenes)[scenes]
    class_sizes = np.bincount(labels)[labels]
    _, part, counts = np.unique([scenes, labels], axis=1, return_inverse=True, return_counts=True)
    is_whole_class = (counts[part] == class_sizes) & (class_sizes > 1)
    is_whole_class &= not is_whole_class.all()  # Nothing else could be measured
    is_kept = (sizes > 1) & ~np.isin(scenes, scenes[is_whole_class])
    _, known = np.unique(features.groups, return_inverse=True)
    joined = join_groups(known, np.where(is_kept, scenes, num_photos + np.arange(num_photos)))
    # Each is named like one of the groups that it joins.
    groups = features.groups[np.unique(joined, return_index=True)[1]][joined]

    # One pair of a scene, the nearest ones; photos with two labels come first.
    is_doubtful = labels[pairs[:, 0]] != labels[pairs[:, 1]]
    is_doubtful &= distances < CONTRADICTION_PART * max_distance
    # Among many shots, a photo may be a neighbor of one that is no neighbor of it.
    num_contradictions = len(np.unique(np.sort(pairs[is_doubtful]), axis=0))
    pairs = pairs[np.argsort(~is_doubtful, kind="stable")]
    nearest = np.sort(np.unique(scenes[pairs[:, 0]], return_index=True)[1])[:NUM_NAMED_PAIRS]
    record = {
        "num_photos": num_photos,
        "are_alike": max_distance == 0,
        "num_joined": int(is_kept.sum()),
        "num_scenes": len(np.unique(scenes[is_kept])),
        "divided_classes": [
            label_space.names[label] for label in np.unique(labels[is_whole_class])
        ],
        "num_contradictions": num_contradictions,
        "pairs": features.names[pairs[nearest]].tolist(),
    }
    return replace(features, groups=groups), record


@dataclass(frozen=True)
class TrainedScenes:
    """Recognizes photos of the scenes that trained a model.

    Attributes:
        max_distance: from `measure_limit`.
        layout: of the features that are compared.
        codes: [N, NUM_PROJECTIONS] int8 of the photos that trained the model: random projections,
            which keep distances up to about a tenth (Johnson and Lindenstrauss 1984).
    """

    max_distance: float
    layout: FeatureLayout
    codes: np.ndarray

    @classmethod
    def of(cls, features: Features, max_distance: float) -> "TrainedScenes":
        """Encode the photos that trained a model."""
        return cls(max_distance, features.layout, encode_photos(features))

    def join(self, other: "TrainedScenes") -> "TrainedScenes":
        """Add photos whose features have the same layout."""
        assert other.layout == self.layout, "equal features are compared"
        return replace(self, codes=np.concatenate([self.codes, other.codes]))

    def join_shots(self, features: Features) -> np.ndarray:
        """Join the groups [N] of photos with those of other shots of their scenes."""
        if not self.max_distance:
            warn_on_first_process(
                "the encoder could not tell scenes apart in training, so each photo counts as a scene of its "
                "own. If some are shots of one scene, name scenes with sub-folders or `group_column`"
            )
        pairs, _ = find_pairs(features, self.max_distance)
        return join_groups(features.groups, connect(pairs, len(features.groups)))

    def recognize(self, features: Features) -> list[int]:
        """Find the photos that are near a stored one: their indices among the images."""
        if not len(features.names):
            return []
        _, distances = pairwise_distances_argmin_min(encode_photos(features), self.codes)
        limit = 2 * NUM_PROJECTIONS * CODE_SCALE**2 * self.max_distance
        return features.indices[distances**2 < limit].tolist()  # type: ignore[no-any-return]


def write_scenes(
    known: Mapping[str, TrainedScenes], folder: Path, weights_hash: Mapping[str, str]
) -> None:
    """Write the file of a model with these weights.

    `known` has the photos that trained each added task; "" is the model itself.
    """
    tasks = {task: [each.max_distance, vars(each.layout)] for task, each in known.items()}
    codes: Any = {f"codes_{task}": each.codes for task, each in known.items()}
    np.savez(folder / SCENES_FILE, record=json.dumps([weights_hash, tasks]), **codes)


def read_scenes(folder: ModelFolder) -> dict[str, TrainedScenes]:
    """Read the file of a model; empty without one of these weights."""
    file = folder.path / SCENES_FILE
    if not file.is_file():
        return {}
    with explain_damage(file, "Remove it to use the model without it"), np.load(file) as arrays:
        if any(each.compress_type for each in arrays.zip.infolist()):
            raise ValueError("it is compressed: megabytes may hold gigabytes")
        weights_hash, tasks = json.loads(str(arrays["record"]))
        if weights_hash != folder.weights_sha256:
            return {}
        return {
            task: TrainedScenes(
                float(max_distance), FeatureLayout(**layout), arrays[f"codes_{task}"]
            )
            for task, (max_distance, layout) in tasks.items()
        }


def encode_photos(features: Features) -> np.ndarray:
    """Project the vectors of photos on random directions: [N, NUM_PROJECTIONS] int8."""
    vectors = compute_vectors(features)
    # The old generator, because its numbers will stay the same.
    directions = np.random.RandomState(0).normal(size=(vectors.shape[1], NUM_PROJECTIONS))
    codes = (CODE_SCALE * vectors @ directions).clip(-127, 127)
    return codes.astype(np.int8)  # type: ignore[no-any-return]


def describe_scenes(record: Mapping[str, Any]) -> str | None:
    """Say how many photos are of one scene with another, or that it is unknown; None if there are few."""
    lines = []
    if record["are_alike"]:
        lines.append(
            "this encoder has similar features for too many of these photos, so scenes cannot be "
            "distinguished, and none is kept together. If these are shots of one scene, the result is too good: name "
            "scenes with sub-folders or `group_column`"
        )
    if record["num_joined"] > MIN_SHARE * record["num_photos"]:
        number = record["num_scenes"]
        scenes = "one scene, which" if number == 1 else f"{number:,} scenes; each scene"
        lines.append(
            f"{record['num_joined']:,} of {record['num_photos']:,} photos are shots of {scenes} is "
            "kept together"
        )
    if classes := record["divided_classes"]:
        lines.append(
            f"all photos of {format_name_list(classes)} are shots of one scene and cannot be kept "
            "together, so the result only holds for further shots of it. Add photos of others"
        )
    if number := record.get("num_not_compared"):
        lines.append(
            f"{number:,} images were not compared with the others, so shots of one scene may be on both sides"
        )
    if number := record["num_contradictions"]:
        first, second = record["pairs"][0]
        lines.append(
            f"{number:,} pairs of photos of one scene have two labels, such as "
            f"{first} and {second}. Check their labels"
        )
    return "\n".join(lines) or None
