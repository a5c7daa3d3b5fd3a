"""Studies: the grid of runs, the page, failed runs and resuming.

The runs of slow tests are real fine-tuning processes. In the other tests, `PROGRAM` replaces the `vitcls` command.
"""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from datasets import ClassLabel, Dataset
from helpers.tiny_models import raises_one_line
from matplotlib.figure import Figure
from PIL import Image
from pyarrow import parquet
from scipy import stats

from modeling_vitcls import study as study_module
from modeling_vitcls.commands.study import StudyOptions
from modeling_vitcls.commands.study import run as run_command
from modeling_vitcls.intervals import compute_mean_interval
from modeling_vitcls.study import (
    RunProcess,
    Study,
    StudyRunner,
    add_label_groups,
    build_row,
    format_interval,
    format_table,
    group_values,
    load_study,
    plot_groups,
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

# Writes the outputs of a stage. Evaluation fails for the pooling "median". With the pooling "endless", the program
# waits for a signal. With the pooling "patient", the program first waits until an endless run has started.
PROGRAM = """#!{python} -IS
import json, os, pathlib, signal, sys, time
arguments = sys.argv[3:]
flags = dict(zip(arguments[1::2], arguments[2::2]))
folder = pathlib.Path(flags.get("--output-dir") or flags["--model"]).parent
print("the stage", arguments[0], flush=True)
pooling = flags.get("--pooling", "cls")
if pooling == "endless":
    def stop(*_):
        (folder / "stopped").touch()
        sys.exit(143)
    signal.signal(signal.SIGTERM, stop)
    (folder / "started").touch()
    time.sleep(20)
while pooling == "patient" and not list(folder.parent.glob("*/started")):
    time.sleep(0.01)
if arguments[0] == "finetune":
    seed = int(flags["--seed"])
    accuracy = {{"cls": 0.5, "mean": 0.75}}.get(pooling, 0.25) + seed / 16
    threads = int(os.environ["OMP_NUM_THREADS"])
    output = folder / "finetune"
    output.mkdir()
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


def start_study(file: Path, output: Path, *flags: str) -> subprocess.Popen[str]:
    """Start `vitcls study` in a process."""
    command = [sys.executable, "-m", "modeling_vitcls.cli", "study", "--config", file, "--output-dir", output, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `PROGRAM` instead of `vitcls`."""
    file = tmp_path / "program"
    file.write_text(PROGRAM.format(python=sys.executable))
    file.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(file))
    monkeypatch.setattr(study_module, "POLL_SECONDS", 0.01)


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


def test_the_levels_of_a_later_factor_can_add_a_skipped_stage(tmp_path: Path) -> None:
    factors = {
        "stage": {"none": {"finetune": None}},
        "epochs": {1: None, 2: {"finetune": {"epochs": 2}, "warmup": 0.2, "evaluate": {"split": "test"}}},
    }
    stages = {"finetune": {"model": "vitcls-tiny"}, "evaluate": None}
    file = write_study(tmp_path, factors=factors, stages=stages, baseline={"stage": "none", "epochs": 1}, seeds=[3])
    default, two = load_study(file).plan_runs()
    assert default.stages == {"evaluate": {}}  # evaluation has no seed
    assert two.stages == {"finetune": {"epochs": 2, "warmup": 0.2, "seed": 3}, "evaluate": {"split": "test"}}
    assert list(two.stages) == ["finetune", "evaluate"]
    assert [default.name, two.name] == ["stage-none_epochs-1_seed-3", "stage-none_epochs-2_seed-3"]
    assert two.levels == {"stage": "none", "epochs": "2"}


