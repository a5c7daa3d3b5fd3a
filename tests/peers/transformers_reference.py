"""Built-in models of transformers under the tests of transformers, as a reference for the models of this package.

    SkipsLikeReference     a test may be skipped only where the built-in model skips it too, for the same reason
    BuiltInViT             ViT: model, classifier, masked image modeling
    BuiltInBackbone        DINOv2 with registers, the built-in backbone closest to ours

Only skipped tests are compared: if a test of this package is skipped, the built-in model runs the same test in the
same process. The tests of our models are in test_transformers_models.py.
"""

import functools
import re
import unittest
from typing import Any

import torch
from transformers import (
    Dinov2WithRegistersBackbone,
    Dinov2WithRegistersConfig,
    PreTrainedConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)

from peers.transformers_suite import load


backbone_tests = load("test_backbone_common")
configuration_tests = load("test_configuration_common")
modeling_tests = load("test_modeling_common")

# 5 x 5 patches: enough for every mixin, and fast.
SIZES: dict[str, int] = {
    "image_size": 10,
    "patch_size": 2,
    "num_channels": 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}


class SmallModel:
    """A small model and its inputs, with the attributes that the mixins read.

    The configuration is `config_class(**SIZES, **options)`; `num_prefix_tokens` tokens precede the patches.
    """

    is_training = True
    batch_size = 2

    def __init__(self, config_class: type[PreTrainedConfig], num_prefix_tokens: int, **options: Any) -> None:
        self.config_class = config_class
        self.options = options
        for name, size in SIZES.items():
            setattr(self, name, size)
        self.mask_length = (SIZES["image_size"] // SIZES["patch_size"]) ** 2
        self.num_masks = self.mask_length // 2
        self.seq_length = num_prefix_tokens + self.mask_length

    def get_config(self) -> PreTrainedConfig:
        return self.config_class(**SIZES, **self.options)

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        size = SIZES["image_size"]
        return self.get_config(), {"pixel_values": modeling_tests.floats_tensor([self.batch_size, 3, size, size])}


class ModelTests(modeling_tests.ModelTesterMixin):
    """Model and configuration tests of transformers for vision models."""

    test_resize_embeddings = False
    config_tester: Any

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    @unittest.skip(reason="ViT does not use inputs_embeds")
    def test_inputs_embeds(self) -> None:
        pass

    def test_model_get_set_embeddings(self) -> None:
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), torch.nn.Module)
            self.assertIsInstance(model.get_output_embeddings(), torch.nn.Linear | None)


class BuiltInViT(ModelTests, unittest.TestCase):
    """Tests of the built-in ViT, which pytest does not collect."""

    __test__ = False
    all_model_classes = (ViTModel, ViTForImageClassification, ViTForMaskedImageModeling)

    def setUp(self) -> None:
        self.model_tester = SmallModel(ViTConfig, num_prefix_tokens=1, encoder_stride=SIZES["patch_size"])
        self.config_tester = configuration_tests.ConfigTester(self, config_class=ViTConfig, has_text_modality=False)


class BuiltInBackbone(backbone_tests.BackboneTesterMixin, unittest.TestCase):
    """Tests of the built-in backbone, which pytest does not collect."""

    __test__ = False
    all_model_classes = (Dinov2WithRegistersBackbone,)
    config_class = Dinov2WithRegistersConfig
    has_attentions = False

    def setUp(self) -> None:
        self.model_tester = SmallModel(Dinov2WithRegistersConfig, num_prefix_tokens=5, num_register_tokens=4)


class SkipsLikeReference:
    """Fail instead of skipping a test if `reference` does not skip the same test for the same reason.

    Tests that a decorator skips are the same functions in both classes. `own_skips` lists reasons that only models of
    this package have, with "<class>" for the class under test.
    """

    reference: type[unittest.TestCase]
    own_skips: tuple[str, ...] = ()

    def skipTest(self, reason: str) -> None:
        reference_reasons = find_skip_reasons(self.reference, self._testMethodName)
        if _neutral(reason, self) not in (*reference_reasons, *self.own_skips):
            self.fail(
                f"skipped ({reason}), but {self.reference.__name__}: {', '.join(reference_reasons) or 'not skipped'}"
            )
        super().skipTest(reason)


@functools.cache
def find_skip_reasons(case: type[unittest.TestCase], name: str) -> tuple[str, ...]:
    """Run one test of a reference and return its skip reasons, one per subtest."""
    result = unittest.TestResult()
    test = case(name)
    test.run(result)
    return tuple(_neutral(reason, test) for _, reason in result.skipped)


def _neutral(reason: str, case: Any) -> str:
    """Replace the names of the classes under test in a skip reason."""
    names = [type(case).__name__, *(model_class.__name__ for model_class in case.all_model_classes)]
    reason = re.sub(r"<class '[\w.]+\.(\w+)'>", r"\1", reason)
    return re.sub(rf"\b({'|'.join(names)})\b", "<class>", reason)
