"""The report in a real browser: planted faults are named, and maps and curves equal those of the model."""

import copy
import io
import json
import re
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import LAYOUTS, TASKS, build_tiny_config, raises_one_line, randomize
from helpers.varied_models import center_logits
from peers.transformers_cases import CASES
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.analysis import report_data
from modeling_vitcls.analysis.ablation import Ablation
from modeling_vitcls.analysis.effects import AblationEffect, FeatureEffect
from modeling_vitcls.analysis.inspection import Inspection, inspect_model
from modeling_vitcls.analysis.maps import (
    MIN_SCALE,
    extract_patch_maps,
    overlay,
    upsample_maps,
)
from modeling_vitcls.analysis.model_outputs import MIN_IMAGES
from modeling_vitcls.analysis.patch_features import (
    compute_patch_colors,
    compute_patch_features,
    compute_patch_similarity,
    draw_patch_colors,
)
from modeling_vitcls.analysis.patch_sizes import PatchSizeRow
from modeling_vitcls.analysis.report import (
    build_effect_table,
    build_layout,
    build_page_header,
    build_patch_size_table,
    write_json_values,
    write_page,
    write_report,
)
from modeling_vitcls.conversion.from_transformers import convert_from_transformers
from modeling_vitcls.data.fit import VisibleRegion, get_visible_region
from modeling_vitcls.inference.predict import predict
from modeling_vitcls.token_names import get_token_names
from modeling_vitcls.version import __version__


pytestmark = pytest.mark.integration


NAMES = ["</script><b>wide</b>.png", "tall.png", "square & small.png"]
SIZES = [(90, 60), (50, 80), (40, 40)]  # width, height
NUM_LABELS = 8
PATIENCE = 60_000  # timeout of the browser in milliseconds


def build_processor(**settings: Any) -> ViTCLSImageProcessor:
    """Return a processor that crops the center of an image, 32 x 32 of 40 pixels along the shorter side."""
    crop = {"height": 32, "width": 32}
    return ViTCLSImageProcessor(
        **{"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": crop, **settings}
    )


def build_pil_images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


def build_more_pil_images() -> list[Image.Image]:
    """Return more images, so that there are enough to judge tokens."""
    generator = np.random.default_rng(1)
    noise = generator.integers(0, 256, (MIN_IMAGES - len(SIZES), 40, 40, 3), dtype=np.uint8)
    return [Image.fromarray(one) for one in noise]


def build_pixels() -> torch.Tensor:
    return build_processor()(build_pil_images(), return_tensors="pt")["pixel_values"]


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    fields = {"num_labels": NUM_LABELS, "num_hidden_layers": 3, "num_register_tokens": 3} | fields
    return center_logits(ViTCLSForImageClassification(build_tiny_config(**fields)), build_pixels())


@torch.no_grad()
def build_planted_model() -> ViTCLSForImageClassification:
    """Return a model in which one patch of sixteen has a large norm, and two registers are equal."""
    model = build_classifier()
    embeddings = model.vitcls.embeddings
    embeddings.position_embeddings.patches[:, 5] += 200
    embeddings.register_tokens[:, 2] = embeddings.register_tokens[:, 0]
    return model


@contextmanager
def open_page(
    browser: Browser, file: Path, scheme: Any = "light", width: int = 1280, **settings: Any
) -> Iterator[Page]:
    """Open the page from a file. It must not write to the console, load files, or be wider than the window."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, **settings)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: messages.append(request.url) if not is_local(request.url, file) else None)
    page.add_init_script("addEventListener('error', () => { window.hasFailed = true })")
    page.goto(file.as_uri())
    page.wait_for_function(EVERYTHING_IS_DRAWN)
    assert messages == []
    yield page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert messages == []
    context.close()


# Charts are drawn after layout, which moves the elements below them.
EVERYTHING_IS_DRAWN = """
    window.hasFailed ||
    [...document.querySelectorAll('[data-thumbnail]')].every((canvas) => Math.max(canvas.width, canvas.height) === 200)
    && [...document.querySelectorAll('[data-chart] svg[role=img]')].every((chart) => chart.childElementCount)
