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
from pyarrow import parquet
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
    num_finished = len(list(folder.parent.glob("*/finetune/results.json")))
    running = len(list(folder.parent.glob("*/log.txt"))) - num_finished
    results = {{"accuracy": accuracy, "seconds": 90, "threads": threads, "running": running}}
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
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, numbers in {"train": range(20), "test": range(100, 105)}.items():
        images = Dataset.from_dict(
            {"label": [number % 2 for number in numbers], "number": list(numbers)}
        )
        images = images.cast_column("label", ClassLabel(names=["cat", "ship"]))
        images.to_parquet(tmp_path / "data" / f"{split}.parquet")
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    subset = {"dataset": "$DATA", "num_images": 6}
    groups = {"kind": {"vehicle": ["ship"], "animal": ["cat"]}}
    folder = tmp_path / "subsets"
    subsets = {"a": subset, "b": subset | {"seed": 0}, "c": subset | {"seed": 1, "groups": groups}}
    study = replace(STUDY_OBJECT, seeds=[], subsets=subsets)
    StudyRunner(study, tmp_path).execute()

    def read(name: str, split: str) -> dict[str, list[int]]:
        return parquet.read_table(folder / name / f"{split}.parquet").to_pydict()

    assert not (folder / "a" / "validation.parquet").exists()
    numbers = [read(name, "train")["number"] for name in "abc"]
    assert numbers[0] == numbers[1] != numbers[2]
    for one in numbers:
        assert len(set(one)) == 6
        assert set(one) < set(range(20))
        assert sorted(one) != list(range(6))
    assert read("c", "train")["kind"] == [1 - number % 2 for number in numbers[2]]
    assert read("c", "test")["kind"] == [1, 0, 1, 0, 1]
    with pytest.raises(FileNotFoundError):
        StudyRunner(
            replace(study, subsets={"d": subset}), tmp_path, dataset=str(tmp_path / "absent")
        ).execute()
    assert not (folder / "d").exists()


def test_differences_are_paired_by_seed_within_the_other_levels() -> None:
    values = {
        ("cls", "s"): [50, 70, 90],
        ("mean", "s"): [60, 80, 98],
        ("cls", "l"): [75],
        ("mean", "l"): [None, 50],
    }
    rows = pandas.DataFrame(
        {"pooling": pooling, "size": size, "seed": seed, "accuracy": value and value * 10}
        for (pooling, size), column in values.items()
        for seed, value in enumerate(column)
    )
    study = replace(
        STUDY_OBJECT, factors={"pooling": {"cls": {}, "mean": {}}, "size": {"s": {}, "l": {}}}
    )
    summary = summarize(study, rows, "accuracy")
    high = stats.t.interval(0.95, 2, loc=70_000, scale=stats.sem([50_000, 70_000, 90_000]))[1]
    assert summary.loc[0, ["mean", "half_width"]].tolist() == pytest.approx([70_000, high - 70_000])

    paired = stats.ttest_rel(
        [60_000, 80_000, 98_000], [50_000, 70_000, 90_000]
    ).confidence_interval(0.95)
    found = summary.loc[1, "difference"], summary.loc[1, "difference_half_width"]
    assert found == pytest.approx(((paired.low + paired.high) / 2, (paired.high - paired.low) / 2))

    # no baseline
    assert summarize(study, rows[rows["pooling"] == "mean"], "accuracy")["difference"].isna().all()


@pytest.mark.usefixtures("program")
def test_all_runs_are_executed_summarized_and_resumed(tmp_path: Path) -> None:
    factors = {"pooling": {"cls": {}, "mean": {"pooling": "mean"}, "median": {"pooling": "median"}}}
    metrics = {"evaluate.accuracy": "Accuracy", "accuracy": "Accuracy (%)", "f1": "F1"}
    stages = {"finetune": {"model": "vitcls-tiny"}, "evaluate": None}
    file = write_study(
        tmp_path,
        factors=factors,
        stages=stages,
        answer="The\nmean.",
        metrics=metrics,
        subsets={100: {}},
    )
    output = tmp_path / "the output"
    (output / "subsets" / "100").mkdir(parents=True)  # drawn before
    with raises_one_line("2 of 6 runs failed"):
        run_command(StudyOptions(file, output, "other", jobs=2, threads=3))
    rows = parquet.read_table(output / "runs.parquet").to_pylist()
    assert [(row["pooling"], row["seed"], row["status"], row["accuracy"]) for row in rows] == [
        ("cls", 0, "finished", 0.5),
        ("cls", 1, "finished", 0.5625),
        ("mean", 0, "finished", 0.75),
        ("mean", 1, "finished", 0.8125),
        ("median", 0, "unfinished", 0.25),
        ("median", 1, "unfinished", 0.3125),
    ]
    assert all(row["threads"] == 33 and row["running"] <= 2 for row in rows)
    assert [row["evaluate.accuracy"] for row in rows[:4]] == [1.0] * 4
    page = (output / "README.md").read_text()
    assert "| mean | 2 | 78 ± 40 | +25 ± 0 |\n" in page  # only finished runs, and equal decimals
    assert "| median |" not in page

    interrupted = output / "runs" / "pooling-mean_seed-1"
    (interrupted / "finetune" / "results.json").unlink()
    (interrupted / "finetune" / "checkpoints" / "step-2").mkdir(parents=True)
    run_study(StudyRunner(load_study(file), output), "python scripts/study.py")
    runs = {
        "pooling-cls_seed-0": (1, 1),
        "pooling-mean_seed-1": (2, 1),
        "pooling-median_seed-0": (1, 2),
    }
    for name, (num_trained, num_evaluated) in runs.items():
        log = (output / "runs" / name / "log.txt").read_text()
        assert log.count("the stage finetune") == num_trained, name
        assert log.count("the stage evaluate") == num_evaluated, name
        assert log.count("--resume") == num_trained - 1, name
