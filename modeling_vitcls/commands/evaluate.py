"""`vitcls evaluate`: evaluate a model on labeled images, each image exactly once.

    accelerate launch scripts/evaluate.py --model runs/digits --dataset digits

The evaluation is implemented in modeling_vitcls/inference/evaluate.py.
"""

from ..options import EvaluateOptions
from .parsing import errors_in_one_line


OPTIONS = EvaluateOptions


def run(options: EvaluateOptions) -> None:
    """Evaluate the model and print the metrics."""
    from ..inference.evaluate import evaluate_checkpoint

    with errors_in_one_line():
        evaluate_checkpoint(options)
