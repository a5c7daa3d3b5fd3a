"""The report in a real browser, and its values for programs."""

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import TASKS, build_tiny_config, randomize
from helpers.varied_models import center_logits
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.analysis import report as report_module
from modeling_vitcls.analysis.inspection import Inspection, inspect_model
from modeling_vitcls.analysis.maps import overlay
from modeling_vitcls.analysis.report import write_json_values, write_page
from modeling_vitcls.analysis.verdict_texts import describe_verdict
from modeling_vitcls.inference.token_names import get_token_names
from modeling_vitcls.version import __version__


pytestmark = pytest.mark.integration

NAMES = ["</script><b>wide</b>.png", *(f"{number} & more.png" for number in range(17))]
PROCESSOR = ViTCLSImageProcessor(
    size={"shortest_edge": 40}, do_center_crop=True, crop_size={"height": 32, "width": 32}
)


def build_pil_images(count: int = len(NAMES)) -> list[Image.Image]:
    """Return images of 90 x 60 and 40 x 40 pixels."""
    generator = np.random.default_rng(0)
    sizes = [(60, 90) if index == 0 else (40, 40) for index in range(count)]
    return [
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes
    ]


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    config = build_tiny_config(
        **{"num_labels": 8, "num_hidden_layers": 3, "num_register_tokens": 3} | fields
    )
    pixels = PROCESSOR(build_pil_images(), return_tensors="pt")["pixel_values"]
    return center_logits(ViTCLSForImageClassification(config), pixels)


@pytest.fixture(scope="module")
def inspection() -> Inspection:
    """Inspect a model with two equal registers."""
    model = build_classifier()
    with torch.no_grad():
        registers = model.vitcls.embeddings.register_tokens
        registers[:, 2] = registers[:, 0]
    return inspect_model(
        model, PROCESSOR, build_pil_images(), names=NAMES, labels=[0] * len(NAMES), num_shown=None
    )


