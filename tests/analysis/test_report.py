"""The report in a real browser, and its values for programs."""

from pathlib import Path
from typing import Any

import pytest
from helpers.photo_folders import draw_noise
from helpers.tiny_models import TASKS, build_tiny_config, randomize
from helpers.varied_models import center_logits
from playwright.sync_api import Browser, Page, expect

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.analysis.inspection import inspect_images
from modeling_vitcls.analysis.report import write_page
from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.data.labels import OneLabel
from modeling_vitcls.version import __version__


NAMES = ["</script><b>wide</b>.png", *(f"{number} & more.png" for number in range(17))]
SHAPES = [(60, 90), *[(40, 40)] * 17]
PROCESSOR = ViTCLSImageProcessor(
    size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 32}
)


@pytest.fixture(scope="module")
def report(module_path: Path) -> Path:
    file = module_path / "report.html"
    images = draw_noise(*SHAPES)
    config = build_tiny_config(num_labels=8, num_hidden_layers=3, num_register_tokens=3)
    pixels = PROCESSOR(images, return_tensors="pt")["pixel_values"]
    model = center_logits(ViTCLSForImageClassification(config), pixels)
    chosen = [
        (image, {"name": name, "truth": "A & <B>", "kind": "wrong"})
        for image, name in zip(images[:3], NAMES, strict=False)
    ]
    label_space = OneLabel({"label": list("abcdefgh")})
    inspection, photos = inspect_images(
        model,
        PROCESSOR,
        LabeledImages(images, [0] * len(images)),
        label_space,
        batch_size=8,
        chosen=chosen,
    )
    write_page(file, "A & <B>", inspection, photos, "my photos")
    return file


@pytest.fixture
def page(browser: Browser, report: Path) -> Any:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    opened = context.new_page()
    opened.goto(report.as_uri())
    yield opened
    context.close()


def test_a_photo_opens_its_sheet(page: Page) -> None:
    photos = page.locator("#photos details")
    expect(photos).to_have_count(3)
    sheet = photos.first.locator(".sheet")
    expect(sheet).not_to_be_visible()
    photos.first.locator("summary").click()
    expect(sheet).to_be_visible()
    captions = photos.first.locator("summary .title")
    expect(captions.first).to_be_visible()
    # One pixel for each of the 4 x 4 patches
    maps = sheet.locator(".map").evaluate_all("all => all.map(each => each.naturalWidth)")
    assert {*maps} == {4}
    closed = photos.nth(1).locator(".tile")
    assert [tile.is_visible() for tile in closed.all()[:4]] == [True, True, True, False]


def test_the_page_names_the_model_and_escapes_names(page: Page) -> None:
    assert "A & <B>" in page.locator("h1").inner_text()
    assert page.locator("b, script").count() == 0
    about = page.locator("#about").inner_text()
    assert f"{len(NAMES)} images of my photos" in about
    assert __version__ in about


KINDS = {
    "tasks": ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS)),
    "no tokens": ViTCLSModel(build_tiny_config(num_cls_tokens=0, pooling="mean")),
    "encoder": ViTCLSModel(build_tiny_config(num_register_tokens=2)),
    "masked": ViTCLSForMaskedImageModeling(build_tiny_config()),
    "multi-label": ViTCLSForImageClassification(
        build_tiny_config(problem_type="multi_label_classification")
    ),
    "differential": ViTCLSForImageClassification(
        build_tiny_config(attention_type="differential", num_distillation_tokens=1)
    ),
}
FAST, *SLOW = KINDS


@pytest.mark.parametrize(
    "name", [FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_every_kind_of_model_has_a_report(name: str, browser: Browser, tmp_path: Path) -> None:
    """Two images are sufficient for a page, but not for statements about effects."""
    file = tmp_path / "report.html"
    model = randomize(KINDS[name])
    images = draw_noise(*SHAPES[:2])
    chosen = [(image, {"name": "photo.jpg"}) for image in images]
    found, photos = inspect_images(
        model, PROCESSOR, LabeledImages(images, [None] * 2), batch_size=2, chosen=chosen
    )
    write_page(file, name, found, photos)

    assert {effect["verdict"] for effect in found.effects} <= {"not shown"}
    page = browser.new_page()
    page.goto(file.as_uri())
    expect(page.locator("#photos details")).to_have_count(2)
    assert found.model_class in page.locator("#about").inner_text()
    page.close()
