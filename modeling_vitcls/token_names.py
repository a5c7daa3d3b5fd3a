"""Names of the special tokens in tables, reports and figures."""

from .configuration_vitcls import ViTCLSConfig


# Token group in `config.token_layout` -> name of the token if the group has only one token.
SINGLE_TOKEN_NAMES = {"cls": "CLS", "distillation": "distillation", "registers": "register"}


def get_token_names(config: ViTCLSConfig) -> list[str]:
    """Return the name of each special token, in sequence order.

    A single CLS token is named "CLS", and several CLS tokens are named "CLS 1", "CLS 2" and so on. In a multi-task
    model, "CLS species" is the token of the task "species". "CLS 2 (cell 1, 2 of 2 x 2)" is a token restricted to row
    1, column 2 of a grid (`config.cls_scopes`). Distillation and register tokens are numbered like CLS tokens.
    """
    return [name for names in get_token_names_by_group(config).values() for name in names]


def get_token_names_by_group(config: ViTCLSConfig) -> dict[str, list[str]]:
    """Return the token names of each group of special tokens: "cls", "distillation" and "registers"."""
    layout = config.token_layout
    indices = range(layout.num_prefix_tokens)
    names = {
        group: number_names(name, len(indices[getattr(layout, group)])) for group, name in SINGLE_TOKEN_NAMES.items()
    }
    if config.tasks:
        names["cls"] = [f"{SINGLE_TOKEN_NAMES['cls']} {task}" for task in config.task_labels()]
    for index, scope in enumerate(config.cls_scopes or ()):
        if not isinstance(scope, str):
            rows, columns, row, column = scope
            names["cls"][index] += f" (cell {row + 1}, {column + 1} of {rows} x {columns})"
    return names


def number_names(name: str, num_tokens: int) -> list[str]:
    """Return the name of a single token, or the numbered names of several tokens, starting with 1."""
    return [name] if num_tokens == 1 else [f"{name} {number}" for number in range(1, num_tokens + 1)]
