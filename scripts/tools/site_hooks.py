"""Hooks of `mkdocs build`: pages from outside docs/, links between pages, and the API reference.

docs/ is the only source of the pages that it contains. The home page is README.md, docs/README.md
is the table of contents, and the cards and the pages in ADDED are added at their paths in the
repository. Links are written for the repository, so that they work there; here they become links
between the pages of the site.
"""

import posixpath
import re
import tomllib
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from modeling_vitcls import IMPORT_STRUCTURE


ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Path in the repository -> path in the site.
RENAMED = {
    "README.md": "index.md",
    "docs/README.md": "contents.md",
}
ADDED = [
    "CONTRIBUTING.md",
    "CODE_OF_CONDUCT.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "LICENSE",
    "notebooks/photos.ipynb",
    "notebooks/tokens.ipynb",
    *(
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "scripts" / "studies" / "compared").glob("*.*")
    ),
]
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
METADATA = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)  # of model cards, for the Hub


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Link to the repository if pyproject.toml has its address."""
    config.repo_url = PROJECT["urls"].get("Repository")
    return config


def to_site_path(path: str) -> str:
    """Return the path in the site of a file of the repository."""
    return RENAMED.get(path, path.removeprefix("docs/"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and images from outside docs/, and the API reference."""
    if contents := files.get_file_from_path("README.md"):
        files.remove(contents)
    cards = [path for path in (ROOT / "model_cards").rglob("*") if path.suffix in (".md", ".png")]
    for path in [ROOT / name for name in (*RENAMED, *ADDED)] + cards:
        source = path.relative_to(ROOT).as_posix()
        if path.suffix == ".md":
            text = METADATA.sub("", path.read_text(encoding="utf-8"))
            files.append(File.generated(config, to_site_path(source), content=text))
        else:
            files.append(File.generated(config, to_site_path(source), abs_src_path=str(path)))
    files.append(File.generated(config, "api.md", content=build_api_page()))
    return files


def build_api_page() -> str:
    """Return the page with the public objects, from their docstrings."""
    sections = ["# API reference", "All objects are imported from `modeling_vitcls`."]
    titles = {"cli": "Commands as functions", "conversion": "Conversion", "inference": "Features"}
    last_title = ""
    for module, names in IMPORT_STRUCTURE.items():
        title = titles.get(module.partition(".")[0], "Models")
        if title != last_title:
            sections.append(f"## {title}")
        last_title = title
        sections += [f"::: modeling_vitcls.{module}.{name}" for name in names]
    return "\n\n".join(sections)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to files of the repository with links to pages of the site."""
    site_path = page.file.src_uri
    by_site_path = {site: source for source, site in RENAMED.items()}
    in_docs = (ROOT / "docs" / site_path).exists()
    source = by_site_path.get(site_path) or (f"docs/{site_path}" if in_docs else site_path)

    def rewrite(found: re.Match[str]) -> str:
        link, mark, anchor = found[2].partition("#")
        if not link or "://" in link:
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if target in ("model_cards/studies", "model_cards"):
            target = "docs/evaluating.md" if target.endswith("studies") else "model_cards/README.md"
        relative = posixpath.relpath(to_site_path(target), posixpath.dirname(site_path) or ".")
        return f"{found[1]}{relative}{mark}{anchor}{found[3]}"

    parts = FENCE.split(markdown)
    blocks = [*FENCE.findall(markdown), ""]
    return "".join(
        LINK.sub(rewrite, part) + block for part, block in zip(parts, blocks, strict=True)
    )
