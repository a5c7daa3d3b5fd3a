"""Vision Transformers with configurable CLS, distillation and register tokens.

Importing this package registers its classes with transformers' Auto classes, so a checkpoint loads
without `trust_remote_code`. All other modules are imported on first use. Only the `*_vitcls.py`
files are uploaded to the Hub with a model, not this file.
"""

import importlib
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from .version import __version__


if TYPE_CHECKING:
    from .analysis.register_neurons import find_register_neurons
    from .cli.api import (
        add_class,
        add_task,
        convert,
        evaluate,
        export,
        finetune,
        inspect_tokens,
        look,
        predict,
        push,
        verify_unchanged,
    )
    from .conversion.convert_models import (
        convert_from_timm,
        convert_from_transformers,
        convert_to_transformers,
    )
    from .conversion.open_model import open_checkpoint
    from .frozen.linear_probe import LinearProbe
    from .inference.predictor import Predictor
    from .inference.single_task import select_task
    from .model.configuration_vitcls import ViTCLSConfig
    from .model.image_processing_vitcls import ViTCLSImageProcessor, ViTCLSImageProcessorPil
    from .model.modeling_vitcls import (
        ViTCLSBackbone,
        ViTCLSForImageClassification,
        ViTCLSForMaskedImageModeling,
        ViTCLSForMultiTaskClassification,
        ViTCLSModel,
        ViTCLSPreTrainedModel,
    )
    from .model.token_layout_vitcls import TokenLayout
    from .publishing.card import write_card
    from .speed.packed import pack

__all__ = [
    "LinearProbe",
    "Predictor",
    "TokenLayout",
    "ViTCLSBackbone",
    "ViTCLSConfig",
    "ViTCLSForImageClassification",
    "ViTCLSForMaskedImageModeling",
    "ViTCLSForMultiTaskClassification",
    "ViTCLSImageProcessor",
    "ViTCLSImageProcessorPil",
    "ViTCLSModel",
    "ViTCLSPreTrainedModel",
    "__version__",
    "add_class",
    "add_task",
    "convert",
    "convert_from_timm",
    "convert_from_transformers",
    "convert_to_transformers",
    "evaluate",
    "export",
    "find_register_neurons",
    "finetune",
    "inspect_tokens",
    "look",
    "open_checkpoint",
    "pack",
    "predict",
    "push",
    "select_task",
    "verify_unchanged",
    "write_card",
]

# Module -> names of its public objects.
IMPORT_STRUCTURE = {
    "analysis.register_neurons": ("find_register_neurons",),
    "cli.api": (
        "add_class",
        "add_task",
        "convert",
        "evaluate",
        "export",
        "finetune",
        "inspect_tokens",
        "look",
        "predict",
        "push",
        "verify_unchanged",
    ),
    "model.configuration_vitcls": ("ViTCLSConfig",),
    "conversion.convert_models": (
        "convert_from_timm",
        "convert_from_transformers",
        "convert_to_transformers",
    ),
    "conversion.open_model": ("open_checkpoint",),
    "frozen.linear_probe": ("LinearProbe",),
    "inference.predictor": ("Predictor",),
    "inference.single_task": ("select_task",),
    "model.image_processing_vitcls": ("ViTCLSImageProcessor", "ViTCLSImageProcessorPil"),
    "model.modeling_vitcls": (
        "ViTCLSBackbone",
        "ViTCLSForImageClassification",
        "ViTCLSForMaskedImageModeling",
        "ViTCLSForMultiTaskClassification",
        "ViTCLSModel",
        "ViTCLSPreTrainedModel",
    ),
    "model.token_layout_vitcls": ("TokenLayout",),
    "publishing.card": ("write_card",),
    "speed.packed": ("pack",),
}
MODULE_BY_NAME = {name: module for module, names in IMPORT_STRUCTURE.items() for name in names}
# Names that are not public -> module and object
OTHER_NAMES = {
    "EmbedImages": ("inference.predictor", "Predictor"),  # The name in programs written before
    # Methods of the models, which call these functions if the package is imported
    "push_to_hub": ("publishing.push_model", "push_model"),
    "_upload_modified_files": ("publishing.push_model", "push_saved_model"),
}


def __getattr__(name: str) -> Any:
    """Import the module of the public object `name` on first use, and return the object (PEP 562)."""
    module, object_name = OTHER_NAMES.get(name, (MODULE_BY_NAME.get(name), name))
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    public_object = getattr(importlib.import_module(f".{module}", __name__), object_name)
    globals()[name] = public_object
    return public_object


def __dir__() -> list[str]:
    """List the names of the package, including public names that are not imported yet."""
    return sorted({*globals(), *MODULE_BY_NAME})


def is_cli_process() -> bool:
    """Tell whether this process runs the `vitcls` command, as a script or with `python -m modeling_vitcls.cli`.

    The command parses flags before importing torch, and registers the Auto classes itself
    (cli/__init__.py).
    """
    program = sys.argv[0] if getattr(sys, "argv", None) else ""
    return PurePath(program).stem == "vitcls" or (
        program == "-m" and f"{__name__}.cli" in sys.orig_argv
    )


if not is_cli_process():
    __getattr__("ViTCLSConfig").register_auto_classes()
