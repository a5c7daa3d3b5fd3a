"""`vitcls evaluate`: evaluate a model on labeled images, each image exactly once.

    vitcls evaluate --model runs/digits --dataset digits
    vitcls evaluate --model runs/digits --dataset digits --frozen knn

The evaluation is implemented in modeling_vitcls/inference/evaluate.py, and in frozen.py for frozen features.
"""

from ..inference.options import EvaluateOptions


OPTIONS_CLASS = EvaluateOptions


def run(options: EvaluateOptions) -> None:
    """Evaluate the model, or its frozen features if --frozen is set, and print the metrics; or audit
    the dataset if --audit is set."""
    from .functions import run_evaluation

    run_evaluation(options)
