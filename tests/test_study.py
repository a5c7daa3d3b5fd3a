"""Studies: the grid of runs, the page, failed runs and resuming. The runs are real fine-tuning processes."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset
from pyarrow import parquet
from scipy import stats
from tiny_models import raises_one_line

from modeling_vitcls.commands.study import StudyOptions
from modeling_vitcls.commands.study import run as run_command
from modeling_vitcls.study import (
    Study,
    StudyRunner,
    add_label_groups,
    build_row,
    compute_interval,
    format_interval,
    format_table,
    group_values,
    load_study,
    run_study,
)


RECIPES = Path(__file__).parents[1] / "scripts" / "recipes"
SIZES = {"model": "vitcls-tiny", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FINETUNE = {"dataset": "digits", **SIZES, "image_size": 32, "patch_size": 16, "intermediate_size": 16, "report": False}
STUDY = {
    "title": "Pooling",
    "question": "Which pooling?",
    "seeds": [0, 1],
    "stages": {"finetune": {**FINETUNE, "max_steps": 4, "num_workers": 0}},
    "factors": {"pooling": {"cls": None, "mean": {"pooling": "mean"}}},
    "metrics": ["accuracy", "loss"],
    "baseline": {"pooling": "cls"},
}


def write_study(folder: Path, **changes: object) -> Path:
    """Write a study file with two poolings and two seeds, and return its path."""
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return file


def start_study(file: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    """Start `vitcls study` in a process."""
    command = [
        sys.executable,
        "-m",
        "modeling_vitcls.cli",
        "study",
        "--config",
        str(file),
        "--output-dir",
        str(output),
    ]
    return subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_grid_combines_levels_seeds_and_stages(tmp_path: Path) -> None:
    factors = {
        "pretraining": {"none": {"pretrain": None}, "masked": {"model": "{run}/pretrain"}},
        "pooling": {"cls": {}, "mean": {"pooling": "mean"}},
    }
    stages = {"finetune": {"model": "vitcls-tiny"}, "pretrain": {"epochs": 2}}
    file = write_study(tmp_path, factors=factors, stages=stages, baseline={"pretraining": "none"})
    runs = load_study(file).plan_runs()
    assert len(runs) == len({run.name for run in runs}) == 2 * 2 * 2
    by_levels = {(*run.levels.values(), run.seed): run.stages for run in runs}
    assert by_levels["none", "cls", 1] == {"finetune": {"model": "vitcls-tiny", "seed": 1}}
    assert by_levels["masked", "mean", 0] == {
        "pretrain": {"epochs": 2, "seed": 0},
        "finetune": {"model": "{run}/pretrain", "pooling": "mean", "seed": 0},
    }
    runner = StudyRunner(load_study(file), tmp_path / "out")
    masked = next(run for run in runs if run.levels["pretraining"] == "masked")
    (first, _), (second, flags) = runner.build_commands(masked)
    assert (first, second) == ("pretrain", "finetune")
    assert flags[flags.index("--model") + 1] == str(tmp_path / "out" / "runs" / masked.name / "pretrain")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": []}, "no value for seeds"),
        ({"metric": ["loss"]}, "unknown keys: metric"),
        ({"baseline": {"pooling": "max"}}, "baseline level max of pooling"),
        ({"stages": {"train": {}}}, "has unknown stages: train"),
    ],
)
def test_a_wrong_study_file_gets_one_line(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_study(write_study(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_the_studies_of_the_repository_load() -> None:
    files = sorted(RECIPES.glob("study_*.yaml"))
    assert files
    for file in files:
        assert load_study(file).plan_runs(), file


def test_a_subset_gets_label_groups() -> None:
    images = Dataset.from_dict({"label": [0, 2, 1]}).cast_column("label", ClassLabel(names=["cat", "dog", "ship"]))
    grouped = add_label_groups(images, "kind", {"vehicle": ["ship"], "animal": ["cat", "dog"]})
    assert grouped["kind"] == [1, 0, 1] and grouped.features["kind"].names == ["vehicle", "animal"]
    assert grouped["label"] == images["label"]
    with pytest.raises(ValueError, match="do not contain the labels dog, ship"):
        add_label_groups(images, "kind", {"animal": ["cat"]})
    with pytest.raises(ValueError, match="requires a column `label` with class names"):
        add_label_groups(Dataset.from_dict({"label": [0]}), "kind", {"animal": ["cat"]})


def test_a_row_has_the_first_and_the_last_value_of_the_training_log(tmp_path: Path) -> None:
    runner = StudyRunner(load_study(write_study(tmp_path)), tmp_path / "out")
    run = runner.study.plan_runs()[0]
    folder = runner.get_run_folder(run) / "finetune"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(
        json.dumps({"accuracy": 0.5, "dataset": "digits", "counts": [1, 2, 3], "pixels": [1] * 100})
    )
    records = [{"loss": 2.5, "entropy": [1.0, 2.0], "name": "a"}, {"loss": 1.5, "entropy": [3, 4]}, {"accuracy": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    row = build_row(runner, run)
    assert row["accuracy"] == 0.5 and row["counts.2"] == 3.0 and row["status"] == "finished"
    assert not any(name.startswith("pixels") for name in row)
    one_task = replace(run, stages={"finetune": {"label_column": "kind"}})
    assert build_row(runner, one_task)["kind_accuracy"] == 0.5
    logged = {name: value for name, value in row.items() if name.startswith(("first", "last"))}
    assert logged == {
        "first.loss": 2.5,
        "first.entropy.0": 1.0,
        "first.entropy.1": 2.0,
        "first.accuracy": 0.5,
        "last.loss": 1.5,
        "last.entropy.0": 3.0,
        "last.entropy.1": 4.0,
        "last.accuracy": 0.5,
    }


def test_a_list_has_one_row_per_index() -> None:
    study = Study(**STUDY | {"factors": {"pooling": {"cls": {}, "mean": {}}}})
    rows = [
        {"pooling": level, "seed": seed, "entropy.0": 1.0 + seed, "entropy.1": 2.0, "entropy.largest": 9.0}
        for level in ("cls", "mean")
        for seed in (0, 1)
    ]
    groups = group_values(study, rows, "entropy.*")
    assert groups["cls", "0"] == {0: 1.0, 1: 2.0} and set(groups) == {
        (level, index) for level in ("cls", "mean") for index in "01"
    }
    table = format_table(study, groups, "entropy.*").splitlines()
    assert table[0] == "| pooling | index | runs | entropy.* | difference from the baseline |"
    assert table[3].startswith("| cls | 1 | 2 | 2 ± 0 | baseline") and table[5].endswith("| 2 ± 0 | +0 ± 0 |")


def test_differences_are_paired_by_seed() -> None:
    study = Study(**STUDY | {"factors": {"pooling": {"cls": {}, "mean": {}}}})
    values = {"cls": [0.5, 0.7, 0.9], "mean": [0.6, 0.8, 0.98]}
    rows = [
        {"pooling": level, "seed": seed, "accuracy": value}
        for level, column in values.items()
        for seed, value in enumerate(column)
    ]
    table = format_table(study, group_values(study, rows, "accuracy"), "accuracy").splitlines()
    low, high = stats.t.interval(0.95, 2, loc=0.7, scale=stats.sem(values["cls"]))
    mean, half_width = compute_interval(values["cls"])
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))
    difference = stats.ttest_rel(values["mean"], values["cls"]).confidence_interval(0.95)
    assert table[2].endswith("| baseline |")
    assert f"{sum(difference) / 2:+.3f} ± {(difference.high - difference.low) / 2:.3f}" in table[3]


def test_intervals_show_two_digits_of_the_half_width() -> None:
    assert format_interval([1.2345]) == "1.234"  # a single run has no interval
    assert format_interval([2.0, 2.0]) == "2 ± 0"
    assert format_interval([1000.0, 1234.0, 1468.0]) == "1234 ± 581"
    assert format_interval([0.018, 0.02, 0.022], "+") == "+0.0200 ± 0.0050"


@pytest.mark.slow
def test_failed_runs_do_not_stop_others_and_finished_runs_are_not_repeated(tmp_path: Path) -> None:
    factors = {"pooling": {"cls": {}, "wrong": {"pooling": "median"}}}
    file, output = write_study(tmp_path, factors=factors, seeds=[0]), tmp_path / "out"
    process = start_study(file, output)
    out, error = process.communicate()
    assert process.returncode == 1 and error.splitlines()[-1].startswith("error: 1 of 2 runs failed"), error
    rows = {row["pooling"]: row for row in parquet.read_table(output / "runs.parquet").to_pylist()}
    assert rows["cls"]["status"] == "finished" and 0 <= rows["cls"]["accuracy"] <= 1
    assert rows["wrong"]["status"] == "unfinished" and rows["wrong"]["accuracy"] is None
    assert "1 of 2 runs finished" in (output / "README.md").read_text()
    assert "failed: " in out
    written = (output / "runs" / "pooling-cls_seed-0" / "finetune" / "results.json").stat().st_mtime_ns
    start_study(file, output).communicate()
    assert (output / "runs" / "pooling-cls_seed-0" / "finetune" / "results.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(("statuses", "message"), [(("finished",) * 2, ""), (("finished", "unfinished"), "1 of 2")])
def test_the_command_passes_its_flags_and_counts_failed_runs(
    statuses: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def record(*arguments: Any, **options: Any) -> list[dict[str, str]]:
        calls.append((arguments, options))
        return [{"status": status} for status in statuses]

    monkeypatch.setattr("modeling_vitcls.study.run_study", record)
    file, output = write_study(tmp_path), tmp_path / "out"
    options = StudyOptions(file, output, dataset="other", jobs=3, threads=2, memory_limit=1.5)
    if message:
        with pytest.raises(SystemExit) as ended:
            run_command(options)
        assert ended.value.code == 1
        assert capsys.readouterr().err == f"error: {message} runs failed. See log.txt in their folders\n"
    else:
        run_command(options)
    ((study, folder, command), settings), *others = calls
    assert (study, folder, others) == (load_study(file), output, [])
    assert command == f"vitcls study --config {file} --output-dir {output} --jobs 3 --dataset other"
    assert settings == {"jobs": 3, "threads": 2, "memory_limit": 1.5, "dataset": "other"}


@pytest.mark.parametrize("name", ["jobs", "threads"])
def test_the_numbers_of_jobs_and_threads_are_positive(name: str) -> None:
    with raises_one_line(f"--{name} is 0: set --{name} to 1 or more"):
        StudyOptions(Path("study.yaml"), Path("out"), **{name: 0})
    assert getattr(StudyOptions(Path("study.yaml"), Path("out"), **{name: 1}), name) == 1


def test_other_flags_require_another_folder(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "study.json").write_text("{}")
    with pytest.raises(ValueError, match="a study with different flags"):
        run_study(load_study(write_study(tmp_path)), output, "vitcls study")


@pytest.mark.slow
def test_a_killed_study_resumes_its_runs(tmp_path: Path) -> None:
    stages = {"finetune": {**STUDY["stages"]["finetune"], "max_steps": 60, "save_every": 5}}
    file, output = write_study(tmp_path, stages=stages), tmp_path / "out"
    process = start_study(file, output, "--jobs", "2")
    while not list(output.glob("runs/*/finetune/checkpoints/*")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate()
    process = start_study(file, output, "--jobs", "2")
    _, error = process.communicate()
    assert process.returncode == 0, error
    assert "--resume" in "".join(log.read_text() for log in output.glob("runs/*/log.txt"))
    rows = parquet.read_table(output / "runs.parquet").to_pylist()
    assert len(rows) == 4 and all(row["status"] == "finished" and row["steps"] == 60 for row in rows)


@pytest.mark.slow
def test_the_study_of_digits(tmp_path: Path) -> None:
    process = start_study(RECIPES / "study_digits.yaml", tmp_path / "out", "--jobs", "2")
    _, error = process.communicate()
    assert process.returncode == 0, error
    rows = parquet.read_table(tmp_path / "out" / "runs.parquet").to_pylist()
    assert len(rows) == 9 and min(row["accuracy"] for row in rows) > 0.5
    assert sorted(file.name for file in (tmp_path / "out" / "images").iterdir()) == [
        "pooling-accuracy.png",
        "pooling-loss.png",
    ]
