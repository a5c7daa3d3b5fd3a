"""The wheel, installed into a new environment, works outside the checkout."""

import os
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.doc_pages import ROOT
from helpers.fresh_processes import run_program
from helpers.photo_folders import get_file_names


ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
DATA_FILES = (
    "py.typed",
    "publishing/templates/training.md.j2",
    "recipes/digits.yaml",
    "analysis/page.css",
)


def run(*command: object, cwd: Path) -> str:
    """Run a command and return its output."""
    return run_program(*command, environment=ENVIRONMENT, cwd=cwd).stdout


@pytest.fixture(scope="module")
def wheel(module_path: Path) -> Path:
    """Build the wheel of a copy of the tracked files."""
    files = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    for name in filter(None, files):
        if not name.startswith("tests/") and (ROOT / name).is_file():
            (module_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (module_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    # as a release does
    run(
        "make",
        "dist",
        f"PYTHON={sys.executable}",
        f"DIST={module_path}",
        cwd=module_path / "source",
    )
    (file,) = module_path.glob("*.whl")
    return file


@pytest.mark.slow
def test_the_wheel_has_all_modules_and_data_files(wheel: Path) -> None:
    contents = set(zipfile.ZipFile(wheel).namelist())
    tracked = run("git", "ls-files", "modeling_vitcls", cwd=ROOT).split()
    assert set(tracked) <= contents
    assert {f"modeling_vitcls/{name}" for name in DATA_FILES} <= contents


@pytest.mark.slow
def test_the_installed_wheel_trains_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    programs = tmp_path / "environment/bin"
    python = programs / "python"
    uv = (sys.executable, "-m", "uv")
    run(*uv, "venv", "--python", sys.executable, "environment", cwd=tmp_path)
    run(*uv, "pip", "install", "--python", python, f"{wheel}[cli]", cwd=tmp_path)
    location = run(
        python, "-c", "import modeling_vitcls; print(modeling_vitcls.__file__)", cwd=tmp_path
    )
    assert Path(location.strip()).is_relative_to(tmp_path)

    vitcls = programs / "vitcls"
    version = run(vitcls, "--version", cwd=tmp_path).split()[1]
    assert wheel.name.startswith(f"modeling_vitcls-{version}-")
    assert run(vitcls, "env", cwd=tmp_path).split()[:2] == ["modeling_vitcls", version]

    flags = ("--dataset", "digits", "--max-steps", 5, "--output-dir", "out")
    run(vitcls, "finetune", "--config", "digits", *flags, cwd=tmp_path)
    assert {"model.safetensors", "README.md", "report.html", "results.json"} <= get_file_names(
        tmp_path / "out"
    )
    assert "accuracy" in run(
        vitcls, "evaluate", "--model", "out", "--dataset", "digits", cwd=tmp_path
    )
