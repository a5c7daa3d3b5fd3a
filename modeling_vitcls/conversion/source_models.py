"""Load a timm or transformers model.

    source = TimmSource.from_name("vit_base_patch16_clip_224.openai")
    source = TransformersSource.from_name("facebook/dinov2-base@COMMIT")  # commit, branch or tag
    source = TransformersSource.from_name("path/to/checkpoint")

A source converts its model and its preprocessing, and computes reference outputs for the parity
report.
"""

import copy
import difflib
import inspect
import re
from math import isqrt
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..hub.loading import (
    get_cached_commit,
    get_external_model_folder,
    load_timm_model,
    split_revision,
)
from ..model.field_checks_vitcls import Size
from ..model.modeling_vitcls import ViTCLSPreTrainedModel
from ..runtime.errors import format_error
from .from_timm import TIMM_MODULES, convert_timm_model
from .from_transformers import CONVERTIBLE_CLASSES, convert_transformers_model
from .processors import (
    ConvertedPreprocessing,
    convert_timm_preprocessing,
    convert_transformers_preprocessing,
)
from .weight_rules import ConversionError


Outputs = dict[str, Tensor]


class Source:
    """What the sources of all projects have in common."""

    family: str | None = None  # Family of a state-dict file
    sha256: str | None = None  # SHA-256 of a state-dict file
    native_size_reason = ""  # Reason why only the native size can be compared

    def __init__(self, name: str, model: nn.Module, revision: str | None, notes: list[str]) -> None:
        self.name = name  # As on the command line
        self.model: Any = model
        self.revision = revision  # Commit hash on the Hub; None if the hash is unknown
        self.notes = notes  # Notes for the user about loading the model
        self.saved_dtype = next(model.parameters()).dtype


class TimmSource(Source):
    """A timm model that can be converted."""

    @classmethod
    def from_name(cls, name: str) -> "TimmSource":
        """Load a model by its timm name.

        The name may have a tag, or timm's prefix `hf-hub:` or `local-dir:`.
        """
        if ":" not in name:
            check_timm_name(name)  # Before any download
        try:
            model, commit = load_timm_model(name)
        except Exception as error:  # Downloads raise errors of many types
            raise OSError(
                f"timm cannot load {name}: {format_error(error).rstrip('.')}. Use a machine with "
                "access to the Hub, a folder with the model (timm:local-dir:FOLDER) or a file with "
                "its weights (timm:NAME@FILE)"
            ) from error
        return cls(f"timm:{name}", model, commit, [])

    @property
    def image_size(self) -> Size:
        """Native height and width in pixels."""
        return self.model.patch_embed.img_size  # type: ignore[no-any-return]

    def convert(self) -> ViTCLSPreTrainedModel:
        """Convert the model. Raise ConversionError if the conversion cannot be exact."""
        return convert_timm_model(self.model)

    def compute_outputs(self, pixel_values: Tensor) -> Outputs:
        """Compute a dict with "sequence" and either "logits" or "pooled" for images [B, C, H, W].

        timm may raise any exception if the model does not support the image size.
        """
        size = tuple(pixel_values.shape[-2:])
        model = self.model
        if size != self.image_size:
            model = copy.deepcopy(model)
            model.set_input_size(img_size=size)
        sequence = model.forward_features(pixel_values)
        # Not `forward_head`: a program may have changed `forward`.
        return {
            "sequence": sequence,
            "logits" if model.num_classes else "pooled": model(pixel_values),
        }

    def convert_preprocessing(self) -> ConvertedPreprocessing:
        """Convert the preprocessing of the source to an image processor."""
        return convert_timm_preprocessing(self.model)


