"""Studies: grids of training runs over factors and seeds, and a page of tables and plots for each study.

A study file (scripts/recipes/study_*.yaml) contains
    title, question    text for the page
    answer             conclusion, added after the study was run (optional)
    seeds              list of seeds; each combination of factor levels runs once per seed
    subsets            name -> {dataset, num_images, seed, groups}: random training subsets (optional). `groups` are
                       new label columns: column -> {name of the group: [label, ...]}
    stages             stage -> flags of the vitcls subcommand; stages run in the order of STAGES
    factors            factor -> level -> flags of `finetune`, or {stage: flags}; {stage: null} skips the stage
    metrics            dotted keys of numeric values in results.json, with one table per metric. `NAME.*` denotes a
                       list of numbers, with one table row per index, for example per layer
    baseline           factor -> baseline level, with which all levels of the factor are compared

In flags, `{run}` is replaced with the folder of the run, `{folder}` with the folder of the study, and `{subset:NAME}`
with the folder of a subset.

The output folder contains
    README.md, images/*.png    page of means with 95% confidence intervals and of differences paired by seed
    runs.parquet               one row per run: factor levels, seed, status, all numeric values in results.json, and
                               the first and last values of each numeric field in metrics.jsonl
    runs/NAME/                 the output folder of each stage, and log.txt
"""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml

from .errors import format_error
from .files import read_json, write_json
from .intervals import compute_mean_interval
from .options import to_arguments


if TYPE_CHECKING:
    from datasets import Dataset


STAGES = ("pretrain", "finetune", "evaluate", "inspect")
SEEDED_STAGES = ("pretrain", "finetune")  # stages that accept --seed
REQUIRED_KEYS = ("title", "question", "seeds", "stages", "factors", "metrics", "baseline")
OPTIONAL_KEYS = ("answer", "subsets")
MAX_LIST_LENGTH = 32  # maximum length of lists whose elements become columns of runs.parquet
POLL_SECONDS = 0.2

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
    metrics: list[str]
    baseline: dict[str, str]
    answer: str | None = None
    subsets: dict[str, Flags] = field(default_factory=dict)

    def plan_runs(self) -> list[StudyRun]:
        """Return all runs of the grid, ordered by combination of levels, then by seed."""
        runs = []
        for levels, seed in itertools.product(itertools.product(*self.factors.values()), self.seeds):
            run_levels = dict(zip(self.factors, levels, strict=True))
            level_names = [to_file_name(f"{factor}-{level}") for factor, level in run_levels.items()]
            name = "_".join([*level_names, f"seed-{seed}"])
            runs.append(StudyRun(name, run_levels, seed, self.combine_flags(run_levels, seed)))
        return runs

    def combine_flags(self, levels: Mapping[str, str], seed: int) -> dict[str, Flags]:
        """Return the flags of each stage of a run, combined from the stages, the levels and the seed."""
        stages: dict[str, Flags | None] = {name: flags or {} for name, flags in self.stages.items()}
        for factor, level in levels.items():
            level_flags = dict(self.factors[factor][level])
            level_stages = {name: level_flags.pop(name) for name in STAGES if name in level_flags}
            if level_flags:  # flags outside a stage belong to `finetune`
                level_stages["finetune"] = (level_stages.get("finetune") or {}) | level_flags
            for name, flags in level_stages.items():
                stages[name] = None if flags is None else (stages.get(name) or {}) | flags
        seed_flags = {name: {"seed": seed} if name in SEEDED_STAGES else {} for name in STAGES}
        return {name: flags | seed_flags[name] for name in STAGES if (flags := stages.get(name)) is not None}


