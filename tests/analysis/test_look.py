"""The command `vitcls look` and the function `look`: files, and legible sheets."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.command_in_process import check_error, fail, run_here
from helpers.photo_folders import write_files
from helpers.sample_photographs import photograph
from helpers.tiny_models import (
    LAYOUTS,
    PROCESSOR,
    build_tiny_config,
    edit_config,
    raises_one_line,
    randomize,
    save_encoder,
    save_with_processor,
)
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from playwright.sync_api import Browser
from pytest import CaptureFixture, LogCaptureFixture, MonkeyPatch, approx

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    look,
)
from modeling_vitcls.analysis import look as look_module
from modeling_vitcls.analysis.look import draw_sheet
from modeling_vitcls.analysis.photo import measure_photo
from modeling_vitcls.analysis.sheet import Sheet, build_sheet
from modeling_vitcls.analysis.token_use import find_token_use


@pytest.fixture(scope="module")
def model(module_path: Path) -> str:
    return str(save_encoder(module_path, num_register_tokens=2))


@pytest.fixture
def photo(tmp_path: Path) -> str:
    photograph("china.jpg").save(tmp_path / "china.jpg")
    return str(tmp_path / "china.jpg")


def show(model: Any, processor: Any = PROCESSOR) -> Sheet:
    return build_sheet(
        measure_photo(randomize(model), processor, photograph("flower.jpg"), find_token_use(model))
    )


# Files --------------------------------------------------------------------------------------------


def test_a_folder_gives_one_sheet_per_photo_and_names_broken_files(
    model: str, photo: str, tmp_path: Path, capsys: CaptureFixture
) -> None:
    write_files(tmp_path / "photos", "a/same.jpg", "b/same.jpg", content=Path(photo).read_bytes())
    write_files(tmp_path / "photos", "broken.png")
    assert run_here("look", tmp_path / "photos", "--model", model, "-o", tmp_path / "sheets") == 0
    assert {file.name for file in (tmp_path / "sheets").iterdir()} == {"same.html", "same-2.html"}
    assert "broken.png" in capsys.readouterr().err
    for sheet in (tmp_path / "sheets").iterdir():
        assert "same.jpg</h1>" in sheet.read_text(encoding="utf-8")


def test_several_photos_do_not_overwrite_one_file(model: str, photo: str, tmp_path: Path) -> None:
    photograph("flower.jpg").save(tmp_path / "flower.jpg")
    photos = [photo, tmp_path / "flower.jpg"]
    assert run_here("look", *photos, "--model", model, "-o", tmp_path / "out.webp") == 0
    assert {file.name for file in tmp_path.glob("*.webp")} == {"out-china.webp", "out-flower.webp"}


def test_a_folder_without_readable_photos_is_an_error(
    model: str, tmp_path: Path, capsys: CaptureFixture
) -> None:
    write_files(tmp_path, "a.png", "b.png")
    assert run_here("look", tmp_path, "--model", model, "-o", tmp_path / "out") == 1
    check_error(capsys, "error: none of the 2 photos")


@pytest.mark.parametrize(
    "flags",
    [
        ("p.png", "-o", "sheet.pdf"),
        ("p.png", "--image-size", "0"),
        (),
    ],
)
def test_unusable_flags_are_reported_before_the_model_is_loaded(flags: tuple[str, ...]) -> None:
    fail("look", *flags, "--model", "no/such/model", status=2)


# Sheets -------------------------------------------------------------------------------------------


MANY_HEADS = {"hidden_size": 96, "num_attention_heads": 24, "num_hidden_layers": 3}
LONG_NAMES = {"tasks": {"species": 4, "a_long_name_of_a_task": 2}, "num_cls_tokens": 2}
SEVERAL_TOKENS = {"num_register_tokens": 2, "num_distillation_tokens": 1}


@pytest.mark.parametrize(
    "fields",
    [LAYOUTS["no_cls"], MANY_HEADS, LONG_NAMES | SEVERAL_TOKENS],
    ids=["no_cls", "many_heads", "several_tokens"],
)
def test_no_text_of_an_image_covers_a_tile_or_another_text_or_is_cut_off(
    fields: dict[str, Any], monkeypatch: MonkeyPatch
) -> None:
    figures: list[Figure] = []

    def keep_figure(figure: Figure) -> FigureCanvasAgg:
        figures.append(figure)
        return FigureCanvasAgg(figure)

    monkeypatch.setattr("modeling_vitcls.analysis.look.FigureCanvasAgg", keep_figure)
    model_class = (
        ViTCLSForMultiTaskClassification if "tasks" in fields else ViTCLSForImageClassification
    )
    # a part of the photo is hidden
    processor = ViTCLSImageProcessor(size=40, do_center_crop=True, crop_size=32)
    sheet = show(model_class(build_tiny_config(**fields)), processor)
    draw_sheet(sheet, "model · " + "photo" * 30)

    (figure,) = figures
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    boxes = [text.get_window_extent().padded(-2) for text in texts]
    for text in texts:
        text.set_visible(False)
    figure.canvas.draw()
    picture = np.asarray(figure.canvas.buffer_rgba())  # without texts
    for box in boxes:
        assert box.x0 >= 0, box
        assert box.x1 <= picture.shape[1], box
        assert box.y0 >= 0, box
        assert box.y1 <= len(picture), box
        top = len(picture) - round(box.y1)
        bottom = len(picture) - round(box.y0)
        assert (picture[top:bottom, round(box.x0) : round(box.x1)] == 255).all(), box
        assert box.count_overlaps(boxes) == 1, box  # only itself


def test_every_tile_of_a_page_is_within_reach_and_names_are_text(
    photo: str, tmp_path: Path, browser: Browser
) -> None:
    name = "蝴蝶 🐝 ผีเสื้อ, a name that is longer than its tile, <b>not bold</b>"
    config = build_tiny_config(
        id2label={0: name, 1: "x", 2: "y"}, num_hidden_layers=5, **SEVERAL_TOKENS
    )
    model = ViTCLSForImageClassification(config)
    folder = save_with_processor(model, tmp_path / "model")
    assert run_here("look", photo, "--model", folder, "-o", tmp_path / "sheet.html") == 0

    page = browser.new_page()
    page.goto((tmp_path / "sheet.html").as_uri())
    assert name in page.locator("main").inner_text()
    for width in (390, 800, 1920):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        boxes = page.locator(".tile").evaluate_all(
            "all => all.map(tile => [tile.getBoundingClientRect().right, tile.scrollWidth - tile.clientWidth])"
        )
        # 4 tiles on top, one for each label; of the 4 tokens, the mean, 2 heads and 5 layers; and patches
        assert len(boxes) == 4 + 3 + 4 * (1 + 2 + 5) + 2 * 5
        assert max(right for right, _ in boxes) <= width
        assert {hidden for _, hidden in boxes} == {0}
    page.close()


def test_the_function_returns_and_writes_the_image_of_the_command(
    model: str, photo: str, tmp_path: Path
) -> None:
    assert (
        run_here("look", photo, "--model", model, "-o", tmp_path / "out.png", "--image-size", "64")
        == 0
    )
    sheet = look(model, photo, image_size=64, output=tmp_path / "mine.png")
    for name in ("out.png", "mine.png"):
        assert np.array_equal(np.asarray(sheet), np.asarray(Image.open(tmp_path / name)))
    with raises_one_line("`output`", ".png"):
        look(model, photo, output="sheet.pdf")


def test_characters_that_the_font_lacks_are_one_line(
    model: str, photo: str, tmp_path: Path, caplog: LogCaptureFixture
) -> None:
    look(model, shutil.copy(photo, tmp_path / "\ue123.jpg"))
    assert "`output='sheet.html'`" in caplog.text


@pytest.fixture
def measured_only(monkeypatch: MonkeyPatch) -> None:
    """Let `look` return the measurements instead of a sheet."""
    monkeypatch.setattr(look_module, "build_sheet", lambda measurements, is_trained: measurements)
    monkeypatch.setattr(look_module, "draw_sheet", lambda measurements, title: measurements)


@pytest.mark.usefixtures("measured_only")
def test_the_image_size_sets_the_number_of_patches(model: str, photo: str) -> None:
    found = look(model, photo, image_size=(48, 64), resize="crop")
    assert found.input_size == (48, 64)
    assert found.norms.shape[1:] == (6, 8)
    left, top, right, bottom = found.visible_region
    assert (right - left) / (bottom - top) == approx(64 / 48, rel=0.01)


@pytest.mark.usefixtures("measured_only")
def test_an_array_and_a_tensor_are_measured_like_the_photo(model: str) -> None:
    pixels = np.asarray(photograph("china.jpg"))
    expected = look(model, photograph("china.jpg")).maps
    assert torch.equal(look(model, pixels).maps, expected)
    assert torch.equal(look(model, torch.tensor(pixels)).maps, expected)
    with raises_one_line("list"):
        look(model, [pixels])


def test_a_photo_of_one_column_has_a_sheet(model: str) -> None:
    sheet = look(model, Image.new("RGB", (1, 1000)))
    assert sheet.width == 1800
    assert sheet.height < 20_000


def test_gray_models_take_color_photos(tmp_path: Path) -> None:
    gray = ViTCLSImageProcessor(size=32, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5])
    model = ViTCLSModel(build_tiny_config(num_channels=1))
    folder = save_with_processor(model, tmp_path, gray)
    assert look(folder, photograph("china.jpg").convert("L")).width == 1800


def test_a_photo_of_twelve_bits_is_as_bright_as_the_model_sees_it(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path)
    edit_config(folder, "preprocessor_config.json", bit_depth=12)
    values = np.asarray(photograph("china.jpg").convert("L"), dtype=np.uint16) * 16
    photo = tmp_path / "scan.png"
    Image.fromarray(values).save(photo)
    bright = np.asarray(look(folder, Image.fromarray((values // 16).astype(np.uint8))), float)
    assert np.abs(np.asarray(look(folder, photo), float) - bright).mean() < 1
