"""Order of the images in each epoch, as a function of the seed.

    PlainOrder     every image once per epoch
    BalancedOrder  every class equally often per epoch, and within a class every image equally often

An epoch has as many positions as there are images. Each position has the index of an image and the number of times
that the image was used before, so that a repeated image gets a new augmentation.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .random_bits import random_bits, seed_for


# For each position: number of earlier uses, and index of the image; [images] int64 each.
Epoch = tuple[np.ndarray, np.ndarray]


class Order:
    """Endless order of images, computed per epoch. Two epochs are cached, because a batch may span two epochs."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.recent: dict[int, Epoch] = {}

    def epoch(self, number: int) -> Epoch:
        """Return the order of one epoch."""
        if number not in self.recent:
            self.recent = {kept: self.recent[kept] for kept in (number - 1, number + 1) if kept in self.recent}
            self.recent[number] = self.make(number)
        return self.recent[number]

    def make(self, number: int) -> Epoch:
        """Compute one epoch."""
        raise NotImplementedError

    def shuffled(self, count: int, number: int) -> np.ndarray:
        """Return 0 to `count` - 1, shuffled with the seed of one epoch."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, number))
        return torch.randperm(count, generator=generator).numpy()


class PlainOrder(Order):
    """Every image once per epoch."""

    def __init__(self, num_pictures: int, seed: int) -> None:
        super().__init__(seed)
        self.num_pictures = num_pictures

    def make(self, number: int) -> Epoch:
        """Compute one epoch: all images, shuffled."""
        return np.full(self.num_pictures, number), self.shuffled(self.num_pictures, number)


class BalancedOrder(Order):
    """Every class equally often. Classes without images are left out.

    Positions are assigned to the classes in turn. Each class cycles through its images, which are shuffled again for
    each cycle. So a rare class repeats its images, and a frequent class needs several epochs for all of its images.
    """

    def __init__(self, labels: Sequence[int], seed: int) -> None:
        super().__init__(seed)
        of_class = np.asarray(labels)
        self.num_pictures = len(of_class)
        self.members = [np.flatnonzero(of_class == label) for label in np.unique(of_class)]

    def make(self, number: int) -> Epoch:
        """Compute one epoch: the positions of all classes, shuffled."""
        places = np.arange(number * self.num_pictures, (number + 1) * self.num_pictures)
        shown, indices = np.empty_like(places), np.empty_like(places)
        for turn, members in enumerate(self.members):
            mine = places % len(self.members) == turn
            rounds, at = np.divmod(places[mine] // len(self.members), len(members))
            shown[mine] = rounds
            indices[mine] = members[self.rounds(turn, rounds, len(members))[rounds - rounds[:1], at]]
        order = self.shuffled(self.num_pictures, number)
        return shown[order], indices[order]

    def rounds(self, turn: int, rounds: np.ndarray, num_members: int) -> np.ndarray:
        """Return the orders of the images of one class, from the first to the last of `rounds`: [rounds, members]."""
        numbers = np.arange(rounds.min(), rounds.max() + 1, dtype=np.uint64)
        seeds = np.full(len(numbers), seed_for(self.seed, turn, self.num_pictures), dtype=np.uint64)
        return random_bits(seeds, numbers, num_members).argsort(axis=1)


def class_weights(labels: Sequence[int], num_classes: int) -> torch.Tensor:
    """Return class weights [classes], inversely proportional to the class sizes, with a mean of 1 over the images.

    Missing labels (-100) are ignored. A class without images has weight 0.
    """
    counts = torch.bincount(torch.tensor([label for label in labels if label >= 0]), minlength=num_classes)
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0)