@pytest.fixture(scope="module")
def report(inspection: Inspection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    write_page(file, inspection, "A & <B>", "my photos")
    assert "A &amp; &lt;B&gt;" in file.read_text(encoding="utf-8")
    return file


@pytest.fixture
def page(browser: Browser, report: Path) -> Any:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    opened = context.new_page()
    errors = []
    opened.on("pageerror", lambda error: errors.append(error))
    opened.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    opened.goto(report.as_uri())
    yield opened
    context.close()
    assert errors == []


def test_the_first_screen_shows_six_images_then_one_line_per_token(
    page: Page, inspection: Inspection
) -> None:
    rows = page.locator("#overview figure")
    names = get_token_names(inspection.config)
    expect(rows).to_have_count(6)

    for index in range(6):
        expect(rows.nth(index).locator("img")).to_have_count(2 + len(names))
        widths = (
            rows.nth(index)
            .locator("img")
            .evaluate_all("images => images.map(image => image.naturalWidth)")
        )
        assert set(widths) == {160 if index else 180}  # small images are enlarged by an integer
    assert rows.first.bounding_box()["y"] < page.locator("#verdicts").bounding_box()["y"]

    page.locator("#verdicts summary").click()
    lines = page.locator("#verdicts li")
    verdicts = [*inspection.verdicts, inspection.patches]
    assert lines.count() == len(verdicts)

    for index, verdict in enumerate(verdicts):
        text = lines.nth(index).inner_text()
        assert verdict.token.lower() in text.lower()
        assert describe_verdict(verdict) in text
    assert [
        verdict.headline for verdict in inspection.verdicts if verdict.headline == "identical"
    ] == ["identical"] * 2


def test_the_table_contains_effects_intervals_and_limits(
    page: Page, inspection: Inspection
) -> None:
    rows = page.locator("#effects tbody tr")
    assert rows.count() == len(inspection.verdicts)
    first = rows.first.inner_text()
    effect = inspection.ablations["cls[0]"][""]
    low, high = effect.changed_interval
    assert f"{effect.changed:.1%} ({low:.1%} to {high:.1%})" in first
    assert "no test" in first
    assert "{:.2g} ({:.2g} to {:.2g})".format(effect.size, *effect.interval) in first
    register = rows.nth(1).inner_text()
    assert f"{inspection.ablations['registers[0]'][''].limit:.2g}" in register


def test_the_first_screen_shows_each_layer_of_the_first_image_from_the_last_to_the_first(
    page: Page,
) -> None:
    labels = page.locator("#depth [data-strip] button").evaluate_all(
        "all => all.map(each => each.ariaLabel)"
    )
    layers = (3, 2, 1)
    assert labels[:3] == [f"enlarge CLS, layer {layer}, mean of all heads" for layer in layers]
    assert labels[3:] == [f"enlarge patch features, layer {layer}" for layer in layers]


def test_nothing_is_wider_than_the_window(page: Page) -> None:
    for width in (390, 1280):
        page.set_viewport_size({"width": width, "height": 844})
        page.evaluate(
            "document.querySelectorAll('details').forEach(details => details.open = true)"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_map_on_the_page_equals_the_overlay_in_python(page: Page, inspection: Inspection) -> None:
    """A map equals the overlay in Python, and shows its values at the pointer."""
    page.locator(".image summary").first.click()
    box = page.locator("[data-maps='0']")
    report = inspection.image_reports[0]

    names = get_token_names(inspection.config)
    # the image and patch colors, layers of each token, and the attribution
    assert box.locator("canvas").count() == 4 + len(names) * 3 + 1

    button = box.get_by_label("enlarge CLS, layer 2, mean of all heads")
    values = report.attention[1, :, 0].mean(dim=0)  # [gh, gw]
    assert button.inner_text() == f"{100 * values.sum().item():.2g}%"

    page.wait_for_timeout(300)
    size = button.locator("canvas").evaluate("canvas => [canvas.width, canvas.height]")
    pixels = button.locator("canvas").evaluate(
        "canvas => Array.from(canvas.getContext('2d').getImageData(0, 0, canvas.width, "
        "canvas.height).data)"
    )
    drawn = np.array(pixels).reshape(size[1], size[0], 4)[:, :, :3]
    expected = overlay(report.image, values, report.visible_region, max_side=160).resize(size)
    inside = np.s_[:, 40:120]  # the part of the wide image that the model receives
    assert np.abs(drawn[inside].astype(float) - np.asarray(expected)[inside]).mean() < 12

    button.locator("canvas").hover(position={"x": 50, "y": 30})
    expect(page.locator("#value")).to_contain_text("CLS, layer 2, mean of all heads; row")

    page.locator("#head").select_option("2")
    head_button = box.get_by_label("enlarge CLS, layer 2, head 2")
    assert head_button.inner_text() == f"{100 * report.attention[1, 1, 0].sum().item():.2g}%"
    head_button.click()
    expect(page.locator("#enlarged-title")).to_contain_text("CLS, layer 2, head 2")


def test_the_page_names_the_model_and_escapes_names(page: Page, inspection: Inspection) -> None:
    assert "A & <B>" in page.locator("h1").inner_text()
    assert page.locator("b").count() == 0
    about = page.locator("#about").inner_text()
    assert f"{len(NAMES)} images of my photos" in about
    assert __version__ in about
    page.locator("#figures summary").click()
    assert page.locator("#figures svg").count() == 4


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
    file = tmp_path / "folder" / "report.html"
    found = inspect_model(randomize(KINDS[name]), PROCESSOR, build_pil_images(2))
    write_page(file, found)

    assert {verdict.outcome for verdict in found.verdicts} <= {"too few images to tell"}
    errors: list[Any] = []
    page = browser.new_page()
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(file.as_uri())
    expect(page.locator("#overview figure")).to_have_count(2)
    assert found.model_class in page.locator("h1").inner_text()

    page.locator(".image summary").first.click()
    expect(page.locator("[data-maps='0'] canvas").first).to_be_visible()
    page.close()
    assert errors == []


def test_values_for_programs_are_null_if_they_are_not_finite(
    inspection: Inspection, tmp_path: Path
) -> None:
    """Values that are not finite are null. Norms of single patches are omitted."""
    findings = replace(inspection.findings, map_variation=torch.tensor([torch.inf, 1.0]))
    changed = replace(inspection, findings=findings, num_ablation_images=7)
    write_json_values(tmp_path / "values.json", changed, "mine")

    found = json.loads((tmp_path / "values.json").read_text())
    assert found["findings"]["map_variation"] == [None, 1.0]
    assert not [name for name in found["findings"] if name.startswith(("patch_", "mean_"))]
    assert (found["model"], found["version"], found["diagnosis"]) == (
        "mine",
        __version__,
        inspection.summary,
    )
    assert [each["token"] for each in found["tokens"]] == [
        verdict.token for verdict in inspection.verdicts
    ]

    effect = inspection.ablations["registers[1]"][""]
    values = next(each for each in found["tokens"] if each["token"] == "register 2")["effects"][""]
    assert values["size"] == pytest.approx(effect.size, rel=1e-4)
    assert values["limit"] == pytest.approx(effect.limit, rel=1e-4)
    assert np.shape(found["findings"]["entropy"]) == inspection.findings.entropy.shape
    assert (found["num_unreadable"], found["num_ablation_images"]) == (0, 7)


def test_large_pages_omit_maps(inspection: Inspection, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [report.attention.numel() for report in inspection.image_reports]
    for count in (2, 0):
        monkeypatch.setattr(report_module, "MAX_MAP_BYTES", sum(sizes[:count]))
        data = report_module.build_page_data(inspection)
        assert [image["num_heads"] for image in data["images"]] == [2] * count + [0] * (
            len(sizes) - count
        )
        assert len(data["heads"]) == count
    monkeypatch.setattr(report_module, "MAX_OVERVIEW_TOKENS", 2)
    assert len(next(report_module.iterate_overview(inspection, 1))[2]) == 2


def test_values_and_maps_of_the_page_are_those_of_the_inspection(inspection: Inspection) -> None:
    """The head uses only CLS after the last layer.

    The processor crops the first image of 90 x 60 pixels.
    """
    data = report_module.build_page_data(inspection)
    report = inspection.image_reports[0]
    assert [(token["name"], token["group"], token["used"]) for token in data["tokens"]] == [
        ("CLS", "cls", 3),
        *((f"register {number}", "registers", 2) for number in (1, 2, 3)),
    ]
    assert (data["layers"], data["patch_layers"], data["images"][0]["grid"]) == (3, 2, [4, 4])

    first, label = data["images"][0], report.predictions[0].top_label
    assert (first["width"], first["height"], first["attributed"]) == (90, 60, [label])
    assert first["visible_region"] == pytest.approx([21 / 90, 6 / 60, 69 / 90, 54 / 60])
    assert max(base64.b64decode(first["patch_colors"])) > 200
    assert len({image["patch_colors"] for image in data["images"]}) == len(NAMES)

    shown, caption, maps = next(report_module.iterate_overview(inspection, 1))
    assert (shown, caption, list(maps)) == (
        report,
        f"LABEL_0 → {label}",
        get_token_names(inspection.config),
    )
    for name, layer, token in (("CLS", 2, 0), ("register 2", 1, 2)):
        assert torch.equal(maps[name], report.attention[layer, :, token].mean(dim=0))


def test_large_images_are_scaled_down_and_encoded_as_jpeg() -> None:
    for width, file_type, size in (
        (96, "png", (96, 48)),
        (98, "jpeg", (98, 49)),
        (1000, "jpeg", (640, 320)),
    ):
        image = Image.new("RGB", (width, width // 2))
        header, _, content = report_module.encode_data_url(image).partition(",")
        assert header == f"data:image/{file_type};base64"
        assert image.width == width
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == size
