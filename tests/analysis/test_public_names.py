"""The analysis as Python functions: its public names, and models in wrappers, which are unwrapped."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fresh_processes import run_fresh
from helpers.tiny_models import build_images, build_tiny_config, randomize
from helpers.varied_models import center_logits
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import modeling_vitcls.analysis as analysis
from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.analysis.model_utils import is_classifier, unwrap_model
from modeling_vitcls.publishing.card_images import build_attention_samples


# Names ---------------------------------------------------------------------------------------------------------------


def test_every_public_name_can_be_imported() -> None:
    for name in analysis.__all__:
        exec(f"from modeling_vitcls.analysis import {name}", found := {})
        assert not isinstance(found[name], type(sys)), f"{name} is the file of this name"
    assert set(analysis.__all__) <= set(dir(analysis))
    with pytest.raises(ImportError, match="no_such_name"):
        exec("from modeling_vitcls.analysis import no_such_name")
    with pytest.raises(AttributeError, match="no_such_name"):
        analysis.no_such_name  # noqa: B018


def test_importing_the_package_is_cheap_and_hides_no_name() -> None:
    """Figures and pages are not imported in a new process, and functions are not replaced by modules of their name."""
    code = """
import sys, modeling_vitcls
before = set(sys.modules)
from modeling_vitcls.analysis import compute_attribution
files = {name.rpartition(".")[2] for name in set(sys.modules) - before if name.startswith("modeling_vitcls.")}
assert files == {"analysis", "attribution", "model_utils", "attention_recorder"}, files
assert not {"matplotlib", "jinja2", "torchmetrics"} & (set(sys.modules) - before)
import modeling_vitcls.analysis.image_report, modeling_vitcls.analysis.attribution
from modeling_vitcls.analysis import compute_attribution as again, overlay, write_report
assert again is compute_attribution and callable(again)
"""
    ran = run_fresh("-c", code)
    assert ran.returncode == 0, ran.stderr


# Wrappers ------------------------------------------------------------------------------------------------------------


class Mine(ViTCLSForImageClassification):
    """A subclass of the user."""


def build_classifier(kind: type = ViTCLSForImageClassification) -> Any:
    config = build_tiny_config(num_register_tokens=1, num_labels=5, num_hidden_layers=3)
    return center_logits(kind(config), build_images(4)).eval()


def add_lora(model: Any) -> Any:
    """Add LoRA weights with PEFT that change the outputs."""
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False))
    return wrapped.eval()


WRAPPERS: dict[str, Callable[[], Any]] = {
    "compiled": lambda: torch.compile(build_classifier(), backend="eager"),
    "inherited": lambda: build_classifier(Mine),
    "peft": lambda: add_lora(build_classifier()),
    "data parallel": lambda: torch.nn.DataParallel(build_classifier()),
}


def build_pil_images(count: int = 4) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(count)]


PROCESSOR = ViTCLSImageProcessor(size={"height": 32, "width": 32})


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", WRAPPERS.values(), ids=WRAPPERS)
def test_wrapped_models_are_unwrapped(wrapped: Callable[[], Any], tmp_path: Path) -> None:
    model = wrapped()
    assert is_classifier(model)
    found = analysis.write_report(tmp_path / "report.html", model, PROCESSOR, build_pil_images(), labels=[0, 1, 2, 3])
    assert found.has_head and len(found.tasks) == 1
    with torch.no_grad():
        logits = model(PROCESSOR(build_pil_images(), return_tensors="pt")["pixel_values"]).logits
    probabilities = [reading.predictions[0].labels[0][1] for reading in found.image_reports]
    assert probabilities == pytest.approx(logits.softmax(dim=1).amax(dim=1).tolist(), abs=1e-5)
    assert [len(reading.attributions) for reading in found.image_reports] == [1] * 4
    (look, *_) = build_attention_samples(model, PROCESSOR, [(build_pil_images()[0], "cat")])
    assert look.title.startswith("cat, predicted LABEL_")


@pytest.mark.parametrize("name", ["compiled", "peft"])
def test_each_function_accepts_wrapped_models(name: str) -> None:
    """The results equal those of the inner model."""
    model = WRAPPERS[name]()
    plain = unwrap_model(model)
    assert type(plain) is ViTCLSForImageClassification
    pixels = build_images(2)
    assert torch.allclose(
        analysis.compute_attention_rollout(model, pixels), analysis.compute_attention_rollout(plain, pixels)
    )
    assert torch.allclose(analysis.compute_attribution(model, pixels), analysis.compute_attribution(plain, pixels))
    statistics = [analysis.TokenStatistics(one) for one in (model, plain)]
    for collected in statistics:
        collected.update(pixels)
    wrapped, unwrapped = (collected.compute() for collected in statistics)
    assert torch.allclose(wrapped.entropy, unwrapped.entropy)
    batches = lambda: [(pixels, None)]  # noqa: E731
    assert analysis.compute_ablations(model, batches) == analysis.compute_ablations(plain, batches)


def test_remote_code_has_its_own_classes(tmp_path: Path) -> None:
    """They are classifiers, but not instances of the package's classes."""
    build_classifier().save_pretrained(tmp_path)
    kind = get_class_from_dynamic_module("modeling_vitcls.ViTCLSForImageClassification", str(tmp_path))
    model = kind.from_pretrained(tmp_path)
    assert not isinstance(model, ViTCLSForImageClassification) and is_classifier(model)


def test_encoders_and_regressions_are_not_classifiers() -> None:
    assert is_classifier(torch.nn.DataParallel(Mine(build_tiny_config())))
    assert not is_classifier(randomize(ViTCLSModel(build_tiny_config())))
    assert not is_classifier(ViTCLSForImageClassification(build_tiny_config(problem_type="regression")))
    assert not is_classifier(ViTCLSForImageClassification(build_tiny_config(num_labels=0)))
