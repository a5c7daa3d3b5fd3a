"""Train a small ViT on handwritten digits, then load the model in a new process (`make demo`).

python scripts/demo.py [flags of `vitcls finetune`, to override the recipe]
"""

import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from rich.console import Console


SCRIPTS = Path(os.path.relpath(Path(__file__).parent))
RECIPE = SCRIPTS / "recipes" / "digits.yaml"
OUTPUT = Path("runs", "demo")
PRETRAINED_MODEL = "timm:vit_small_patch14_reg4_dinov2.lvd142m"

# Default values of accelerate's flags. accelerate prints a warning if these flags are not set.
LAUNCH_FLAGS = (
    "--quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
)

console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    """Train and load a model, and print the next steps.

    If a command fails, exit with its status.
    """
    start_time = time.perf_counter()
    output = get_output_dir(sys.argv[1:])
    finetune_arguments = [SCRIPTS / "finetune.py", "--config", RECIPE, "--output-dir", OUTPUT]
    if output == OUTPUT:  # replace the model from an earlier demo
        finetune_arguments.append("--overwrite")
    run_step(
        "1. Fine-tune a small ViT on 1,438 handwritten digits",
        ["accelerate", "launch", *finetune_arguments],
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *LAUNCH_FLAGS,
            *finetune_arguments,
            *sys.argv[1:],
        ],
    )
    run_step(
        "2. Load the model in a new process, without importing this package, and classify the 359 "
        "held-out digits",
        ["python", SCRIPTS / "demo_load.py", output],
        [sys.executable, SCRIPTS / "demo_load.py", output],
    )
    console.print(f"\n[bold green]Done in {time.perf_counter() - start_time:.0f} s.[/] Next:")
    console.print(
        f"  {output / 'README.md'}: the model card, next to the weights, results.json and "
        "metrics.jsonl"
    )
    if (output / "report.html").exists():
        console.print(
            f"  {output / 'report.html'}: open it in a browser to see the attention of the tokens"
        )
    console.print(f"  {RECIPE}: the recipe; change the number of tokens and run the demo again")
    console.print("  fine-tune a pre-trained model on your own images, with one folder per class:")
    vitcls_command = os.path.relpath(Path(sys.executable).with_name("vitcls"))
    console.print(
        f"    {vitcls_command} finetune --model {PRETRAINED_MODEL} --dataset FOLDER --output-dir "
        "runs/mine"
    )
    console.print("  docs/README.md: the documentation, one page per task")


def run_step(title: str, short_command: list[object], command: list[object]) -> None:
    """Print a title and a short form of a command, and run the command."""
    console.print(f"\n[bold]{title}[/]\n  $ {' '.join(map(str, short_command))}\n")
    # More threads hardly speed up small models, and slow them down considerably if other programs
    # use the cores.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    status = subprocess.run(list(map(str, command)), env=environment, check=False).returncode
    if status:
        raise SystemExit(status)


def get_output_dir(flags: list[str]) -> Path:
    """Return the value of the last --output-dir, or the default."""
    output_dirs = [Path(value) for name, value in pairwise(flags) if name == "--output-dir"]
    return output_dirs[-1] if output_dirs else OUTPUT


if __name__ == "__main__":
    main()
