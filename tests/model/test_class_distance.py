"""Distance to the nearest class: stored with the weights, equal to that of the statistics."""

import copy
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from helpers.tiny_models import (
    CLS,
    IMAGES,
    MEAN,
    build_images,
    build_random,
)
from numpy.testing import assert_allclose
from pytest import LogCaptureFixture
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.frozen.class_statistics import ClassStatistics
from modeling_vitcls.hub.model_folder import ModelFolder


pytestmark = pytest.mark.usefixtures("no_grad")

TOKENS = ((-2, "cls"), (-2, "mean"), CLS)


@torch.no_grad()
def compute_features(
    model: Any, pixel_values: torch.Tensor, kinds: Iterable[tuple[int, str]] = TOKENS
) -> dict[tuple[int, str], np.ndarray]:
    """Return the features of the tokens from the hidden states."""
    states = model.vitcls(pixel_values, output_hidden_states=True).hidden_states
    num_prefix_tokens = model.config.token_layout.num_prefix_tokens
    features = {}
    for layer, kind in kinds:
        tokens = model.vitcls.normalize(states[layer])
        pooled = tokens[:, 0] if kind == "cls" else tokens[:, num_prefix_tokens:].mean(dim=1)
        features[layer, kind] = pooled.numpy()
    return features


def fit_statistics(model: Any, kinds: Iterable[tuple[int, str]] = TOKENS) -> ClassStatistics:
    """Fit the statistics of random images."""
    features = compute_features(model, build_images(60), kinds)
    return ClassStatistics.fit(features, np.arange(60) % 3, 3)


def build_model(kinds: Iterable[tuple[int, str]] = TOKENS, **fields: Any) -> Any:
    """Return a classifier with the statistics of random images."""
    model = build_random(ViTCLSForImageClassification, **fields)
    fit_statistics(model, kinds).set_in_model(model)
    return model


@pytest.mark.parametrize("pooling", ["cls", "cls_mean"])
def test_the_distance_of_a_model_is_that_of_its_statistics(pooling: str) -> None:
    model = build_model(pooling=pooling)
    expected = fit_statistics(model).compute_distances(compute_features(model, IMAGES))
    assert_allclose(model(IMAGES).distance.numpy(), expected, rtol=1e-3)


def test_edited_statistics_count_at_once() -> None:
    model = build_model()
    before = model(IMAGES).distance
    model.class_distance.means_0[0].add_(1)
    model.class_distance.counts[1] = 2
    after = model(IMAGES).distance
    assert not torch.allclose(after, before)
    assert torch.equal(copy.deepcopy(model)(IMAGES).distance, after)


@torch.enable_grad()
def test_the_gradient_of_a_distance_is_that_of_autograd() -> None:
    model = build_model()
    pixels = IMAGES.clone().requires_grad_()
    found = torch.func.grad(lambda pixels: model(pixels).distance.sum())(IMAGES)
    model(pixels).distance.sum().backward()
    assert_close(found, pixels.grad)
    with torch.inference_mode():
        assert model(IMAGES).distance is not None


def test_statistics_are_saved_and_loaded_with_the_weights_but_are_no_parameters(
    tmp_path: Path,
) -> None:
    model = build_model()
    model.save_pretrained(tmp_path)
    loaded = ViTCLSForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(IMAGES).distance, model(IMAGES).distance)
    stored = ClassStatistics.from_model(loaded)
    assert stored is not None
    assert_allclose(stored.means[0], fit_statistics(model).means[0], rtol=1e-5)
    assert ModelFolder(tmp_path).num_parameters == model.num_parameters()


def test_a_model_that_is_built_in_half_precision_keeps_the_digits_of_statistics() -> None:
    model = build_model()
    half = ViTCLSForImageClassification._from_config(model.config, dtype=torch.bfloat16).eval()
    half.load_state_dict(model.state_dict())
    half.class_distance.claim(half.vitcls)
    assert torch.equal(half.class_distance.means_0, model.class_distance.means_0)
    assert_close(half(IMAGES.bfloat16()).distance, model(IMAGES).distance, rtol=0.05, atol=0)


