# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Studies: grids of training runs over factors and seeds, and a page of tables for each study.

    python scripts/study.py --config scripts/studies/digits.yaml --output-dir runs/study --jobs 2

To continue an interrupted study, repeat the command.

A study file (studies/*.yaml) contains
    title, question    text for the page
    answer             conclusion, added after the study was run (optional)
    seeds              list of seeds; each combination of factor levels runs once per seed
    subsets            name -> {dataset, num_images, seed, groups}: random training subsets (optional). `groups` are
                       new label columns: column -> {name of the group: [label, ...]}
    stages             stage -> flags of the vitcls subcommand; stages run in the order of STAGES
    factors            factor -> level -> flags of `finetune`, or {stage: flags}; {stage: null} skips the stage
    metrics            dotted key of a number in results.json -> heading of its table. Numbers under a heading that
                       ends with (%), such as `Accuracy (%)`, are shown in per cent.
    baseline           factor -> baseline level, with which all levels of the factor are compared

In flags, `{run}` is replaced with the folder of the run, `{folder}` with the folder of the study,
`{seed}` with the seed, and `{subset:NAME}` with the folder of a subset. The name of a subset may
contain `{seed}`.

The output folder contains
    README.md                  page of means with 95% confidence intervals and of differences paired by seed
    runs.parquet               one row per run: factor levels, seed, status, all numeric values in results.json, and
                               the first and last values of each numeric field in metrics.jsonl
    runs/NAME/                 the output folder of each stage, and log.txt
"""

import itertools
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from modeling_vitcls.cli.parsing import run_script
from modeling_vitcls.runtime.errors import format_error
from modeling_vitcls.runtime.files import read_json, write_json
from modeling_vitcls.runtime.flags import Options, check_minimum, to_arguments


if TYPE_CHECKING:
    import pandas
    from datasets import Dataset


STAGES = ("finetune", "evaluate")
MAX_LIST_LENGTH = 32  # maximum length of lists whose elements become columns of runs.parquet

Flags = dict[str, Any]


@dataclass(frozen=True)
class StudyRun:
    """One run of a study: the level of each factor, the seed, and the flags of each stage."""

    name: str
    levels: dict[str, str]
    seed: int
    stages: dict[str, Flags]


@dataclass(frozen=True)
class Study:
    """The contents of a study file."""

    title: str
    question: str
    seeds: list[int]
    stages: dict[str, Flags]
    factors: dict[str, dict[str, Flags]]
    metrics: dict[str, str]
    baseline: dict[str, str]
    answer: str | None = None
    subsets: dict[str, Flags] = field(default_factory=dict)

    def plan_runs(self) -> list[StudyRun]:
        """Return all runs of the grid, ordered by combination of levels, then by seed."""
        runs = []
        for levels, seed in itertools.product(
            itertools.product(*self.factors.values()), self.seeds
        ):
            run_levels = dict(zip(self.factors, levels, strict=True))
            level_names = [
                to_file_name(f"{factor}-{level}") for factor, level in run_levels.items()
            ]
            name = "_".join([*level_names, f"seed-{seed}"])
            runs.append(StudyRun(name, run_levels, seed, self.combine_flags(run_levels, seed)))
        return runs

    def combine_flags(self, levels: Mapping[str, str], seed: int) -> dict[str, Flags]:
        """Return the flags of each stage of a run, from the stages, the levels and the seed."""
        stages: dict[str, Flags | None] = {name: flags or {} for name, flags in self.stages.items()}
        for factor, level in levels.items():
            level_flags = dict(self.factors[factor][level])
            level_stages = {name: level_flags.pop(name) for name in STAGES if name in level_flags}
            if level_flags:  # flags outside a stage belong to `finetune`
                level_stages["finetune"] = (level_stages.get("finetune") or {}) | level_flags
            for name, flags in level_stages.items():
                stages[name] = None if flags is None else (stages.get(name) or {}) | flags
        return {
            name: flags | ({"seed": seed} if name == "finetune" else {})
            for name in STAGES
            if (flags := stages.get(name)) is not None
        }


def load_study(file: Path) -> Study:
    """Load a study file.

    Raise ValueError if the file is not valid YAML, or if a key is missing or unknown.
    """
    try:
        study = Study(**yaml.safe_load(file.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        raise ValueError(
            f"cannot read {file}: {format_error(error)}. Compare it with studies/digits.yaml"
        ) from None
    if unknown_stages := set(study.stages) - set(STAGES):
        raise ValueError(
            f"{file} has unknown stages: {', '.join(unknown_stages)}. Choose from "
            f"{', '.join(STAGES)}"
        )
    factors = {
        str(name): {str(level): flags or {} for level, flags in levels.items()}
        for name, levels in study.factors.items()
    }
    baseline = {str(factor): str(level) for factor, level in study.baseline.items()}
    for factor, level in baseline.items():
        if level not in factors.get(factor, {}):
            raise ValueError(
                f"{file}: `baseline` has the level {level} of {factor}. Set a level that `factors` "
                "has"
            )
    return replace(study, factors=factors, baseline=baseline)


def to_file_name(text: str) -> str:
    """Replace all characters except letters, digits, dots and hyphens with hyphens."""
    return "".join(
        character if character.isalnum() or character in "-." else "-" for character in text
    )


# Execution ----------------------------------------------------------------------------------------


@dataclass
class StudyRunner:
    """Run a study in parallel processes.

    Finished runs are skipped, and interrupted runs are resumed.
    """

    study: Study
    folder: Path
    num_jobs: int = 1  # maximum number of parallel runs
    num_threads: int = 1  # number of CPU threads per run
    # dataset from which all subsets are drawn; overrides the datasets in the study file
    dataset: str | None = None

    def execute(self) -> None:
        """Run all unfinished runs.

        A failed run does not stop the others. Ctrl-C also interrupts the runs, which then save a
        checkpoint.
        """
        for name, subset in self.study.subsets.items():
            if not self.get_subset_folder(name).exists():
                write_subset(self.get_subset_folder(name), subset, self.dataset)
        runs = self.study.plan_runs()
        with ThreadPoolExecutor(self.num_jobs) as executor:
            futures = {
                executor.submit(self.execute_run, run): run
                for run in runs
                if not self.is_finished(run)
            }
            print(f"{len(runs)} runs ({len(runs) - len(futures)} already finished)", flush=True)
            try:
                for future in as_completed(futures):
                    print(f"{futures[future].name}: {future.result()}", flush=True)
            finally:
                executor.shutdown(cancel_futures=True)

    def execute_run(self, run: StudyRun) -> str:
        """Run the unfinished stages of a run; return its metrics or the last line of its log."""
        log_file = self.get_run_folder(run) / "log.txt"
        log_file.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": str(self.num_threads),
            "MKL_NUM_THREADS": str(self.num_threads),
        }
        for stage, flags in self.build_commands(run):
            if self.get_result_file(run, stage).exists():
                continue
            with log_file.open("ab") as log:
                log.write(f"$ vitcls {stage} {' '.join(flags)}\n".encode())
                log.flush()
                command = [sys.executable, "-m", "modeling_vitcls.cli", stage, *flags]
                process = subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False
                )
            if process.returncode:
                text = log_file.read_text(encoding="utf-8", errors="replace")
                return f"failed: {text.strip().splitlines()[-1]}"
        row = build_row(self, run)
        return ", ".join(f"{name} {row[name]:.4g}" for name in self.study.metrics if name in row)

    def get_run_folder(self, run: StudyRun) -> Path:
        """Return the folder of a run."""
        return self.folder / "runs" / run.name

    def get_subset_folder(self, name: str) -> Path:
        """Return the folder of a training subset."""
        return self.folder / "subsets" / to_file_name(str(name))  # YAML reads 100 as a number

    def get_result_file(self, run: StudyRun, stage: str) -> Path:
        """Return the path of the JSON file with the results of a stage."""
        folder = self.get_run_folder(run)
        return folder / stage / "results.json" if stage == "finetune" else folder / f"{stage}.json"

    def is_finished(self, run: StudyRun) -> bool:
        """Return whether the outputs of all stages of a run exist."""
        return all(self.get_result_file(run, stage).exists() for stage in run.stages)

    def build_commands(self, run: StudyRun) -> list[tuple[str, list[str]]]:
        """Return the name and the command-line arguments of each stage of a run."""
        folder = self.get_run_folder(run)
        placeholders = {"{seed}": str(run.seed), "{run}": str(folder), "{folder}": str(self.folder)}
        placeholders |= {
            f"{{subset:{name}}}": str(self.get_subset_folder(name)) for name in self.study.subsets
        }
        commands = []

        def fill(value: Any) -> Any:
            if isinstance(value, list):
                return [fill(each) for each in value]
            for placeholder, text in placeholders.items() if isinstance(value, str) else ():
                value = value.replace(placeholder, text)
            return value

        for stage, stage_flags in run.stages.items():
            flags = {name: fill(value) for name, value in stage_flags.items()}
            if stage == "finetune":
                flags["output_dir"] = str(folder / stage)
                has_checkpoint = any((folder / stage / "checkpoints").glob("*"))
                flags["resume" if has_checkpoint else "overwrite"] = True
            else:
                flags.setdefault("model", str(folder / "finetune"))
                flags["output"] = str(self.get_result_file(run, stage))
            commands.append(
                (stage, [argument for flag in flags.items() for argument in to_arguments(*flag)])
            )
        return commands


def write_subset(folder: Path, subset: Flags, source: str | None) -> None:
    """Write a random part of the split `train`, and the other splits, as Parquet files."""
    from datasets import load_dataset

    partial_folder = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    source = os.path.expandvars(source or subset["dataset"])
    split_files = {file.stem: str(file) for file in sorted(Path(source).glob("*.parquet"))}
    splits = (
        load_dataset("parquet", data_files=split_files) if split_files else load_dataset(source)
    )
    for split, dataset in splits.items():
        if split == "train":
            dataset = dataset.shuffle(seed=subset.get("seed", 0)).select(
                range(subset["num_images"])
            )
        for column, groups in subset.get("groups", {}).items():
            dataset = add_label_groups(dataset, column, groups)
        dataset.to_parquet(partial_folder / f"{split}.parquet")
    partial_folder.rename(folder)


def add_label_groups(
    dataset: "Dataset", column: str, groups: Mapping[str, Sequence[str]]
) -> "Dataset":
    """Return a dataset with a new column: the group of each image's label."""
    from datasets import ClassLabel

    indices = {label: index for index, labels in enumerate(groups.values()) for label in labels}
    group_indices = [indices[dataset.features["label"].names[label]] for label in dataset["label"]]
    return dataset.add_column(column, group_indices).cast_column(
        column, ClassLabel(names=list(groups))
    )


# Results ------------------------------------------------------------------------------------------


def build_row(runner: StudyRunner, run: StudyRun) -> dict[str, Any]:
    """Build the row of a run in runs.parquet: levels, seed, status and numbers.

    The column names of numeric values start with the stage (for example,
    `evaluate.accuracy`), except for the stage `finetune`. The prefixes `first.` and
    `last.` denote the first and the last value in the training log (for example, `first.loss` and
    `last.held_out_accuracy`). If a run has a single label column, the accuracy and loss are
    also stored as `tasks.COLUMN.accuracy` and `tasks.COLUMN.loss`, the names in runs with several
    label columns.
    """
    row: dict[str, Any] = {}
    for stage in run.stages:
        file = runner.get_result_file(run, stage)
        if file.exists():
            row |= flatten_numbers(read_json(file), "" if stage == "finetune" else stage)
    column = run.stages.get("finetune", {}).get("label_column")
    if isinstance(column, str):  # single task
        row |= {f"tasks.{column}.{name}": row[name] for name in ("accuracy", "loss") if name in row}
    log_file = runner.get_run_folder(run) / "finetune" / "metrics.jsonl"
    log_text = log_file.read_text(encoding="utf-8") if log_file.exists() else ""
    records = [json.loads(line) for line in log_text.splitlines()]
    first_values = {name: value for record in reversed(records) for name, value in record.items()}
    last_values = {name: value for record in records for name, value in record.items()}
    row |= flatten_numbers(first_values, "first") | flatten_numbers(last_values, "last")

    # A factor may have the name of a number, such as `steps`: its levels replace the numbers.
    status = "finished" if runner.is_finished(run) else "unfinished"
    levels = {**run.levels, "seed": run.seed, "status": status}
    return levels | {name: value for name, value in row.items() if name not in levels}


def flatten_numbers(value: Any, name: str) -> dict[str, float]:
    """Return the numbers in nested dicts and lists as a flat dict with dotted keys.

    Long lists are left out.
    """
    if isinstance(value, list):
        value = dict(enumerate(value)) if len(value) <= MAX_LIST_LENGTH else {}
    if not isinstance(value, dict):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {name: float(value)} if is_number else {}
    numbers: dict[str, float] = {}
    for key, child in value.items():
        numbers |= flatten_numbers(child, f"{name}.{key}" if name else str(key))
    return numbers


def write_page(runner: StudyRunner, rows: "pandas.DataFrame", command: str) -> Path:
    """Write README.md and return its path."""
    from modeling_vitcls.runtime.system import get_processor_name, get_versions

    study = runner.study
    finished_rows = rows[rows["status"] == "finished"]
    sections = [f"# {study.title}", study.question]
    if study.answer:
        sections.append(f"**Answer:** {' '.join(study.answer.split())}")
    for metric, heading in study.metrics.items():
        table = summarize(study, finished_rows, metric)
        if not table.empty:
            sections += [f"## {heading}", format_table(table)]
    training_seconds = finished_rows["seconds"].sum() if "seconds" in finished_rows else 0
    sections.append(
        f"## Method\n\n{len(finished_rows)} of {len(rows)} runs finished, seeds "
        f"{', '.join(map(str, study.seeds))}; {training_seconds / 60:.0f} minutes of training in "
        f"total, {runner.num_threads} thread{'s' * (runner.num_threads > 1)} per run, on {get_processor_name()}. "
        "Each value is the mean over seeds with its 95% confidence interval (Student's t). "
        "Differences are paired by seed. Each finished run is evaluated once on the held-out "
        "images.\n\n"
        f"```bash\n{command}\n```\n\n"
        + ", ".join(
            f"{name} {version}" for name, version in get_versions("transformers", "timm").items()
        )
    )
    page_file = runner.folder / "README.md"
    page_file.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return page_file


def summarize(study: Study, rows: "pandas.DataFrame", metric: str) -> "pandas.DataFrame":
    """Summarize a metric: one row per combination of levels.

    The columns are the levels, the values by seed, their mean and half width of the 95% interval,
    and the mean and the half width of the paired differences from the baseline (NaN for the
    baseline and without common seeds).
    """
    import pandas

    factors = list(study.factors)
    if metric not in rows:
        return pandas.DataFrame()
    measured = rows.dropna(subset=metric)
    scale = 100 if study.metrics[metric].endswith("(%)") else 1
    groups = {
        levels: group.set_index("seed")[metric] * scale
        for levels, group in measured.groupby(factors, sort=False)
    }
    summary = []
    for levels, values in groups.items():
        baseline = tuple(
            study.baseline.get(factor, level) for factor, level in zip(factors, levels, strict=True)
        )
        differences = (
            (values - groups[baseline]).dropna()
            if baseline in groups and baseline != levels
            else values[:0]
        )
        interval = compute_mean_interval(differences) if len(differences) else (math.nan, math.nan)
        summary.append(
            dict(zip(factors, levels, strict=True))
            | {"runs": values.tolist(), "is_baseline": baseline == levels}
            | dict(zip(("mean", "half_width"), compute_mean_interval(values), strict=True))
            | dict(zip(("difference", "difference_half_width"), interval, strict=True))
        )
    return pandas.DataFrame(summary)


def compute_mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Compute the mean over seeds and the half width of its 95% interval (Student's t).

    The half width is NaN for a single value.
    """
    import numpy as np
    from scipy import stats

    if len(values) < 2:
        return float(np.mean(values)), math.nan
    half_width = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    return float(np.mean(values)), float(half_width)


def format_table(summary: "pandas.DataFrame") -> str:
    """Format a Markdown table in which all numbers have the same decimals.

    They are two digits of the largest half width.
    """
    widths = summary[["half_width", "difference_half_width"]].max(axis=None)
    largest = widths if widths > 0 else summary["mean"].abs().max() / 100 or 1.0
    decimals = max(0, 1 - math.floor(math.log10(largest)))
    keys = list(summary.columns[: list(summary.columns).index("runs")])
    rows = [[*keys, "runs", "mean", "difference from the baseline"], ["---"] * (len(keys) + 3)]
    for row in summary.to_dict("records"):
        intervals = []
        for mean, width, sign in (
            ("mean", "half_width", ""),
            ("difference", "difference_half_width", "+"),
        ):
            text = "" if math.isnan(row[mean]) else f"{row[mean]:{sign},.{decimals}f}"
            intervals.append(
                text if math.isnan(row[width]) else f"{text} ± {row[width]:,.{decimals}f}"
            )
        difference = "baseline" if row["is_baseline"] else intervals[1]
        rows.append([*(row[key] for key in keys), str(len(row["runs"])), intervals[0], difference])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def run_study(runner: StudyRunner, command: str) -> list[dict[str, Any]]:
    """Run a study, write the results to its folder, and return the rows of runs.parquet.

    Finished runs in the folder are not repeated. The page (README.md) shows the command line
    `command`.
    """
    import pandas

    study, folder = runner.study, runner.folder
    folder.mkdir(parents=True, exist_ok=True)
    settings_file = folder / "study.json"
    study_settings = {"stages": study.stages, "factors": study.factors, "subsets": study.subsets}
    if settings_file.exists() and read_json(settings_file) != json.loads(
        json.dumps(study_settings)
    ):
        raise ValueError(
            f"{folder} contains runs of a study with different flags. Set a different --output-dir"
        )
    write_json(settings_file, study_settings)
    try:
        runner.execute()
    finally:
        rows = [build_row(runner, run) for run in study.plan_runs()]
        frame = pandas.DataFrame(rows)
        frame.to_parquet(folder / "runs.parquet")
        print(f"page: {write_page(runner, frame, command)}", flush=True)
    return rows


# The program --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StudyOptions(Options):
    """Fine-tune with each combination of settings and seeds, and write a page of tables."""

    config: Path
    """Study file, such as scripts/studies/digits.yaml."""
    output_dir: Path
    """Folder for the runs and the page. Finished runs in the folder are not repeated."""
    dataset: str | None = None
    """Dataset from which all subsets are drawn, instead of the datasets in the study file."""
    jobs: int = 1
    """Maximum number of parallel runs."""
    threads: int = 1
    """CPU threads per run."""

    def check(self) -> None:
        check_minimum(self, 1, "jobs", "threads")


def run(options: StudyOptions) -> None:
    """Run the study. Exit with status 1 if a run fails."""
    runner = StudyRunner(
        load_study(options.config),
        options.output_dir,
        options.jobs,
        options.threads,
        options.dataset,
    )
    flags = ["--config", options.config, "--output-dir", options.output_dir]
    flags += ["--jobs", options.jobs, "--threads", options.threads]
    flags += ["--dataset", options.dataset] if options.dataset else []
    rows = run_study(runner, shlex.join(map(str, ["python", "scripts/study.py", *flags])))
    if num_unfinished := sum(row["status"] != "finished" for row in rows):
        raise ValueError(
            f"{num_unfinished} of {len(rows)} runs failed. See log.txt in their folders"
        )


if __name__ == "__main__":
    run_script(StudyOptions, run)
