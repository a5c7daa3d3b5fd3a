"""Measured figures in README and docs/: each paragraph names the study, test or program they are from.

A paragraph has a source if it, or the paragraph before its table, links a page of model_cards/ or
an article, or names a program of scripts/ or a file of tests/. Figures that a block of the same page
prints need none. Fast: `make check` runs this file.
"""

import re
from pathlib import Path

import pytest
from helpers.doc_pages import ROOT


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

CODE = re.compile(
    r"^```.*?^```$|^    [^\n]*$|`[^`\n]+\n?[^`\n]*`|\]\([^)]*\)", re.MULTILINE | re.DOTALL
)
BLOCK = re.compile(r"^```.*?^```$|^    [^\n]*$", re.MULTILINE | re.DOTALL)
# 84%, 1.5 points, 66 of 80, 1.2 times, 1,460 images/s, 59 CPU seconds
FIGURE = re.compile(
    r"\d[\d.,]*%|[\d.]+\)? points\b|\b\d[\d,]* of (?:the )?\d[\d,]*|\b\d[\d.]* times\b"
    r"|\d images/s|[\d.]+ CPU seconds"
)
INTERVAL = re.compile(r"95% (?:confidence )?interval|\(95%\)|95%:")
SOURCE = re.compile(r"(?:model_cards|tests|scripts)/\w|arxiv\.org")
# Page, start of a paragraph -> why its figures need no source
EXCEPTIONS = {
    ("docs/adding.md", "- A class is a mean"): "95% is what the threshold is defined by",
    ("docs/coming-from.md", "| `vitcls finetune` | timm"): "values of flags",
    (
        "docs/configuration.md",
        "| `distance_threshold`",
    ): "95% is what the threshold is defined by",
    ("docs/converting.md", "The functions compare"): "limits",
    ("docs/converting.md", "242 of"): "scripts/tools/make_coverage.py writes the section",
    ("docs/fine-tuning.md", "Photos are compared"): "a rule",
    ("docs/looking.md", "| part | what"): "what a printed number means",
    ("docs/looking.md", "The map is measured"): "how it is measured",
    ("docs/looking.md", "If tokens are still"): "what a value means",
    ("docs/predicting.md", "These statements hold"): "what a conformal set is",
}


def list_paragraphs(text: str) -> list[str]:
    """Return the paragraphs of a page without blocks; a table belongs to the paragraph before it."""
    paragraphs: list[str] = []
    for part in re.split(r"\n\s*\n", BLOCK.sub("", text)):
        if part.lstrip().startswith("|") and paragraphs:
            paragraphs[-1] += "\n" + part
        elif part.strip():
            paragraphs.append(part.strip())
    return paragraphs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paragraphs_with_figures_name_their_source(page: Path) -> None:
    text = page.read_text()
    printed = "\n".join(BLOCK.findall(text))
    name = str(page.relative_to(ROOT))
    used = set()
    for paragraph in list_paragraphs(text):
        prose = INTERVAL.sub("", CODE.sub("", paragraph))
        figures = {found for found in FIGURE.findall(prose) if found not in printed}
        if not figures or SOURCE.search(paragraph):
            continue
        exception = next(
            (each for each in EXCEPTIONS if each[0] == name and each[1] in paragraph), None
        )
        assert exception, f"{name}: {sorted(figures)} have no source: {paragraph[:100]}"
        used.add(exception)
    assert used == {each for each in EXCEPTIONS if each[0] == name}, "exceptions without a figure"
