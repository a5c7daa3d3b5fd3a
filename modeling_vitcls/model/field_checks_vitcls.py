# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""Kinds of fields of a configuration that have bounds, and one-line errors.

hidden_size: int = width(default=768)       1 to 1,000,000
"""

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from huggingface_hub.dataclasses import as_validated_field
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassError
from transformers.utils import is_torch_available


Size = tuple[int, int]  # Height and width in pixels, or rows and columns of patches

MAX_LABELS = 1_000_000  # Maximum number of labels of one classifier
MAX_PATCHES = 2**22  # Maximum number of patches of an image
MAX_PATCH_SIDE = 4096  # Maximum height and width of a patch, in pixels


# Bounds of fields ---------------------------------------------------------------------------------
def bounded(is_valid: Callable[[Any], bool], requirement: str) -> Any:
    """Build a kind of field whose values are None or meet a requirement, such as "positive"."""

    def check(value: Any) -> None:
        if value is not None and not is_valid(value):
            raise ValueError(f"must be {requirement}, but it is {value!r}")

    return as_validated_field(check)


def between(minimum: int, maximum: int) -> Any:
    """Build a kind of field with values from `minimum` to `maximum`."""
    return bounded(
        lambda value: minimum <= value <= maximum, f"between {minimum:,} and {maximum:,}"
    )


def extent(maximum: int) -> Any:
    """Build a kind of field with one number for both axes, or [height, width]."""
    return bounded(
        lambda value: (
            (isinstance(value, int) or len(value) == 2)
            and 1 <= min(to_pair(value)) <= max(to_pair(value)) <= maximum
        ),
        f"1 to {maximum:,}, or [height, width]",
    )


def is_activation(name: str) -> bool:
    """Check for an activation of transformers. `AutoConfig` works without PyTorch, which these need."""
    if not is_torch_available():
        return True
    from transformers.activations import ACT2FN

    return name in ACT2FN


# The upper limits only reject typos that would exhaust the memory.
token_count = between(0, 100_000)
width = between(1, 1_000_000)
probability = between(0, 1)
rate = bounded(lambda value: 0 <= value < 1, "at least 0 and below 1")
positive = bounded(lambda value: 0 < value < math.inf, "a finite positive number")
finite = bounded(math.isfinite, "finite or None")
activation = bounded(is_activation, 'an activation of transformers, such as "gelu"')


# Errors -------------------------------------------------------------------------------------------
@contextmanager
def raise_one_line_errors(owner: str = "") -> Iterator[None]:
    """Raise one-line `ValueError`s instead of the errors of two lines that `strict` raises.

    A check of several fields (`validate_*`) has a message of its own, without the words of `strict`.
    """
    try:
        yield
    except (StrictDataclassError, TypeError, ValueError) as error:
        is_check = isinstance(error, StrictDataclassClassValidationError)
        message = textwrap.shorten(str(error.__cause__ if is_check else error), 600)
        # A value in a file may hold codes that a terminal runs.
        raise ValueError(owner + "".join(filter(str.isprintable, message))) from None


def shorten_errors(strict_class: Any) -> Any:
    """Make a strict class raise one-line errors."""
    for name in ("__init__", "__setattr__", "validate"):
        setattr(strict_class, name, raise_one_line_errors()(getattr(strict_class, name)))
    return strict_class


def to_pair(value: int | Sequence[int]) -> Size:
    """Read a size, one number for both axes or [height, width], as (height, width)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
