"""In which order the pictures come, epoch by epoch: functions of the seed.

    PlainOrder     every picture once per epoch
    BalancedOrder  every class equally often per epoch, and within a class every picture equally often

An epoch has as many places as there are pictures. Each place holds a picture and how many times it was shown before,
so that a picture that comes again soon is augmented anew.
"""

from collections.abc import Sequence

import numpy as np
import torch

from .random_bits import random_bits, seed_for


Epoch = tuple[np.ndarray, np.ndarray]  # of each place: times shown before, index of the picture; [pictures] `int64`


class Order:
    """An endless order; made epoch by epoch, of which the last two are kept: a batch may lie across their seam."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.recent: dict[int, Epoch] = {}

    def epoch(self, number: int) -> Epoch:
        """The places of one epoch."""
        if number not in self.recent:
            self.recent = {kept: self.recent[kept] for kept in (number - 1, number + 1) if kept in self.recent}
            self.recent[number] = self.make(number)
        return self.recent[number]

    def make(self, number: int) -> Epoch:
        """Compute one epoch."""
        raise NotImplementedError

    def shuffled(self, count: int, number: int) -> np.ndarray:
        """0 to `count` - 1 in the order of one epoch."""
        generator = torch.Generator().manual_seed(seed_for(self.seed, number))
        return torch.randperm(count, generator=generator).numpy()


class PlainOrder(Order):
    """Every picture once per epoch."""

    def __init__(self, num_pictures: int, seed: int) -> None:
        super().__init__(seed)
        self.num_pictures = num_pictures

    def make(self, number: int) -> Epoch:
        """All pictures, shuffled."""
        return np.full(self.num_pictures, number), self.shuffled(self.num_pictures, number)


class BalancedOrder(Order):
    """Every class equally often; classes without pictures are left out.

    Places are dealt to the classes in turn, and each class shows its pictures, shuffled anew for each round, one after
    the other. So a rare class repeats its pictures, and a frequent one needs several epochs to show all of its.
    """

    def __init__(self, labels: Sequence[int], seed: int) -> None:
        super().__init__(seed)
        of_class = np.asarray(labels)
        self.num_pictures = len(of_class)
        self.members = [np.flatnonzero(of_class == label) for label in np.unique(of_class)]

    def make(self, number: int) -> Epoch:
        """Each class's share, shuffled."""
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
        """The orders of one class's members, from the first to the last of `rounds`: [rounds, members]."""
        numbers = np.arange(rounds.min(), rounds.max() + 1, dtype=np.uint64)
        seeds = np.full(len(numbers), seed_for(self.seed, turn, self.num_pictures), dtype=np.uint64)
        return random_bits(seeds, numbers, num_members).argsort(axis=1)


def class_weights(labels: Sequence[int], num_classes: int) -> torch.Tensor:
    """Weights [classes] in inverse proportion to the classes' sizes, 1 on average over the pictures.

    Missing labels (-100) do not count; a class without pictures weighs 0.
    """
    counts = torch.bincount(torch.tensor([label for label in labels if label >= 0]), minlength=num_classes)
    present = counts > 0
    return torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 0.0)
