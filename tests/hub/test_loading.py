"""Loading models and datasets from the Hub: newest, pinned, from the cache, and one line if they cannot be.

The Hub is a local one. huggingface_hub waits between its retries, here without waiting.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import timm
import transformers
from helpers.command_in_process import check_error
from helpers.local_hub import LocalHub, Token, read_files
from helpers.photo_folders import draw_noise, get_file_names
from helpers.scripts_in_process import run_in_process
from helpers.source_checkpoints import SIZES
from helpers.tiny_models import build_tiny_config, raises_one_line, save_both
from huggingface_hub import constants
from huggingface_hub.utils import _http as hub_http
from pytest import CaptureFixture, MonkeyPatch
from timm.models import save_for_hf

import modeling_vitcls as vitcls
from modeling_vitcls.conversion.convert import convert_checkpoint
from modeling_vitcls.data.dataset import read_dataset
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.hub import loading
from modeling_vitcls.hub.loading import get_cached_commit, get_model_folder
from modeling_vitcls.hub.model_files import CONFIG_FILES
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing.push import push_folder
from scripts.tools.random_weights import randomize_weights


DEAD = "http://127.0.0.1:9"  # A closed port
NAMES = {index: str(index) for index in range(10)}
CARD = """---
license: other
license_name: dinov3-license
license_link: LICENSE.md
---
# A model of theirs
"""


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: MonkeyPatch, tmp_path: Path) -> LocalHub:
    """Start a Hub with a private model and a data set, as ann, for all libraries."""
    monkeypatch.setattr(hub_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data")
    for library in (constants, datasets.config):
        monkeypatch.setattr(library, "HF_HUB_OFFLINE", False)
    hub.tokens |= {"hf_bob": Token("bob")}
    hub.create(
        "ann/model", private=True, files={"config.json": b"{}", "model.safetensors": b"weights"}
    )
    hub.create("ann/notes", files={"x.txt": b"x"})
    return hub


def stop_hub(hub: LocalHub, patch: MonkeyPatch) -> None:
    """Point all libraries in this process to a closed port."""
    address = f"{DEAD}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    patch.setattr(constants, "ENDPOINT", DEAD)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
    patch.setattr(datasets.config, "HF_ENDPOINT", DEAD)


def go_offline(hub: LocalHub, patch: MonkeyPatch) -> None:
    for library in (constants, datasets.config):
        patch.setattr(library, "HF_HUB_OFFLINE", True)


def use_token(token: str) -> Callable[[LocalHub, MonkeyPatch], None]:
    return lambda hub, patch: patch.setenv("HF_TOKEN", token)


def fail(method: str) -> Callable[[LocalHub, MonkeyPatch], None]:
    return lambda hub, patch: hub.fail(method, "/resolve/", 500, times=99)


def test_card_and_license_are_converted_with_the_model(hub: LocalHub, tmp_path: Path) -> None:
    config = transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3, id2label=NAMES)
    model = randomize_weights(transformers.Dinov2WithRegistersForImageClassification(config))
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    save_both(model, tmp_path / "theirs", processor)
    (tmp_path / "theirs/README.md").write_text(CARD)
    (tmp_path / "theirs/LICENSE.md").write_text("You may.\n")
    repository = hub.create("them/dino", files=read_files(tmp_path / "theirs"))
    folder = tmp_path / "mine"
    commit = repository.branches["main"]

    repository.commit(
        "main", hub.files("them/dino") | {"config.json": hub.store("config.json", b"{}")}
    )
    assert (
        run_in_process(
            "convert.py", "--model", f"transformers:them/dino@{commit}", "--output", folder
        )
        == 0
    )

    push_folder(ModelFolder(folder), "ann/dino")
    card = hub.read("ann/dino", "README.md").decode()
    for line in ("base_model: them/dino", "license: other", "license_name: dinov3-license"):
        assert f"\n{line}\n" in card
    assert f"at commit `{commit}`" in card
    assert hub.read("ann/dino", "LICENSE.md") == b"You may.\n"
    report = json.loads(hub.read("ann/dino", "parity_report.json"))
    assert report["source"] == f"transformers:them/dino@{commit}"
    assert report["source_revision"] == commit


# One line for what a person can mend: model, what happens before, words of the line.
ERRORS = [
    ("/not/there", None, ["/not/there is not a folder", "not a valid id of a model"]),
    ("https://huggingface.co/ann/open/tree/main", None, ["`model='ann/open'`"]),
    ("ann/typo", None, ["ann/typo is not a folder", "the Hub has no such model", "hf auth login"]),
    ("ann/model", use_token("hf_bob"), ["ann/model", "the token cannot read it"]),
    ("ann/model", use_token("hf_old"), ["the Hub refuses the token", "HF_TOKEN"]),
    ("ann/model", lambda hub, patch: hub.gated.add("ann/model"), ["restricted", "Accept its"]),
    ("ann/model@gone", None, ["ann/model has no revision gone"]),
    ("ann/notes", None, ["ann/notes does not contain a model", "config.json is missing"]),
    ("ann/model", fail("HEAD"), ["does not respond: HTTP 500"]),
    ("ann/model", fail("GET"), ["cannot download ann/model: ", "HTTP 500"]),
    ("ann/model", stop_hub, ["missing or incomplete", DEAD, "refused", "Check the network"]),
    ("ann/model", go_offline, ["HF_HUB_OFFLINE", "`hf download ann/model --revision main`"]),
    ("ann/model@v1", go_offline, ["ann/model@v1", "`hf download ann/model --revision v1`"]),
    (
        "ann/model",
        lambda hub, patch: patch.setattr(constants, "HF_HUB_CACHE", "/sys/kernel/hub"),
        ["Set HF_HOME to a folder that can be written to"],
    ),
]


@pytest.mark.parametrize(("model", "prepare", "words"), ERRORS)
def test_a_model_that_cannot_be_loaded_is_one_line_with_a_remedy(
    hub: LocalHub,
    monkeypatch: MonkeyPatch,
    model: str,
    prepare: Callable[[LocalHub, MonkeyPatch], Any] | None,
    words: list[str],
) -> None:
    if prepare is not None:
        prepare(hub, monkeypatch)
    with raises_one_line(*words, error=OSError):
        get_model_folder(model)


def test_datasets_come_from_the_hub_or_the_cache_or_are_one_line_with_a_remedy(
    hub: LocalHub, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    def read(name: str) -> int:
        return len(read_dataset(DataOptions(dataset=name)).images_by_split["train"])

    def check_error(name: str, *words: str) -> None:
        with raises_one_line(*words, error=OSError):
            read(name)

    photos = {"image": draw_noise(*[(4, 4)] * 8), "label": [0, 1] * 4}
    datasets.Dataset.from_dict(photos).to_parquet(tmp_path / "train.parquet")
    content = (tmp_path / "train.parquet").read_bytes()
    hub.create("datasets/ann/photos", files={"train.parquet": content})
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", "hf_old")
        check_error("ann/photos", "the Hub refuses the token", "HF_TOKEN")
    assert read("ann/photos") == 8
    check_error("ann/none", "ann/none is not a file or folder", "the Hub has no such dataset")
    check_error("a/b/c", "a/b/c is not a file or folder", "not a valid id of a dataset")

    stop_hub(hub, monkeypatch)
    assert read("ann/photos") == 8
    check_error("ann/none", "ann/none is not a file or folder", f"{DEAD} does not respond")
    go_offline(hub, monkeypatch)
    assert read("ann/photos") == 8
    check_error("ann/none", "HF_HUB_OFFLINE", "hf download ann/none --repo-type dataset")


@pytest.mark.parametrize("lose_hub", [stop_hub, go_offline])
def test_a_pinned_model_of_timm_loads_from_the_cache(
    hub: LocalHub, tmp_path: Path, monkeypatch: MonkeyPatch, lose_hub: Callable[..., None]
) -> None:
    model = randomize_weights(timm.create_model("test_vit", num_classes=3))
    save_for_hf(model, tmp_path / "theirs", safe_serialization=True)
    repository = hub.create("ann/vit", files=read_files(tmp_path / "theirs"))
    commit = repository.branches["main"]
    assert convert_checkpoint("timm:hf-hub:ann/vit", tmp_path / "mine")["source_revision"] == commit

    repository.commit("main", {"config.json": hub.store("config.json", b"{}")})
    lose_hub(hub, monkeypatch)
    convert_checkpoint(f"timm:hf-hub:ann/vit@{commit}", tmp_path / "again")
    for source in ("timm:hf-hub:ann/none", "timm:vit_tiny_patch16_224"):
        with raises_one_line(f"timm cannot load {source[5:]}", "access to the Hub", error=OSError):
            convert_checkpoint(source, tmp_path / "none")


@pytest.mark.parametrize(
    ("script", "flags"),
    [
        ("evaluate.py", "--model {} --dataset digits"),
        ("finetune.py", "--model {} --dataset digits --output-dir out"),
        ("finetune.py", "--model vitcls-tiny --dataset {} --output-dir out"),
        ("finetune.py", "--model vitcls-tiny --dataset digits --teacher {} --output-dir out"),
        ("convert.py", "--model transformers:{} --output out"),
        ("export.py", "--model {} --output out.onnx"),
    ],
)
def test_a_mistyped_folder_is_named_in_one_line(
    hub: LocalHub,
    tmp_path: Path,
    monkeypatch: MonkeyPatch,
    capsys: CaptureFixture,
    script: str,
    flags: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, words in {
        "lab/none": "the Hub has no such",
        "my/runs/none": "Check the path",
        "./none": "not",
    }.items():
        assert run_in_process(script, *flags.format(name).split()) == 1
        check_error(capsys, name, words)


def test_a_folder_wins_over_a_model_of_the_same_name(
    hub: LocalHub, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    (tmp_path / "ann/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert get_model_folder("ann/model") == "ann/model"
    with raises_one_line("requires a model on the Hub", "ann/model"):
        get_model_folder("ann/model@main")
    assert not hub.requests


def test_given_revisions_and_the_newest_are_used_and_found_in_the_cache(
    hub: LocalHub, monkeypatch: MonkeyPatch
) -> None:
    repository = hub.repositories["ann/model"]
    old = repository.branches["main"]
    files = repository.commits[old] | {"config.json": hub.store("config.json", b"1")}
    newest = repository.commit("main", files)

    for lose_hub in (None, stop_hub, go_offline):
        if lose_hub is not None:
            lose_hub(hub, monkeypatch)
        assert get_cached_commit(get_model_folder(f"ann/model@{old}")) == old
        assert get_cached_commit(get_model_folder("ann/model")) == newest


def test_pickled_weights_are_downloaded_only_if_there_are_no_others(hub: LocalHub) -> None:
    names = ("pytorch_model-1-of-2.bin", "pytorch_model.bin.index.json", "preprocessor_config.json")
    files = dict.fromkeys(names, b"{}") | {
        "config.json": b"{}",
        "pytorch_model.bin": b"pickled",
        "notes.txt": b"x",
    }
    hub.create("ann/old", files=files)

    folder = Path(loading.get_external_model_folder("ann/old"))
    assert read_files(folder) == {
        name: content for name, content in files.items() if name != "notes.txt"
    }

    shards = dict.fromkeys(("model-1-of-2.safetensors", "model.safetensors.index.json"), b"{}")
    hub.create("ann/new", files=files | shards)
    folder = Path(loading.get_external_model_folder("ann/new"))
    assert get_file_names(folder) == {
        "config.json",
        "preprocessor_config.json",
        *shards,
    }


def test_an_old_revision_of_pickled_weights_is_downloaded(hub: LocalHub) -> None:
    files = {"config.json": b"{}", "pytorch_model.bin": b"pickled"}
    repository = hub.create("ann/old", files=files)
    old = repository.branches["main"]
    repository.commit("main", {"config.json": hub.store("config.json", b"{}")})
    folder = Path(loading.get_external_model_folder(f"ann/old@{old}"))
    assert (folder / "pytorch_model.bin").read_bytes() == b"pickled"
    assert get_cached_commit(str(folder)) == old
    newest = Path(loading.get_external_model_folder("ann/old"))
    assert not (newest / "pytorch_model.bin").exists()


def test_a_model_of_which_the_cache_has_a_part_is_not_used_offline(
    hub: LocalHub, monkeypatch: MonkeyPatch
) -> None:
    get_model_folder("ann/model", CONFIG_FILES)
    loading.download_files("ann/notes", None, ["x.txt"])
    go_offline(hub, monkeypatch)
    assert get_cached_commit(get_model_folder("ann/model", CONFIG_FILES)) is not None
    for name in ("ann/model", "ann/notes"):
        with raises_one_line("incomplete in the cache", f"hf download {name}", error=OSError):
            get_model_folder(name)


# Checkpoints that cannot be loaded ----------------------------------------------------------------


def test_an_error_leaves_the_verbosity_of_transformers_to_the_caller(tmp_path: Path) -> None:
    build_tiny_config().save_pretrained(tmp_path)
    transformers.logging.set_verbosity_info()
    with pytest.raises(OSError, match="lacks weights"):
        ModelFolder(tmp_path).load(vitcls.ViTCLSModel)
    assert transformers.logging.get_verbosity() == transformers.logging.INFO
    transformers.logging.set_verbosity_warning()
