"""Models in wrappers are measured like the models inside."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config
from helpers.varied_models import center_logits
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.analysis.inspection import inspect_model, read_images
from modeling_vitcls.analysis.model_utils import is_classifier, unwrap_model


PROCESSOR = ViTCLSImageProcessor(size={"height": 32, "width": 32})
PHOTOS = [Image.effect_noise((32, 32), sigma) for sigma in (20, 40)]


def build_classifier() -> Any:
    config = build_tiny_config(
        num_register_tokens=1, num_labels=5, num_hidden_layers=3, hidden_dropout_prob=0.5
    )
    return center_logits(ViTCLSForImageClassification(config).eval(), build_images(4))


def add_lora(model: Any) -> Any:
    """Add LoRA weights with PEFT that change the outputs."""
    wrapped = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    )
    return wrapped.eval()


@pytest.mark.parametrize(
    "wrap", [partial(torch.compile, backend="eager"), add_lora], ids=["compiled", "peft"]
)
def test_a_wrapped_model_in_training_is_measured_like_the_inner_model(wrap: Any) -> None:
    """Dropout is disabled. Frozen layers in evaluation mode stay in it while others train."""
    model = wrap(build_classifier())
    plain = unwrap_model(model)
    assert type(plain) is ViTCLSForImageClassification
    expected = inspect_model(plain, read_images(plain, PROCESSOR, PHOTOS))
    model.train()
    plain.vitcls.layers[0].eval()

    found = inspect_model(model, read_images(model, PROCESSOR, PHOTOS))

    assert plain.training
    assert not plain.vitcls.layers[0].training
    assert found == expected


def test_remote_code_has_its_own_classes(tmp_path: Path) -> None:
    """They are classifiers, but not instances of the package's classes."""
    build_classifier().save_pretrained(tmp_path)
    kind = get_class_from_dynamic_module(
        "modeling_vitcls.ViTCLSForImageClassification", str(tmp_path)
    )
    model = kind.from_pretrained(tmp_path)
    assert not isinstance(model, ViTCLSForImageClassification)
    assert is_classifier(model)
