"""`vitcls add-class`: add classes to a classifier, whose old logits stay equal to the bit.

    vitcls add-class --model runs/mine --dataset path/to/new --output-dir runs/with-new --old-dataset path/to/old

The command is implemented in modeling_vitcls/training/additions.py.
"""

from ..training.options import AddClassOptions
from .api import run_add_class


OPTIONS_CLASS = AddClassOptions


def run(options: AddClassOptions) -> None:
    """Add the classes, and write the model folder with its card."""
    run_add_class(options)
