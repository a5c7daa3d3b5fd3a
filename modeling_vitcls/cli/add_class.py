"""`vitcls add-class`: add classes to a classifier, whose old logits stay equal to the bit.

    vitcls add-class --model runs/mine --dataset path/to/new --output-dir runs/with-new

The command is implemented in modeling_vitcls/training/add_class.py.
"""

from ..training.options import AddClassOptions


OPTIONS_CLASS = AddClassOptions


def run(options: AddClassOptions) -> None:
    """Add the classes, and write the model folder."""
    from ..training.add_class import add_classes_from_options

    add_classes_from_options(options)
