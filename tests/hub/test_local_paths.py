"""Names of data, models and teachers: local paths are recognized as local on every machine."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny_models import raises_one_line
from pytest import MonkeyPatch

from modeling_vitcls.hub.loading import split_revision
from modeling_vitcls.hub.local_paths import (
    is_local,
    resolve_name,
    strip_folders,
)
from modeling_vitcls.runtime.flags import to_flags
from modeling_vitcls.training import run_folder
from modeling_vitcls.training.checkpoints import CheckpointStore
from modeling_vitcls.training.options import (
    FinetuneOptions,
)
from modeling_vitcls.training.resume import convert_sources, take_derived_values
from modeling_vitcls.training.run_folder import make_flags_relative


@pytest.fixture
def here(tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    """Return a working folder with folders of misleading names, next to a data folder."""
    for name in ("digits", "acme/data", "data/teach", ".hidden", "../clinic/scans"):
        (tmp_path / "here" / name).mkdir(parents=True)
    (tmp_path / "here/weights.pt").touch()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def test_paths_become_absolute_and_names_with_at_are_kept(here: Path) -> None:
    for name in ("acme/data", "data/teach", "weights.pt"):
        assert resolve_name(name) == resolve_name(resolve_name(name)) == str(here / name)

    assert resolve_name("timm:resnet18@weights.pt") == f"timm:resnet18@{here}/weights.pt"
    assert resolve_name("timm:local-dir:data/teach") == f"timm:local-dir:{here}/data/teach"
    assert resolve_name("transformers:data/teach") == f"transformers:{here}/data/teach"

    for other in (
        "acme/none",
        "timm:weights.pt",
        "timm:hf-hub:acme/data",
        "timm:hf-hub:acme/data@main",
        "timm:resnet18@none.pt",
    ):
        assert resolve_name(other) == other

    (here / "at@home").mkdir()
    for name in ("at@home", "@v1", "acme/data@"):
        assert split_revision(name) == (name, None)
    assert split_revision("me@home/vit@v1") == ("me@home/vit", "v1")

    (here / "link").symlink_to(here / "data")
    assert resolve_name("link/teach") == f"{here}/link/teach"


@pytest.mark.parametrize(
    ("name", "shared"),
    [
        ("/gone/scans", "path/to/scans"),
        ("timm:resnet18@/gone/w.pt", "timm:resnet18@path/to/w.pt"),
        ("timm:local-dir:/gone/at@home", "timm:local-dir:path/to/at@home"),
        ("transformers:/gone/vit", "transformers:path/to/vit"),
        ("~/gone", "path/to/gone"),
        ("timm:resnet18@./gone.pt", "timm:resnet18@path/to/gone.pt"),
        *(
            (name, name)
            for name in ("digits", "acme/data", "timm:resnet18", "transformers:acme/vit@main")
        ),
    ],
)
def test_only_absolute_paths_are_local(here: Path, name: str, shared: str) -> None:
    assert strip_folders(name) == shared
    assert is_local(name) is (name != shared)


def options_of(output: Path, dataset: str, **others: Any) -> FinetuneOptions:
    """Return options of a run on local data, as on the command line."""
    return FinetuneOptions(
        output_dir=output,
        dataset=dataset,
        model="vitcls-tiny",
        num_distillation_tokens=1,
        teacher="timm:resnet18@weights.pt",
        **others,
    )


def write_recipe(options: FinetuneOptions) -> None:
    """Write config.resolved.yaml, as a run does."""
    options.output_dir.mkdir(parents=True, exist_ok=True)
    store = CheckpointStore(options.output_dir / "checkpoints", num_kept=1)
    run_folder.prepare_folder(options.output_dir, store, to_flags(options), is_resumed=False)


def test_files_of_a_run_contain_no_local_paths(
    here: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """The files repeat the run from the same folder, and show that data and teacher are local."""
    monkeypatch.setenv("HOME", str(tmp_path / "clinic"))
    folder = tmp_path / "runs/mine"
    options = convert_sources(options_of(folder, str(tmp_path / "clinic/scans")), resolve_name)
    write_recipe(options)

    text = (folder / "config.resolved.yaml").read_text()
    flags = yaml.safe_load(text)
    assert flags["output_dir"] == "../runs/mine"
    assert flags["dataset"] == "~/scans"
    assert flags["model"] == "vitcls-tiny"
    assert flags["teacher"] == "timm:resnet18@./weights.pt"
    assert str(tmp_path) not in text

    recorded = {"flags": make_flags_relative(to_flags(options)), "chosen_flags": {}}
    assert take_derived_values(options, recorded) == options


def test_a_run_is_resumed_with_another_spelling_of_its_data(here: Path, tmp_path: Path) -> None:
    def build(dataset: str, **flags: Any) -> FinetuneOptions:
        return convert_sources(options_of(tmp_path / "run", dataset, **flags), resolve_name)

    def check(current: FinetuneOptions, **changes: Any) -> None:
        recorded = {"flags": before | changes, "chosen_flags": {}}
        take_derived_values(current, recorded)

    before = to_flags(build("data/teach"))
    assert before["dataset"] == f"{here}/data/teach"
    for spelling in (
        "./data/teach",
        str(here / "data/teach"),
        "../here/data/teach",
        "data/../data/teach",
    ):
        check(build(spelling))
        check(build(spelling), dataset="data/teach")  # as written by earlier versions
    check(build("data/teach", hub_model_id="ann/mine"))
    with raises_one_line("`dataset`", "acme/data", "a different `output_dir`"):
        check(build("acme/data"))
    (tmp_path / "new").mkdir()
    shutil.move(here / "data/teach", tmp_path / "new/teach")
    check(build("../new/teach"))
    with raises_one_line("`dataset`"):
        check(build("../clinic/scans"))
