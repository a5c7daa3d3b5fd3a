"""Runs with the labels that a person gave on a page, from the first page to the second."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from helpers.command_in_process import finetune, run_here
from helpers.photo_folders import write_photos
from helpers.tiny_models import edit_config
from pytest import CaptureFixture

from modeling_vitcls import add_class, add_task, evaluate, predict
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.inference.inputs import compute_checksum
from modeling_vitcls.publishing.report import write_report


@pytest.fixture(scope="module")
def run(converted_encoder: Path, module_path: Path) -> Any:
    """Return a function that trains on noise of two classes, and reads the questions of its page."""
    photos = write_photos(module_path / "photos", range(30))

    def run_once(name: str, *flags: str) -> tuple[dict[str, Any], pd.DataFrame]:
        results = finetune(converted_encoder, photos, module_path / name, *flags)
        write_report(ModelFolder(results["folder"]))
        assert (results["folder"] / "report.html").exists()
        page = results["folder"] / "labels.html"
        text = page.read_text() if page.exists() else ""
        questions = re.findall(r"^ *(\{.*\}),$", text, re.MULTILINE)
        return results, pd.DataFrame(map(json.loads, questions))

    return run_once


def test_who_believes_the_model_gets_no_estimate_and_unsure_photos_only_train(
    run: Any, module_path: Path
) -> None:
    results, questions = run("first")
    # Photos that only look like one scene with two labels may have the label that the model says.
    believed = questions.query("chosen == 'random' or answer != before")
    answers = believed.assign(label=believed["answer"], time="")
    answers["chosen"] = answers["chosen"].replace("random", "unsure")
    answers.to_csv(module_path / "answers.csv")
    second, others = run("second", "--answers", str(module_path / "answers.csv"))
    num_unsure = (answers["chosen"] == "unsure").sum()
    assert second["num_uncounted"] == num_unsure
    assert second["num_images"] == results["num_images"] - num_unsure
    assert re.search(r"\d right\. No estimate: (\d+) of \1 labels", second["printed"])
    assert not {*answers["checksum"]} & {*others["checksum"]}


def test_photos_that_are_held_out_are_never_on_a_page(run: Any) -> None:
    _, questions = run("held out", "--held-out-fraction", "0.2")
    assert questions.empty


def test_unknown_photos_are_counted_among_those_that_show_none_of_the_classes(
    run: Any, module_path: Path, capsys: CaptureFixture
) -> None:
    results, _ = run("third")
    others = write_photos(module_path / "others", range(40, 44))
    *checksums, last = map(compute_checksum, sorted(others.rglob("*.png"))[:3])
    table = {"checksum": [*checksums, last], "chosen": ["unsure", "random", "unknown"]}
    answers = pd.DataFrame(table).assign(label="", time="")
    answers.to_csv(module_path / "none.csv")
    rows = predict(results["folder"], str(others))
    near, far, *_ = sorted(row["distance"] for row in rows if row["checksum"] in checksums)
    edit_config(results["folder"], distance_threshold=(near + far) / 2)
    measured = evaluate(results["folder"], str(others), answers=(str(module_path / "none.csv"),))
    assert measured["num_images"] == 5
    assert measured["outside"]["num_images"] == 1
    assert "of 1 photos that show none of the classes" in capsys.readouterr().out


@pytest.fixture
def asked(tmp_path: Path) -> tuple[Path, str]:
    """Write 32 photos of two classes, and answers about 16 that models were unsure about and 16 random ones."""
    photos = write_photos(tmp_path / "asked", range(50, 66))
    rows = [
        {
            "checksum": compute_checksum(file),
            "label": file.parent.name,
            "chosen": chosen,
            "time": "",
        }
        for number, file in enumerate(sorted(photos.rglob("*.png")))
        for chosen in [("unsure", "unknown", "random", "random")[number % 4]]
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "half.csv")
    return photos, str(tmp_path / "half.csv")


def believe(photos: Path, file: Path) -> str:
    """Write answers that change the labels of all photos that a classifier contradicted."""
    rows = [
        {
            "checksum": compute_checksum(photo),
            "label": "cat" if photo.parent.name == "dog" else "dog",
            "chosen": "contradicted",
            "time": "",
        }
        for photo in sorted(photos.rglob("*.png"))
        if int(photo.stem) % 2
    ]
    pd.DataFrame(rows).to_csv(file)
    return str(file)


DOORS_OF_RUNS = {
    "frozen": (),
    "held out": ("--held-out-fraction", "0.3"),
    "steps": ("--held-out-fraction", "0.3", "--max-steps", "1", "--batch-size", "8"),
}


@pytest.mark.parametrize("door", DOORS_OF_RUNS)
def test_photos_that_a_model_was_unsure_about_are_not_counted_by_a_run(
    converted_encoder: Path, asked: tuple[Path, str], tmp_path: Path, door: str
) -> None:
    photos, answers = asked
    flags = ("--answers", answers, *DOORS_OF_RUNS[door])
    results = finetune(converted_encoder, photos, tmp_path / "run", *flags)
    rows = pd.read_parquet(tmp_path / "run/predictions.parquet")
    chosen = pd.read_csv(answers, dtype={"checksum": str}).set_index("checksum")["chosen"]
    measured = [chosen[compute_checksum(photos / name)] for name in rows["image"]]
    assert {*measured} == {"random"}
    assert results["num_uncounted"] == 16
    assert results["num_training_images"] + (door != "frozen") * results["num_images"] == 32


@pytest.mark.parametrize("door", DOORS_OF_RUNS)
def test_a_run_of_who_believes_the_model_states_no_estimate(
    converted_encoder: Path, tmp_path: Path, door: str
) -> None:
    photos = write_photos(tmp_path / "believed", range(70, 90))
    answers = believe(photos, tmp_path / "believed.csv")
    flags = ("--answers", answers, *DOORS_OF_RUNS[door])
    results = finetune(converted_encoder, photos, tmp_path / "run", *flags)
    assert "No estimate: 20 of 20 labels" in results["printed"]


@pytest.mark.parametrize("fraction", [None, pytest.param(0.3, marks=pytest.mark.slow)])
def test_photos_that_a_model_was_unsure_about_do_not_measure_an_added_task(
    run: Any, asked: tuple[Path, str], tmp_path: Path, fraction: float | None
) -> None:
    photos, answers = asked
    results, _ = run(f"old of a task {fraction}")
    record = add_task(
        results["folder"],
        str(photos),
        name="animal",
        answers=(answers,),
        held_out_fraction=fraction,
        output_dir=tmp_path / "more",
    )
    assert record["result"]["num_uncounted"] == 16
    assert record["result"]["num_images"] == (16 if fraction is None else 4)


def test_photos_that_a_model_was_unsure_about_do_not_measure_added_classes(
    run: Any, tmp_path: Path
) -> None:
    photos = write_photos(tmp_path / "new", range(16), "ant", "bee")
    files = sorted(photos.rglob("*.png"))
    table = {
        "checksum": map(compute_checksum, files),
        "label": [file.parent.name for file in files],
    }
    answers = pd.DataFrame(table).assign(chosen=["unsure", "random"] * 16, time="")
    answers.to_csv(tmp_path / "answers.csv")
    results, _ = run("old of classes")
    flags: Any = {"answers": (str(tmp_path / "answers.csv"),), "output_dir": tmp_path / "more"}
    record = add_class(results["folder"], str(photos), **flags)
    assert record["result"]["num_images"] == 16


def test_photos_that_a_model_was_unsure_about_do_not_measure_a_saved_model(
    run: Any, asked: tuple[Path, str]
) -> None:
    photos, answers = asked
    results, _ = run("evaluated")
    measured = evaluate(results["folder"], str(photos), answers=(answers,))
    assert measured["num_images"] == 16


def test_an_evaluation_of_labels_of_who_believes_the_model_states_no_estimate(
    run: Any, tmp_path: Path, capsys: CaptureFixture
) -> None:
    results, _ = run("evaluated with belief")
    photos = write_photos(tmp_path / "believed", range(70, 90))
    answers = believe(photos, tmp_path / "believed.csv")
    measured = evaluate(results["folder"], str(photos), answers=(answers,))
    assert measured["no_estimate"].startswith("20 of 20 labels")


def test_random_photos_with_whose_answers_a_model_was_trained_do_not_judge_a_table(
    converted_encoder: Path, tmp_path: Path, capsys: CaptureFixture
) -> None:
    start = write_photos(tmp_path / "start", range(100, 110))
    collection = write_photos(tmp_path / "collection", range(40), "2024")
    rows = [
        {"checksum": compute_checksum(file), "label": label, "chosen": "random", "time": ""}
        for file, label in zip(sorted(collection.rglob("*.png")), ["cat", ""] * 20, strict=True)
    ]
    answers = str(tmp_path / "answers.csv")
    pd.DataFrame(rows[:24]).to_csv(answers)
    other = str(tmp_path / "other.csv")
    pd.DataFrame(rows[24:36]).to_csv(other)
    run_several(converted_encoder, (start, collection), tmp_path / "run", answers)
    capsys.readouterr()
    table = ["predict", "--model", tmp_path / "run", collection, "--answers"]
    assert run_here(*table, answers) == 0
    assert "An estimate of how many are right requires 10 answers" in capsys.readouterr().out
    assert run_here(*table, answers, other) == 0
    assert "12 of the 16 labels of photos outside the training are a person's; of 12 that were" in (
        capsys.readouterr().out
    )


def run_several(model: Path, photos: tuple[Path, ...], output: Path, answers: str) -> None:
    data = ["--dataset", *photos, "--answers", answers]
    paths = ["--model", model, "--output-dir", output, "--no-report"]
    assert run_here("finetune", *paths, *data) == 0


def test_the_test_split_measures_a_model_from_random_weights(tmp_path: Path) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        write_photos(tmp_path / "photos" / split, range(8 * number, 8 * number + 8))
    flags = ("--max-steps", "1", "--batch-size", "8", "--image-size", "32", "--patch-size", "8")
    results = finetune("vitcls-tiny", tmp_path / "photos", tmp_path / "run", *flags)
    assert results["split"] == "split 'test'"
