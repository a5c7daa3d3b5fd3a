"""Flags, recipes and help of the vitcls command; every error is one line."""

import importlib.util
import logging
import os
from dataclasses import replace
from pathlib import Path

import docstring_parser
import pytest
import yaml
from helpers.command_in_process import fail, parse_flags, run_here
from helpers.tiny_models import save_classifier
from pytest import CaptureFixture, LogCaptureFixture, MonkeyPatch

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.cli.parsing import (
    COMMANDS,
    exit_on_error,
    get_options_class,
    silence_libraries,
)
from modeling_vitcls.cli.recipes import RecipeLoader
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.hub.model_folder import dump_flags
from modeling_vitcls.runtime.flags import get_flag_fields
from modeling_vitcls.training.options import FinetuneOptions


RUN = "--model m --dataset d --output-dir o"


def test_recipes_are_flags_that_the_command_line_overrides(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    flags = f"--config {recipe} --output-dir out --model vitcls-tiny --dataset data".split()
    recipe.write_text("epochs: 3\nbatch_size: 7\n")

    options = parse_flags("finetune", [*flags, "--epochs", "5"])
    assert (options.epochs, options.batch_size, options.dataset) == (5, 7, "data")

    recipe.write_text("# no flags\n")
    assert replace(parse_flags("finetune", flags), config=None) == parse_flags(
        "finetune", flags[2:]
    )
    assert parse_flags("finetune", [f"--config={recipe}", *flags[2:]]).config == recipe


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("mixed_precision: no", "mixed_precision", "no"),
        ("label_names: [yes, no]", "label_names", ("yes", "no")),
        ("label_names: [010, '1']", "label_names", ("010", "1")),
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("flip: false", "flip", False),
        ("epochs: null", "epochs", None),
        ("image_size: [32, 48]", "image_size", (32, 48)),
        ("pooled_layers: [-2, -1]", "pooled_layers", (-2, -1)),
        ("augment: {zoom: 1e-1, shift: 0}", "augment", {"zoom": 0.1, "shift": 0}),
        ("model_config: {pooled_layers: [-2, -1]}", "model_config", {"pooled_layers": [-2, -1]}),
    ],
)
def test_a_recipe_is_yaml_1_2(line: str, name: str, value: object, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(line)
    options = parse_flags("finetune", [*RUN.split(), "--config", str(recipe)])
    assert getattr(options, name) == value


def test_a_written_recipe_has_the_same_values_when_it_is_read() -> None:
    """PyYAML writes YAML 1.1, in which 1e3 and 0o7 are texts, and recipes are read as YAML 1.2."""
    texts = ["1e3", "1E-5", "+.5", "3.e2", "010", "no", "12:30", "2024-01-01", "~", "", "=", ".inf"]
    flags = {"label_column": texts, "epochs": 1e-5, "lr": 1e3, "n": 3, "flip": True, "seed": None}
    assert yaml.load(dump_flags(flags), RecipeLoader) == flags
    assert yaml.safe_load(dump_flags(flags)) == flags


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff\xfe\xff", ["cannot read", "recipe.yaml"]),
        (b"epochs: [3", ["cannot read", "recipe.yaml"]),
        (b"- epochs", ["flag: value", "recipe.yaml"]),
        (b"epochs: 3\nlr: 0.1", ["recipe.yaml", "no flag lr"]),
        (b"epochs: 3\nbatch_sise: 8", ["recipe.yaml", "batch_sise", "--batch-size"]),
        (b"epochs: 3\nbatch_size: 8\nepochs: 4", ["recipe.yaml", "epochs is set twice"]),
        (b"batch-size: 3\nbatch_size: 8", ["recipe.yaml", "batch_size is set twice"]),
        (b"augment: " + b"[" * 9_000, ["cannot read", "recipe.yaml"]),
        (b"epochs: many", ["recipe.yaml: --epochs is 'many', but it must be float"]),
        (b"seed: 010", ["recipe.yaml: --seed is '010', but it must be int"]),
        (b"flip: no", ["recipe.yaml: --flip is 'no', but it must be bool"]),
        (b"image_size: [1, 2, 3]", ["recipe.yaml: --image-size is (1, 2, 3)"]),
    ],
)
def test_errors_of_recipes_are_one_line(content: bytes, words: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_bytes(content)
    error = fail("finetune", "--config", recipe, "--output-dir", "out", status=2)
    assert all(word in error for word in words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("nosuch --model m", ["options: nosuch. Available", "finetune"]),
        (f"finetune {RUN} --lr 3", ["--lr", "Did you mean --learning-rate?"]),
        (f"finetune {RUN} --amp", ["--amp", "Did you mean --mixed-precision?"]),
        (f"finetune {RUN} --drop-path 0.1", ["--drop-path", "Did you mean --model-config?"]),
        (f"finetune {RUN} --learning-rat 3", ["--learning-rat", "Did you mean --learning-rate?"]),
        ("finetune --datset d --model m", ["no flag --datset", "Did you mean --dataset?"]),
        (f"finetune {RUN} --no-epochs", ["--no-epochs"]),
        (f"finetune {RUN} --epochs abc", ["--epochs", "FLOAT", "'abc'"]),
        (f"finetune {RUN} --pooling=sum", ["--pooling", "'sum'", "'cls_mean'"]),
        (f"finetune {RUN} --model-config a", ["--model-config: a is not of the form NAME=VALUE"]),
        (
            f"finetune {RUN} --augment cutmix=1 --augment shift=0.1",
            ["--augment is set twice. Write"],
        ),
        (f"finetune {RUN} --model-config a=1 --model-config=b=1", ["--model-config is set twice"]),
        (f"finetune {RUN} --label-column a --label-column b", ["--label-column is set twice"]),
        (f"finetune {RUN} --epochs -1", ["--epochs is -1.0, but it must be above 0"]),
        ("finetune --model m", ["requires --dataset, --output-dir\n"]),
        (
            "finetune --dataset d --output-dir o",
            ["requires --model. A model to begin with: --model timm:vit_small_patch14_reg4"],
        ),
        ("finetune photos", ["--output-dir. A model to begin with: --model timm:vit_small"]),
        ("predict runs/mine a.png", ["requires --model. Did you mean --model runs/mine?"]),
        ("verify-unchanged runs/mine", ["NEW"]),
        ("evaluate --model m --dataset d --batch-size", ["--batch-size"]),
        ("push runs/mine", ["runs/mine"]),
        ("finetune --config nosuch --output-dir o", ["nosuch", "digits"]),
        ("inspect --model m", ["`images`", "--dataset"]),
        ("export --model m --output o --image-size 0 8", ["--image-size is (0, 8)", "1 or more"]),
        ("convert --output o", ["--model"]),
    ],
)
def test_flags_that_do_not_exist_fit_or_agree_are_one_line(command: str, words: list[str]) -> None:
    error = fail(*command.split(), status=2)
    assert all(word in error for word in words)


