"""`vitcls evaluate`: evaluate a model on labeled images, each image exactly once.

    accelerate launch scripts/evaluate.py --model runs/digits --dataset digits

The evaluation is implemented in modeling_vitcls/inference/evaluate.py.
"""

from ..options import EvaluateOptions
from .parsing import exit_on_error


OPTIONS = EvaluateOptions


def run(options: EvaluateOptions) -> None:
    """Evaluate the model and print the metrics."""
    from ..inference.evaluate import evaluate_checkpoint

    with exit_on_error():
        evaluate_checkpoint(options)
