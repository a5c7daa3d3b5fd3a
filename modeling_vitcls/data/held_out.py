"""Held-out images of datasets without an evaluation split, and their record in results.json.

    image -> key: checksum of the path within the dataset, of the row number, or of the bytes (images.py)
          -> hash of the key and the split seed

    one known label per image    of each class, the images with the smallest hashes: the rounded fraction of the class,
                                 but at least one image of a class with two or more images
    all other data               the images whose hash, as a number in [0, 1), is less than the fraction

Copies of an image (files with the same content) have the smallest key of all of them, so that they
are on the same side of the split. Streams, and datasets of more than 100,000 images, are not
compared.

If images have paths, the split depends on neither the order of the images nor the working
directory. In a stream, or with several labels per image, whether an image is held out does not
depend on other images, and the fraction of a class is only approximate. Training prints a warning
if a class has no held-out images or no training images.

A training run writes a `HeldOutRecord` to results.json under the key "held_out". results.json is
published with the model. The record also contains a key of the content of each training image, so
that `vitcls evaluate` recognizes training images in a dataset of any name (evaluated_images.py).
"""

import base64
import hashlib
import io
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from ..hub.model_files import RESULTS_FILE
from ..hub.model_folder import ModelFolder
from ..model.heads_vitcls import IGNORED_LABEL


# key of added tasks and classes in results.json: name of the head -> record
ADDITIONS_KEY = "additions"
# key of the held-out record in results.json
HELD_OUT_RECORD_KEY = "held_out"
# two of a million different images have equal keys with a probability of 1e-6 for each image
CONTENT_KEY_BYTES = 5
# an image file larger than three parts is identified by its size, start, middle and end
CONTENT_PART_BYTES = 16_384
# of more training images, this many are drawn at random for the record
MAX_RECORDED_IMAGES = 100_000


