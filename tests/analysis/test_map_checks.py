"""Checks of maps: curves compared with a loop over patches, and models whose maps are constructed to be right or
wrong.
"""

import pytest
import torch
from digits_models import HELD_OUT, train_digits_model
from tiny_models import build_images, build_tiny_config
from varied_models import center_logits

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.analysis import map_checks
from modeling_vitcls.analysis.map_checks import FRACTIONS, check_maps, measure_curves, shuffle_weights


def test_curves_replace_the_highest_patches_first() -> None:
    """Patches are replaced by the mean color one by one. Insertion keeps the patches that deletion replaces."""
    model = center_logits(ViTCLSForImageClassification(build_tiny_config(patch_size=[8, 16])), build_images())
    pixels = build_images(1, 32, 40)  # the last 8 columns are not a whole patch
    values = torch.randperm(8, generator=torch.Generator().manual_seed(0)).view(4, 2).float()
    deletion, insertion = measure_curves(model, pixels, values, target=1)
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
    shuffled = shuffle_weights(model, torch.Generator().manual_seed(0))
    weight, other = (each.vitcls.layers[0].mlp.fc1.weight for each in (model, shuffled))
    assert not torch.equal(weight, other) and torch.equal(
        weight.flatten().sort().values, other.flatten().sort().values
    )


@pytest.mark.slow
def test_attribution_of_a_trained_model_is_faithful(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maps are better than a random order, and inverted maps are not."""
    model = train_digits_model(epochs=6)
    pixels = [image.unsqueeze(0) for image in HELD_OUT[0][:24]]
    found = check_maps(model, pixels)
    assert set(found) == {"attribution", "rollout"} and found["attribution"].num_images == 24
    attribution = found["attribution"]
    assert attribution.is_faithful and "shows what predictions depend on" in attribution.describe("attribution")
    assert attribution.weight_correlation < 0.5
    assert attribution.deletion[0] == pytest.approx(attribution.insertion[-1])  # the whole image
    compute_maps = map_checks.compute_maps

    def invert(*args: object) -> object:
        maps, probabilities = compute_maps(*args)
        return {name: -values for name, values in maps.items()}, probabilities

    monkeypatch.setattr(map_checks, "compute_maps", invert)
    inverted = check_maps(model, pixels)["attribution"]
    assert not inverted.is_faithful and "not measurably better than a random order" in inverted.describe("attribution")


def test_rollout_requires_a_token_that_the_head_reads() -> None:
    config = build_tiny_config(num_cls_tokens=0, num_register_tokens=1, pooling="mean")
    model = center_logits(ViTCLSForImageClassification(config), build_images())
    assert set(check_maps(model, [build_images(1)])) == {"attribution"}
