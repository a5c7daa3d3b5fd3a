"""The reference for the verification of a published model: the same files, loaded with the classes of this package.

    reference, _ = collect_outputs(PackageLoader(folder))

Auto classes, the pipeline function and `trust_remote_code` are not used. Only JSON and safetensors files are read from
the folder. Python files in the folder are not run, so the folder may come from an unknown author. The counterpart is
`HubLoader` in verification_script.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ImageClassificationPipeline
from transformers.utils import is_torchvision_available

from ..configuration_vitcls import ViTCLSConfig
from ..image_processing_vitcls import ViTCLSImageProcessor, ViTCLSImageProcessorPil
from ..modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from .verification_script import FLOAT32_OPTIONS, PROCESSOR_CONFIG_FILE


# Auto class -> model classes; the first class is used unless config.json names another class.
MODEL_CLASSES: dict[str, tuple[Any, ...]] = {
    "AutoModel": (ViTCLSModel,),
    "AutoModelForImageClassification": (ViTCLSForImageClassification, ViTCLSForMultiTaskClassification),
    "AutoModelForMaskedImageModeling": (ViTCLSForMaskedImageModeling,),
    "AutoBackbone": (ViTCLSBackbone,),
}


@dataclass(frozen=True)
class PackageLoader:
    """Loads a model folder with the code of this package; the counterpart of `verification_script.HubLoader`."""

    folder: Path

    def load_config(self) -> ViTCLSConfig:
        """Load the model configuration."""
        return ViTCLSConfig.from_pretrained(self.folder)

    def load_model(self, auto_class: str, config: ViTCLSConfig) -> tuple[Any, dict[str, Any]]:
        """Load the model in float32 with a class from `MODEL_CLASSES`; return the model and the loading info."""
        classes = MODEL_CLASSES[auto_class]
        configured_classes = (each for each in classes if each.__name__ in (config.architectures or ()))
        model_class = next(configured_classes, classes[0])
        return model_class.from_pretrained(self.folder, use_safetensors=True, **FLOAT32_OPTIONS)

    def has_processor(self) -> bool:
        """Return whether an image processor was saved with the model."""
        return (self.folder / PROCESSOR_CONFIG_FILE).is_file()

    def load_processor(self, backend: str) -> Any:
        """Load the image processor for a backend, `torchvision` or `pil`."""
        processor_classes: dict[str, Any] = {"torchvision": ViTCLSImageProcessor, "pil": ViTCLSImageProcessorPil}
        return processor_classes[backend].from_pretrained(self.folder)

    def load_pipeline(self, config: ViTCLSConfig) -> ImageClassificationPipeline:
        """Build the image-classification pipeline from this package's classes."""
        model, _ = self.load_model("AutoModelForImageClassification", config)
        processor = self.load_processor("torchvision" if is_torchvision_available() else "pil")
        return ImageClassificationPipeline(
            model=model.eval(), image_processor=processor, device=torch.device("cpu"), task="image-classification"
        )
