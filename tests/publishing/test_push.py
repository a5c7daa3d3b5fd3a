"""Pushing model folders to a local Hub, with the real huggingface_hub client."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers.command_in_process import check_error, run_here
from helpers.local_hub import LocalHub, Token
from helpers.model_folders import write_results, write_run_folder
from helpers.photo_folders import write_files
from helpers.tiny_models import build_tiny_config, edit_config, raises_one_line, save_classifier
from huggingface_hub import HfApi, ModelCard, get_session
from huggingface_hub.utils import _http as hub_http
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from pytest import CaptureFixture, LogCaptureFixture, MonkeyPatch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, Trainer, TrainingArguments

import modeling_vitcls as vitcls
from modeling_vitcls.hub.model_files import hash_settings, hash_weights
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing import push as push_module
from modeling_vitcls.publishing.card import write_card
from modeling_vitcls.publishing.push import (
    PushedCommit,
    PushError,
    build_push_command,
    open_branch,
    prepare_repository,
    push_folder,
)
from modeling_vitcls.runtime.files import read_json, write_json


CODE = {file.name for file in (Path(vitcls.__file__).parent / "model").glob("*_vitcls.py")}
WEIGHTS = "model.safetensors"
MODEL_FILES = CODE | {WEIGHTS, "config.json", "preprocessor_config.json"}

TOKENS = {
    "hf_ann": Token("ann", organizations=("lab", "school"), writable=("ann", "lab")),
    "hf_read": Token("ann", writable=()),
    "hf_one_model": Token("ann", writable=("ann/there",)),
}


@pytest.fixture
def hub(hub: LocalHub) -> LocalHub:
    """Start an empty Hub for this process, as ann."""
    hub.tokens |= TOKENS
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the output folder of a run, with files that must not be pushed."""
    target = write_run_folder(tmp_path / "my-run")
    write_files(target, "images/attention.png", "report.html", "LICENSE", content=b"public")
    checkpoint_file = "checkpoints/step-1/model.safetensors"
    private = (".vitcls.lock", "predictions.parquet", "model.pkl", "notes.txt", checkpoint_file)
    write_files(target, *private, content=b"private")
    return target


def push(folder: Path, **settings: Any) -> PushedCommit:
    """Push a folder to ann/model."""
    return push_folder(ModelFolder(folder), "ann/model", **settings)


def run_push_command(folder: Path) -> int:
    """Push with the command, and return its exit status."""
    return run_here("push", "--model", folder, "--hub-model-id", "ann/model", "--no-verify")


def read_card(hub: LocalHub) -> str:
    """Return the published card."""
    return hub.read("ann/model", "README.md").decode()


def replace_weights(folder: Path) -> None:
    """Save other weights to the folder."""
    save_classifier(folder, num_register_tokens=2)


# Files --------------------------------------------------------------------------------------------


def test_a_push_is_one_commit_of_the_model_files(hub: LocalHub, folder: Path) -> None:
    planted = (
        "LICENSE-secret.txt NOTICE.env evil_vitcls.py other.onnx model.bin "
        "images/private.png model-00001-of-00002.safetensors"
    )
    write_files(folder, *planted.split(), content=b"private")
    (folder / "LICENSE.link").symlink_to("/etc/hostname")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    pushed = push(folder)
    repository = hub.repositories["ann/model"]
    assert len(repository.commits) == 2
    assert repository.branches == {"main": pushed.sha}
    assert not repository.private
    accompanying = "README.md results.json config.resolved.yaml images/attention.png report.html"
    licenses = {".gitattributes", "CODE_LICENSE", "LICENSE"}
    assert set(hub.files("ann/model")) == licenses | MODEL_FILES | set(accompanying.split())
    assert hub.files("ann/model")[WEIGHTS].is_lfs
    assert b"Apache License" in hub.read("ann/model", "CODE_LICENSE")
    recipe = yaml.safe_load(hub.read("ann/model", "config.resolved.yaml"))
    assert list(recipe) == ["output_dir", "model", "dataset", "epochs"]  # in this order
    assert recipe["output_dir"] == "my-model"
    for name in MODEL_FILES | {"LICENSE", "results.json"}:
        assert hub.read("ann/model", name) == before[folder / name]
    assert {file: file.read_bytes() for file in before} == before
    assert push(folder).sha == pushed.sha  # nothing changed


