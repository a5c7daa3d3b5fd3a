# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""The kinds of special tokens, where each token is in the sequence, and which are faded in.

    [ CLS x k | distillation x d | register x r | patches ]

A kind of token is a row of `TOKEN_KINDS`. No other file counts the tokens of a sequence.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from .field_checks_vitcls import Size


TokenGroup = Literal["cls", "distillation", "registers"]  # Special tokens, in sequence order


@dataclasses.dataclass(frozen=True)
class TokenKind:
    """A kind of special tokens.

    Attributes:
        group: name of its slice, of its position embeddings, and of its tokens in outputs.
        count_field: field of the configuration with the number of tokens.
        parameter: of the embeddings, [1, n, D].
        title: of one token, in tables and figures.
        color: in figures; color-blind readers can distinguish the colors (palette of Okabe and Ito).
        position_values: values of `position_embedding_tokens` with which the tokens have positions.
        is_faded_in: whether added tokens are hidden at first, and faded in by training passes.
        twin_of: group that new tokens start as twins of, if a head reads them.
    """

    group: TokenGroup
    count_field: str
    parameter: str
    title: str
    color: str
    position_values: tuple[str, ...] = ("all",)
    is_faded_in: bool = True
    twin_of: TokenGroup | None = None


TOKEN_KINDS = (
    TokenKind(
        group="cls",
        count_field="num_cls_tokens",
        parameter="cls_token",
        title="CLS",
        color="#0072B2",
        position_values=("cls", "all"),
        twin_of="cls",
    ),
    TokenKind(
        group="distillation",
        count_field="num_distillation_tokens",
        parameter="distillation_token",
        title="distillation",
        color="#D55E00",
        twin_of="cls",
    ),
    TokenKind(
        group="registers",
        count_field="num_register_tokens",
        parameter="register_tokens",
        title="register",
        color="#009E73",
    ),
)

# Group of special tokens -> field with the number of tokens.
COUNT_FIELDS: dict[str, str] = {kind.group: kind.count_field for kind in TOKEN_KINDS}
# Value of `position_embedding_tokens` -> groups of special tokens that have position embeddings.
GROUPS_WITH_POSITIONS: dict[str, tuple[str, ...]] = {
    value: tuple(kind.group for kind in TOKEN_KINDS if value in kind.position_values)
    for value in ("patches", "cls", "all")
}


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Slices of the token groups, in sequence order.

    Examples:
        >>> from modeling_vitcls import TokenLayout
        >>> layout = TokenLayout.from_counts(1, 0, 4)
        >>> layout.registers, layout.num_prefix_tokens
        (slice(1, 5, None), 5)
    """

    cls: slice
    distillation: slice
    registers: slice
    patches: slice
    num_prefix_tokens: int

    @classmethod
    def from_counts(cls, *counts: int) -> "TokenLayout":
        """Build the layout from the numbers of tokens, in the order of `TOKEN_KINDS`."""
        slices = {}
        start = 0
        for kind, count in zip(TOKEN_KINDS, counts, strict=True):
            slices[kind.group] = slice(start, start + count)
            start += count
        return cls(**slices, patches=slice(start, None), num_prefix_tokens=start)

    def get_num_tokens(self, rows: int, columns: int) -> int:
        """Count the tokens of an image of `rows` x `columns` patches."""
        return self.num_prefix_tokens + rows * columns

    def items(self) -> Iterator[tuple[str, slice]]:
        """List the `(name, slice)` pairs of all groups, in sequence order."""
        return ((name, getattr(self, name)) for name in (*COUNT_FIELDS, "patches"))

    def split(self, hidden_states: Any) -> dict[str, Any]:
        """Split the tokens [B, N, D] of a layer into groups [B, n, D], which are views."""
        return {name: hidden_states[:, tokens] for name, tokens in self.items()}


def count_added_tokens(counts: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, int]:
    """Count the tokens that changed token counts add, by field; removed tokens are negative."""
    return {
        field: changes[field] - counts[field] for field in COUNT_FIELDS.values() if field in changes
    }


def keep_fading_tokens(
    fading_tokens: Mapping[Any, int] | None, num_added: Mapping[str, int]
) -> dict[Any, int] | None:
    """Count the fading tokens of each group when token counts change by `num_added`, by field.

    They are the last tokens of a group, so new tokens at the end belong to them, too.
    """
    remaining = {}
    for group, field in COUNT_FIELDS.items():
        num_fading = (fading_tokens or {}).get(group, 0)
        if num_fading and (num_remaining := num_fading + num_added.get(field, 0)) > 0:
            remaining[group] = num_remaining
    return remaining or None


def check_scopes(scopes: Sequence[Any], num_cls_tokens: int, grid_size: Size) -> None:
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
