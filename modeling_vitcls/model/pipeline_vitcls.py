# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""The pipelines of transformers, with images read by the image processor of the model.

    file, URL, bytes, base64, PIL image, array -> image processor -> model -> labels or features

transformers' own pipelines convert every image to RGB first, which clips 16-bit images, drops
transparency and accepts floats that no command of this package reads. The configuration of a folder
names these classes (`custom_pipelines`), which `pipeline(..., trust_remote_code=True)` then builds.
"""

import base64
import os
from contextlib import suppress
from typing import Any

from transformers import ImageClassificationPipeline, ImageFeatureExtractionPipeline


# Shorter texts are paths; the smallest encoded images have about as many characters
MIN_BASE64_LENGTH = 100


class ImageReading:
    """Hands an image to the image processor as it is. Those of other models read what they did."""

    image_processor: Any
    dtype: Any

    def preprocess(self, image: Any, timeout: float | None = None, **settings: Any) -> Any:
        """Read and preprocess one image: a path, URL, base64, bytes, a PIL image or an array.

        Raises:
            ValueError: If it cannot be read, as in `ViTCLSImageProcessor`.
        """
        if not hasattr(self.image_processor, "bit_depth"):
            return super().preprocess(image, timeout, **settings)  # type: ignore[misc]
        is_path = not isinstance(image, str) or os.path.lexists(image)
        if not is_path and len(image) >= MIN_BASE64_LENGTH:
            # An address has characters that base64 has not
            with suppress(ValueError):
                image = base64.b64decode(image, validate=True)
        return self.image_processor(image, return_tensors="pt", **settings).to(self.dtype)


class ViTCLSImageClassificationPipeline(ImageReading, ImageClassificationPipeline):  # type: ignore[misc]
    """`pipeline("image-classification", ...)`: the labels of an image, the most probable first."""


class ViTCLSImageFeatureExtractionPipeline(ImageReading, ImageFeatureExtractionPipeline):  # type: ignore[misc]
    """`pipeline("image-feature-extraction", ...)`: the tokens of an image."""
