"""Effects of special tokens: predictions with a token replaced by its mean, compared with direct computations."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import (
    LAYOUTS,
    build_images,
    build_tiny_config,
    each_layout,
    get_largest_difference,
    raises_one_line,
)
from helpers.varied_models import center_logits, collect_findings
from torch import nn

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification, ViTCLSModel
from modeling_vitcls.analysis.ablation import (
    NUM_NULL_DRAWS,
    Ablation,
    collect_mean_states,
    compute_ablation_effects,
    compute_ablations,
    compute_null_limit,
    get_token_keys,
    redraw_tokens,
    replace_by_means,
    sample_patch_sets,
)
from modeling_vitcls.analysis.effects import AblationEffect, FeatureEffect, compute_effect
from modeling_vitcls.analysis.image_report import build_image_predictions
from modeling_vitcls.analysis.model_outputs import (
    Predictions,
    collect_outputs,
    collect_predictions,
    get_predicted_labels,
)
from modeling_vitcls.attention_masks_vitcls import build_attention_mask
from modeling_vitcls.conversion.random_weights import randomize_weights
from modeling_vitcls.heads_vitcls import IGNORED_LABEL


PIXELS = build_images(6)
LABELS = 12  # many labels, so that predictions differ


class Batches:
    """Images in two batches, with or without labels."""

    def __init__(self, right: torch.Tensor | None = None, pixels: torch.Tensor = PIXELS) -> None:
        self.pixels = pixels
        self.right = right

    def __call__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Return all images in one batch."""
        for part in (slice(0, 4), slice(4, None)):
            yield self.pixels[part], None if self.right is None else self.right[part]


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(num_labels=LABELS, num_hidden_layers=3, **fields)
    return center_logits(ViTCLSForImageClassification(config), PIXELS)


def compute_mean_states(model: Any) -> torch.Tensor:
    """Return the mean states over the images, [L + 1, S, D]."""
    return collect_findings(model, PIXELS).mean_states


