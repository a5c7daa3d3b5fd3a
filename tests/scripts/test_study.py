"""Studies: the grid of runs, the page, failed runs and resuming.

`PROGRAM` replaces the `vitcls` command; blocks of docs/evaluating.md run real studies.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pandas
import pytest
import yaml
from datasets import ClassLabel, Dataset
from helpers.command_in_process import parse_flags
from helpers.scripts_in_process import SCRIPTS
from helpers.tiny_models import raises_one_line
from pytest import MonkeyPatch, approx
from scipy import stats

from scripts.study import (
    Study,
    StudyOptions,
    StudyRunner,
    load_study,
    run_study,
    summarize,
)
from scripts.study import run as run_command


RECIPES = SCRIPTS / "studies"
STUDY = {
    "title": "Pooling",
    "question": "Which pooling?",
    "seeds": [0, 1],
    "stages": {"finetune": {"dataset": "digits", "model": "vitcls-tiny"}},
    "factors": {"pooling": {"cls": None, "mean": {"pooling": "mean"}}},
    "metrics": {"accuracy": "Accuracy (%)", "loss": "Loss"},
    "baseline": {"pooling": "cls"},
}
STUDY_OBJECT = Study(**STUDY)

# Writes the outputs of a stage. Evaluation fails for the pooling "median".
PROGRAM = """#!{python} -IS
import json, os, pathlib, signal, sys, time
arguments = sys.argv[3:]
flags = dict(zip(arguments[1::2], arguments[2::2]))
folder = pathlib.Path(flags.get("--output-dir") or flags["--model"]).parent
print("the stage", arguments[0], flush=True)
pooling = flags.get("--pooling", "cls")
if arguments[0] == "finetune":
    seed = int(flags["--seed"])
    accuracy = {{"cls": 0.5, "mean": 0.75}}.get(pooling, 0.25) + seed / 16
    threads = int(os.environ["OMP_NUM_THREADS"] + os.environ["MKL_NUM_THREADS"])
    signal.alarm(20)
    while len(list(folder.parent.glob("*/log.txt"))) < 2:  # two runs start at the same time
        time.sleep(0.01)
    output = folder / "finetune"
    output.mkdir(exist_ok=True)
    results = {{"accuracy": accuracy, "seconds": 90, "threads": threads}}
    (output / "results.json").write_text(json.dumps(results))
elif "median" in flags["--model"]:
    sys.exit("error: no median")
else:
    pathlib.Path(flags["--output"]).write_text(json.dumps({{"accuracy": 1, "is_frozen": True}}))
"""


def write_study(folder: Path, **changes: object) -> Path:
    """Write a study file with two poolings and two seeds, and return its path."""
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return file


@pytest.fixture
def program(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Run `PROGRAM` instead of `vitcls`."""
    file = tmp_path / "program"
    file.write_text(PROGRAM.format(python=sys.executable))
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))


def test_a_study_file_with_an_unknown_stage_gets_one_line(tmp_path: Path) -> None:
    with raises_one_line("study.yaml", "train", "evaluate"):
        load_study(write_study(tmp_path, stages={"train": {}}))


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_commands_of_a_study_in_the_repository_are_valid(file: Path) -> None:
    runner = StudyRunner(load_study(file), Path("runs/study"))
    first_run, *other_runs = runner.study.plan_runs()

    for run in [first_run, *other_runs]:
        if (
            run.seed == first_run.seed
            and len(set(run.levels.items()) - set(first_run.levels.items())) <= 1
        ):
            for stage, flags in runner.build_commands(run):
                parse_flags(stage, flags)