def test_flags_of_each_stage(tmp_path: Path) -> None:
    stages = {
        "pretrain": {"dataset": "{subset:few images}"},
        "finetune": {"model": "{folder}/{run}", "flip": False, "image_size": [32, 48], "folds": 2},
        "evaluate": {"dataset": "digits"},
        "inspect": {"num_images": 4, "model": "{run}/pretrain"},  # by default, the fine-tuned model
    }
    subsets = {"few images": {"dataset": "digits", "num_images": 4}}
    study = load_study(
        write_study(
            tmp_path, stages=stages, subsets=subsets, factors={"lr 1/2": {"a b": None}}, baseline={"lr 1/2": "a b"}
        )
    )
    out = tmp_path / "out"
    run, runner = study.plan_runs()[0], StudyRunner(study, out)
    folder = out / "runs" / "lr-1-2-a-b_seed-0"
    (folder / "pretrain" / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "finetune" / "checkpoints").mkdir(parents=True)  # killed before the first checkpoint
    assert {stage: " ".join(flags) for stage, flags in runner.build_commands(run)} == {
        "pretrain": f"--dataset {out}/subsets/few-images --seed 0 --output-dir {folder}/pretrain --resume",
        "finetune": f"--model {out}/{folder} --no-flip --image-size 32 48 --folds 2 --seed 0 "
        f"--output-dir {folder}/finetune --overwrite",
        "evaluate": f"--dataset digits --model {folder}/finetune --output {folder}/evaluate.json",
        "inspect": f"--num-images 4 --model {folder}/pretrain --json {folder}/inspect.json "
        f"--output {folder}/report.html",
    }
    names = ("pretrain/results.json", "finetune/results.json", "evaluate.json", "inspect.json")
    for file in (folder / name for name in names):
        assert not runner.is_finished(run)
        file.parent.mkdir(exist_ok=True)
        file.touch()
    assert runner.is_finished(run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seeds": []}, "no value for seeds"),
        ({"metric": ["loss"]}, "unknown keys: metric"),
        ({"baseline": {"pooling": "max"}}, "baseline level max of pooling"),
        ({"stages": {"train": {}}}, "has unknown stages: train"),
        ({"baseline": {"pool": "cls"}}, "baseline level cls of pool"),
    ],
)
def test_a_wrong_study_file_gets_one_line(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_study(write_study(tmp_path, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"- a", "is not a YAML mapping"), (b"title: [", "cannot read"), (b"title: \xff", "cannot read")],
)
def test_a_file_that_is_no_mapping_gets_one_line(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "study.yaml").write_bytes(content)
    with raises_one_line(words, "study.yaml"):
        load_study(tmp_path / "study.yaml")


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


def test_a_subset_has_random_training_images_and_all_other_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split, numbers in {"train": range(20), "test": range(100, 105)}.items():
        images = Dataset.from_dict({"label": [number % 2 for number in numbers], "number": list(numbers)})
        images = images.cast_column("label", ClassLabel(names=["cat", "ship"]))
        images.to_parquet(tmp_path / "data" / f"{split}.parquet")
    subset = {"dataset": "$IMAGES/data", "num_images": 6}
    groups = {"kind": {"vehicle": ["ship"], "animal": ["cat"]}}
    subsets = {"a": subset, "b": subset | {"seed": 0}, "c": subset | {"seed": 1, "groups": groups}}
    study = load_study(write_study(tmp_path, subsets=subsets))
    monkeypatch.setenv("IMAGES", str(tmp_path))
    runner = StudyRunner(study, tmp_path / "out")
    partial = tmp_path / "out" / "subsets" / ".a.partial"
    partial.mkdir(parents=True)
    (partial / "validation.parquet").touch()  # the rest of a killed study
    runner.write_subsets()

    def read(name: str, split: str) -> dict[str, list[int]]:
        return parquet.read_table(tmp_path / "out" / "subsets" / name / f"{split}.parquet").to_pydict()

    numbers = [read(name, "train")["number"] for name in "abc"]
    assert numbers[0] == numbers[1] != numbers[2]
    for one in numbers:
        assert len(set(one)) == 6 and set(one) < set(range(20)) and sorted(one) != list(range(6))
    assert read("c", "train")["kind"] == [1 - number % 2 for number in numbers[2]]
    assert read("c", "test")["kind"] == [1, 0, 1, 0, 1]
    assert all(read(name, "test")["number"] == list(range(100, 105)) for name in "abc")
    names = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.*"))
    assert names == [f"subsets/{name}/{split}.parquet" for name in "abc" for split in ("test", "train")]

    (tmp_path / "out" / "subsets" / "a" / "train.parquet").write_text("kept")
    other = StudyRunner(study, tmp_path / "out", dataset=str(tmp_path / "absent"))
    other.write_subsets()  # all subsets exist
    assert (tmp_path / "out" / "subsets" / "a" / "train.parquet").read_text() == "kept"
    other.folder = tmp_path / "other"
    with pytest.raises(FileNotFoundError, match="absent"):
        other.write_subsets()
    assert not list((tmp_path / "other" / "subsets").glob("[abc]"))


