"""Define the packages and the description of the wheel; all other settings are in pyproject.toml.

The recipes that `vitcls finetune --config NAME` finds by name are shipped inside the package. Relative links and
images in the README would be broken on the page of the package index, so they become absolute if [project.urls]
contains `Repository`.
"""

import re
import tomllib
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
DATA_FOLDERS = {
    "modeling_vitcls.recipes": "scripts/recipes",
}


def read_description() -> str:
    """Return the README, with absolute links if the repository has an address."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = project["urls"].get("Repository")
    if address is None:
        return readme
    readme = re.sub(r"(!\[[^]]*\])\((?!https?:)([^)#]+)\)", rf"\1({address}/raw/main/\2)", readme)
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", rf"]({address}/blob/main/\1)", readme)


setup(
    long_description=read_description(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["modeling_vitcls", "modeling_vitcls.*"]), *DATA_FOLDERS],
    package_dir=DATA_FOLDERS,
)
