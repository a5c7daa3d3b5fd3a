"""Distance to the nearest class: stored with the weights, equal to that of the statistics."""

import copy
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import peft
import pytest
import torch
from helpers.tiny_models import (
    CLS,
    IMAGE_LABELS,
    IMAGES,
    MEAN,
    build_images,
    build_random,
    get_largest_difference,
)
from numpy.testing import assert_allclose
from pytest import LogCaptureFixture, MonkeyPatch
from torch import nn
from torch.testing import assert_close

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.frozen.class_statistics import ClassStatistics
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.model import class_distance_vitcls
from modeling_vitcls.model.class_distance_vitcls import sum_weights


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


@pytest.fixture
def reads(monkeypatch: MonkeyPatch) -> Mock:
    """Count how often the weights are read."""
    monkeypatch.setattr(class_distance_vitcls, "sum_weights", Mock(wraps=sum_weights))
    return class_distance_vitcls.sum_weights


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
    torch.optim.SGD([pixels]).step()  # After a step, a few weights are read again
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


def train_steps(model: Any, part: str = "vitcls.") -> None:
    """Change the weights of a part as ten steps of AdamW with a rate of 1e-3 do."""
    for name, weight in model.named_parameters():
        if name.startswith(part):
            weight.add_(1e-2 * torch.sign(torch.randn_like(weight)))


def flip_rows(model: Any) -> None:
    """Change the order of rows, but not the sum of the weights."""
    weight = model.vitcls.layers[0].mlp.fc1.weight
    weight.copy_(weight.flip(0))


def permute_columns(model: Any) -> None:
    """Change the order of columns, but not the sum of each row."""
    for layer in model.vitcls.layers:
        layer.mlp.fc1.weight.copy_(layer.mlp.fc1.weight.flip(1))


@torch.enable_grad()
def train_with_sgd(model: Any, name: str, fused: bool = False) -> None:
    """Train one parameter of the embeddings with SGD, in evaluation mode."""
    weight = model.vitcls.embeddings.get_parameter(name)
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=fused)
    for _ in range(5):
        model(IMAGES, labels=IMAGE_LABELS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.zero_grad()


TRAINED_NAMES = ("cls_token", "position_embeddings.cls", "position_embeddings.patches")
PARTS = ("embeddings.patch_embeddings", "embeddings.cls_token", "layers.1.mlp.fc2", "layernorm")


@pytest.mark.parametrize(
    "change",
    [
        flip_rows,
        permute_columns,
        *(partial(train_with_sgd, name=name) for name in TRAINED_NAMES),
        partial(train_with_sgd, name="cls_token", fused=True),
        *(partial(train_steps, part=f"vitcls.{part}") for part in PARTS),
    ],
)
def test_a_change_of_any_part_that_the_distance_depends_on_ends_it(
    change: Any, caplog: LogCaptureFixture
) -> None:
    model = build_model()
    expected = model(IMAGES).distance
    state = copy.deepcopy(model.state_dict())
    change(model)
    # the model stays in evaluation mode: some loops train there
    assert model(IMAGES).distance is None
    assert "vitcls finetune --model" in caplog.text
    model.load_state_dict(state)
    assert torch.equal(model(IMAGES).distance, expected)


def test_a_change_in_inference_mode_ends_the_distance() -> None:
    """Tensors that are made in inference mode do not count their edits."""
    with torch.inference_mode():
        model = build_model()
        assert model(IMAGES).distance is not None
        model.vitcls.layers[0].mlp.fc1.weight.mul_(1.01)
        assert model(IMAGES).distance is None


ADDED = {"num_register_tokens": 8, "num_distillation_tokens": 1, "num_cls_tokens": 3}
BEFORE = {"num_register_tokens": 0, "num_distillation_tokens": 0, "num_cls_tokens": 1}


@pytest.mark.parametrize(
    ("change", "limit"),
    [
        (lambda model: model.bfloat16().float(), 0.3),
        (lambda model: model.half().float(), 0.3),
        (copy.deepcopy, 0.0),
        (lambda model: model.adapt(**ADDED).adapt(**BEFORE), 0.0),
        (lambda model: model.train().eval(), 0.0),
    ],
    ids=["bfloat16", "float16", "deepcopy", "removed again", "modes"],
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
def test_an_adapter_that_is_merged_or_loaded_has_its_logits_and_no_distance_once_it_is_trained(
    kind: str, tmp_path: Path
) -> None:
    model = build_model()
    expected = model(IMAGES).distance
    adapted = peft.get_peft_model(copy.deepcopy(model), ADAPTERS[kind]).eval()
    assert_close(adapted(IMAGES).distance, expected)

    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.add_(0.01 * torch.randn_like(weight))
    assert adapted(IMAGES).distance is None
    with adapted.disable_adapter():
        assert_close(adapted(IMAGES).distance, expected)
    adapted.save_pretrained(tmp_path)
    trained = adapted(IMAGES)
    assert get_largest_difference(trained.logits, model(IMAGES).logits) > 1e-3
    for again in (
        peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path),
        adapted.merge_and_unload(),
    ):
        outputs = again(IMAGES)
        assert_close(outputs.logits, trained.logits, rtol=1e-4, atol=1e-5)
        assert outputs.distance is None


@torch.enable_grad()
def test_functions_of_the_weights_have_logits_and_no_distance() -> None:
    model = build_model()
    parameters = dict(model.named_parameters())

    def compute_outputs(weights: Any) -> Any:
        outputs = torch.func.functional_call(model, weights, (IMAGES,))
        assert outputs.distance is None  # a distance to other weights would mislead
        return outputs.logits

    gradients = torch.func.grad(lambda weights: compute_outputs(weights).sum())(parameters)
    model(IMAGES).logits.sum().backward()
    assert model.classifier.weight.grad is not None
    assert_close(gradients["classifier.weight"], model.classifier.weight.grad)

    ensemble = {name: torch.stack([each, each]) for name, each in parameters.items()}
    logits = torch.vmap(compute_outputs)(ensemble)
    assert_close(logits[1], model(IMAGES).logits, rtol=1e-4, atol=1e-5)
    assert model(IMAGES).distance is not None


def test_a_module_that_peft_copies_keeps_the_distance_until_the_copy_is_trained() -> None:
    model = build_model()
    expected = model(IMAGES).distance
    config = peft.LoraConfig(
        target_modules=["q_proj", "v_proj"], r=2, modules_to_save=["vitcls.embeddings"]
    )
    adapted = peft.get_peft_model(model, config).eval()
    assert torch.equal(adapted(IMAGES).distance, expected)

    adapted.base_model.model.vitcls.embeddings.cls_token.normal_()
    assert adapted(IMAGES).distance is None
    with adapted.disable_adapter():
        assert torch.equal(adapted(IMAGES).distance, expected)


def test_statistics_of_a_model_with_an_adapter_are_those_of_the_merged_model() -> None:
    model = build_model()
    statistics = fit_statistics(model)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    statistics.set_in_model(adapted.base_model.model)
    expected = adapted(IMAGES).distance
    merged = adapted.merge_and_unload()
    assert_close(merged(IMAGES).distance, expected, rtol=1e-3, atol=1e-3)


def test_a_compiled_model_knows_its_weights_after_eval_and_those_that_are_loaded() -> None:
    model = build_model().adapt().eval()
    weights = copy.deepcopy(model.state_dict())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(IMAGES).distance, model(IMAGES).distance)
    compiled.train()
    train_steps(model)
    trained = copy.deepcopy(model.state_dict())
    compiled.eval()
    assert compiled(IMAGES).distance is None
    for state, has_distance in ((weights, True), (trained, False)):
        model.load_state_dict(state)
        assert (compiled(IMAGES).distance is not None) is has_distance


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


