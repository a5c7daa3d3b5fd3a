"""Flags, recipes and help of the vitcls command; every error is one line."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command_in_process import parse_flags, run_here
from helpers.tiny_models import build_tiny_config, save_with_processor

from modeling_vitcls import ViTCLSForImageClassification, cli
from modeling_vitcls.commands.parsing import find_recipe, read_help_texts, silence_libraries
from modeling_vitcls.options import FinetuneOptions, get_flag_fields


SCRIPTS = Path(__file__).parents[2] / "scripts"
RUN = "--model m --dataset d --output-dir o"


def test_recipes_are_flags_that_the_command_line_overrides(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    flags = ["--config", str(recipe), "--output-dir", "out", "--model", "vitcls-tiny", "--dataset", "data"]
    recipe.write_text("epochs: 3\nbatch_size: 7\n", encoding="utf-8")
    options = parse_flags(FinetuneOptions, ["--config", "replaced", *flags, "--epochs", "5"])
    assert (options.training.epochs, options.training.batch_size, options.data.dataset) == (5, 7, "data")
    recipe.write_text("# no flags\n", encoding="utf-8")
    assert replace(parse_flags(FinetuneOptions, flags), config=None) == parse_flags(FinetuneOptions, flags[2:])
    assert parse_flags(FinetuneOptions, [f"--config={recipe}", *flags[2:]]).config == recipe


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\xff", ["cannot read", "recipe.yaml"]),
        (b"epochs: [3", ["cannot read", "recipe.yaml"]),
        (b"- epochs", ["flag: value", "recipe.yaml"]),
        (b"epochs: 3\nlr: 0.1", ["--lr", "use --learning-rate"]),
        (b"qqqq: 1", ["--qqqq", "--help"]),
    ],
)
def test_errors_of_recipes_are_one_line(
    content: bytes, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    assert run_here("finetune", "--config", str(recipe), "--output-dir", "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("nosuch", ["nosuch", "finetune"]),
        ("finetun --model x", ["finetune"]),
        (f"finetune {RUN} --lr 3", ["--lr", "--learning-rate"]),
        (f"finetune {RUN} --epochs abc", ["--epochs", "abc"]),
        ("finetune --model m", ["--dataset", "--output-dir"]),
        ("finetune --config nosuch --output-dir o", ["nosuch", "digits"]),
        ("evaluate --model m --dataset d --batch-size", ["--batch-size"]),
        ("predict --model m a.png --revision abc", ["--revision", "ID@COMMIT"]),
        ("inspect --model m", ["PATHS", "--dataset"]),
        ("inspect --model m a.png --num-images 0", ["--num-images"]),
        ("inspect --model m a.png --output page.pdf", ["--output page.pdf"]),
        ("inspect --model m a.png --label-column x", ["--label-column", "--dataset"]),
        ("push", ["--model", "--verify-only"]),
        ("push --model m --revision x", ["--revision", "--branch"]),
        ("export --model m --format tflite --output o", ["--format", "tflite", "onnx"]),
        ("convert timm:test_vit --output o", ["--source timm:test_vit"]),
        ("convert --output o", ["--source", "--model"]),
        ("convert --to transformers --model m --source timm:test_vit --output o", ["--source", "--model"]),
        ("push runs/mine", ["--model runs/mine"]),
        ("benchmark --rounds 0", ["--rounds"]),
        ("space --model m --output o --private", ["--output", "--private"]),
    ],
)
def test_errors_of_flags_are_one_line(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(*command.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words)


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_the_help_of_training_fits_on_a_screen(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    assert run_here(command, "--help") == 0
    short_help = capsys.readouterr().out
    assert run_here(command, "-h") == 0 and capsys.readouterr().out == short_help
    lines = short_help.splitlines()
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert 15 <= len(flags) <= 30 and len(lines) <= 45 and max(map(len, lines)) <= 90
    assert {"--model", "--dataset", "--output-dir", "--epochs", "--learning-rate", "--resume"} <= set(flags)
    assert run_here(command, "--help-all") == 0
    text = capsys.readouterr().out
    names = get_flag_fields(cli.load_modules()[command].OPTIONS_CLASS)
    assert all(f"--{name.replace('_', '-')}" in text for name in names)
    assert f" {len(names) - len(flags)} flags" in lines[-1] and f"    vitcls {command} " in text  # an example


def test_every_flag_has_a_help_text() -> None:
    for name, module in cli.load_modules().items():
        assert get_flag_fields(module.OPTIONS_CLASS).keys() <= read_help_texts(module.OPTIONS_CLASS).keys(), name


def test_recipes_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("digits").mkdir()  # a folder is not a recipe
    assert find_recipe(Path("digits")).read_text() == (SCRIPTS / "recipes" / "digits.yaml").read_text()
    Path("digits").rmdir()
    Path("digits").write_text("epochs: 1", encoding="utf-8")  # a file in the working folder takes precedence
    assert find_recipe(Path("digits")) == Path("digits")


def test_commands_do_not_print_transformers_reports_about_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    save_with_processor(ViTCLSForImageClassification(build_tiny_config()), tmp_path)
    silence_libraries()
    with caplog.at_level(logging.WARNING):
        ViTCLSForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    printed = caplog.text + "".join(capfd.readouterr())
    assert "LOAD REPORT" not in printed and "Loading weights" not in printed
