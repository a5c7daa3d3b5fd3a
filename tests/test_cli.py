"""The vitcls command: help, version, errors, completion, and the modules that importing the package loads."""

import ast
import importlib.metadata
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from fresh_processes import run_fresh
from local_hub import LocalHub
from tiny_models import raises_one_line

import modeling_vitcls
from modeling_vitcls import cli
from modeling_vitcls.commands import demo, env, push, space
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
        (["completion", "fish"], "error: vitcls completion requires the name of a shell: bash, zsh, tcsh\n"),
        (["completion", "bash", "zsh"], "error: vitcls completion requires the name of a shell: bash, zsh, tcsh\n"),
        (["env", "now"], "error: vitcls env accepts no flags\n"),
    ],
)
def test_wrong_commands_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delitem(sys.modules, "modeling_vitcls.commands.predict", raising=False)
    monkeypatch.setitem(sys.modules, "tyro", None)  # importing it fails
    assert run_here("predict", "--help") == 1
    message = "error: the vitcls command requires tyro: run pip install 'modeling_vitcls[scripts]'\n"
    assert capsys.readouterr().err == message
    monkeypatch.setitem(sys.modules, "modeling_vitcls.commands.predict", None)
    with pytest.raises(ModuleNotFoundError, match="predict"):  # not a library that the user can install
        run_here("predict", "--help")


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


def test_the_environment_names_the_kernels_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITCLS_CPU_KERNELS", raising=False)
    monkeypatch.setattr(env.kernels, "MIN_WORK", {(torch.float32, "a"): 1, (torch.bfloat16, "a"): 1})
    assert env.describe_cpu_kernels() == "on, oneDNN for bfloat16, float32"
    monkeypatch.setattr(env.kernels, "MIN_WORK", {})
    for has_onednn, reason in ((True, "this CPU has no AVX-512"), (False, "this PyTorch has no oneDNN")):
        monkeypatch.setattr(env.kernels, "HAS_ONEDNN", has_onednn)
        assert env.describe_cpu_kernels() == f"on, without oneDNN: {reason}"
    with torch.backends.mkldnn.flags(enabled=False):
        assert env.describe_cpu_kernels() == "off: torch.backends.mkldnn is disabled"