def load_study(file: Path) -> Study:
    """Load a study file. Raise ValueError if the file is not valid YAML, or if a key is missing or unknown."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read {file}: {format_error(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a YAML mapping. A study file requires the keys {', '.join(REQUIRED_KEYS)}")
    if missing_keys := [key for key in REQUIRED_KEYS if not content.get(key)]:
        raise ValueError(f"{file} has no value for {', '.join(missing_keys)}. Set all required keys")
    if unknown_keys := sorted(set(content) - {*REQUIRED_KEYS, *OPTIONAL_KEYS}):
        raise ValueError(f"{file} has unknown keys: {', '.join(unknown_keys)}. Remove or correct these keys")
    factors = {
        str(name): {str(level): flags or {} for level, flags in levels.items()}
        for name, levels in content["factors"].items()
    }
    baseline = {str(factor): str(level) for factor, level in content["baseline"].items()}
    for factor, level in baseline.items():
        if level not in factors.get(factor, {}):
            raise ValueError(
                f"{file}: the baseline level {level} of {factor} is not in `factors`. Set a level of {factor}"
            )
    if unknown_stages := sorted(set(content["stages"]) - set(STAGES)):
        raise ValueError(f"{file} has unknown stages: {', '.join(unknown_stages)}. Choose from {', '.join(STAGES)}")
    return Study(**content | {"factors": factors, "baseline": baseline})


def to_file_name(text: str) -> str:
    """Replace all characters except letters, digits, dots and hyphens with hyphens."""
    return "".join(character if character.isalnum() or character in "-." else "-" for character in text)


# Execution -----------------------------------------------------------------------------------------------------------


@dataclass
class RunProcess:
    """A run in progress: the process of the current stage and the commands of the remaining stages."""

    run: StudyRun
    process: subprocess.Popen[bytes]
    remaining_commands: Iterator[tuple[str, list[str]]]  # (stage, flags)
    start_time: float  # value of time.monotonic(), in seconds


@dataclass
class StudyRunner:
    """Run a study in parallel processes. Finished runs are skipped, and interrupted runs are resumed."""

    study: Study
    folder: Path
    num_jobs: int = 1  # maximum number of parallel runs
    num_threads: int = 1  # number of CPU threads per run
    # Maximum total memory of parallel runs, in GiB. Each run is assumed to use as much memory as the largest run so
    # far.
    memory_limit: float | None = None
    dataset: str | None = None  # dataset from which all subsets are drawn; overrides the datasets in the study file
    max_run_bytes: float = 0.0  # memory of the largest run so far, in bytes
    durations: list[float] = field(default_factory=list)  # durations of the completed runs, in seconds

    def execute(self) -> None:
        """Run all unfinished runs. A failed run does not stop the other runs."""
        self.write_subsets()
        runs = self.study.plan_runs()
        pending_runs = [run for run in runs if not self.is_finished(run)]
        num_finished = len(runs) - len(pending_runs)
        print(f"{len(runs)} runs ({num_finished} already finished)", flush=True)
        running_processes: list[RunProcess] = []
        try:
            while pending_runs or running_processes:
                while (
                    pending_runs and len(running_processes) < self.num_jobs and self.can_start_run(running_processes)
                ):
                    running_processes.append(self.start_run(pending_runs.pop(0)))
                time.sleep(POLL_SECONDS)
                self.measure_memory(running_processes)
                for run_process in [*running_processes]:
                    if run_process.process.poll() is None:
                        continue
                    if run_process.process.returncode == 0 and (command := next(run_process.remaining_commands, None)):
                        run_process.process = self.start_process(run_process.run, *command)
                        continue
                    running_processes.remove(run_process)
                    num_finished += 1
                    self.durations.append(time.monotonic() - run_process.start_time)
                    self.print_progress(run_process, num_finished, len(pending_runs) + len(running_processes))
        finally:
            for run_process in running_processes:
                run_process.process.send_signal(signal.SIGTERM)  # makes the run save a checkpoint
            for run_process in running_processes:
                run_process.process.wait()

    def get_run_folder(self, run: StudyRun) -> Path:
        """Return the folder of a run."""
        return self.folder / "runs" / run.name

    def is_finished(self, run: StudyRun) -> bool:
        """Return whether the outputs of all stages of a run exist."""
        return all(self.get_result_file(run, stage).exists() for stage in run.stages)

    def get_result_file(self, run: StudyRun, stage: str) -> Path:
        """Return the path of the JSON file with the results of a stage."""
        folder = self.get_run_folder(run)
        return folder / stage / "results.json" if stage in SEEDED_STAGES else folder / f"{stage}.json"

    def start_run(self, run: StudyRun) -> RunProcess:
        """Start the first unfinished stage of a run."""
        self.get_run_folder(run).mkdir(parents=True, exist_ok=True)
        commands = self.build_commands(run)
        remaining_commands = iter(
            [(stage, flags) for stage, flags in commands if not self.get_result_file(run, stage).exists()]
        )
        process = self.start_process(run, *next(remaining_commands))
        return RunProcess(run, process, remaining_commands, time.monotonic())

    def start_process(self, run: StudyRun, stage: str, flags: list[str]) -> subprocess.Popen[bytes]:
        """Start a process for a stage, and append the output of the process to log.txt."""
        environment = os.environ | {"OMP_NUM_THREADS": str(self.num_threads), "MKL_NUM_THREADS": str(self.num_threads)}
        with (self.get_run_folder(run) / "log.txt").open("ab") as log_file:
            log_file.write(f"$ vitcls {stage} {' '.join(flags)}\n".encode())
            log_file.flush()
            command = [sys.executable, "-m", "modeling_vitcls.cli", stage, *flags]
            return subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT, env=environment)

    def build_commands(self, run: StudyRun) -> list[tuple[str, list[str]]]:
        """Return the name and the command-line arguments of each stage of a run."""
        folder = self.get_run_folder(run)
        commands = []
        for stage, stage_flags in run.stages.items():
            flags = {name: self.fill_placeholders(value, run) for name, value in stage_flags.items()}
            if stage in SEEDED_STAGES:
                flags["output_dir"] = str(folder / stage)
                has_checkpoint = any((folder / stage / "checkpoints").glob("*"))
                flags["resume" if has_checkpoint else "overwrite"] = True
            else:
                flags.setdefault("model", str(folder / "finetune"))
                flags["output" if stage == "evaluate" else "json"] = str(self.get_result_file(run, stage))
                if stage == "inspect":
                    flags["output"] = str(folder / "report.html")
            arguments = [argument for name, value in flags.items() for argument in to_arguments(name, value)]
            commands.append((stage, arguments))
        return commands

    def fill_placeholders(self, value: Any, run: StudyRun) -> Any:
        """Replace the placeholders in the value of a flag."""
        if not isinstance(value, str):
            return value
        for name in self.study.subsets:
            value = value.replace(f"{{subset:{name}}}", str(self.get_subset_folder(name)))
        return value.replace("{run}", str(self.get_run_folder(run))).replace("{folder}", str(self.folder))

    def can_start_run(self, running_processes: list[RunProcess]) -> bool:
        """Return whether one more run is expected to fit within the memory limit. The first run always starts."""
        if self.memory_limit is None or not running_processes:
            return True
        expected_bytes = (len(running_processes) + 1) * self.max_run_bytes  # 0 before memory is measured
        return 0 < expected_bytes <= self.memory_limit * 2**30

    def measure_memory(self, running_processes: list[RunProcess]) -> None:
        """Measure the memory of the running processes and update `max_run_bytes`."""
        for run_process in running_processes:
            try:
                process = psutil.Process(run_process.process.pid)
                process_tree = [process, *process.children(recursive=True)]
                used_bytes = sum(process.memory_info().rss for process in process_tree)
            except psutil.Error:  # the process no longer exists
                continue
            self.max_run_bytes = max(self.max_run_bytes, used_bytes)

    def print_progress(self, run_process: RunProcess, num_finished_runs: int, num_remaining_runs: int) -> None:
        """Print the results or the error of a completed run, and the estimated remaining time, on one line."""
        levels_text = ", ".join(f"{factor} {level}" for factor, level in run_process.run.levels.items())
        log_text = (self.get_run_folder(run_process.run) / "log.txt").read_text(encoding="utf-8", errors="replace")
        result = f"failed: {log_text.strip().splitlines()[-1]}"  # the log contains at least the command
        if run_process.process.returncode == 0:
            row = build_row(self, run_process.run)
            result = ", ".join(f"{name} {row[name]:.4g}" for name in self.study.metrics if name in row)
        remaining_seconds = sum(self.durations) / len(self.durations) * num_remaining_runs / self.num_jobs
        remaining_time = f"; about {max(1, round(remaining_seconds / 60))} min remaining" if num_remaining_runs else ""
        progress = f"[{num_finished_runs}/{num_finished_runs + num_remaining_runs}]"
        print(f"{progress} {levels_text}, seed {run_process.run.seed}: {result}{remaining_time}", flush=True)

    # Subsets ---------------------------------------------------------------------------------------------------------

    def get_subset_folder(self, name: str) -> Path:
        """Return the folder of a training subset."""
        return self.folder / "subsets" / to_file_name(name)

    def write_subsets(self) -> None:
        """Write the training subsets as Parquet files.

        A subset contains `num_images` random images of the split `train`, and all images of the other splits.
        """
        from datasets import disable_progress_bars, load_dataset

        for name, subset in self.study.subsets.items():
            folder = self.get_subset_folder(name)
            if folder.exists():
                continue
            partial_folder = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir(parents=True)
            source = os.path.expandvars(self.dataset or subset["dataset"])
            split_files = {file.stem: str(file) for file in sorted(Path(source).glob("*.parquet"))}
            splits = load_dataset("parquet", data_files=split_files) if split_files else load_dataset(source)
            disable_progress_bars()  # disabled after the download; processing local files is fast
            for split, dataset in splits.items():
                if split == "train":
                    dataset = dataset.shuffle(seed=subset.get("seed", 0)).select(range(subset["num_images"]))
                for column, groups in subset.get("groups", {}).items():
                    dataset = add_label_groups(dataset, column, groups)
                dataset.to_parquet(partial_folder / f"{split}.parquet")
            partial_folder.rename(folder)


def add_label_groups(dataset: "Dataset", column: str, groups: Mapping[str, Sequence[str]]) -> "Dataset":
    """Return a copy of a dataset with an additional column that contains the group of each image's label."""
    from datasets import ClassLabel

    feature = dataset.features.get("label")
    if not isinstance(feature, ClassLabel):
        raise ValueError(
            "`groups` requires a column `label` with class names. Remove `groups`, or set a different dataset"
        )
    group_names = list(groups)
    indices = {label: index for index, name in enumerate(group_names) for label in groups[name]}
    if missing_labels := [label for label in feature.names if label not in indices]:
        raise ValueError(
            f"the groups of the column {column} do not contain the labels {', '.join(missing_labels)}. "
            "Add each label to a group"
        )
    group_indices = [indices[feature.names[label]] for label in dataset["label"]]
    return dataset.add_column(column, group_indices).cast_column(column, ClassLabel(names=group_names))


