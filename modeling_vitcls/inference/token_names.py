"""Names of the special tokens in tables, reports and figures, and how far they are faded in."""

from itertools import chain
from typing import Any

from ..model.token_layout_vitcls import TOKEN_KINDS


# Token group in `config.token_layout` -> name of the token if the group has only one token.
SINGLE_TOKEN_NAMES: dict[str, str] = {kind.group: kind.title for kind in TOKEN_KINDS}


def get_token_names(config: Any) -> list[str]:
    """Name each special token, in sequence order.

    A single CLS token is named "CLS", and several CLS tokens are named "CLS 1", "CLS 2" and so on;
    distillation and register tokens are named in the same way. In a multi-task model, "CLS species"
    is the CLS token of the task "species". "CLS 2 (cell 1, 2 of 2 x 2)" is a CLS token for row 1,
    column 2 of a grid of image regions (`config.cls_scopes`).
    """
    names: dict[str, list[str]] = {}
    for kind, num_tokens in zip(TOKEN_KINDS, config.token_counts, strict=True):
        names[kind.group] = [f"{kind.title} {number}" for number in range(1, num_tokens + 1)]
        if num_tokens == 1:
            names[kind.group] = [kind.title]

    if config.tasks:
        names["cls"] = [f"{SINGLE_TOKEN_NAMES['cls']} {task}" for task in config.task_labels()]
    for index, scope in enumerate(config.cls_scopes or ()):
        if not isinstance(scope, str):
            rows, columns, row, column = scope
            names["cls"][index] += f" (cell {row + 1}, {column + 1} of {rows} x {columns})"
    return list(chain.from_iterable(names.values()))


def count_tokens(config: Any) -> dict[str, int]:
    """Count the tokens of each group, at the model's image size."""
    token_indices = range(config.token_layout.get_num_tokens(*config.grid_size))
    return {name: len(token_indices[group]) for name, group in config.token_layout.items()}


def read_fade_in(encoder: Any) -> dict[str, float]:
    """Read g of the tokens that are still faded in, by the name of the token: 0 hides it.

    Tokens at 1 are ordinary tokens: if all are, the result is empty.
    """
    fade_in = getattr(encoder, "fade_in", None)
    if fade_in is None:
        return {}
    values = fade_in.get_values().tolist()
    if min(values) == 1.0:
        return {}
    names = get_token_names(encoder.config)
    tokens = zip(fade_in.token_indices, values, strict=True)
    return {names[index]: round(value, 4) for index, value in tokens}
