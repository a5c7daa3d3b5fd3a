"""`vitcls predict`: predict the labels of images, or write their features.

    vitcls predict --model runs/mine photo.jpg path/to/folder
    vitcls predict --model runs/mine --list files.txt --output labels.csv
    vitcls predict --model runs/mine --dataset path/or/hub-id --features cls --output cls.parquet

The prediction is implemented in modeling_vitcls/inference/predict.py.
"""

from ..inference.options import PredictOptions
from ..runtime.errors import format_name_list
from .parsing import make_positional


OPTIONS_CLASS = make_positional(PredictOptions, "paths")


def run(options: PredictOptions) -> None:
    """Predict the labels of images and print a summary.

    Exit with status 1 if no image has a prediction, or if a file does not exist.

    In the output, the row of an unreadable image contains an error message.
    """
    from ..inference.predict import predict_images

    num_images, num_failed, missing_files = predict_images(options)
    if options.output is not None and num_images:
        print(f"{options.output}: {num_images:,} images, {num_failed:,} without a prediction")
    if num_failed and num_failed == num_images:
        raise ValueError(
            f"none of the {num_images} images has a prediction. See the column `error` in the output"
        )
    if missing_files:
        raise ValueError(
            f"{len(missing_files):,} of the {num_images:,} images do not exist: "
            f"{format_name_list(missing_files)}. Check the paths"
        )
