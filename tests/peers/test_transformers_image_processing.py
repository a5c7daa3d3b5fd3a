"""Run the image processor tests of transformers on this package, with both backends.

Tests of features that only this package has (sources, modes, messages) are in
test_image_processing.py.
"""

import unittest
from pathlib import Path
from typing import Any, ClassVar

import sklearn.datasets

from modeling_vitcls import ViTCLSImageProcessor, ViTCLSImageProcessorPil
from peers.transformers_suite import load


common = load("test_image_processing_common")

# A local photograph instead of the photograph that the mixin downloads from the Hub.
PHOTOGRAPH = Path(sklearn.datasets.__file__).parent / "images/china.jpg"
common.url_to_local_path = lambda url: str(PHOTOGRAPH)


class SmallImages(common.ImageProcessingTester):
    """Inputs and settings with the attributes that the mixin reads."""

    batch_size = 3
    num_channels = 3
    min_resolution = 30
    max_resolution = 80
    size: ClassVar[dict[str, int]] = {"height": 18, "width": 18}

    def __init__(self, image_processing_classes: dict[str, type]) -> None:
        self.image_processing_classes = image_processing_classes
        self.settings = {
            "do_resize": True,
            "size": self.size,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }

    def prepare_image_processor_dict(self) -> dict[str, Any]:
        return dict(self.settings)


class ViTCLSTest(common.ImageProcessingTestMixin, unittest.TestCase):
    """The mixin with `image_processing_classes`, which transformers derives from the folder."""

    test_cast_dtype = True
    image_processing_classes: ClassVar[dict[str, type]] = {
        "torchvision": ViTCLSImageProcessor,
        "pil": ViTCLSImageProcessorPil,
    }

    def setUp(self) -> None:
        self.image_processor_tester = SmallImages(self.image_processing_classes)

    @property
    def image_processor_dict(self) -> dict[str, Any]:
        return self.image_processor_tester.prepare_image_processor_dict()

    def test_call_numpy_4_channels(self) -> None:
        # In older versions of transformers, this test requires do_convert_rgb=False as the default.
        self.image_processor_tester.settings["do_convert_rgb"] = False
        super().test_call_numpy_4_channels()
