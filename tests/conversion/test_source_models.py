"""Sources of a conversion: the class that loads a checkpoint, the classifier of timm models, and unsafe pickles."""

import pickle
from pathlib import Path

import timm
import torch
import transformers
from helpers.source_checkpoints import SIZES
from helpers.tiny_models import raises_one_line

from modeling_vitcls import ViTCLSModel
from modeling_vitcls.conversion import source_models
from modeling_vitcls.conversion.convert import load_source
from modeling_vitcls.conversion.weight_rules import ConversionError


def test_the_class_of_a_source(tmp_path: Path) -> None:
    """A configuration without `architectures` is a base model."""
    transformers.ViTConfig(**SIZES).save_pretrained(tmp_path)
    source = load_source(f"transformers:{tmp_path}", random_init=True)
    assert type(source.model) is transformers.ViTModel and not source.model.training
    for architecture, name in source_models.ENCODER_CLASS_NAMES.items():
        config = transformers.ViTConfig(architectures=[architecture])
        assert source_models.get_convertible_class(config) is getattr(transformers, name)
        assert hasattr(transformers, architecture)


def test_the_classifier_of_a_timm_model() -> None:
    source = load_source("timm:test_vit", random_init=True)
    assert not source_models.TimmSource("timm:test_vit", timm.create_model("test_vit"), None, []).model.training
    source.compute_outputs(torch.zeros(1, 3, 112, 208))
    assert source.image_size == (160, 160)  # other sizes do not change the source
    assert type(source.convert("drop", None)) is ViTCLSModel
    kept, new = source.convert("keep", None), source.convert("new", 7)
    assert torch.equal(kept.classifier.weight, source.model.head.weight)
    assert new.classifier.weight.shape == (7, source.model.embed_dim)


def test_the_cause_of_a_loading_error_may_be_a_pickle() -> None:
    """transformers may raise an error of its own."""
    error = OSError("cannot load the weights")
    error.__cause__ = pickle.UnpicklingError("Weights only load failed")
    with raises_one_line("weights.bin is a pickle", error=ConversionError):
        source_models.raise_if_unsafe_pickle("weights.bin", error)
    error.__cause__ = None
    source_models.raise_if_unsafe_pickle("weights.bin", error)
