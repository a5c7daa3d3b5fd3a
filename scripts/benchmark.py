"""How fast it is, against others on the same work.

    python scripts/benchmark.py --work training --output training.json
    python scripts/benchmark.py --work inference --against transformers timm

Ours and theirs take turns, and what counts is the median of the ratios of neighbouring turns, so that other work on
the machine slows both. Nothing is measured if the outputs differ. The work is done in modeling_vitcls/benchmarking/.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from command_line import errors_in_one_line, from_flags, stop


@dataclass(frozen=True)
class BenchmarkOptions:
    """Compare the speed of ours and others' on the same work."""

    work: Literal["training", "inference"]
    """scripts/finetune.py against transformers' Trainer, or forward passes."""
    against: tuple[Literal["transformers", "timm"], ...] = ("transformers",)
    """Whom forward passes are compared with; training is always against transformers."""
    rows: tuple[str, ...] = ()
    """Names of the rows to measure. Default: all."""
    pairs: int = 9
    """Turns of each side."""
    output: Path | None = None
    """JSON file for the results."""
    toy: bool = False
    """Tiny models: tries the script, and measures nothing worth knowing."""


def main() -> None:
    """Parse, measure, report; the package is imported only once the flags are known to be right."""
    options = from_flags(BenchmarkOptions, description=__doc__)
    if options.pairs < 1:
        stop(f"--pairs is {options.pairs}: set a value 1 or more")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is loaded but from this machine

    from modeling_vitcls.benchmarking.inference import compare_inference
    from modeling_vitcls.benchmarking.report import said, show, write
    from modeling_vitcls.benchmarking.training import compare_training

    with errors_in_one_line():
        if options.work == "inference":
            found = compare_inference(options.rows, options.against, options.pairs, options.toy)
        else:
            finetune = Path(__file__).with_name("finetune.py")
            found = compare_training(options.rows, options.pairs, options.toy, finetune)
        comparisons = [said(comparison) for comparison in found]
        if options.output is not None:
            write(comparisons, options.output)
    show(comparisons)


if __name__ == "__main__":
    main()