class TransformersSource(Source):
    """A transformers model that can be converted, with the same interface as `TimmSource`."""

    @classmethod
    def from_name(cls, name: str) -> "TransformersSource":
        """Load a model from a folder or by a Hub id, optionally with `@REVISION`."""
        folder = get_external_model_folder(name)
        name_or_path, _ = split_revision(name)

        try:
            # False, because by default, transformers offers in a terminal to run the code of the
            # repository.
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except Exception as error:  # Configurations of other projects may raise any error
            is_remote = "trust_remote_code" in str(error)
            reason = (
                "it requires remote code, which is never run" if is_remote else format_error(error)
            )
            raise OSError(
                f"transformers cannot read the configuration of {name_or_path}: {reason}"
            ) from error

        model_class = get_convertible_class(config)
        return cls(
            name_or_path, folder, *load_transformers_model(model_class, name_or_path, folder)
        )

    def __init__(self, name_or_path: str, folder: str, model: nn.Module, notes: list[str]) -> None:
        super().__init__(f"transformers:{name_or_path}", model, get_cached_commit(folder), notes)
        self.folder = folder

    @property
    def image_size(self) -> Size:
        """Image size in the configuration, as (height, width).

        For SigLIP 2, it is the size of a square image with `num_patches` patches.
        """
        config = getattr(self.model.config, "vision_config", self.model.config)
        if not hasattr(config, "image_size"):  # SigLIP 2
            side = isqrt(config.num_patches) * config.patch_size
            return side, side
        size = config.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    def convert(self) -> ViTCLSPreTrainedModel:
        """Convert the model with `convert_transformers_model`."""
        return convert_transformers_model(self.model)

    def compute_outputs(self, pixel_values: Tensor) -> Outputs:
        """Compute the outputs for images [B, C, H, W].

        At sizes other than the native size, the position embeddings are interpolated.
        """
        encoder = self.encoder
        inputs = self.build_inputs(pixel_values)
        encoder_outputs = encoder(**inputs)
        outputs = {"sequence": encoder_outputs.last_hidden_state}

        if encoder is self.model:
            outputs["pooled"] = encoder_outputs.get("summary", encoder_outputs.get("pooler_output"))
        else:
            head_outputs = self.model(**inputs)
            outputs["logits"] = head_outputs.get("logits", head_outputs.get("image_embeds"))
            outputs |= {
                name: head_outputs.get(name) for name in ("cls_logits", "distillation_logits")
            }
        return {name: output for name, output in outputs.items() if output is not None}

    @property
    def encoder(self) -> Any:
        """The base model, which returns the token sequence."""
        name = CONVERTIBLE_CLASSES[type(self.model).__name__].encoder_name
        return self.model if name is None else getattr(self.model, name)

    def build_inputs(self, pixel_values: Tensor) -> dict[str, Any]:
        """Build the keyword arguments of the encoder and of the model for images [B, C, H, W]."""
        config: Any = self.encoder.config
        parameters = inspect.signature(self.encoder.forward).parameters
        if "spatial_shapes" in parameters:
            return flatten_patches(pixel_values, config.patch_size)

        inputs: dict[str, Any] = {"pixel_values": pixel_values, "return_dict": True}
        if (
            "interpolate_pos_encoding" in parameters
            and tuple(pixel_values.shape[-2:]) != self.image_size
        ):
            inputs["interpolate_pos_encoding"] = True

        # MAE sorts the patches by this noise, and would mask the last ones.
        if "noise" in parameters:
            config.mask_ratio = 0.0
            size = config.patch_size
            # The last pixel of each patch, as many as there are whole patches
            pixels = pixel_values[:, 0, size - 1 :: size, size - 1 :: size].flatten(1)
            # Ascending noise keeps the patches in their order.
            inputs["noise"] = torch.ones_like(pixels).float().cumsum(1)  # [B, rows * columns]
        return inputs

    def convert_preprocessing(self) -> ConvertedPreprocessing:
        """Convert preprocessor_config.json, or build the default image processor."""
        return convert_transformers_preprocessing(self.folder, self.image_size)


SourceModel = TimmSource | TransformersSource


def check_timm_name(name: str) -> None:
    """Raise ConversionError unless a name of timm, with or without a tag, is a plain ViT's."""
    from timm.models import is_model_in_modules, list_models

    architecture = name.partition(".")[0]
    if not is_model_in_modules(architecture, TIMM_MODULES):
        similar = difflib.get_close_matches(
            architecture, list_models(module=list(TIMM_MODULES)), n=1
        )
        hint = f"Did you mean {similar[0]}?" if similar else "docs/converting.md lists all"
        raise ConversionError(f"timm:{architecture} is not a plain ViT of timm. {hint}")