@pytest.mark.parametrize("flag", ["--model-ema", "--clip-grad", "--vflip", "--opt"])
def test_a_flag_of_timm_without_a_counterpart_has_no_suggestion(flag: str) -> None:
    error = fail(*f"finetune {RUN} {flag} 1".split(), status=2)
    assert error == f"error: there is no flag {flag}\n"


def test_paths_may_follow_a_choice() -> None:
    options = parse_flags("predict", "--model m --mixed-precision no a.png b".split())
    assert (options.mixed_precision, options.paths) == ("no", ("a.png", "b"))


@pytest.mark.parametrize(
    ("command", "module", "library", "extra"),
    [
        ("demo --model m", "cli.demo", "gradio", "demo"),
        ("export --model m --output m.onnx", "exporting.exporter", "onnxruntime", "export"),
    ],
)
def test_a_missing_library_is_named_with_the_extra_of_the_checkout(
    command: str, module: str, library: str, extra: str, monkeypatch: MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        f"modeling_vitcls.{module}.find_spec",
        lambda name: None if name == library else found(name),
    )
    error = fail(*command.split())
    assert library in error
    assert f'pip install ".[{extra}]"' in error


def test_an_unsupported_architecture_is_named_before_any_download(
    monkeypatch: MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("modeling_vitcls.conversion.source_models.load_timm_model", None)
    for source, words in (
        ("timm:resnet50", "resnet50 is not a plain ViT"),
        ("timm:vit_smal_patch16_224", "vit_small_patch16_224"),
    ):
        assert words in fail("convert", "--model", source, "--output", tmp_path / "converted")


def test_the_help_of_training_fits_on_a_screen_and_the_whole_one_has_all_flags(
    capsys: CaptureFixture, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_here("finetune", "--help") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 45
    assert max(map(len, lines)) <= 80

    assert run_here("finetune", "--help-all") == 0
    text = capsys.readouterr().out
    names = get_flag_fields(FinetuneOptions)
    assert all(f"--{name.replace('_', '-')}" in text for name in names)


def list_described_flags(options_class: type) -> set[str]:
    """Return the fields with a docstring, also of base classes."""
    return {
        each.arg_name
        for base in options_class.__mro__[:-1]
        for each in docstring_parser.parse_from_object(base).params
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_has_a_help_text(command: str) -> None:
    options_class = get_options_class(command)
    assert get_flag_fields(options_class).keys() <= list_described_flags(options_class)


def test_commands_do_not_print_transformers_reports_about_weights(
    tmp_path: Path, caplog: LogCaptureFixture, capfd: CaptureFixture
) -> None:
    save_classifier(tmp_path)
    silence_libraries()
    with caplog.at_level(logging.WARNING):
        ViTCLSForImageClassification.from_pretrained(
            tmp_path, num_labels=7, ignore_mismatched_sizes=True
        )
    printed = caplog.text + "".join(capfd.readouterr())
    assert "LOAD REPORT" not in printed
    assert "Loading weights" not in printed


def test_lines_of_the_log_name_flags(capsys: CaptureFixture) -> None:
    silence_libraries()
    record = logging.makeLogRecord({"msg": "set `%s=%d`", "args": ("num_workers", 0)})
    with exit_on_error(DataOptions):
        logging.lastResort.handle(record)  # how a command prints warnings
    assert capsys.readouterr().err == "set --num-workers 0\n"


@pytest.mark.parametrize(
    ("command", "flag", "name"),
    [
        ("evaluate --model m --dataset d", "--output", "x.json"),
        ("predict --model m photo.jpg", "--output", "x.csv"),
        ("inspect --model m photo.jpg", "--output", "x.html"),
        ("export --model m", "--output", "x.onnx"),
        ("finetune --model m --dataset d", "--output-dir", "x"),
    ],
)
def test_an_output_that_cannot_be_written_is_reported_before_the_work(
    command: str, flag: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file/inner" / name
    error = fail(*command.split(), flag, output)
    assert error.startswith(f"error: cannot write {output}: ")
    assert error.endswith(f" {flag}\n")


@pytest.mark.parametrize(
    "command", ["predict {} --model m -o {}", "evaluate --model m --dataset {} --per-image {}"]
)
def test_no_output_replaces_an_input(command: str, tmp_path: Path) -> None:
    (tmp_path / "file.parquet").touch()
    error = fail(
        *command.format(
            tmp_path / "file.parquet", f"{tmp_path}/../{tmp_path.name}/file.parquet"
        ).split()
    )
    assert "file.parquet, which is an input" in error


def test_a_folder_that_is_not_utf_8_is_an_error_before_training() -> None:
    folder = os.fsdecode(b"out\xff")
    error = fail("finetune", *RUN.replace("-dir o", "-dir").split(), folder)
    assert "the name of a file or folder is not valid UTF-8" in error
    assert not Path(folder).exists()


def test_a_folder_without_write_permission_is_reported_before_the_work(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    flags = ["--model", "m", "--dataset", "d", "--output", tmp_path / "x.json"]
    assert f"no permission to write to {tmp_path}. Set" in fail("evaluate", *flags)
