"""Write the address of the repository into the installation commands of all pages.

    python scripts/make_address.py

The address is `Repository` in [project.urls] of pyproject.toml. Without an address, the pages install from a checkout.
tests/integration/test_docs.py checks that the pages agree with pyproject.toml.
"""

import re
import tomllib
from pathlib import Path


ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "notebooks" / "quickstart.ipynb",
]
COMMAND = re.compile(
    r'pip install (\\?")(?:\.|modeling_vitcls)\[([a-z,]+)\](?: @ git\+[^\s"\\]+)?\\?"'
)


def write_address(text: str, address: str | None) -> str:
    """Return a page whose commands install from `address`, or from a checkout."""
    source = f"modeling_vitcls[EXTRAS] @ git+{address}" if address else ".[EXTRAS]"
    return COMMAND.sub(
        lambda found: f"pip install {found[1]}{source.replace('EXTRAS', found[2])}{found[1]}", text
    )


def read_address() -> str | None:
    """Return the address in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"].get("Repository")


def main() -> None:
    """Rewrite all pages."""
    for page in PAGES:
        page.write_text(
            write_address(page.read_text(encoding="utf-8"), read_address()), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
