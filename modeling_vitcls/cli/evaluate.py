"""`vitcls evaluate`: evaluate a model on labeled images, each image exactly once.

    vitcls evaluate --model runs/digits --dataset digits

The evaluation is implemented in modeling_vitcls/evaluation/evaluate.py.
"""

from ..inference.options import EvaluateOptions


OPTIONS_CLASS = EvaluateOptions


def run(options: EvaluateOptions) -> None:
    """Evaluate the model, and print the results."""
    from ..evaluation.evaluate import evaluate_checkpoint

    evaluate_checkpoint(options)
