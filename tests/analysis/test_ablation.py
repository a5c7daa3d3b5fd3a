"""Effects of special tokens, compared with direct computations."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tiny_models import (
    LAYOUTS,
    build_images,
    build_tiny_config,
    get_largest_difference,
    randomize,
)
from helpers.varied_models import center_logits
from scipy import stats

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from modeling_vitcls.analysis.ablation import (
    MIN_CHANGE,
    NUM_NULL_DRAWS,
    Predictions,
    collect_mean_states,
    collect_outputs,
    compute_ablations,
    compute_effect,
    count_images,
    get_token_keys,
    redraw_tokens,
    replace_by_means,
)
from modeling_vitcls.analysis.token_use import TokenUse
from modeling_vitcls.inference.image_pass import ImageBatch
from modeling_vitcls.inference.intervals import compute_bootstrap_interval
from modeling_vitcls.model.attention_masks_vitcls import build_attention_mask
from modeling_vitcls.model.heads_vitcls import IGNORED_LABEL


PIXELS = build_images(6)
LABELS = 12  # many labels, so that predictions differ


def build_batches(labels: torch.Tensor) -> list[ImageBatch]:
    """Return the images in two batches, with labels."""
    return [ImageBatch(PIXELS[part], labels[part]) for part in (slice(0, 4), slice(4, None))]


UNLABELED = [ImageBatch(PIXELS[:4]), ImageBatch(PIXELS[4:])]


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(num_labels=LABELS, num_hidden_layers=3, **fields)
    return center_logits(ViTCLSForImageClassification(config), PIXELS).eval()


def collect_means(model: Any) -> torch.Tensor:
    """Return the mean states of the special tokens, [L + 1, S, D]."""
    indices = range(model.config.token_layout.num_prefix_tokens)
    return collect_mean_states(model, UNLABELED, indices)[0]


@torch.no_grad()
def compute_logits(model: Any, index: int | None, means: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, labels], computed layer by layer.

    The token is replaced by its means in the embeddings and after each layer.
    """
    encoder = model.vitcls
    grid = encoder.embeddings.patch_embeddings.get_grid_size(PIXELS)
    states = encoder.embeddings(PIXELS, grid, None)
    if index is not None:
        states[:, index] = means[0, index].float()
    mask = build_attention_mask(
        model.config, states, None, grid, encoder.relative_position_bias, encoder.gates
    )
    position_embeddings = (
        None if encoder.rotary_positions is None else encoder.rotary_positions(grid, states)
    )
    for layer, mean in zip(encoder.layers, means[1:], strict=True):
        states = layer(states, mask, position_embeddings)
        if index is not None:
            states[:, index] = mean[index].float()
    sequence = encoder.layernorm(states)
    logits = model.classifier(encoder.pooler(sequence))
    if model.distillation_classifier is None:
        return logits
    distilled = sequence[:, model.config.token_layout.distillation].mean(dim=1)
    return (logits + model.distillation_classifier(distilled)) / 2


@pytest.mark.parametrize(
    "fields",
    [
        *(LAYOUTS[name] for name in ("one_cls", "no_cls", "several_of_each")),
        {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]},
        {"attention_type": "differential", "layer_type": "post", "num_register_tokens": 2},
    ],
    ids=str,
)
def test_replacing_a_token_by_its_mean_equals_a_computation_layer_by_layer(
    fields: dict[str, Any],
) -> None:
    """Effects are the changes of these outputs."""
    model = build_classifier(**fields)
    means = collect_means(model)
    found = compute_ablations(model, TokenUse(model.config), UNLABELED)
    before = compute_logits(model, None, means)
    keys = get_token_keys(model.config.token_layout)

    assert [key for key in found if "[" in key] == keys
    scale = (before - before.mean(dim=0)).square().mean().sqrt()
    for index, key in enumerate(keys):
        after = compute_logits(model, index, means)
        with replace_by_means(model, TokenUse(model.config), [index], means[:, [index]]):
            assert (
                get_largest_difference(collect_outputs(model, UNLABELED)[""].logits, after) <= 1e-5
            )
        change = ((after - before).square().mean().sqrt() / scale).item()
        assert found[key][""].size == pytest.approx(change, abs=1e-5)
        changed = (after.argmax(-1) != before.argmax(-1)).float().mean().item()
        assert found[key][""].changed == pytest.approx(changed)


