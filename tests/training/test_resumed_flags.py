"""The flags with which a run may be resumed: those that a person set, in any spelling.

The encoder is converted and has a native side of 280 pixels, so that the run derives an image size.
"""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.photo_folders import write_unequal_photos
from helpers.source_checkpoints import save_large_encoder
from helpers.tiny_models import raises_one_line
from pytest import CaptureFixture, MonkeyPatch

from modeling_vitcls.cli import main
from modeling_vitcls.cli.parsing import parse_command_line
from modeling_vitcls.hub.local_paths import resolve_name
from modeling_vitcls.model.field_checks_vitcls import to_pair
from modeling_vitcls.runtime.files import read_json
from modeling_vitcls.runtime.flags import get_flag_fields, to_arguments
from modeling_vitcls.training.options import FinetuneOptions
from modeling_vitcls.training.reporter import Reporter
from modeling_vitcls.training.resume import convert_sources, take_derived_values


NOT_SPELLED = ("config", "output_dir", "resume", "overwrite")
FLAGS = [name for name in get_flag_fields(FinetuneOptions) if name not in NOT_SPELLED]


@pytest.fixture(scope="module")
def command(module_path: Path) -> Iterator[list[str]]:
    """Yield a command without an output folder: few flags, two classes of photos, a ViT of 280 px."""
    encoder = save_large_encoder(module_path / "vit")
    photos = write_unequal_photos(module_path / "photos")
    with MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(module_path / "cache/hub"))
        yield [
            "finetune",
            *("--model", encoder, "--dataset", str(photos)),
            *("--epochs", "2", "--num-workers", "0", "--no-report"),
        ]


@pytest.fixture(scope="module")
def stopped(command: list[str], module_path: Path) -> Path:
    """Return the output folder of a run that was stopped after its first step."""
    reset_accelerate()
    folder = module_path / "stopped"
    log = Reporter.log

    def stop(reporter: Reporter, record: dict[str, Any]) -> None:
        log(reporter, record)
        signal.raise_signal(signal.SIGTERM)

    with MonkeyPatch.context() as patch:
        patch.setattr(Reporter, "log", stop)
        with pytest.raises(SystemExit, match="143"):  # 128 + SIGTERM
            main([*command, "--output-dir", str(folder)])
    (checkpoint,) = folder.glob("checkpoints/*")
    assert checkpoint.name == "step-00000001"
    assert not (folder / "results.json").exists()
    assert not (folder / ".vitcls.lock").exists()
    return folder


@pytest.fixture
def interrupted(stopped: Path, tmp_path: Path) -> Path:
    """Return a copy of the folder of the stopped run."""
    return shutil.copytree(stopped, tmp_path / "run")


def read_record(folder: Path) -> dict[str, Any]:
    (state,) = folder.glob("checkpoints/step-*/state.json")
    return read_json(state)["metadata"]


def resume(folder: Path, command: list[str]) -> FinetuneOptions:
    """Return the options of a resumed run."""
    arguments = [*command, "--output-dir", str(folder), "--resume"]
    _, options = parse_command_line(arguments)
    return take_derived_values(convert_sources(options, resolve_name), read_record(folder))


def test_an_interrupted_and_a_finished_run_resume_with_the_same_command(
    command: list[str], interrupted: Path, capsys: CaptureFixture
) -> None:
    """Also if it spells flags; the next test resumes without."""
    flags = ["--image-size", "224", "--epochs", "2.0"]
    arguments = [*command, "--output-dir", str(interrupted), "--resume"]
    main([*arguments, *flags])
    assert "resumed   after step 1" in capsys.readouterr().out
    assert to_pair(read_json(interrupted / "config.json")["image_size"]) == (224, 224)
    processor = read_json(interrupted / "preprocessor_config.json")
    assert processor["size"] == {"height": 224, "width": 224}
    assert not (interrupted / "checkpoints").exists()

    for more_flags in ([], flags):
        main([*arguments, *more_flags])
        assert capsys.readouterr().out.startswith("finished ")


@pytest.mark.parametrize("name", FLAGS)
def test_a_run_resumes_with_any_flag_spelled_as_the_value_that_it_used(
    name: str, stopped: Path, command: list[str]
) -> None:
    """The value of a flag that is not set is derived, or its default."""
    record = read_record(stopped)
    value = record["chosen_flags"].get(name, record["flags"][name])
    words = [] if value in (None, [], ()) else to_arguments(name, value)
    for more_words in ([], words):
        resume(stopped, [*command, *more_words])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--image-size 280", []),
        ("--learning-rate 0.5", []),
        ("--hidden-size 48", []),
        ("--warmup 0.2", []),
        ("--epochs 3", []),
        ("--image-size 224 224", ["`image_size` unset (224 was chosen)", "is 224 224"]),
    ],
)
def test_a_run_does_not_resume_with_another_value(
    flags: str, words: list[str], stopped: Path, command: list[str]
) -> None:
    name = flags.split()[0].removeprefix("--").replace("-", "_")
    with raises_one_line(f"was started with `{name}`", *words):
        resume(stopped, [*command, *flags.split()])


def test_a_resumed_run_keeps_the_values_that_were_derived_on_another_machine(
    command: list[str], interrupted: Path, monkeypatch: MonkeyPatch
) -> None:
    chosen = read_record(interrupted)["chosen_flags"]
    monkeypatch.setattr("modeling_vitcls.training.defaults.choose_learning_rate", lambda *_: 0.5)
    monkeypatch.setattr("modeling_vitcls.training.defaults.FINETUNING_SIDE", 112)
    main([*command, "--output-dir", str(interrupted), "--resume"])
    results = read_json(interrupted / "results.json")
    assert results["chosen_flags"] == chosen
    assert chosen["image_size"] == 224
