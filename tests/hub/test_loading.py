"""Loading models from the Hub: converted from other projects, pinned, offline, with code in another repository.

Processes without the package use a local Hub. Processes take time to start: one loads all models online, and one all
models offline.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers.fresh_processes import run_fresh
from helpers.local_hub import LocalHub, Token, point_client_at, running_hub
from helpers.scripts_in_process import run_in_process
from helpers.source_checkpoints import SIZES, save_checkpoint
from helpers.tiny_models import build_tiny_config, raises_one_line, randomize
from huggingface_hub import HfApi
from huggingface_hub.utils import _http as hub_http
from safetensors.torch import load_file, save_file

import modeling_vitcls as vitcls
from modeling_vitcls.conversion.convert import convert_checkpoint
from modeling_vitcls.conversion.random_weights import randomize_weights
from modeling_vitcls.hub import loading
from modeling_vitcls.hub.loading import get_cached_commit, get_model_folder
from modeling_vitcls.hub.model_files import CONFIG_FILES
from modeling_vitcls.publishing.model_folder import ModelFolder
from modeling_vitcls.publishing.push import push_folder


pytestmark = pytest.mark.integration


ROOT = Path(__file__).parents[2]
CHILD = Path(__file__).parents[1] / "helpers" / "load_from_hub.py"
LIMIT = 1e-5  # DESIGN.md
NAMES = {index: str(index) for index in range(10)}  # as in the digits dataset

# Models of other projects: class, and configuration fields in addition to the common sizes.
SOURCES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig, {}),
    "deit": (transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig, {}),
    "dino": (
        transformers.Dinov2WithRegistersForImageClassification,
        transformers.Dinov2WithRegistersConfig,
        {"num_register_tokens": 3},
    ),
}
CARD = "---\nlicense: other\nlicense_name: dinov3-license\nlicense_link: LICENSE.md\n---\n# A model of theirs\n"

# A change in a later release of the code: same weights, other outputs.
OTHER_CODE = "pool = TokenPooler.forward\nTokenPooler.forward = lambda self, sequence: 2 * pool(self, sequence)\n"


# Models that are also loaded without the Hub.
CACHED = ["dino", "old code", "main", "processor", "pipeline"]


@dataclass
class PublishedModels:
    """A Hub with models, and their expected outputs.

    Attributes:
        home: home folder of a user, with the cache that the first process fills.
        commits: name in this file -> commit.
        wanted: expected output of each request.
        requests: requests of the first process.
    """

    hub: LocalHub
    folder: Path
    home: Path
    commits: dict[str, str] = field(default_factory=dict)
    wanted: dict[str, torch.Tensor] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)

    def environment(self, home: Path | None = None, **settings: str) -> dict[str, str]:
        """Return the environment of a process that uses this Hub as ann; `settings` override variables."""
        return get_environment_of_ann(self.hub.url, home or self.home) | settings

    def add_request(self, name: str, wanted: torch.Tensor, loader: str, source: str, **options: Any) -> None:
        """Add a request for the first process."""
        self.wanted[name] = wanted
        self.requests.append({"name": name, "loader": loader, "source": source, "options": options})

    def load(self, requests: list[dict[str, Any]], **settings: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return outputs and report of a process without the package."""
        target = self.folder / f"answers-{len(list(self.folder.iterdir()))}"
        target.mkdir()
        file = target / "requests.json"
        file.write_text(json.dumps({"inputs": str(self.folder / "inputs.safetensors"), "requests": requests}))
        environment = self.environment(**settings)
        environment["PYTHONPATH"] = str(CHILD.parents[1])
        child = run_fresh("-P", CHILD, file, target, environment=environment, cwd=target)
        assert child.returncode == 0, child.stderr[-4000:]
        return load_file(target / "answers.safetensors"), json.loads((target / "report.json").read_text())


