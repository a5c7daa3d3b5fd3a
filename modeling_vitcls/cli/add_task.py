"""`vitcls add-task`: add a task to a finished model, whose other outputs stay equal to the bit.

    vitcls add-task --model runs/mine --dataset path/to/weather --name weather --output-dir runs/with-weather
    vitcls add-task --model runs/with-weather --dataset path/to/weather --remove-task weather --output-dir runs/without

The command is implemented in modeling_vitcls/training/additions.py.
"""

from ..training.options import AddTaskOptions
from .api import run_add_task


OPTIONS_CLASS = AddTaskOptions


def run(options: AddTaskOptions) -> None:
    """Add or remove the task, and write the model folder with its card."""
    run_add_task(options)
