"""Predict the labels of images, or write their features.

    python scripts/predict.py --model runs/mine photo.jpg path/to/folder
    python scripts/predict.py --model runs/mine --list files.txt --output labels.csv
    accelerate launch scripts/predict.py --model runs/mine --dataset path/or/hub-id --features cls --output features

`--help` lists the flags. The work is done in modeling_vitcls/inference/predict.py.
"""

from dataclasses import dataclass

import tyro
from command_line import errors_in_one_line, from_flags, options_module, stop


PredictOptions = options_module().PredictOptions


@dataclass(frozen=True)
class Command(PredictOptions):
    __doc__ = PredictOptions.__doc__

    paths: tyro.conf.Positional[tuple[str, ...]] = ()
    """Image files, folders (with all folders in them), or URLs."""


def main() -> None:
    """Parse, predict; the package is imported only once the flags are known to be right.

    Broken images have their error in a row; only if there is no answer at all, the exit status is 1.
    """
    options = from_flags(Command)

    from transformers.utils.logging import disable_progress_bar

    from modeling_vitcls.inference.predict import predict_images

    disable_progress_bar()  # of loading weights
    with errors_in_one_line():
        summary = predict_images(options)
    if options.output is not None and summary.num_images:
        print(f"{options.output}: {summary.num_images:,} images, {summary.num_failed:,} without an answer")
    if summary.num_failed and summary.num_failed == summary.num_images:
        stop(f"error: no answer for any of the {summary.num_images} images: see the column `error`", status=1)


if __name__ == "__main__":
    main()
