"""Run the model tests of transformers on the model classes of this package, in every token layout.

There is one class per layout and family of models; the tests are from transformers
(transformers_suite.py). `make test` runs the layout with all kinds of tokens, `make test-all` all
layouts. PipelineTesterMixin is excluded, because it requires checkpoints from the Hub.
"""

import unittest
from collections.abc import Mapping
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
import transformers
from helpers.tiny_models import LAYOUTS
from torch import nn
from transformers.models.auto import modeling_auto

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from modeling_vitcls.conversion.weight_rules import Fields
from peers.transformers_suite import load


backbone_tests = load("test_backbone_common")
configuration_tests = load("test_configuration_common")
modeling_tests = load("test_modeling_common")

# Tables in which the mixins look up the labels of a class. Classes outside transformers are added
# here.
AUTO_TABLES = {
    "MODEL_MAPPING_NAMES": "ViTCLSModel",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": "ViTCLSBackbone",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "ViTCLSForImageClassification",
    "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES": "ViTCLSForMaskedImageModeling",
}

# 5 x 5 patches: enough for every mixin, and fast.
SIZES = {
    "image_size": 10,
    "patch_size": 2,
    "num_channels": 3,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 37,
}


class SmallModel:
    """A small model with a token layout and inputs, with the attributes the mixins read."""

    is_training = True
    batch_size = 2

    def __init__(self, layout: Fields) -> None:
        self.layout = layout
        for name, size in SIZES.items():
            setattr(self, name, size)
        self.mask_length = (SIZES["image_size"] // SIZES["patch_size"]) ** 2
        self.num_masks = self.mask_length // 2
        self.seq_length = self.get_config().token_layout.num_prefix_tokens + self.mask_length

    def get_config(self) -> ViTCLSConfig:
        return ViTCLSConfig(**SIZES, **self.layout)

    def prepare_config_and_inputs_for_common(self) -> tuple[ViTCLSConfig, dict[str, torch.Tensor]]:
        size = SIZES["image_size"]
        return self.get_config(), {
            "pixel_values": modeling_tests.floats_tensor([self.batch_size, 3, size, size])
        }


class ViTCLSModelTests(modeling_tests.ModelTesterMixin):
    """Model tests for the token layout `layout`."""

    all_model_classes = (
        ViTCLSModel,
        ViTCLSForImageClassification,
        ViTCLSForMaskedImageModeling,
        ViTCLSBackbone,
    )
    # transformers runs this test only on models after 2022, which it identifies by the license
    # header.
    test_can_init_all_missing_weights_before_2023 = True
    test_resize_embeddings = False
    layout: ClassVar[Fields]

    def setUp(self) -> None:
        # commands that earlier tests ran in this process are silent
        transformers.logging.set_verbosity_warning()
        transformers.logging.get_logger("transformers.modeling_utils").filters.clear()
        self.model_tester = SmallModel(self.layout)
        self.config_tester = configuration_tests.ConfigTester(
            self, config_class=ViTCLSConfig, has_text_modality=False, **self.layout
        )
        for table, class_name in AUTO_TABLES.items():
            entry = patch.dict(getattr(modeling_auto, table), vitcls=class_name)
            entry.start()
            self.addCleanup(entry.stop)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    @unittest.skip(reason="ViT does not use inputs_embeds")
    def test_inputs_embeds(self) -> None:
        pass

    def test_model_get_set_embeddings(self) -> None:
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIsInstance(model.get_input_embeddings(), nn.Module)
            self.assertIsInstance(model.get_output_embeddings(), nn.Linear | None)


for name in dir(ViTCLSModelTests):  # 32 combinations of dtype, padding, masks and kernels
    is_combination = name.startswith("test_eager_matches_sdpa_inference_") and not name.endswith(
        "fp32_pad_left"
    )
    if is_combination or name == "test_bc_torch_dtype":
        pytest.mark.slow(getattr(ViTCLSModelTests, name))


class DistilledWithRegistersTest(ViTCLSModelTests, unittest.TestCase):
    layout = LAYOUTS["cls_distillation_registers"]


@pytest.mark.slow
class NoCLSTest(ViTCLSModelTests, unittest.TestCase):
    layout = LAYOUTS["no_cls"]


@pytest.mark.slow
class ThreeTasksTest(ViTCLSModelTests, unittest.TestCase):
    """Model tests for the multi-task class, with one task per CLS token and dicts of labels."""

    layout = LAYOUTS["three_cls"] | {
        "tasks": {"digit": ["odd", "even"], "color": ["red", "green", "blue"], "size": ["any"]}
    }
    all_model_classes = (ViTCLSModel, ViTCLSForMultiTaskClassification)

    def setUp(self) -> None:
        super().setUp()
        # these tests compare `logits` as one tensor
        if self._testMethodName.startswith(
            ("test_determinism", "test_eager_matches_sdpa_inference")
        ):
            self.all_model_classes = (ViTCLSModel,)

    def _prepare_for_class(
        self, inputs_dict: Mapping[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels and model_class is ViTCLSForMultiTaskClassification:
            inputs["labels"] = {
                task: torch.zeros(self.model_tester.batch_size).long()
                for task in self.layout["tasks"]
            }
        return inputs


class ViTCLSBackboneTests(backbone_tests.BackboneTesterMixin):
    """Backbone tests for the token layout `layout`."""

    all_model_classes = (ViTCLSBackbone,)
    config_class = ViTCLSConfig
    layout: ClassVar[Fields]

    def setUp(self) -> None:
        # commands that earlier tests ran in this process are silent
        transformers.logging.set_verbosity_warning()
        self.model_tester = SmallModel(self.layout)


class DistilledWithRegistersBackboneTest(ViTCLSBackboneTests, unittest.TestCase):
    layout = LAYOUTS["cls_distillation_registers"]
