"""The models of other projects: sizes, random weights, and errors if outputs or gradients differ."""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tiny_models import raises_one_line

from modeling_vitcls.benchmarking import peers
from modeling_vitcls.benchmarking.comparison import BenchmarkSettings
from modeling_vitcls.benchmarking.peers import (
    FORWARD_PASSES,
    PEERS,
    TOY_SIZE,
    TRAINING_STEPS,
    ForwardPass,
    build_step_runners,
    check_gradients,
    compare_forward_pass,
)


TOY_SETTINGS = BenchmarkSettings(("timm",), 1, is_toy=True)


@pytest.mark.slow
@pytest.mark.parametrize("against", PEERS)
def test_compiled_models_are_compared(against: str) -> None:
    row = replace(FORWARD_PASSES["bf16, batch 16, compiled"], batch_size=2)
    assert row.use_compile
    assert compare_forward_pass("row", row, PEERS[against](TOY_SIZE), TOY_SETTINGS).difference < 0.1


@pytest.mark.parametrize("flags", [(), ("--theirs",)])
def test_the_memory_of_a_step_excludes_the_optimizer_state(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The warm-up allocates the optimizer state and frees the gradients."""
    monkeypatch.setattr(sys, "argv", ["peers", "fp32, batch 16", "timm", "--toy", *flags])

    def measure(warm_up: Any, runner: Any) -> int:
        warm_up()
        parameters = list(runner.model.parameters())
        assert len(runner.optimizer.state) == len(parameters) and len(runner.labels) == 16
        assert all(parameter.grad is None for parameter in parameters)
        assert (type(runner.model).__name__ == "VisionTransformer") == bool(flags)
        return 123

    monkeypatch.setattr(peers, "measure_memory_growth", measure)
    peers.main()
    assert capsys.readouterr().out == "123\n"


@pytest.mark.parametrize("against", PEERS)
@pytest.mark.parametrize("name", TRAINING_STEPS)
def test_gradients_are_compared_before_steps_are_measured(name: str, against: str) -> None:
    ours, theirs = build_step_runners(TRAINING_STEPS[name], PEERS[against](TOY_SIZE))
    assert ours.model.training and theirs.model.training
    logits: list[torch.Tensor] = []
    ours.model.register_forward_hook(lambda module, inputs, output: logits.append(output.logits))
    assert check_gradients(ours, theirs, name) < ours.row.gradient_limit
    gradient = ours.compute_patch_gradient(num_images=1)  # earlier gradients are discarded
    assert torch.allclose(ours.compute_patch_gradient(num_images=1), gradient, rtol=0.01)
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    ours()
    assert not all(map(torch.equal, before, ours.model.parameters()))
    assert {each.dtype for each in logits} == {ours.row.autocast or torch.float32}
    assert [len(each) for each in logits] == [2, 1, 1, 16]
    with torch.no_grad():
        theirs.model.get_parameter("head.weight" if against == "timm" else "classifier.weight").neg_()
    with raises_one_line(name, "the gradients", "differ"):
        check_gradients(ours, theirs, name)


@pytest.mark.parametrize("against", PEERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_differ_are_not_compared(against: str, dtype: torch.dtype) -> None:
    peer = PEERS[against](TOY_SIZE)
    found = compare_forward_pass("row", ForwardPass(dtype, 2), peer, TOY_SETTINGS)
    assert found.against == against and found.difference < 0.1
    with torch.no_grad():
        peer.ours.get_parameter("vitcls.layers.1.mlp.fc1.weight").mul_(1.5)
    with raises_one_line(f"row against {against}", "the outputs differ"):
        compare_forward_pass("row", ForwardPass(dtype, 2), peer, TOY_SETTINGS)


def test_nan_outputs_are_not_compared() -> None:
    peer = PEERS["transformers"](TOY_SIZE)
    with torch.no_grad():
        peer.ours.get_parameter("classifier.bias").fill_(float("nan"))
    with raises_one_line("differ by nan"):
        compare_forward_pass("row", ForwardPass(torch.float32, 2), peer, TOY_SETTINGS)


def test_the_plain_peer_has_no_cpu_kernels() -> None:
    peer = PEERS["plain"](TOY_SIZE)
    assert "cpu_kernels=True" in str(peer.ours) and "cpu_kernels=True" not in str(peer.theirs)


@pytest.mark.parametrize("name", PEERS)
def test_peers_have_the_requested_size(name: str) -> None:
    size = replace(TOY_SIZE, image_size=40, num_hidden_layers=3, num_attention_heads=4, num_labels=7)
    config = PEERS[name](size).ours.config
    assert {field: getattr(config, field) for field in vars(size)} == vars(size)
    assert config.intermediate_size == 4 * 32


@pytest.mark.parametrize("name", PEERS)
def test_no_parameter_of_a_peer_is_constant(name: str) -> None:
    """A bias of zeros or a scale of ones would hide differences between the two sides."""
    for parameter_name, parameter in PEERS[name](TOY_SIZE).theirs.named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0, parameter_name
