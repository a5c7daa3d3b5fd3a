"""Load a state-dict file, and find the architecture of its weights.

    source = FileSource.from_file(Path("dinov2_vits14_reg4_pretrain.pth"))
    source = FileSource.from_file(Path("dino_deitsmall16_pretrain.pth"), family="dino")
    source = FileSource.from_file(Path("model_best.pth.tar"), name="vit_tiny_patch16_224")

1. A .safetensors file, a pickle of tensors or a .npz file is read without running code.
2. The weights are read from a container (`teacher`, `state_dict_ema`, `model`, ...) if there is
   one, and the prefix of the patch projection (`module.`, `model.encoder.`) is stripped.
3. The architecture is timm's model of the given name (`timm:NAME@FILE`) or of the name in the file
   (`arch`, which timm's train.py writes). Otherwise, the family is detected from the parameter names
   and the container. If the family is ambiguous, set `--family`.
4. timm builds the model (from_state_dict.py), which is the reference of the parity report. If timm
   resamples position embeddings in another way than the authors of a family, only the native size
   is compared. tests/conversion/test_source_files.py compares other sizes with the authors' code.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..model.field_checks_vitcls import open_regular_file
from ..model.modeling_vitcls import ViTCLSPreTrainedModel
from ..runtime.errors import format_error
from ..runtime.files import compute_file_digest
from .from_state_dict import (
    FAMILIES,
    PATCH_PROJECTION,
    build_named_model,
    build_timm_model,
    convert_family_model,
    get_family,
    prepare_weights,
)
from .source_models import TimmSource, check_timm_name
from .weight_rules import ConversionError, Weights


# Words in the keys of nested state dicts, in order of precedence: teachers and averages are the
# weights that their authors evaluate.
CONTAINER_WORDS = ("target_encoder", "teacher", "ema", "state_dict", "model", "student", "module")
MAX_CONTAINER_DEPTH = 8

# Family -> regular expression for the weight names that identify the family. The first matching
# family is used.
FAMILY_PATTERNS = {
    "dinov3": r"storage_tokens|rope_embed\.periods",
    "dinov2": r"register_tokens|blocks\.0(\.0)?\.(ls1\.gamma|mlp\.w12\.weight)",
    "ibot": r"masked_embed",
    "mae": r"decoder_embed\.weight|fc_norm\.weight",
    "deit": r"dist_token|head\.weight|blocks\.0\.gamma_1",
}
# Family of encoders that match no pattern, by container key. iBOT encoders may be detected as DINO;
# the conversion is identical.
FAMILIES_BY_CONTAINER = {"teacher": "dino", "student": "dino", "model": "mae"}


class FileSource(TimmSource):
    """A state dict of an image encoder in a file, and a timm model with the same weights."""

    weights: Weights  # By parameter name, without containers and prefixes

    @classmethod
    def from_file(
        cls, file: Path, family: str | None = None, name: str | None = None
    ) -> "FileSource":
        """Load a file.

        By default, the family is detected from the parameter names. Raise ConversionError if the
        file is not a state dict of a supported family, or if the family is ambiguous.

        Args:
            file: The state dict, or a checkpoint that contains it.
            family: Family of the weights.
            name: timm's name of the architecture, instead of a family.
        """
        from timm.models import get_pretrained_cfg

        notes: list[str] = []
        content = read_state_dict(file)
        tensors, container_key = unwrap_weights(content, notes)
        # timm's train.py writes the name of its model.
        if not (name or family) and get_pretrained_cfg(arch := str(content.get("arch"))):
            name = arch
            notes.append(f"the file names its architecture, timm:{name}")
        try:
            if name:
                check_timm_name(name)
                weights = prepare_weights(tensors)
                model = build_named_model(weights, name, file)
            else:
                family = family or detect_family(tensors, container_key)
                weights = prepare_weights(tensors, family)
                model = build_timm_model(weights, family)
        except ConversionError as error:
            raise ConversionError(f"cannot convert {file}: {error}") from error
        source = cls(f"timm:{name}@{file}" if name else str(file), model, None, notes)
        source.family = family
        source.weights = weights
        source.sha256 = compute_file_digest(file)
        # Read from the weights, because timm's model is in float32 in any case.
        source.saved_dtype = next(w.dtype for w in weights.values() if w.is_floating_point())
        if family and get_family(family, weights).resampling:
            source.native_size_reason = (
                "timm resamples position embeddings in another way than the authors' code"
            )
        return source

    def convert(self) -> ViTCLSPreTrainedModel:
        """Convert the timm model, with the resampling of the authors' code for a family."""
        if self.family is None:
            return super().convert()
        return convert_family_model(self.model, self.weights, self.family)


