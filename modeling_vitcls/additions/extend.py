"""An old model is opened and gets a head, with its other outputs equal to the bit.

    with open_old_model(options) as old:
        images -> old.compute_features -> old.keep_scenes_together
               -> add_class.build_classes, add_task.build_task -> Addition
        records.write_addition(old, addition)    certify, or nothing is written

A head only reads the tokens of the finished forward pass (`config.extra_heads`), so the other
outputs keep their bits. Added classes are also a head of their own, and their logits are appended:
one product with more rows would change the bits of the old logits.
"""

import copy
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from ..data.images import LabeledImages
from ..data.labels import LabelSpace, get_label_space
from ..evaluation.evaluate import set_up_evaluation
from ..frozen.heads import set_weights
from ..frozen.scenes import (
    TrainedScenes,
    describe_scenes,
    keep_together,
    measure_limit,
    read_scenes,
)
from ..hub.local_paths import resolve_name
from ..hub.model_folder import ModelFolder, open_vitcls
from ..inference.features import (
    NUM_LAST_LAYERS,
    OWN_POOLING,
    FeatureLayout,
    Features,
    FrozenEncoder,
    Token,
)
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import ViTCLSForImageClassification
from ..runtime.distributed import set_mixed_precision
from ..runtime.errors import warn_on_first_process
from ..runtime.flags import to_flags
from ..runtime.staging import create_output_folder
from .certificate import load_old_model
from .options import AdditionOptions


@dataclass(frozen=True)
class Addition:
    """What a command adds to a model.

    Attributes:
        extended: the old model with another head, the last of its extra heads.
        record: of the addition, for results.json.
        parts: its images by split. The outputs of both models are compared with the first part.
        trained_scenes: recognizes the photos that trained the model and each added task (frozen/scenes.py).
        rows: of predictions.parquet, about the images that were left out; None if none could be.
    """

    extended: Any
    record: dict[str, Any]
    parts: dict[str, LabeledImages]
    trained_scenes: dict[str, TrainedScenes]
    rows: pd.DataFrame | None


@dataclass(frozen=True)
class OldModel:
    """A finished model that gets another head.

    Attributes:
        folder, model, processor: the model.
        encoder: its pass over labeled images.
        trained_scenes: recognizes the photos that trained it.
        staging: hidden folder, whose files move to the output folder.
        flags: of the command.
        console: shows the progress of a pass and the result.
    """

    folder: ModelFolder
    model: Any
    processor: ViTCLSImageProcessor
    encoder: FrozenEncoder
    trained_scenes: dict[str, TrainedScenes]
    staging: Path
    flags: dict[str, Any]
    console: Console

    @property
    def layout(self) -> FeatureLayout:
        """The features that a head may read, and in which the run of the model compared scenes."""
        known = self.trained_scenes.get("")
        if known is None or OWN_POOLING in known.layout.widths:
            return FeatureLayout.for_extra_heads(self.model.config, NUM_LAST_LAYERS)
        # has further layers and tokens if the run was allowed to read them
        return known.layout

    def compute_features(
        self, images: LabeledImages, label_space: LabelSpace, **arguments: Any
    ) -> Features:
        """Compute the features of the images that have a label; `arguments` are of the pass."""
        return self.encoder.compute_labeled_features(
            images, layout=self.layout, label_space=label_space, console=self.console, **arguments
        )

    def keep_scenes_together(
        self, images: LabeledImages, features: Features, label_space: LabelSpace
    ) -> tuple[Features, float, dict[str, Any]]:
        """Group the photos of a scene: another shot of a left-out photo would recognize it.

        How near these photos are is known from the run of the model. Otherwise, or if the photos of
        the run were too alike to tell scenes apart, it is measured on these photos.

        Returns:
            The features with these groups, the limit, and the record of `keep_together`.
        """
        run_pass = partial(self.compute_features, label_space=label_space)
        known = self.trained_scenes.get("")
        limit = 0.0
        if known is not None and known.layout == features.layout:
            limit = known.max_distance
        limit = limit or measure_limit(features, images, self.processor, run_pass)
        features, record = keep_together(features, limit, label_space)
        if text := describe_scenes(record):
            warn_on_first_process(text)
        return features, limit, record


