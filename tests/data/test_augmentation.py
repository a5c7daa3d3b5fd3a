"""Random augmentation of training images: its effects, and what it depends on."""

from typing import Any

import pytest
import torch
from helpers.photo_folders import draw_pixels
from helpers.tiny_models import assert_same_bits
from torchvision.transforms import v2

from modeling_vitcls import ViTCLSImageProcessor
from modeling_vitcls.data.augmentation import (
    apply_seeded,
    build_augmentation,
    build_mixer,
    erase,
)
from modeling_vitcls.data.options import AugmentationOptions
from modeling_vitcls.data.sampling import derive_seed


ALL = {
    "crop_scale": 0.5,
    "flip": True,
    "auto_augment": "rand",
    "augment": {"rotation": 20.0, "shift": 0.1, "zoom": 0.2, "random_erasing": 0.5},
}
STILL = {"crop_scale": 1.0, "flip": False}


def build(**options: Any) -> Any:
    return build_augmentation(AugmentationOptions(**options), ViTCLSImageProcessor(size=[24, 32]))


def draw_images(count: int, size: tuple[int, int] = (40, 36)) -> list[torch.Tensor]:
    return list(torch.from_numpy(draw_pixels(count, 3, *size)))


def augment(
    augmentation: Any, sources: list[torch.Tensor], seed: int, indices: list[int]
) -> torch.Tensor:
    fixed_transform, random_transform = augmentation
    seeds = [derive_seed(seed, index) for index in indices]
    return apply_seeded(random_transform, list(map(fixed_transform, sources)), seeds)


@pytest.mark.parametrize("name", [*ALL, "everything"])
def test_augmentation_depends_only_on_the_seeds(name: str) -> None:
    augmentation = build(**(ALL if name == "everything" else STILL | {name: ALL[name]}))
    sources = draw_images(6)
    indices = [5, 0, 7, 1, 2, 9]
    state = torch.get_rng_state()
    first = augment(augmentation, sources, 1, indices)

    assert torch.equal(torch.get_rng_state(), state)
    assert first.shape == (6, 3, 24, 32)
    assert first.dtype == torch.uint8

    # Neither the state of the global generator nor the other images of the batch must matter.
    torch.rand(1)
    assert torch.equal(augment(augmentation, sources[2:4], 1, indices[2:4]), first[2:4])
    assert not torch.equal(augment(augmentation, sources, 2, indices), first)
    assert not torch.equal(augment(augmentation, sources, 1, indices[::-1]), first)


def test_images_of_different_sizes_become_one_batch() -> None:
    """Each image is augmented as in a batch of its own."""
    sources = [*draw_images(1, (40, 36)), *draw_images(1, (17, 90))]
    for options in (ALL, STILL):
        batch = augment(build(**options), sources, 0, [0, 1])
        assert batch.shape == (2, 3, 24, 32)
        for index, source in enumerate(sources):
            assert torch.equal(batch[index], augment(build(**options), [source], 0, [index])[0])


def test_erasing_changes_only_a_rectangle() -> None:
    (source,) = draw_images(1)
    torch.manual_seed(0)
    erased = erase(v2.RandomErasing(1.0, value="random"), source)
    changed = (erased != source).any(dim=0).nonzero()
    top, left = changed.min(dim=0).values.tolist()
    bottom, right = changed.max(dim=0).values.tolist()
    part = erased[:, top : bottom + 1, left : right + 1].float()

    assert 0.01 * 40 * 36 < part[0].numel() < 0.4 * 40 * 36
    assert len(changed) > 0.9 * part[0].numel()
    assert 100 < part.mean() < 156
    assert torch.equal(erase(v2.RandomErasing(0.0, value="random"), source), source)


# Mixing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mixer"), [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
@pytest.mark.parametrize("alpha", [0.2, 5.0])
def test_the_fractions_follow_alpha(name: str, mixer: Any, alpha: float) -> None:
    pixels = torch.rand(4, 3, 16, 16) * 255
    torch.manual_seed(0)
    found = build_mixer(**{"mixup": 0.0, "cutmix": 0.0, name: alpha}, num_classes=5)(
        pixels, torch.arange(4)
    )
    torch.manual_seed(0)
    expected = mixer(alpha=alpha, num_classes=5)(pixels, torch.arange(4))
    assert_same_bits(found, expected)
