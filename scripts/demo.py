"""Train a small ViT on handwritten digits, then evaluate the saved model (`make demo`).

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

console = Console(soft_wrap=True, highlight=False)


def main() -> None:
    """Train and evaluate a model, and print the next steps.

    If a command fails, exit with its status.
    """
    start_time = time.perf_counter()
    flags = ["--config", RECIPE, "--output-dir", OUTPUT, *sys.argv[1:]]
    output = get_output_dir(sys.argv[1:])
    if output == OUTPUT:  # replace the model from an earlier demo
        flags.append("--overwrite")
    run_step(
        "1. Fine-tune a small ViT on 1,438 handwritten digits", SCRIPTS / "finetune.py", *flags
    )
    run_step(
        "2. Load the model in a new process, and classify the 359 held-out digits",
        SCRIPTS / "evaluate.py",
        *("--model", output),
        *("--dataset", "digits"),
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


def run_step(title: str, *arguments: object) -> None:
    """Print a title and the command, and run it in a new process."""
    command = list(map(str, arguments))
    console.print(f"\n[bold]{title}[/]\n  $ python {' '.join(command)}\n")
    # More threads hardly speed up small models, and slow them down considerably if other programs
    # use the cores.
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    status = subprocess.run([sys.executable, *command], env=environment, check=False).returncode
    if status:
        raise SystemExit(status)


def get_output_dir(flags: list[str]) -> Path:
    """Return the value of the last --output-dir, or the default."""
    output_dirs = [Path(value) for name, value in pairwise(flags) if name == "--output-dir"]
    return output_dirs[-1] if output_dirs else OUTPUT


if __name__ == "__main__":
    main()
