"""Loading models from the Hub: converted from other projects, pinned, and offline.

Processes without the package, which take time to start, use a local Hub.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import transformers
from helpers.command_in_process import run_here
from helpers.local_hub import LocalHub, Token
from helpers.scripts_in_process import run_in_process
from helpers.source_checkpoints import SIZES
from helpers.tiny_models import build_tiny_config, raises_one_line, save_both, save_classifier
from huggingface_hub import HfApi
from huggingface_hub.utils import _http as hub_http
from PIL import Image
from safetensors.torch import save_file

import modeling_vitcls as vitcls
from modeling_vitcls.hub import loading
from modeling_vitcls.hub.loading import (
    get_cached_commit,
    get_model_folder,
)
from modeling_vitcls.hub.model_files import CONFIG_FILES
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing.push import push_folder
from scripts.tools.random_weights import randomize_weights


NAMES = {index: str(index) for index in range(10)}
CARD = """---
license: other
license_name: dinov3-license
license_link: LICENSE.md
---
# A model of theirs
"""


@pytest.fixture
def hub(hub: LocalHub) -> LocalHub:
    """Start a Hub with one model, as ann."""
    hub.tokens |= {"hf_bob": Token("bob")}
    hub.create(
        "ann/model", private=True, files={"config.json": b"{}", "model.safetensors": b"weights"}
    )
    return hub


def test_card_and_license_are_converted_with_the_model(hub: LocalHub, tmp_path: Path) -> None:
    config = transformers.Dinov2WithRegistersConfig(**SIZES, num_register_tokens=3, id2label=NAMES)
    model = randomize_weights(transformers.Dinov2WithRegistersForImageClassification(config))
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    save_both(model, tmp_path / "theirs", processor)
    (tmp_path / "theirs" / "README.md").write_text(CARD)
    (tmp_path / "theirs" / "LICENSE.md").write_text("You may.\n")
    files = {file.name: file.read_bytes() for file in (tmp_path / "theirs").iterdir()}
    repository = hub.create("them/dino", private=False, files=files)
    folder = tmp_path / "mine"
    commit = repository.branches["main"]

    repository.commit(
        "main", "broken", hub.files("them/dino") | {"config.json": hub.store("config.json", b"{}")}
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


def test_folders_are_local_and_impossible_ids_are_not_resolved(
    hub: LocalHub, tmp_path: Path
) -> None:
    assert get_model_folder(str(tmp_path)) == str(tmp_path)
    for source in ("/not/there", "./not-there", "a/b/c"):
        with raises_one_line(
            f"{source} is not a folder", "and not a valid id of a model", error=OSError
        ):
            get_model_folder(source)
    with raises_one_line("requires a model on the Hub", str(tmp_path)):
        get_model_folder(f"{tmp_path}@main")
    assert not hub.requests


def test_given_revisions_are_used(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    repository = hub.repositories["ann/model"]
    old = repository.branches["main"]
    repository.commit(
        "main",
        "newer",
        repository.commits[old].files | {"config.json": hub.store("config.json", b"1")},
    )

    newest = get_cached_commit(get_model_folder("ann/model"))
    assert old != newest == repository.branches["main"]
    assert get_cached_commit(get_model_folder(f"ann/model@{old}")) == old
    with raises_one_line("ann/model has no revision gone", error=OSError):
        get_model_folder("ann/model@gone")

    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert get_cached_commit(get_model_folder(f"ann/model@{old}")) == old
    assert "127.0.0.1:9 does not respond" in caplog.text
    assert ". Loading ann/model from the cache" in caplog.text
    with raises_one_line(
        "127.0.0.1:9 does not respond", "refused", "Check the network", error=OSError
    ):
        get_model_folder("ann/model@gone")
    assert get_cached_commit(get_model_folder("ann/model")) == newest

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert get_cached_commit(get_model_folder(f"ann/model@{old}")) == old
    with raises_one_line(
        "ann/model@gone is", "hf download ann/model --revision gone", error=OSError
    ):
        get_model_folder("ann/model@gone")


def test_files_are_downloaded_once_and_the_newest_is_used(hub: LocalHub) -> None:
    folder = get_model_folder("ann/model")
    assert get_cached_commit(folder) == hub.repositories["ann/model"].branches["main"]

    assert sorted(file.name for file in Path(folder).iterdir()) == [
        "config.json",
        "model.safetensors",
    ]

    hub.requests.clear()
    assert get_model_folder("ann/model") == folder
    assert not hub.count_requests("GET", "/resolve/")
    assert not hub.count_requests("GET", "/objects/")

    repository = hub.repositories["ann/model"]
    newest = repository.commit(
        "main", "more", repository.commits[repository.branches["main"]].files
    )
    assert get_cached_commit(get_model_folder("ann/model")) == newest


def test_temporary_failures_are_retried(hub: LocalHub) -> None:
    hub.fail("GET", "/api/models/ann/model", 503)
    hub.fail("GET", "/objects/", "cut")
    assert Path(get_model_folder("ann/model"), "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("status", "is_temporary"), [(429, True), (500, True), (503, True), (401, False), (404, False)]
)
def test_only_errors_that_may_pass_are_retried(
    hub: LocalHub, tmp_path: Path, status: int, is_temporary: bool
) -> None:
    """Each error occurs once: the second request would succeed."""
    files = save_classifier(tmp_path / "model").iterdir()
    hub.create("ann/vit", private=False, files={file.name: file.read_bytes() for file in files})
    hub.fail("GET", "/api/models/ann/vit", status)
    Image.new("RGB", (32, 32)).save(tmp_path / "photo.png")
    exit_status = run_here("predict", "--model", "ann/vit", tmp_path / "photo.png")
    assert exit_status == (0 if is_temporary else 1)


def test_a_silent_hub_times_out(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "TIMEOUT", 0.5)
    hub.fail("GET", "", "hang", times=99)
    started = time.monotonic()
    with raises_one_line(f"{hub.url} does not respond", "timed out", error=OSError):
        get_model_folder("ann/model")
    assert 0.5 <= time.monotonic() - started < 10


def test_forbidden_files_are_not_read_from_the_cache(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises_one_line("the Hub has no such model", "hf auth login", error=OSError):
        get_model_folder("ann/typo")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with raises_one_line("ann/model is not a folder", "the token cannot read it", error=OSError):
        get_model_folder("ann/model")
    assert not hub.count_requests("GET", "/resolve/")
    hub.create("ann/empty", private=False)
    with raises_one_line(
        "ann/empty does not contain a model", "config.json is missing", error=OSError
    ):
        get_model_folder("ann/empty")


def test_an_invalid_token_is_named_also_for_a_public_model(hub: LocalHub) -> None:
    hub.create("ann/open", private=False)
    hub.fail("GET", "/api/models/ann/open", 401)
    with raises_one_line("the Hub refuses the token", "HF_TOKEN", error=OSError):
        get_model_folder("ann/open")


def test_the_address_of_a_page_has_the_id_as_remedy() -> None:
    with raises_one_line("`model='ann/open'`", error=OSError):
        get_model_folder("https://huggingface.co/ann/open/tree/main")


def test_gated_files_are_an_error(hub: LocalHub) -> None:
    """The Hub returns information about a gated repository, but not its files."""
    hub.gated.add("ann/model")
    with raises_one_line("Access to model ann/model is restricted", error=OSError):
        get_model_folder("ann/model")


@pytest.mark.parametrize(
    ("method", "words"), [("HEAD", "cannot find the requested files"), ("GET", "")]
)
def test_failed_downloads_are_named(
    hub: LocalHub, method: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub retries each request, here without waiting."""
    monkeypatch.setattr(hub_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    hub.fail(method, "/resolve/", 500, times=99)
    with raises_one_line("cannot download ann/model: ", words, "HTTP 500", error=OSError):
        get_model_folder("ann/model")


def test_pickled_weights_are_downloaded_only_if_there_are_no_others(
    hub: LocalHub, tmp_path: Path
) -> None:
    names = ("pytorch_model-1-of-2.bin", "pytorch_model.bin.index.json", "preprocessor_config.json")
    files = dict.fromkeys(names, b"{}") | {
        "config.json": b"{}",
        "pytorch_model.bin": b"pickled",
        "notes.txt": b"x",
    }
    hub.create("ann/old", private=False, files=files)

    folder = Path(loading.get_external_model_folder("ann/old"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: content for name, content in files.items() if name != "notes.txt"
    }

    shards = dict.fromkeys(("model-1-of-2.safetensors", "model.safetensors.index.json"), b"{}")
    hub.create("ann/new", private=False, files=files | shards)
    folder = Path(loading.get_external_model_folder("ann/new"))
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        *shards,
    }


def test_an_old_revision_of_pickled_weights_is_downloaded(hub: LocalHub) -> None:
    files = {"config.json": b"{}", "pytorch_model.bin": b"pickled"}
    repository = hub.create("ann/old", private=False, files=files)
    old = repository.branches["main"]
    repository.commit("main", "newer", {"config.json": hub.store("config.json", b"{}")})
    folder = Path(loading.get_external_model_folder(f"ann/old@{old}"))
    assert (folder / "pytorch_model.bin").read_bytes() == b"pickled"
    assert get_cached_commit(str(folder)) == old
    newest = Path(loading.get_external_model_folder("ann/old"))
    assert not (newest / "pytorch_model.bin").exists()


def test_a_file_replaces_the_weights_of_timm(tmp_path: Path) -> None:
    """The published weights of this model are in Flax's format, which the file is not."""
    weights = randomize_weights(timm.create_model("vit_tiny_patch16_224")).state_dict()
    save_file(weights, tmp_path / "mine@2.safetensors")
    name = f"vit_tiny_patch16_224@{tmp_path / 'mine@2.safetensors'}"
    model, commit = loading.load_timm_model(name)
    assert commit is None
    assert model.state_dict().keys() == weights.keys()
    for parameter, values in model.state_dict().items():
        assert torch.equal(values, weights[parameter])


def test_incomplete_cached_models_are_not_used(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_model_folder("ann/model", CONFIG_FILES)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert get_cached_commit(get_model_folder("ann/model", CONFIG_FILES)) is not None
    hub.create("ann/notes", private=False, files={"x.txt": b"x"})
    with monkeypatch.context() as online:
        online.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        HfApi().snapshot_download("ann/notes")
    with raises_one_line("complete in the cache", "HF_HUB_OFFLINE", error=OSError):
        get_model_folder("ann/notes", CONFIG_FILES)
    with raises_one_line(
        "HF_HUB_OFFLINE", "`hf download ann/model --revision main`", error=OSError
    ):
        get_model_folder("ann/model")


# Checkpoints that cannot be loaded ----------------------------------------------------------------


def cut(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), ["model.safetensors"]),
    "no_config": (lambda folder: (folder / "config.json").unlink(), ["config.json"]),
    "truncated_weights": (lambda folder: cut(folder / "model.safetensors", -100), ["weights"]),
    "corrupt_config": (lambda folder: cut(folder / "config.json", 40), ["config"]),
    "nothing": (lambda folder: shutil.rmtree(folder), []),
}
CHECKPOINT_ERRORS = (ValueError, OSError, RuntimeError)


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named(
    damage: Callable[[Path], Any], words: list[str], tmp_path: Path
) -> None:
    vitcls.ViTCLSForImageClassification(build_tiny_config()).save_pretrained(tmp_path)
    damage(tmp_path)
    with raises_one_line(str(tmp_path), *words, error=CHECKPOINT_ERRORS):
        ModelFolder(tmp_path).load(vitcls.ViTCLSForImageClassification)


def test_an_error_leaves_the_verbosity_of_transformers_to_the_caller(tmp_path: Path) -> None:
    build_tiny_config().save_pretrained(tmp_path)
    transformers.logging.set_verbosity_info()
    with pytest.raises(CHECKPOINT_ERRORS):
        ModelFolder(tmp_path).load(vitcls.ViTCLSModel)
    assert transformers.logging.get_verbosity() == transformers.logging.INFO
    transformers.logging.set_verbosity_warning()


def test_weights_of_a_wrong_shape_are_named(tmp_path: Path) -> None:
    vitcls.ViTCLSForImageClassification(build_tiny_config()).save_pretrained(tmp_path)
    build_tiny_config(intermediate_size=20).save_pretrained(tmp_path)
    with raises_one_line("layers.0.mlp.fc1.bias", "[24]", "[20]", error=CHECKPOINT_ERRORS):
        ModelFolder(tmp_path).load(vitcls.ViTCLSForImageClassification)
