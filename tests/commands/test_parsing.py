"""Flags and recipes: names, precedence, and errors of one line."""

from dataclasses import replace
from pathlib import Path

import pytest

from modeling_vitcls.commands import push, space
from modeling_vitcls.commands.parsing import find_recipe, parse_flags, parse_with_recipe
from modeling_vitcls.options import FinetuneOptions


SCRIPTS = Path(__file__).parents[2] / "scripts"


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


def test_recipes_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("digits")).read_text() == (SCRIPTS / "recipes" / "digits.yaml").read_text()
    assert find_recipe(Path("none")) == Path("none")
    Path("digits").write_text("epochs: 1", encoding="utf-8")  # a file in the working folder takes precedence
    assert find_recipe(Path("digits")) == Path("digits")


@pytest.mark.parametrize("flag", ["--private", "--hub-private"])
def test_both_names_of_the_flag_for_private_repositories_are_accepted(flag: str) -> None:
    assert parse_flags(push.OPTIONS_CLASS, ["--model", "mine", flag]).private
    assert parse_flags(space.OPTIONS_CLASS, ["--model", "mine", flag]).private
    run = ["--model", "vitcls-tiny", "--dataset", "digits", "--output-dir", "mine", "--push-to-hub"]
    options = parse_with_recipe(FinetuneOptions, [*run, flag])
    assert options.run.hub_private
    assert not parse_with_recipe(FinetuneOptions, [*run, flag.replace("--", "--no-")]).run.hub_private