def test_tokens_are_replaced_together_if_a_head_uses_only_one_of_them() -> None:
    """The classifier then sees the mean of the CLS token, which is the same for all images."""
    model = build_classifier(num_register_tokens=2)
    means = collect_means(model)
    with torch.no_grad(), replace_by_means(model, TokenUse(model.config), [0, 1], means[:, [0, 1]]):
        found = model(PIXELS).logits
    expected = model.classifier(model.vitcls.layernorm(means[-1, 0].float()))
    assert get_largest_difference(found, expected.expand_as(found)) <= 1e-5
    assert (means.dtype, means.requires_grad) == (torch.float64, False)


def test_null_distributions_are_effects_of_redrawn_tokens() -> None:
    """Redrawn tokens are ablated on the same images.

    The draws cycle through the registers.
    """
    model = build_classifier(num_register_tokens=3)
    outputs = collect_outputs(model, UNLABELED)[""]
    labels = outputs.predicted

    found = compute_ablations(model, TokenUse(model.config), build_batches(labels))
    # the model is unchanged
    assert torch.equal(collect_outputs(model, UNLABELED)[""].logits, outputs.logits)

    generator = torch.Generator().manual_seed(0)
    embeddings = []
    model.vitcls.layers[0].register_forward_pre_hook(lambda layer, args: embeddings.append(args[0]))
    sizes = []
    drops = []
    for draw in range(NUM_NULL_DRAWS):
        index = 1 + draw % 3
        with redraw_tokens(model, [index], generator):
            means, redrawn = collect_mean_states(model, build_batches(labels), [index])
            with replace_by_means(model, TokenUse(model.config), [index], means):
                replaced = collect_outputs(model, UNLABELED)[""]
        sizes.append(compute_effect(redrawn[""], replaced).size)
        drops.append((redrawn[""].predicted != labels).float()[:, 0])
    assert torch.stack(drops).any()

    old, new = (model.vitcls.embeddings.register_tokens[0, 0], embeddings[0][0, 1])
    assert new.norm().item() == pytest.approx(old.norm().item(), rel=1e-5)
    assert torch.nn.functional.cosine_similarity(new, old, dim=0).item() < 0.9

    assert found["cls[0]"][""].null_sizes == ()  # the head reads the token
    assert len(found["registers"][""].null_sizes) == NUM_NULL_DRAWS
    for index in range(3):
        effect = found[f"registers[{index}]"][""]
        drop = compute_bootstrap_interval(torch.stack(drops[index::3]).mean(dim=0).tolist())
        assert effect.null_sizes == pytest.approx(sizes, rel=1e-4)
        assert effect.redraw_drop == drop


# Effects in numbers -------------------------------------------------------------------------------


def test_an_effect_has_its_size_its_intervals_and_the_change_of_accuracy() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    before = Predictions(logits, torch.tensor([[0], [1]]), torch.tensor([[0], [0]]))
    after = Predictions(
        logits + torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.tensor([[0], [0]]), before.labels
    )

    found = compute_effect(before, after)
    assert (found.changed, found.size, found.accuracy_change, found.num_images) == (
        0.5,
        2.0,
        0.5,
        2,
    )
    assert (found.improvement, found.is_better_than_chance) == (0.5, False)
    assert found.changed_interval == pytest.approx((0.0945, 0.9055), abs=1e-4)  # Wilson
    assert found.interval == pytest.approx((0.0, 8**0.5))
    assert found.is_measurable
    assert not found.is_beyond_limit

    same = compute_effect(before, before)
    assert (same.changed, same.size, same.is_measurable) == (0.0, 0.0, False)
    constant = Predictions(torch.full((2, 2), 100.0), before.predicted, before.labels)
    rounding = replace(constant, logits=constant.logits + 1e-5)
    assert compute_effect(constant, rounding).size < MIN_CHANGE


def test_improvements_have_the_p_value_of_mcnemar() -> None:
    """7 images become correct and 2 wrong; unknown labels do not count."""
    labels = torch.tensor([[0]] * 20 + [[IGNORED_LABEL]] * 3)
    before = torch.tensor([[1]] * 7 + [[0]] * 13 + [[1]] * 3)
    after = torch.tensor([[0]] * 7 + [[1]] * 2 + [[0]] * 11 + [[0]] * 3)
    logits = torch.zeros(23, 2)
    found = compute_effect(Predictions(logits, before, labels), Predictions(logits, after, labels))
    assert found.improvement == pytest.approx(stats.binomtest(7, 9, alternative="greater").pvalue)
    assert (found.accuracy_change, found.size) == (pytest.approx(5 / 20), 0)


