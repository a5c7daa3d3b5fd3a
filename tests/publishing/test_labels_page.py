"""The page on which a person says what photos show, in a real browser."""

import csv
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from helpers.photo_folders import draw_noise
from playwright.sync_api import Browser, Page, expect

from modeling_vitcls.publishing.labels_page import (
    MAX_URL_LENGTH,
    Question,
    draw_photo,
    mix,
    write_labels_page,
)


# Names of other people: HTML, quotes, formulas, a dictionary's own names, umlauts in both forms
CLASSES = ['<b>"hat"</b>', "=Schürze", "constructor", unicodedata.normalize("NFD", "Müll 👟")]
CHECKSUMS = [f"{number:016x}" for number in (7, 1 << 62, 5, 9)]


def build_questions(before: str = CLASSES[0]) -> list[Question]:
    pictures = [draw_photo(image) for image in draw_noise((40, 160), *[(30, 30)] * 3)]
    chosen = ["contradicted", "random", "contradicted", "random"]
    return [
        Question(checksum, f"secret/{number}.jpg", picture, before, CLASSES[1], kind)
        for number, (checksum, picture, kind) in enumerate(
            zip(CHECKSUMS, pictures, chosen, strict=True)
        )
    ]


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Return a function that writes a page and opens it without a network, at one place."""
    context = browser.new_context(
        viewport={"width": 1366, "height": 768}, offline=True, accept_downloads=True
    )

    def open_one(
        questions: Sequence[Question] | None = None, classes: Sequence[str] = CLASSES
    ) -> Page:
        file = tmp_path / "labels.html"
        write_labels_page(file, build_questions() if questions is None else questions, classes)
        page = context.new_page()
        page.goto(file.as_uri())
        return page

    yield open_one
    context.close()


def read_shown(page: Page) -> list[str]:
    shown = page.locator("figure[data-checksum]:visible")
    return [each.get_attribute("data-checksum") or "" for each in shown.all()]


def click(page: Page, label: str) -> None:
    page.locator("button[data-label]").nth([*CLASSES, ""].index(label)).click()


def save(page: Page) -> list[dict[str, str]]:
    with page.expect_download() as download:
        page.locator("button#save").click()
    assert download.value.suggested_filename == "answers.csv"
    with Path(download.value.path()).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_one_whole_photo_is_shown_at_a_time(open_page: Open) -> None:
    page = open_page()
    assert read_shown(page) == CHECKSUMS[:1]
    shown = page.locator("figure:visible img")
    assert shown.evaluate("image => image.naturalWidth / image.naturalHeight") == 4
    assert shown.evaluate("image => getComputedStyle(image).objectFit") == "contain"


def test_nothing_says_the_label_or_the_models_answer_before_the_question_is_answered(
    open_page: Open,
) -> None:
    page = open_page()
    expect(page.locator("#said")).to_be_empty()
    assert page.locator("figure:visible img").get_attribute("alt") == "Photo 1 of 4"
    assert page.locator("button[aria-pressed=true]").count() == 0
    assert "secret" not in page.locator("body").inner_text()
    click(page, CLASSES[2])
    expect(page.locator("#said")).to_have_text(
        f"Photo 1: label {CLASSES[0]}, model {CLASSES[1]}, you: constructor. Changed."
    )
    assert read_shown(page) == CHECKSUMS[1:2]


def test_saved_answers_have_a_row_for_each_photo_and_the_names_as_csv_files_spell_them(
    open_page: Open,
) -> None:
    page = open_page()
    click(page, CLASSES[1])
    click(page, "")
    page.locator("#keep").click()
    click(page, CLASSES[3])
    rows = save(page)
    assert list(rows[0]) == ["checksum", "image", "label", "before", "chosen", "time"]
    assert [row["checksum"] for row in rows] == CHECKSUMS
    # A kept label is an answer, and none of the classes is an empty one
    assert [row["label"] for row in rows] == ["'=Schürze", "", CLASSES[0], CLASSES[3]]
    assert {row["before"] for row in rows} == {CLASSES[0]}
    assert [row["chosen"] for row in rows] == ["contradicted", "random"] * 2
    assert rows[0]["image"] == "secret/0.jpg"
    assert rows[0]["time"] < rows[3]["time"]


def test_a_photo_without_a_label_of_which_one_cannot_tell_has_no_row(open_page: Open) -> None:
    page = open_page(build_questions(before=""))
    page.locator("#keep").click()
    click(page, "")
    expect(page.locator("#said")).to_have_text("Photo 2: model =Schürze, you: none of these.")
    assert [(row["checksum"], row["label"]) for row in save(page)] == [(CHECKSUMS[1], "")]


def test_an_answer_can_be_changed_and_undone(open_page: Open) -> None:
    page = open_page()
    click(page, CLASSES[1])
    page.locator("#back").click()
    assert read_shown(page) == CHECKSUMS[:1]
    expect(page.locator("button[data-label][aria-pressed=true]")).to_have_text(f"2{CLASSES[1]}")
    click(page, CLASSES[2])
    click(page, CLASSES[2])
    page.locator("#undo").click()
    assert read_shown(page) == CHECKSUMS[1:2]
    assert [(row["checksum"], row["label"]) for row in save(page)] == [(CHECKSUMS[0], CLASSES[2])]


def test_at_the_end_the_page_counts_the_changes_of_photos_that_nobody_disputed(
    open_page: Open,
) -> None:
    page = open_page()
    for label in (CLASSES[1], CLASSES[2], CLASSES[0]):
        click(page, label)
        expect(page.locator("#summary")).to_be_empty()
    click(page, CLASSES[0])
    summary = "You changed 2 of 4 labels; of 2 that the classifier did not dispute, you changed 1."
    expect(page.locator("#summary")).to_contain_text(summary)
    expect(page.locator("#changes tbody tr")).to_have_count(2)
    assert read_shown(page) == []
    page.locator("#changes button").first.click()
    assert read_shown(page) == CHECKSUMS[:1]


def test_answers_survive_a_reload_a_page_written_again_and_another_tab(open_page: Open) -> None:
    page = open_page()
    click(page, CLASSES[1])
    page.reload()
    assert read_shown(page) == CHECKSUMS[1:2]
    other = open_page()
    click(other, CLASSES[2])
    expect(page.locator("#count")).to_contain_text("2 of 4 looked at")
    page.locator("#forward").click()
    click(page, CLASSES[3])
    assert [row["label"] for row in save(other)] == ["'=Schürze", CLASSES[2], CLASSES[3]]


def test_answers_to_other_photos_are_not_taken(open_page: Open) -> None:
    click(open_page(), CLASSES[1])
    page = open_page(build_questions()[:3])
    expect(page.locator("#count")).to_contain_text("0 of 3 looked at")


def test_a_browser_that_keeps_nothing_is_named(open_page: Open) -> None:
    page = open_page()
    expect(page.locator("#storage")).to_be_hidden()
    page.add_init_script(
        "delete window.localStorage;"
        "Object.defineProperty(window, 'localStorage', {get() { throw new Error('refused'); }})"
    )
    page.reload()
    expect(page.locator("#storage")).to_contain_text("does not keep your answers")
    click(page, CLASSES[1])
    assert len(save(page)) == 1


def test_keys_answer_go_back_and_undo(open_page: Open) -> None:
    page = open_page()
    for key in ("2", "0", "Space", "ArrowLeft", "Control+z", "Control+z", "4", "x"):
        page.keyboard.press(key)
    rows = save(page)
    assert [(row["checksum"], row["label"]) for row in rows] == [
        (CHECKSUMS[0], "'=Schürze"),
        (CHECKSUMS[1], CLASSES[3]),
    ]


def test_a_class_that_was_clicked_is_not_clicked_again_by_the_space_bar(open_page: Open) -> None:
    page = open_page()
    click(page, CLASSES[1])
    page.keyboard.press("Space")
    assert [row["label"] for row in save(page)] == ["'=Schürze", CLASSES[0]]


def test_more_than_nine_classes_are_typed(open_page: Open) -> None:
    classes = [*(f"{number} km" for number in range(8)), "Äpfel", "apricot", "-x"]
    page = open_page(build_questions(before=""), classes)
    page.keyboard.type("apf")  # without its dots, as on other keyboards
    expect(page.locator("button.found")).to_have_text("Äpfel")
    page.keyboard.press("Enter")
    page.keyboard.type("7 k")
    page.keyboard.press("Enter")
    page.keyboard.type("-")
    page.keyboard.type("q")
    page.keyboard.press("Enter")
    assert [row["label"] for row in save(page)] == ["Äpfel", "7 km", ""]


@pytest.mark.parametrize("width", [390, 1366])
def test_photo_and_answers_fit_on_the_screen(width: int, open_page: Open) -> None:
    page = open_page()
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    bottoms = page.locator("figure:visible, button[data-label]").evaluate_all(
        "all => all.map(each => each.getBoundingClientRect().bottom)"
    )
    assert max(bottoms) <= 800


def test_the_page_is_dark_where_the_person_wants_it(open_page: Open) -> None:
    page = open_page()
    page.emulate_media(color_scheme="dark")
    color = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(","))) < 150


def test_print_shows_the_changes_without_the_question(open_page: Open) -> None:
    page = open_page()
    click(page, CLASSES[1])
    page.emulate_media(media="print")
    expect(page.locator("#work")).to_be_hidden()
    expect(page.locator("#changes")).to_contain_text("=Schürze")


def test_a_hundred_photos_of_phones_take_eight_megabytes() -> None:
    (noise,) = draw_noise((600, 800))
    assert len(draw_photo(noise)) <= MAX_URL_LENGTH
    assert 100 * MAX_URL_LENGTH <= 8_000_000


def test_photos_that_nobody_disputes_are_mixed_in() -> None:
    mixed = mix(range(30), range(100, 110))
    assert sorted(mixed) == [*range(30), *range(100, 110)]
    assert [each for each in mixed if each < 100] == list(range(30))
    assert mixed[30:] != list(range(100, 110))
