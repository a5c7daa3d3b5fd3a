"""Create the screenshot for docs/inspecting.md: the first screen of a report.

The report is about a model that was trained on digits.

    python scripts/tools/make_report_image.py --report runs/digits/report.html

`vitcls finetune --config digits --output-dir runs/digits` writes the report. `make browser`
installs Chromium, which takes the screenshot.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro
from playwright.sync_api import sync_playwright


WIDTH, HEIGHT = 1280, 900  # of the screenshot in pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class ReportImageOptions:
    """Create the screenshot for docs/inspecting.md."""

    report: Path = Path("runs", "digits", "report.html")
    """Report to show."""
    output: Path = Path("docs", "images", "report.png")
    """Image file to write."""


def main() -> None:
    """Take a screenshot of the beginning of a report."""
    options = tyro.cli(ReportImageOptions, description=__doc__)
    with sync_playwright() as playwright:
        # None selects the browser of Playwright
        browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(options.report.resolve().as_uri(), timeout=300_000)
        page.screenshot(path=options.output, timeout=300_000)
        browser.close()


if __name__ == "__main__":
    main()
