"""What a run trains: the interface of run.py to finetune.py."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..data.images import LabeledImages
from ..data.labels import LabelSpace
from ..data.sources import Splits
from ..data.splits import TrainingData
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from .frozen_encoder import FrozenEncoder
from .losses import Objective
from .model import InitialModel
from .options import FinetuneOptions
from .reporter import Reporter
from .teacher import Teacher


class Recipe(Protocol):
    """A kind of training: what its flags mean, and what it reads and trains."""

    def load_images(self, options: Any, initial: InitialModel) -> Splits:
        """Read the labels and keys of the images."""

    def build_setup(
        self, options: Any, initial: InitialModel, images: Splits, reporter: Reporter
    ) -> "TrainingSetup":
        """Load the model, and prepare loss and evaluation."""

    def build_frozen_encoder(
        self, options: Any, initial: InitialModel, images: Splits, setup: "TrainingSetup"
    ) -> tuple[FrozenEncoder | None, str]:
        """Build what fits the heads, before the steps or instead of them, or say why there is none."""

    def has_one_label(self, labels: LabelSpace) -> bool:
        """Whether the model predicts one label per image: it has class statistics and a temperature."""

    def list_warnings(self, data: TrainingData, group_column: str | None) -> list[str]:
        """List what is wrong with the images."""

    def measure_start(self, setup: "TrainingSetup", held_out: Any) -> dict[str, Any]:
        """Measure what only the start can say, on the images of an evaluator: fields of results.json."""


@dataclass
class TrainingSetup:
    """Model, loss and evaluation of a run, and its texts."""

    model: Any  # ViTCLS model without wrappers; parameters that do not train are frozen
    processor: ViTCLSImageProcessor
    build_objective: Callable[[TrainingData], Objective]
    # Returns a function from a model to the metrics of images, of which there may be none; an
    # `Evaluator` if the model can be calibrated.
    build_evaluator: Callable[[TrainingData, LabeledImages], Any]
    # Name of the metric that selects the best checkpoint, and is printed. Higher values are better.
    selection_metric: str
    pass_arguments: dict[str, Any]  # Arguments of each `ImagePass` of this run, without the images
    random_parameters: set[str]  # Names of the parameters without trained weights
    # Lines to print before training, keyed by name
    summary_lines: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)  # Fields of results.json
    teacher: Teacher | None = None

    @property
    def has_trained_heads(self) -> bool:
        """Whether the checkpoint contains every head."""
        return all(name.startswith("vitcls.") for name in self.random_parameters)


def build_pass_arguments(
    options: FinetuneOptions,
    label_space: LabelSpace,
    processor: Any,
    num_channels: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """Build the keyword arguments of the passes over images of a run, except for the images."""
    return {
        "processor": processor,
        "label_space": label_space,
        "batch_size": options.batch_size,
        "accelerator": reporter.accelerator,
        "num_workers": options.num_workers,
        "num_channels": num_channels,
        "warn": reporter.warn,
    }
