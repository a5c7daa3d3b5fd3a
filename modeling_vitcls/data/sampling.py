"""Select the images of each batch as a function of the seed and the step, without sampler state.

The training images are shuffled for each epoch, and the epochs are concatenated. Each optimizer
step consumes the next `batch size x accumulation steps x processes` images, divided among the
processes:

    epoch 0 ............ | epoch 1 ............ | ...
    step 0 | step 1 | step 2 | step 3 | ...

All batches have the same size, and every image is used equally often. One process with batches of
16, two processes with batches of 8, and two accumulated batches of 8 use the same images per step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from pandas.util import hash_array
from sklearn.utils.class_weight import compute_sample_weight
from torch import Tensor


ImageKey = tuple[int, int]  # Index of the epoch and index of the image


# Random numbers -----------------------------------------------------------------------------------


# Increment of SplitMix64: 2**64 divided by the golden ratio
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def derive_seed(*numbers: int) -> int:
    """Combine non-negative integers, such as a seed and an epoch, into one 63-bit seed.

    Different integers result in unrelated seeds.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def draw_numbers(keys: np.ndarray, seed: int) -> np.ndarray:
    """Draw a number [N] `uint64` for each key [N] that depends only on the key and the seed.

    It is the first one of a SplitMix64 sequence (Steele, Lea and Flood 2014).
    """
    starts = hash_array(
        np.uint64(derive_seed(seed)) ^ hash_array(keys.astype(np.uint64) + GOLDEN_GAMMA)
    )
    return hash_array(starts + GOLDEN_GAMMA)


# Epochs -------------------------------------------------------------------------------------------


# Each image of a batch needs the order of its epoch, and a batch may span two epochs.
@lru_cache(maxsize=4)
def shuffle_indices(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Shuffle the indices of all images for an epoch."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    return torch.randperm(num_images, generator=generator).numpy()


def compute_class_weights(labels: Sequence[int], num_classes: int) -> Tensor:
    """Compute class weights [classes], inversely proportional to the class sizes.

    Their mean over the images is 1.

    A class without images has weight 0.
    """
    weights = torch.zeros(num_classes)
    weights[torch.tensor(labels)] = torch.from_numpy(
        compute_sample_weight("balanced", labels)
    ).float()
    return weights


# Batches ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The number of steps of a run, and the images of every batch."""

    num_images: int
    batch_size: int
    accumulation_steps: int
    num_processes: int
    num_steps: int
    seed: int

    @property
    def images_per_step(self) -> int:
        """Images per step, over all processes and accumulated batches."""
        return self.batch_size * self.accumulation_steps * self.num_processes

    def count_epochs(self, step: int) -> float:
        """Convert steps to a (fractional) number of epochs."""
        return step * self.images_per_step / self.num_images

    def iterate_keys(self, process_index: int, first_step: int = 0) -> Iterator[list[ImageKey]]:
        """Yield the keys of each batch of one process, starting at `first_step`."""
        for step in range(first_step, self.num_steps):
            for batch_index in range(self.accumulation_steps):
                start = (batch_index * self.num_processes + process_index) * self.batch_size
                start += step * self.images_per_step
                keys = []
                for position in range(start, start + self.batch_size):
                    epoch, place = divmod(position, self.num_images)
                    order = shuffle_indices(self.num_images, self.seed, epoch)
                    keys.append((epoch, int(order[place])))
                yield keys