def test_a_path_of_this_machine_in_the_configuration_is_not_pushed(
    hub: LocalHub, folder: Path
) -> None:
    config = read_json(folder / "config.json")
    edit_config(folder, _name_or_path=str(folder.parent / "private"))
    assert run_push_command(folder) == 0
    published = json.loads(hub.read("ann/model", "config.json"))
    assert published | config == published
    assert published.keys() - config == {"code_version"}


@pytest.mark.parametrize("name", ["LICENSE", "images", "config.json"])
def test_the_target_of_a_link_is_not_pushed(
    hub: LocalHub, folder: Path, name: str, capsys: CaptureFixture
) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    assert run_push_command(folder) == 1
    check_error(capsys, name, "is a link")
    assert not hub.repositories


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_pushed(
    hub: LocalHub, folder: Path, value: float
) -> None:
    weights = load_file(folder / WEIGHTS)
    weights["classifier.weight"][0, 0] = value
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    with raises_one_line("classifier.weight", "not finite"):
        push(folder)
    assert not hub.repositories


def test_weights_that_are_replaced_while_a_push_is_prepared_are_not_pushed(
    hub: LocalHub, folder: Path, monkeypatch: MonkeyPatch
) -> None:
    """The card and the results describe what was there before."""

    def open_late(*arguments: Any) -> Any:
        replace_weights(folder)
        return open_branch(*arguments)

    monkeypatch.setattr(push_module, "open_branch", open_late)
    with raises_one_line("was replaced", "finish with: vitcls push", error=PushError):
        push(folder)
    assert WEIGHTS not in hub.files("ann/model")


def test_a_push_under_a_license_that_the_weights_have_not_creates_no_repository(
    hub: LocalHub, folder: Path, capsys: CaptureFixture
) -> None:
    write_results(folder, {"provenance": {"name": "ann/base", "license": "cc-by-nc-4.0"}})
    assert run_here("push", "--model", folder, "--hub-model-id", "ann/new", "--license", "mit") == 1
    check_error(capsys, "cc-by-nc-4.0")
    assert not hub.repositories


@pytest.mark.parametrize(
    ("dataset", "card_samples", "is_published"),
    [
        ("acme/photos", False, True),
        ("./photos", False, False),
        ("/home/ann/photos", False, False),
        ("memory:0123456789abcdef", False, False),
        ("./photos", True, True),
    ],
)
def test_images_of_local_datasets_are_published_only_on_request(
    hub: LocalHub, folder: Path, dataset: str, card_samples: bool, is_published: bool
) -> None:
    flags = {"model": "vitcls-tiny", "dataset": dataset}
    (folder / "config.resolved.yaml").write_text(yaml.safe_dump(flags))
    push(folder, card_samples=card_samples)
    card = read_card(hub)
    for name in ("report.html", "images/attention.png"):
        assert (name in hub.files("ann/model")) is is_published
        assert (name in card) is is_published
    assert "/home/ann" not in card
    assert "/home/ann" not in hub.read("ann/model", "config.resolved.yaml").decode()


def test_results_of_other_weights_are_not_published(
    hub: LocalHub, folder: Path, caplog: LogCaptureFixture
) -> None:
    push(folder)
    assert "354 of 360 right" in read_card(hub)

    replace_weights(folder)
    push(folder)
    names = set(hub.files("ann/model"))
    assert names >= MODEL_FILES
    assert not names & {
        "results.json",
        "config.resolved.yaml",
        "report.html",
        "images/attention.png",
        "parity_report.json",
    }
    assert "354 of 360 right" not in read_card(hub)

    assert "results.json" in caplog.text