# Suffix of a file that no converter here reads -> its library
OTHER_LIBRARIES = {
    ".keras": "Keras",
    ".h5": "Keras",
    ".hdf5": "Keras",
    ".tflite": "TensorFlow Lite",
    ".pb": "TensorFlow",
    ".mlmodel": "Core ML",
}


# Reading ------------------------------------------------------------------------------------------


def read_state_dict(file: Path) -> Mapping[str, Any]:
    """Read a state dict, which may be nested, without running code in the file.

    Raise ConversionError if the file has an unsupported format, or is a pickle of objects other
    than tensors.
    """
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not a file. Use timm:NAME, transformers:PATH_OR_ID or an existing file"
        )
    if file.suffix.lower() in OTHER_LIBRARIES:
        raise ConversionError(
            f"{file} is a file of {OTHER_LIBRARIES[file.suffix.lower()]}. Weights of PyTorch, in "
            ".safetensors or .pth, or of JAX, in .npz, can be converted"
        )
    open_regular_file(file).close()  # torch's errors about files say less
    try:
        if file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        if file.suffix == ".safetensors":
            return load_file(file)
        # The checkpoints of DINO and MAE also contain the arguments of their training, an object
        # that runs no code.
        with torch.serialization.safe_globals([argparse.Namespace]):
            weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load may raise any exception for a damaged file
        raise ConversionError(
            f"cannot read the weights in {file}: {format_error(error)}"
        ) from error

    if not isinstance(weights, Mapping):
        raise ConversionError(
            f"{file} contains an object of type {type(weights).__name__} instead of a state dict"
        )
    return weights


def unwrap_weights(weights: Mapping[str, Any], notes: list[str]) -> tuple[Weights, str | None]:
    """Find the tensors of the image encoder, and the key of the innermost container.

    Prefixes of the parameter names are stripped.

    Add a note if the file contains weights outside the encoder, such as the projection head of a
    teacher.
    """
    container_key = None
    for _ in range(MAX_CONTAINER_DEPTH):  # A state dict may contain itself
        keys = [key for key, value in weights.items() if isinstance(value, Mapping)]
        known = [key for key in keys if rank_name(str(key)) < len(CONTAINER_WORDS)]
        # Names differ between programs, but no optimizer has a patch projection.
        known = known or [
            key for key in keys if PATCH_PROJECTION in "\n".join(map(str, weights[key]))
        ]
        if known:
            container_key = min(known, key=lambda key: rank_name(str(key)))
            weights = weights[container_key]
            if len(known) > 1:
                notes.append(f"the weights are those of {container_key!r}, of {', '.join(known)}")

    is_array = (Tensor, np.ndarray)
    tensors: dict[str, Any] = {
        str(name): value for name, value in weights.items() if isinstance(value, is_array)
    }
    prefixes = [
        name.removesuffix(PATCH_PROJECTION) for name in tensors if name.endswith(PATCH_PROJECTION)
    ]
    prefix = min(prefixes, key=lambda name: (rank_name(name), len(name)), default="")
    prefix = prefix.removesuffix("visual.trunk.")  # timm reads the projection beside it (OpenCLIP)
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
    if other_names := [name for name in tensors if not name.startswith(prefix)]:
        notes.append(
            f"{len(other_names)} weights outside of {prefix}* are not converted, for example "
            f"{other_names[0]}"
        )
    return own, container_key


def rank_name(name: str) -> int:
    """Rank a key or a prefix by the first of `CONTAINER_WORDS` in it."""
    found = (index for index, word in enumerate(CONTAINER_WORDS) if word in name)
    return next(found, len(CONTAINER_WORDS))


def detect_family(weights: Weights, container_key: str | None) -> str:
    """Detect the family of a state dict.

    Raise ConversionError if no family or several families match.
    """
    family = next(
        (
            family
            for family, pattern in FAMILY_PATTERNS.items()
            if any(re.fullmatch(pattern, name) for name in weights)
        ),
        None,
    )
    registers = weights.get("register_tokens")
    if family is None:
        if not {PATCH_PROJECTION, "blocks.0.attn.qkv.weight"} <= weights.keys():
            names = f"weights such as {', '.join(list(weights)[:3])}" if weights else "no weights"
            raise ConversionError(
                f"it contains no supported image encoder but {names}, and not {PATCH_PROJECTION}. Use "
                "timm:NAME@FILE or transformers:PATH_OR_ID"
            )
        family = FAMILIES_BY_CONTAINER.get(str(container_key))
    # TIPS has the parameter names of DINOv2 and one register, which is its second CLS token.
    elif family == "dinov2" and registers is not None and registers.shape[-2] == 1:
        family = None

    if family is None:
        raise ConversionError(
            f"its weights match several families. Set `family` to one of {', '.join(FAMILIES)}, or "
            "use timm:NAME@FILE for another model"
        )
    return family
