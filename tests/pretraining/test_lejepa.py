"""LeJEPA: lightly's loss, also over two processes; random crops; gradients of the tokens."""

import math
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import build_images, build_tiny_config
from helpers.warm_processes import METHOD
from torch import distributed, multiprocessing

from modeling_vitcls import ViTCLSModel
from modeling_vitcls.data.batches import Normalizer
from modeling_vitcls.model.image_processing_vitcls import ViTCLSImageProcessor
from modeling_vitcls.pretraining import lejepa
from modeling_vitcls.pretraining.lejepa import (
    LeJEPA,
    compute_invariance_loss,
    compute_lejepa_losses,
    compute_sigreg,
    crop,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_global", "num_local", "num_images"), [(2, 6, 32), (1, 1, 5), (3, 2, 1)]
)
def test_the_loss_equals_that_of_lightly(
    num_global: int, num_local: int, num_images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_module = pytest.importorskip("lightly.loss.lejepa_loss")
    projections = torch.randn(num_global + num_local, num_images, 16) * 2 + 0.5
    directions = torch.nn.functional.normalize(torch.randn(16, 1024), dim=0)
    theirs = loss_module.LeJEPALoss(lambda_param=0.1)
    monkeypatch.setattr(theirs.sigreg, "_generate_unit_vectors", lambda *arguments: directions)
    expected = theirs(global_proj=projections[:num_global], local_proj=projections[num_global:])
    ours = 0.9 * compute_invariance_loss(projections, num_global) + 0.1 * compute_sigreg(
        projections, directions
    )
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_sigreg_measures_the_distance_from_a_gaussian() -> None:
    """Compare with the integral over frequencies by scipy."""
    from scipy import integrate

    values = torch.randn(1, 40, 1, dtype=torch.float64)

    def get_error(t: float) -> float:
        characteristic = torch.exp(1j * t * values).mean()
        return float((characteristic - math.exp(-t * t / 2)).abs() ** 2 * math.exp(-t * t / 2))

    integral, _ = integrate.quad(get_error, -3, 3)
    found = compute_sigreg(values.float(), torch.ones(1, 1))
    assert float(found) == pytest.approx(40 * integral, rel=0.02)


def compare_with_one_process(rank: int, folder: Path) -> None:
    """Check that the mean gradient of two processes is that of one process with all images."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    weight = torch.randn(6, 4)
    images = torch.randn(3, 10, 6)  # 3 views of 10 images
    torch.manual_seed(rank)  # only the first process's directions are used
    directions = lejepa.draw_directions(torch.empty(3, 10, 4), 32)
    local = weight.clone().requires_grad_()
    loss = compute_sigreg(images[:, rank * 5 : rank * 5 + 5] @ local, directions)
    loss.backward()
    distributed.all_reduce(local.grad)
    distributed.destroy_process_group()
    whole = weight.clone().requires_grad_()
    torch.manual_seed(0)
    assert torch.equal(directions, lejepa.draw_directions(torch.empty(3, 10, 4), 32))
    expected = compute_sigreg(images @ whole, directions)
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(local.grad / 2, whole.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.integration
def test_two_processes_equal_one(tmp_path: Path) -> None:
    multiprocessing.start_processes(
        compare_with_one_process, (tmp_path,), nprocs=2, start_method=METHOD
    )


def test_crops_are_parts_of_the_image() -> None:
    rows = torch.arange(32.0)[:, None].expand(32, 32)
    pixels = torch.stack([rows, rows.T, torch.full((32, 32), 7.0)]).expand(200, -1, -1, -1)
    crops = crop(pixels, [16, 16], (0.25, 0.25))
    assert crops.shape == (200, 3, 16, 16)
    assert (crops[:, 2] - 7).abs().max() < 1e-4
    y_steps = crops[:, 0].diff(dim=1)[:, 2:-2].mean((1, 2))
    x_steps = crops[:, 1].diff(dim=2)[:, :, 2:-2].mean((1, 2))
    # a quarter of the area
    torch.testing.assert_close(y_steps * x_steps.abs(), torch.ones(200), atol=1e-3, rtol=0)
    assert (y_steps > 0).all()
    assert 0.3 < (x_steps < 0).float().mean() < 0.7  # flipped only horizontally
    assert 0.86 < y_steps.min() < 0.9
    assert 1.1 < y_steps.max() < 1.16  # aspect ratios of 3/4 to 4/3
    centers = crops[:, :2].mean((2, 3))
    assert centers.amin(0).max() < 10
    assert centers.amax(0).min() > 21
    whole = crop(pixels[:8], [32, 32], (1.0, 1.0))[:, 0]

    assert (
        whole.amax((1, 2)) - whole.amin((1, 2))
    ).min() > 23  # at most the aspect ratio is cropped
    assert whole.diff(dim=1).min() > 0  # nothing is padded


def test_global_crops_are_large_and_local_crops_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The images have 24 vertical stripes. The model returns the mean colors of the views."""
    monkeypatch.setattr(lejepa, "GLOBAL_SCALE", 0.5)
    views: list[torch.Tensor] = []

    def model(*arguments: torch.Tensor) -> torch.Tensor:
        views.extend(arguments)
        return torch.cat([each.mean((-1, -2)) for each in arguments])

    pixels = (255 * (torch.arange(96) // 4 % 2)).to(torch.uint8).expand(40, 3, 72, 96)
    losses = compute_lejepa_losses(
        model,  # type: ignore[arg-type]
        {"pixels": pixels},
        normalize=Normalizer(ViTCLSImageProcessor(), torch.device("cpu")),
        patch_size=(8, 32),
        num_local=3,
    )
    assert [list(each.shape) for each in views] == [
        [2, 40, 3, 72, 96],
        [3, 40, 3, 32, 64],
    ]  # at least two patches
    for each, low, high in zip(views, (13, 3), (24, 20), strict=True):
        row = each[:, :, 0, 8]
        stripes = (row > row.mean(-1, keepdim=True)).int().diff(dim=-1).abs().sum(-1)
        assert low <= stripes.min() < low + 5
        assert high - 5 < stripes.max() <= high
    assert views[0].min() < -1.5
    assert views[0].max() > 1.5  # normalized
    means = torch.cat([each.mean((-1, -2)) for each in views])
    expected = torch.nn.functional.mse_loss(means, means[:2].mean(dim=0).expand_as(means))
    torch.testing.assert_close(losses["invariance_loss"], expected)


@pytest.mark.parametrize(
    "fields", [{}, {"pooling": "mean"}, {"num_cls_tokens": 2, "cls_pooling": "concat"}]
)
def test_gradients_reach_the_tokens(fields: dict) -> None:
    model = LeJEPA(ViTCLSModel(build_tiny_config(**fields)), width=32)
    losses = compute_lejepa_losses(
        model,
        {"pixels": (build_images(4).sigmoid() * 255).to(torch.uint8)},
        normalize=Normalizer(ViTCLSImageProcessor(), torch.device("cpu")),
        patch_size=(8, 8),
        num_local=0,
    )
    losses["loss"].backward()
    torch.testing.assert_close(
        losses["loss"], 0.95 * losses["invariance_loss"] + 0.05 * losses["sigreg_loss"]
    )
    without = [name for name, weight in model.named_parameters() if weight.grad is None]

    assert without == []
    assert model.vitcls.embeddings.cls_token.grad.abs().sum() > 0
    # initialized as in the encoder
    assert not any(model.projector[index].bias.any() for index in (0, 3, 6))