# Outputs ------------------------------------------------------------------------------------------


def test_each_task_has_its_own_output() -> None:
    """The tasks are in alphabetical order. Each has its own labels and accuracy."""
    config = build_tiny_config(
        num_cls_tokens=2, num_register_tokens=1, tasks={"species": 9, "age": 7}
    )
    model = center_logits(ViTCLSForMultiTaskClassification(config), PIXELS).eval()
    with torch.no_grad():
        logits = model(PIXELS).logits

    found = collect_outputs(model, UNLABELED)
    assert list(found) == ["age", "species"]
    for task, predictions in found.items():
        assert torch.equal(predictions.predicted, logits[task].argmax(-1, keepdim=True))

    labels = torch.cat([predictions.predicted for predictions in found.values()], dim=1)
    labels[:3, 0] = IGNORED_LABEL
    labels[3, 0] = (labels[3, 0] + 1) % 7

    known = collect_outputs(model, build_batches(labels))
    assert known["age"].compute_accuracy() == pytest.approx(2 / 3)
    assert known["species"].compute_accuracy() == 1

    effects = compute_ablations(model, TokenUse(model.config), build_batches(labels))
    drops = {
        task: effect.redraw_drop is not None for task, effect in effects["registers[0]"].items()
    }
    assert drops == {"age": False, "species": True}
    assert effects["cls"]["age"].null_sizes == ()


def build_predictions(predicted: list[list[int]], labels: list[list[int]]) -> Predictions:
    return Predictions(
        torch.zeros(len(predicted), 2), torch.tensor(predicted), torch.tensor(labels)
    )


# Chance -------------------------------------------------------------------------------------------


def test_each_image_with_a_known_label_counts_as_one_image() -> None:
    """The standard errors are those of 16 and of 4 images, not those of 20 labels.

    Chance is 1/2. The standard error is 1/8 for the 16 images, and 1/4 for the 4 images with two
    known labels.
    """
    unknown = IGNORED_LABEL
    labels = (
        [[0, 0], [1, 1]] * 2
        + [[0, unknown], [1, unknown], [unknown, 0], [unknown, 1]] * 3
        + [[unknown] * 2]
    )
    for num_wrong, is_better in ((4, True), (5, False)):  # 0.8 and 0.75, compared with 0.5 + 2 / 8
        predicted = [[0 if label == unknown else label for label in row] for row in labels]
        for index in range(num_wrong):
            column = 0 if labels[4 + index][0] != unknown else 1
            predicted[4 + index][column] = 1 - predicted[4 + index][column]
        found = build_predictions(predicted, labels)
        assert found.compute_chance() == 0.5
        assert found.compute_accuracy() == pytest.approx(1 - num_wrong / 20)
        assert found.is_better_than_chance() is is_better


# Features -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "has_pooler"),
    [
        ({"num_cls_tokens": 2, "num_distillation_tokens": 1, "num_register_tokens": 1}, True),
        ({"num_register_tokens": 1}, False),
        ({"num_cls_tokens": 0, "pooling": "mean"}, False),
    ],
)
def test_features_are_the_tokens_and_the_pooled_vector(
    fields: dict[str, Any], has_pooler: bool
) -> None:
    model = randomize(
        ViTCLSModel(build_tiny_config(**{"pooling": "max"} | fields), add_pooling_layer=has_pooler)
    )
    batches = [build_images(2), build_images(1, seed=1)]
    found = collect_outputs(model, list(map(ImageBatch, batches)))
    with torch.no_grad():
        outputs = [model(batch) for batch in batches]
    tokens = {
        name: torch.cat([output.tokens[name] for output in outputs])
        for name in ("cls", "distillation", "patches")
    }
    tokens = {name: values for name, values in tokens.items() if values.shape[1]}
    maximum = tokens["patches"].amax(dim=1, keepdim=True)
    mean = tokens["patches"].mean(dim=1, keepdim=True)
    expected = tokens | ({"pooled": maximum} if has_pooler else {"mean of patches": mean})

    assert set(found) == set(expected)
    assert count_images(found) == 3
    for name, vectors in expected.items():
        assert torch.allclose(torch.stack(found[name].vectors), vectors, atol=1e-6), name
