"""Images of `vitcls inspect`, decoded on access.

PATHS       files and folders; if a folder has the name of a class, its images have this label
--dataset   a dataset, loaded as in `vitcls evaluate`
"""

from pathlib import Path

import pandas as pd

from ..data.cells import normalize_name
from ..data.evaluation_data import EvaluationData, load_evaluation_data
from ..data.images import DatasetImages, LabeledImages
from ..data.label_matching import translate_labels
from ..data.labels import UNLABELED, LabelSpace, OneLabel
from ..data.options import DataOptions
from ..data.splits_table import EMPTY_TABLE
from ..inference.inputs import list_records
from .options import InspectOptions


def open_images(
    options: InspectOptions, label_space: LabelSpace, splits: pd.DataFrame = EMPTY_TABLE
) -> EvaluationData:
    """Open the images of `paths` or `dataset`, with the label indices of a classifier.

    `label_space` belongs to the classifier, or is UNLABELED. `splits` are the rows of
    splits.parquet about the model.

    Raises:
        ValueError: if there are no images, the dataset cannot be read, or its labels do not match
            the model.
    """
    if options.dataset is None:
        return open_paths(options.paths, label_space)

    data_options = DataOptions(
        dataset=options.dataset,
        image_column=options.image_column,
        label_column=options.label_column,
        label_separator=options.label_separator,
    )
    use_labels = label_space != UNLABELED
    data = load_evaluation_data(data_options, options.split, splits, use_labels=use_labels)
    images = data.images
    if use_labels:
        images = translate_labels(images, data.label_space, label_space)
    description = f"{Path(options.dataset).resolve().name}, {data.description}"
    return data._replace(images=images, label_space=label_space, description=description)


def open_paths(paths: tuple[str, ...], label_space: LabelSpace) -> EvaluationData:
    """Open image files and folders.

    The class of each image is the name of its folder; without a class of this name, it has no
    label. There are no labels if images do not have exactly one class.
    """
    files = [str(record.content) for record in list_records(paths)]
    if not isinstance(label_space, OneLabel):
        label_space = UNLABELED
    class_names = label_space.names if label_space.columns else []
    indices = {normalize_name(name): index for index, name in enumerate(class_names)}
    labels = [indices.get(normalize_name(Path(file).resolve().parent.name)) for file in files]
    images = LabeledImages(DatasetImages.from_list(files), labels)
    description = ", ".join(Path(path).resolve().name for path in paths)
    return EvaluationData(label_space, images, "", 0, description)
