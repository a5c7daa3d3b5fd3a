"""`vitcls space`: how flags are passed on, and flags that contradict each other."""

from pathlib import Path

from helpers.tiny_models import raises_one_line

from modeling_vitcls.commands import space


def test_flags_that_only_apply_to_pushes_are_errors_of_other_spaces(tmp_path: Path) -> None:
    for flags, name in (({"space_id": "ann/demo"}, "--space-id"), ({"private": True}, "--private")):
        with raises_one_line("--output", name):
            space.SpaceOptions("ann/model", output=tmp_path, **flags)
        assert space.SpaceOptions("ann/model", **flags).output is None
    assert space.SpaceOptions("ann/model", output=tmp_path).output == tmp_path
