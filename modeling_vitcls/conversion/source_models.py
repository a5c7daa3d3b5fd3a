"""Where a conversion starts: a model of timm or transformers by its name, loaded or with random values.

    source = load_source("timm:vit_base_patch16_clip_224.openai")
    source = load_source("transformers:facebook/dinov2-base")
    source = load_source("transformers:facebook/dinov2-base@COMMIT")                # or a branch or tag, on the Hub
    source = load_source("transformers:path/to/checkpoint", random_init=True)      # from its config.json alone

A source can be converted, asked what it answers (by our names, for comparison), and has an image processor.
"""

import copy
import difflib
import inspect
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from ..errors import in_one_line
from ..hub.connection import iter_causes
from ..hub.loading import CONFIG_FILES, get_any_model_folder, get_cached_commit, get_model_folder, load_timm
from ..modeling_vitcls import ViTCLSPreTrainedModel
from .from_timm import convert_from_timm
from .from_transformers import SOURCES, convert_from_transformers
from .head_transfer import ClassifierChoice
from .processors import Preprocessing, preprocessing_of_timm, preprocessing_of_transformers
from .random_weights import random_fill
from .weight_rules import ConversionError


Answers = dict[str, torch.Tensor]

# Architectures whose vision part, or encoder, is what can be converted: the class that reads it from a checkpoint.
PARTS = {
    "CLIPModel": "CLIPVisionModel",
    "MetaClip2Model": "MetaClip2VisionModel",
    "SiglipModel": "SiglipVisionModel",
    "Siglip2Model": "Siglip2VisionModel",
    "Aimv2Model": "Aimv2VisionModel",
    "ViTMAEForPreTraining": "ViTMAEModel",
    "ViTForMaskedImageModeling": "ViTModel",
    "DeiTForMaskedImageModeling": "DeiTModel",
    "BeitForMaskedImageModeling": "BeitModel",
    "Dinov2Backbone": "Dinov2Model",
    "Dinov2WithRegistersBackbone": "Dinov2WithRegistersModel",
    "DINOv3ViTBackbone": "DINOv3ViTModel",
    "PixioBackbone": "PixioModel",
}


class Source(ABC):
    """A model of another project.

    Attributes:
        name: as on the command line.
        model: in eval mode.
        revision: the hash of the commit that it was loaded from, if its name says where on the Hub it is.
        notes: what the user should know about how it was loaded.
    """

    revision: str | None = None

    def __init__(self, name: str, model: nn.Module) -> None:
        self.name = name
        self.model = model.eval()
        self.notes: list[str] = []

    @property
    @abstractmethod
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels for which it was built."""

    @property
    @abstractmethod
    def has_classifier(self) -> bool:
        """Whether it answers "logits"."""

    @abstractmethod
    def convert(self, classifier: ClassifierChoice, num_labels: int | None) -> ViTCLSPreTrainedModel:
        """Our model with its weights.

        Raises:
            ConversionError: where that cannot be exact; what is missing is named.
        """

    @abstractmethod
    def answers(self, pixel_values: torch.Tensor) -> Answers:
        """What it gives for images [B, C, H, W] of any size it takes: "sequence", "pooled", "logits", ...

        Raises:
            Exception: any, for images of a size that it does not take.
        """

    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """The image processor that gives what the source's own preprocessing gives."""


class TimmSource(Source):
    """A model of timm."""

    @classmethod
    def load(cls, name: str, random_init: bool) -> "TimmSource":
        """By its name in timm, with a tag or without; `hf-hub:` and `local-dir:` are timm's own ways to others.

        Raises:
            ValueError: for a name that timm does not know.
            OSError: if its weights cannot be loaded.
        """
        try:
            import timm
        except ImportError as error:
            raise ConversionError("timm is not installed: pip install timm") from error
        architecture = name.partition(".")[0]
        if ":" not in name and not timm.is_model(architecture):
            similar = difflib.get_close_matches(architecture, timm.list_models(), n=1)
            hint = f": did you mean {similar[0]}?" if similar else ""
            raise ConversionError(f"timm {timm.__version__} has no model {architecture}{hint}")
        try:
            model, commit = load_timm(name, with_weights=not random_init)
        except Exception as error:  # whatever the download raises
            raise OSError(f"timm cannot load {name}: {in_one_line(error)} (--random-init needs no weights)") from error
        source = cls(f"timm:{name}", random_fill(model) if random_init else model)
        source.revision = commit
        return source

    @property
    def image_size(self) -> tuple[int, int]:
        """As the model has it; by its preprocessing where the model leaves it open."""
        model: Any = self.model
        return tuple(model.patch_embed.img_size or model.pretrained_cfg["input_size"][1:])

    @property
    def has_classifier(self) -> bool:
        """Unless it was built with `num_classes=0`."""
        return bool(self.model.num_classes)

    def convert(self, classifier: ClassifierChoice, num_labels: int | None) -> ViTCLSPreTrainedModel:
        """See `convert_from_timm`."""
        return convert_from_timm(self.model, classifier=classifier, num_labels=num_labels)

    def answers(self, pixel_values: torch.Tensor) -> Answers:
        """Images of other sizes are taken after `set_input_size`, by a copy."""
        model: Any = self.model
        size = tuple(pixel_values.shape[-2:])
        if size != self.image_size:
            model = copy.deepcopy(model)
            model.set_input_size(img_size=size)
        sequence = model.forward_features(pixel_values)
        head = "logits" if self.has_classifier else "pooled"
        return {"sequence": sequence, head: model.forward_head(sequence)}

    def preprocessing(self) -> Preprocessing:
        """From its `pretrained_cfg`."""
        return preprocessing_of_timm(self.model)


