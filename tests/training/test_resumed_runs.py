"""Runs that are stopped and resumed in this process, and errors for changes.

tests/integration/test_resume.py kills and resumes whole runs in other processes.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_models import raises_one_line
from helpers.tiny_options import (
    build_tiny_options,
    forget_end,
    read_compared_values,
    run_to_folder,
    run_training,
)
from pytest import CaptureFixture, MonkeyPatch, approx

from modeling_vitcls.runtime import distributed
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.runtime.flags import to_flags
from modeling_vitcls.training.checkpoints import (
    CheckpointStore,
    read_training_state,
    write_training_state,
)
from modeling_vitcls.training.options import FinetuneOptions
from modeling_vitcls.training.resume import take_derived_values


def build_options(folder: Path, **flags: Any) -> FinetuneOptions:
    """Return the options of three steps, which saves after each step."""
    settings = {
        "max_steps": 3,
        "batch_size": 8,
        "learning_rate": 3e-3,
        "save_every": 1,
        "keep_checkpoints": 5,
    }
    return build_tiny_options(folder, "digits", **settings | flags)


@pytest.fixture(scope="module")
def whole(module_path: Path) -> Path:
    """Return the folder of an uninterrupted run."""
    return run_to_folder(build_options(module_path / "run"))


@pytest.fixture
def killed(whole: Path, tmp_path: Path) -> Path:
    """Return the folder of a run that was killed after step 2."""
    folder = shutil.copytree(whole, tmp_path / "killed")
    forget_end(folder, 3)
    return folder


def change_metadata(folder: Path, **changes: Any) -> None:
    """Change the metadata of the checkpoint of step 2."""
    checkpoint = folder / "checkpoints/step-00000002"
    state = read_training_state(checkpoint)
    state["metadata"] |= changes
    write_training_state(checkpoint, state)


# Results ------------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_same_results(
    whole: Path, killed: Path, capsys: CaptureFixture
) -> None:
    """Flags that affect the result only by rounding may change.

    Times, unreadable images and evaluations of earlier steps are included.
    """
    changes = {
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "keep_checkpoints": 1,
        "save_every": 5,
    }
    earlier = {"training_seconds": 1000.0, "unreadable_images": [7, 3]}
    change_metadata(killed, **earlier)

    results = run_training(build_options(killed, resume=True, **changes))
    printed = capsys.readouterr().out
    assert "resumed   after step 2 of 3" in printed
    assert "step 3/3  " in printed

    found = read_compared_values(killed)
    expected = read_compared_values(whole)
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == approx(other["loss"], rel=1e-5)
    assert found[0]["token_movement"] == approx(expected[0]["token_movement"], abs=1e-5)
    assert [record["step"] for record in found[1:]] == [1, 2, 3]
    assert 1000 < results["seconds"] < 1300
    assert results["images_per_second"] == round(24 / results["seconds"], 1)

    checkpoints = CheckpointStore(killed / "checkpoints", num_kept=1)
    assert checkpoints.list_steps() == [3]
    metadata = read_json(checkpoints.get_folder(3) / "state.json")["metadata"]
    assert 1000 < metadata["training_seconds"] <= results["seconds"]
    assert metadata["images_per_step"] == 8
    assert results["num_unreadable_training_images"] == 2
    assert metadata["unreadable_images"] == [3, 7]


# Changes between start and resume -----------------------------------------------------------------


CHANGES = [
    ({"batch_size": 4}, "has 8 images per step, but this run has 4"),
    # The launcher of the resumed run may set it, too.
    ({"mixed_precision": "bf16"}, "requires `mixed_precision='no'`"),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES)
def test_another_run_is_an_error(killed: Path, changes: dict[str, Any], message: str) -> None:
    with raises_one_line("`resume=True`: ", message):
        run_training(build_options(killed, resume=True, **changes))
    assert not (killed / ".vitcls.lock").exists()


def test_a_resumed_run_uses_the_commits_with_which_it_was_started() -> None:
    options = build_options(Path("run"), model="acme/vit", teacher="acme/other")
    chosen = {"model": f"acme/vit@{'0' * 40}", "teacher": f"acme/other@{'1' * 40}"}
    recorded = {"flags": to_flags(options), "chosen_flags": chosen}
    for sources in ({}, chosen):
        resumed = take_derived_values(replace(options, **sources), recorded)
        assert (resumed.model, resumed.teacher) == tuple(chosen.values())
    with raises_one_line("`model` acme/vit (acme/vit@", f"is acme/vit@{'2' * 40}"):
        take_derived_values(replace(options, model=f"acme/vit@{'2' * 40}"), recorded)


def test_an_initial_model_that_is_gone_is_named() -> None:
    """Its name could also be that of a model on the Hub."""
    options = build_options(Path("run"), model="vit")
    flags = to_flags(options) | {"model": "./vit"}
    with raises_one_line("./vit does not exist. Restore it"):
        take_derived_values(options, {"flags": flags, "chosen_flags": {}})


def test_a_run_resumed_on_a_machine_without_bfloat16_keeps_its_precision(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(distributed, "MIN_BFLOAT16_WIDTH", 16)
    monkeypatch.setattr(distributed, "has_bfloat16", lambda device: True)
    folder = run_to_folder(build_options(tmp_path / "run"))
    results = read_compared_values(folder)
    assert results[0]["mixed_precision"] == "bf16"

    forget_end(folder, 3)
    monkeypatch.setattr(distributed, "has_bfloat16", lambda device: False)
    run_training(build_options(folder, resume=True))
    assert read_compared_values(folder) == results
