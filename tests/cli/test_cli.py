"""The vitcls command: help, version, errors, completion, and imported modules."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from helpers.command_in_process import run_here
from helpers.photo_folders import get_unicode_forms, write_photos
from helpers.released_models import RELEASED
from helpers.scripts_in_process import SCRIPTS
from packaging import version
from PIL import Image
from pytest import CaptureFixture, MonkeyPatch

import modeling_vitcls
from modeling_vitcls import Predictor, look
from modeling_vitcls.cli.commands import COMMANDS
from modeling_vitcls.cli.parsing import exit_on_error
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.runtime.errors import RunStopped, mark_errors_of_all_processes
from modeling_vitcls.training.options import FinetuneOptions
from modeling_vitcls.version import __version__


WRAPPERS = {
    **{name: name for name in ("finetune", "evaluate", "predict", "convert", "export")},
    "inspect": "inspect_tokens",
    "push": "push_to_hub",
    "demo": "demo_app",
}
WITHOUT_SCRIPT = {
    *("env", "look", "add-task", "add-class", "verify-unchanged", "push-code", "update-code")
}
# Runs the command in a new process, then prints the loaded libraries to stderr.
COMMAND = """
import sys
sys.argv[:1] = ["vitcls"]
try:
    from modeling_vitcls.cli import main
    main()
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `vitcls` in a new process."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_a_tilde_in_a_path_is_the_home_folder(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_photos(tmp_path / "photos", range(4))
    (tmp_path / "table.csv").write_text("file_name\n~/photos/cat/0.png\n")
    tiny = "--model=vitcls-tiny --hidden-size=16 --num-attention-heads=1 --image-size=32".split()
    (tmp_path / "recipe.yaml").write_text("max_steps: 1\nnum_workers: 0\nreport: false\n")
    data = ["--dataset=~/photos", "--config=~/recipe.yaml"]

    assert run_here("finetune", *tiny, *data, "--output-dir=~/run") == 0
    assert run_here("predict", "--model=~/run", "--dataset=~/table.csv", "--output=~/rows.csv") == 0
    assert "cat" in (tmp_path / "rows.csv").read_text()
    look("~/run", "~/photos/cat/0.png", output="~/sheet.png")
    assert (tmp_path / "sheet.png").is_file()
    (feature,) = Predictor("~/run", "cls")({"image": ["~/photos/cat/0.png"]})["cls"]
    assert feature.shape == (16,)
    assert DataOptions(dataset="~/x", label_separator="~").label_separator == "~"


def test_a_path_is_found_in_the_other_unicode_form(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    composed, decomposed = get_unicode_forms("größe")
    write_photos(tmp_path / decomposed / "photos", range(1))
    options = DataOptions(dataset=f"{composed}/photos")
    assert options.dataset == f"{decomposed}/photos"
    assert DataOptions(dataset=f"{composed}/none").dataset == f"{composed}/none"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full and the limits of Linux")
@pytest.mark.parametrize(
    ("line", "status", "error"),
    [
        ("vitcls --version >&-", 0, ""),
        ("vitcls --version > /dev/full", 1, "no space is left"),
        ("vitcls demo --help | :", 1, ""),
        ("vitcls finetune --help | :", 1, ""),
        ("ulimit -n 5; vitcls env", 1, "ulimit -n"),
        ("ulimit -v 1500000; vitcls env", 1, "memory"),
    ],
)
def test_an_output_that_ends_and_a_limit_of_the_system_are_no_traceback(
    line: str, status: int, error: str
) -> None:
    vitcls = f'set -o pipefail; vitcls() {{ {sys.executable} -m modeling_vitcls.cli "$@"; }}'
    command = ["bash", "-c", f"{vitcls}; {line}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == status
    assert ran.stderr.startswith("error: ") == bool(error)
    assert error in ran.stderr
    assert ran.stderr.count("\n") == bool(error)


@pytest.mark.parametrize(
    "arguments", [("--help",), ("finetune", "--help"), ("finetune", "--epoch", "3")]
)
def test_help_and_wrong_flags_do_not_load_torch(arguments: tuple[str, ...]) -> None:
    ran = run_command(*arguments)
    assert "modeling_vitcls.cli" in ran.stderr.split(), ran.stderr
    assert not {"torch", "transformers", "numpy", "datasets", "accelerate"} & set(
        ran.stderr.split()
    )
    assert ran.returncode == (2 if "--epoch" in arguments else 0)


@pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.22"),
    reason="transformers below 5.22 imports scikit-learn with its pipelines",
)
def test_a_photo_is_predicted_without_libraries_of_tables_and_training(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30)).save(photo)
    model = RELEASED / "0.2.0/classifier"
    ran = run_command("predict", "--model", str(model), str(photo))
    assert ran.returncode == 0, ran.stderr
    assert not {"datasets", "pandas", "sklearn", "matplotlib", "timm"} & set(ran.stderr.split())
    assert ran.stderr.count("\n") == 1  # of COMMAND: nothing is reported at exit


