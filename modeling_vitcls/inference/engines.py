"""The engine that `--backend auto` runs: PyTorch, or a graph that is faster on this CPU.

MODEL/.engines/
    choices.json                        the hashes of weights and config and, per kind of job, "torch" or a graph
    logits-224x224.onnx, .xml, .bin     graphs of this model, with reports (logits-224x224.xml.json)

This file describes jobs and opens the graphs that were chosen. export/engine_choice.py measures the
engines and writes the graphs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.aspect_ratio import get_output_size
from ..hub.model_files import CONFIG_FILE, hash_files
from ..runtime.files import read_json
from ..runtime.system import get_processor_name, get_versions
from .exported_graphs import ExportedModel, check_weights
from .load_model import TORCH, LoadedModel


ENGINES_FOLDER = ".engines"
CHOICES_FILE = "choices.json"
ENGINE_NAMES = {".onnx": "ONNX Runtime", ".xml": "OpenVINO"}
MIN_IMAGES = 64  # opening a graph takes about as long as this many images of a ViT-S


@dataclass(frozen=True)
class Job:
    """A model in PyTorch, and what a command computes with it.

    Attributes:
        loaded: The model.
        use_head: Whether the job requires the logits, or the final hidden state.
        compute: Function (model, images [B, C, H, W]) that computes what the job requires.
        num_images: Number of images; None if it is unknown.
        mixed_precision: "no", "bf16" or "fp16".
    """

    loaded: LoadedModel
    use_head: bool
    compute: Callable[[Any, torch.Tensor], Any]
    num_images: int | None
    mixed_precision: str

    @property
    def engines_folder(self) -> Path:
        """Folder of the graphs."""
        return self.loaded.folder.path / ENGINES_FOLDER

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the preprocessed images."""
        return get_output_size(self.loaded.processor, self.loaded.model.config.image_height_width)

    @property
    def graph_name(self) -> str:
        """Name of the graphs, without a suffix."""
        height, width = self.image_size
        return f"{'logits' if self.use_head else 'tokens'}-{height}x{width}"

    def build_key(self) -> str:
        """Return a text with everything that the speeds depend on, except the model."""
        versions = get_versions("openvino", "onnxruntime")
        libraries = ("modeling_vitcls", "torch", "openvino", "onnxruntime")
        parts = [
            self.graph_name,
            f"precision {self.mixed_precision}",
            f"batch {self.loaded.batch_size}",
            f"{torch.get_num_threads()} threads",
            get_processor_name(),
            *(f"{name} {versions.get(name)}" for name in libraries),
        ]
        return ", ".join(parts)

    def hash_model(self) -> dict[str, str]:
        """Return the SHA-256 of the configuration and of each weight file.

        A graph contains the configuration, too.
        """
        config_hash = hash_files([self.loaded.folder.path / CONFIG_FILE])
        return config_hash | (self.loaded.folder.weights_sha256 or {})

    def run(self, model: Any, pixel_values: torch.Tensor) -> Any:
        """Compute what the job requires for images [B, C, H, W], in its precision."""
        is_autocast = self.mixed_precision == "bf16"
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
            return self.compute(model, pixel_values)

    def open_graph(self, name: str) -> ExportedModel:
        """Open a graph in the folder of the graphs. Raise ValueError if it cannot be read."""
        return ExportedModel(
            file=self.engines_folder / name,
            config=self.loaded.model.config,
            use_head=self.use_head,
            mixed_precision=self.mixed_precision,
        )


@dataclass(frozen=True)
class Choice:
    """The engine for a kind of job and its speed relative to PyTorch.

    The engine is "torch" or the name of a graph.
    """

    engine: str
    times_as_fast: float


def compute_logits(model: Any, pixel_values: torch.Tensor) -> Any:
    """Return the logits of a classifier for images [B, C, H, W]."""
    return model(pixel_values).logits


def get_engine_name(model: Any) -> str:
    """Return the name of the engine that runs a model."""
    return ENGINE_NAMES[model.graph.file.suffix] if isinstance(model, ExportedModel) else "PyTorch"


EngineChooser = Callable[[Job], Any]  # returns the model of the job, or a graph


def select_engine(job: Job, backend: str, choose_engine: EngineChooser | None = None) -> Any:
    """Return the model of a job or, if `backend` is "auto" and a graph is faster, the graph.

    Without `choose_engine`, only a graph that was chosen before for such a job is used.
    """
    if backend != "auto" or (job.num_images is not None and job.num_images < MIN_IMAGES):
        return job.loaded.model
    return choose_engine(job) if choose_engine is not None else open_chosen_engine(job)


def open_chosen_engine(job: Job) -> Any:
    """Return the graph that was chosen for such a job before, or else the model in PyTorch.

    Raises:
        ValueError: If the graph cannot be opened.
    """
    choice = read_choices(job).get(job.build_key())
    if choice is None or choice.engine == TORCH:
        return job.loaded.model
    check_weights(job.engines_folder / choice.engine, job.loaded.folder, requires_report=True)
    return job.open_graph(choice.engine)


def read_choices(job: Job) -> dict[str, Choice]:
    """Return the choices for a model, by key.

    There are none if they are of other weights or another configuration.
    """
    file = job.engines_folder / CHOICES_FILE
    if not file.is_file():
        return {}
    record = read_json(file)
    if record.get("model_sha256") != job.hash_model():
        return {}
    return {key: Choice(**values) for key, values in record["choices"].items()}