def write_export(folder: Path, **values: Any) -> None:
    """Write an ONNX file with its weights and its report, as `vitcls export` does."""
    report = {
        "format": "onnx",
        "dtype": "float16",
        "weights_sha256": hash_weights(folder),
        "settings_sha256": hash_settings(folder),
        "num_bytes": 3 * 2**19,
        "largest_differences": {"logits": 2e-6},
        "sha256": {"model.onnx": "", "model.onnx.data": "", "notes.txt": ""},
    }
    for name in ("model.onnx", "model.onnx.data"):
        (folder / name).write_bytes(b"graph")
    write_json(folder / "model.onnx.json", report | values)


def rename_class(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text().replace("dusk", "dawn"))


@pytest.mark.parametrize("edit", [replace_weights, rename_class])
def test_exported_files_are_pushed_only_with_the_model_they_were_created_from(
    hub: LocalHub, folder: Path, edit: Callable[[Path], None]
) -> None:
    write_export(folder)
    push(folder)

    assert {"model.onnx", "model.onnx.data", "model.onnx.json"} <= set(hub.files("ann/model"))
    assert "notes.txt" not in hub.files("ann/model")
    assert "| `model.onnx` | float16 | 1.5 MiB | 2.0e-06 |" in read_card(hub)

    edit(folder)
    push(folder)
    assert not [name for name in hub.files("ann/model") if "onnx" in name]
    assert "onnx" not in read_card(hub)


def test_a_push_removes_outdated_files_of_its_branch_and_keeps_others(
    hub: LocalHub, folder: Path
) -> None:
    """Shards replace a single file, and files of earlier versions are removed."""
    push(folder)
    for name in ("notes.md", "handler.py", "parity_report.json", "checkpoints/step-1/state.json"):
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo=name, repo_id="ann/model")
    (folder / WEIGHTS).unlink()
    model = vitcls.ViTCLSForImageClassification(build_tiny_config())
    model.save_pretrained(folder, max_shard_size="20KB")
    write_results(folder)
    main = hub.repositories["ann/model"].branches["main"]
    pushed = push(folder, branch="new")
    assert hub.repositories["ann/model"].branches == {"main": main, "new": pushed.sha}
    names = set(hub.files("ann/model", "new"))
    (folder / "report.html").write_text("new")
    again = push(folder, branch="new")  # which exists
    assert hub.repositories["ann/model"].branches == {"main": main, "new": again.sha}

    shards = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(shards) > 1
    assert shards | {"notes.md", "results.json"} <= names
    assert not names & {
        WEIGHTS,
        "handler.py",
        "parity_report.json",
        "checkpoints/step-1/state.json",
    }


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda folder: (folder / "config.json").unlink(),
            ["does not contain a model", "config.json"],
        ),
        (lambda folder: (folder / WEIGHTS).unlink(), ["lacks model.safetensors"]),
        (lambda folder: (folder / "modeling_vitcls.py").unlink(), ["modeling_vitcls.py"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["cannot read", "config.json"]),
        (lambda folder: folder.rename(folder.with_name("other")), ["is not a folder"]),
    ],
)
def test_an_incomplete_model_is_not_pushed(
    hub: LocalHub,
    folder: Path,
    spoil: Any,
    words: list[str],
    capsys: CaptureFixture,
) -> None:
    spoil(folder)
    assert run_push_command(folder) == 1
    check_error(capsys, *words)
    assert not hub.repositories


# Cards --------------------------------------------------------------------------------------------


