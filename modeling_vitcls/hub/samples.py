"""Held-out pictures in a card: whether those of a model folder are of this machine, and would be published with it."""

from pathlib import Path
from typing import Any

import yaml

from .places import is_local


RECIPE = "config.resolved.yaml"
SAMPLES = "pictures/attention.png"  # the one picture that shows images of the data set


def data_shown(folder: Path) -> str | None:
    """The data set of this machine whose pictures the card of a model folder shows, unless it was asked to
    (--card-samples); None where there is none."""
    if not (folder / SAMPLES).is_file() or not (folder / RECIPE).is_file():
        return None
    try:
        flags: Any = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):  # no text, or no YAML
        return None
    if not isinstance(flags, dict) or flags.get("card_samples"):
        return None
    return flags["dataset"] if is_local(flags.get("dataset")) else None


def warning(folder: Path, dataset: str, repo_id: str) -> str:
    """What to say where they have been published."""
    return (
        f"{repo_id} is public, and its card shows pictures of {dataset} ({SAMPLES}): if nobody should see them, make "
        f"it private in its settings on the Hub, or delete it there, remove {folder / SAMPLES} and push again"
    )