def test_a_row_has_the_first_and_the_last_value_of_the_training_log(tmp_path: Path) -> None:
    runner = StudyRunner(load_study(write_study(tmp_path)), tmp_path / "out")
    run = runner.study.plan_runs()[0]
    folder = runner.get_run_folder(run) / "finetune"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(
        json.dumps(
            {
                "accuracy": 0.5,
                "loss": 2.0,
                "dataset": "digits",
                "resumed": True,
                "counts": [1, 2, 3],
                "pixels": [1] * 33,
                "layers": [1] * 32,
                "tokens": {"cls": {"norm": 2}},
            }
        )
    )
    records = [{"loss": 2.5, "entropy": [1.0, 2.0], "name": "a"}, {"loss": 1.5, "entropy": [3, 4]}, {"accuracy": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    row = build_row(runner, run)
    assert row["accuracy"] == 0.5 and row["counts.2"] == 3.0 and row["status"] == "finished"
    assert row["layers.31"] == 1.0 and row["tokens.cls.norm"] == 2.0
    assert not any(name.startswith(("pixels", "resumed")) for name in row)
    one_task = replace(run, stages={"finetune": {"label_column": "kind"}})
    assert build_row(runner, one_task) == row | {"kind_accuracy": 0.5, "kind_loss": 2.0}
    two_tasks = replace(run, stages={"finetune": {"label_column": ["kind", "age"]}})
    assert build_row(runner, two_tasks) == row
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
    mean, half_width = compute_mean_interval(values["cls"])
    assert (mean - half_width, mean + half_width) == pytest.approx((low, high))
    difference = stats.ttest_rel(values["mean"], values["cls"]).confidence_interval(0.95)
    assert table[2].endswith("| baseline |")
    assert f"{sum(difference) / 2:+.3f} ± {(difference.high - difference.low) / 2:.3f}" in table[3]


def test_differences_use_the_seeds_of_both_levels_and_the_same_other_level() -> None:
    factors = {"pooling": {"cls": {}, "mean": {}}, "size": {"s": {}, "l": {}}}
    study = Study(**STUDY | {"factors": factors})
    groups = {
        ("cls", "s"): {0: 0.1, 1: 0.3},
        ("cls", "l"): {0: 0.5},
        ("mean", "s"): {1: 0.4, 2: 0.9},
        ("mean", "l"): {2: 0.75},
    }
    lines = format_table(study, groups, "accuracy").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[:3] + row[4:] for row in cells] == [
        ["cls", "s", "2", "baseline"],
        ["cls", "l", "1", "baseline"],
        ["mean", "s", "2", "+0.1"],
        ["mean", "l", "1", ""],  # no seed in common
    ]


def test_plots_have_a_row_for_each_combination_of_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {("cls", "s"): {0: 1.0, 1: 2.0, 2: 6.0}, ("mean", "l"): {0: 4.0}}
    save, figures = Figure.savefig, []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (figures.append(self), save(self, *args, **kwargs))
    )
    plot_groups(groups, "accuracy", tmp_path / "plot.png")
    assert Image.open(tmp_path / "plot.png").width == 840
    (axes,) = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cls, s", "mean, l"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first row is at the top
    points = [list(map(tuple, line.get_xydata().tolist())) for line in axes.lines]
    assert [line for line in points if len(line) == 3] == [[(1.0, 0.0), (2.0, 0.0), (6.0, 0.0)]]
    assert [line for line in points if len(line) == 1] == [[(3.0, 0.0)], [(4.0, 1.0)], [(4.0, 1.0)]]
    (interval,) = [line.get_segments()[0].tolist() for line in axes.collections if len(line.get_segments())]
    half_width = compute_mean_interval([1.0, 2.0, 6.0])[1]
    assert interval == [[pytest.approx(3 - half_width), 0], [pytest.approx(3 + half_width), 0]]