def test_logits_have_the_same_bits_with_and_without_statistics() -> None:
    model = build_model()
    logits = model(IMAGES).logits
    model.class_distance = None
    outputs = model(IMAGES)
    assert torch.equal(outputs.logits, logits)
    assert outputs.distance is None


# Validity -----------------------------------------------------------------------------------------


def save_and_load(model: Any, folder: Path, **fields: Any) -> Any:
    """Save a model and load it."""
    model.save_pretrained(folder)
    return ViTCLSForImageClassification.from_pretrained(folder, **fields)


def flip_rows(encoder: Any) -> None:
    """Change the order of rows, but not the sum of the weights."""
    weight = encoder.layers[0].mlp.fc1.weight
    weight.copy_(weight.flip(0))


def swap_layers(encoder: Any) -> None:
    """Exchange two layers."""
    encoder.layers = encoder.layers[::-1]


def change_last_bit(encoder: Any) -> None:
    """Change one number by its last bit."""
    number = encoder.layernorm.weight.view(torch.int32)
    number[0] += 1


@pytest.mark.parametrize("change", [flip_rows, swap_layers, change_last_bit])
def test_a_saved_model_never_claims_other_weights(
    change: Any, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    model = build_model()
    change(model.vitcls)
    loaded = save_and_load(model, tmp_path)
    assert loaded(IMAGES).distance is None
    assert "has other weights" in caplog.text
    assert "vitcls finetune --model" in caplog.text


def test_weights_that_were_exchanged_in_a_folder_have_no_distance(tmp_path: Path) -> None:
    save_and_load(build_model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["vitcls.layernorm.bias"] += 1e-3
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert ViTCLSForImageClassification.from_pretrained(tmp_path)(IMAGES).distance is None


@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
@pytest.mark.parametrize("loaded", ["float32", "bfloat16", "float16"])
def test_rounding_at_load_keeps_the_distance_and_so_does_saving_it(
    saved: str, loaded: str, tmp_path: Path
) -> None:
    model = build_model().to(getattr(torch, saved))
    model = save_and_load(model, tmp_path / "saved", dtype=loaded)
    again = save_and_load(model, tmp_path / "again", dtype="float32")
    assert again(IMAGES).distance is not None


def test_shards_keep_the_distance(tmp_path: Path) -> None:
    model = build_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 1
    loaded = ViTCLSForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(IMAGES).distance, model(IMAGES).distance)


def test_training_mode_ends_the_distance_in_one_line(caplog: LogCaptureFixture) -> None:
    model = build_model()
    for _ in range(2):
        assert model.train().eval()(IMAGES).distance is None
    assert caplog.text.count("class statistics") == 1


def test_a_model_that_was_not_changed_in_training_mode_is_saved_with_its_distance(
    tmp_path: Path,
) -> None:
    model = build_model()
    expected = model(IMAGES).distance
    assert torch.equal(save_and_load(model.train(), tmp_path)(IMAGES).distance, expected)


def test_a_loaded_state_dict_ends_the_distance() -> None:
    model = build_model()
    model.load_state_dict(model.state_dict())
    assert model(IMAGES).distance is None


@pytest.mark.slow
def test_a_checkpoint_registers_nothing_in_the_optimizers_of_the_process(tmp_path: Path) -> None:
    """The hooks of all optimizers, after the import and after loading a checkpoint as remote code."""
    ViTCLSForImageClassification.register_for_auto_class("AutoModelForImageClassification")
    build_model().save_pretrained(tmp_path)
    program = f"""
import torch.optim.optimizer as module
from transformers import AutoModelForImageClassification as Model
before = dict(module._global_optimizer_pre_hooks), dict(module._global_optimizer_post_hooks)
model = Model.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)
import modeling_vitcls.model.modeling_vitcls
assert model.class_distance.is_valid
assert before == ({{}}, {{}})
assert not module._global_optimizer_pre_hooks and not module._global_optimizer_post_hooks
"""
    subprocess.run([sys.executable, "-c", program], check=True)


ADDED = {"num_register_tokens": 8, "num_distillation_tokens": 1, "num_cls_tokens": 3}
BEFORE = {"num_register_tokens": 0, "num_distillation_tokens": 0, "num_cls_tokens": 1}


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        (lambda model: model.bfloat16().float(), 0.3),
        (lambda model: model.half().float(), 0.3),
        (copy.deepcopy, 0.0),
        (lambda model: model.adapt(**ADDED).adapt(**BEFORE), 0.0),
    ],
    ids=["bfloat16", "float16", "deepcopy", "removed again"],
)
def test_nothing_that_keeps_the_function_ends_the_distance(change: Any, limit: float) -> None:
    model = build_model()
    expected = model(IMAGES).distance
    assert expected is not None
    distance = change(model).eval()(IMAGES).distance
    assert_close(distance, expected, rtol=limit / 3, atol=limit)


