"""The workflows of GitHub Actions: which code they run, and with which permissions."""

import re
from typing import Any

import pytest
import yaml
from helpers.doc_pages import ROOT


FOLDER = ROOT / ".github/workflows"
WORKFLOWS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(FOLDER.glob("*.yml"))}
JOBS = [job for workflow in WORKFLOWS.values() for job in workflow["jobs"].values()]
STEPS = [step for job in JOBS for step in job.get("steps", [])]


def test_actions_are_pinned_to_commits() -> None:
    actions = [step["uses"] for step in STEPS if "uses" in step]
    assert not [each for each in actions if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", each)]


def test_a_checkout_keeps_no_credentials() -> None:
    checkouts = [step for step in STEPS if step.get("uses", "").startswith("actions/checkout@")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@pytest.mark.parametrize("workflow", WORKFLOWS.values(), ids=WORKFLOWS)
def test_a_workflow_may_only_read(workflow: dict[str, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}


def test_a_job_with_more_permissions_runs_no_code_of_the_checkout() -> None:
    for job in JOBS:
        if "write" in job.get("permissions", {}).values():
            assert not [
                step for step in job["steps"] if "run" in step or "checkout" in step["uses"]
            ]


def test_a_release_is_published_only_after_the_tests() -> None:
    jobs = WORKFLOWS["release"]["jobs"]
    assert jobs["publish"]["needs"] == "build"
    assert jobs["build"]["needs"] == "test"
    assert jobs["test"]["uses"] == "./.github/workflows/test.yml"


def test_what_is_published_is_built_without_a_cache() -> None:
    jobs = WORKFLOWS["release"]["jobs"]
    settings = [
        step.get("with", {}) for name in ("build", "publish") for step in jobs[name]["steps"]
    ]
    assert not any("cache" in setting for setting in settings)
