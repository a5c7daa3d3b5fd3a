"""What the tests of adaptation share: the ways to adapt a model, and what is logged."""

from pathlib import Path
from typing import Any

import pytest


def adapted_by(old: Any, loader: Any, folder: Path, **change: Any) -> Any:
    """The model with other values, by the way that `loader` names."""
    if loader is None:
        return old.adapt(**change)
    old.save_pretrained(folder)
    return loader.from_pretrained(folder, **change)


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines that adaptation has logged."""
    return [record.getMessage() for record in caplog.records if record.name == "modeling_vitcls.adaptation_vitcls"]
