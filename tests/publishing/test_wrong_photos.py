"""The wrong predictions of a run in the report and the card, from predictions.parquet."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.model_folders import write_predictions, write_results, write_run_folder
from helpers.photo_folders import write_files
from helpers.sample_photographs import photograph
from helpers.tiny_models import save_classifier
from numpy.random import default_rng
from playwright.sync_api import Browser, Page, expect
from pytest import MonkeyPatch
from scipy.special import softmax

from modeling_vitcls.data.images import DatasetImages, LabeledImages
from modeling_vitcls.evaluation.evaluator import read_predictions
from modeling_vitcls.frozen.curve import describe_learning_curve
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference.metrics import measure_one_label
from modeling_vitcls.inference.stated_result import Measurement, build_class_tables
from modeling_vitcls.publishing.labels_page import choose_doubtful
from modeling_vitcls.publishing.report import write_report
from modeling_vitcls.publishing.wrong_photos import (
    choose_photos,
    find_photos,
    summarize_predictions,
)


NAMES = ["dusk", "noon", "x"]
WRONG = {"pants and trousers, predicted as skirt", "=x, predicted as skirt"}
MEASURED = Measurement("", "accuracy", {"accuracy": 0.8, "num_images": 400})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a run with 400 predictions; the logits contain noise."""
    generator = default_rng(0)
    labels = generator.integers(0, 3, 400)
    logits = generator.normal(size=(400, 3)) + 2 * np.eye(3)[labels]
    probabilities = softmax(logits, axis=1)
    columns = {
        "index": range(400),
        "image": [f"dusk/photo {index}.jpg" for index in range(400)],
        "label": [NAMES[label] for label in labels],
        "prediction": [NAMES[index] for index in logits.argmax(axis=1)],
        "probabilities": list(probabilities),
        "loss": -np.log(probabilities[range(400), labels]),
    }
    target = write_run_folder(tmp_path / "mine")
    write_predictions(target, pd.DataFrame(columns))
    return target


CURVE = {
    "num_images": [32, 64],
    "accuracy": [0.66, 0.79],
    "gain": 0.13,
    "standard_error": 0.04,
}


@pytest.mark.parametrize("error", [0.04, 0.07])
def test_the_page_has_the_curve_only_if_the_run_says_that_more_photos_help(
    folder: Path, error: float
) -> None:
    findings = {"curve": CURVE | {"standard_error": error}}
    rows = read_predictions(ModelFolder(folder))
    summary = summarize_predictions(MEASURED, {"frozen": {"findings": findings}}, rows)
    said = describe_learning_curve(findings["curve"])
    assert bool(said) is (error == 0.04)
    assert summary["findings"].get("curve") == said


def test_the_headline_says_what_the_result_of_a_rare_class_is_worth(folder: Path) -> None:
    classes = [
        {"name": "dusk", "images": 20, "recall": 1.0},
        {"name": "x", "images": 3, "recall": 0.0},
    ]
    results = {"split": "cross-validation", "accuracy": 0.869565, "num_images": 23}
    results |= {"accuracy_interval": [0.678, 0.955], "per_class": classes}
    results |= {"balanced_accuracy": 0.5, "macro_f1": 0.465}
    rows = read_predictions(ModelFolder(folder)).head(23)
    rows = rows.assign(label=["dusk"] * 20 + ["x"] * 3, prediction="dusk")
    summary = summarize_predictions(Measurement("", "accuracy", results), results, rows)
    assert summary["measured"].statement == (
        "20 of 23 right (95%: 68 to 96%), no better than always saying dusk: 20 of 23"
    )
    assert "balanced accuracy 50%" in summary["classes"]
    assert "lowest recall 0% (x, measured on 3 of its photos: 10 or" in summary["classes"]


def test_the_wrong_images_with_the_largest_losses_come_first(folder: Path) -> None:
    rows = read_predictions(ModelFolder(folder))
    wrong = rows[rows["label"] != rows["prediction"]].sort_values("loss")
    shown = [row["image"] for row in summarize_predictions(MEASURED, {}, rows)["wrong"]]
    assert shown == wrong["image"].tolist()[:-7:-1]


def test_one_photo_of_each_kind_has_a_map(folder: Path) -> None:
    rows = read_predictions(ModelFolder(folder))
    images = LabeledImages(range(400), [None] * 400)
    chosen = choose_photos(
        rows, {name: (images, index) for index, name in enumerate(rows["image"])}, 3
    )
    assert [texts["kind"] for _, texts in chosen] == ["wrong", "uncertain", "typical"]


def test_a_name_of_several_images_is_not_found() -> None:
    assert (
        find_photos(LabeledImages(DatasetImages.from_list(["same.png", "same.png"]), [0, 1])) == {}
    )