@contextmanager
def open_old_model(options: AdditionOptions) -> Iterator[OldModel]:
    """Open the old model and the output folder, into which `write_addition` writes.

    Raises:
        ValueError, OSError: if the model cannot be read, or if the output folder is in use.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "a task or class is added by one process. Start the command without `accelerate launch`"
        )
    with create_output_folder(options.output_dir, "output_dir") as staging:
        yield build_old_model(options, staging)


def build_old_model(options: AdditionOptions, staging: Path) -> OldModel:
    """Load the old model and its image processor, and prepare passes of labeled images."""
    folder = open_vitcls(options.model)
    folder.provenance  # noqa: B018  # It is written after the work: an error should not come so late
    if folder.architecture == "ViTCLSModel":
        # It becomes a classifier whose logits are the pooled vector.
        model = folder.load(ViTCLSForImageClassification, num_labels=0)
    else:
        model = load_old_model(folder)

    accelerator, console, warn = set_up_evaluation(options.mixed_precision)
    set_mixed_precision(accelerator, options.mixed_precision, model.config)
    model.to(accelerator.device)
    processor = folder.load_processor()
    trained_scenes = read_scenes(folder)
    encoder = FrozenEncoder(
        model,
        max([NUM_LAST_LAYERS, *(each.layout.num_layers for each in trained_scenes.values())]),
        processor=processor,
        batch_size=options.batch_size,
        accelerator=accelerator,
        num_workers=options.num_workers,
        num_channels=model.config.num_channels,
        warn=warn,
    )
    return OldModel(
        folder=folder,
        model=model,
        processor=processor,
        encoder=encoder,
        trained_scenes=trained_scenes,
        staging=staging,
        # Otherwise, the folder data/photos would look like a dataset of the user `data`.
        flags=to_flags(options) | {"dataset": resolve_name(options.dataset)},
        console=console,
    )


def check_has_one_label(label_space: LabelSpace, dataset: str) -> None:
    """Raise ValueError unless a dataset has one label per image."""
    if label_space.kind != "single_label_classification":
        raise ValueError(
            f"one label per image is required, but {dataset} has labels for {label_space.kind}. "
            "Set `label_column` to a column with one label per image"
        )


# The head -----------------------------------------------------------------------------------------


def append_head(
    model: Any,
    name: str,
    tokens: Sequence[Token],
    labels: list[str],
    weight: np.ndarray,
    bias: np.ndarray,
    adds_classes: bool = False,
) -> Any:
    """Build the model with another extra head. It takes all other weights from `model`.

    Args:
        model: the old model.
        name: of the head.
        tokens: that the head reads.
        labels: L names.
        weight: [L, F] of the tokens side by side.
        bias: [L].
        adds_classes: whether the labels are further classes of the classifier.
    """
    poolings: dict[int, str] = {}
    for layer, kind in tokens:
        poolings[layer] = "cls_mean" if layer in poolings else kind
    head = {
        "labels": labels,
        "pooling": list(poolings.values()),
        "pooled_layers": list(poolings),
        "problem_type": "single_label_classification",
    }
    config = copy.deepcopy(model.config)
    if adds_classes:
        head["adds_classes"] = True
        names = [*get_label_space(config).names, *labels]
        config.id2label = dict(enumerate(names))
        config.label2id = {label: index for index, label in enumerate(names)}
        config.class_statistics = None  # The statistics of all classes are set afterwards
    config.extra_heads = {**(config.extra_heads or {}), name: head}
    extended = model.new_like(config).to(device=model.device, dtype=model.dtype)
    # The old model has no weights for the new head, which are set below.
    extended.load_state_dict(model.state_dict(), strict=False)
    old_statistics = getattr(model, "class_distance", None)
    if extended.config.class_statistics and old_statistics is not None and old_statistics.is_valid:
        extended.class_distance.claim(extended.base_model)  # The encoder is the same
    # This must come after the weights, because it compares the class statistics with them
    extended.eval()
    set_weights(extended.extra_heads[f"task_{name}"], weight, bias)
    return extended