def test_intervals_show_two_digits_of_the_half_width() -> None:
    assert format_interval([1.2345]) == "1.234"  # a single run has no interval
    assert format_interval([2.0, 2.0]) == "2 ± 0"
    assert format_interval([1000.0, 1234.0, 1468.0]) == "1234 ± 581"
    assert format_interval([0.018, 0.02, 0.022], "+") == "+0.0200 ± 0.0050"


@pytest.mark.usefixtures("program")
def test_all_runs_are_executed_and_summarized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    num_running: list[int] = []
    monkeypatch.setattr(StudyRunner, "measure_memory", lambda self, running: num_running.append(len(running)))
    factors = {"pooling": {"cls": {}, "mean": {"pooling": "mean"}, "median": {"pooling": "median"}}}
    stages = {"finetune": {"model": "vitcls-tiny"}, "evaluate": None}
    changes = {
        "factors": factors,
        "stages": stages,
        "answer": "The\nmean.",
        "metrics": ["accuracy", "evaluate.accuracy", "f1"],
    }
    study, output = load_study(write_study(tmp_path, **changes)), tmp_path / "out"
    rows = run_study(study, output, "vitcls study --config pooling", num_jobs=2, num_threads=3)
    table = parquet.read_table(output / "runs.parquet").to_pylist()
    assert [dict.fromkeys(table[0]) | row for row in rows] == table
    assert [(row["pooling"], row["seed"], row["status"], row["accuracy"]) for row in rows] == [
        ("cls", 0, "finished", 0.5),
        ("cls", 1, "finished", 0.5625),
        ("mean", 0, "finished", 0.75),
        ("mean", 1, "finished", 0.8125),
        ("median", 0, "unfinished", 0.25),
        ("median", 1, "unfinished", 0.3125),
    ]
    assert all(row["threads"] == 3 for row in rows) and max(num_running) == 2
    assert [row["evaluate.accuracy"] for row in rows[:4]] == [1.0] * 4 and "evaluate.is_frozen" not in rows[0]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 runs (0 already finished)" and lines[-1] == f"page: {output / 'README.md'}"
    assert sorted(line.partition("/")[0] for line in lines[1:-1]) == [f"[{number}" for number in range(1, 7)]
    assert {line.partition("; ")[2] for line in lines[1:-1]} == {"about 1 min remaining", ""}
    progress = {line.partition("] ")[2].partition(";")[0] for line in lines[1:-1]}
    assert {
        "pooling cls, seed 1: accuracy 0.5625, evaluate.accuracy 1",
        "pooling median, seed 0: failed: error: no median",
    } <= progress
    page = (output / "README.md").read_text()
    assert page.startswith(
        "# Pooling\n\nWhich pooling?\n\n**Answer:** The mean.\n\n## accuracy\n\n| pooling | runs | accuracy |"
    )
    assert "| mean | 2 | 0.78 ± 0.40 | +0.25 ± 0 |\n\n![" in page  # only finished runs
    assert "4 of 6 runs finished, seeds 0, 1; 6 minutes of training in total, 3 threads per run" in page
    assert "```bash\nvitcls study --config pooling\n```" in page and "f1" not in page
    images = re.findall(r"!\[.*\]\((.*)\)", page)
    assert images == ["images/pooling-accuracy.png", "images/pooling-evaluate.accuracy.png"]
    assert all(Image.open(output / image).format == "PNG" for image in images)

    log = output / "runs" / "pooling-mean_seed-1" / "log.txt"
    folder = log.parent / "finetune"
    assert log.read_text().splitlines() == [
        f"$ vitcls finetune --model vitcls-tiny --pooling mean --seed 1 --output-dir {folder} --overwrite",
        "the stage finetune",
        f"$ vitcls evaluate --model {folder} --output {log.parent / 'evaluate.json'}",
        "the stage evaluate",
    ]
    (log.parent / "evaluate.json").unlink()
    run_study(study, output, "vitcls study")
    assert "6 runs (3 already finished)" in capsys.readouterr().out
    assert "1 thread per run" in (output / "README.md").read_text()
    assert [line for line in log.read_text().splitlines() if line.startswith("the")][2:] == ["the stage evaluate"]
    finished = output / "runs" / "pooling-cls_seed-0" / "log.txt"
    assert finished.read_text().count("the stage") == 2
    with pytest.raises(ValueError, match="contains runs of a study with different flags"):
        run_study(replace(study, subsets={"one": {}}), output, "vitcls study")