def test_numbers_of_threads_that_the_person_sets_stay(monkeypatch: MonkeyPatch) -> None:
    chosen = {"OPENBLAS_NUM_THREADS": "2", "GOMP_SPINCOUNT": "7"}
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    assert run_here("env") == 0
    assert {name: os.environ[name] for name in chosen} == chosen


def test_the_version_is_that_of_the_package(capsys: CaptureFixture) -> None:
    for name in ("--version", "-V"):
        assert run_here(name) == 0
        assert capsys.readouterr().out == f"vitcls {__version__}\n"


@pytest.mark.parametrize("missing", ["tyro", "yaml"])
def test_a_missing_extra_is_named(
    missing: str, monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> None:
    for name in ("predict", "parsing", "recipes"):
        monkeypatch.delitem(sys.modules, f"modeling_vitcls.cli.{name}", raising=False)

    with monkeypatch.context() as other, pytest.raises(ModuleNotFoundError, match="argparse"):
        other.setitem(sys.modules, "argparse", None)  # importing it fails
        run_here()

    monkeypatch.setitem(sys.modules, missing, None)
    for arguments in ((), ("predict", "--help")):
        assert run_here(*arguments) == 1
        error = capsys.readouterr().err
        assert f"requires {missing}" in error
        assert 'pip install ".[cli]"' in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "rank", "status", "printed"),
    [
        (RunStopped("by a signal", 143), 0, 143, "by a signal\n"),
        (RunStopped("by a signal", 143), 1, 143, ""),
        (RunStopped("no images"), 0, 1, "error: no images\n"),
        (ValueError("wrong"), 1, 1, "process 1: error: wrong\n"),
        (ValueError("`probe=False` is set"), 0, 1, "error: --no-probe is set\n"),
        (ValueError("`model='my runs'`"), 0, 1, "error: --model 'my runs'\n"),
        (ValueError("`label_names=('a', 'b')`"), 0, 1, "error: --label-names a b\n"),
        (ValueError("`id2label`"), 0, 1, "error: `id2label`\n"),
    ],
)
def test_an_error_is_one_line_in_which_parameters_are_flags(
    error: Exception,
    rank: int,
    status: int,
    printed: str,
    monkeypatch: MonkeyPatch,
    capsys: CaptureFixture,
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    with pytest.raises(SystemExit, match=f"^{status}$"), exit_on_error(FinetuneOptions):
        raise error
    assert capsys.readouterr().err == printed


def test_an_error_of_all_processes_is_printed_once(
    monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> None:
    monkeypatch.setenv("RANK", "1")
    with (
        pytest.raises(SystemExit),
        exit_on_error(FinetuneOptions),
        mark_errors_of_all_processes(),
    ):
        raise ValueError("wrong")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("command", "script"), WRAPPERS.items())
def test_scripts_run_the_same_programs(
    command: str, script: str, monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> None:
    assert {*WRAPPERS, *WITHOUT_SCRIPT} == set(COMMANDS)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert f"usage: vitcls {command} " in capsys.readouterr().out


# Importing the package ----------------------------------------------------------------------------


def test_public_names_are_visible_to_type_checkers() -> None:
    tree = ast.parse(Path(modeling_vitcls.__file__).read_text())
    (checked,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )

    seen = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    assert seen == modeling_vitcls.MODULE_BY_NAME
    assert {*seen, "__version__"} == set(modeling_vitcls.__all__) <= set(dir(modeling_vitcls))
    for name in modeling_vitcls.__all__:
        assert getattr(modeling_vitcls, name) is not None

    with pytest.raises(AttributeError, match="no attribute 'ViTCLSModell'"):
        modeling_vitcls.ViTCLSModell  # noqa: B018