"""


def is_local(url: str, file: Path) -> bool:
    return url.startswith("data:") or url == file.as_uri()


@pytest.fixture(scope="module")
def faulty_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Inspection]:
    """Return the page of a model with a frozen CLS token, a patch of large norm, and two equal registers."""
    file = tmp_path_factory.mktemp("report") / "report.html"
    model = build_planted_model()
    movement = {"cls[0]": 0.0, "registers[0]": 0.3, "registers[1]": 0.2, "registers[2]": 0.3}
    labels = [0, 1, None]
    found = write_report(
        file,
        model,
        build_processor(),
        build_pil_images(),
        names=NAMES,
        labels=labels,
        statistics_images=[*build_pil_images(), *build_more_pil_images()],
        statistics_labels=labels + [None] * len(build_more_pil_images()),
        token_movement=movement,
        source="a test",
    )
    return file, model, found


@pytest.fixture(scope="module")
def read_only_page(browser: Browser, faulty_page: Any) -> Iterator[Page]:
    """Return this page for tests that do not change it."""
    with open_page(browser, faulty_page[0]) as page:
        yield page


# Text ----------------------------------------------------------------------------------------------------------------


def test_planted_faults_are_named(read_only_page: Page, faulty_page: Any) -> None:
    cards = read_only_page.locator(".verdict").all_inner_texts()
    words = [
        card.splitlines()[0] + ": " + card.splitlines()[1].strip()
        for card in filter(None, map(get_nonempty_lines, cards))
    ]
    assert words[1] == "register 1: ≡ collapsed" and words[3] == "register 3: ≡ collapsed"
    assert words[0].startswith("CLS: ") and "not moved" in words[0] and words[5] == "patches: ✕ artifacts"
    assert words[2].split(": ")[0] == "register 2" and words[4].startswith("all 3 registers: ")
    assert "null: random patches" in cards[2] and "random tokens" in cards[2] and "95% interval" in cards[4]
    assert "identical to register 3" in cards[1] and "6.25%" in cards[5]


def get_nonempty_lines(text: str) -> str:
    """Return the lines that are not empty."""
    return "\n".join(filter(str.strip, text.splitlines()))


def test_names_are_escaped(read_only_page: Page, faulty_page: Any) -> None:
    """Check names that look like HTML elements."""
    assert [name.strip() for name in read_only_page.locator("summary strong").all_inner_texts()] == NAMES
    assert read_only_page.locator("summary strong b").count() == 0


def test_predictions_and_labels(read_only_page: Page, faulty_page: Any) -> None:
    _, model, found = faulty_page
    with torch.no_grad():
        probabilities = model(build_pixels()).logits.softmax(dim=-1)
    texts = read_only_page.locator(".image > summary").all_inner_texts()
    for place, text in enumerate(texts):
        best = int(probabilities[place].argmax())
        assert f"LABEL_{best} ({probabilities[place, best]:.1%})" in text
        if place < 2:
            assert f"true label LABEL_{place}" in text and ("✓ correct" in text) == (best == place)
    assert "true label" not in texts[2]
    right = sum(int(probabilities[place].argmax()) == place for place in range(2))
    assert found.accuracy == right / 2


def test_the_layout_shows_the_tokens_that_are_used(read_only_page: Page, faulty_page: Any) -> None:
    assert read_only_page.locator(".sequence .used").all_inner_texts()[0].startswith("CLS")
    assert read_only_page.locator(".sequence .used").count() == 1
    assert "16 patches" in read_only_page.locator(".sequence").inner_text()


def test_effects_of_tokens(read_only_page: Page, faulty_page: Any) -> None:
    """Each token and group has two rows: without information, and without presence."""
    _, _, found = faulty_page
    rows = [row.split("\t") for row in read_only_page.locator("#effects tbody tr").all_inner_texts()]
    ablations = [found.ablations[kind][key] for key in found.ablations["presence"] for kind in found.ablations]
    names = ["CLS", "register 1", "register 2", "register 3", "all 3 registers"]
    assert [row[0] for row in rows] == [name for name in names for _ in range(2)]
    assert [row[1].split(":")[0] for row in rows] == ["information", "presence"] * len(names)
    for row, ablation in zip(rows, ablations, strict=True):
        effect, (low, high) = ablation.effect, ablation.effect.interval
        count = f"{round(16 * effect.changed_answers)} of 16 (at most {effect.changed_interval[1]:.1%})"
        assert row[2:5] == [count, f"{effect.logit_change:.2g}", f"{low:.2g} to {high:.2g}"]
        assert row[5] == f"{min(ablation.patch_effects):.2g} to {max(ablation.patch_effects):.2g}"
        assert bool(row[6]) == bool(ablation.redrawn_effects) == (row[0] != "CLS")
        assert row[7] == f"{effect.accuracy_change * 100:+.1f}"


# Maps ----------------------------------------------------------------------------------------------------------------


def compute_attention(model: Any, place: int) -> torch.Tensor:
    """Return the attention maps, [layer, head, token, gh, gw]."""
    with torch.no_grad():
        return extract_patch_maps(model.token_attention(build_pixels())[place], model.config, (32, 32))


def find_cell(page: Page, label: str, place: int = 0) -> Locator:
    return page.locator(f'[data-maps="{place}"] .cell[aria-label="{label}: enlarge"]')


def get_canvas_pixels(page: Page, label: str) -> np.ndarray:
    """Return the pixels of the enlarged map of the first image."""
    find_cell(page, label).focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('enlarged-map').width === 900")
    url = page.evaluate("document.getElementById('enlarged-map').toDataURL()")
    page.keyboard.press("Escape")
    return np.asarray(Image.open(io.BytesIO(b64decode(url.partition(",")[2]))).convert("RGB"), dtype=int)


def scroll_into_view(part: Locator) -> None:
    """Scroll to an element and wait for the event, because labels are hidden during scrolling."""
    part.scroll_into_view_if_needed()
    part.page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_the_enlarged_map_equals_the_overlay(browser: Browser, faulty_page: Any) -> None:
    """Compare pixels with the overlay of maps.py, on the pixels of the image: not square, and cropped."""
    _, model, _ = faulty_page
    picture = build_pil_images()[0]
    seen = get_visible_region(build_processor(), (60, 90), (8, 8))
    by_layer = compute_attention(model, 0).mean(dim=1)[:, 2]
    values = by_layer[1]
    strongest = max(max(one.max(), MIN_SCALE * one.mean()).item() for one in by_layer)  # one scale per token
    drawn = overlay(picture, values, seen, strongest, min_side=900)
    with open_page(browser, faulty_page[0]) as page:
        painted = get_canvas_pixels(page, "register 2, layer 2")
    expected = np.asarray(drawn, dtype=int)
    assert painted.shape == expected.shape == (600, 900, 3)
    left, top, right, bottom = (round(10 * edge) for edge in seen)
    inside = np.abs(painted - expected)[top:bottom, left:right]
    assert inside.mean() < 1 and inside.max() <= 8
    hatched = painted[:, :left]
    assert hatched.mean() == pytest.approx(expected[:, :left].mean(), abs=1) and hatched.max() < 130


def test_values_at_the_pointer(browser: Browser, faulty_page: Any) -> None:
    """Check the center of the wide image, for the mean of the heads and one head, and the cropped border."""
    _, model, _ = faulty_page
    maps = compute_attention(model, 0)[2, :, 0]  # [head, gh, gw]
    with open_page(browser, faulty_page[0]) as page:
        canvas = find_cell(page, "CLS, layer 3").locator("canvas")
        scroll_into_view(canvas)
        box = canvas.bounding_box()
        at = {"x": box["width"] * 0.52, "y": box["height"] * 0.52}  # row 3, column 3, of 4
        canvas.hover(position=at)
        tip = page.locator("#tip")
        expect(tip).to_contain_text("CLS, layer 3, mean of the heads")
        assert tip.inner_text().splitlines() == [
            "CLS, layer 3, mean of the heads",
            format_value(maps.mean(dim=0)[2, 2]),
        ]
        page.locator("#head").select_option("2")
        canvas.hover(position={"x": at["x"] + 1, "y": at["y"]})
        expect(tip).to_contain_text("CLS, layer 3, head 2")
        assert tip.inner_text().splitlines() == ["CLS, layer 3, head 2", format_value(maps[1, 2, 2])]
        canvas.hover(position={"x": 2, "y": at["y"]})
        expect(tip).to_contain_text("outside the region that the model receives")
        page.mouse.move(5, 5)
        expect(tip).to_be_hidden()


def format_value(value: torch.Tensor) -> Any:
    """Return the displayed value, with three digits of the value in a byte."""
    return ApproximateText("row 3, column 3: ", 100 * value.item(), "% of the attention")


class ApproximateText:
    """Equal to a text with approximately this number."""

    def __init__(self, before: str, number: float, after: str) -> None:
        self.before, self.number, self.after = before, number, after

    def __eq__(self, other: object) -> bool:
        text = str(other)
        if not (text.startswith(self.before) and text.endswith(self.after)):
            return False
        found = float(text.removeprefix(self.before).removesuffix(self.after))
        return found == pytest.approx(self.number, rel=0.02, abs=0.01)

    def __repr__(self) -> str:
        return f"{self.before}{self.number}{self.after}"


def test_the_share_of_attention_to_patches(browser: Browser, faulty_page: Any) -> None:
    _, model, _ = faulty_page
    share = compute_attention(model, 0)[0].mean(dim=0)[1].sum().item()
    with open_page(browser, faulty_page[0]) as page:
        button = find_cell(page, "register 1, layer 1")
        scroll_into_view(button)
        page.wait_for_function("(cell) => cell.querySelector('.share').textContent", arg=button.element_handle())
        numbers = [float(text) for text in re.findall(r"[\d.]+(?=%)", button.inner_text())]
        peak = compute_attention(model, 0)[0].mean(dim=0)[1].max().item()
        assert numbers == pytest.approx([100 * share, 100 * peak], rel=0.06)


@pytest.mark.slow
def test_keyboard(browser: Browser, faulty_page: Any) -> None:
    """One tab stop per image, arrow keys move between maps, Enter enlarges, arrows continue, Escape closes."""
    with open_page(browser, faulty_page[0]) as page:
        first = page.locator('[data-maps="0"] .cell').first
        assert page.locator('[data-maps="0"] .cell[tabindex="0"]').count() == 1
        first.focus()
        for key in ("ArrowDown", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowRight"):
            page.keyboard.press(key)
        expect(find_cell(page, "register 1, layer 2")).to_be_focused()
        page.keyboard.press("Enter")
        title = page.locator("#enlarged-title")
        expect(title).to_have_text(f"register 1, layer 2, mean of the heads · {NAMES[0]}")
        expect(page.locator("#enlarged-value")).to_contain_text("Maximum per patch")
        for key in ("ArrowLeft", "ArrowLeft", "ArrowLeft", "ArrowUp"):  # there is no cell to move to
            page.keyboard.press(key)
        expect(title).to_have_text(f"CLS, rollout through all layers · {NAMES[0]}")
        page.keyboard.press("Escape")
        expect(page.locator("dialog")).to_be_hidden()
        # the page receives the close event of the dialog later
        expect(find_cell(page, "CLS, rollout")).to_be_focused()
        assert page.locator('[data-maps="0"] .cell[tabindex="0"]').count() == 1


def test_one_scale_for_all_layers(browser: Browser, faulty_page: Any) -> None:
    """Only the maximum of all maps has the brightest color."""
    with open_page(browser, faulty_page[0]) as page:
        maps = '[data-maps="0"] .grid .cell:is([aria-label^=CLS], [aria-label^=register]) canvas'
        brightest = """(maps) => [...document.querySelectorAll(maps)].map((painted) => {
            const canvas = new OffscreenCanvas(painted.width, painted.height).getContext('2d');
            canvas.drawImage(painted, 0, 0);
            const data = canvas.getImageData(0, 0, painted.width, painted.height).data;
            return Math.max(...Array.from({length: data.length / 4}, (_, place) => data[4 * place]));
        })"""
        page.locator('[data-maps="0"]').scroll_into_view_if_needed()
        painted = """([maps, state]) => [...document.querySelectorAll(maps)].every(
            (canvas) => canvas.dataset.state?.startsWith(state))"""
        page.locator("#brightness").select_option("each")
        page.wait_for_function(painted, arg=[maps, "0 each"])
        each = page.evaluate(brightest, maps)
        page.locator("#brightness").select_option("alike")
        page.wait_for_function(painted, arg=[maps, "0 alike"])
        alike = page.evaluate(brightest, maps)
    assert len(each) == 4 * 4
    assert sum(a < e - 20 for e, a in zip(each, alike, strict=True)) >= 4
    assert all(a <= e + 20 for e, a in zip(each, alike, strict=True))


# Patch features ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compute_features(model: Any) -> torch.Tensor:
    """Return the patch features, [image, layer, gh, gw, D]."""
    return compute_patch_features(model, build_pixels())


@pytest.mark.slow
@pytest.mark.parametrize("foreground", [False, True])
def test_patch_colors_are_principal_components(browser: Browser, faulty_page: Any, foreground: bool) -> None:
    """Compare pixels with patch_features.py, except for the outline of the selected patch."""
    _, model, _ = faulty_page
    colors = compute_patch_colors(compute_features(model)[:, 1], foreground)[0]
    seen = get_visible_region(build_processor(), (60, 90), (8, 8))
    drawn = np.asarray(draw_patch_colors(build_pil_images()[0], colors, seen, min_side=900), dtype=int)
    with open_page(browser, faulty_page[0]) as page:
        if foreground:
            page.locator("#foreground").check()
        painted = get_canvas_pixels(page, "patches (PCA), layer 2")
    assert painted.shape == drawn.shape
    left, top, right, bottom = (round(10 * edge) for edge in seen)
    close = (np.abs(painted - drawn)[top:bottom, left:right] <= 8).all(axis=-1)
    assert close.mean() > 0.97


@pytest.mark.slow
def test_a_click_shows_the_similarity_to_that_patch(browser: Browser, faulty_page: Any) -> None:
    """Compare with the cosine similarity of the compressed features, in the layer of the map."""
    _, model, _ = faulty_page
    with open_page(browser, faulty_page[0]) as page:
        canvas = find_cell(page, "patches (PCA), layer 1").locator("canvas")
        scroll_into_view(canvas)
        box = canvas.bounding_box()
        left, top, right, bottom = get_visible_region(build_processor(), (60, 90), (8, 8))

        def locate(row: int, column: int) -> Any:
            """Return the center of a patch, of 4 x 4, in pixels of the canvas."""
            x, y = left + (right - left) * (column + 0.5) / 4, top + (bottom - top) * (row + 0.5) / 4
            return {"x": x / 90 * box["width"], "y": y / 60 * box["height"]}

        canvas.click(position=locate(0, 3))
        similar = find_cell(page, "similarity to a patch, layer 1").locator("canvas")
        expected = compute_patch_similarity(compute_features(model)[0, 0], 0, 3)
        for row, column in ((0, 3), (2, 0), (3, 2)):
            similar.hover(position=locate(row, column))
            expect(page.locator("#tip")).to_contain_text(f"row {row + 1}, column {column + 1}: cosine")
            cosine = float(page.locator("#tip").inner_text().rpartition(" ")[2])
            assert cosine == pytest.approx(expected[row, column].item(), abs=0.03)


@pytest.mark.slow
def test_patches_as_blocks_and_fewer_layers(browser: Browser, tmp_path: Path) -> None:
    found = write_report(
        tmp_path / "report.html", build_classifier(num_hidden_layers=5), build_processor(), build_pil_images()
    )
    with open_page(browser, tmp_path / "report.html") as page:
        page.locator("#brightness").select_option("each")
        page.locator("#blocks").check()
        painted = get_canvas_pixels(page, "CLS, layer 2")
        values = found.image_reports[0].attention[1, :, 0].mean(dim=0)
        seen = VisibleRegion(*(10 * edge for edge in get_visible_region(build_processor(), (60, 90), (8, 8))))
        blocks = upsample_maps(values, (600, 900), seen, interpolate=False)
        large = build_pil_images()[0].resize((900, 600), Image.Resampling.NEAREST)
        drawn = overlay(large, blocks, max_value=max(values.max(), MIN_SCALE * values.mean()).item())
        left, top, right, bottom = (round(edge) for edge in seen)
        assert np.abs(painted - np.asarray(drawn, dtype=int))[top:bottom, left:right].mean() < 2
        page.locator("#every").select_option("2")
        layers = page.locator('[data-maps="0"] .grid .layer').all_inner_texts()
        assert layers == ["rollout", "layer 1", "layer 3", "layer 5"]
        width = find_cell(page, "CLS, layer 5").bounding_box()["width"]
        page.locator("#size").fill("2")
        assert find_cell(page, "CLS, layer 5").bounding_box()["width"] > 1.5 * width


@pytest.mark.slow
def test_states_that_are_not_used_are_marked(browser: Browser, faulty_page: Any) -> None:
    """A head that uses only the CLS token does not use the registers and patches of the last layer."""
    with open_page(browser, faulty_page[0]) as page:
        scroll_into_view(find_cell(page, "register 1, layer 3"))
        expect(find_cell(page, "register 1, layer 3")).to_contain_text("not used")
        assert "not used" not in find_cell(page, "CLS, layer 3").inner_text()
        cells = [find_cell(page, f"register 1, layer {layer}") for layer in (2, 3)]
        tops = [cell.locator("canvas").bounding_box()["y"] for cell in cells]
        assert tops[0] == tops[1]  # although one caption has more lines
        label = page.locator("[data-chart=entropy] .unread-label")
        assert label.text_content() == "not used: registers"
        assert page.locator("[data-chart=patch_distance] .unread").count() == 1
        assert page.locator("[data-chart=mass] .unread-bar").count() == 3 * 3  # registers, groups of tokens


@pytest.mark.slow
def test_instructive_images_come_first(browser: Browser, tmp_path: Path) -> None:
    """Wrong predictions come first, then uncertain ones, then typical ones. A filter shows one kind."""
    model, many = build_classifier(), [*build_pil_images(), *build_more_pil_images()]
    values = build_processor()(many, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        probabilities = model(values).logits.softmax(dim=-1)
    labels = probabilities.argmax(dim=-1)
    labels[:2] = (labels[:2] + 1) % NUM_LABELS
    found = write_report(
        tmp_path / "report.html", model, build_processor(), many, labels=labels.tolist(), num_shown=6, batch_size=4
    )
    names = [report.name for report in found.image_reports]
    confidence = probabilities.amax(dim=-1)
    wrong = sorted([0, 1], key=lambda index: -confidence[index])
    unsure = confidence[2:].argsort()[:2] + 2
    assert names[:4] == [f"image {index + 1}" for index in [*wrong, *unsure.tolist()]]
    assert [report.kind for report in found.image_reports] == ["wrong"] * 2 + ["uncertain"] * 2 + ["typical"] * 2
    with open_page(browser, tmp_path / "report.html") as page:
        page.locator("#filter").select_option("uncertain")
        shown = page.locator(".image:visible")
        expect(shown).to_have_count(2)
        assert "least confident" in shown.first.inner_text()


def test_touch_enlarges_and_shows_values(browser: Browser, faulty_page: Any) -> None:
    with open_page(browser, faulty_page[0], "dark", 390, has_touch=True) as page:
        find_cell(page, "CLS, layer 1").tap()
        expect(page.locator("dialog")).to_be_visible()  # a tap becomes a click after a delay
        page.locator("#enlarged-map").tap()
        expect(page.locator("#enlarged-value")).to_contain_text("of the attention")
        page.locator("[data-walk=down]").tap()
        expect(page.locator("#enlarged-title")).to_contain_text(re.compile("^register 1, layer 1,"))
        page.locator("dialog .close").tap()
        expect(page.locator("dialog")).to_be_hidden()


# Figures -------------------------------------------------------------------------------------------------------------


def test_every_figure_is_drawn(read_only_page: Page, faulty_page: Any) -> None:
    charts = read_only_page.locator("[data-chart]")
    assert charts.count() == 14
    for chart in charts.all():
        assert chart.locator("svg[role=img]").count() in (1, 4)  # one, or one for each token
        for svg in chart.locator("svg[role=img]").all():
            assert svg.locator("path, rect").count() >= 1
            assert svg.get_attribute("aria-label")
    drawn = read_only_page.locator("main").inner_html()
    assert "NaN" not in drawn and "undefined" not in drawn


def test_curves_show_their_values(browser: Browser, faulty_page: Any) -> None:
    """Check the pointer, the arrow keys and the table, with the uniform baseline."""
    entropy, uniform = faulty_page[2].findings.entropy, faulty_page[2].findings.uniform["entropy"]
    with open_page(browser, faulty_page[0]) as page:
        chart = page.locator("[data-chart=entropy]")
        svg = chart.locator("svg[role=img]")
        assert svg.locator(".baseline").count() == 1 and svg.locator("path.band").count() == 4
        scroll_into_view(svg)
        svg.focus()
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#tip")).to_contain_text("layer 2")
        told = page.locator("#tip").inner_text().splitlines()
        assert told[0] == "layer 2" and told[-1] == f"uniform: {format_number(uniform)}"
        mean, low, high = entropy[1, :, 1].mean(), entropy[1, :, 1].min(), entropy[1, :, 1].max()
        assert told[2] == f"register 1: {format_number(mean)} ({format_number(low)} to {format_number(high)})"
        chart.locator(".numbers summary").click()
        rows = [row.split("\t") for row in chart.locator("tbody tr").all_inner_texts()]
        assert rows[2] == ["3", *(format_number(value) for value in entropy[2].mean(dim=0))]
        before = svg.locator("path.line").count()
        chart.locator(".legend button", has_text="register 2").click()
        expect(svg.locator("path.line")).to_have_count(before - 1)


@pytest.mark.slow
def test_scoped_tokens_have_their_own_baselines(browser: Browser, tmp_path: Path) -> None:
    """Check entropy and spread: two lines, and the name of the other baseline."""
    scopes = {"num_cls_tokens": 2, "num_register_tokens": 0, "cls_scopes": ["image", [2, 2, 0, 1]]}
    found = write_report(tmp_path / "report.html", build_classifier(**scopes), build_processor(), build_pil_images())
    alike, second = found.findings.uniform_by_token["entropy"], found.verdicts[1].token
    with open_page(browser, tmp_path / "report.html") as page:
        svg = page.locator("[data-chart=entropy] svg[role=img]")
        assert svg.locator(".baseline").count() == 2
        assert page.locator("[data-chart=patch_distance] svg[role=img] .baseline").count() == 1
        scroll_into_view(svg)
        svg.focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#tip")).to_contain_text("layer 1")
        told = page.locator("#tip").inner_text().splitlines()
        assert told[-2:] == [
            f"uniform: {format_number(alike[0])}",
            f"uniform over the region of {second}: {format_number(alike[1])}",
        ]


def format_number(value: Any) -> str:
    """Format a number as the page does: three digits, without trailing zeros."""
    text = f"{float(value):.3g}"
    return text if "e" in text else str(float(text)).removesuffix(".0")


def test_the_histogram_shows_outliers_and_registers(browser: Browser, faulty_page: Any) -> None:
    with open_page(browser, faulty_page[0]) as page:
        chart = page.locator("[data-chart=histogram]")
        assert chart.locator(".beyond").count() >= 1 and chart.locator(".baseline").count() == 1
        expect(chart.locator(".mode")).to_contain_text("Second mode: 6.25% of the patches")
        expect(chart.locator("output")).to_have_text("after layer 3 (the patches are not used)")
        assert chart.locator("path.g-registers").count() == 3
        chart.locator("input").fill("0")
        expect(chart.locator("output")).to_have_text("the embeddings")
        expect(chart.locator(".beyond").first).to_be_visible()


def test_equal_registers_have_cosine_1(browser: Browser, faulty_page: Any) -> None:
    between = faulty_page[2].findings.between_tokens
    with open_page(browser, faulty_page[0]) as page:
        chart = page.locator("[data-chart=between_tokens]")
        assert chart.locator(".inside").all_text_contents() == [f"{value:.2f}" for value in between[-1].flatten()]
        assert chart.locator(".inside").all_text_contents()[1 * 4 + 3] == "1.00"
        chart.locator("input").fill("1")
        expect(chart.locator(".inside")).to_have_text([f"{value:.2f}" for value in between[1].flatten()])


# Appearance ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_light_and_dark_on_phones_and_desktops(browser: Browser, faulty_page: Any, scheme: str, width: int) -> None:
    """Text has a contrast of at least 4.5 to 1 with its background (WCAG)."""
    with open_page(browser, faulty_page[0], scheme, width) as page:
        is_dark = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.2
        assert is_dark == (scheme == "dark")
        for selector in ("h1", "main section > p", ".verdict .word", ".verdict p", ".answer", ".layout figcaption"):
            for element in page.locator(selector).all():
                assert element.evaluate(CONTRAST) >= 4.5, selector


# The contrast of an element's text with the first opaque background behind it.
CONTRAST = """(element) => {
    const parts = (colour) => {
        const canvas = new OffscreenCanvas(1, 1).getContext('2d');
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (colour) => {
        const [r, g, b] = parts(colour).map((part) => part / 255).map((part) =>
            part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    let behind = element;
    while (parts(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
    const both = [light(getComputedStyle(element).color), light(getComputedStyle(behind).backgroundColor)];
    return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
}"""


def luminance(colour: str) -> float:
    """Return the approximate luminance of `rgb(1, 2, 3)`, 0 to 1."""
    return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(", "))) / (3 * 255)


# Other models --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout(browser: Browser, tmp_path: Path, layout: dict[str, Any]) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**layout)))
    found = write_report(tmp_path / "report.html", model, build_processor(), build_pil_images())
    num_tokens = model.config.token_layout.num_prefix_tokens
    assert len(found.verdicts) == len(found.depth) == num_tokens
    with open_page(browser, tmp_path / "report.html") as page:
        grid = page.locator('[data-maps="0"] .grid .cell')
        assert grid.count() == 3 * num_tokens + 2 * 2  # rollout and two layers; patch features in two layers
        assert page.locator('[data-maps="0"] .overview .cell').count() == 2  # the input image, and attribution
        caption = page.locator(".layout figcaption").inner_text()
        assert ("no CLS token" in caption) == (model.config.num_cls_tokens == 0)
        assert ("no other special token" in caption) == (num_tokens == 0)
        charts = page.locator("[data-chart]").evaluate_all("(all) => all.map((one) => one.dataset.chart)")
        assert ("entropy" in charts) == (num_tokens > 0) and "patch_distance" in charts and "histogram" in charts
        assert ("between_tokens" in charts) == (num_tokens > 1)


def test_several_tasks(browser: Browser, tmp_path: Path) -> None:
    model = randomize(ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=TASKS)))
    labels = [{"species": 1, "age": -100}, {"species": 0, "age": 1}, {"species": -100, "age": -100}]
    found = write_report(tmp_path / "report.html", model, build_processor(), build_pil_images(), labels=labels)
    assert found.accuracy is not None
    with open_page(browser, tmp_path / "report.html") as page:
        text = page.locator(".image > summary").first.inner_text()
        assert "age: " in text and "species: " in text and "true label species LABEL_1" in text
        assert page.locator('[data-maps="0"] .overview .cell').count() == 3  # attribution for each task
        assert page.locator('[data-maps="0"] .grid .token').all_inner_texts()[2:] == ["CLS age", "CLS species"]


def test_several_labels(browser: Browser, tmp_path: Path) -> None:
    fields = {"problem_type": "multi_label_classification", "num_register_tokens": 1}
    model = randomize(ViTCLSForImageClassification(build_tiny_config(**fields)))
    labels = [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    found = write_report(tmp_path / "report.html", model, build_processor(), build_pil_images(), labels=labels)
    with torch.no_grad():
        chosen = (model(build_pixels()).logits > 0).float()
    assert found.accuracy == pytest.approx((chosen == torch.tensor(labels)).float().mean().item())
    with open_page(browser, tmp_path / "report.html") as page:
        assert page.locator("h1").inner_text() == "ViTCLSForImageClassification"  # not from a folder
        assert page.locator("summary strong").first.inner_text() == "image 1"
        assert "true label LABEL_0, LABEL_2" in page.locator(".image > summary").first.inner_text()


@pytest.mark.parametrize("model_class", [ViTCLSModel, ViTCLSForMaskedImageModeling])
def test_without_a_classifier(browser: Browser, tmp_path: Path, model_class: type) -> None:
    model = randomize(model_class(build_tiny_config(num_register_tokens=1)))
    found = write_report(tmp_path / "report.html", model, build_processor(), build_pil_images(), labels=[0, 1, 2])
    assert found.effects is None and found.accuracy is None
    assert {verdict.word for verdict in found.verdicts} == {"not judged"}  # of three images
    with open_page(browser, tmp_path / "report.html") as page:
        assert "no classifier" in page.locator(".layout figcaption").inner_text()
        assert "cosine distance, cls" in page.locator("#effects thead").inner_text()
        assert page.locator(".used").count() == 0
        assert page.locator('[data-maps="0"] .overview .cell').count() == 1  # only the input image


def test_differential_attention_has_two_maps_per_head(browser: Browser, tmp_path: Path) -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config(attention_type="differential")))
    write_report(tmp_path / "report.html", model, build_processor(), build_pil_images())
    with open_page(browser, tmp_path / "report.html") as page:
        options = page.locator("#head option").all_inner_texts()
        assert len(options) == 1 + 2 * 2 and options[2] == "head 1, second map"


def test_images_of_several_sizes(tmp_path: Path) -> None:
    """The processor keeps proportions, so statistics use batches of one shape."""
    keeps = build_processor(do_center_crop=False, size={"shortest_edge": 32})
    found = write_report(tmp_path / "report.html", build_classifier(), keeps, build_pil_images(), labels=[0, 1, 2])
    assert found.findings.num_images == 3
    assert [tuple(reading.attention.shape[-2:]) for reading in found.image_reports] == [(4, 6), (6, 4), (4, 4)]


@pytest.mark.slow
def test_single_heads_are_omitted_from_large_pages(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_data, "MAX_MAP_BYTES", 100)
    write_report(tmp_path / "report.html", build_classifier(), build_processor(), build_pil_images())
    with open_page(browser, tmp_path / "report.html") as page:
        assert page.locator("#head option").count() == 1 and page.locator("#head-choice").is_hidden()
        assert page.locator(".maps .quiet").count() == 0
        find_cell(page, "register 3, layer 3").click()
        expect(page.locator("#enlarged-title")).to_contain_text(re.compile("^register 3, layer 3, mean of the heads"))


def test_single_heads_of_the_first_images_are_kept(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_data, "MAX_MAP_BYTES", 2 * 3 * 2 * 4 * 16)  # of two images
    write_report(tmp_path / "report.html", build_classifier(), build_processor(), build_pil_images())
    with open_page(browser, tmp_path / "report.html") as page:
        assert page.locator("#head option").count() == 3
        assert page.locator(".maps .quiet").count() == 1
        assert "omitted for this image" in page.locator('[data-maps="2"] .quiet').text_content()


def test_printing_keeps_colors_and_hides_tooltips(browser: Browser, faulty_page: Any) -> None:
    with open_page(browser, faulty_page[0]) as page:
        page.evaluate("tip.show(9, 9, ['a value'])")
        page.emulate_media(media="print")
        expect(page.locator("#tip")).to_be_hidden()
        assert page.locator(".square").first.evaluate("(one) => getComputedStyle(one).printColorAdjust") == "exact"


@pytest.mark.slow
def test_the_header_contains_the_actual_number_of_patches(browser: Browser, tmp_path: Path) -> None:
    """The image processor determines the number, not the model's image size."""
    wide = build_processor(do_center_crop=False, size={"height": 48, "width": 64})
    found = write_report(tmp_path / "report.html", build_classifier(), wide, build_pil_images())
    with open_page(browser, tmp_path / "report.html") as page:
        assert "48 patches" in page.locator(".sequence").inner_text()
        assert "6 × 8 of 8 × 8 pixels" in page.locator(".sequence").inner_text()
    assert build_page_header(found, None, None)["num_patches"] == "48"
    keeps = build_processor(do_center_crop=False, size={"shortest_edge": 32})
    several = build_page_header(inspect_model(build_classifier(), keeps, build_pil_images()), None, None)
    assert several["num_patches"] == "16 to 24" and several["grid"] == "4 × 4, 4 × 6, 6 × 4"


# Predictions ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}], ids=["1", "8"])
def test_labels_are_predicted_from_one_half(browser: Browser, tmp_path: Path, fields: dict[str, Any]) -> None:
    """As in scripts/predict.py. Without any predicted label, the page explains the most probable one."""
    model = build_classifier(**fields)
    with torch.no_grad():
        largest = model(build_pixels()).logits.amax(dim=1)
        model.classifier.bias -= largest.sort().values[:2].mean()  # no label for the image with the lowest probability
    expected = predict(model, build_processor(), build_pil_images())
    found = write_report(tmp_path / "report.html", model, build_processor(), build_pil_images())
    predicted = [[name for name, _ in reading.predictions[0].labels] for reading in found.image_reports]
    assert predicted == [row["labels"] for row in expected] and [] in predicted and any(predicted)
    nothing = predicted.index([])
    with open_page(browser, tmp_path / "report.html") as page:
        assert "nothing" in page.locator(".image > summary").nth(nothing).inner_text()
        explained = page.locator(f'[data-maps="{nothing}"] .overview').text_content()
        assert f"attribution of {found.image_reports[nothing].predictions[0].top_label}" in str(explained)


def test_one_label_is_correct_if_it_is_predicted_and_true(tmp_path: Path) -> None:
    """Accuracy and predictions use the same rule, for labels 0.0 and 1.0."""
    model = build_classifier(num_labels=1)
    with torch.no_grad():
        model.classifier.bias -= model(build_pixels()).logits.mean()
        holds = (model(build_pixels()).logits > 0).float()  # [3, 1]
    assert 0 < holds.sum() < 3
    found = write_report(tmp_path / "report.html", model, build_processor(), build_pil_images(), labels=holds.tolist())
    assert found.accuracy == 1
    for reading in found.image_reports:
        assert reading.truth == (reading.predictions[0].labels[0][0] if reading.predictions[0].labels else "nothing")
    assert (tmp_path / "report.html").read_text().count("✓ correct") == 3


# Converted models ----------------------------------------------------------------------------------------------------

FAMILIES = (
    "vit classifier, deit distilled, registers classifier, dinov3, siglip classifier, clip classifier, beit classifier"
).split(", ")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_converted_families(name: str, tmp_path: Path) -> None:
    """Check families of transformers, with random weights."""
    model = convert_from_transformers(CASES[name].build()).eval()
    height, width = model.config.image_height_width
    resizing = ViTCLSImageProcessor(size={"height": height, "width": width})
    found = write_report(tmp_path / "report.html", model, resizing, build_pil_images(), names=NAMES, labels=[0, 1, 2])
    is_encoder = type(model) is ViTCLSModel
    assert len(found.verdicts) == model.config.token_layout.num_prefix_tokens
    assert (found.effects is None) == (found.accuracy is None) == is_encoder == (name == "dinov3")
    for reading in found.image_reports:
        assert len(reading.attributions) == (0 if is_encoder else 1)
        for maps in (reading.attention, reading.rollout, *reading.attributions):
            assert (bool(maps.isfinite().all()) and bool((maps >= 0).all()) and maps.sum() > 0) or maps.numel() == 0
    text = (tmp_path / "report.html").read_text()
    assert all(token in text for token in get_token_names(model.config)) and text.rstrip().endswith("</html>")


# Python --------------------------------------------------------------------------------------------------------------


def test_a_page_from_existing_results(tmp_path: Path, faulty_page: Any) -> None:
    """Nothing is measured again. Only the time differs."""
    file, _, found = faulty_page
    write_page(tmp_path / "new" / "folders" / "again.html", found, source="a test")
    assert "16 images of a test, accuracy" in file.read_text()
    texts = [re.sub(r"<dt>created</dt>.*", "", one.read_text()) for one in (file, *tmp_path.rglob("again.html"))]
    assert texts[0] == texts[1]


def test_the_header_of_images_of_several_sizes(faulty_page: Any) -> None:
    found = faulty_page[2]

    def build_header(*grids: tuple[int, int]) -> tuple[str, str | None]:
        report = found.image_reports[0]
        reports = [replace(report, rollout=torch.zeros(4, *grid)) for grid in grids]
        header = build_page_header(replace(found, image_reports=reports), None, None)
        return header["num_patches"], header["grid"]

    assert build_header((4, 6), (4, 6)) == ("24", "4 × 6")
    assert build_header((4, 6), (6, 4)) == ("24", "4 × 6, 6 × 4")
    assert build_header((6, 6), (4, 4), (4, 6)) == ("16 to 36", "4 × 4, 4 × 6, 6 × 6")
    assert build_header((6, 6), (4, 4), (4, 6), (2, 2)) == ("4 to 36", None)
    assert build_header() == ("16", "4 × 4")  # of the configuration


def test_the_header_names_the_model_and_its_commit(
    faulty_page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--ann--small-vit" / "snapshots" / commit
    run = tmp_path / "runs" / "mine"
    for folder in (snapshot, run):
        folder.mkdir(parents=True)

    def build_header(source: str, title: str | None = None, commit_hash: str | None = None) -> tuple[str, str | None]:
        config = copy.deepcopy(faulty_page[2].config)
        config.name_or_path, config._commit_hash = source, commit_hash
        header = build_page_header(replace(faulty_page[2], config=config), title, "a test")
        assert header["source"] == "a test"
        return header["title"], header["commit"]

    assert build_header(str(snapshot)) == ("ann/small-vit", commit)
    assert build_header(str(run)) == ("mine", None)
    monkeypatch.chdir(run)
    assert build_header(".") == ("mine", None)
    assert build_header("ann/vit", commit_hash=commit) == ("ann/vit", commit)
    assert build_header("") == ("ViTCLSForImageClassification", None)
    assert build_header(str(run), "my model") == ("my model", None)


def test_selected_images_are_grouped_by_kind(faulty_page: Any, tmp_path: Path) -> None:
    """Without a browser. Other images have no kind and no filter."""
    found, headings = faulty_page[2], ("wrong predictions", "least confident", "typical")
    assert not any(heading in faulty_page[0].read_text() for heading in headings)
    kinds = ("wrong", "typical", "typical")
    reports = [replace(report, kind=kind) for report, kind in zip(found.image_reports, kinds, strict=True)]
    write_page(tmp_path / "report.html", replace(found, image_reports=reports))
    text = (tmp_path / "report.html").read_text()
    assert '<option value="wrong">wrong predictions</option><option value="typical">typical</option>' in text
    assert re.findall(r'<span class="truth">([a-z ]+)</span>', text) == ["wrong predictions", "typical", "typical"]


def test_only_tokens_that_a_head_uses_are_marked(faulty_page: Any) -> None:
    names = ["register 1", "register 2", "register 3"]
    for has_head in (True, False):
        layout = build_layout(faulty_page[2].config, has_head)
        expected = {"cls": [("CLS", has_head)], "registers": [(name, False) for name in names]}
        assert layout == expected | {"patches": [("patches", False)]}


def test_the_table_of_effects(faulty_page: Any) -> None:
    found = faulty_page[2]

    def build_table(effect: Any, **null_effects: list[float]) -> dict[str, str]:
        """Return the first row of the table, with this effect, by column."""
        changed = {
            kind: {key: Ablation(effect, effect.size, **null_effects) for key in ablations}
            for kind, ablations in found.ablations.items()
        }
        table = build_effect_table(replace(found, ablations=changed))
        assert len(table["rows"]) == 2 * 5
        assert table["rows"][-2][:2] == ["all 3 registers", "information: replaced with their means"]
        return dict(zip(table["header"], table["rows"][0], strict=True))

    effect = AblationEffect(0.25, 0.123, -0.0625, 16, (0.1, 0.5), (0.05, 0.2))
    assert build_table(effect, patch_effects=[0.3, 0.01, 0.2], redrawn_effects=[0.4, 0.5]) == {
        "token": "CLS",
        "ablation": "information: replaced with its mean",
        "changed predictions": "4 of 16 (at most 50.0%)",
        "logit change / standard deviation over images": "0.12",
        "95% interval": "0.05 to 0.2",
        "null: random patches": "0.01 to 0.3",
        "null: random tokens": "0.4 to 0.5",
        "accuracy change, percentage points": "-6.2",
    }
    unknown = build_table(replace(effect, accuracy_change=None))
    assert "accuracy change, percentage points" not in unknown and unknown["null: random patches"] == ""
    features = FeatureEffect({"cls": 0.5, "patches": 0.25}, 0.75, 16, (0.4, 0.6))
    encoder = build_table(features)
    assert (encoder["cosine distance, cls"], encoder["cosine distance, patches"]) == ("0.5", "0.25")
    assert (encoder["same nearest neighbors"], encoder["95% interval"]) == ("75%", "0.4 to 0.6")
    assert "same nearest neighbors" not in build_table(replace(features, knn_agreement=None))
    assert build_table(replace(features, knn_agreement=0.0))["same nearest neighbors"] == "0%"


def test_the_table_of_patch_sizes() -> None:
    native = PatchSizeRow((8, 4), True, (4, 8), 1033, 1.2345, 0.1, 0.5678, "a CPU", 200, None, 1.0, "")
    other = replace(native, patch_size=8, is_native=False, grid=(4, 4), sequence_length=17, agreement=0.9375)
    assert build_patch_size_table([native, other])["header"] == [
        "patch",
        "tokens",
        "GFLOPs per image",
        "ms per image",
        "same predictions",
    ]
    assert build_patch_size_table([native, other])["rows"] == [
        ["8 x 4 (the model's own)", "1,033", "1.23", "0.568", "100.0%"],
        ["8", "17", "1.23", "0.568", "93.8%"],
    ]
    known = build_patch_size_table([native, replace(other, accuracy=0.5)])
    assert [row[4] for row in known["rows"]] == ["", "50.0%"] and known["header"][4] == "accuracy"
    assert len(known["sentences"]) > 1
    assert build_patch_size_table([]) == {"header": [], "rows": [], "sentences": []}


def test_unknown_arguments_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="lables"):
        write_report(
            tmp_path / "report.html", build_classifier(), build_processor(), build_pil_images(), lables=[0, 1, 2]
        )


def test_statistics_over_other_images(tmp_path: Path) -> None:
    found = write_report(
        tmp_path / "report.html",
        build_classifier(),
        build_processor(),
        build_pil_images()[:1],
        statistics_images=build_pil_images(),
        statistics_labels=[0, 1, 2],
        batch_size=2,
    )
    assert found.findings.num_images == 3 and len(found.image_reports) == 1 and found.accuracy is not None


def test_figures_for_programs(tmp_path: Path, faulty_page: Any) -> None:
    *_, found = faulty_page
    config = copy.deepcopy(found.config)
    config.name_or_path, config._commit_hash = "ann/vit", "0123456789" * 4
    write_json_values(tmp_path / "named.json", replace(found, config=config))
    text = (tmp_path / "named.json").read_text()
    assert (json.loads(text)["model"], json.loads(text)["commit"]) == ("ann/vit", config._commit_hash)
    assert text.endswith("}\n")
    write_json_values(tmp_path / "figures.json", found, "mine")
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["model"] == "mine" and figures["diagnosis"] == found.summary
    assert [token["token"] for token in figures["tokens"]] == get_token_names(found.config)
    for token, verdict in zip(figures["tokens"], found.verdicts, strict=True):
        assert (token["diagnosis"], token["statement"]) == (verdict.word, verdict.reason)
        assert token["interval"][0] <= token["effect"] <= token["interval"][1] and len(token["null"]) == 2
        assert token["presence"]["num_images"] == 16
    assert [group["token"] for group in figures["groups"]] == ["all 3 registers"]
    assert figures["patches"]["diagnosis"] == "artifacts" and figures["patches"]["second_mode"]["fraction"] == 0.0625
    assert sum(figures["patches"]["histogram"]["counts"]) == 16 * 16 == figures["patches"]["num_patches"]
    assert [verdict["word"] for verdict in figures["verdicts"]] == [verdict.word for verdict in found.verdicts]
    assert torch.tensor(figures["findings"]["entropy"]).allclose(found.findings.entropy, rtol=1e-3)
    assert set(figures["effects"]) == {"cls[0]", "registers[0]", "registers[1]", "registers[2]"}
    assert len(figures["findings"]["patch_norms"]["median"]) == 4
    assert [picture["truth"] for picture in figures["pictures"]] == ["LABEL_0", "LABEL_1", None]
    for picture, report in zip(figures["pictures"], found.image_reports, strict=True):
        (answer,) = picture["answers"]
        assert (picture["name"], answer["task"]) == (report.name, None)
        for (name, probability), (label, expected) in zip(answer["labels"], report.predictions[0].labels, strict=True):
            assert name == label and probability == pytest.approx(expected, rel=1e-4)
    assert (figures["commit"], figures["version"], figures["num_broken"]) == (None, __version__, 0)
    assert figures["depth"] == found.depth and figures["accuracy"] == found.accuracy
    omitted = {"mean_states", "patch_ratios", "patch_ratios_without_registers"}
    assert set(figures["findings"]) == set(vars(found.findings)) - omitted
    for name, check in found.map_checks.items():
        values = figures["map_checks"][name]
        assert (values["statement"], values["is_faithful"]) == (check.describe(name), check.is_faithful)
    for key, effect in found.effects.items():
        assert figures["effects"][key]["logit_change"] == pytest.approx(effect.logit_change, rel=1e-4)


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    model = build_classifier().train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    write_report(tmp_path / "report.html", model, build_processor(), build_pil_images())
    assert model.training and all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_one_image_is_not_sufficient_for_verdicts(tmp_path: Path) -> None:
    found = write_report(tmp_path / "report.html", build_classifier(), build_processor(), build_pil_images()[:1])
    assert {verdict.word for verdict in found.verdicts} == {"not judged"}


def test_errors_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    with raises_one_line("no images"):
        write_report(file, build_classifier(), build_processor(), [])
    grey = build_processor(do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
    warnings: list[str] = []
    with raises_one_line("None of the 1", "1 channel"):
        write_report(file, build_classifier(), grey, [build_pil_images()[0].convert("L")], on_warning=warnings.append)
    assert len(warnings) == 1 and "skipped an image" in warnings[0]
    damaged = build_classifier()
    with torch.no_grad():
        damaged.vitcls.embeddings.register_tokens.fill_(float("nan"))
    with raises_one_line("not finite"):
        write_report(file, damaged, build_processor(), build_pil_images())
    assert not file.exists()


def test_pages_are_written_atomically(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("")
    with pytest.raises(OSError, match="folder"):
        write_report(tmp_path / "folder" / "report.html", build_classifier(), build_processor(), build_pil_images())
    write_report(tmp_path / "new" / "report.html", build_classifier(), build_processor(), build_pil_images())
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["report.html"]
