"""A collection that a person looks at in rounds: pages, answers in the table, and how much of it is right."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.command_in_process import fail, run_here
from helpers.photo_folders import draw_noise
from helpers.tiny_models import save_classifier

from modeling_vitcls.inference.inputs import compute_checksum
from modeling_vitcls.publishing import review


NUM_PHOTOS = 30
COUNT = 8
COLUMNS = ["checksum", "image", "label", "before", "chosen", "time"]
Questions = list[dict[str, str]]


@pytest.fixture(scope="module")
def collection(module_path: Path) -> Path:
    folder = module_path / "collection"
    folder.mkdir()
    for number, image in enumerate(draw_noise(*[(40, 60)] * NUM_PHOTOS)):
        image.save(folder / f"{number:02}.png")
    return folder


@pytest.fixture(scope="module")
def model(module_path: Path) -> Path:
    return save_classifier(module_path / "model", "cat", "dog")


@pytest.fixture
def predict(model: Path, collection: Path, tmp_path: Path) -> Callable[..., Questions]:
    """Return the command, which returns the questions of the page that it writes."""

    def run(*flags: object, table: str = "table.csv", photos: Path = collection) -> Questions:
        page = tmp_path / "review.html"
        flags = (*flags, "--review", page, "--review-count", COUNT)
        output = tmp_path / table
        assert run_here("predict", "--model", model, photos, "--output", output, *flags) == 0
        text = page.read_text(encoding="utf-8")
        (content,) = re.findall('<script type="application/json" id="data">(.*)</script>', text)
        questions: Questions = json.loads(content)["questions"]
        return questions

    return run


def write_answers(file: Path, questions: Questions, label: str) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for each in questions:
            writer.writerow({**each, "label": label, "time": "2026-12-01T00:00:00Z"})
    return file


def test_a_page_has_the_least_sure_photos_and_a_quarter_drawn_at_random(
    predict: Callable[..., Questions], tmp_path: Path
) -> None:
    questions = predict()
    table = pd.read_csv(tmp_path / "table.csv").set_index("checksum")["probability"]
    drawn = [each["checksum"] for each in questions if each["chosen"] == "random"]
    unsure = [each["checksum"] for each in questions if each["chosen"] == "unsure"]
    assert (len(drawn), len(unsure)) == (2, 6)
    assert unsure == table.drop(drawn).sort_values().index[:6].tolist()
    assert all(each["before"] == "" for each in questions)
    assert predict() == questions


def test_answered_photos_are_not_asked_about_again_and_keep_their_labels(
    predict: Callable[..., Questions], collection: Path, tmp_path: Path
) -> None:
    first = predict()
    file = write_answers(tmp_path / "answers.csv", first, "dog")
    second = predict("--answers", file, table="second.csv")
    assert not {each["checksum"] for each in first} & {each["checksum"] for each in second}
    table = pd.read_csv(tmp_path / "second.csv").set_index("checksum")
    given = table.loc[[each["checksum"] for each in first]]
    assert set(given["label"]) == {"dog"}
    assert given["probability"].isna().all()
    assert (table["source"] == "person").sum() == COUNT
    assert (table["source"] == "model").sum() == NUM_PHOTOS - COUNT
    moved = collection.with_name("moved")
    moved.symlink_to(collection)
    assert predict("--answers", file, table="third.csv", photos=moved) == [
        {**each, "image": each["image"].replace("collection", "moved")} for each in second
    ]


def test_a_photo_of_none_of_the_classes_has_no_label(
    predict: Callable[..., Questions], tmp_path: Path
) -> None:
    file = write_answers(tmp_path / "answers.csv", predict()[:1], "")
    predict("--answers", file, table="table.jsonl")
    rows = pd.read_json(tmp_path / "table.jsonl", lines=True)
    (row,) = rows[rows["source"] == "person"].to_dict("records")
    assert pd.isna(row["label"])


def test_only_the_photos_of_the_page_are_decoded_for_it(
    predict: Callable[..., Questions], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = review.decode_image

    def note(*arguments: Any) -> Any:
        decoded.append(arguments)
        return decode(*arguments)

    monkeypatch.setattr(review, "decode_image", note)
    predict()
    assert len(decoded) == COUNT


def test_an_answer_that_is_no_class_of_the_model_is_an_error(
    predict: Callable[..., Questions], model: Path, collection: Path, tmp_path: Path
) -> None:
    file = write_answers(tmp_path / "answers.csv", predict(), "bird")
    flags = ("--output", tmp_path / "other.csv", "--answers", file)
    error = fail("predict", "--model", model, collection, *flags)
    assert "is 'bird', but the classes are cat, dog" in error


def test_a_page_requires_a_table(model: Path, collection: Path) -> None:
    error = fail("predict", "--model", model, collection, "--review", "page.html", status=2)
    assert "--review requires --output" in error


def test_some_photos_that_look_unknown_are_asked_about(collection: Path) -> None:
    files = sorted(collection.iterdir())
    rows = pd.DataFrame(
        {
            "index": range(NUM_PHOTOS),
            "image": [file.name for file in files],
            "label": "cat",
            "probability": 0.9,
            "checksum": [compute_checksum(file) for file in files],
            "distance": np.arange(NUM_PHOTOS) * 1.0,
            "unknown": np.arange(NUM_PHOTOS) > 9,
        }
    )
    records = [SimpleNamespace(content=str(file)) for file in files]
    predictor = SimpleNamespace(processor=SimpleNamespace(bit_depth=16))
    asked = review.choose_photos(rows, 20, SimpleNamespace(records=records, predictor=predictor))
    heap = [each.image for each in asked if each.chosen == "unknown"]
    drawn = [each.image for each in asked if each.chosen == "random"]
    # The nearest ones, which may be of a class
    assert heap == [name for name in rows["image"][10:] if name not in drawn][:4]
    assert len(drawn) == 5


def build_table(number: int, num_drawn: int, seed: int = 0) -> tuple[pd.DataFrame, Any, float]:
    """Build a table whose probabilities are too high, and of which the least sure part was looked at."""
    generator = np.random.default_rng(seed)
    probability = generator.uniform(0.4, 1, number)
    is_right = generator.random(number) < 0.9 * probability
    rows = pd.DataFrame(
        {"checksum": np.arange(number).astype(str), "label": "cat", "probability": probability}
    )
    truth = np.where(is_right, "cat", "dog")
    drawn = generator.permutation(number)[:num_drawn]
    unsure = probability.argsort()[: number // 3]
    asked = np.union1d(drawn, unsure)
    rows["given"] = None
    rows.loc[asked, "given"] = truth[asked]
    chosen = np.where(np.isin(asked, drawn), "random", "unsure")
    answers = pd.DataFrame({"chosen": chosen}, index=asked.astype(str))
    rest = np.setdiff1d(np.arange(number), asked)
    share = (len(asked) + is_right[rest].sum()) / number
    folder = SimpleNamespace(path=Path("absent"), results={})
    return rows, SimpleNamespace(answers=answers, predictor=SimpleNamespace(folder=folder)), share


def test_how_much_of_a_table_is_right_is_estimated_from_photos_drawn_at_random() -> None:
    num_within = 0
    for seed in range(20):
        rows, predicted, share = build_table(1200, 100, seed)
        text = review.describe_table(rows, predicted)
        (numbers,) = re.findall(r"about (\d+)% of the table is right \((\d+) to (\d+)\)", text)
        middle, low, high = map(int, numbers)
        assert low <= middle <= high
        num_within += low - 0.5 <= 100 * share <= high + 0.5
    assert num_within >= 18


def test_with_few_photos_that_were_drawn_there_is_no_estimate() -> None:
    rows, predicted, _ = build_table(300, 12)
    text = review.describe_table(rows, predicted)
    assert "%" not in text
    assert re.search(r"drawn at random, \d+ were right. Look at \d+ more for an estimate", text)
