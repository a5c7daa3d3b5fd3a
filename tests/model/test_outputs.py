"""Outputs contain only tensors, which gather and pytrees handle."""

import pickle
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import convert_to_fp32, gather, send_to_device
from helpers.tiny_models import (
    IMAGES,
    KINDS,
    TOKENS,
    Kind,
    assert_same_bits,
    assert_same_outputs,
    build_random,
    each_kind,
)
from torch.nn.parallel import scatter_gather
from torch.utils._pytree import tree_leaves, tree_map

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel


each_classifier = pytest.mark.parametrize("kind", [KINDS["classifier"], KINDS["multi_task"]])


@torch.no_grad()
@each_kind
def test_outputs_hold_tensors_only(kind: Kind) -> None:
    model = kind.build()
    model.set_attn_implementation("eager")
    output = model(IMAGES, **kind.inputs, output_hidden_states=True, output_attentions=True)
    assert {"hidden_states", "attentions"} <= output.keys()
    assert all(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(output))


@torch.no_grad()
def test_a_tuple_ends_with_the_pooler_output() -> None:
    """As in the ViT of transformers."""
    model = build_random(ViTCLSModel)
    output = model(IMAGES)
    values = model(IMAGES, return_dict=False)
    assert isinstance(values, tuple)
    assert len(values) == 2
    assert torch.equal(values[0], output.last_hidden_state)
    assert torch.equal(values[-1], output.pooler_output)


@torch.no_grad()
def test_tokens_are_views_of_the_last_hidden_state() -> None:
    output = build_random(ViTCLSModel, **TOKENS)(IMAGES)
    storage = output.last_hidden_state.untyped_storage().data_ptr()
    assert {each.untyped_storage().data_ptr() for each in output.tokens.values()} == {storage}
    assert_same_bits(torch.cat(list(output.tokens.values()), dim=1), output.last_hidden_state)


def gather_in_one_process(output: Any) -> Any:
    """As `DataParallel` gathers a single replica, without the copy between GPUs."""
    with patch.object(scatter_gather.Gather, "apply", lambda device, dim, *each: torch.cat(each)):
        return scatter_gather.gather([output], "cpu")


REBUILDS: dict[str, Callable[[Any], Any]] = {
    "accelerate, to a device": lambda output: send_to_device(output, "cpu"),
    "accelerate, to float32": convert_to_fp32,
    "accelerate, gathered": lambda output: PartialState(cpu=True) and gather(output),
    "DataParallel": gather_in_one_process,
    "pickle": lambda output: pickle.loads(pickle.dumps(output)),
    "pytree": lambda output: tree_map(torch.clone, output),
}


@torch.no_grad()
@pytest.mark.parametrize("rebuild", REBUILDS.values(), ids=REBUILDS)
def test_tokens_survive(rebuild: Callable[[Any], Any]) -> None:
    output = build_random(ViTCLSModel, **TOKENS)(IMAGES)
    rebuilt = rebuild(output)
    assert type(rebuilt) is type(output)
    assert rebuilt.tokens["registers"].shape == (2, 3, 16)
    assert_same_bits(rebuilt.tokens, output.tokens)


@torch.no_grad()
@each_classifier
def test_a_classifier_returns_all_tokens_if_asked(kind: Kind) -> None:
    model = kind.build(num_register_tokens=3)
    output = model(IMAGES, output_tokens=True)
    assert_same_bits(output.tokens, model.vitcls(IMAGES).tokens)
    assert_same_outputs(output.logits, model(IMAGES).logits, tolerance=1e-6)


@torch.no_grad()
@each_classifier
def test_a_classifier_returns_no_tokens_by_default(kind: Kind) -> None:
    assert "tokens" not in kind.build()(IMAGES)


def test_an_exported_encoder_has_no_output_twice() -> None:
    model = build_random(ViTCLSModel, **TOKENS)
    program = torch.export.export(model, (IMAGES,))
    outputs = program.module()(IMAGES)
    assert list(outputs) == ["last_hidden_state", "pooler_output"]


def test_a_traced_encoder_has_no_output_twice() -> None:
    model = build_random(ViTCLSModel, **TOKENS)
    outputs = torch.jit.trace(model, IMAGES, strict=False)(IMAGES)
    assert list(outputs) == ["last_hidden_state", "pooler_output"]


def test_an_exported_classifier_returns_tokens_if_asked() -> None:
    model = build_random(ViTCLSForImageClassification, **TOKENS)
    program = torch.export.export(model, (IMAGES,), {"output_tokens": True})
    assert_same_bits(
        program.module()(IMAGES, output_tokens=True).tokens, model.vitcls(IMAGES).tokens
    )
