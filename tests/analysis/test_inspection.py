"""Forward passes of an inspection: their number is known in advance, and is small for large models."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import build_tiny_config
from varied_models import center_logits

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.analysis import inspection
from modeling_vitcls.analysis.ablation import count_null_passes
from modeling_vitcls.analysis.inspection import MIN_NULL_IMAGES, inspect_model
from modeling_vitcls.analysis.report import write_page


NUM_IMAGES = 18
PROCESSOR = ViTCLSImageProcessor(size={"height": 32, "width": 32})


def build_images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(NUM_IMAGES)]


def build_classifier() -> ViTCLSForImageClassification:
    """1 CLS token, which the head reads, and 2 registers."""
    model = ViTCLSForImageClassification(build_tiny_config(num_labels=8, num_register_tokens=2))
    return center_logits(model, PROCESSOR(build_images(), return_tensors="pt")["pixel_values"])


def test_progress_counts_all_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics, ablations and null distributions have one common total, from which the remaining time follows."""
    model, reports, num_passes = build_classifier(), [], 0

    def count(module: object, args: tuple, kwargs: dict, output: object) -> None:
        nonlocal num_passes
        num_passes += len(args[0] if args else kwargs["pixel_values"])

    model.base_model.register_forward_hook(count, with_kwargs=True)
    monkeypatch.setattr(inspection, "MAX_NULL_FLOPS", 1)
    monkeypatch.setattr(inspection, "build_image_report", lambda *_: None)
    inspect_model(model, PROCESSOR, build_images(), num_shown=1, on_progress=lambda *report: reports.append(report))

    names = "collecting statistics", "ablating tokens", "measuring null effects"
    passes = [report for report in reports if report[0] in names]
    (total,) = {total for *_, total in passes}
    finished = [number for _, number, _ in passes]
    assert finished == sorted(finished) and {name for name, *_ in passes} == set(names)
    # 4 parts without information and without presence, and once without ablation; registers are hidden only once
    assert total == NUM_IMAGES * (1 + 2 * 4) + MIN_NULL_IMAGES * count_null_passes(model)
    assert max(finished) <= total
    # a head that reads only a constant CLS token requires one image, and one pass only counts tokens
    assert num_passes == total - (NUM_IMAGES - 1) - MIN_NULL_IMAGES


def test_large_models_use_fewer_images_for_null_distributions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The page states their number."""
    monkeypatch.setattr(inspection, "MAX_NULL_FLOPS", 1)
    found = inspect_model(build_classifier(), PROCESSOR, build_images(), num_shown=1)
    assert found.num_null_images == MIN_NULL_IMAGES < NUM_IMAGES == found.findings.num_images
    write_page(tmp_path / "report.html", found)
    statement = f"null distributions on {MIN_NULL_IMAGES} of the {NUM_IMAGES} images"
    assert statement in (tmp_path / "report.html").read_text(encoding="utf-8")
