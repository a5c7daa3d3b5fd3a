"""Define the packages of the wheel; all other settings are in pyproject.toml.

Two folders of the repository are shipped inside the package: the templates of model cards, and the recipes that
`vitcls finetune --config NAME` finds by name.
"""

from setuptools import find_packages, setup


DATA_FOLDERS = {"modeling_vitcls.model_cards": "model_cards", "modeling_vitcls.recipes": "scripts/recipes"}

setup(
    packages=[*find_packages(include=["modeling_vitcls", "modeling_vitcls.*"]), *DATA_FOLDERS],
    package_dir=DATA_FOLDERS,
)
