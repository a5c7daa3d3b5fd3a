"""Run the model tests of transformers on the model classes of this package, in every token layout.

There is one class per layout and family of models; the tests are from transformers (transformers_suite.py).
PipelineTesterMixin is excluded, because it requires checkpoints from the Hub.
"""

import unittest
from collections.abc import Mapping
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import torch
from transformers.models.auto import modeling_auto

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from peers.transformers_reference import (
    BuiltInBackbone,
    BuiltInViT,
    ModelTests,
    SkipsLikeReference,
    SmallModel,
    backbone_tests,
    configuration_tests,
)


pytestmark = pytest.mark.integration


ONE_CLS = {"num_cls_tokens": 1}
DISTILLED_WITH_REGISTERS = {"num_cls_tokens": 1, "num_distillation_tokens": 1, "num_register_tokens": 4}
NO_CLS = {"num_cls_tokens": 0, "num_register_tokens": 2, "pooling": "mean"}
THREE_CLS = {"num_cls_tokens": 3}

# Tables in which the mixins look up the labels of a class. Classes outside transformers are added here.
AUTO_TABLES = {
    "MODEL_MAPPING_NAMES": "ViTCLSModel",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": "ViTCLSBackbone",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "ViTCLSForImageClassification",
    "MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES": "ViTCLSForMaskedImageModeling",
}


class ViTCLSModelTests(SkipsLikeReference, ModelTests):
    """Model tests for the token layout `layout`."""

    reference = BuiltInViT
    all_model_classes = (ViTCLSModel, ViTCLSForImageClassification, ViTCLSForMaskedImageModeling, ViTCLSBackbone)
    # transformers runs this test only on models after 2022, which it identifies by the license header.
    test_can_init_all_missing_weights_before_2023 = True
    # The built-in ViT renames weights between file and model, but ViTCLS does not.
    own_skips = ("No conversion found for <class>",)
    layout: ClassVar[dict[str, Any]]

    def setUp(self) -> None:
        num_prefix_tokens = ViTCLSConfig(**self.layout).token_layout.num_prefix_tokens
        self.model_tester = SmallModel(ViTCLSConfig, num_prefix_tokens, **self.layout)
        self.config_tester = configuration_tests.ConfigTester(
            self, config_class=ViTCLSConfig, has_text_modality=False, **self.layout
        )
        for table, class_name in AUTO_TABLES.items():
            entry = patch.dict(getattr(modeling_auto, table), vitcls=class_name)
            entry.start()
            self.addCleanup(entry.stop)


class OneCLSTest(ViTCLSModelTests, unittest.TestCase):
    layout = ONE_CLS


class DistilledWithRegistersTest(ViTCLSModelTests, unittest.TestCase):
    layout = DISTILLED_WITH_REGISTERS


@pytest.mark.slow
class NoCLSTest(ViTCLSModelTests, unittest.TestCase):
    layout = NO_CLS


@pytest.mark.slow
class ThreeCLSTest(ViTCLSModelTests, unittest.TestCase):
    layout = THREE_CLS


class MultiTaskTests(ViTCLSModelTests):
    """Model tests for the multi-task class, which has one task per CLS token, and dicts of labels and logits."""

    all_model_classes = (ViTCLSModel, ViTCLSForMultiTaskClassification)

    def setUp(self) -> None:
        super().setUp()
        # These tests compare `logits` as one tensor; the next test compares the logits of each task.
        if self._testMethodName.startswith(("test_determinism", "test_eager_matches_sdpa_inference")):
            self.all_model_classes = (ViTCLSModel,)

    def test_logits_of_every_task_repeat_and_match_between_eager_and_sdpa(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = ViTCLSForMultiTaskClassification(config).eval()
        with torch.no_grad():
            sdpa = model(**inputs).logits
            repeated = model(**inputs).logits
            model.set_attn_implementation("eager")
            eager = model(**inputs).logits
        self.assertEqual(set(sdpa), set(self.layout["tasks"]))
        torch.testing.assert_close(repeated, sdpa, atol=0, rtol=0)
        torch.testing.assert_close(eager, sdpa, atol=1e-6, rtol=1e-4)

    def _prepare_for_class(
        self, inputs_dict: Mapping[str, Any], model_class: type, return_labels: bool = False
    ) -> dict[str, Any]:
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels and model_class is ViTCLSForMultiTaskClassification:
            inputs["labels"] = {
                task: torch.zeros(self.model_tester.batch_size).long() for task in self.layout["tasks"]
            }
        return inputs


class ThreeTasksTest(MultiTaskTests, unittest.TestCase):
    layout = THREE_CLS | {"tasks": {"digit": ["odd", "even"], "color": ["red", "green", "blue"], "size": ["any"]}}


class ViTCLSBackboneTests(SkipsLikeReference, backbone_tests.BackboneTesterMixin):
    """Backbone tests for the token layout `layout`."""

    reference = BuiltInBackbone
    all_model_classes = (ViTCLSBackbone,)
    config_class = ViTCLSConfig
    layout: ClassVar[dict[str, Any]]

    def setUp(self) -> None:
        num_prefix_tokens = ViTCLSConfig(**self.layout).token_layout.num_prefix_tokens
        self.model_tester = SmallModel(ViTCLSConfig, num_prefix_tokens, **self.layout)


class OneCLSBackboneTest(ViTCLSBackboneTests, unittest.TestCase):
    layout = ONE_CLS


class DistilledWithRegistersBackboneTest(ViTCLSBackboneTests, unittest.TestCase):
    layout = DISTILLED_WITH_REGISTERS


class NoCLSBackboneTest(ViTCLSBackboneTests, unittest.TestCase):
    layout = NO_CLS


class ThreeCLSBackboneTest(ViTCLSBackboneTests, unittest.TestCase):
    layout = THREE_CLS