@torch.enable_grad()
def test_training_in_evaluation_mode_is_one_line_and_reads_the_weights_once(
    reads: Mock, caplog: LogCaptureFixture
) -> None:
    """Lightning keeps the mode of a loaded model, which is evaluation."""
    model = build_model()
    model(IMAGES)
    reads.reset_mock()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        loss = model(IMAGES, labels=IMAGE_LABELS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert reads.call_count == 1
    assert model.eval()(IMAGES).distance is None
    assert caplog.text.count("class statistics") == 1


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


def test_hidden_tokens_may_be_trained_and_others_may_not() -> None:
    model = build_model().adapt(num_register_tokens=2)
    expected = model(IMAGES).distance
    model.vitcls.embeddings.register_tokens.normal_()
    assert_close(model(IMAGES).distance, expected)
    model.train().vitcls.fade_in.progress[1] = model.vitcls.fade_in.FULL // 2
    model.eval()
    assert model(IMAGES).distance is None
    assert model.adapt(num_register_tokens=0).class_distance is None


class Sharded(nn.Parameter):
    """A weight whose numbers are not all in this process, as in FSDP2."""


def test_weights_that_cannot_be_read_have_no_distance() -> None:
    model = build_model()
    assert model(IMAGES).distance is not None
    layer = model.vitcls.layers[0].mlp.fc1
    layer.weight = Sharded(layer.weight.detach().clone())
    assert model(IMAGES).distance is None


def test_weights_are_read_once_after_training(reads: Mock) -> None:
    model = build_model()
    model(IMAGES)
    reads.reset_mock()
    model.train()
    model.vitcls.layernorm.weight.data.mul_(1.5)  # without a version counter
    model.eval()
    for _ in range(3):
        assert model(IMAGES).distance is None
    assert reads.call_count == 1


def test_large_sums_of_weights_have_their_digits() -> None:
    model = build_model()
    statistics = fit_statistics(model)
    for weight in model.vitcls.layers.parameters():
        weight.abs_().add_(1)
    statistics.set_in_model(model)
    assert model(IMAGES).distance is not None
    assert model.class_distance.fingerprint.max() > 2**32
