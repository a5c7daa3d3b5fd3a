"""The vitcls command: help, version, errors, completion, and the modules that importing the package loads."""

import ast
import importlib.metadata
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import pytest
import torch
from fresh_processes import run_fresh
from local_hub import LocalHub
from tiny_models import raises_one_line

import modeling_vitcls
from modeling_vitcls import cli
from modeling_vitcls.commands import benchmark, convert, demo, env, evaluate, export, finetune, push, space, study
from modeling_vitcls.commands.parsing import exit_on_error, find_recipe, parse_flags, parse_with_recipe
from modeling_vitcls.conversion.parity_report import ParityReport, SizeComparison
from modeling_vitcls.data.splits import load_evaluation_data
from modeling_vitcls.hub import space as hub_space
from modeling_vitcls.options import DataOptions, EvaluateOptions, FinetuneOptions
from modeling_vitcls.training.runner import RunStopped
from modeling_vitcls.version import __version__
from scripts.demo_load import load_held_out_digits


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
    monkeypatch.setattr(cli, "run_command_line", print_twice)
    assert run_here() == 1


def test_other_closed_pipes_are_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(arguments: list[str] | None) -> None:
        raise BrokenPipeError("a worker has ended")

    monkeypatch.setattr(cli, "run_command_line", fail)
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
    assert all(line in "\n".join(lines) for line in cli.UTILITY_COMMANDS.values())
    for name in ("--help", "-h", "help"):
        assert run_here(name) == 0
        assert capsys.readouterr().out.splitlines() == lines


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("--version", "-V"):
        assert run_here(name) == 0
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
        text = " ".join(capsys.readouterr().out.split())
        assert text.startswith(f"usage: vitcls {name} ")
        summary = " ".join(str(cli.load_module(name).OPTIONS_CLASS.__doc__).split()).partition(".")[0]
        assert f" {summary}." in text and f" vitcls {name} --" in text.partition(summary)[2]  # an example


def test_completion_includes_all_commands_and_their_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here("completion", "bash") == 0
    script = capsys.readouterr().out
    assert all(name in script for name in cli.COMMANDS)
    assert "--num-register-tokens" in script and "--top-k" in script
    assert run_here("completion", "zsh") == 0
    assert capsys.readouterr().out.startswith("#compdef vitcls")


def test_the_environment_of_a_bug_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("VITCLS_CPU_KERNELS", raising=False)
    assert run_here("env") == 0
    printed = capsys.readouterr().out
    facts = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert facts["modeling_vitcls"] == __version__ and {"torch", "transformers", "devices"} <= facts.keys()
    assert facts["timm"] == importlib.metadata.version("timm")
    assert "hf_secret" not in printed
    lines = [line.split("  ", maxsplit=1) for line in printed.splitlines()]
    named = {name: text.strip() for name, text in lines}
    assert named["devices"] == env.describe_devices() and named["CPU kernels"] == env.describe_cpu_kernels()
    if not torch.cuda.is_available():
        assert named["devices"] == f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"

    monkeypatch.setenv("VITCLS_CPU_KERNELS", "0")
    assert env.describe_cpu_kernels() == "off: VITCLS_CPU_KERNELS is 0"
    monkeypatch.delenv("VITCLS_CPU_KERNELS")
    monkeypatch.setattr(env.kernels, "HAS_PRIVATE_NAMES", False)
    assert "lacks a private API" in env.describe_cpu_kernels()


def test_a_run_that_stops_early_ends_with_its_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(task_class: type, options: Any) -> None:
        raise RunStopped("stopped by a signal", exit_status=143, is_on_all_processes=False)

    monkeypatch.setattr("modeling_vitcls.api.run_training", stop)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="143"):
        finetune.train(object, None)
    assert capsys.readouterr().err == "process 1: stopped by a signal\n"


