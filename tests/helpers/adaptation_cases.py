"""Helpers of the adaptation tests: adapt a model, and read the log."""

from pathlib import Path
from typing import Any

from pytest import LogCaptureFixture


def adapt_with_loader(old: Any, loader: Any, folder: Path, **change: Any) -> Any:
    """Return the model adapted by `loader.from_pretrained`, or by `adapt` without a loader."""
    if loader is None:
        return old.adapt(**change)
    old.save_pretrained(folder)
    return loader.from_pretrained(folder, **change)


def get_logged_lines(caplog: LogCaptureFixture) -> list[str]:
    """Return the messages that adaptation logged."""
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "modeling_vitcls.model.adaptation_vitcls"
    ]
