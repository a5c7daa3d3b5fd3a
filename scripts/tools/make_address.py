"""Write the address of the repository into the commands of all pages that clone or install it.

    python scripts/tools/make_address.py

The address is `Repository` in [project.urls] of pyproject.toml. Without an address, the pages
install from a checkout. tests/integration/test_docs.py checks that the pages agree with
pyproject.toml.
"""

import re
import tomllib
from pathlib import Path


ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "notebooks").glob("*.ipynb")),
]
COMMAND = re.compile(
    r'pip install (\\?")(?:\.|modeling_vitcls)\[([a-z,]+)\](?: @ git\+[^\s"\\]+)?\\?"'
)
CLONE = re.compile(r"git clone \S+")
NO_ADDRESS = "<address>"
EXPLANATION = re.compile(rf"^# {NO_ADDRESS}.*\n", re.MULTILINE)
# more follow if there is an address
BADGES = re.compile(r"^(\[!\[License.*\]\(docs/quickstart\.md#requirements\)).*$", re.MULTILINE)


def write_address(text: str, address: str | None) -> str:
    """Return a page whose commands clone `address` and install from it, or from a checkout."""
    text = BADGES.sub(lambda found: found[1] + make_badges(address), text)
    text = CLONE.sub(f"git clone {address or NO_ADDRESS}", text)
    text = EXPLANATION.sub("", text) if address else text
    source = f"modeling_vitcls[EXTRAS] @ git+{address}" if address else ".[EXTRAS]"
    return COMMAND.sub(
        lambda found: f"pip install {found[1]}{source.replace('EXTRAS', found[2])}{found[1]}", text
    )


def make_badges(address: str | None) -> str:
    """Return the badges of the tests and the site of a repository on GitHub."""
    if (
        address is None
        or (found := re.fullmatch(r"https://github\.com/([^/]+)/([^/]+)", address)) is None
    ):
        return ""
    tests = f"{address}/actions/workflows/test.yml"
    site = f"https://{found[1].lower()}.github.io/{found[2]}"
    docs = "https://img.shields.io/badge/docs-site-blue"
    return f" [![CI]({tests}/badge.svg)]({tests}) [![Docs]({docs})]({site})"


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