def test_benchmarks_download_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    options = benchmark.BenchmarkOptions(("inference",))
    benchmark.check_options(options)
    assert os.environ["HF_HUB_OFFLINE"] == "0"  # set by the user
    monkeypatch.delenv("HF_HUB_OFFLINE")
    benchmark.check_options(options)
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_environment_names_the_kernels_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VITCLS_CPU_KERNELS", raising=False)
    monkeypatch.setattr(env.kernels, "MIN_MULTIPLICATIONS", {(torch.float32, "a"): 1, (torch.bfloat16, "a"): 1})
    assert env.describe_cpu_kernels() == "on, oneDNN for bfloat16, float32"
    monkeypatch.setattr(env.kernels, "MIN_MULTIPLICATIONS", {})
    for has_onednn, reason in ((True, "this CPU has no AVX-512"), (False, "this PyTorch build has no oneDNN")):
        monkeypatch.setattr(env.kernels, "HAS_ONEDNN", has_onednn)
        assert env.describe_cpu_kernels() == f"on, without oneDNN: {reason}"
    with torch.backends.mkldnn.flags(enabled=False):
        assert env.describe_cpu_kernels() == "off: torch.backends.mkldnn is disabled"


def test_recipes_are_flags_that_the_command_line_overrides(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    flags = ["--config", str(recipe), "--output-dir", "out", "--model", "vitcls-tiny", "--dataset", "data"]
    recipe.write_text("epochs: 3\nbatch_size: 7\n", encoding="utf-8")
    options = parse_with_recipe(FinetuneOptions, [*flags, "--epochs", "5"])
    assert (options.training.epochs, options.training.batch_size, options.data.dataset) == (5, 7, "data")
    recipe.write_text("# no flags\n", encoding="utf-8")
    assert replace(parse_with_recipe(FinetuneOptions, flags), config=None) == parse_with_recipe(
        FinetuneOptions, flags[2:]
    )


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
        parse_with_recipe(FinetuneOptions, ["--config", str(recipe), "--output-dir", "out"])
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
    module.check_options(module.OPTIONS_CLASS(**fields, **valid_flags))


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("benchmark", {"work": ("training",), "pairs": 0}, "--pairs is 0: set --pairs to 1 or more"),
        ("benchmark", {"work": ()}, "--work and --against require at least one value"),
        ("benchmark", {"work": ("inference",), "against": ()}, "--work and --against require at least one value"),
        ("benchmark", {"work": ("step",), "plot": Path("a.png")}, "--plot requires --work growth"),
        ("benchmark", {"work": ("growth",), "plot": Path("a.txt")}, "--plot a.txt: set a file name that ends in .png"),
        ("convert", {"source": "resnet50"}, "--source resnet50 is not supported. Use timm:NAME"),
        ("convert", {"source": "timm:x", "num_labels": 0}, "--num-labels must be at least 1, but it is 0"),
        ("convert", {"source": "timm:x", "model": "mine"}, "requires --source and does not support --model"),
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
        module.check_options(module.OPTIONS_CLASS(**fields, **flags))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_demo_loads_the_revision_of_its_flag(hub: LocalHub) -> None:
    hub.create("ann/mine", private=False, files={"config.json": b'{"model_type": "vitcls"}'})
    with raises_one_line("ann/mine has no revision v9", error=OSError):
        demo.run(demo.DemoOptions("ann/mine", revision="v9"))


def test_flags_that_only_apply_to_pushes_are_errors_of_other_spaces(tmp_path: Path) -> None:
    for flags, name in (({"space_id": "ann/demo"}, "--space-id"), ({"private": True}, "--private")):
        with raises_one_line("--output pushes nothing", f"{name} applies only to pushes"):
            space.SpaceOptions("ann/model", output=tmp_path, **flags)
        assert space.SpaceOptions("ann/model", **flags).output is None
    assert space.SpaceOptions("ann/model", output=tmp_path).output == tmp_path
    assert space.SpaceOptions("ann/model", static=True, node_modules=tmp_path).static
    with raises_one_line("--node-modules requires --static"):
        space.SpaceOptions("ann/model", node_modules=tmp_path)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Replace slow functions by functions that record their name and arguments; return the list of records.

    A conversion, an export or a push takes seconds. The files of each package part test the functions themselves.
    """
    records: list[tuple[Any, ...]] = []

    def replace_function(path: str, result: Any = None) -> None:
        name = path.rpartition(".")[2]

        def record(*arguments: Any, **keyword_arguments: Any) -> Any:
            records.append((name, *arguments, *sorted(keyword_arguments.items())))
            return result

        monkeypatch.setattr(f"modeling_vitcls.{path}", record, raising=name != "serve_demo")

    monkeypatch.setitem(sys.modules, "modeling_vitcls.demo.page", SimpleNamespace())  # its import is slow
    monkeypatch.setattr("modeling_vitcls.demo.page", sys.modules["modeling_vitcls.demo.page"], raising=False)
    model = SimpleNamespace(repo_id="ann/model", commit="abc", needs_token=True)
    report = SimpleNamespace(format_lines=lambda: ["verified"])
    replace_function("conversion.convert.convert_checkpoint", "report")
    replace_function("conversion.convert.write_native_model", "report")
    replace_function("commands.convert.print_report")
    replace_function("export.exporter.export_model", "report")
    replace_function("commands.export.print_report")
    replace_function("commands.export.silence_exporters")
    replace_function("commands.space.silence_exporters")
    comparison = SimpleNamespace(file="a.onnx", largest_difference=0.5, top1_agreement=0.75)
    labeled = SimpleNamespace(
        metric="accuracy", num_images=4, dataset="digits", split="test", model=0.5, files={"a.onnx": 0.25}
    )
    exported = SimpleNamespace(comparisons=[comparison], labeled=labeled)
    replace_function("export.transformers_js.export_for_transformers_js", exported)
    replace_function("inference.evaluate.evaluate_checkpoint")
    replace_function("inference.frozen.evaluate_frozen")
    replace_function("demo.page.serve_demo")
    replace_function("hub.loading.get_model_folder", "folder")
    replace_function("hub.loading.get_cached_commit", "abc")
    replace_function("hub.adapters.check_adapter")
    replace_function("hub.manifest.check_is_model")
    replace_function("hub.push_permissions.check_push_permissions", "ann/id")
    replace_function("hub.publish.push_folder", SimpleNamespace(summary="summary"))
    replace_function("hub.verify.verify", report)
    replace_function("hub.verify.verify_push", report)
    replace_function("hub.space.find_published_model", model)
    replace_function("hub.space.build_space_files", "files")
    replace_function("hub.static_space.build_static_space_files", "static files")
    replace_function("hub.space.push_space", SimpleNamespace(url="https://hub/space"))
    replace_function("hub.space.write_space")
    return records


def test_convert_passes_its_flags(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    from modeling_vitcls.analysis.card_images import write_card_images

    flags: dict[str, Any] = {"random_init": True, "classifier": "new", "num_labels": 7, "family": "dino"}
    convert.run(convert.ConvertOptions(tmp_path, "timm:name", **flags))
    convert.run(convert.ConvertOptions(tmp_path, to="transformers", model="mine", any_size=True))
    assert calls == [
        ("convert_checkpoint", "timm:name", tmp_path, True, "new", 7, write_card_images, "dino"),
        ("print_report", "report", tmp_path),
        ("write_native_model", "mine", tmp_path, True),
        ("print_report", "report", tmp_path, ("trust_argument", "")),
    ]


def test_the_parity_report_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    report = ParityReport(
        source="timm:name",
        source_revision=None,
        source_class="VisionTransformer",
        random_init=False,
        model_class="ViTCLSForImageClassification",
        classifier="kept",
        limit=1e-5,
        comparisons=[
            SizeComparison((32, 32), {"cls": 1e-6, "logits": 2e-6}, {}),
            SizeComparison((24, 40), {"cls": 3e-6, "logits": 4e-6}, {}),
        ],
        not_compared="",
        preprocessing={
            "assumed_because": "",
            "origin": "preprocessor_config.json",
            "largest_difference_in_grey_levels": 0.25,
        },
        versions={"torch": "2", "timm": "1"},
        sha256={"model.safetensors": "abc"},
        notes=["a note"],
    )
    convert.print_report(report, Path("out"))
    title, _, header, _, cls, logits, _, *lines = capsys.readouterr().out.splitlines()
    assert title.strip() == "Largest differences between ViTCLSForImageClassification and timm:name"
    assert [[cell.strip() for cell in re.split("[│┃]", row)[1:-1]] for row in (header, cls, logits)] == [
        ["values", "32 x 32 pixels", "24 x 40 pixels"],
        ["cls", "1.0e-06", "3.0e-06"],
        ["logits", "2.0e-06", "4.0e-06"],
    ]
    assert lines == [
        "a note",
        "Classifier: kept. Maximum allowed difference: 1e-05",
        "Image processor: settings of preprocessor_config.json; pixel values differ by at most 0.25 gray levels "
        "(0 to 255)",
        "Versions: torch 2, timm 1",
        "SHA-256 of model.safetensors: abc",
        "",
        "Written to out. Load the model with",
        '  model = AutoModelForImageClassification.from_pretrained("out", trust_remote_code=True)',
        '  processor = AutoImageProcessor.from_pretrained("out", trust_remote_code=True)',
        "Push the model and its card to the Hub, and verify the pushed model, with",
        "  vitcls push --model out --hub-model-id YOUR-NAME/out",
    ]
    changes: dict[str, Any] = {"not_compared": "fixed size", "preprocessing": {"assumed_because": "there is none"}}
    changes |= {"family": "dino", "source_sha256": "def", "model_class": "ViTCLSModel"}
    convert.print_report(replace(report, **changes), Path("out"), trust_argument="")
    printed = capsys.readouterr().out
    for line in (
        "Not compared at a second image size: fixed size",
        "Image processor: the settings are assumed, because there is none. Check them",
        "SHA-256 of the source (dino): def",
        '  model = AutoModel.from_pretrained("out")',
    ):
        assert f"\n{line}\n" in printed


def test_a_study_of_the_package_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files: list[Path] = []
    monkeypatch.setattr("modeling_vitcls.study.load_study", files.append)
    monkeypatch.setattr("modeling_vitcls.study.run_study", lambda *arguments, **keyword_arguments: [])
    study.run(study.StudyOptions(Path("study_digits"), tmp_path))
    assert [file.read_text() for file in files] == [(SCRIPTS / "recipes" / "study_digits.yaml").read_text()]


def test_export_passes_its_flags(
    calls: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, Any] = {"image_size": (32, 48), "dynamic": False, "dtype": "float16", "opset": 19}
    export.run(export.ExportOptions("mine", "onnx", tmp_path, **flags))
    export.run(export.ExportOptions("mine", "transformers.js", tmp_path, dataset="digits", split="test"))
    assert [call for call in calls if call != ("silence_exporters",)] == [
        ("export_model", "mine", "onnx", tmp_path, (32, 48), False, "float16", 19),
        ("print_report", "report", tmp_path),
        ("export_for_transformers_js", "mine", tmp_path, "digits", "test"),
    ]
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        "a.onnx largest difference 5.0e-01, same top-1 label: 75.0%".split(),
        "accuracy on 4 images of digits (test):".split(),
        ["PyTorch", "50.00%"],
        ["a.onnx", "25.00%"],
    ]


def test_evaluate_and_demo_pass_their_flags(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    options = EvaluateOptions("mine", DataOptions("digits"))
    evaluate.run(options)
    evaluate.run(replace(options, frozen="knn"))
    demo.run(demo.DemoOptions("ann/mine", "v1", (tmp_path,), "0.0.0.0", 8000))
    assert calls == [
        ("evaluate_checkpoint", options),
        ("evaluate_frozen", replace(options, frozen="knn")),
        ("get_model_folder", "ann/mine", ("revision", "v1")),
        ("get_cached_commit", "folder"),
        ("serve_demo", "ann/mine", "abc", (tmp_path,), "0.0.0.0", 8000),
    ]


def test_the_report_of_an_export_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    report: Any = SimpleNamespace(
        format="onnx",
        model="mine",
        weights="trained",
        opset=18,
        limit=(1e-4, 0.01),
        tried=[SimpleNamespace(shape=(2, 3, 32, 48), differences={"logits": 1e-6})],
        input={"shape": ["batch", 3, "height", "width"], "image_size": [32, 32], "smallest_image_size": [8, 16]},
        outputs={"logits": ["batch", 3]},
        fixed_because="",
        preprocessing={},
        versions={"torch": "2"},
    )
    export.print_report(report, Path("out.onnx"))
    lines = capsys.readouterr().out.splitlines()
    title = "Largest differences between onnx and mine (limit 0.0001 + 0.01 of the largest value)"
    assert " ".join(" ".join(lines).split()).startswith(title)
    assert ["2 of 32 x 48", "1.0e-06"] in [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert lines[-6:] == [
        "Accepts any batch size and images of at least 8 x 16 pixels",
        "Versions: opset 18, torch 2",
        "",
        "Wrote the model to out.onnx, and a description of its inputs and outputs to out.onnx.json. "
        "Run the exported model with",
        '  session = onnxruntime.InferenceSession("out.onnx")',
        '  outputs = session.run(None, {"pixel_values": pixel_values})',
    ]


def test_push_passes_its_flags(
    calls: list[tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default name of the repository is the name of the folder, even for a relative path."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").touch()
    monkeypatch.chdir(tmp_path / "mine")
    flags: dict[str, Any] = {"private": True, "branch": "dev", "message": "text", "push_optimizer": True}
    push.run(push.PushOptions(Path(), **flags, endpoint_handler=True))
    options = ("with_handler", True), ("with_optimizer", True)
    assert calls == [
        ("check_is_model", Path()),
        ("check_push_permissions", None, "mine", True),
        ("push_folder", Path(), "ann/id", True, "text", "dev", *options),
        ("verify_push", SimpleNamespace(summary="summary"), Path()),
    ]
    assert "summary" in (printed := capsys.readouterr().out) and printed.endswith("verified\n")
    for folder, verify, check in (("adapter", True, "check_adapter"), ("mine", False, "check_is_model")):
        calls.clear()
        push.run(push.PushOptions(tmp_path / folder, "ann/other", verify=verify))
        assert [name for name, *_ in calls] == [check, "check_push_permissions", "push_folder"]
        assert calls[1] == ("check_push_permissions", "ann/other", folder, False)
    calls.clear()
    push.run(push.PushOptions(tmp_path, verify_only="ann/other", revision="v1"))
    push.run(push.PushOptions(verify_only="ann/other"))
    assert calls == [("verify", "ann/other", "v1", tmp_path), ("verify", "ann/other", "main", None)]
    with raises_one_line("--no-verify applies only to pushes"):
        push.PushOptions(verify_only="ann/other", verify=False)


def test_space_passes_its_flags(
    calls: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = tmp_path / "a.png"
    space.run(space.SpaceOptions("ann/model", "v1", title="Title", examples=(example,), private=True))
    model = SimpleNamespace(repo_id="ann/model", commit="abc", needs_token=True)
    flags = ["--title", "Title", "--examples", str(example)]
    assert calls == [
        ("find_published_model", "ann/model", "v1"),
        ("build_space_files", model, "Title", (example,)),
        ("check_push_permissions", None, "model-demo", True, ("repo_type", "space")),
        ("push_space", "files", model, "ann/id", True, "gradio", flags),
    ]
    assert "add a token with read access" in capsys.readouterr().out
    calls.clear()
    space.run(space.SpaceOptions("ann/model", static=True, node_modules=tmp_path, private=True, space_id="ann/space"))
    _, silence, (name, source, folder), *others = calls
    assert (silence, name, source) == (("silence_exporters",), "export_for_transformers_js", "ann/model@abc")
    flags = ["--static", "--node-modules", str(tmp_path)]
    assert others == [
        ("build_static_space_files", model, folder, None, tmp_path),
        ("check_push_permissions", "ann/space", "model-demo", True, ("repo_type", "space")),
        ("push_space", "static files", model, "ann/id", True, "static", flags),
    ]
    assert "add a token" not in capsys.readouterr().out
    with raises_one_line("a public static Space would publish the weights of ann/model, which is private or gated"):
        space.run(space.SpaceOptions("ann/model", static=True))
    calls.clear()
    space.run(space.SpaceOptions("ann/model", static=True, output=tmp_path / "space"))
    assert calls[-1] == ("write_space", "static files", tmp_path / "space")
    assert f"python -m http.server --directory {tmp_path / 'space'}" in capsys.readouterr().out
    hub_space.find_published_model().needs_token = False  # a public model
    space.run(space.SpaceOptions("ann/model", static=True))
    space.run(space.SpaceOptions("ann/model"))
    assert "add a token" not in capsys.readouterr().out and [name for name, *_ in calls].count("push_space") == 2


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


def test_the_demo_evaluates_the_held_out_digits() -> None:
    """scripts/demo_load.py selects the images without this package."""
    images, labels = load_held_out_digits()
    evaluated = load_evaluation_data(DataOptions("digits"), "test")
    assert labels == [evaluated.label_space.names[label] for label in evaluated.images.labels]
    assert [image.tobytes() for image in images] == [image.tobytes() for image in evaluated.images.images]
    assert len(images) == 372


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


@pytest.mark.parametrize(
    ("arguments", "command", "expected"),
    [
        (["bin/vitcls", "env"], [], True),
        (["C:/Scripts/vitcls.exe"], [], True),
        (["-m", "env"], ["python", "-m", "modeling_vitcls.cli", "env"], True),
        (["-m"], ["python", "-m", "pytest"], False),
        (["scripts/train.py"], ["python", "scripts/train.py", "modeling_vitcls.cli"], False),
        (["vitcls/train.py"], [], False),
        ([], [], False),
    ],
)
def test_the_command_is_recognized(
    arguments: list[str], command: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(sys, "orig_argv", command)
    assert modeling_vitcls.is_cli_process() is expected


def test_public_names_are_visible_to_type_checkers() -> None:
    tree = ast.parse(Path(modeling_vitcls.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {
        alias.name: node.module for node in checked.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert seen == modeling_vitcls.MODULE_BY_NAME
    assert {*seen, "__version__"} == set(modeling_vitcls.__all__) <= set(dir(modeling_vitcls))
    for name in modeling_vitcls.__all__:
        assert getattr(modeling_vitcls, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'ViTCLSModell'"):
        modeling_vitcls.ViTCLSModell  # noqa: B018


@pytest.mark.parametrize("flag", ["--private", "--hub-private"])
def test_both_names_of_the_flag_for_private_repositories_are_accepted(flag: str) -> None:
    assert parse_flags(push.OPTIONS_CLASS, ["--model", "mine", flag]).private
    assert parse_flags(space.OPTIONS_CLASS, ["--model", "mine", flag]).private
    run = ["--model", "vitcls-tiny", "--dataset", "digits", "--output-dir", "mine", "--push-to-hub"]
    options = parse_with_recipe(FinetuneOptions, [*run, flag])
    assert options.run.hub_private
    assert not parse_with_recipe(FinetuneOptions, [*run, flag.replace("--", "--no-")]).run.hub_private
