"""Names of the special tokens in tables, reports and figures."""

from .configuration_vitcls import ViTCLSConfig


# Group of `config.token_layout` -> name of one of its tokens.
TOKEN_TERMS = {"cls": "CLS", "distillation": "distillation", "registers": "register"}


def get_token_names(config: ViTCLSConfig) -> list[str]:
    """Return the name of each special token, in sequence order.

    Names are "CLS", or "CLS 1", "CLS 2" if there are several; "CLS species" for the token of a task; "CLS 2 (cell 1, 2
    of 2 x 2)" for a token restricted to row 1, column 2 of a grid (`config.cls_scopes`). "distillation" and "register"
    are numbered in the same way.
    """
    return [name for names in get_token_names_by_group(config).values() for name in names]


def get_token_names_by_group(config: ViTCLSConfig) -> dict[str, list[str]]:
    """Return `get_token_names` for each of the three special groups of `config.token_layout`."""
    layout = config.token_layout
    indices = range(layout.num_prefix_tokens)
    names = {group: number_names(term, len(indices[getattr(layout, group)])) for group, term in TOKEN_TERMS.items()}
    if config.tasks:
        names["cls"] = [f"{TOKEN_TERMS['cls']} {task}" for task in config.task_labels()]
    for index, scope in enumerate(config.cls_scopes or ()):
        if not isinstance(scope, str):
            rows, columns, row, column = scope
            names["cls"][index] += f" (cell {row + 1}, {column + 1} of {rows} x {columns})"
    return names


def number_names(term: str, count: int) -> list[str]:
    """Return the term for a single token, or the term with numbers from 1 for several tokens."""
    return [term] if count == 1 else [f"{term} {number}" for number in range(1, count + 1)]
