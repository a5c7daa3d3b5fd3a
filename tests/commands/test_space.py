"""`vitcls space`: how flags are passed on, and flags that contradict each other."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.tiny_models import raises_one_line

from modeling_vitcls.commands import space
from modeling_vitcls.publishing import space as hub_space


def test_flags_that_only_apply_to_pushes_are_errors_of_other_spaces(tmp_path: Path) -> None:
    for flags, name in (({"space_id": "ann/demo"}, "--space-id"), ({"private": True}, "--private")):
        with raises_one_line("--output pushes nothing", f"{name} applies only to pushes"):
            space.SpaceOptions("ann/model", output=tmp_path, **flags)
        assert space.SpaceOptions("ann/model", **flags).output is None
    assert space.SpaceOptions("ann/model", output=tmp_path).output == tmp_path
    assert space.SpaceOptions("ann/model", static=True, node_modules=tmp_path).static
    with raises_one_line("--node-modules requires --static"):
        space.SpaceOptions("ann/model", node_modules=tmp_path)


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
