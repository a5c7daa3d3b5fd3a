"""Run the commands of a page in the process of its Python blocks, which has imported the libraries."""

import os
import shlex
import subprocess
import sys

from helpers.accelerate_state import reset_accelerate
from helpers.command_in_process import run_here


# Added to commands, so that they take seconds: no data loading processes, and small random models.
FAST_FLAGS = {
    "finetune": "--num-workers 0 --no-report",
    "evaluate": "--num-workers 0",
    "inspect": "--max-images 16 --num-images 2",
}
SMALL_MODEL = (
    "--image-size 28 --patch-size 14 --hidden-size 32 --num-hidden-layers 2 --num-attention-heads 2"
)


def run_command(line: str) -> None:
    """Run one command as a page prints it; a launcher or a script has a process of its own."""
    words = shlex.split(line, comments=True)
    command = next((word for word in words if word in FAST_FLAGS), "")
    words += FAST_FLAGS.get(command, "").split()
    if command == "finetune" and any(word.startswith("vitcls-") for word in words):
        words += [*SMALL_MODEL.split(), "--epochs", "2"]
    words = words[1:] if words[:2] == ["accelerate", "launch"] else words
    program, *flags = words
    if program == "vitcls":
        reset_accelerate()
        assert run_here(*flags) == 0, line
        return
    module = {"launch": ["-m", "accelerate.commands.launch"], "python": []}[program]
    subprocess.run([sys.executable, *module, *flags], check=True, env=os.environ)