# Results -------------------------------------------------------------------------------------------------------------


def build_row(runner: StudyRunner, run: StudyRun) -> dict[str, Any]:
    """Build the row of a run in runs.parquet: factor levels, seed, status and the numeric values in the results.

    The column names of numeric values start with the stage (for example, `inspect.findings.outliers.3`), except for
    the stage `finetune`. The prefixes `first.` and `last.` denote the first and the last value in the training log
    (for example, `first.loss` and `last.cls_attention_entropy.0`). If a run has a single label column, the accuracy
    and loss are also stored as `COLUMN_accuracy` and `COLUMN_loss`, which are the names in runs with several label
    columns.
    """
    status = "finished" if runner.is_finished(run) else "unfinished"
    row: dict[str, Any] = {**run.levels, "seed": run.seed, "status": status}
    for stage in run.stages:
        file = runner.get_result_file(run, stage)
        if file.exists():
            row |= flatten_numbers(read_json(file), "" if stage == "finetune" else stage)
    column = run.stages["finetune"].get("label_column")
    if isinstance(column, str):  # single task
        row |= {f"{column}_{name}": row[name] for name in ("accuracy", "loss") if name in row}
    log_file = runner.get_run_folder(run) / "finetune" / "metrics.jsonl"
    log_text = log_file.read_text(encoding="utf-8") if log_file.exists() else ""
    records = [json.loads(line) for line in log_text.splitlines()]
    first_values = {name: value for record in reversed(records) for name, value in record.items()}
    last_values = {name: value for record in records for name, value in record.items()}
    return row | flatten_numbers(first_values, "first") | flatten_numbers(last_values, "last")