def get_environment_of_ann(url: str, home: Path) -> dict[str, str]:
    """Return the environment of a process that uses the Hub at this address as ann, with this home folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": "hf_ann"}
    own |= {"HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1,localhost", "PYTHONPATH": str(ROOT)}
    return kept | own


def save_inputs(folder: Path) -> dict[str, torch.Tensor]:
    """Save and return the inputs of all requests: pixel values [2, 3, 32, 32] and an image [3, 40, 50]."""
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "pixel_values": torch.randn(2, 3, 32, 32, generator=generator),
        "image": torch.randint(0, 256, (3, 40, 50), generator=generator, dtype=torch.uint8),
    }
    save_file(inputs, folder / "inputs.safetensors")
    return inputs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PublishedModels]:
    """Publish all models, and return the requests of the process that loads them."""
    folder = tmp_path_factory.mktemp("world")
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.tokens |= {"hf_ann": Token("ann"), "hf_them": Token("them")}
        world = PublishedModels(hub, folder, tmp_path_factory.mktemp("home"))
        point_client_at(hub.url, "hf_ann", patch, tmp_path_factory.mktemp("own-home"))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(world.home / "own"))
        inputs = save_inputs(folder)
        publish_theirs(world, inputs["pixel_values"])
        convert_and_push(world)
        publish_two_versions(world, inputs)
        yield world


@pytest.fixture(scope="module")
def online(world: PublishedModels) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the results of the process that loads all models."""
    return world.load(world.requests)