def test_without_a_photo_that_is_found_no_label_is_asked_about(folder: Path) -> None:
    rows = read_predictions(ModelFolder(folder))
    assert choose_doubtful(rows.assign(group=0), {}) == []


@pytest.mark.parametrize("kind", ["several labels", "no images"])
def test_predictions_of_other_kinds_are_not_read(kind: str, folder: Path) -> None:
    few = pd.read_parquet(folder / "predictions.parquet").head(10)
    rows = {
        "several labels": few.assign(label=[["dusk"]] * 10),
        "no images": few.head(0),
    }
    write_predictions(folder, rows[kind])
    assert read_predictions(ModelFolder(folder)) is None


def test_predictions_before_the_weights_were_replaced_are_not_read(folder: Path) -> None:
    save_classifier(folder)
    write_results(folder)  # of the new weights
    assert read_predictions(ModelFolder(folder)) is None


# The page -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(module_path: Path) -> Path:
    """Write the report of a cross-validated run with names of 60 characters; every second photo is wrong."""
    kinds = ["pants and trousers", "skirt", "=x"]
    names = []
    for kind in kinds:
        for number in range(8):
            stem = f"WhatsApp Image 2026-05-12 at 14.30.{number:02}"
            names.append(f"{kind}/{stem:_<55}.jpeg")
            write_files(module_path / "photos", names[-1])
            left = 20 * len(names)
            photo = photograph("china.jpg").crop((left, 0, left + 80, 60))
            photo.save(module_path / "photos" / names[-1])
    labels = np.repeat([0, 1, 2], 8)
    predictions = np.where(np.arange(24) % 2, 1, labels)
    run = write_run_folder(
        module_path / "run",
        {
            "split": "cross-validation",
            **measure_one_label(kinds, np.eye(3)[predictions], labels),
            "frozen": {
                "num_folds": 5,
                "findings": {"curve": CURVE},
                "scenes": {"pairs": [[names[0], names[8]], names[1:3]]},
            },
        },
        {"dataset": str(module_path / "photos"), "held_out_fraction": 0},
    )
    rows = {
        "image": names,
        "label": [kinds[label] for label in labels],
        "prediction": [kinds[prediction] for prediction in predictions],
        "probabilities": [[0.1, 0.9, 0.0]] * len(names),
        "loss": [-np.log(0.1)] * len(names),
        "group": [*range(8), 0, *range(9, 24)],
    }
    write_predictions(run, pd.DataFrame(rows))
    with MonkeyPatch.context() as patch:
        patch.setattr("modeling_vitcls.publishing.report.NUM_MEASURED_IMAGES", 8)
        write_report(ModelFolder(run))
    return run / "report.html"


@pytest.fixture
def page(browser: Browser, report: Path) -> Page:
    page = browser.new_page()
    page.goto(report.as_uri())
    return page