def test_recipes_are_flags_that_the_command_line_overrides(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    flags = ["--config", str(recipe), "--output-dir", "out", "--model", "vitcls-tiny", "--dataset", "data"]
    recipe.write_text("epochs: 3\nbatch_size: 7\n", encoding="utf-8")
    options = parse(FinetuneOptions, [*flags, "--epochs", "5"])
    assert (options.training.epochs, options.training.batch_size, options.data.dataset) == (5, 7, "data")
    recipe.write_text("# no flags\n", encoding="utf-8")
    assert replace(parse(FinetuneOptions, flags), config=None) == parse(FinetuneOptions, flags[2:])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "error: cannot read the recipe {recipe}: "),
        (b"\xff\xfe\xff", "error: cannot read the recipe {recipe}: "),
        (b"epochs: [3", "error: cannot read the recipe {recipe}: "),
        (b"- epochs", "error: the recipe {recipe} must contain lines of the form `flag: value`"),
        (b"epochs: 3\nlr: 0.1", "error: {recipe}, line 2: unknown flag lr; use learning_rate"),
        (b"xyzzy: 1", "error: {recipe}, line 1: unknown flag xyzzy; `--help` lists the flags"),
    ],
)
def test_errors_of_recipes_are_one_line(
    content: bytes | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    if content is not None:
        recipe.write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        parse(FinetuneOptions, ["--config", str(recipe), "--output-dir", "out"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message.format(recipe=recipe)) and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "valid_flags"),
    [
        ("benchmark", {"work": ("inference",), "pairs": 1}),
        ("benchmark", {"work": ("inference", "growth"), "plot": Path("cost.svg")}),
        ("convert", {"source": "timm:test_vit", "num_labels": 1}),
        ("convert", {"source": "transformers:ann/model@v1"}),
        ("convert", {"source": "weights.pth", "family": "dino"}),
        ("convert", {"to": "transformers", "model": "ann/model"}),
        ("export", {"format": "onnx", "opset": 18, "image_size": (1, 1), "dynamic": False, "dtype": "float16"}),
        ("export", {"format": "torch"}),
        ("export", {"format": "transformers.js"}),
        ("export", {"format": "transformers.js", "dataset": "digits", "split": "test"}),
    ],
)
def test_valid_flags_are_accepted(
    command: str, valid_flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the benchmark sets it otherwise
    module = cli.load_module(command)
    fields = {"convert": {"output": tmp_path}, "export": {"model": "mine", "output": tmp_path}}.get(command, {})
    module.check_options(module.OPTIONS(**fields, **valid_flags))


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("benchmark", {"work": ("training",), "pairs": 0}, "--pairs is 0: set --pairs to 1 or more"),
        ("benchmark", {"work": ()}, "--work and --against require a value"),
        ("benchmark", {"work": ("inference",), "against": ()}, "--work and --against require a value"),
        ("benchmark", {"work": ("step",), "plot": Path("a.png")}, "--plot requires --work growth"),
        ("benchmark", {"work": ("growth",), "plot": Path("a.txt")}, "--plot a.txt: set a file name that ends in .png"),
        ("convert", {"source": "resnet50"}, "--source resnet50 is not supported. Use timm:NAME"),
        ("convert", {"source": "timm:x", "num_labels": 0}, "--num-labels must be at least 1, but it is 0"),
        ("convert", {"source": "timm:x", "model": "mine"}, "requires --source, and does not support --model"),
        ("export", {"format": "onnx", "image_size": (0, 32)}, "two positive numbers, but it is 0 32"),
        ("export", {"format": "onnx", "opset": 17}, "--opset must be at least 18, but it is 17"),
        ("export", {"format": "torch", "opset": 18}, "--opset requires --format onnx or openvino"),
        ("export", {"format": "torch", "dataset": "digits"}, "--dataset requires --format transformers.js"),
        ("export", {"format": "transformers.js", "split": "test"}, "--split requires --dataset"),
        ("export", {"format": "transformers.js", "image_size": (32, 32)}, "does not support --image-size"),
        ("export", {"format": "transformers.js", "dynamic": False}, "does not support --image-size, --no-dynamic"),
        ("export", {"format": "transformers.js", "dtype": "float16"}, "--dtype or --opset"),
        ("export", {"format": "transformers.js", "opset": 18}, "--dtype or --opset"),
    ],
)
def test_invalid_flags_exit_with_status_2(
    command: str, flags: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = cli.load_module(command)
    fields = {"convert": {"output": tmp_path}, "export": {"model": "mine", "output": tmp_path}}.get(command, {})
    with pytest.raises(SystemExit) as ended:
        module.check_options(module.OPTIONS(**fields, **flags))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_demo_loads_the_revision_of_its_flag(hub: LocalHub) -> None:
    hub.create("ann/mine", private=False, files={"config.json": b'{"model_type": "vitcls"}'})
    with raises_one_line("ann/mine has no revision v9", error=OSError):
        demo.run(demo.DemoOptions("ann/mine", revision="v9"))


def test_flags_that_only_apply_to_pushes_are_errors_of_other_spaces(tmp_path: Path) -> None:
    for flags, name in (({"space_id": "ann/demo"}, "--space-id"), ({"private": True}, "--private")):
        with raises_one_line("--output pushes nothing", f"{name} only applies to pushes"):
            space.SpaceOptions("ann/model", output=tmp_path, **flags)
        assert space.SpaceOptions("ann/model", **flags).output is None
    assert space.SpaceOptions("ann/model", output=tmp_path).output == tmp_path
    assert space.SpaceOptions("ann/model", static=True, node_modules=tmp_path).static


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
