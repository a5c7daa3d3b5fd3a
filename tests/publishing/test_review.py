"""`predict --review`: the page that asks what photos of a collection show."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from helpers.tiny_models import raises_one_line, save_classifier
from PIL import Image
from playwright.sync_api import Browser, Page
from pytest import CaptureFixture, LogCaptureFixture

from modeling_vitcls.cli.commands import run_predict
from modeling_vitcls.data.answers import read_answers
from modeling_vitcls.inference.options import PredictOptions
from modeling_vitcls.inference.predict import Answered, apply_labels, describe_labels, drop_settled
from modeling_vitcls.publishing.labels_page import write_labels_page


def ask(folder: Path, photos: Path, **flags: object) -> dict[str, str]:
    """Write the page and the table, and return why the page asks about each photo, by checksum."""
    options = {"paths": (str(photos),), "review": folder / "page.html", "review_count": 6, **flags}
    run_predict(PredictOptions(model=str(folder / "model"), num_workers=0, **options))
    page = (folder / "page.html").read_text()
    return dict(re.findall(r'data-checksum="(\w+)" data-chosen="(\w+)"', page))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_classifier(tmp_path / "model")
    return tmp_path


def test_photos_are_asked_about_once(
    folder: Path, photos: Path, capsys: CaptureFixture, caplog: LogCaptureFixture
) -> None:
    table, answers = folder / "table.csv", folder / "answers.csv"
    asked = ask(folder, photos, output=table)
    assert Counter(asked.values()) == {"random": 1, "unsure": 5}
    assert ask(folder, photos, output=table) == asked
    assert "source" not in pd.read_csv(table)

    first, second, *_ = asked
    lines = ["checksum,label,chosen,time", f"{first},mine,random,", f"{second},,unsure,"]
    answers.write_text("\n".join(lines))
    left = ask(folder, photos, output=table, answers=(str(answers),), review_count=99)
    assert len(left) == 7
    assert "no classes of the model: mine" in caplog.text
    assert not {first, second} & left.keys()
    rows = pd.read_csv(table, index_col="checksum")
    assert rows.loc[[first, second], "label"].fillna("none").tolist() == ["mine", "none"]
    assert rows.loc[[first, second], "probability"].isna().all()
    assert rows["source"].value_counts().to_dict() == {"model": 7, "person": 2}
    changed = pd.read_csv(folder / "table.changed.csv", keep_default_na=False)
    assert sorted(changed["label"]) == ["", "mine"]
    assert changed["label_before"].all()
    assert (
        "2 of the 9 labels of photos outside the training are a person's" in capsys.readouterr().out
    )


def test_the_least_sure_photos_are_asked_about(folder: Path, photos: Path) -> None:
    asked = ask(folder, photos, output=folder / "table.parquet")
    rows = pd.read_parquet(folder / "table.parquet").set_index("checksum")["probability"]
    others = rows.drop([each for each, chosen in asked.items() if chosen == "random"])
    unsure = {each for each, chosen in asked.items() if chosen == "unsure"}
    assert unsure == {*others.nsmallest(5).index}


def test_a_page_needs_no_table(folder: Path, photos: Path) -> None:
    assert len(ask(folder, photos)) == 6


def test_only_models_with_one_label_per_image_ask(folder: Path, photos: Path) -> None:
    with raises_one_line("one label per image"):
        ask(folder, photos, features=("cls",))


def test_a_table_is_judged_by_random_photos_that_did_not_train_the_model() -> None:
    rows = [{"checksum": str(n), "label": "a", "label_2": "b", "trained": n == 0} for n in range(5)]
    answers = {
        "0": {"label": "b", "chosen": "random", "file": "1.csv"},  # trained the model
        "1": {"label": "a", "chosen": "random", "file": "2.csv"},
        "2": {"label": "", "chosen": "random", "file": "2.csv"},
        "3": {"label": "b", "chosen": "unsure", "file": "1.csv"},
    }
    answered: Counter[Answered] = Counter()
    applied = list(apply_labels(iter(rows), answers, answered))
    # A person has no second answer
    assert [row["label_2"] for row in applied] == [None, None, None, None, "b"]
    settled, others = drop_settled(answered)
    assert settled == 1
    assert others == {count_as(True, True): 1, count_as(True, False): 1}


def count_as(is_drawn: bool, is_right: bool) -> Answered:
    return Answered("2.csv", is_drawn, is_right, is_trained=False)


def test_what_a_person_corrects_is_right_and_random_draws_tell_how_many_others_are() -> None:
    """Of 1,000 labels, 120 are corrected; of 40 drawn at random, 30 were right (Wilson: 60 to 86 %)."""
    answered = Counter(
        {
            count_as(True, True): 30,
            count_as(True, False): 10,
            count_as(False, True): 50,
            count_as(False, False): 110,
        }
    )
    text = describe_labels(answered, 1000)
    assert text.startswith("200 of the 1,000 labels of photos outside the training are a person's")
    assert "about 87% of the labels are right (95% interval: 72% to 98%)" in text


@pytest.fixture
def ask_about(folder: Path, browser: Browser) -> Iterator[Callable[[list[str]], Page]]:
    """Open a page about three photos of some classes."""
    page = browser.new_page()

    def open_page(names: list[str]) -> Page:
        photo = {"label": "", "prediction": "a", "chosen": "random", "image": "1.png"}
        picture = Image.new("RGB", (8, 8))
        photos = [photo | {"checksum": f"{n:016x}", "picture": picture} for n in range(3)]
        write_labels_page(folder / "page.html", photos, names)
        page.goto((folder / "page.html").as_uri())
        return page

    yield open_page
    page.close()


def list_answers(page: Page) -> str:
    return page.evaluate("Object.values(answers).map(each => each.label).join()")


def test_of_36_classes_each_has_a_key(ask_about: Callable[[list[str]], Page]) -> None:
    names = [f"class {number}" for number in range(1, 37)]
    page = ask_about(names)
    for key in "9a0":
        page.keyboard.press(key)
    assert list_answers(page) == "class 9,class 10,class 36"
    page.keyboard.press("Control+z")
    page.keyboard.press("-")
    assert list_answers(page) == "class 9,class 10,"


def test_of_more_classes_only_letters_that_one_begins_with_answer(
    ask_about: Callable[[list[str]], Page],
) -> None:
    page = ask_about(["shirt", "shirts", "shoes", *(f"a{number}" for number in range(34))])
    numbers = []
    for keys in ("sh", "oe", "shirt"):
        page.keyboard.type(keys)
        page.keyboard.press("Enter")
        numbers.append(list_answers(page))
    assert numbers == ["", "shoes", "shoes,shirt"]


def test_a_class_that_begins_with_a_quote_and_a_formula_is_saved_and_read(
    ask_about: Callable[[list[str]], Page],
) -> None:
    page = ask_about(["'=x", "=x", "'x"])
    for key in "123":
        page.keyboard.press(key)
    with page.expect_download() as download:
        page.locator("#save").click()
    labels = read_answers([str(download.value.path())])["label"]
    assert sorted(labels) == ["'=x", "'x", "=x"]
