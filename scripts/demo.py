"""What `make demo` runs: train a small ViT on real handwritten digits, then load and use it in a fresh process.

python scripts/demo.py [flags of scripts/finetune.py, to override the recipe]
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

# Named, so that accelerate does not list the defaults that it would have chosen anyway.
LAUNCH_FLAGS = "--quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no".split()

console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    """Train, load, and say what to do next. Ends with the status of the step that failed, if one did."""
    started = time.perf_counter()
    output = output_dir(sys.argv[1:])
    recipe = [SCRIPTS / "finetune.py", "--config", RECIPE, "--output-dir", OUTPUT]
    if output == OUTPUT:  # its own folder, where it replaces an earlier demo
        recipe.append("--overwrite")
    step(
        "1. Fine-tune a small ViT on 1,425 handwritten digits",
        ["accelerate", "launch", *recipe],
        [sys.executable, "-m", "accelerate.commands.launch", *LAUNCH_FLAGS, *recipe, *sys.argv[1:]],
    )
    step(
        "2. Load it in a fresh process, without importing this package, and classify the 372 held-out digits",
        ["python", SCRIPTS / "demo_load.py", output],
        [sys.executable, SCRIPTS / "demo_load.py", output],
    )
    console.print(f"\n[bold green]Done in {time.perf_counter() - started:.0f} s.[/] Where to look next:")
    console.print(f"  {output / 'README.md'}: the model card; beside it the weights, results.json and metrics.jsonl")
    if (output / "report.html").exists():
        console.print(f"  {output / 'report.html'}: open it in a browser to see what its tokens look at")
    console.print(f"  {RECIPE}: what was trained; change a token count and run again")
    console.print("  your own images, in one folder per class:")
    console.print(
        "    accelerate launch scripts/finetune.py --model vitcls-tiny --dataset FOLDER --output-dir runs/mine"
    )
    console.print("  docs/README.md: the documentation, one page per task")


def step(title: str, shown: list[object], command: list[object]) -> None:
    """Announce and run one command."""
    console.print(f"\n[bold]{title}[/]\n  $ {' '.join(map(str, shown))}\n")
    # One thread: a model this small gains little from more, and loses much where other programs use the cores.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    status = subprocess.run(list(map(str, command)), env=environment, check=False).returncode
    if status:
        raise SystemExit(status)


def output_dir(flags: list[str]) -> Path:
    """The last --output-dir, which is the one that counts."""
    chosen = [Path(value) for name, value in pairwise(flags) if name == "--output-dir"]
    return chosen[-1] if chosen else OUTPUT


if __name__ == "__main__":
    main()
