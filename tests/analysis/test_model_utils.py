"""Models in wrappers are unwrapped by every function of the analysis."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config, randomize
from helpers.varied_models import center_logits
from peft import LoraConfig, get_peft_model
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.analysis.ablation import compute_ablations
from modeling_vitcls.analysis.attribution import compute_attention_rollout, compute_attribution
from modeling_vitcls.analysis.model_utils import is_classifier, unwrap_model
from modeling_vitcls.analysis.token_statistics import TokenStatistics
from modeling_vitcls.inference.image_pass import ImageBatch


class Mine(ViTCLSForImageClassification):
    """A subclass of the user."""


def build_classifier(kind: type = ViTCLSForImageClassification) -> Any:
    config = build_tiny_config(num_register_tokens=1, num_labels=5, num_hidden_layers=3)
    return center_logits(kind(config), build_images(4)).eval()


def add_lora(model: Any) -> Any:
    """Add LoRA weights with PEFT that change the outputs."""
    wrapped = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    )
    return wrapped.eval()


@pytest.mark.parametrize(
    "wrap", [partial(torch.compile, backend="eager"), add_lora], ids=["compiled", "peft"]
)
def test_each_function_accepts_wrapped_models(wrap: Any) -> None:
    """The results equal those of the inner model."""
    model = wrap(build_classifier())
    plain = unwrap_model(model)
    assert type(plain) is ViTCLSForImageClassification
    pixels = build_images(2)
    assert torch.allclose(
        compute_attention_rollout(model, pixels), compute_attention_rollout(plain, pixels)
    )
    assert torch.allclose(compute_attribution(model, pixels), compute_attribution(plain, pixels))
    statistics = [TokenStatistics(one) for one in (model, plain)]
    for collected in statistics:
        collected.update(pixels)
    wrapped, unwrapped = (collected.compute() for collected in statistics)
    assert torch.allclose(wrapped.entropy, unwrapped.entropy)
    batches = lambda: [ImageBatch(pixels)]  # noqa: E731
    assert compute_ablations(model, batches) == compute_ablations(plain, batches)


def test_remote_code_has_its_own_classes(tmp_path: Path) -> None:
    """They are classifiers, but not instances of the package's classes."""
    build_classifier().save_pretrained(tmp_path)
    kind = get_class_from_dynamic_module(
        "modeling_vitcls.ViTCLSForImageClassification", str(tmp_path)
    )
    model = kind.from_pretrained(tmp_path)
    assert not isinstance(model, ViTCLSForImageClassification)
    assert is_classifier(model)


def test_encoders_and_regressions_are_not_classifiers() -> None:
    assert is_classifier(torch.nn.DataParallel(Mine(build_tiny_config())))
    assert not is_classifier(randomize(ViTCLSModel(build_tiny_config())))
    assert not is_classifier(
        ViTCLSForImageClassification(build_tiny_config(problem_type="regression"))
    )
    assert not is_classifier(ViTCLSForImageClassification(build_tiny_config(num_labels=0)))
