"""Evaluate a vitcls model on labelled images, each exactly once.

    accelerate launch scripts/evaluate.py --model runs/digits --dataset digits

`--help` lists the flags. The work is done in modeling_vitcls/inference/evaluate.py.
"""

from command_line import errors_in_one_line, parse


def main() -> None:
    """Parse, evaluate, print; the package is imported only once the flags are known to be right."""
    options = parse("EvaluateOptions")

    from modeling_vitcls.inference.evaluate import evaluate_checkpoint

    with errors_in_one_line():
        evaluate_checkpoint(options)


if __name__ == "__main__":
    main()
