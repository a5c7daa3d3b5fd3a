"""Create the screenshot for docs/inspecting.md: the beginning of a report on a model trained on digits.

    python scripts/make_report_image.py --model runs/digits

The model is trained with `vitcls finetune --config scripts/recipes/digits.yaml --output-dir runs/digits`. The image is
a screenshot taken in Chromium, which `make browser` installs.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from playwright.sync_api import sync_playwright


WIDTH, HEIGHT, MARGIN = 1000, 900, 16  # window width, window height and margin below the last verdict, in pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class ReportImageOptions:
    """Create the screenshot for docs/inspecting.md."""

    model: Path = Path("runs", "digits")
    """Folder of the model."""
    output: Path = Path("docs", "images", "report.png")
    """Image file to write."""


def main() -> None:
    """Write a report, then take a screenshot of the report up to the last verdict."""
    options = tyro.cli(ReportImageOptions, description=__doc__)
    script = Path(__file__).with_name("inspect_tokens.py")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        report = Path(folder, "report.html")
        flags = ["--model", options.model, "--dataset", "digits", "--output", report]
        subprocess.run([sys.executable, script, *map(str, flags)], check=True)
        browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)  # None selects the browser of Playwright
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(report.as_uri())
        verdicts_box = page.locator("#verdicts").bounding_box()
        assert verdicts_box is not None
        clip = {
            "x": 0.0,
            "y": 0.0,
            "width": float(WIDTH),
            "height": verdicts_box["y"] + verdicts_box["height"] + MARGIN,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=options.output, full_page=True, clip=clip)
        browser.close()


if __name__ == "__main__":
    main()
