"""Checks of maps, on models whose maps are constructed to be right or wrong.

Curves are compared with a loop over patches.
"""

import dataclasses
import re

import pytest
import torch
from helpers.digits_models import HELD_OUT, train_digits_model
from helpers.tiny_models import build_images, build_tiny_config
from helpers.varied_models import center_logits
from scipy import stats

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.analysis import map_checks
from modeling_vitcls.analysis.attribution import trace_attention
from modeling_vitcls.analysis.map_checks import (
    FRACTIONS,
    MapCheck,
    check_maps,
    copy_with_shuffled_weights,
    measure_curves,
)


def test_curves_replace_the_highest_patches_first() -> None:
    """Patches are replaced by the mean color one by one.

    Insertion keeps the patches that deletion replaces.
    """
    config = build_tiny_config(patch_size=[8, 16], hidden_dropout_prob=0.5)
    model = center_logits(ViTCLSForImageClassification(config).eval(), build_images())
    pixels = build_images(1, 32, 40)  # the last 8 columns are not a whole patch
    values = torch.randperm(8, generator=torch.Generator().manual_seed(0)).view(4, 2).float()
    deletion, insertion = measure_curves(model.train(), pixels, values, target=1)  # without dropout

    assert model.training
    model.eval()
    for index, fraction in enumerate(FRACTIONS):
        for curve, is_deletion in ((deletion, True), (insertion, False)):
            changed = pixels.clone()
            for patch in range(8):
                row, column = divmod(patch, 2)
                is_high = values[row, column] >= 8 - round(8 * fraction)
                if is_high == is_deletion:
                    area = (..., slice(8 * row, 8 * row + 8), slice(16 * column, 16 * column + 16))
                    changed[area] = pixels.mean(dim=(-2, -1), keepdim=True)
            with torch.no_grad():
                expected = model(changed).logits.softmax(dim=1)[0, 1]
            assert curve[index].item() == pytest.approx(expected.item(), abs=1e-5)


def test_shuffled_weights_have_the_same_values() -> None:
    model = center_logits(ViTCLSForImageClassification(build_tiny_config()), build_images())
    shuffled = copy_with_shuffled_weights(model, torch.Generator().manual_seed(0))
    weight, other = (each.vitcls.layers[0].mlp.fc1.weight for each in (model, shuffled))
    assert not torch.equal(weight, other)
    assert torch.equal(weight.flatten().sort().values, other.flatten().sort().values)


def test_checks_average_over_images() -> None:
    """Curves, correlations and a Wilcoxon test are computed separately for each image."""
    model = center_logits(
        ViTCLSForImageClassification(build_tiny_config(num_register_tokens=1)), build_images(6)
    )
    images = [image.unsqueeze(0) for image in build_images(6)]
    found = check_maps(model, images, seed=3)
    assert list(found) == ["attribution", "rollout"]

    generator = torch.Generator().manual_seed(3)
    shuffled = copy_with_shuffled_weights(model, generator)
    curves: dict[str, list[torch.Tensor]] = {"attribution": [], "rollout": [], "random": []}
    correlations: dict[str, list[float]] = {"attribution": [], "rollout": []}
    for pixels in images:
        with torch.no_grad():
            target = int(model(pixels).logits.argmax())
        maps = [
            {
                "attribution": trace_attention(each, pixels, needs_gradients=True)
                .compute_attribution(target)[0, 2:]
                .view(4, 4),
                "rollout": trace_attention(each, pixels).compute_rollout()[0, 0, 2:].view(4, 4),
            }
            for each in (model, shuffled)
        ]
        for name, values in (maps[0] | {"random": torch.rand(4, 4, generator=generator)}).items():
            curves[name].append(measure_curves(model, pixels, values, target))
        for name in correlations:
            correlations[name].append(
                stats.spearmanr(maps[0][name].flatten(), maps[1][name].flatten()).statistic
            )
    means = {name: torch.stack(values).mean(dim=0) for name, values in curves.items()}
    for name, check in found.items():
        assert check.num_images == 6
        assert check.deletion == pytest.approx(means[name][0].tolist(), abs=1e-5)
        assert check.insertion == pytest.approx(means[name][1].tolist(), abs=1e-5)
        assert check.random_deletion == pytest.approx(means["random"][0].tolist(), abs=1e-5)
        assert check.random_insertion == pytest.approx(means["random"][1].tolist(), abs=1e-5)
        assert check.weight_correlation == pytest.approx(sum(correlations[name]) / 6, abs=1e-5)
        gains = [
            (one[1] - one[0] - other[1] + other[0]).mean().item()
            for one, other in zip(curves[name], curves["random"], strict=True)
        ]
        assert check.p_value == pytest.approx(stats.wilcoxon(gains, alternative="greater").pvalue)


