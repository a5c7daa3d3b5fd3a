"""Random numbers that are functions of what they are for, so that nothing about them has to be saved."""

import numpy as np


GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def seed_for(*parts: int) -> int:
    """One 63-bit seed from several numbers of 0 or more; different parts give unrelated seeds."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def random_bits(seeds: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """Random 64-bit numbers for many pictures at once: SplitMix64 (Steele, Lea and Flood 2014), a sequence for each.

    Args:
        seeds: [pictures] `uint64`.
        indices: [pictures] `uint64`; different ones give unrelated numbers.

    Returns:
        [pictures, count] `uint64`; each row is a function of its seed and index alone.
    """
    starts = scrambled(seeds ^ scrambled(indices + GOLDEN))  # [pictures]
    return scrambled(starts[:, None] + GOLDEN * np.arange(1, count + 1, dtype=np.uint64))


def scrambled(values: np.ndarray) -> np.ndarray:
    """SplitMix64's function of its counter."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def fractions(bits: np.ndarray) -> np.ndarray:
    """Random bits -> `float64` of 0 to below 1."""
    return (bits >> np.uint64(11)) * 2.0**-53
