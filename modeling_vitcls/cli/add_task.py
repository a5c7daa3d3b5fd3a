"""`vitcls add-task`: add a task to a finished model, whose other outputs stay equal to the bit.

    vitcls add-task --model runs/mine --dataset path/to/weather --name weather --output-dir runs/with-weather

The command is implemented in modeling_vitcls/additions/add_task.py.
"""

from typing import Any

from ..additions.options import AddTaskOptions


OPTIONS_CLASS = AddTaskOptions


def run(options: AddTaskOptions) -> dict[str, Any]:
    """Add the task, write the model folder, its report and its card, and return the record of the task."""
    from ..additions.add_task import build_task
    from ..additions.extend import open_old_model
    from ..additions.records import write_addition
    from ..hub.model_folder import ModelFolder
    from ..publishing.report import finish_run

    with open_old_model(options) as old:
        record = write_addition(old, build_task(old, options))
    finish_run(ModelFolder(options.output_dir))
    return record
