"""`vitcls predict`: predict the labels of images, or write their features.

    vitcls predict --model runs/mine photo.jpg path/to/folder
    vitcls predict --model runs/mine --list files.txt --output labels.csv
    vitcls predict --model runs/mine --dataset path/or/hub-id --features cls --output features

The predictions are implemented in modeling_vitcls/inference/predict.py.
"""

from dataclasses import dataclass

import tyro

from ..options import PredictOptions
from .parsing import exit_with_message


@dataclass(frozen=True)
class PredictFlags(PredictOptions):
    __doc__ = PredictOptions.__doc__

    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files, folders (including subfolders), or URLs."""


OPTIONS = PredictFlags


def run(options: PredictFlags) -> None:
    """Run the prediction and print a summary.

    The row of an unreadable image contains the error. The exit status is 1 only if no image has a prediction.
    """
    from transformers.utils.logging import disable_progress_bar

    from ..inference.predict import predict_images

    disable_progress_bar()  # hides the progress bar of weight loading
    summary = predict_images(options)
    if options.output is not None and summary.num_images:
        print(f"{options.output}: {summary.num_images:,} images, {summary.num_failed:,} without a prediction")
    if summary.num_failed and summary.num_failed == summary.num_images:
        exit_with_message(
            f"error: none of the {summary.num_images} images has a prediction: see the column `error`", status=1
        )
