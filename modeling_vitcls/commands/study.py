"""`vitcls study`: compare settings by fine-tuning with each combination of settings and seeds.

    vitcls study --config scripts/recipes/study_digits.yaml --output-dir runs/study --jobs 2

To continue an interrupted study, repeat the command. The format of study files is described in
modeling_vitcls/study.py.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path

from ..options import check_minimum
from .parsing import exit_with_message, find_recipe


@dataclass(frozen=True)
class StudyOptions:
    """Compare settings by fine-tuning with each combination of settings and seeds, and write a page of tables."""

    config: Path
    """Study file, or the name of a study file in the package, such as study_digits."""
    output_dir: Path
    """Folder for the runs and the page. Finished runs in the folder are not repeated."""
    dataset: str | None = None
    """Dataset from which all subsets are drawn, instead of the datasets in the study file."""
    jobs: int = 1
    """Maximum number of parallel runs."""
    threads: int = 1
    """CPU threads per run."""

    def __post_init__(self) -> None:
        check_minimum(self, 1, "jobs", "threads")


OPTIONS_CLASS = StudyOptions


def run(options: StudyOptions) -> None:
    """Run the study. Exit with status 1 if a run fails."""
    from ..study import StudyRunner, load_study, run_study

    words = ["vitcls", "study", "--config", options.config, "--output-dir", options.output_dir]
    words += ["--jobs", options.jobs, "--threads", options.threads]
    words += ["--dataset", options.dataset] if options.dataset else []
    study, command = load_study(find_recipe(options.config)), shlex.join(map(str, words))
    rows = run_study(StudyRunner(study, options.output_dir, options.jobs, options.threads, options.dataset), command)
    if num_unfinished := sum(row["status"] != "finished" for row in rows):
        message = f"error: {num_unfinished} of {len(rows)} runs failed. See log.txt in their folders"
        exit_with_message(message, status=1)