def test_a_map_is_faithful_below_the_limits_of_p_value_and_correlation() -> None:
    """The areas under the curves are 0.5, 0.8, 0.6 and 0.3."""
    curves = ([1.0, 0.8, 0.6, 0.4, 0.2, 0.0], [0.3, 0.9, 0.9, 0.9, 0.8, 0.7], [0.6] * 6, [0.3] * 6)
    check = MapCheck(
        9, curves[0], curves[2], curves[1], curves[3], weight_correlation=0.5, p_value=0.05
    )
    assert check.is_faithful

    numbers = re.findall(r"\d+\.\d+", check.describe("attribution"))
    assert numbers == [
        "0.50",
        "0.80",
        "0.60",
        "0.30",
        "0.05",
        "0.50",
    ]  # areas, p-value, correlation

    worse = [
        dataclasses.replace(check, weight_correlation=0.51),
        dataclasses.replace(check, p_value=0.051),
    ]
    assert not any(each.is_faithful for each in worse)
    assert len({each.describe("rollout").partition("(")[0] for each in (check, *worse)}) == 3


def test_constant_maps_have_no_correlation_and_curves_without_gains_are_not_better() -> None:
    model = center_logits(ViTCLSForImageClassification(build_tiny_config()), build_images())
    with torch.no_grad():
        model.classifier.weight.zero_()
    check = check_maps(model, [build_images(1)])["attribution"]
    assert check.weight_correlation == 0
    assert check.p_value == 1


@pytest.mark.slow
def test_attribution_of_a_trained_model_is_faithful() -> None:
    model = train_digits_model(epochs=6)
    pixels = [image.unsqueeze(0) for image in HELD_OUT[0][:24]]
    found = check_maps(model, pixels)
    assert set(found) == {"attribution", "rollout"}
    assert found["attribution"].num_images == 24
    attribution = found["attribution"]
    assert attribution.is_faithful
    assert attribution.weight_correlation < 0.5
    assert attribution.deletion[0] == pytest.approx(attribution.insertion[-1])  # the whole image


def test_rollout_requires_a_token_that_the_head_reads() -> None:
    config = build_tiny_config(num_cls_tokens=0, num_register_tokens=1, pooling="mean")
    model = center_logits(ViTCLSForImageClassification(config), build_images())
    assert set(check_maps(model, [build_images(1)])) == {"attribution"}


def test_rollout_is_the_map_of_the_first_token_that_the_head_reads() -> None:
    """The class of the attribution can be set."""
    config = build_tiny_config(num_cls_tokens=2, pooled_cls_tokens=[1])
    model = center_logits(ViTCLSForImageClassification(config), build_images())
    pixels = build_images(1)
    predicted = int(model(pixels).logits.argmax())
    for target in (predicted, (predicted + 1) % 3):
        maps, probabilities = map_checks.compute_maps(model, pixels, torch.tensor(target))
        assert torch.allclose(
            maps["rollout"].flatten(), trace_attention(model, pixels).compute_rollout()[0, 1, 2:]
        )
        assert torch.allclose(
            maps["attribution"].flatten(),
            trace_attention(model, pixels, needs_gradients=True).compute_attribution(target)[0, 2:],
        )
        assert int(probabilities.argmax()) == predicted
