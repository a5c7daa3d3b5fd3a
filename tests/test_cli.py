"""The vitcls command: help, version, errors, completion, and the modules that importing the package loads."""

import ast
import importlib.metadata
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest
from fresh_processes import run_fresh

import modeling_vitcls
from modeling_vitcls import cli
from modeling_vitcls.commands import env, push, space
from modeling_vitcls.commands.parsing import exit_on_error, find_recipe, parse, parse_flags
from modeling_vitcls.options import FinetuneOptions
from modeling_vitcls.version import __version__


SCRIPTS = Path(__file__).parents[1] / "scripts"
WRAPPERS = {
    **{name: name for name in ("finetune", "pretrain", "evaluate", "predict", "convert", "export", "benchmark")},
    "inspect": "inspect_tokens",
    "push": "push_to_hub",
    "demo": "demo_app",
    "space": "push_space",
    "study": "study",
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
    return subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True, timeout=300)


def run_here(*arguments: str) -> int:
    """Run `vitcls` in this process and return its exit status."""
    try:
        cli.main(list(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def closed_pipe() -> Iterator[TextIO]:
    """Return a pipe whose reader is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


@pytest.mark.slow_cases
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("--help",), ("env",), ("finetune", "--help")])
def test_commands_exit_quietly_on_a_closed_pipe(
    arguments: tuple[str, ...], unbuffered: str, closed_pipe: TextIO
) -> None:
    command = [sys.executable, "-m", "modeling_vitcls.cli", *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    ran = subprocess.run(
        command, stdout=closed_pipe, stderr=subprocess.PIPE, env=environment, text=True, timeout=300, check=False
    )
    assert ran.stderr == "" and ran.returncode in (0, 1)


def test_output_to_a_closed_pipe_stops_the_program(closed_pipe: TextIO, monkeypatch: pytest.MonkeyPatch) -> None:
    def print_twice(arguments: list[str] | None) -> None:
        with exit_on_error():
            print("first", flush=True)
            pytest.fail("the program continues")

    monkeypatch.setattr(sys, "stdout", closed_pipe)
    monkeypatch.setattr(cli, "run_command", print_twice)
    assert run_here() == 1


def test_other_closed_pipes_are_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(arguments: list[str] | None) -> None:
        raise BrokenPipeError("a worker has ended")

    monkeypatch.setattr(cli, "run_command", fail)
    with pytest.raises(BrokenPipeError, match="a worker has ended"):
        cli.main([])


@pytest.mark.parametrize("arguments", [(), ("--help",), ("finetune", "--help"), ("finetune", "--epoch", "3")])
def test_help_and_wrong_flags_do_not_load_torch(arguments: tuple[str, ...]) -> None:
    ran = run_command(*arguments)
    assert "modeling_vitcls.cli" in ran.stderr.split(), ran.stderr
    assert not {"torch", "transformers", "numpy", "datasets", "accelerate"} & set(ran.stderr.split())
    assert ran.returncode == (2 if "--epoch" in arguments else 0)


def test_help_has_a_line_for_each_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert run_here() == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in cli.COMMANDS.items():
        assert f"  {name:<10}  {command.summary}" in lines
    assert max(map(len, lines)) <= 100
    assert run_here("--help") == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("--version") == 0
    assert capsys.readouterr().out == f"vitcls {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetun"], "error: vitcls has no command finetun: did you mean finetune?\n"),
        (["tokens"], "error: vitcls has no command tokens: choose from finetune, pretrain, "),
        (["completion"], "error: vitcls completion requires the name of a shell: bash, zsh, tcsh\n"),
        (["env", "now"], "error: vitcls env accepts no flags\n"),
    ],
)
def test_wrong_commands_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_flags_of_all_commands_have_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.COMMANDS:
        assert run_here(name, "--help") == 0
        assert f"usage: vitcls {name} " in capsys.readouterr().out


def test_completion_includes_all_commands_and_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("completion", "bash") == 0
    script = capsys.readouterr().out
    assert all(name in script for name in cli.COMMANDS)
    assert "--num-register-tokens" in script and "--top-k" in script


def test_the_environment_of_a_bug_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("VITCLS_CPU_KERNELS", raising=False)
    assert run_here("env") == 0
    printed = capsys.readouterr().out
    facts = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert facts["modeling_vitcls"] == __version__ and {"torch", "transformers", "devices"} <= facts.keys()
    assert facts["timm"] == importlib.metadata.version("timm")
    assert "hf_secret" not in printed

    monkeypatch.setenv("VITCLS_CPU_KERNELS", "0")
    assert env.describe_cpu_kernels() == "off: VITCLS_CPU_KERNELS is 0"
    monkeypatch.delenv("VITCLS_CPU_KERNELS")
    monkeypatch.setattr(env.kernels, "HAS_PRIVATE_NAMES", False)
    assert "lacks a private name" in env.describe_cpu_kernels()


def test_recipes_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("digits")).read_text() == (SCRIPTS / "recipes" / "digits.yaml").read_text()
    assert find_recipe(Path("none")) == Path("none")
    Path("digits").write_text("epochs: 1", encoding="utf-8")  # a file in the working folder takes precedence
    assert find_recipe(Path("digits")) == Path("digits")


@pytest.mark.parametrize(("command", "script"), WRAPPERS.items())
def test_scripts_run_the_same_programs(
    command: str, script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert WRAPPERS.keys() == cli.COMMANDS.keys()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert f"usage: vitcls {command} " in capsys.readouterr().out
    text = (SCRIPTS / f"{script}.py").read_text(encoding="utf-8")
    assert text.startswith("# /// script\n") and len(text.splitlines()) < 35


# Importing the package -----------------------------------------------------------------------------------------------

OPTIONAL_LIBRARIES = {"timm", "datasets", "accelerate", "matplotlib", "sklearn", "rich", "tyro"}
IMPORTED = """
import sys
import {}
print(*sys.modules)
"""


def get_imported(module: str) -> set[str]:
    """Return the optional libraries that importing a module loads."""
    ran = subprocess.run([sys.executable, "-c", IMPORTED.format(module)], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return OPTIONAL_LIBRARIES & set(ran.stdout.split())


@pytest.mark.slow
def test_importing_the_package_loads_only_what_transformers_loads() -> None:
    """Exclude accelerate, which transformers' PreTrainedModel imports."""
    assert get_imported("modeling_vitcls") <= get_imported("transformers.modeling_utils") <= {"accelerate"}


def test_importing_the_package_registers_the_auto_classes() -> None:
    code = "import modeling_vitcls, transformers; print(type(transformers.AutoConfig.for_model('vitcls')).__name__)"
    assert run_fresh("-c", code, environment=os.environ).stdout.split() == ["ViTCLSConfig"]


def test_the_command_registers_the_auto_classes_after_flags_are_checked(tmp_path: Path) -> None:
    """Check that the command loads a model folder through an Auto class without trust_remote_code."""
    code = COMMAND.replace("finally:", "finally:\n    from transformers.models.auto import CONFIG_MAPPING\n").replace(
        "print(*sorted(sys.modules)", "print('vitcls' in CONFIG_MAPPING"
    )
    ran = run_fresh("-c", code, "export", "--model", tmp_path, "--format", "torch", "--output", tmp_path / "a.pt2")
    assert ran.returncode == 1 and ran.stderr.splitlines()[-1] == "True", ran.stderr


def test_public_names_are_visible_to_type_checkers() -> None:
    tree = ast.parse(Path(modeling_vitcls.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.name: node.module for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == modeling_vitcls.MODULES
    assert {*seen, "__version__"} == set(modeling_vitcls.__all__) <= set(dir(modeling_vitcls))
    for name in modeling_vitcls.__all__:
        assert getattr(modeling_vitcls, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'ViTCLSModell'"):
        modeling_vitcls.ViTCLSModell  # noqa: B018


@pytest.mark.parametrize("flag", ["--private", "--hub-private"])
def test_both_names_of_the_flag_for_private_repositories_are_accepted(flag: str) -> None:
    assert parse_flags(push.OPTIONS, ["--model", "mine", flag]).private
    assert parse_flags(space.OPTIONS, ["--model", "mine", flag]).private
    run = ["--model", "vitcls-tiny", "--dataset", "digits", "--output-dir", "mine", "--push-to-hub"]
    options = parse(FinetuneOptions, [*run, flag])
    assert options.run.hub_private
    assert not parse(FinetuneOptions, [*run, flag.replace("--", "--no-")]).run.hub_private