def flatten_numbers(value: Any, name: str) -> dict[str, float]:
    """Return the numbers in nested dicts and lists as a flat dict. Each name consists of keys and indices joined by
    dots. Lists with more than MAX_LIST_LENGTH elements are omitted."""
    if isinstance(value, list):
        value = dict(enumerate(value)) if len(value) <= MAX_LIST_LENGTH else {}
    if not isinstance(value, dict):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return {name: float(value)} if is_number else {}
    numbers: dict[str, float] = {}
    for key, child in value.items():
        numbers |= flatten_numbers(child, f"{name}.{key}" if name else str(key))
    return numbers


def write_page(runner: StudyRunner, rows: list[dict[str, Any]], command: str) -> Path:
    """Write README.md and the plots. Return the path of README.md."""
    from .system import format_count, get_processor_name, get_versions

    study = runner.study
    finished_rows = [row for row in rows if row["status"] == "finished"]
    (runner.folder / "images").mkdir(exist_ok=True)
    sections = [f"# {study.title}", study.question]
    if study.answer:
        sections.append(f"**Answer:** {' '.join(study.answer.split())}")
    for metric in study.metrics:
        if groups := group_values(study, finished_rows, metric):
            image_file = f"images/{to_file_name(f'{study.title.lower()} {metric}')}.png"
            plot_groups(groups, metric, runner.folder / image_file)
            image = f"![{metric} per combination of levels]({image_file})"
            sections += [f"## {metric}", format_table(study, groups, metric), image]
    training_seconds = sum(row.get("seconds", 0.0) for row in finished_rows)
    sections.append(
        f"## Method\n\n{len(finished_rows)} of {len(rows)} runs finished, seeds {', '.join(map(str, study.seeds))}; "
        f"{training_seconds / 60:.0f} minutes of training in total, "
        f"{format_count(runner.num_threads, 'thread')} per run, on {get_processor_name()}. "
        "Each value is the mean over seeds with its 95% confidence interval (Student's t). "
        "Differences are paired by seed. Each finished run is evaluated once on the held-out images.\n\n"
        f"```bash\n{command}\n```\n\n"
        + ", ".join(f"{name} {version}" for name, version in get_versions("transformers", "timm").items())
    )
    page_file = runner.folder / "README.md"
    page_file.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return page_file