def test_the_page_fits_with_long_names_and_open_sheets(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    for width in (390, 800, 1366, 1920):
        page.set_viewport_size({"width": width, "height": 768})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        rights = page.locator("#wrong figure").evaluate_all(
            "figures => figures.map(figure => figure.getBoundingClientRect().right)"
        )
        assert len(rights) == 6
        assert max(rights) <= width
        hidden = page.locator("figcaption span, .pair span, .name").evaluate_all(
            "all => all.map(each => each.scrollWidth - each.clientWidth)"
        )
        assert max(hidden) <= 0


def test_the_page_shows_six_wrong_photos_and_says_what_it_measured(page: Page) -> None:
    assert "These are 6 of 8." in page.locator("#wrong").inner_text()
    wrong = page.locator("#wrong figure")
    assert wrong.count() == 6
    names = wrong.locator("> img").evaluate_all("all => all.map(each => each.alt)")
    assert set(names) == WRONG
    assert "measured on 8 of the 24 images" in page.locator("#about").inner_text()


def test_the_page_says_what_more_photos_brought(page: Page) -> None:
    text = "more photos would help: 66% with 32, 79% with 64 training photos."
    assert page.get_by_text(text).is_visible()


def test_the_page_shows_pairs_of_photos_that_nearly_repeat_each_other(page: Page) -> None:
    pairs = page.locator("#scenes figure").evaluate_all(
        "all => all.map(figure => [...figure.querySelectorAll('img')].map(each => each.alt))"
    )
    assert pairs == [["pants and trousers", "skirt"], ["pants and trousers"] * 2]


def test_only_a_pair_with_two_labels_shows_the_names_of_its_photos(page: Page) -> None:
    texts = page.locator("#scenes .pair").all_inner_texts()
    assert ["WhatsApp" in text for text in texts] == [True, False]


@pytest.mark.parametrize(("width", "has_more"), [(200, True), (1366, False)])
def test_a_table_says_that_it_continues_to_the_right_only_if_it_does(
    page: Page, width: int, has_more: bool
) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.wait_for_timeout(100)  # The state of scrolling is known after a frame
    states = page.locator(".wide").evaluate_all(
        "all => all.map(each => [each.scrollWidth > each.clientWidth,"
        " getComputedStyle(each.firstElementChild, '::before').content != 'none'])"
    )
    assert all(says == continues for continues, says in states)
    assert any(says for _, says in states) is has_more


@pytest.fixture
def labels(page: Page) -> Page:
    """Open the page that asks about labels."""
    page.locator("header a").click()
    return page


def test_labels_are_asked_about_those_of_one_scene_first(labels: Page) -> None:
    questions = labels.evaluate("questions")
    doubtful = [each["image"] for each in questions if each["chosen"] == "contradicted"]
    assert {Path(image).parent.name for image in doubtful[:2]} == {"pants and trousers", "skirt"}
    assert (len(doubtful), len(questions)) == (10, 13)


def test_a_photo_is_answered_before_its_label_and_the_models_answer_are_shown(
    labels: Page,
) -> None:
    photo = labels.locator("figure[data-checksum]:visible")
    checksum = photo.get_attribute("data-checksum")
    assert photo.locator("img").get_attribute("alt") == "Photo 1 of 13"
    expect(labels.locator("#said")).to_be_empty()
    assert "WhatsApp" not in labels.locator("body").inner_text()
    labels.locator('button[data-label=""]').click()
    said = re.compile("Photo 1: label .+, model .+, you: none of these. Changed.")
    expect(labels.locator("#said")).to_have_text(said)
    assert photo.get_attribute("data-checksum") != checksum


def test_saved_answers_survive_a_reload(labels: Page) -> None:
    labels.locator('button[data-label="=x"]').click()
    labels.keyboard.press("0")
    labels.reload()
    labels.locator("#keep").click()
    with labels.expect_download() as download:
        labels.locator("button#save").click()
    rows = pd.read_csv(download.value.path(), keep_default_na=False)
    assert list(rows) == "checksum image label before chosen time".split()
    # A formula as spreadsheets must see it; none of the classes; a kept label
    assert rows["label"].tolist() == ["'=x", "", rows["before"][2]]
    assert rows["time"].is_monotonic_increasing


@pytest.mark.parametrize("stored", ["5", '"text"', "[1]", "{broken", "answers of numbers"])
def test_what_another_page_has_stored_does_not_stop_the_page(labels: Page, stored: str) -> None:
    """All pages that are files of this computer may share one storage."""
    labels.evaluate(
        "stored => localStorage.setItem(key, stored === 'answers of numbers'"
        " ? JSON.stringify({[questions[0].checksum]: 5}) : stored)",
        stored,
    )
    labels.reload()
    labels.keyboard.press("1")
    expect(labels.locator("#count")).to_contain_text("1 of 13")


def test_the_model_that_knows_a_photo_does_not_explain_a_mistake_about_it(page: Page) -> None:
    assert page.locator("#photos summary .quiet:not(.name)").all_inner_texts() == [
        "· least confident",
        "· typical",
    ]
    for caption in page.locator("#photos summary strong").all_inner_texts():
        label, prediction = caption.removeprefix("▸ ").split(" → ")
        assert label == prediction
    assert "cannot explain the mistakes" in page.locator("#photos").inner_text()


def test_a_class_that_is_only_predicted_has_a_row() -> None:
    """Its F1 is 0, and a part of the mean."""
    tables = build_class_tables(measure_one_label(["a", "b"], np.eye(2), np.zeros(2, int)))
    ((_, row),) = tables.values()
    assert (row["Right"], row["F1"]) == ("0 of 0", "0%")


def test_all_classes_for_which_a_class_is_taken_most_often_are_named() -> None:
    metrics = measure_one_label(
        ["a", "b", "c", "d"], np.eye(4)[[1, 2, 3, 1, 1]], np.r_[0, 0, 0, 1, 2]
    )
    (rows,) = build_class_tables(metrics).values()
    assert {row["Class"]: row["Most often taken for"] for row in rows} == {
        "a": "b, c and 1 more (1 each)",
        "b": "–",
        "c": "b (1)",
        "d": "–",
    }


def test_of_200_classes_those_with_most_wrong_predictions_are_listed() -> None:
    names = [f"class {index:03}" for index in range(200)]
    predictions = np.r_[:200, :150, :50]
    metrics = measure_one_label(names, np.eye(200)[predictions], np.r_[:200, :200])
    (table,) = build_class_tables(metrics).values()
    assert [row["Class"] for row in table] == names[150:180]
    assert {row["Right"] for row in table} == {"1 of 2"}
    assert table[0]["Most often taken for"] == "class 000 (1)"