@pytest.fixture(scope="module")
def silent() -> Iterator[str]:
    """Yield the address of a server that accepts connections but never responds."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def publish_theirs(world: PublishedModels, pixel_values: torch.Tensor) -> None:
    """Push models of transformers, one of them with its own license."""
    for name, (model_class, config_class, fields) in SOURCES.items():
        model = randomize_weights(model_class(config_class(**SIZES, **fields, id2label=NAMES)))
        folder = world.folder / f"their-{name}"
        save_checkpoint(model, folder)
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        if name == "dino":
            (folder / "README.md").write_text(CARD)
            (folder / "LICENSE.md").write_text("You may.\n")
        api = HfApi(token="hf_them")
        api.create_repo(f"them/{name}")
        commit = api.upload_folder(repo_id=f"them/{name}", folder_path=folder)
        world.commits[f"them/{name}"] = commit.oid
        with torch.no_grad():
            world.wanted[name] = model(pixel_values).logits


def convert_and_push(world: PublishedModels) -> None:
    """Convert and push one model with the script, and the others with its functions."""
    for name in SOURCES:
        converted = world.folder / f"vitcls-{name}"
        if name == "dino":
            assert run_in_process("convert.py", "--source", f"transformers:them/{name}", "--output", converted) == 0
        else:
            convert_checkpoint(f"transformers:them/{name}", converted)
        commit = push_folder(ModelFolder(converted), f"ann/{name}").commit
        world.add_request(name, world.wanted[name], "AutoModelForImageClassification", f"ann/{name}", revision=commit)


def publish_two_versions(world: PublishedModels, inputs: dict[str, torch.Tensor]) -> None:
    """Push a model twice, the second time with other code."""
    config = build_tiny_config(num_register_tokens=1, num_labels=len(NAMES), id2label=NAMES)
    model = randomize(vitcls.ViTCLSForImageClassification(config))
    processor = vitcls.ViTCLSImageProcessor(size={"height": 32, "width": 32})
    folder = world.folder / "versions"
    with torch.no_grad():
        old = model(inputs["pixel_values"]).logits
        new = 2 * (old - model.classifier.bias) + model.classifier.bias
        pixel_values = processor(inputs["image"], return_tensors="pt")["pixel_values"]
        scores = model(pixel_values).logits.softmax(-1)[0]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    commits = {"first": push_folder(ModelFolder(folder), "ann/versions").commit}
    with (folder / "heads_vitcls.py").open("a") as file:
        file.write(OTHER_CODE)
    commits["second"] = push_folder(ModelFolder(folder), "ann/versions").commit
    world.commits |= commits

    classifier = "AutoModelForImageClassification"
    world.add_request("old code", old, classifier, "ann/versions", revision=commits["first"])
    world.add_request("new code", new, classifier, "ann/versions", revision=commits["second"])
    world.add_request("main", new, classifier, "ann/versions")
    world.add_request("processor", pixel_values, "AutoImageProcessor", "ann/versions")
    world.add_request("pipeline", scores, "pipeline", "ann/versions", revision=commits["first"])


# Online --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_models_of_other_projects_are_converted_pushed_and_loaded_by_commit(
    world: PublishedModels, online: Any, name: str
) -> None:
    answers, report = online
    assert report[name]["module"].startswith("transformers_modules.ann.")
    assert world.wanted[name].abs().max() > 0.1
    assert (answers[name] - world.wanted[name]).abs().max() <= LIMIT


def test_card_and_license_are_converted_with_the_model(world: PublishedModels) -> None:
    card = world.hub.read("ann/dino", "README.md").decode()
    for line in ("base_model: them/dino", "license: other", "license_name: dinov3-license"):
        assert f"\n{line}\n" in card
    assert f"at commit `{world.commits['them/dino']}`" in card
    assert 'from_pretrained("ann/dino", revision=revision, trust_remote_code=True)' in card
    assert world.hub.read("ann/dino", "LICENSE.md") == b"You may.\n"
    assert "No license was found" in world.hub.read("ann/vit", "README.md").decode()
    certificate = json.loads(world.hub.read("ann/dino", "parity_report.json"))
    assert certificate["source_revision"] == world.commits["them/dino"]


VERSIONS = ["old code", "new code", "main", "processor", "pipeline"]


@pytest.mark.parametrize("name", VERSIONS)
def test_each_commit_predicts_with_its_own_code(world: PublishedModels, online: Any, name: str) -> None:
    answers, report = online
    assert "error" not in report[name], report[name]
    assert report[name]["module"].startswith("transformers_modules.ann.")
    torch.testing.assert_close(answers[name], world.wanted[name], rtol=1e-5, atol=1e-5)
    assert (world.wanted["old code"] - world.wanted["new code"]).abs().max() > 0.1


# Offline, or without a Hub -------------------------------------------------------------------------------------------


def test_cached_models_load_offline(world: PublishedModels, online: Any) -> None:
    asked = len(world.hub.requests)
    unknown = {"name": "unknown", "loader": "AutoModel", "source": "ann/unknown", "options": {}}
    known = [request for request in world.requests if request["name"] in CACHED]
    answers, report = world.load([*known, unknown], HF_HUB_OFFLINE="1")
    errors = {name: found["error"] for name, found in report.items() if "error" in found}
    assert list(errors) == ["unknown"], errors
    assert report["unknown"]["seconds"] < 10
    assert answers.keys() == set(CACHED)
    for name, answer in answers.items():
        assert torch.equal(answer, online[0][name]), name
    assert len(world.hub.requests) == asked


def assert_ends_with_one_line(status: int | None, errors: str, *words: str) -> None:
    """Check status 1, no traceback, and a last line that contains these words."""
    assert status == 1, errors[-2000:]
    assert "Traceback" not in errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    for word in words:
        assert word in last


# In this process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    """Start a Hub with one model for this process, as ann, with an empty cache."""
    hub.tokens |= {"hf_bob": Token("bob")}
    hub.create("ann/model", private=True, files={"config.json": b"{}", "model.safetensors": b"weights"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loading, "RETRY_WAIT", 0.01)
    return hub


def test_folders_are_local_and_impossible_ids_are_not_resolved(hub: LocalHub, tmp_path: Path) -> None:
    assert get_model_folder(str(tmp_path)) == str(tmp_path)
    for source in ("/not/there", "./not-there", "a/b/c"):
        with raises_one_line(f"{source} is not a folder and not a valid id of a model", error=OSError):
            get_model_folder(source)
    with raises_one_line("requires a model on the Hub", str(tmp_path)):
        get_model_folder(str(tmp_path), revision="main")
    assert not hub.requests


def test_given_revisions_are_used(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = hub.repositories["ann/model"]
    old = repository.branches["main"]
    repository.commit("main", "newer", repository.commits[old].files | {"config.json": hub.store("config.json", b"1")})
    newest = get_cached_commit(get_model_folder("ann/model"))
    assert old != newest == repository.branches["main"]
    assert get_cached_commit(get_model_folder("ann/model", revision=old)) == old
    with raises_one_line("ann/model has no revision gone", error=OSError):
        get_model_folder("ann/model", revision="gone")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert get_cached_commit(get_model_folder("ann/model", revision=old)) == old
    with raises_one_line("127.0.0.1:9 does not respond", error=OSError):
        get_model_folder("ann/model", revision="gone")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert get_cached_commit(get_model_folder("ann/model", revision=old)) == old
    with raises_one_line("HF_HUB_OFFLINE", error=OSError):
        get_model_folder("ann/model", revision="gone")


def test_files_are_downloaded_once_and_the_newest_is_used(hub: LocalHub) -> None:
    folder = get_model_folder("ann/model")
    assert sorted(file.name for file in Path(folder).iterdir()) == ["config.json", "model.safetensors"]
    assert get_cached_commit(folder) == hub.repositories["ann/model"].branches["main"]
    hub.requests.clear()
    assert get_model_folder("ann/model") == folder
    assert not hub.count_requests("GET", "/resolve/") and not hub.count_requests("GET", "/objects/")
    repository = hub.repositories["ann/model"]
    newest = repository.commit("main", "more", repository.commits[repository.branches["main"]].files)
    assert get_cached_commit(get_model_folder("ann/model")) == newest
    assert get_cached_commit("runs/mine") is None and get_cached_commit(f"runs/{'a' * 40}") is None
    assert get_cached_commit("snapshots/mine") is None


def test_temporary_failures_are_retried(hub: LocalHub) -> None:
    hub.fail("GET", "/api/models/ann/model", 503)
    hub.fail("GET", "/objects/", "cut")
    assert Path(get_model_folder("ann/model"), "model.safetensors").read_bytes() == b"weights"


def test_the_cache_is_used_if_the_port_is_closed(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = get_model_folder("ann/model")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert get_model_folder("ann/model") == folder
    assert "127.0.0.1:9 does not respond" in caplog.text and ". Loading ann/model from the cache" in caplog.text
    with raises_one_line("127.0.0.1:9 does not respond", "refused", "Check the network", error=OSError):
        get_model_folder("ann/other")


def test_a_silent_hub_times_out(hub: LocalHub, silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", silent)
    monkeypatch.setattr(loading, "TIMEOUT", 0.5)
    started = time.monotonic()
    with raises_one_line(f"{silent} does not respond", "timed out", error=OSError):
        get_model_folder("ann/model")
    assert 1.0 <= time.monotonic() - started < 10


def test_forbidden_files_are_not_read_from_the_cache(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises_one_line("the Hub has no such model", "hf auth login", error=OSError):
        get_model_folder("ann/typo")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with raises_one_line("ann/model is not a folder", "the token cannot read it", error=OSError):
        get_model_folder("ann/model")
    hub.create("ann/empty", private=False)
    with raises_one_line("ann/empty does not contain a model", "config.json is missing", error=OSError):
        get_model_folder("ann/empty")


def test_gated_files_are_an_error(hub: LocalHub) -> None:
    """The Hub returns information about a gated repository, but not its files."""
    hub.gated.add("ann/model")
    with raises_one_line("Access to model ann/model is restricted", error=OSError):
        get_model_folder("ann/model")


@pytest.mark.parametrize(("method", "words"), [("HEAD", "cannot find the requested files"), ("GET", "")])
def test_failed_downloads_are_named(hub: LocalHub, method: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub retries each request, here without waiting."""
    monkeypatch.setattr(hub_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    hub.fail(method, "/resolve/", 500, times=99)
    with raises_one_line("cannot download ann/model: ", words, "HTTP 500", error=OSError):
        get_model_folder("ann/model")


def test_pickled_weights_are_downloaded_only_if_there_are_no_others(hub: LocalHub, tmp_path: Path) -> None:
    files = {"config.json": b"{}", "pytorch_model.bin": b"pickled", "notes.txt": b"x"}
    hub.create("ann/old", private=False, files=files)
    folder = Path(loading.get_external_model_folder("ann/old"))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {
        name: content for name, content in files.items() if name != "notes.txt"
    }
    hub.create("ann/new", private=False, files=files | {"model.safetensors": b"weights"})
    folder = Path(loading.get_external_model_folder("ann/new"))
    assert {file.name for file in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert loading.get_external_model_folder(str(tmp_path)) == str(tmp_path)
    old = hub.repositories["ann/old"].branches["main"]
    hub.repositories["ann/old"].commit("main", "newer", {"config.json": hub.store("config.json", b"{}")})
    assert Path(loading.get_external_model_folder("ann/old", old), "pytorch_model.bin").read_bytes() == b"pickled"
    assert not Path(loading.get_external_model_folder("ann/old"), "pytorch_model.bin").exists()


def test_incomplete_cached_models_are_not_used(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    get_model_folder("ann/model", CONFIG_FILES)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert get_cached_commit(get_model_folder("ann/model", CONFIG_FILES)) is not None
    hub.create("ann/notes", private=False, files={"x.txt": b"x"})
    with monkeypatch.context() as online:
        online.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        HfApi().snapshot_download("ann/notes")
    with raises_one_line("complete in the cache", "HF_HUB_OFFLINE", error=OSError):
        get_model_folder("ann/notes", CONFIG_FILES)
    with raises_one_line("HF_HUB_OFFLINE", error=OSError):
        get_model_folder("ann/model")