def test_a_subset_has_random_training_images_and_all_other_images(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    label = ClassLabel(names=["cat", "ship"])
    for split, numbers in {"train": range(20), "test": range(100, 105)}.items():
        columns = {"label": [number % 2 for number in numbers], "number": numbers}
        images = Dataset.from_dict(columns).cast_column("label", label)
        images.to_parquet(tmp_path / f"data/{split}.parquet")
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    subset = {"dataset": "$DATA", "num_images": 6}
    groups = {"kind": {"vehicle": ["ship"], "animal": ["cat"]}}
    subsets = {"a": subset, "b": subset | {"seed": 0}, "c": subset | {"seed": 1, "groups": groups}}
    study = replace(STUDY_OBJECT, seeds=[], subsets=subsets)
    StudyRunner(study, tmp_path).execute()

    folder = tmp_path / "subsets"
    parts = [pandas.read_parquet(folder / name / "train.parquet") for name in "abc"]
    numbers = [part["number"].tolist() for part in parts]
    assert numbers[0] == numbers[1] != numbers[2]
    for one in numbers:
        assert len(set(one)) == 6
        assert set(one) < set(range(20))
        assert sorted(one) != list(range(6))
    test = pandas.read_parquet(folder / "c/test.parquet")
    for part, size in ((parts[2], 6), (test, 5)):
        assert part["kind"].tolist() == (1 - part["label"]).tolist()
        assert len(part) == size


def test_differences_are_paired_by_seed_within_the_other_levels() -> None:
    cls, mean = [5, 7, 9], [6, 8, 9.8]
    rows = pandas.DataFrame(
        {"pooling": pooling, "size": size, "seed": seed, "loss": loss}
        for pooling, size, losses in (
            ("cls", "s", cls),
            ("mean", "s", mean),
            ("cls", "l", [7.5]),
            ("mean", "l", [None, 5]),
        )
        for seed, loss in enumerate(losses)
    )
    study = replace(STUDY_OBJECT, factors={"pooling": {}, "size": {}})
    summary = summarize(study, rows, "loss")
    high = stats.t.interval(0.95, 2, loc=7, scale=stats.sem(cls))[1]
    assert summary.loc[0, ["mean", "half_width"]].tolist() == approx([7, high - 7])

    paired = stats.ttest_rel(mean, cls).confidence_interval(0.95)
    found = summary.loc[1, "difference"], summary.loc[1, "difference_half_width"]
    assert found == approx(((paired.low + paired.high) / 2, (paired.high - paired.low) / 2))

    # no baseline
    assert summarize(study, rows[rows["pooling"] == "mean"], "loss")["difference"].isna().all()


@pytest.mark.usefixtures("program")
def test_all_runs_are_executed_summarized_and_resumed(tmp_path: Path) -> None:
    poolings = {"cls": {}, "mean": {"pooling": "mean"}, "median": {"pooling": "median"}}
    file = write_study(
        tmp_path,
        factors={"pooling": poolings},
        stages={"finetune": {"model": "vitcls-tiny"}, "evaluate": None},
        answer="The\nmean.",
        metrics={"evaluate.accuracy": "Accuracy", "accuracy": "Accuracy (%)", "f1": "F1"},
        subsets={100: {}},
    )
    output = tmp_path / "the output"
    (output / "subsets/100").mkdir(parents=True)  # drawn before
    with raises_one_line("2 of 6 runs failed"):
        run_command(StudyOptions(file, output, "other", jobs=2, threads=3))
    rows = pandas.read_parquet(output / "runs.parquet")
    assert rows["pooling"].tolist() == ["cls"] * 2 + ["mean"] * 2 + ["median"] * 2
    assert rows["status"].tolist() == ["finished"] * 4 + ["unfinished"] * 2
    assert rows["accuracy"].tolist() == [0.5, 0.5625, 0.75, 0.8125, 0.25, 0.3125]
    assert set(rows["threads"]) == {33}
    page = (output / "README.md").read_text()
    assert "| mean | 2 | 78 ± 40 | +25 ± 0 |\n" in page  # only finished runs, and equal decimals
    assert "| median |" not in page

    interrupted = output / "runs/pooling-mean_seed-1"
    (interrupted / "finetune/results.json").unlink()
    (interrupted / "finetune/checkpoints/step-2").mkdir(parents=True)
    run_study(StudyRunner(load_study(file), output), "python scripts/study.py")
    for name, num_trained, num_evaluated in (
        ("cls_seed-0", 1, 1),
        ("mean_seed-1", 2, 1),
        ("median_seed-0", 1, 2),
    ):
        log = (output / f"runs/pooling-{name}" / "log.txt").read_text()
        assert log.count("the stage finetune") == num_trained, name
        assert log.count("the stage evaluate") == num_evaluated, name
        assert log.count("--resume") == num_trained - 1, name
