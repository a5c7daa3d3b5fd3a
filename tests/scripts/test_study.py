"""Studies: their files in the repository, and a study whose runs are those of another program."""

import sys
from pathlib import Path

import pytest
import yaml
from helpers.command_in_process import parse_flags
from pyarrow import parquet

from modeling_vitcls import cli
from modeling_vitcls.training.pretrain import check_options
from scripts.study import StudyOptions, StudyRunner, load_study
from scripts.study import run as run_command


RECIPES = Path(__file__).parents[2] / "scripts" / "recipes"
FAST = ("study_pretraining",)
STUDIES = [
    pytest.param(file, id=file.stem, marks=() if file.stem in FAST else pytest.mark.slow)
    for file in sorted(RECIPES.glob("study_*.yaml"))
]
STUDY = {
    "title": "Pooling",
    "question": "Which pooling?",
    "seeds": [0, 1],
    "stages": {"finetune": {"dataset": "digits"}},
    "factors": {"pooling": {"cls": None, "mean": {"pooling": "mean"}}},
    "metrics": {"accuracy": "Accuracy (%)"},
    "baseline": {"pooling": "cls"},
}
# Writes the results of a run.
PROGRAM = """#!{python} -IS
import json, pathlib, sys
arguments = sys.argv[3:]
flags = dict(zip(arguments[1::2], arguments[2::2]))
accuracy = 0.75 if "mean" in arguments else 0.5
output = pathlib.Path(flags["--output-dir"])
output.mkdir(parents=True)
(output / "results.json").write_text(json.dumps({{"accuracy": accuracy, "seconds": 90}}))
"""


@pytest.mark.parametrize("file", STUDIES)
def test_the_commands_of_a_study_in_the_repository_are_valid(file: Path) -> None:
    runner = StudyRunner(load_study(file), Path("runs/study"))
    modules = cli.load_modules()
    first_run, *other_runs = runner.study.plan_runs()

    for run in [first_run, *other_runs]:
        if (
            run.seed == first_run.seed
            and len(set(run.levels.items()) - set(first_run.levels.items())) <= 1
        ):
            for stage, flags in runner.build_commands(run):
                options = parse_flags(modules[stage].OPTIONS_CLASS, flags)
                if stage == "pretrain":
                    check_options(options)


def test_the_runs_of_a_study_are_summarized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    output = tmp_path / "output"
    run_command(StudyOptions(tmp_path / "study.yaml", output))

    rows = parquet.read_table(output / "runs.parquet").to_pylist()
    assert [(row["pooling"], row["seed"], row["accuracy"]) for row in rows] == [
        ("cls", 0, 0.5),
        ("cls", 1, 0.5),
        ("mean", 0, 0.75),
        ("mean", 1, 0.75),
    ]
    assert "| mean | 2 | 75.0" in (output / "README.md").read_text()