def test_a_card_that_was_edited_on_the_hub_is_kept_until_one_is_edited_in_the_folder(
    hub: LocalHub, folder: Path, caplog: LogCaptureFixture
) -> None:
    hub.create("ann/model", files={"README.md": b"---\nlicense: mit\n---\n"})
    push(folder)
    push(folder)
    assert "Generated by" in read_card(hub)
    assert "README.md" not in caplog.text

    edited = f"{read_card(hub)}\n## Contact\nOur page\n"
    HfApi().upload_file(
        path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="ann/model"
    )
    commit = hub.repositories["ann/model"].branches["main"]
    push(folder)
    assert sorted(read_card(hub)) == sorted(edited)
    assert read_card(hub).index("## License") < read_card(hub).index("## Contact\nOur page\n")
    assert "README.md of ann/model was edited on the Hub" in caplog.text
    commit = hub.repositories["ann/model"].branches["main"]

    (folder / "README.md").write_text("# Ours\n")
    push(folder)
    assert read_card(hub) == "# Ours\n"
    assert f"stays in the commit {commit}" in caplog.text


def test_a_generated_card_names_the_repository_and_an_edited_card_is_kept(
    hub: LocalHub, folder: Path
) -> None:
    write_card(ModelFolder(folder))
    card = folder / "README.md"
    local_card = card.read_text()
    push(folder)
    assert "# ann/model\n" in read_card(hub)
    assert "my-run" not in read_card(hub)
    assert card.read_text() == local_card

    text = local_card.replace(f"# {folder.parent.name}/my-run", "# My model")
    card.write_text(text)
    push(folder)
    assert read_card(hub) == text

    card.write_text("---\nlicense: [\n---\nText\n")  # invalid YAML
    with raises_one_line("README.md", "vitcls push", error=PushError):
        push(folder)


def edit_on_hub(hub: LocalHub, edit: Callable[[str], str]) -> str:
    """Edit the published card, and return it."""
    card = edit(read_card(hub))
    upload = {"path_in_repo": "README.md", "repo_id": "ann/model"}
    HfApi().upload_file(path_or_fileobj=card.encode(), **upload)
    return card


def test_a_license_that_was_set_on_the_hub_stays_and_numbers_of_other_weights_do_not(
    hub: LocalHub, folder: Path
) -> None:
    push(folder)
    assert "354 of 360 right" in read_card(hub)
    edit_on_hub(hub, lambda card: card.replace("---\n", "---\nlicense: apache-2.0\n", 1))
    replace_weights(folder)

    push(folder)
    card = ModelCard(read_card(hub))
    assert card.data.license == "apache-2.0"
    assert "The weights are licensed under apache-2.0." in card.text
    assert "354 of 360 right" not in card.text


def test_a_section_that_was_edited_on_the_hub_is_kept_among_new_ones(
    hub: LocalHub, folder: Path, caplog: LogCaptureFixture
) -> None:
    push(folder)
    edit_on_hub(hub, lambda card: card.replace("## Use\n", "## Data\nOurs\n\n## Use\nAsk us.\n"))
    replace_weights(folder)

    push(folder)
    card = read_card(hub)
    assert "## Data\nOurs\n\n## Use\nAsk us.\n" in card
    assert "354 of 360 right" not in card
    assert "Data, Use" in caplog.text


def test_a_section_that_was_removed_on_the_hub_stays_removed(hub: LocalHub, folder: Path) -> None:
    push(folder)
    edit_on_hub(hub, lambda card: re.sub(r"## Citation.*?(?=## )", "", card, count=1, flags=re.S))
    for _ in range(2):
        (folder / "report.html").write_text("new")
        push(folder)
        assert "\n## Citation" not in read_card(hub)
        assert "\n## Use" in read_card(hub)


def test_a_text_that_a_person_wrote_is_kept(hub: LocalHub, folder: Path) -> None:
    hub.create("ann/model", files={"README.md": b"# Ours\n\n## Use\nAsk.\n"})
    push(folder)
    assert read_card(hub) == "# Ours\n\n## Use\nAsk.\n"


def test_the_empty_template_of_transformers_is_no_text_of_a_person(
    hub: LocalHub, folder: Path
) -> None:
    BertConfig().push_to_hub("ann/model")
    assert "[More Information Needed]" in read_card(hub)
    push(folder)
    assert "[More Information Needed]" not in read_card(hub)
    assert "354 of 360 right" in read_card(hub)


