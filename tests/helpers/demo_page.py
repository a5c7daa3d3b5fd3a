"""The function that the page of `vitcls demo` calls with an uploaded file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from modeling_vitcls.cli.demo import DemoOptions, build_page


def open_page(model: Path) -> Callable[[str], list[Any]]:
    """Build the page of a model, and return its function."""
    page = build_page(DemoOptions(model=str(model)))
    (function,) = {each.fn for each in page.fns.values() if each.api_name == "predict"}
    return function