def convert_source(source: SourceModel) -> ViTCLSPreTrainedModel:
    """Convert a source model in float32.

    Cast the result to the dtype of the source if this dtype represents all encoder weights exactly.
    """
    # Rewrites add and multiply weights, which half precision would round. If nothing had to be
    # rewritten, the weights go back to their dtype without a loss, and the file stays as small as
    # it was.
    saved_dtype = source.saved_dtype
    source.model.float()
    model = source.convert()
    if all(
        torch.equal(weight.to(saved_dtype).float(), weight)
        for weight in model.base_model.state_dict().values()
    ):
        model.to(dtype=saved_dtype)  # type: ignore[call-arg]  # `to` is untyped in transformers
        return model
    source.notes.append(
        f"the weights are written in float32, because {saved_dtype} cannot represent all weights "
        "exactly"
    )
    return model


def get_convertible_class(config: transformers.PreTrainedConfig) -> Any:
    """Choose the transformers class that loads a checkpoint, or only its encoder.

    The encoder is loaded if the whole model cannot be converted.
    """
    architecture = (config.architectures or [""])[0]
    encoder_config = getattr(config, "vision_config", config)
    model_name, encoder_name = (
        f"{type(each).__name__.removesuffix('Config')}Model" for each in (config, encoder_config)
    )
    name = architecture
    # ViTForX, or CLIPModel but not LlavaForX
    if name not in CONVERTIBLE_CLASSES and (encoder_config is config or name == model_name):
        name = encoder_name
    if name not in CONVERTIBLE_CLASSES:
        raise ConversionError(
            f"{architecture or type(config).__name__} (model type {config.model_type}) cannot be "
            f"converted. Use one of {', '.join(list_families())}"
        )
    return getattr(transformers, name)


def list_families() -> list[str]:
    """List the models of transformers that can be converted, as their classes begin."""
    ends = re.compile(r"(Vision)?(Model|For).*")
    return sorted({ends.sub("", name) for name in CONVERTIBLE_CLASSES}, key=str.lower)


def load_transformers_model(
    model_class: Any, name_or_path: str, folder: str
) -> tuple[Any, list[str]]:
    """Load a transformers model in the saved dtype, and return the model and notes on loading.

    If the checkpoint has no pooler, the model is loaded without a pooler; by default, transformers
    adds a pooler with random values.
    """
    notes: list[str] = []
    options: dict[str, Any] = {"dtype": "auto", "output_loading_info": True}

    try:
        model, loading_info = model_class.from_pretrained(folder, **options)
        if loading_info["missing_keys"] and all(
            name.startswith("pooler.") for name in loading_info["missing_keys"]
        ):
            model, loading_info = model_class.from_pretrained(
                folder, **options, add_pooling_layer=False
            )
            notes.append("the checkpoint has no pooler, so the converted model has no pooler")
    except Exception as error:  # Downloads raise errors of many types
        raise OSError(f"transformers cannot load {name_or_path}: {format_error(error)}") from error

    if missing_names := sorted(loading_info["missing_keys"]):
        raise ConversionError(
            f"{model_class.__name__} requires {len(missing_names)} weights that are missing from "
            f"{name_or_path}, for example {missing_names[0]}. If a wrapper, such as DataParallel's, put "
            "a prefix before the names, save the model inside it"
        )

    unexpected_names = sorted(loading_info["unexpected_keys"])
    # The vision model of a text-image model leaves weights unused, which is no news.
    if unexpected_names and model.config.architectures:
        notes.append(
            f"{model_class.__name__} does not use {len(unexpected_names)} weights of the "
            f"checkpoint, for example {unexpected_names[0]}"
        )
    return model, notes


def flatten_patches(pixel_values: Tensor, patch_size: int) -> dict[str, Any]:
    """Build the inputs of SigLIP 2: flattened patches, and the size of the patch grid."""
    # Imported here, because it requires torchvision, as no other model does
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    grid_size = [side // patch_size for side in pixel_values.shape[2:]]
    # [B, rows * columns, pixels * C]
    patches = torch.stack([convert_image_to_patches(image, patch_size) for image in pixel_values])
    return {
        "pixel_values": patches,
        "pixel_attention_mask": patches.new_ones(patches.shape[:2]),
        "spatial_shapes": torch.tensor([grid_size] * len(patches)),
    }