def group_values(study: Study, rows: list[dict[str, Any]], metric: str) -> dict[tuple[str, ...], dict[int, float]]:
    """Return a nested dict of the values of a metric: combination of levels -> seed -> value. For a list of numbers
    (`NAME.*`), the last element of the combination is the index into the list."""
    groups: dict[tuple[str, ...], dict[int, float]] = {}
    for row in rows:
        levels = tuple(row[factor] for factor in study.factors)
        if metric in row:
            groups.setdefault(levels, {})[row["seed"]] = row[metric]
        elif metric.endswith(".*"):
            prefix = metric.removesuffix("*")
            for name in [name for name in row if name.startswith(prefix) and name.removeprefix(prefix).isdigit()]:
                groups.setdefault((*levels, name.removeprefix(prefix)), {})[row["seed"]] = row[name]
    return groups


def format_table(study: Study, groups: dict[tuple[str, ...], dict[int, float]], metric: str) -> str:
    """Format a Markdown table of means, confidence intervals, and paired differences from the baseline."""
    names = [*study.factors, *(["index"] if metric.endswith(".*") else [])]
    header = [*names, "runs", metric, "difference from the baseline"]
    rows = [header, ["---"] * len(header)]
    for levels, values in groups.items():
        baseline_levels = tuple(study.baseline.get(name, level) for name, level in zip(names, levels, strict=True))
        shared_seeds = sorted(values.keys() & groups.get(baseline_levels, {}).keys())
        difference_text = "baseline"
        if baseline_levels != levels:
            differences = [values[seed] - groups[baseline_levels][seed] for seed in shared_seeds]
            difference_text = format_interval(differences, "+") if shared_seeds else ""
        rows.append([*levels, str(len(values)), format_interval(list(values.values())), difference_text])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def format_interval(values: list[float], sign_format: str = "") -> str:
    """Format the mean and the 95% confidence interval, with two significant digits of the half width
    (`0.9780 ± 0.0041`). If there is a single value, format only the mean."""
    mean, half_width = compute_mean_interval(values)
    if math.isnan(half_width):
        return f"{mean:{sign_format}.4g}"
    if half_width == 0:
        return f"{mean:{sign_format}.4g} ± 0"
    decimals = max(0, 1 - math.floor(math.log10(half_width)))
    return f"{mean:{sign_format}.{decimals}f} ± {half_width:.{decimals}f}"


def plot_groups(groups: dict[tuple[str, ...], dict[int, float]], metric: str, file: Path) -> None:
    """Save a PNG plot of all runs, with the mean and 95% confidence interval of each combination of levels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.35 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    for row, values in enumerate(groups.values()):
        mean, half_width = compute_mean_interval(list(values.values()))
        axes.plot(list(values.values()), [row] * len(values), "o", color="#9aa5b1", markersize=4)
        axes.errorbar(mean, row, xerr=None if math.isnan(half_width) else half_width, fmt="D", color="#1f5fbf")
    axes.set_yticks(range(len(groups)), [", ".join(levels) for levels in groups])
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric} (dots: runs; diamonds: mean and 95% interval)")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(file, dpi=120)


def run_study(study: Study, folder: Path, command: str, **runner_settings: Any) -> list[dict[str, Any]]:
    """Run a study, write the results to `folder`, and return the rows of runs.parquet. The page (README.md) shows
    `command`. `runner_settings` are additional arguments of `StudyRunner`."""
    import pandas

    folder.mkdir(parents=True, exist_ok=True)
    settings_file = folder / "study.json"
    study_settings = {"stages": study.stages, "factors": study.factors, "subsets": study.subsets}
    if settings_file.exists() and read_json(settings_file) != json.loads(json.dumps(study_settings)):
        raise ValueError(f"{folder} contains runs of a study with different flags. Set a different --output-dir")
    write_json(settings_file, study_settings)
    runner = StudyRunner(study, folder, **runner_settings)
    try:
        runner.execute()
    finally:
        rows = [build_row(runner, run) for run in study.plan_runs()]
        pandas.DataFrame(rows).to_parquet(folder / "runs.parquet")
        print(f"page: {write_page(runner, rows, command)}", flush=True)
    return rows