class TransformersSource(Source):
    """A model of transformers."""

    @classmethod
    def load(cls, name: str, random_init: bool) -> "TransformersSource":
        """A folder, or an id on the Hub, perhaps with `@REVISION`; with `random_init`, its config.json alone.

        Raises:
            OSError: if it cannot be found or loaded.
            ConversionError: for an architecture that is not supported, or weights that are missing.
        """
        path, revision = path_and_revision(name)
        folder = (
            get_model_folder(path, CONFIG_FILES, revision) if random_init else get_any_model_folder(path, revision)
        )
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # ValueError for unknown types, OSError for missing files, and the Hub's own
            if "trust_remote_code" in str(error):
                raise ConversionError(
                    f"{path} requires the code in its own repository, which is never run. Use a model with a class in "
                    "transformers, or timm:NAME"
                ) from error
            raise OSError(f"transformers cannot read the configuration of {path}: {in_one_line(error)}") from error
        model_class = class_for(config)
        if random_init:
            return cls(path, folder, random_fill(model_class(config)), [])
        return cls(path, folder, *load_complete(model_class, path, folder))

    def __init__(self, path: str, folder: str, model: nn.Module, notes: list[str]) -> None:
        super().__init__(f"transformers:{path}", model)
        self.path = path
        self.folder = folder
        self.revision = get_cached_commit(folder)
        self.notes = notes

    @property
    def image_size(self) -> tuple[int, int]:
        """By its configuration; SigLIP 2 has a number of patches instead."""
        config: Any = self.model.config
        config = getattr(config, "vision_config", config)
        if hasattr(config, "image_size"):
            size = config.image_size
            return (size, size) if isinstance(size, int) else tuple(size)
        edge = int(config.num_patches**0.5) * config.patch_size
        return edge, edge

    @property
    def has_classifier(self) -> bool:
        """Of a classification class; an embedding counts as logits too."""
        return self.encoder is not self.model

    def convert(self, classifier: ClassifierChoice, num_labels: int | None) -> ViTCLSPreTrainedModel:
        """See `convert_from_transformers`."""
        model: Any = self.model
        return convert_from_transformers(model, classifier=classifier, num_labels=num_labels)

    def answers(self, pixel_values: torch.Tensor) -> Answers:
        """Images of other sizes are taken with `interpolate_pos_encoding`, where the model has that."""
        encoder, inputs = self.encoder, self.inputs(pixel_values)
        encoded = encoder(**inputs)
        answers = {"sequence": encoded.last_hidden_state}
        if encoder is self.model:
            answers["pooled"] = encoded.get("summary", encoded.get("pooler_output"))
        else:
            outputs = self.model(**inputs)
            answers["logits"] = outputs.get("logits", outputs.get("image_embeds"))
            answers |= {name: outputs.get(name) for name in ("cls_logits", "distillation_logits")}
        return {name: answer for name, answer in answers.items() if answer is not None}

    @property
    def encoder(self) -> nn.Module:
        """The base model, which gives the sequence."""
        name = SOURCES[type(self.model).__name__].encoder
        return self.model if name is None else getattr(self.model, name)

    def inputs(self, pixel_values: torch.Tensor) -> dict[str, Any]:
        """Keywords for these images, for the encoder, and for the model, which takes the same or passes them on."""
        config: Any = self.encoder.config
        parameters = inspect.signature(self.encoder.forward).parameters
        if "spatial_shapes" in parameters:
            return flattened_patches(pixel_values, config.patch_size)
        inputs: dict[str, Any] = {"pixel_values": pixel_values}
        if "interpolate_pos_encoding" in parameters and tuple(pixel_values.shape[-2:]) != self.image_size:
            inputs["interpolate_pos_encoding"] = True
        if "noise" in parameters:  # MAE: the order in which it shuffles patches, of which it would drop the last
            config.mask_ratio = 0.0
            height, width = pixel_values.shape[-2:]
            num_patches = (height // config.patch_size) * (width // config.patch_size)
            inputs["noise"] = torch.arange(num_patches, dtype=torch.float32).expand(len(pixel_values), -1)
        return inputs

    def preprocessing(self) -> Preprocessing:
        """From its preprocessor_config.json, where it has one."""
        return preprocessing_of_transformers(self.folder, self.image_size)


LOADERS: dict[str, Callable[[str, bool], Source]] = {"timm": TimmSource.load, "transformers": TransformersSource.load}


def load_source(source: str, random_init: bool = False) -> Source:
    """`timm:NAME`, or `transformers:PATH_OR_ID`, an id perhaps with `@REVISION`.

    Args:
        random_init: Random values in place of trained weights, which are then not needed.

    Raises:
        ValueError, OSError: in one line, for a source that is not there or not supported.
    """
    project, _, name = source.partition(":")
    if project not in LOADERS or not name:
        raise ConversionError(f"{source!r} is no source: give timm:NAME or transformers:PATH_OR_ID")
    return LOADERS[project](name, random_init)


def path_and_revision(name: str) -> tuple[str, str | None]:
    """What stands before and after the last `@`, which may also be a part of a folder's name."""
    path, at, revision = name.rpartition("@")
    return (path, revision) if at and revision and not Path(name).exists() else (name, None)


def class_for(config: transformers.PreTrainedConfig) -> Any:
    """The class of transformers that reads what can be converted of a checkpoint.

    Raises:
        ConversionError: if there is none.
    """
    architecture = (config.architectures or [""])[0]
    name = PARTS.get(architecture, architecture)
    if not architecture:
        model_class: Any = transformers.MODEL_MAPPING.get(type(config), None)
        name = getattr(model_class, "__name__", "")
    if name not in SOURCES:
        raise ConversionError(
            f"{architecture or type(config).__name__} cannot be converted: it is no plain ViT that this package knows"
        )
    return getattr(transformers, name)


def load_complete(model_class: Any, path: str, folder: str) -> tuple[Any, list[str]]:
    """A model in its saved dtype, and notes on its loading, from the folder that `path` stands for.

    A checkpoint without a pooler gives a model without: transformers would add one with random values.

    Raises:
        OSError: if it cannot be loaded.
        ConversionError: if weights are missing.
    """
    notes: list[str] = []
    options: dict[str, Any] = {"dtype": "auto", "output_loading_info": True}
    try:
        model, info = model_class.from_pretrained(folder, **options)
        if info["missing_keys"] and all(name.startswith("pooler.") for name in info["missing_keys"]):
            model, info = model_class.from_pretrained(folder, **options, add_pooling_layer=False)
            notes.append("the checkpoint has no pooler, and so has the converted model")
    except Exception as error:  # whatever the download raises
        check_not_pickled_code(path, error)
        raise OSError(f"transformers cannot load {path}: {in_one_line(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise ConversionError(f"{path} lacks {len(missing)} weights of {model_class.__name__}, such as {missing[0]}")
    unexpected = sorted(info["unexpected_keys"])
    if unexpected and model_class.__name__ in (model.config.architectures or []):
        notes.append(f"{model_class.__name__} does not use {len(unexpected)} weights, for example {unexpected[0]}")
    return model, notes


def check_not_pickled_code(path: str, error: BaseException) -> None:
    """Raise ConversionError if loading failed because a pickle contains other objects than tensors."""
    if any(isinstance(cause, pickle.UnpicklingError) for cause in iter_causes(error)):
        raise ConversionError(
            f"{path} is a pickle with other objects than tensors, which could run code when they are loaded. Save its "
            "tensors as safetensors"
        ) from error


def flattened_patches(pixel_values: torch.Tensor, patch_size: int) -> dict[str, Any]:
    """What SigLIP 2 takes: patches with channels last, as rows, and how many there are of them."""
    batch_size, _, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    patches = pixel_values.unflatten(2, (rows, patch_size)).unflatten(4, (columns, patch_size))
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [B, rows * columns, pixels * C]
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(batch_size, rows * columns),
        "spatial_shapes": torch.tensor([[rows, columns]] * batch_size),
    }
