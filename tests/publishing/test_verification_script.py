"""The script that loads a published model in a new process: its outputs, its report and the pinned commits."""

import json
from pathlib import Path

import pytest
import torch
from helpers.local_hub import LocalHub
from helpers.tiny_models import build_tiny_config, randomize, save_classifier
from huggingface_hub import HfApi, constants
from safetensors.torch import load_file

import modeling_vitcls as vitcls
from modeling_vitcls.publishing.publish import push_folder
from modeling_vitcls.publishing.verification_reference import PackageLoader
from modeling_vitcls.publishing.verification_script import (
    HubLoader,
    PackageBlocker,
    collect_outputs,
    get_auto_class,
    main,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a classifier with its image processor."""
    return save_classifier(tmp_path / "my-run")


@pytest.mark.parametrize("num_channels", [1, 3])
def test_the_compared_outputs_are_those_of_the_model(tmp_path: Path, num_channels: int) -> None:
    """Check the tensors, the image and the order of the scores. In config.json, label 10 comes before label 2.

    transformers' pipeline converts images to RGB, so it does not support models for gray images.
    """
    config = build_tiny_config(num_channels=num_channels, num_labels=11)
    model = randomize(vitcls.ViTCLSForImageClassification(config))
    model.save_pretrained(tmp_path)
    settings = {} if num_channels == 3 else {"do_convert_rgb": False, "image_mean": [0.5], "image_std": [0.5]}
    vitcls.ViTCLSImageProcessor(size=32, **settings).save_pretrained(tmp_path)
    found, report = collect_outputs(PackageLoader(tmp_path))
    pixel_values = torch.randn(2, num_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    image = torch.randint(
        0, 256, (41, 49, num_channels), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    ).movedim(-1, 0)
    processors = {
        "torchvision": vitcls.ViTCLSImageProcessor(size=32, **settings),
        "pil": vitcls.ViTCLSImageProcessorPil(size=32, **settings),
    }
    preprocessed = {name: each(image, return_tensors="pt")["pixel_values"] for name, each in processors.items()}
    with torch.no_grad():
        expected = {
            "AutoModelForImageClassification/logits": model(pixel_values).logits,
            "AutoModel/last_hidden_state": model.vitcls(pixel_values).last_hidden_state,
            **{f"AutoImageProcessor, {name}/pixel_values": values for name, values in preprocessed.items()},
        }
        if num_channels == 3:
            expected["pipeline/scores"] = model(preprocessed["torchvision"]).logits.softmax(dim=1)[0]
    assert expected.keys() <= found.keys() and ("pipeline/scores" in found) is (num_channels == 3)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert report["processors"] == {name: type(each).__name__ for name, each in processors.items()}
    assert [model["missing"] for model in report["models"].values()] == [[], []]


def test_missing_weights_and_a_missing_image_processor_are_reported(folder: Path) -> None:
    """The missing weights are random, but the same in all processes."""
    model = vitcls.ViTCLSForImageClassification.from_pretrained(folder)
    weights = {name: value for name, value in model.state_dict().items() if "classifier" not in name}
    model.save_pretrained(folder, state_dict=weights)
    (folder / "preprocessor_config.json").unlink()
    found, report = collect_outputs(PackageLoader(folder))
    assert report["models"]["AutoModelForImageClassification"]["missing"] == ["classifier.bias", "classifier.weight"]
    assert report["models"]["AutoModel"]["missing"] == [] and report["processors"] == {}
    assert {name.partition("/")[0] for name in found} == {"AutoModel", "AutoModelForImageClassification"}
    again, _ = collect_outputs(PackageLoader(folder))
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def test_an_error_of_the_process_is_reported(hub: LocalHub, tmp_path: Path) -> None:
    """A failed download may be repeated, but a repetition would not help for an unknown type of model."""
    (tmp_path / "config.json").write_text('{"model_type": "none"}')
    for repo_id, can_retry in (("ann/none", True), (str(tmp_path), False)):
        request = {"repo_id": repo_id, "revision": "main", "code_repo_id": None, "code_revision": None}
        request |= {"trust_remote_code": False, "target": str(tmp_path), "num_threads": torch.get_num_threads()}
        (tmp_path / "request.json").write_text(json.dumps(request))
        main(tmp_path / "request.json")
        report = json.loads((tmp_path / "report.json").read_text())
        assert report.keys() == {"error", "can_retry", "has_package"} and "\n" not in report["error"]
        assert report["can_retry"] is can_retry and report["has_package"]  # this process has imported the package


def test_the_script_reports_classes_commits_and_outputs(
    hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In this process, transformers uses the installed code."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "own-cache"))
    (tmp_path / "own-cache" / "models--ann--model" / "snapshots" / "empty").mkdir(parents=True)
    commit = push_folder(folder, "ann/model").commit
    code_commit = hub.create("ann/code", private=False, files={"x.py": b""}).branches["main"]
    HfApi().snapshot_download("ann/code", cache_dir=constants.HF_HUB_CACHE)
    request = {"repo_id": "ann/model", "revision": commit, "trust_remote_code": False, "target": str(tmp_path)}
    request |= {"code_repo_id": "ann/code", "code_revision": code_commit, "num_threads": torch.get_num_threads()}
    (tmp_path / "request.json").write_text(json.dumps(request))
    main(tmp_path / "request.json")
    outputs, report = collect_outputs(PackageLoader(folder))
    commits = {"commits": [commit], "code_commits": [code_commit], "has_package": True}
    assert json.loads((tmp_path / "report.json").read_text()) == report | commits
    loaded = load_file(tmp_path / "outputs.safetensors")
    assert loaded.keys() == outputs.keys() and all(torch.equal(loaded[name], outputs[name]) for name in outputs)


def test_the_package_is_hidden_from_published_code() -> None:
    blocker = PackageBlocker()
    for name in ("modeling_vitcls", "modeling_vitcls.hub"):
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"):
            blocker.find_spec(name)
    assert blocker.find_spec("modeling_vitcls_other") is None and blocker.find_spec("torch") is None


def test_models_of_transformers_are_loaded_with_their_classifier() -> None:
    assert get_auto_class("ViTForImageClassification") == "AutoModelForImageClassification"
    assert get_auto_class("ViTModel") == get_auto_class("ViTCLSModel") == "AutoModel"


def test_the_image_processor_is_that_of_the_commit(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    repository = hub.create("ann/model", private=False, files={"config.json": b"{}"})
    first = repository.branches["main"]
    repository.commit("main", "processor", {"preprocessor_config.json": hub.store("preprocessor_config.json", b"{}")})
    assert not HubLoader("ann/model", first).has_processor()
    assert HubLoader("ann/model", repository.branches["main"]).has_processor()


def test_the_commits_of_weights_and_code_are_pinned() -> None:
    pinned = {"revision": "a" * 40, "trust_remote_code": True}
    assert HubLoader("ann/model", "a" * 40).get_loading_options() == pinned
    assert HubLoader("ann/model", "a" * 40, "c" * 40).get_loading_options() == pinned | {"code_revision": "c" * 40}
    assert not HubLoader("ann/model", trust_remote_code=False).get_loading_options()["trust_remote_code"]