def test_the_draft_of_trainer_is_no_text_of_a_person(hub: LocalHub, folder: Path) -> None:
    training = TrainingArguments(output_dir=str(folder), report_to=[])
    model = vitcls.ViTCLSForImageClassification.from_pretrained(folder)
    Trainer(model, training).create_model_card()
    assert "More information needed" in (folder / "README.md").read_text()
    push(folder)
    assert "More information needed" not in read_card(hub)
    assert "pipeline_tag: image-classification" in read_card(hub)


# Pull requests ------------------------------------------------------------------------------------


def test_a_pull_request_needs_no_right_to_write_and_leaves_main_as_it_is(
    hub: LocalHub, folder: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> None:
    hub.create("bob/model", files={"README.md": b"---\nlicense: mit\n---\n"})
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    command = [
        "push",
        "--model",
        folder,
        "--hub-model-id",
        "bob/model",
        "--create-pr",
        "--no-verify",
    ]
    assert run_here(*command) == 0
    assert "bob/model/discussions/1" in capsys.readouterr().out
    assert set(hub.files("bob/model")) == {"README.md"}
    assert set(hub.files("bob/model", "refs/pr/1")) >= MODEL_FILES


def test_a_pull_request_requires_a_repository(
    hub: LocalHub, folder: Path, capsys: CaptureFixture
) -> None:
    assert run_here("push", "--model", folder, "--hub-model-id", "ann/model", "--create-pr") == 1
    check_error(capsys, "ann/model", "hub-model-id")
    assert not hub.repositories


def test_the_branch_of_a_pull_request_is_updated(hub: LocalHub, folder: Path) -> None:
    push(folder)
    replace_weights(folder)
    pushed = push(folder, create_pr=True)
    (folder / "LICENSE").write_text("new")
    again = push(folder, branch="refs/pr/1")
    assert hub.repositories["ann/model"].branches["refs/pr/1"] == again.sha != pushed.sha


# Permissions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "asked", "found"),
    [
        ("hf_ann", None, "ann/my-run"),
        ("hf_ann", "model", "ann/model"),
        ("hf_ann", "lab/model", "lab/model"),
        ("hf_one_model", "ann/there", "ann/there"),
    ],
)
def test_the_repository_exists_before_a_run(
    hub: LocalHub, token: str, asked: str | None, found: str, monkeypatch: MonkeyPatch
) -> None:
    hub.create("ann/there")
    monkeypatch.setenv("HF_TOKEN", token)
    assert prepare_repository(asked, "my-run") == found
    assert found in hub.repositories
    assert hub.count_requests("POST", "/commit/") == 0


@pytest.mark.parametrize(
    ("token", "repo_id", "words"),
    [
        (None, "ann/model", ["hf auth login", "HF_TOKEN"]),
        ("hf_wrong", "ann/model", ["hf auth login"]),
        ("hf_read", "ann/there", ["ann/there", "hf auth login"]),
        ("hf_one_model", "ann/other", ["ann/other", "hf auth login"]),
        ("hf_ann", "bob/model", ["bob/model", "`hub_model_id`"]),
        ("hf_ann", "school/model", ["school/model", "`hub_model_id`"]),
        ("hf_ann", "ann/my model", ["ann/my model", "`hub_model_id`"]),
    ],
)
def test_a_push_that_is_not_permitted_is_an_error_before_a_run(
    hub: LocalHub,
    token: str | None,
    repo_id: str,
    words: list[str],
    monkeypatch: MonkeyPatch,
) -> None:
    hub.create("ann/there")
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with raises_one_line(*words):
        prepare_repository(repo_id, "my-run")
    with raises_one_line("`space_id`"):
        prepare_repository(repo_id, "my-run", space_sdk="static")
    assert set(hub.repositories) == {"ann/there"}


