"""`vitcls add-task`: add a task to a finished model, whose other outputs stay equal to the bit.

    vitcls add-task --model runs/mine --dataset path/to/weather --name weather --output-dir runs/with-weather

The command is implemented in modeling_vitcls/training/add_task.py.
"""

from ..training.options import AddTaskOptions


OPTIONS_CLASS = AddTaskOptions


def run(options: AddTaskOptions) -> None:
    """Add the task, and write the model folder."""
    from ..training.add_task import add_task_from_options

    add_task_from_options(options)
