"""Random numbers as functions of the seed and their purpose, so that no generator state is saved."""

import numpy as np


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def seed_for(*parts: int) -> int:
    """Return a 63-bit seed from several non-negative integers. Different integers give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def random_bits(seeds: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """Return random 64-bit numbers for several images, from one SplitMix64 sequence per image.

    Source: Steele, Lea and Flood 2014.

    Args:
        seeds: [images] `uint64`.
        indices: [images] `uint64`; different indices give unrelated numbers.
        count: number of random numbers per image.

    Returns:
        [images, count] `uint64`; each row depends only on its seed and index.
    """
    starts = scrambled(seeds ^ scrambled(indices + GOLDEN))  # [images]
    return scrambled(starts[:, None] + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


def scrambled(values: np.ndarray) -> np.ndarray:
    """Return the SplitMix64 output for each counter value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def fractions(bits: np.ndarray) -> np.ndarray:
    """Return random bits as `float64` in [0, 1)."""
    return (bits >> np.uint64(11)) * 2.0**-53