def test_a_new_repository_has_the_default_visibility_of_the_account(
    hub: LocalHub, folder: Path
) -> None:
    hub.private_by_default.add("ann")
    prepare_repository("ann/prepared", "my-run")
    assert push_folder(ModelFolder(folder), "ann/pushed").is_private
    assert hub.repositories["ann/prepared"].private
    assert hub.repositories["ann/pushed"].private


def test_a_public_repository_is_not_accepted_for_a_private_push(hub: LocalHub) -> None:
    hub.create("ann/there")
    with raises_one_line("ann/there", "is public"):
        prepare_repository("ann/there", "my-run", private=True)
    assert prepare_repository("ann/new", "my-run", private=True) == "ann/new"
    assert hub.repositories["ann/new"].private


def test_offline_mode_and_an_unavailable_hub_are_errors(
    hub: LocalHub, folder: Path, monkeypatch: MonkeyPatch
) -> None:
    hub.fail("POST", "/api/repos/create", 500)
    with raises_one_line("HTTP 500", "push later", error=OSError):
        prepare_repository("ann/model", "x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with raises_one_line("HF_HUB_OFFLINE"):
        prepare_repository("ann/model", "x")
    with raises_one_line("HF_HUB_OFFLINE"):
        push(folder)


# Faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["drop", 503])
def test_a_failed_upload_is_repeated(hub: LocalHub, folder: Path, kind: str | int) -> None:
    hub.fail("PUT", "/objects/", kind)
    pushed = push(folder)
    assert hub.repositories["ann/model"].branches["main"] == pushed.sha
    assert set(hub.files("ann/model")) >= MODEL_FILES
    assert len(hub.repositories["ann/model"].commits) == 2


@pytest.mark.parametrize("kind", ["corrupt", "hang"])
def test_a_push_gives_up_if_every_upload_fails(
    hub: LocalHub, folder: Path, kind: str, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_vitcls.publishing.push.TIMEOUT", 0.5)
    monkeypatch.setattr(hub_http, "time", SimpleNamespace(sleep=lambda seconds: None))
    hub.fail("PUT", "/objects/", kind, times=1000)
    started = time.monotonic()
    with raises_one_line("vitcls push --model", error=PushError):
        push(folder)
    assert time.monotonic() - started < 120


def test_another_push_in_the_meantime_is_noticed(
    hub: LocalHub, folder: Path, monkeypatch: MonkeyPatch
) -> None:
    """The Hub rejects a commit whose parent is outdated, and the same command pushes on top of it."""
    create = HfApi.create_commit

    def create_second(api: HfApi, *arguments: Any, **keywords: Any) -> Any:
        monkeypatch.setattr(HfApi, "create_commit", create)
        HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes.md", repo_id="ann/model")
        return create(api, *arguments, **keywords)

    monkeypatch.setattr(HfApi, "create_commit", create_second)
    monkeypatch.chdir(folder.parent)
    with raises_one_line("HTTP 412", "finish with: vitcls push", error=PushError):
        push(Path(folder.name))
    assert "config.json" not in hub.files("ann/model")
    pushed = push(Path(folder.name))
    assert hub.repositories["ann/model"].branches["main"] == pushed.sha
    assert set(hub.files("ann/model")) >= MODEL_FILES | {"notes.md"}


def test_a_failed_push_prints_its_command_and_leaves_the_client_as_it_was(
    hub: LocalHub, folder: Path
) -> None:
    """A caller's later downloads have the caller's timeout and progress bars."""
    enable_progress_bars()  # commands in this process turn them off
    before = get_session().timeout
    assert (
        build_push_command(Path("my run"), "a/b")
        == "vitcls push --model 'my run' --hub-model-id a/b"
    )
    hub.create("ann/model")
    hub.fail("POST", "/commit/", 403)
    command = f"vitcls push --model {folder} --hub-model-id ann/model --private --branch new"
    with raises_one_line("HTTP 403", command, error=PushError):
        push(folder, private=True, branch="new")
    assert get_session().timeout == before
    assert not are_progress_bars_disabled()
