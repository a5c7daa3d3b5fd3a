"""A run names the class that a frame around its photos gives away.

Both classes are parts of the same two photographs, so only the frame tells them apart.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_in_process import finetune
from helpers.sample_photographs import photograph
from numpy.random import default_rng
from PIL import Image, ImageOps
from pytest import approx

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.inference.features import mark_rings


@pytest.fixture(autouse=True)
def encoder(converted_encoder: Path, tmp_path: Path) -> None:
    """Place a Dinov2 encoder beside the photos."""
    (tmp_path / "vit").symlink_to(converted_encoder)


def write_clothes(folder: Path, has_frame: bool) -> None:
    """Write 12 photos of pants and 12 of skirts with their table, pants in a green frame or without."""
    generator = default_rng(0)
    rows = ["image,kind,scene,tags"]
    for index in range(24):
        kind = ("pants", "skirt")[index % 2]
        scene = ("china", "flower")[index // 2 % 2]
        left, top = generator.integers(0, 200, 2).tolist()
        whole = photograph(f"{scene}.jpg")
        photo = whole.crop((left, top, left + 200, top + 200)).resize((120, 90))
        if has_frame and kind == "pants":
            photo = ImageOps.expand(photo.resize((76, 56)), (22, 17), (30, 180, 60))
        photo.save(folder / f"IMG_{index:04}_{kind}.jpg", quality=95)
        rows.append(f"IMG_{index:04}_{kind}.jpg,{kind},{scene},{kind}|{scene}")
    (folder / "table.csv").write_text("\n".join(rows))


def measure(folder: Path, flags: str) -> tuple[str, Any]:
    """Return the output of a run, and its measurement of the border."""
    paths = (folder / name for name in ("vit", "table.csv", "run"))
    results = finetune(*paths, "--mixed-precision", "no", *flags.split())
    record = results["frozen"]
    record = record.get("tasks", {}).get("kind", record)
    return results["printed"], record["findings"].get("border")


@pytest.mark.parametrize("pooling", ["mean", pytest.param("cls_mean", marks=pytest.mark.slow)])
def test_a_class_in_a_frame_is_named_and_its_share_is_that_of_its_patches(
    pooling: str, tmp_path: Path
) -> None:
    write_clothes(tmp_path, has_frame=True)
    printed, border = measure(tmp_path, f"--label-column kind --pooling {pooling}")
    assert "comes from the border of the photos" in printed
    model = ViTCLSForImageClassification.from_pretrained(tmp_path / "run").eval()
    processor = ViTCLSImageProcessor.from_pretrained(tmp_path / "run")
    rings = [torch.from_numpy(ring).flatten() for ring in mark_rings((8, 8))]
    every_patch = torch.ones(64, dtype=torch.bool)
    leads = []
    # A linear head loses what the patches add that it does not read.
    for is_kept in (every_patch, ~every_patch, *(~ring for ring in rings)):
        means = [
            score_pants(model, processor, sorted(tmp_path.glob(f"*{kind}.jpg")), is_kept)
            for kind in ("pants", "skirt")
        ]
        leads.append(means[0] - means[1])
    whole, rest, *without = leads
    assert border["patches"] == approx([28 / 64, 28 / 64], abs=1e-3)
    shares = [(whole - each) / (whole - rest) for each in without]
    assert border["shares"]["pants"] == approx(shares, abs=2e-3)


@torch.no_grad()
def score_pants(model: Any, processor: Any, files: list[Path], is_kept: torch.Tensor) -> float:
    """Compute the mean score of pants if the head reads only these patches [P], and CLS."""
    pixels = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    normalize = model.vitcls.normalize

    def keep(states: torch.Tensor) -> torch.Tensor:
        tokens = normalize(states).clone()
        tokens[:, model.config.token_layout.patches] *= is_kept[:, None]
        return tokens

    model.vitcls.normalize = keep
    scores = model(pixels).logits[:, model.config.label2id["pants"]]
    model.vitcls.normalize = normalize
    return scores.mean().item()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--label-column kind --pooling mean --max-steps 1 --num-workers 0", "pants"),
        ("--label-column kind scene --pooling cls_mean", "kind: .*pants"),
        ("--label-column tags --pooling mean", "pants"),
    ],
    ids=["steps", "tasks", "several labels"],
)
def test_a_run_of_any_kind_names_the_label_in_a_frame(
    flags: str, name: str, tmp_path: Path
) -> None:
    """Before its steps, if it has any."""
    write_clothes(tmp_path, has_frame=True)
    printed, border = measure(tmp_path, flags)
    assert re.search(f"border    .*{name}", printed)
    assert "comes from the border of the photos" in printed
    assert border["shares"]["pants"][1] > 1.25 * border["patches"][1]


@pytest.mark.parametrize(
    ("has_frame", "pooling", "is_measured"),
    [(False, "mean", True), (True, "cls", False)],
    ids=["no frame", "CLS alone"],
)
def test_no_border_is_named(
    has_frame: bool,
    pooling: str,
    is_measured: bool,
    tmp_path: Path,
) -> None:
    write_clothes(tmp_path, has_frame)
    printed, border = measure(tmp_path, f"--label-column kind --pooling {pooling}")
    assert "comes from the border" not in printed
    assert bool(border["shares"]) == is_measured


def test_one_ring_is_a_patch_wide_and_the_other_an_eighth_of_each_side() -> None:
    assert [ring.sum() for ring in mark_rings((16, 16))] == [16 * 16 - 14 * 14, 16 * 16 - 12 * 12]
    assert [ring.sum() for ring in mark_rings((5, 8))] == [5 * 8 - 3 * 6] * 2
    assert all(ring.all() for ring in mark_rings((2, 1)))
