"""`vitcls evaluate`: evaluate a model on labeled images, each image exactly once.

    vitcls evaluate --model runs/digits --dataset digits
    vitcls evaluate --model runs/digits --dataset digits --frozen knn

The evaluation is implemented in modeling_vitcls/inference/evaluate.py, and in frozen.py for frozen
features.
"""

from ..inference.options import EvaluateOptions
from .api import run_evaluation


OPTIONS_CLASS = EvaluateOptions


def run(options: EvaluateOptions) -> None:
    """Evaluate the model or its frozen features, and print the results."""
    run_evaluation(options)
