"""Comparisons of features that only this package has: linear probes, attention, merged and dropped patches."""

import copy
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tiny_models import raises_one_line

from modeling_vitcls.benchmarking import comparison, own_features
from modeling_vitcls.benchmarking.comparison import BenchmarkSettings, measure_throughput
from modeling_vitcls.benchmarking.own_features import (
    ATTENTION_ROWS,
    INEXACT_ROWS,
    PROBE_ROWS,
    build_model_and_images,
    check_attention,
    train_probe,
)
from modeling_vitcls.benchmarking.peers import TOY_SIZE, build_model, build_random_images
from modeling_vitcls.benchmarking.work import run_benchmarks
from modeling_vitcls.training.linear_probe import compute_features


TOY_SETTINGS = BenchmarkSettings(("timm",), 1, is_toy=True)


def test_the_probe_counts_the_images_of_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides train the classifier as a plain loop over the pooled features does."""
    measured: list[Any] = []
    encoded: list[int] = []

    def encode(model: Any, images: torch.Tensor) -> torch.Tensor:
        encoded.append(len(images))
        return compute_features(model, images)

    def measure(ours: Any, theirs: Any, num_images: int, settings: BenchmarkSettings) -> Any:
        measured.append((num_images, settings.num_pairs, settings.is_toy))
        for train, expected in ((ours, [16] * 2), (theirs, [16] * 2 * 10)):
            encoded.clear()
            train()
            assert encoded == expected
        return [1.0], [1.0]

    monkeypatch.setattr(own_features, "compute_features", encode)
    monkeypatch.setattr(own_features, "compare_throughput", measure)
    (result,) = run_benchmarks(("probe",), (), TOY_SETTINGS)
    assert measured == [(10 * 32, 1, True)] and result.details["num_epochs"] == 10 and result.difference < 1e-4
    row = replace(PROBE_ROWS["10 epochs, batch 16"], num_epochs=3)
    model, images, labels = build_model(TOY_SIZE), build_random_images(32, TOY_SIZE.image_size), torch.arange(32) % 5
    with torch.no_grad():
        features = model.vitcls(images).pooler_output
    classifier = copy.deepcopy(model.classifier)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    for start in (0, 16) * 3:
        batch = slice(start, start + 16)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(classifier(features[batch]), labels[batch]).backward()
        optimizer.step()
    for use_cache in (True, False):
        assert torch.allclose(train_probe(model, images, labels, row, use_cache), classifier.weight, atol=1e-5)


def test_reading_attention_is_compared_with_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that measures the memory of each side is replaced by constants."""
    requests = []

    def measure(*arguments: str) -> int:
        requests.append(arguments)
        return 100 if "--theirs" in arguments else 250

    monkeypatch.setattr(comparison, "measure_peak_memory_in_process", measure)
    names = ("token_attention, batch 1", "statistics, batch 16")
    entries = [result.to_dict() for result in run_benchmarks(("attention",), names, TOY_SETTINGS)]
    assert [entry["name"] for entry in entries] == list(names)
    assert {entry["against"] for entry in entries} == {"a plain forward pass"}
    assert [entry["batch_size"] for entry in entries] == [1, 16]
    for entry in entries:
        assert (entry["ours_peak_bytes"], entry["theirs_peak_bytes"]) == (250, 100)
        assert (
            entry["size"] == vars(TOY_SIZE) and entry["pairs"] == 1 and entry["largest_difference_of_outputs"] < 1e-5
        )
    module = "modeling_vitcls.benchmarking.own_features"
    assert requests == [(module, name, "--toy", *side) for name in names for side in ((), ("--theirs",))]


@pytest.mark.parametrize("name", ATTENTION_ROWS)
def test_attention_is_checked_before_it_is_measured(name: str) -> None:
    row = ATTENTION_ROWS[name]
    model, pixel_values = build_model_and_images(row.batch_size, is_toy=True)
    assert len(pixel_values) == row.batch_size and model.config.num_register_tokens == 4
    assert check_attention(row, model, pixel_values, name) < 1e-5
    assert row.compute(model, pixel_values[:1]).abs().max() > 0
    with torch.no_grad():
        assert measure_throughput(lambda: row.compute(model, pixel_values), row.batch_size, 0.0) > 0
    assert model.config._attn_implementation == "sdpa"
    wrong = replace(row, compute=lambda model, pixels: row.compute(model, pixels) + 0.1, reference=row.compute)
    with raises_one_line(name, "differ by 0.1"):
        check_attention(wrong, model, pixel_values, name)
    not_a_number = replace(
        row, compute=lambda model, pixels: row.compute(model, pixels) * float("nan"), reference=row.compute
    )
    with raises_one_line("differ by nan"):
        check_attention(not_a_number, model, pixel_values, name)


@pytest.mark.parametrize(("flags", "expected"), [((), (16, 2, 2, 5, 21)), (("--theirs",), (16, 5))])
def test_the_memory_of_attention_or_of_a_forward_pass_is_measured(
    flags: tuple[str, ...], expected: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm-up uses one image. Memory is replaced by the shape of the output."""
    monkeypatch.setattr(sys, "argv", ["own_features", "token_attention, batch 16", "--toy", *flags])
    shapes: list[tuple[int, ...]] = []

    def measure(warm_up: Any, function: Any) -> int:
        shapes.extend(tuple(run().shape) for run in (warm_up, function))
        return 0

    monkeypatch.setattr(own_features, "measure_memory_growth", measure)
    own_features.main()
    assert shapes == [(1, *expected[1:]), expected]


def test_inexact_features_are_compared_with_the_plain_model() -> None:
    """The plain model drops nothing; the other one computes the same if its feature is set to 0."""
    names = [name for name in INEXACT_ROWS if " 0.5," in name]
    entries = [result.to_dict() for result in run_benchmarks(("inexact",), tuple(names), TOY_SETTINGS)]
    assert [(entry["name"], entry["against"]) for entry in entries] == [(name, "the plain model") for name in names]
    assert [entry.get("patch_drop_rate") for entry in entries] == [0.5]
    assert all(entry["device"] == "cpu" and entry["largest_difference_of_outputs"] == 0 for entry in entries)


@pytest.mark.parametrize("name", INEXACT_ROWS)
def test_inexact_models_have_the_field_of_their_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = INEXACT_ROWS[name]
    computation, num_images = row.build_computation(build_model(TOY_SIZE), TOY_SIZE, "cpu")
    outputs: Any = computation()
    assert num_images == (4 if outputs else 16) and (outputs is None or outputs.logits.shape == (4, 5))
    build = lambda model, *others: (lambda: getattr(model.config, row.field), 9)  # noqa: E731
    measure = lambda ours, theirs, num_images, settings: ([ours()], [theirs() + num_images])  # noqa: E731
    monkeypatch.setitem(INEXACT_ROWS, name, replace(row, build_computation=build))
    monkeypatch.setattr(own_features, "compare_throughput", measure)
    (result,) = run_benchmarks(("inexact",), (name,), TOY_SETTINGS)
    assert (result.ours, result.theirs) == ([row.value], [0 + 9])
