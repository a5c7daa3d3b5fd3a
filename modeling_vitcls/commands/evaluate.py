"""`vitcls evaluate`: evaluate a model on labeled images, each image exactly once.

    accelerate launch scripts/evaluate.py --model runs/digits --dataset digits
    accelerate launch scripts/evaluate.py --model runs/digits --dataset digits --frozen knn

The evaluation is implemented in modeling_vitcls/inference/evaluate.py, that of frozen features in frozen.py.
"""

from ..options import EvaluateOptions
from .parsing import errors_in_one_line


OPTIONS = EvaluateOptions


def run(options: EvaluateOptions) -> None:
    """Evaluate the model, or its frozen features for --frozen, and print the metrics."""
    from ..inference.evaluate import evaluate_checkpoint
    from ..inference.frozen import evaluate_frozen

    with errors_in_one_line():
        evaluate_frozen(options) if options.frozen else evaluate_checkpoint(options)
