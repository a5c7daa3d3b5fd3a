"""`vitcls predict`: predict the labels of images, or write their features.

    vitcls predict --model runs/mine photo.jpg path/to/folder
    vitcls predict --model runs/mine --dataset table.csv --output labels.csv
    vitcls predict --model runs/mine --dataset path/or/hub-id --features cls --output cls.parquet

The prediction is implemented in modeling_vitcls/inference/predict.py.
"""

from ..inference.options import PredictOptions
from .parsing import make_positional


OPTIONS_CLASS = make_positional(PredictOptions, "paths")


def run(options: PredictOptions) -> None:
    """Predict the labels of images, and print or write the rows.

    In the output, the row of an unreadable image contains an error message.
    """
    from ..inference.predict import predict_images

    predict_images(options)
