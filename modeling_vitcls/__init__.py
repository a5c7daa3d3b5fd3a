"""Vision Transformers with configurable CLS, distillation and register tokens.

Importing this package registers its classes with transformers' Auto classes, so that a checkpoint loads without
`trust_remote_code`. This file is never shipped to the Hub; the `*_vitcls.py` files are.
"""

from .configuration_vitcls import TokenLayout, ViTCLSConfig
from .conversion.from_state_dict import convert_state_dict
from .conversion.from_timm import convert_from_timm
from .conversion.from_transformers import convert_from_transformers
from .conversion.to_transformers import convert_to_transformers
from .image_processing_vitcls import ViTCLSImageProcessor, ViTCLSImageProcessorPil
from .modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
    ViTCLSPreTrainedModel,
)
from .version import __version__


ViTCLSConfig.register_auto_classes()

__all__ = [
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
    "convert_from_timm",
    "convert_from_transformers",
    "convert_state_dict",
    "convert_to_transformers",
]