@torch.no_grad()
def compute_logits(model: Any, place: int | list[int] | None, means: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, labels], computed layer by layer; one or more tokens are replaced by their means in the
    embeddings and after each layer."""
    encoder = model.vitcls
    grid = encoder.embeddings.patch_embeddings.get_grid_size(PIXELS)
    states = encoder.embeddings(PIXELS, grid)
    if place is not None:
        states[:, place] = means[0, place]
    mask = build_attention_mask(model.config, states, None, grid, encoder.relative_position_bias, encoder.gates)
    position_embeddings = None if encoder.rotary_positions is None else encoder.rotary_positions(grid, states)
    for layer, mean in zip(encoder.layers, means[1:], strict=True):
        states = layer(states, mask, position_embeddings)
        if place is not None:
            states[:, place] = mean[place]
    sequence = encoder.layernorm(states)
    logits = model.classifier(encoder.pooler(sequence))
    if model.distillation_classifier is None:
        return logits
    distilled = sequence[:, model.config.token_layout.distillation].mean(dim=1)
    return (logits + model.distillation_classifier(distilled)) / 2


@each_layout
def test_each_token_is_held_at_its_mean(layout: dict[str, Any]) -> None:
    """Heads read few tokens, and the last layer computes only these tokens: this has no effect."""
    model = build_classifier(**layout)
    means = compute_mean_states(model)
    before = compute_logits(model, None, means)
    assert get_largest_difference(collect_predictions(model, Batches()).logits, before) <= 1e-5
    found = compute_ablation_effects(model, Batches(), means)
    assert list(found) == get_token_keys(model.config.token_layout)
    scale = (before - before.mean(dim=0)).square().mean().sqrt()
    for place, name in enumerate(found):
        after = compute_logits(model, place, means)
        with replace_by_means(model, [place], means[:, [place]]):
            assert get_largest_difference(collect_predictions(model, Batches()).logits, after) <= 1e-5
        change = ((after - before).square().mean().sqrt() / scale).item()
        assert found[name].logit_change == pytest.approx(change, abs=1e-5)
        changed = (after.argmax(-1) != before.argmax(-1)).float().mean().item()
        assert found[name].changed_answers == pytest.approx(changed)
        assert found[name].accuracy_change is None


@pytest.mark.parametrize(
    "fields",
    [
        {"position_embedding_type": "rope_2d", "mlp_type": "swiglu"},
        {"cls_scopes": ["image", [2, 2, 0, 1]]},
        {"gated_tokens": {"registers": 1}, "layer_type": "parallel"},
        {"attention_type": "differential", "layer_type": "post"},
    ],
    ids=lambda fields: ", ".join(fields),
)
def test_every_kind_of_layers(fields: dict[str, Any]) -> None:
    model = build_classifier(num_cls_tokens=2, num_register_tokens=2, **fields)
    means = compute_mean_states(model)
    for place in range(4):
        with replace_by_means(model, [place], means[:, [place]]):
            found = collect_predictions(model, Batches()).logits
        assert get_largest_difference(found, compute_logits(model, place, means)) <= 1e-5


def test_holding_the_only_token_of_the_head() -> None:
    """All images have the same prediction."""
    model = build_classifier(num_register_tokens=2)
    means = compute_mean_states(model)
    own = collect_predictions(model, Batches()).predicted.squeeze(1)
    right = own.clone()
    right[0] = (right[0] + 1) % LABELS
    with replace_by_means(model, [0], means[:, [0]]):
        logits = collect_predictions(model, Batches()).logits
    assert get_largest_difference(logits, logits[:1].expand_as(logits)) <= 1e-5
    found = compute_ablation_effects(model, Batches(right), means)["cls[0]"]
    answer = logits[0].argmax()
    assert len(own.unique()) > 1
    assert found.changed_answers == pytest.approx((own != answer).float().mean().item())
    assert found.accuracy_change == pytest.approx((right == answer).float().mean().item() - 5 / 6)


def test_a_token_without_attention() -> None:
    model = build_classifier(num_register_tokens=2, gated_tokens={"registers": 2})
    means = compute_mean_states(model)
    with torch.no_grad():
        model.vitcls.gates.gates.copy_(torch.tensor([0.0, model.vitcls.gates.OPEN]))
    found = compute_ablation_effects(model, Batches(torch.arange(6)), means)
    assert found["registers[0]"].logit_change <= 1e-5
    assert found["registers[0]"].changed_answers == found["registers[0]"].accuracy_change == 0
    assert found["registers[1]"].logit_change > 1e-2


def test_each_task_has_its_predictions() -> None:
    """The tasks are in alphabetical order, age before species. Each has its own CLS token."""
    config = build_tiny_config(num_cls_tokens=2, tasks={"species": 9, "age": 7})
    model = center_logits(ViTCLSForMultiTaskClassification(config), PIXELS)
    with torch.no_grad():
        logits = model(PIXELS).logits
    found = collect_predictions(model, Batches())
    assert torch.equal(found.predicted, torch.stack([logits["age"].argmax(-1), logits["species"].argmax(-1)], dim=1))
    right = found.predicted.clone()
    right[:3, 0] = IGNORED_LABEL
    right[3, 0] = (right[3, 0] + 1) % 7
    right[:5, 1] = IGNORED_LABEL
    assert collect_predictions(model, Batches(right)).compute_accuracy() == pytest.approx(3 / 4)
    effects = compute_ablation_effects(model, Batches(right), compute_mean_states(model))
    for name, place in {"cls[0]": 0, "cls[1]": 1}.items():
        with replace_by_means(model, [place], compute_mean_states(model)[:, [place]]):
            after = collect_predictions(model, Batches(right))
        assert len(after.predicted[:, place].unique()) == 1 < len(found.predicted[:, place].unique())
        changed = (after.predicted != found.predicted).any(dim=1).float().mean().item()
        assert effects[name].changed_answers == pytest.approx(changed)
        assert effects[name].accuracy_change == pytest.approx(after.compute_accuracy() - 3 / 4)


def test_each_of_several_labels_is_a_prediction() -> None:
    model = build_classifier(problem_type="multi_label_classification")
    with torch.no_grad():
        expected = (model(PIXELS).logits > 0).long()
    found = collect_predictions(model, Batches())
    assert torch.equal(found.predicted, expected) and 0 < expected.float().mean() < 1
    right = expected.float()
    right[0, :3] = 1 - right[0, :3]
    right[1] = IGNORED_LABEL
    assert collect_predictions(model, Batches(right)).compute_accuracy() == pytest.approx(1 - 3 / (5 * LABELS))


def test_unknown_labels() -> None:
    model = build_classifier()
    own = collect_predictions(model, Batches()).predicted.squeeze(1)
    assert collect_predictions(model, Batches()).compute_accuracy() is None
    assert collect_predictions(model, Batches(torch.full((6,), IGNORED_LABEL))).compute_accuracy() is None
    assert collect_predictions(model, Batches(own)).compute_accuracy() == 1  # one label for each image
    assert collect_predictions(model, Batches(own[:, None])).compute_accuracy() == 1
    wrong = (own + 1) % LABELS
    partly = torch.where(
        torch.arange(6) < 4, torch.tensor(IGNORED_LABEL), torch.where(torch.arange(6) < 5, own, wrong)
    )
    assert collect_predictions(model, Batches(partly)).compute_accuracy() == 0.5
    found = compute_ablation_effects(model, Batches(torch.full((6,), IGNORED_LABEL)), compute_mean_states(model))
    assert found["cls[0]"].accuracy_change is None

    def first_batch_only() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        yield PIXELS[:4], own[:4]
        yield PIXELS[4:], None

    assert collect_predictions(model, first_batch_only).compute_accuracy() is None


def test_known_predictions_are_not_computed_again() -> None:
    model = build_classifier(num_register_tokens=1)
    means = compute_mean_states(model)
    passes = []
    with model.register_forward_hook(lambda *_: passes.append(1)):
        before = collect_predictions(model, Batches())
        found = compute_ablation_effects(model, Batches(), means, before)
    assert len(passes) == 2 + 2 * 2  # two batches, once unchanged and once for each token
    assert found == compute_ablation_effects(model, Batches(), means)


def test_chance_is_the_most_frequent_label() -> None:
    def compute_effects(chosen: list[list[int]], right: list[list[int]]) -> Predictions:
        return Predictions(torch.zeros(len(chosen), 2), torch.tensor(chosen), torch.tensor(right))

    ten = [[0]] * 6 + [[1]] * 3 + [[IGNORED_LABEL]]
    constant = compute_effects([[0]] * 10, ten)
    assert constant.compute_majority_accuracy() == pytest.approx(constant.compute_accuracy()) == pytest.approx(6 / 9)
    assert constant.is_better_than_chance() is False
    # 9 of 9, where chance is 6 / 9 ± 0.31
    assert compute_effects([[0]] * 6 + [[1]] * 4, ten).is_better_than_chance() is True
    assert compute_effects([[0]] * 7 + [[1]] * 3, ten).is_better_than_chance() is False  # 8 of 9
    tasks = compute_effects([[0, 1]] * 4, [[0, 1], [0, 1], [1, IGNORED_LABEL], [0, 0]])
    assert tasks.compute_majority_accuracy() == pytest.approx((3 + 2) / 7)
    assert compute_effects([[0]], [[IGNORED_LABEL]]).is_better_than_chance() is None
    assert Predictions(torch.zeros(1, 2), torch.tensor([[0]]), None).compute_majority_accuracy() is None


def test_one_label_is_predicted_from_one_half() -> None:
    """As in predictions, a label holds from a probability of 0.5, for any problem type."""
    config = build_tiny_config(num_labels=1)
    logits = torch.tensor([[-0.1], [0.0], [3.0]])
    assert get_predicted_labels([logits], config).tolist() == [[0], [1], [1]]
    shown = [len(build_image_predictions(one[None], config)[0].labels) for one in logits]
    assert shown == [0, 1, 1]
    model = center_logits(ViTCLSForImageClassification(config), PIXELS)
    assert 0 < collect_predictions(model, Batches()).predicted.float().mean() < 1


def test_the_effect_on_one_image_is_none() -> None:
    model = build_classifier(num_register_tokens=1)
    means = collect_findings(model, PIXELS[:1]).mean_states

    def batches() -> Iterator[tuple[torch.Tensor, None]]:
        yield PIXELS[:1], None

    for found in compute_ablation_effects(model, batches, means).values():
        assert found.changed_answers == 0 and found.logit_change < 1e-3


def test_the_model_is_not_changed() -> None:
    model = build_classifier(num_register_tokens=1, hidden_dropout_prob=0.5)
    means = compute_mean_states(model)
    expected = compute_ablation_effects(model, Batches(), means)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    model.vitcls.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    assert compute_ablation_effects(model, Batches(), means) == expected
    with raises_one_line("broken"), replace_by_means(model, [0], means[:, [0]]):
        raise ValueError("broken")
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert not any(hook.__module__.startswith("modeling_vitcls") for hook in count_hooks(model))


def count_hooks(model: nn.Module) -> list[Any]:
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


@pytest.mark.slow
@pytest.mark.integration
def test_compiled_models() -> None:
    model = build_classifier(num_register_tokens=1)
    means = compute_mean_states(model)
    expected = compute_ablation_effects(model, Batches(), means)
    model.compile(backend="eager")
    model(PIXELS)  # compiled without hooks
    found = compute_ablation_effects(model, Batches(), means)
    for name, one in found.items():
        assert one.logit_change == pytest.approx(expected[name].logit_change, rel=1e-3)
    assert found["cls[0]"].logit_change > 0.1


def test_unsupported_models_are_errors() -> None:
    encoder = randomize_weights(ViTCLSModel(build_tiny_config(**LAYOUTS["three_cls"])))
    with raises_one_line("Use a model with a classifier"):
        compute_ablation_effects(encoder, Batches(), compute_mean_states(encoder))
    model = build_classifier()
    with raises_one_line("no images"):
        collect_predictions(model, lambda: iter(()))
    with raises_one_line("[4, 2]", "[4, 1]"):
        collect_predictions(model, Batches(torch.zeros(6, 2)))
    with raises_one_line("[2, 2]", "[4, 1]"):
        collect_predictions(model, lambda: [(PIXELS[:4], torch.zeros(2, 2))])
    several = build_classifier(problem_type="multi_label_classification")
    with raises_one_line("[4]", f"[4, {LABELS}]"):
        collect_predictions(several, Batches(torch.zeros(6)))


# Null distributions --------------------------------------------------------------------------------------------------


def test_limits_of_null_distributions() -> None:
    """The limit is the upper bound of the prediction interval (2.5 + 3.182 * 1.291 * 1.25 ** 0.5), or the maximum."""
    assert compute_null_limit([1.0, 2.0, 3.0, 4.0]) == pytest.approx(7.093, abs=1e-3)
    assert compute_null_limit([1.0, 2.0]) == pytest.approx(12.504, abs=1e-3)  # 1.5 + 12.71 * 0.7071 * 1.5 ** 0.5
    assert compute_null_limit([0.2, 0.2]) == compute_null_limit([0.2]) == 0.2
    assert compute_null_limit([1e-5] * 8) == compute_null_limit([1e-5]) == 1e-3
    effect = FeatureEffect({"cls": 0.5}, None, 20, (0.4, 0.6))
    ablation = Ablation(effect, 0.5, [0.2, 0.2], [0.1, 0.1])
    assert ablation.null_interval == (0.1, 0.2) and ablation.is_beyond_null
    assert Ablation(effect, 0.5, [0.1, 0.1], [0.2, 0.2]).null_interval == (0.1, 0.2)
    assert Ablation(effect, 0.5, [0.3, 0.3]).null_interval == (0.3, 0.3)
    assert not Ablation(effect, 0.2, [0.2, 0.2]).is_beyond_null  # the effect on the same images is decisive
    assert not Ablation(effect, 0.5).is_beyond_null and Ablation(effect, 0.5).null_interval is None
    assert not Ablation(AblationEffect(0.0, 0.5, None, 20), 0.5, [0.2, 0.2]).is_beyond_null  # no prediction changes
    rounding = FeatureEffect({"cls": 0.0, "patches": 9e-4}, None, 20, (0.0, 1e-3))
    assert rounding.size == 9e-4 and not Ablation(rounding, 0.5, [0.2, 0.2]).is_beyond_null


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_patches_of_the_null_distribution_are_ablated_like_tokens(pooling: str) -> None:
    """Compare with each of the 16 patches, ablated with the means of its own states."""
    model = build_classifier(num_register_tokens=1, pooling=pooling)
    with torch.no_grad():
        means = torch.stack(model(PIXELS, output_hidden_states=True).hidden_states, dim=1).mean(dim=0)  # [L + 1, N, D]
    ablations = compute_ablations(model, Batches(), means[:, :2])
    before = collect_predictions(model, Batches())
    for kind in ablations:
        expected = []
        for place in range(2, 18):
            mask = torch.ones(6, 18, dtype=torch.long)
            mask[:, place] = 0
            with torch.no_grad():
                hidden = model(PIXELS, attention_mask=mask).logits
            logits = compute_logits(model, place, means) if kind == "information" else hidden
            expected.append(compute_effect(before, Predictions(logits, before.predicted, None)).size)
        found = torch.tensor(ablations[kind]["registers[0]"].patch_effects)
        distances = (found[:, None] - torch.tensor(expected)).abs()
        assert len(set(distances.argmin(dim=1).tolist())) == NUM_NULL_DRAWS  # distinct patches
        assert distances.amin(dim=1).max() <= 1e-4
        assert ablations[kind]["cls[0]"].patch_effects == found.tolist()  # one patch is as many as one token


def test_random_tokens_of_the_null_distribution_are_compared_with_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The effect of ablating redrawn tokens is measured from the outputs with these redrawn tokens. The draws are
    repeated in the documented order: patches, the CLS token, the registers in turn, and both registers together."""
    num_draws = 4
    monkeypatch.setattr("modeling_vitcls.analysis.ablation.NUM_NULL_DRAWS", num_draws)
    model = build_classifier(num_register_tokens=2)
    ablations = compute_ablations(model, Batches(), compute_mean_states(model))
    before = collect_predictions(model, Batches())
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2):
        sample_patch_sets(torch.arange(3, 19), size, generator)
    draws = {"cls": [[0]] * (num_draws // 2), "single": [[1], [2]] * (num_draws // 2)}
    draws["both"] = [[1, 2]] * num_draws
    effects: dict[str, dict[str, list[float]]] = {}
    for name, sets in draws.items():
        sizes = effects[name] = {"redraw": [], "information": [], "presence": []}
        for indices in sets:
            with redraw_tokens(model, indices, generator), torch.no_grad():
                own = model(PIXELS, output_hidden_states=True)
                redrawn = Predictions(own.logits, before.predicted, None)
                means = torch.stack(own.hidden_states, dim=1).mean(dim=0)
                ablated = Predictions(compute_logits(model, indices, means), before.predicted, None)
            sizes["redraw"].append(compute_effect(before, redrawn).size)
            sizes["information"].append(compute_effect(redrawn, ablated).size)
            sizes["presence"].append(compute_effect(redrawn, collect_outputs(model, Batches(), indices)).size)
    for kind in ablations:
        for key, name in {
            "cls[0]": "cls",
            "registers[0]": "single",
            "registers[1]": "single",
            "registers": "both",
        }.items():
            found = ablations[kind][key]
            assert found.redraw_effect == pytest.approx(np.mean(effects[name]["redraw"]), rel=1e-3)
            assert found.redrawn_effects == pytest.approx([] if name == "cls" else effects[name][kind], rel=1e-3)


def test_random_sets_of_patches() -> None:
    patches = torch.arange(4, 10)
    singles = sample_patch_sets(patches, 1, torch.Generator().manual_seed(0))
    assert sorted(singles) == [[index] for index in range(4, 10)]  # fewer than NUM_NULL_DRAWS, each of them once
    pairs = sample_patch_sets(patches, 2, torch.Generator().manual_seed(0))
    assert len(pairs) == NUM_NULL_DRAWS and len(set(map(tuple, pairs))) > 1
    assert all(len(set(pair)) == 2 and set(pair) <= set(range(4, 10)) and pair == sorted(pair) for pair in pairs)
    many = sample_patch_sets(torch.arange(100), 1, torch.Generator().manual_seed(0))
    assert len(set(map(tuple, many))) == NUM_NULL_DRAWS and max(many) > [NUM_NULL_DRAWS]  # not the first patches


def test_random_tokens_have_equal_norms() -> None:
    """Their states are computed with the random embedding, which is the same for all images."""
    model = build_classifier(num_register_tokens=2)
    own = compute_mean_states(model)
    with redraw_tokens(model, [1, 2], torch.Generator().manual_seed(0)):
        means, outputs = collect_mean_states(model, Batches(), [0, 1, 2])
    assert torch.allclose(means[0].norm(dim=-1).float(), own[0].norm(dim=-1), rtol=1e-5)
    assert torch.allclose(means[0, 0].float(), own[0, 0], atol=1e-5)
    assert get_largest_difference(means[0, 1:].float(), own[0, 1:]) > 0.1
    assert get_largest_difference(outputs.logits, collect_predictions(model, Batches()).logits) > 1e-2


@pytest.mark.parametrize(
    "layout", [{"num_register_tokens": 3, "num_distillation_tokens": 1}, {"num_cls_tokens": 3}], ids=str
)
def test_effects_are_compared_with_null_distributions(layout: dict[str, Any]) -> None:
    """Check random patches, and random tokens that the head does not use; for individual tokens and groups."""
    read_keys = ("cls[0]", "cls", "distillation[0]")
    model = build_classifier(**layout)
    means = compute_mean_states(model)
    found = compute_ablations(model, Batches(), means)
    single = compute_ablation_effects(model, Batches(), means)
    group = "registers" if "num_register_tokens" in layout else "cls"
    places = list(range(*getattr(model.config.token_layout, group).indices(5)))
    logits = compute_logits(model, places, means)
    together = compute_effect(collect_outputs(model, Batches()), Predictions(logits, logits.argmax(-1)[:, None], None))
    assert found["information"][group].effect.logit_change == pytest.approx(together.logit_change, rel=1e-4)
    for kind in ("information", "presence"):
        assert list(found[kind]) == [*get_token_keys(model.config.token_layout), group]
        for key, ablation in found[kind].items():
            assert len(ablation.patch_effects) == NUM_NULL_DRAWS and ablation.redraw_effect > 0
            assert len(ablation.redrawn_effects) == (0 if key in read_keys else NUM_NULL_DRAWS)
            assert ablation.null_interval[1] >= max(*ablation.patch_effects, *ablation.redrawn_effects)
            assert ablation.is_beyond_null == (
                ablation.effect_on_null_images > ablation.null_interval[1] and ablation.effect.changed_answers > 0
            )
        others = [f"{group}[1]", f"{group}[2]"]
        assert found[kind][others[0]].redrawn_effects == found[kind][others[1]].redrawn_effects  # they take turns
        assert found[kind][others[0]].patch_effects != found[kind][group].patch_effects  # one and three patches
    for key, effect in single.items():
        held = found["information"][key].effect  # one image is sufficient if the head uses no other token
        assert held.logit_change == pytest.approx(effect.logit_change, rel=1e-4)
        assert held.changed_answers == effect.changed_answers
        hidden = collect_outputs(model, Batches(), [get_token_keys(model.config.token_layout).index(key)])
        assert found["presence"][key].effect == compute_effect(collect_outputs(model, Batches()), hidden)


def test_null_effects_use_the_same_images() -> None:
    model = build_classifier(num_register_tokens=1)
    means, before = compute_mean_states(model), collect_predictions(model, Batches())

    def sample() -> Iterator[tuple[torch.Tensor, None]]:
        yield PIXELS[[1, 4]], None

    ablations = compute_ablations(model, Batches(), means, before, (sample, [1, 4]))
    with replace_by_means(model, [1], means[:, [1]]):
        after = {"information": collect_predictions(model, sample)}
    after["presence"] = collect_outputs(model, sample, [1])
    for kind, outputs in after.items():
        ablation, size = ablations[kind]["registers[0]"], compute_effect(before.select([1, 4]), outputs).size
        assert ablation.effect_on_null_images == pytest.approx(size, rel=1e-4)
        assert ablation.effect.num_images == 6


def test_patches_of_the_null_distribution_are_in_all_images() -> None:
    """The images have 16 and 64 patches."""
    model, pixels = build_classifier(), (PIXELS[:2], build_images(2, 64, 64))
    means = collect_findings(model, *pixels).mean_states
    ablations = compute_ablations(model, lambda: [(batch, None) for batch in pixels], means)
    assert len(ablations["information"]["cls[0]"].patch_effects) == NUM_NULL_DRAWS


def test_an_encoder_outputs_all_cls_tokens() -> None:
    """The mean also replaces the output of the last layer, and redrawn CLS tokens always have an effect."""
    encoder = randomize_weights(ViTCLSModel(build_tiny_config(num_cls_tokens=2, num_register_tokens=1)))
    means = compute_mean_states(encoder)
    with replace_by_means(encoder, [1], means[:, [1]]):
        tokens = torch.stack(collect_outputs(encoder, Batches()).vectors["cls"])  # [images, 2, D]
    spread = (tokens - tokens[:1]).abs().amax(dim=(0, 2))
    assert spread[1] <= 1e-6 < 1e-2 < spread[0]
    ablations = compute_ablations(encoder, Batches(), means)["information"]
    num_redrawn = {key: len(ablation.redrawn_effects) for key, ablation in ablations.items()}
    assert num_redrawn == {"cls[0]": 0, "cls[1]": 0, "registers[0]": NUM_NULL_DRAWS, "cls": 0}


@pytest.mark.parametrize("pixels", [PIXELS, build_images(6, 24, 40)], ids=["native size", "rectangle"])
def test_hidden_tokens_are_read_by_no_token(pixels: torch.Tensor) -> None:
    """The values of hidden tokens have no effect; all other tokens read the same as without them."""
    model, batches = build_classifier(num_register_tokens=2), Batches(pixels=pixels)
    hidden = collect_outputs(model, batches, [1, 2])
    with torch.no_grad():
        model.vitcls.embeddings.register_tokens.normal_()
    assert get_largest_difference(collect_outputs(model, batches, [1, 2]).logits, hidden.logits) <= 1e-5
    assert get_largest_difference(collect_outputs(model, batches, [1]).logits, hidden.logits) > 1e-3
