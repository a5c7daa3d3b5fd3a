"""Names of the special tokens in tables, reports and figures."""

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
    return [name for names in get_token_names_by_group(config).values() for name in names]


def get_token_names_by_group(config: Any) -> dict[str, list[str]]:
    """Name the tokens of each group: "cls", "distillation" and "registers"."""
    layout = config.token_layout
    indices = range(layout.num_prefix_tokens)
    names: dict[str, list[str]] = {}
    for group, name in SINGLE_TOKEN_NAMES.items():
        num_tokens = len(indices[getattr(layout, group)])
        names[group] = [f"{name} {number}" for number in range(1, num_tokens + 1)]
        if num_tokens == 1:
            names[group] = [name]

    if config.tasks:
        names["cls"] = [f"{SINGLE_TOKEN_NAMES['cls']} {task}" for task in config.task_labels()]
    for index, scope in enumerate(config.cls_scopes or ()):
        if not isinstance(scope, str):
            rows, columns, row, column = scope
            names["cls"][index] += f" (cell {row + 1}, {column + 1} of {rows} x {columns})"
    return names
