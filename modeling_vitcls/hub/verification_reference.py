"""What the answers of a published model are compared with: the same files, loaded with this package's classes.

    wanted, _ = collect(Reference(folder))

No Auto class, no pipeline function and no `trust_remote_code`: of the folder, JSON and safetensors are read, and none
of its Python files is run, so a stranger's model may lie there. verification_script.py has the other side.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import ImageClassificationPipeline, ImageProcessingMixin
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
from .verification_script import IN_FLOAT32, PROCESSOR_CONFIG


# Auto class -> what it gives; the first, unless config.json names another one.
MODEL_CLASSES: dict[str, tuple[Any, ...]] = {
    "AutoModel": (ViTCLSModel,),
    "AutoModelForImageClassification": (ViTCLSForImageClassification, ViTCLSForMultiTaskClassification),
    "AutoModelForMaskedImageModeling": (ViTCLSForMaskedImageModeling,),
    "AutoBackbone": (ViTCLSBackbone,),
}
PROCESSOR_CLASSES: dict[str, type[ImageProcessingMixin]] = {
    "torchvision": ViTCLSImageProcessor,
    "pil": ViTCLSImageProcessorPil,
}


@dataclass(frozen=True)
class Reference:
    """A model folder, loaded by this package alone; a `clean_process.Source`."""

    folder: Path

    def config(self) -> ViTCLSConfig:
        """Its configuration."""
        return ViTCLSConfig.from_pretrained(self.folder)

    def model(self, auto_class: str, config: ViTCLSConfig) -> tuple[Any, dict[str, Any]]:
        """The class that the Auto class stands for, in float32, and transformers' report on its weights."""
        classes = MODEL_CLASSES[auto_class]
        named = (found for found in classes if found.__name__ in (config.architectures or ()))
        return next(named, classes[0]).from_pretrained(self.folder, use_safetensors=True, **IN_FLOAT32)

    def has_processor(self) -> bool:
        """Whether an image processor was saved beside it."""
        return (self.folder / PROCESSOR_CONFIG).is_file()

    def processor(self, backend: str) -> Any:
        """The image processor of a backend."""
        return PROCESSOR_CLASSES[backend].from_pretrained(self.folder)

    def pipeline(self, config: ViTCLSConfig) -> ImageClassificationPipeline:
        """The pipeline's class itself, around this package's classes."""
        model, _ = self.model("AutoModelForImageClassification", config)
        processor = self.processor("torchvision" if is_torchvision_available() else "pil")
        return ImageClassificationPipeline(
            model=model.eval(), image_processor=processor, device=torch.device("cpu"), task="image-classification"
        )
