# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""Where each special token is in the sequence, and which tokens have gates.

    [ CLS x k | distillation x d | register x r | patches ]

No other file counts the tokens of a sequence.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal


TokenGroup = Literal["cls", "distillation", "registers"]  # Special tokens
# Group of special tokens -> field with the number of tokens.
COUNT_FIELDS: dict[str, str] = {
    "cls": "num_cls_tokens",
    "distillation": "num_distillation_tokens",
    "registers": "num_register_tokens",
}

# Value of `position_embedding_tokens` -> groups of special tokens that have position embeddings.
GROUPS_WITH_POSITIONS: dict[str, tuple[str, ...]] = {
    "patches": (),
    "cls": ("cls",),
    "all": tuple(COUNT_FIELDS),
}


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Slices of the token groups, in sequence order.

    Examples:
        >>> from modeling_vitcls import TokenLayout
        >>> layout = TokenLayout.from_counts(num_cls=1, num_distillation=0, num_registers=4)
        >>> layout.registers, layout.num_prefix_tokens
        (slice(1, 5, None), 5)
    """

    cls: slice
    distillation: slice
    registers: slice
    patches: slice
    num_prefix_tokens: int

    @classmethod
    def from_counts(cls, num_cls: int, num_distillation: int, num_registers: int) -> "TokenLayout":
        """Build the layout from the numbers of CLS, distillation and register tokens."""
        registers_start = num_cls + num_distillation
        num_prefix_tokens = registers_start + num_registers
        return cls(
            cls=slice(0, num_cls),
            distillation=slice(num_cls, registers_start),
            registers=slice(registers_start, num_prefix_tokens),
            patches=slice(num_prefix_tokens, None),
            num_prefix_tokens=num_prefix_tokens,
        )

    def get_num_tokens(self, rows: int, columns: int) -> int:
        """Count the tokens of an image of `rows` x `columns` patches."""
        return self.num_prefix_tokens + rows * columns

    def items(self) -> Iterator[tuple[str, slice]]:
        """List the `(name, slice)` pairs of the four groups, in sequence order."""
        return (
            (name, getattr(self, name)) for name in ("cls", "distillation", "registers", "patches")
        )


def update_gated_tokens(
    gated_tokens: Mapping[Any, int] | None, counts: Mapping[str, int], new_counts: Mapping[str, int]
) -> dict[Any, int] | None:
    """Keep the gates of the tokens that remain when the token counts change to `new_counts`.

    Gates stay with their tokens. Gated tokens are the last tokens of a group, so new tokens at the
    end are also gated.
    """
    remaining_gated_tokens = {}
    for group, field in COUNT_FIELDS.items():
        num_gated = (gated_tokens or {}).get(group, 0)
        if num_gated and (num_remaining := num_gated + new_counts[field] - counts[field]) > 0:
            remaining_gated_tokens[group] = num_remaining
    return remaining_gated_tokens or None


def check_scopes(scopes: Sequence[Any], num_cls_tokens: int, grid_size: tuple[int, int]) -> None:
    """Raise ValueError unless each CLS token has a scope: the image, or a cell of a grid over it."""
    if len(scopes) != num_cls_tokens:
        raise ValueError(
            f"`cls_scopes` has {len(scopes)} scopes. Set one for each of {num_cls_tokens} CLS "
            "tokens."
        )
    for scope in scopes:
        if scope == "image":
            continue
        rows, columns, row, column = scope if len(scope) == 4 else (0, 0, 0, 0)
        is_cell = 0 <= row < rows <= grid_size[0] and 0 <= column < columns <= grid_size[1]
        if not is_cell:
            raise ValueError(
                f'`cls_scopes`: {scope} must be "image" or [rows, columns, row, column], a cell of '
                f"a grid over {grid_size[0]} x {grid_size[1]} patches. Count rows and columns "
                "from 0."
            )