ADAPTERS = {
    "lora": peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2),
    "ia3": peft.IA3Config(target_modules=["q_proj", "fc2"], feedforward_modules=["fc2"]),
    "layer norms": peft.LNTuningConfig(target_modules=["layernorm_before", "layernorm"]),
    "oft": peft.OFTConfig(target_modules=["q_proj", "v_proj"], oft_block_size=4),
}


@pytest.mark.parametrize("kind", list(ADAPTERS))
def test_an_adapter_that_is_loaded_or_merged_ends_the_distance(kind: str, tmp_path: Path) -> None:
    model = build_model()
    adapted = peft.get_peft_model(copy.deepcopy(model), ADAPTERS[kind])
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.add_(0.01 * torch.randn_like(weight))
    adapted.save_pretrained(tmp_path)
    assert adapted.eval()(IMAGES).distance is None
    loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    assert loaded(IMAGES).distance is None
    assert loaded.merge_and_unload()(IMAGES).distance is None


@pytest.mark.slow
def test_a_compiled_model_has_the_distance_until_it_is_trained() -> None:
    model = build_model().adapt().eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(IMAGES).distance, model(IMAGES).distance)
    compiled.train()
    compiled.eval()
    assert compiled(IMAGES).distance is None


@pytest.mark.parametrize(
    "changes",
    [
        {"num_cls_tokens": 3, "cls_pooling": "concat"},
        {"cls_pooling": "mean", "num_cls_tokens": 2, "pooled_cls_tokens": [1]},
        {"num_hidden_layers": 2},
        {"hidden_act": "relu"},
        {"layer_type": "post"},
        {"num_labels": 5, "ignore_mismatched_sizes": True},
    ],
    ids=str,
)
def test_statistics_of_other_features_or_labels_are_dropped(
    changes: Fields, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    model = build_model(num_hidden_layers=3)
    model.save_pretrained(tmp_path)
    loaded = ViTCLSForImageClassification.from_pretrained(tmp_path, **changes)
    assert loaded.class_distance is None
    assert loaded.config.distance_threshold is None
    assert loaded(IMAGES).distance is None
    assert sum("class_statistics" in line for line in caplog.messages) == 1
    assert not any("newly initialized" in line for line in caplog.messages if "class_d" in line)


# What `from_pretrained(classifier, field=value)` does with a classifier: the same logits, other ones
# with a line that names the field, or an error. docs/configuration.md has this table, too.
OTHER_FIELDS = [
    ({"compute_all_tokens": True}, "equal", True),
    ({"fading_tokens": {}}, "equal", True),
    ({"num_register_tokens": 6}, "equal", True),
    ({"pooling": "cls"}, "pooling='mean', but the model has pooling='cls'", True),
    ({"pooling": "max"}, "pooling='mean', but the model has pooling='max'", True),
    ({"pooled_layers": [-2, -1]}, "pooled_layers=[-1, -2], but the model", True),
    ({"layer_norm_eps": 0.1}, "layer_norm_eps=1e-06, but the model", False),
    ({"cls_scopes": [[2, 2, 0, 0]]}, "class statistics (`distance`, `unknown`): dropped", False),
    ({"fading_tokens": {"registers": 2}}, "fade_in.progress: 0 kept", False),
    ({"image_size": 512}, "distance_threshold: dropped", True),
    ({"pooled_layers": [-1]}, "error", False),
    ({"pooling": "cls_mean"}, "error", False),
    ({"num_channels": 1}, "error", False),
]


@pytest.mark.parametrize(("changes", "outcome", "has_distance"), OTHER_FIELDS, ids=str)
def test_a_classifier_of_other_features_is_equal_named_or_refused(
    changes: Fields,
    outcome: str,
    has_distance: bool,
    tmp_path: Path,
    caplog: LogCaptureFixture,
) -> None:
    fields = {"pooling": "mean", "pooled_layers": [-1, -2], "num_register_tokens": 2}
    model = build_model((*TOKENS, MEAN), **fields)
    model.config.distance_threshold = 1.0
    model.save_pretrained(tmp_path)
    if outcome == "error":
        with pytest.raises(RuntimeError, match="raising an error"):
            ViTCLSForImageClassification.from_pretrained(tmp_path, **changes)
        return
    before = model(IMAGES)
    after = ViTCLSForImageClassification.from_pretrained(tmp_path, **changes)(IMAGES)
    if outcome == "equal":
        assert_close(after.logits, before.logits, rtol=0, atol=1e-5)
        assert "classifier:" not in caplog.text
    else:
        assert outcome in caplog.text
    assert (after.distance is not None) is has_distance
    if has_distance:
        assert_close(after.distance, before.distance, rtol=1e-3, atol=1e-3)


def test_an_encoder_with_another_pooling_has_no_line(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    build_random(ViTCLSModel).save_pretrained(tmp_path)
    ViTCLSForImageClassification.from_pretrained(tmp_path, pooling="mean", num_labels=3)
    assert "classifier: " not in caplog.text


def test_a_file_without_statistics_is_one_line(tmp_path: Path, caplog: LogCaptureFixture) -> None:
    model = build_model()
    weights = model.state_dict()
    others = {name: each for name, each in weights.items() if "class_distance" not in name}
    model.save_pretrained(tmp_path, state_dict=others)
    assert ViTCLSForImageClassification.from_pretrained(tmp_path)(IMAGES).distance is None
    (line,) = [line for line in caplog.messages if "class statistics" in line]
    assert "the file lacks them" in line
    assert "MISSING" not in caplog.text


def test_an_encoder_is_loaded_without_a_report_about_statistics(
    tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    build_model().save_pretrained(tmp_path)
    ViTCLSModel.from_pretrained(tmp_path)
    assert not any("class_distance" in line for line in caplog.messages)


@pytest.mark.parametrize(
    ("changes", "keeps"),
    [
        ({"num_distillation_tokens": 1, "num_cls_tokens": 2}, True),
        ({"num_register_tokens": 4, "token_fade_in_steps": 0}, False),
        ({"num_register_tokens": 0}, False),
        ({"patch_size": 4}, False),
    ],
    ids=str,
)
def test_statistics_stay_only_if_the_features_stay(changes: Fields, keeps: bool) -> None:
    """Above, `from_pretrained` changes other fields, such as the size of images."""
    model = build_model(num_register_tokens=2)
    model.config.distance_threshold = 3.0
    adapted = model.adapt(**changes)
    assert (adapted.class_distance is not None) is keeps
    assert (adapted.config.distance_threshold is not None) is keeps
    if keeps:
        expected = model(IMAGES).distance
        assert_close(adapted(IMAGES).distance, expected, rtol=1e-3, atol=1e-3)


def test_statistics_stay_with_a_token_that_training_has_opened(tmp_path: Path) -> None:
    model = build_model().adapt(num_register_tokens=2)
    model.vitcls.fade_in.progress.fill_(model.vitcls.fade_in.FULL)
    fit_statistics(model).set_in_model(model)
    assert save_and_load(model, tmp_path)(IMAGES).distance is not None


class Sharded(nn.Parameter):
    """A weight whose numbers are not all in this process, as in FSDP2."""


def test_weights_that_cannot_be_read_have_no_distance() -> None:
    model = build_model()
    layer = model.vitcls.layers[0].mlp.fc1
    layer.weight = Sharded(layer.weight.detach().clone())
    fit_statistics(model).set_in_model(model)
    assert model(IMAGES).distance is None
