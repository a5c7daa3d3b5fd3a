"""`vitcls add-class`: add classes to a classifier, whose old logits stay equal to the bit.

    vitcls add-class --model runs/mine --dataset path/to/new --output-dir runs/with-new

The command is implemented in modeling_vitcls/additions/add_class.py.
"""

from typing import Any

from ..additions.options import AddClassOptions


OPTIONS_CLASS = AddClassOptions


def run(options: AddClassOptions) -> dict[str, Any]:
    """Add the classes, write the model folder, its report and its card, and return the record of the classes."""
    from ..additions.add_class import build_classes
    from ..additions.extend import open_old_model
    from ..additions.records import write_addition
    from ..hub.model_folder import ModelFolder
    from ..publishing.report import finish_run

    with open_old_model(options) as old:
        record = write_addition(old, build_classes(old, options))
    finish_run(ModelFolder(options.output_dir))
    return record
