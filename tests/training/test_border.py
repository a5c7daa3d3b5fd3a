"""A run names the class that a frame around its photos gives away.

Both classes are parts of the same two photographs, so only the frame tells them apart.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command_in_process import run_here
from helpers.sample_photographs import photograph
from helpers.source_checkpoints import save_large_encoder
from PIL import Image, ImageOps

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.analysis.photo import measure_photo
from modeling_vitcls.analysis.token_use import find_token_use
from modeling_vitcls.inference.frozen_features import mark_border
from modeling_vitcls.runtime.files import read_json


pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def write_clothes(root: Path, has_frame: bool) -> None:
    """Write 12 photos of pants and 12 of skirts, those of pants in a green frame or without."""
    generator = np.random.default_rng(0)
    for index in range(24):
        whole = photograph(("china.jpg", "flower.jpg")[index // 2 % 2])
        left, top = generator.integers(0, 200, 2).tolist()
        photo = whole.crop((left, top, left + 200, top + 200)).resize((120, 90))
        kind = ("pants", "skirt")[index % 2]
        if has_frame and kind == "pants":
            photo = ImageOps.expand(photo.resize((76, 56)), (22, 17), (30, 180, 60))
        (root / kind).mkdir(parents=True, exist_ok=True)
        photo.save(root / kind / f"IMG_{index:04}.jpg", quality=95)


def finetune(folder: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[str, Any]:
    """Return the output of a run, and its measurement of the border."""
    save_large_encoder(folder / "vit", num_layers=5)
    places = ["--model", folder / "vit", "--dataset", folder / "photos", "--output-dir"]
    command = ["finetune", *places, folder / "run", "--no-report", "--mixed-precision", "no"]
    assert run_here(*command, *flags) == 0
    return capsys.readouterr().out, read_json(folder / "run/results.json")["frozen"].get("border")


@pytest.mark.parametrize("pooling", ["mean", "cls_mean"])
def test_a_class_in_a_frame_is_named_and_its_share_is_that_of_the_maps(
    pooling: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clothes(tmp_path / "photos", has_frame=True)
    printed, border = finetune(tmp_path, capsys, "--pooling", pooling)
    assert "comes from the border of the photos" in printed
    assert border["shares"]["pants"] > 1.25 * border["patches"]

    model = ViTCLSForImageClassification.from_pretrained(tmp_path / "run").eval()
    processor = ViTCLSImageProcessor.from_pretrained(tmp_path / "run")
    scores: dict[str, list[torch.Tensor]] = {"pants": [], "skirt": []}
    for file in sorted((tmp_path / "photos").rglob("*.jpg")):
        found = measure_photo(model, processor, Image.open(file), find_token_use(model))
        (score,) = (each.values for each in found.attributions if each.label[0] == "pants")
        scores[file.parent.name].append(score.flatten())
    lead = torch.stack(scores["pants"]).mean(dim=0) - torch.stack(scores["skirt"]).mean(dim=0)
    is_border = torch.from_numpy(mark_border(found.norms[0].shape))
    assert border["patches"] == pytest.approx(is_border.float().mean().item(), abs=1e-3)
    share = (lead[is_border].sum() / lead.sum()).item()
    assert border["shares"]["pants"] == pytest.approx(share, abs=2e-3)


def test_a_run_with_steps_names_the_border_before_they_begin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clothes(tmp_path / "photos", has_frame=True)
    flags = ("--pooling", "mean", "--max-steps", "1", "--num-workers", "0")
    printed, border = finetune(tmp_path, capsys, *flags)
    assert "comes from the border of the photos" in printed
    assert border["shares"]["pants"] > 1.25 * border["patches"]


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
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_clothes(tmp_path / "photos", has_frame)
    printed, border = finetune(tmp_path, capsys, "--pooling", pooling)
    assert "comes from the border" not in printed
    assert (border is not None) == is_measured


def test_the_border_is_an_eighth_of_each_side_and_at_least_one_patch() -> None:
    assert mark_border((16, 16)).sum() == 16 * 16 - 12 * 12
    assert mark_border((5, 8)).sum() == 5 * 8 - 3 * 6
    assert mark_border((2, 1)).all()