@dataclass(frozen=True)
class HeldOutRule:
    """Rule that selects held-out images by the hash of their keys."""

    fraction: float  # fraction of the images to hold out
    seed: int  # seed of the hash
    # Text that is hashed with the seed, so that rules with the same seed are independent.
    # "selection" is used for checkpoint selection, and "" is used for the reported results.
    purpose: str = ""
    num_folds: int | None = None  # number of cross-validation folds; None: no cross-validation
    fold: int | None = None  # fold to hold out, starting at 1; each image is in exactly one fold

    def is_held_out(self, key: int) -> bool:
        """Return whether the image with this key is held out, if the classes are not known."""
        hash_value = self.hash_key(key)
        if self.num_folds is not None and self.fold is not None:
            return hash_value * self.num_folds >> 64 == self.fold - 1
        return hash_value / 2**64 < self.fraction

    def select(self, keys: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return whether each image is held out.

        The keys are [N], with one label per image [N], or -100 for an unknown label. Images with
        equal keys have the label of the first one.
        """
        unique_keys, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        hashes = np.fromiter(map(self.hash_key, unique_keys.tolist()), np.uint64, len(unique_keys))
        is_held_out = np.zeros(len(unique_keys), bool)
        key_labels = labels[first]

        for label in np.unique(key_labels).tolist():
            members = np.flatnonzero(key_labels == label)
            if label == IGNORED_LABEL:
                is_held_out[members] = [
                    self.is_held_out(key) for key in unique_keys[members].tolist()
                ]
                continue

            members = members[np.argsort(hashes[members], kind="stable")]
            if self.num_folds is not None and self.fold is not None:
                first_member = (self.fold - 1 - label) % self.num_folds
                is_held_out[members[first_member :: self.num_folds]] = True
            elif self.fraction and len(members) > 1:
                # of each class, at least one image is held out, and at least one is not
                num_held_out = round(self.fraction * len(members))
                is_held_out[members[: min(max(num_held_out, 1), len(members) - 1)]] = True

        return is_held_out[inverse]

    def hash_key(self, key: int) -> int:
        """Return the 64-bit hash of a key and the seed."""
        text = f"{self.seed} {self.purpose} {key}" if self.purpose else f"{self.seed} {key}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")

    def __str__(self) -> str:
        if self.num_folds is not None:
            return f"fold {self.fold} of {self.num_folds}, by checksum, split seed {self.seed}"
        return f"about {self.fraction:.0%}, by checksum, split seed {self.seed}"


@dataclass(frozen=True)
class HeldOutRecord:
    """Description of the held-out images of a run, as stored in results.json."""

    split: str | None  # held-out split of the dataset; None if a `HeldOutRule` selected the images
    num_images: int | None  # None for a streamed split
    fraction: float | None = None  # fraction of the `HeldOutRule`
    split_seed: int | None = None  # seed of the `HeldOutRule`
    sha256: str | None = None  # digest of the keys of the selected images
    num_folds: int | None = None  # number of folds of the `HeldOutRule`
    fold: int | None = None  # held-out fold of the `HeldOutRule`
    dataset: str | None = None  # name of the dataset
    num_training_images: int | None = None  # None for a stream
    training_images: str | None = None  # `encode_content_keys`; None for a stream

    @classmethod
    def from_keys(cls, rule: HeldOutRule, keys: np.ndarray) -> "HeldOutRecord":
        """Build the record from the keys of the images that `rule` selected, in any order."""
        text = " ".join(map(str, np.sort(keys).tolist()))
        return cls(
            split=None,
            num_images=len(keys),
            fraction=rule.fraction,
            split_seed=rule.seed,
            sha256=hashlib.sha256(text.encode()).hexdigest(),
            num_folds=rule.num_folds,
            fold=rule.fold,
        )

    @property
    def rule(self) -> HeldOutRule | None:
        """Return the rule that selected the images; None if they are a split of the dataset."""
        if self.fraction is None or self.split_seed is None:
            return None
        return HeldOutRule(self.fraction, self.split_seed, num_folds=self.num_folds, fold=self.fold)

    def decode_training_images(self) -> tuple[np.ndarray, float]:
        """Return the sorted content keys of the recorded training images.

        The second value is the fraction of the training images that is recorded.
        """
        content = np.frombuffer(base64.b64decode(self.training_images or ""), np.uint8)
        padded = np.zeros((len(content) // CONTENT_KEY_BYTES, 8), np.uint8)
        padded[:, :CONTENT_KEY_BYTES] = content.reshape(-1, CONTENT_KEY_BYTES)
        num_images = self.num_training_images or 0
        return padded.view("<u8")[:, 0], min(1.0, MAX_RECORDED_IMAGES / max(num_images, 1))


def get_run_results(folder: ModelFolder, task: str | None) -> dict[str, Any]:
    """Return results.json of a model folder, or the record of an added task in it.

    The result is empty if there is none.
    """
    results = folder.saved_results
    return results if task is None else results.get(ADDITIONS_KEY, {}).get(task, {})


def read_held_out_record(folder: ModelFolder, task: str | None = None) -> HeldOutRecord | None:
    """Return the held-out record in a model folder, or that of an added task, or None.

    Raise ValueError if results.json is damaged.
    """
    try:
        results = get_run_results(folder, task)
        record = results.get(HELD_OUT_RECORD_KEY)
        if record is None:
            folder.warn_about_lost_results()
            return None
        return HeldOutRecord(**{"dataset": results.get("dataset"), **record})
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder.path / RESULTS_FILE} is damaged: {error}. Remove it to use the model without "
            "its record"
        ) from error


def compute_image_key(content: bytes) -> int:
    """Compute the 63-bit key of an image from its bytes or its path."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def compute_content_key(stream: BinaryIO) -> int:
    """Compute the 40-bit key of an image from its encoded content.

    At most 48 KiB are read.
    """
    size = stream.seek(0, io.SEEK_END)
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=CONTENT_KEY_BYTES)
    if size <= 3 * CONTENT_PART_BYTES:
        stream.seek(0)
        digest.update(stream.read())
    else:
        for start in (0, size // 2, size - CONTENT_PART_BYTES):
            stream.seek(start)
            digest.update(stream.read(CONTENT_PART_BYTES))
    return int.from_bytes(digest.digest(), "little")


def join_copies(keys: np.ndarray, content_keys: np.ndarray) -> np.ndarray:
    """Return the keys [N] of images, with the smallest key of all copies for each copy."""
    _, group = np.unique(content_keys, return_inverse=True)
    smallest = np.full(len(keys), np.iinfo(keys.dtype).max)  # of each group
    np.minimum.at(smallest, group, keys)
    return smallest[group]


def encode_content_keys(keys: np.ndarray) -> str:
    """Return content keys, sorted and each once, as base64 of `CONTENT_KEY_BYTES` bytes per key."""
    content = np.unique(keys).astype("<u8").view(np.uint8).reshape(-1, 8)[:, :CONTENT_KEY_BYTES]
    return base64.b64encode(content.tobytes()).decode()
