"""`vitcls evaluate`: evaluate a model on labeled images, each image exactly once.

    vitcls evaluate --model runs/digits --dataset digits
    vitcls evaluate --model runs/digits --dataset digits --frozen knn

The evaluation is implemented in modeling_vitcls/inference/evaluate.py, and in frozen.py for frozen
features.
"""

from ..inference.options import EvaluateOptions


OPTIONS_CLASS = EvaluateOptions


def run(options: EvaluateOptions) -> None:
    """Evaluate the model and print the metrics.

    With --frozen, its frozen features are evaluated; with --audit, the dataset is audited.
    """
    from .functions import run_evaluation

    run_evaluation(options)