@pytest.mark.usefixtures("program")
def test_an_interrupted_study_stops_its_runs_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StudyRunner, "print_progress", interrupt)
    factors = {"pooling": {"endless": {"pooling": "endless"}, "patient": {"pooling": "patient"}}}
    Dataset.from_dict({"label": [0, 1]}).to_parquet(tmp_path / "data" / "train.parquet")
    changes = {
        "stages": {"finetune": {"model": "vitcls-tiny", "dataset": "{subset:one}"}},
        "subsets": {"one": {"dataset": str(tmp_path / "data"), "num_images": 1}},
        "baseline": {"pooling": "patient"},
        "seeds": [0],
    }
    study = load_study(write_study(tmp_path, factors=factors, **changes))
    with pytest.raises(KeyboardInterrupt):
        run_study(study, tmp_path / "out", "vitcls study", num_jobs=2)
    assert (tmp_path / "out" / "runs" / "pooling-endless_seed-0" / "stopped").exists()
    assert "1 of 2 runs finished" in (tmp_path / "out" / "README.md").read_text()
    assert parquet.read_table(tmp_path / "out" / "subsets" / "one" / "train.parquet").num_rows == 1


def test_the_remaining_time_is_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runner = StudyRunner(load_study(write_study(tmp_path)), tmp_path / "out", num_jobs=2, durations=[120.0, 240.0])
    run = runner.study.plan_runs()[0]
    runner.get_run_folder(run).mkdir(parents=True)
    (runner.get_run_folder(run) / "log.txt").write_text("$ vitcls finetune\n")
    process = RunProcess(run, SimpleNamespace(returncode=1), iter(()), 0.0)  # type: ignore[arg-type]
    for num_left in (6, 0):
        runner.print_progress(process, 4, num_left)
    first, last = capsys.readouterr().out.splitlines()
    assert first == "[4/10] pooling cls, seed 0: failed: $ vitcls finetune; about 9 min remaining"
    assert last == "[4/4] pooling cls, seed 0: failed: $ vitcls finetune"


def test_runs_start_only_if_they_fit_in_the_memory_limit(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    runner = StudyRunner(study, tmp_path / "out", memory_limit=9.0, max_run_bytes=3 * 2**30)
    running: Any = [None]
    assert runner.can_start_run(2 * running) and not runner.can_start_run(3 * running)
    unmeasured = StudyRunner(study, tmp_path / "out", memory_limit=9.0)
    assert unmeasured.can_start_run([]) and not unmeasured.can_start_run(running)
    assert StudyRunner(study, tmp_path / "out").can_start_run(3 * running)


def test_the_memory_of_the_largest_run_is_measured(tmp_path: Path) -> None:
    """The memory of a run includes its child processes, such as data loaders."""
    runner = StudyRunner(load_study(write_study(tmp_path)), tmp_path / "out")
    run = runner.study.plan_runs()[0]
    code = "values = bytearray(int(sys.argv[1])); print(flush=True); sys.stdin.read()"
    program = tmp_path / "program.sh"
    program.write_text(f"{sys.executable} -IS -c 'import sys; {code}' $1\ntrue\n")
    sizes = []
    for size in (80_000_000, 1):
        with subprocess.Popen(["sh", "-c", f"sh {program} {size}; true"], stdin=-1, stdout=-1) as process:
            assert process.stdout is not None
            process.stdout.readline()
            running = [RunProcess(run, process, iter(()), 0.0)]
            runner.measure_memory(running)
            sizes.append(runner.max_run_bytes)
            process.communicate()
        runner.measure_memory(running)  # the process has ended
    assert 80_000_000 < sizes[0] < 160_000_000 and sizes == [runner.max_run_bytes] * 2


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
    assert settings == {"num_jobs": 3, "num_threads": 2, "memory_limit": 1.5, "dataset": "other"}


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
        "pooling-on-handwritten-digits-accuracy.png",
        "pooling-on-handwritten-digits-loss.png",
    ]
