"""Verification of published models in new processes: a certificate if all checks pass, otherwise a reason.

Real new processes are slow, so few tests start them; errors are detected before a process starts if possible.
"""

import copy
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers.fresh_processes import run_fresh
from helpers.local_hub import LocalHub, Token
from helpers.source_checkpoints import SIZES
from helpers.tiny_models import (
    KINDS,
    TASKS,
    build_tiny_config,
    raises_one_line,
    randomize,
    save_classifier,
    save_with_processor,
)
from huggingface_hub import HfApi, constants
from safetensors.torch import save_file

import modeling_vitcls as vitcls
from modeling_vitcls.checkpoints import CheckpointStore
from modeling_vitcls.hub import connection
from modeling_vitcls.hub.revisions import HubCommit, resolve_commit
from modeling_vitcls.publishing.code_files import PACKAGE_FOLDER
from modeling_vitcls.publishing.publish import push_folder
from modeling_vitcls.publishing.shared_code import pin_code_in_card, use_shared_code
from modeling_vitcls.publishing.verification_reference import PackageLoader
from modeling_vitcls.publishing.verification_script import (
    HubLoader,
    collect_outputs,
)
from modeling_vitcls.publishing.verify import (
    VerificationError,
    VerificationReport,
    build_clean_environment,
    check_script_report,
    compare_outputs,
    run_script,
    run_verification,
    verify,
    verify_push,
)
from modeling_vitcls.system import get_versions


pytestmark = pytest.mark.integration


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "push_to_hub.py"
BACKENDS = ["AutoImageProcessor, torchvision", "AutoImageProcessor, pil"]


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LocalHub:
    """Start an empty Hub for this process and its child processes, as ann."""
    hub.tokens |= {"hf_bob": Token("bob")}
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))  # a new process must not use it
    monkeypatch.setattr(connection, "RETRY_WAITS", (0.01, 0.02))
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a classifier with its image processor."""
    return save_classifier(tmp_path / "my-run")


@pytest.mark.slow
def test_the_script_pushes_and_prints_a_certificate(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    """The repository is private, the first request for weights fails, and there is only one commit."""
    hub.fail("GET", "/objects/", "cut")
    ended = run_fresh(SCRIPT, "--model", folder, "--hub-model-id", "model", "--private", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr[-2000:]
    commit = hub.repositories["ann/model"].branches["main"]
    assert hub.repositories["ann/model"].private
    assert f"verified: ann/model at {commit}" in ended.stdout
    found = re.findall(r"^    (\S.*?) {2,}(\S*) +largest difference (\S+)$", ended.stdout, re.MULTILINE)
    assert [(way, name) for way, name, _ in found] == [
        ("AutoModel", "ViTCLSModel"),
        ("AutoModelForImageClassification", "ViTCLSForImageClassification"),
        ("AutoImageProcessor, torchvision", "ViTCLSImageProcessor"),
        ("AutoImageProcessor, pil", "ViTCLSImageProcessorPil"),
        ("pipeline", ""),
    ]
    assert all(float(difference) <= 1e-6 for _, _, difference in found)
    assert f"files match their hashes; code identical to modeling_vitcls {vitcls.__version__}\n" in ended.stdout
    line = f'AutoModelForImageClassification.from_pretrained("ann/model", revision="{commit}", trust_remote_code=True)'
    assert ended.stdout.rstrip().endswith(line)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("fast_verification")
def test_any_published_model_is_verified_by_any_revision(hub: LocalHub, tmp_path: Path) -> None:
    """Verify the tag of an old commit of a repository that now contains another kind of model."""
    config = build_tiny_config(num_cls_tokens=2, tasks=TASKS)
    first = push_folder(
        save_with_processor(vitcls.ViTCLSForMultiTaskClassification(config), tmp_path / "first"), "ann/model"
    ).commit
    HfApi().create_tag("ann/model", tag="v1", revision=first)
    second = push_folder(
        save_with_processor(vitcls.ViTCLSModel(build_tiny_config()), tmp_path / "second"), "ann/model"
    ).commit
    certificate = verify("ann/model", "v1")
    assert certificate.revision == first != second
    assert list(certificate.differences) == ["AutoModel", "AutoModelForImageClassification", *BACKENDS]
    assert certificate.class_names["AutoModelForImageClassification"] == "ViTCLSForMultiTaskClassification"
    assert max(certificate.differences.values()) <= 1e-6
    assert f'revision="{first}"' in certificate.format_loading_code()


# Code in a separate repository ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("fast_verification")
def test_code_and_weights_may_be_in_different_repositories(hub: LocalHub, folder: Path) -> None:
    push_folder(folder, "ann/code")
    (folder / "README.md").write_text('## Use\n\nfrom_pretrained("x", revision="<commit hash>")\n')
    use_shared_code(folder, "ann/code")
    assert 'code_revision="<commit hash of ann/code>"' in (folder / "README.md").read_text()
    code_file = folder.parent / "extra.py"
    code_file.write_text("")
    HfApi().upload_file(path_or_fileobj=code_file, path_in_repo="extra.py", repo_id="ann/code")
    newest = hub.repositories["ann/code"].branches["main"]
    pushed = push_folder(folder, "ann/weights")
    assert not [name for name in hub.files("ann/weights") if name.endswith(".py")]
    certificate = verify("ann/weights", pushed.commit, folder)
    assert certificate.code_comparison.endswith(f"modeling_vitcls {vitcls.__version__}: extra.py (added)")
    assert list(certificate.differences) == ["AutoModel", "AutoModelForImageClassification", *BACKENDS, "pipeline"]
    assert f'revision="{pushed.commit}", code_revision="{newest}"' in certificate.format_loading_code()


@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json"])
def test_code_in_several_repositories_cannot_be_pinned(hub: LocalHub, folder: Path, file: str) -> None:
    """The model is neither pushed nor verified, whichever file refers to another repository."""
    commit = push_folder(folder, "ann/weights").commit
    settings = json.loads((folder / file).read_text())
    settings["auto_map"] = {
        name: refer_to_other_repository(reference) for name, reference in settings["auto_map"].items()
    }
    (folder / file).write_text(json.dumps(settings))
    with raises_one_line("several repositories (ann/code, the model's own)", "shared_code.py"):
        push_folder(folder, "ann/weights")
    assert hub.repositories["ann/weights"].branches["main"] == commit
    HfApi().upload_file(path_or_fileobj=folder / file, path_in_repo=file, repo_id="ann/weights")
    with raises_one_line("ann/weights at ", "several repositories (ann/code, the model's own)"):
        verify("ann/weights")


def refer_to_other_repository(references: Any) -> Any:
    """Return references to classes whose code is in ann/code."""
    if isinstance(references, dict):
        return {name: refer_to_other_repository(reference) for name, reference in references.items()}
    return f"ann/code--{references}"


def test_local_code_references_require_code_next_to_the_weights(hub: LocalHub, folder: Path) -> None:
    with_own_name = (folder / "config.json").read_text().replace('": "modeling', '": "ann/model--modeling')
    (folder / "config.json").write_text(with_own_name)
    assert push_folder(folder, "ann/model").commit


def test_a_card_without_pinned_code_is_not_changed() -> None:
    text = '# Mine\n\n## Use\n\n    AutoModel.from_pretrained("x")\n'
    assert pin_code_in_card(text, "ann/code") == text


# Untrusted code ------------------------------------------------------------------------------------------------------


CHANGES = {
    "classifier": (
        "pool = TokenPooler.forward\nTokenPooler.forward = lambda self, tokens: 1.001 * pool(self, tokens)\n"
    ),
    "backbone": (
        "drawn = ViTCLSBackbone.get_feature_map\n"
        "ViTCLSBackbone.get_feature_map = lambda self, *args: 1.001 * drawn(self, *args)\n"
    ),
}
CHANGED_FILES = {"classifier": "heads_vitcls.py", "backbone": "modeling_vitcls.py"}


@pytest.mark.parametrize("kind", ["backbone", pytest.param("classifier", marks=pytest.mark.slow)])
def test_published_code_with_other_outputs_is_detected(
    hub: LocalHub, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code runs only in a separate process, which receives no secrets of this process."""
    model_class, fields, _ = KINDS[kind]
    folder = save_with_processor(model_class(build_tiny_config(**fields)), tmp_path / kind)
    code, seen = folder / CHANGED_FILES[kind], tmp_path / "seen.json"
    spy = f"import json, os\njson.dump([os.getpid(), dict(os.environ)], open({str(seen)!r}, 'w'))\n"
    code.write_text(code.read_text() + CHANGES[kind] + spy)
    pushed = push_folder(folder, "ann/model")
    monkeypatch.setenv("MY_SECRET", "42")
    with raises_one_line("differ from the reference", "the limit is", error=VerificationError):
        verify("ann/model", pushed.commit)
    process, environment = json.loads(seen.read_text())
    assert process != os.getpid()
    assert "hf_ann" not in environment.values() and "MY_SECRET" not in environment
    assert environment["HF_ENDPOINT"] == hub.url and environment["PATH"] == os.environ["PATH"]


def test_only_private_repositories_are_loaded_with_the_token(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {
        "HF_HOME": "/mine",
        "AWS_KEY": "x",
        "RANK": "1",
        "no_proxy": "a",
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    found = build_clean_environment(str(tmp_path), needs_token=False)
    assert not {"HF_TOKEN", "AWS_KEY", "RANK"} & found.keys()
    assert found["HF_HOME"] == found["HOME"] == str(tmp_path)
    assert found["no_proxy"] == "a" and found["OMP_NUM_THREADS"] == "1"
    assert build_clean_environment(str(tmp_path), needs_token=True) == found | {"HF_TOKEN": "hf_ann"}


def test_the_new_process_receives_the_request_and_the_token_if_required(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    results: list[tuple[dict[str, Any] | None, str]] = []  # report and standard error of each process
    requests, environments = [], []

    def run(command: list[str], cwd: str, env: dict[str, str], **_: Any) -> SimpleNamespace:
        requests.append(json.loads(Path(command[-1]).read_text()))
        environments.append(env)
        target, (report, errors) = Path(requests[-1].pop("target")), results.pop(0)
        if report is not None:
            (target / "report.json").write_text(json.dumps(report))
            save_file({"x": torch.ones(1)}, target / "outputs.safetensors")
        return SimpleNamespace(stderr=errors, returncode=3)

    monkeypatch.setattr("modeling_vitcls.publishing.verify.subprocess", SimpleNamespace(run=run))
    for code, has_token in ((None, False), (CODE, False), (replace(CODE, needs_token=True), True)):
        results.append(({"models": {}}, ""))
        outputs, report = run_script(MODEL, code, tmp_path, trust_remote_code=False)
        assert report == {"models": {}} and outputs.keys() == {"x"}
        assert requests.pop() == {
            "repo_id": "ann/model",
            "revision": MODEL.sha,
            "code_repo_id": code and "ann/code",
            "code_revision": code and CODE.sha,
            "trust_remote_code": False,
            "num_threads": torch.get_num_threads(),
        }
        assert ("HF_TOKEN" in environments[-1]) is has_token
    prefix = f"a new process cannot load ann/model at {MODEL.sha}: "
    for report, errors, message, error_class in (
        (None, "Traceback\nImportError: x\n", "ImportError: x", RuntimeError),
        (None, "", "exit status 3", RuntimeError),
        ({"error": "OSError: x", "can_retry": True}, "", "OSError: x", RuntimeError),
        ({"error": "KeyError: x", "can_retry": False}, "", "KeyError: x", VerificationError),
    ):
        results.append((report, errors))
        with raises_one_line(prefix + message, error=error_class):
            run_script(replace(MODEL, needs_token=True), None, tmp_path, trust_remote_code=True)
        assert "HF_TOKEN" in environments[-1]
    monkeypatch.setattr("modeling_vitcls.publishing.verify.SHORT_RETRY_WAITS", (0.01, 0.01))
    results += [(None, "ImportError: x"), (None, "ImportError: y")]
    with raises_one_line(f"{prefix}ImportError: y", error=VerificationError):
        run_verification(MODEL, None, tmp_path)
    assert results == [] and list(tmp_path.glob("*/*")) == []


@pytest.mark.slow
def test_code_that_imports_this_package_does_not_load(hub: LocalHub, folder: Path) -> None:
    code = folder / "modeling_vitcls.py"
    code.write_text("try:\n    import modeling_vitcls\nexcept ValueError:\n    pass\n" + code.read_text())
    pushed = push_folder(folder, "ann/model")
    with raises_one_line("a new process cannot load ann/model", "modeling_vitcls", error=VerificationError):
        verify("ann/model", pushed.commit, folder)


OPTIMIZER = "checkpoints/step-00000002/optimizer.safetensors"


@pytest.mark.parametrize("file", ["model.safetensors", "modeling_vitcls.py", "config.json", OPTIMIZER])
def test_a_file_that_is_corrupted_in_storage_is_named(hub: LocalHub, folder: Path, file: str) -> None:
    save_checkpoint(folder)
    pushed = push_folder(folder, "ann/model", with_optimizer=True)
    hub.corrupt("ann/model", file)
    with raises_one_line("is damaged on the Hub", file, error=VerificationError):
        verify("ann/model", pushed.commit, folder)


def save_checkpoint(folder: Path, value: float = 1.0) -> None:
    """Save the files that `--resume` requires, as a run does."""
    tensors = {"model": {"x": torch.ones(2)}, "optimizer": {"y": torch.full((2,), value)}}
    CheckpointStore(folder / "checkpoints", num_kept=1).save(2, tensors, {"step": 2, "flags": {}}, False)


def test_the_optimizer_state_is_compared(hub: LocalHub, folder: Path) -> None:
    save_checkpoint(folder)
    commit = push_folder(folder, "ann/model", with_optimizer=True).commit
    save_checkpoint(folder, value=2.0)
    with raises_one_line("checkpoints/step-00000002/", " differs from ", error=VerificationError):
        verify("ann/model", commit, folder)
    (folder / OPTIMIZER).rename(folder / "optimizer.safetensors")
    CheckpointStore(folder / "checkpoints", num_kept=1).save(3, {"model": {"x": torch.ones(2)}}, {"flags": {}}, False)
    with raises_one_line("contains checkpoints/step-00000002/", "not a file of the newest", error=VerificationError):
        verify("ann/model", commit, folder)
    pushed = push_folder(folder, "ann/model")  # which removes it
    with raises_one_line("lacks checkpoints/step-00000003/", error=VerificationError):
        verify("ann/model", pushed.commit, folder, with_optimizer=True)
    assert not pushed.with_optimizer
    lost = replace(pushed, with_optimizer=True)
    with raises_one_line("pushed, but not verified", "lacks checkpoints/step-00000003/", error=OSError):
        verify_push(lost, folder)


def test_a_folder_that_changed_after_the_push_is_detected(hub: LocalHub, folder: Path) -> None:
    pushed = push_folder(folder, "ann/model")
    (folder / "README.md").write_text("# new\n")
    with raises_one_line("lacks README.md", error=VerificationError):
        verify("ann/model", pushed.commit, folder)
    (folder / "README.md").unlink()
    save_with_processor(vitcls.ViTCLSForImageClassification(build_tiny_config(num_register_tokens=2)), folder)
    with raises_one_line(f"in {folder}", " differs from ", f"Push {folder} again", error=VerificationError):
        verify("ann/model", pushed.commit, folder)


def test_missing_models_cannot_be_verified(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_folder(folder, "ann/model", private=True)
    hub.create("ann/other", private=False)
    with raises_one_line("has no revision v9"):
        verify("ann/model", "v9")
    with raises_one_line("does not contain a vitcls model", error=VerificationError):
        verify("ann/other")
    with raises_one_line("ann/typo is not a folder, and the Hub has no such model"):
        verify("ann/typo")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with raises_one_line("ann/model is not a folder", "private", "hf auth login"):
        verify("ann/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with raises_one_line("HF_HUB_OFFLINE"):
        verify("ann/model")


def test_verification_stops_if_the_hub_stays_down(hub: LocalHub, folder: Path) -> None:
    push_folder(folder, "ann/model")
    hub.fail("GET", "/api/models/ann/model", 500, times=3)
    with raises_one_line("cannot look up ann/model", "HTTP 500", error=OSError):
        verify("ann/model")


def verify_in_this_process(
    monkeypatch: pytest.MonkeyPatch, loader: Any, report: dict[str, Any], module: str | None = None
) -> list[tuple[HubCommit, HubCommit | None, bool]]:
    """Replace the new process of a verification; return a list that collects its model, code and trust in the code."""
    calls: list[tuple[HubCommit, HubCommit | None, bool]] = []

    def run(model: HubCommit, code: HubCommit | None, scratch: Path, trust_remote_code: bool) -> tuple[Any, Any]:
        calls.append((model, code, trust_remote_code))
        outputs, classes = collect_outputs(loader)
        for loaded in classes["models"].values():
            loaded["module"] = module or loaded["module"]
        return outputs, {"has_package": False, "code_commits": []} | classes | report

    monkeypatch.setattr("modeling_vitcls.publishing.verify.run_verification", run)
    return calls


@pytest.mark.parametrize("has_other_code", [False, True])
def test_the_report_of_a_verification(
    hub: LocalHub, folder: Path, has_other_code: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = f"modeling_vitcls {vitcls.__version__}"
    comparison, code = f"code identical to {package}", None
    (folder / "README.md").write_text('# my-run\n\nfrom_pretrained("my-run")\n')
    if has_other_code:
        use_shared_code(folder, "ann/code")
        files = {file.name: file.read_bytes() for file in PACKAGE_FOLDER.glob("*_vitcls.py")} | {"extra.py": b""}
        hub.create("ann/code", private=True, files=files)
        comparison, code = f"code differs from {package}: extra.py (added)", resolve_commit("ann/code")
    commit = push_folder(folder, "ann/model").commit
    code_commit = code and code.sha
    report = {"commits": [commit], "code_commits": [code_commit]}
    calls = verify_in_this_process(monkeypatch, PackageLoader(folder), report, "transformers_modules.x")
    names = ["AutoModel", "AutoModelForImageClassification", *BACKENDS]
    classes = ["ViTCLSModel", "ViTCLSForImageClassification", "ViTCLSImageProcessor", "ViTCLSImageProcessorPil"]
    expected = VerificationReport(
        repo_id="ann/model",
        revision=commit,
        reference=str(folder),
        num_files=len(hub.files("ann/model")) - 1,  # .gitattributes is not downloaded
        class_names=dict(zip(names, classes, strict=True)),
        differences=dict.fromkeys([*names, "pipeline"], 0.0),
        versions=get_versions("huggingface_hub"),
        code_comparison=comparison,
        code_revision=code_commit,
    )
    assert verify("ann/model", folder=folder) == expected
    assert verify("ann/model", commit) == replace(expected, reference=f"the same files with {package}")
    assert calls == [(HubCommit("ann/model", commit, needs_token=False), code, True)] * 2


def test_models_of_transformers_are_verified_without_code(
    hub: LocalHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "native"
    randomize(transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES))).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    (folder / "parity_report.json").write_text("{}")
    commit = push_folder(folder, "ann/native").commit
    loader = HubLoader(str(folder), trust_remote_code=False)
    calls = verify_in_this_process(monkeypatch, loader, {"commits": [commit]})
    names = ["AutoModel", "AutoModelForImageClassification", *BACKENDS, "pipeline"]
    for reference in (folder, None):
        report = verify("ann/native", folder=reference)
        assert report.is_native and report.code_comparison == "no code"
        assert report.class_names["AutoModelForImageClassification"] == "ViTForImageClassification"
        assert report.differences == dict.fromkeys(names, 0.0)
    assert calls == [(HubCommit("ann/native", commit, needs_token=False), None, False)] * 2


MODEL = HubCommit("ann/model", "a" * 40, needs_token=False)
CODE = HubCommit("ann/code", "c" * 40, needs_token=False)
REMOTE_MODULES = "transformers_modules."  # prefix of the names of modules from the Hub
SCRIPT_REPORT = {
    "has_package": False,
    "commits": [MODEL.sha],
    "code_commits": [CODE.sha],
    "models": {
        "AutoModel": {"class": "ViTCLSModel", "module": "transformers_modules.x.modeling_vitcls", "missing": []}
    },
}


def replace_in_report(path: str, value: Any) -> dict[str, Any]:
    """Return a copy of `SCRIPT_REPORT` with another value at a path such as `models.AutoModel.module`."""
    report = copy.deepcopy(SCRIPT_REPORT)
    *parents, name = path.split(".")
    target: Any = report
    for parent in parents:
        target = target[parent]
    target[name] = value
    return report


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("has_package", True, "imported modeling_vitcls, so it did not test the published code"),
        ("commits", ["b" * 40], f"must load only ann/model at {MODEL.sha}, but it loaded {'b' * 40}"),
        ("commits", [MODEL.sha, "b" * 40], f"but it loaded {MODEL.sha}, {'b' * 40}"),
        ("commits", [], f"must load only ann/model at {MODEL.sha}, but it loaded no commit"),
        ("code_commits", ["b" * 40], f"only from ann/code at {CODE.sha}, but it loaded code from {'b' * 40}"),
        ("code_commits", [CODE.sha, "b" * 40], f"but it loaded code from {CODE.sha}, {'b' * 40}"),
        ("code_commits", [], f"only from ann/code at {CODE.sha}, but it loaded code from no commit"),
        (
            "models.AutoModel.module",
            "modeling_vitcls.modeling_vitcls",
            "AutoModel loaded ViTCLSModel from modeling_vitcls",
        ),
        (
            "models.AutoModel.module",
            "transformers.models.vit",
            "AutoModel loaded ViTCLSModel from transformers.models",
        ),
        ("models.AutoModel.missing", ["head.weight"], "lacks the weights head.weight"),
    ],
)
def test_a_report_of_another_model_or_code_is_rejected(path: str, value: Any, words: str) -> None:
    check_script_report(MODEL, CODE, SCRIPT_REPORT, REMOTE_MODULES)
    with raises_one_line(words, error=VerificationError):
        check_script_report(MODEL, CODE, replace_in_report(path, value), REMOTE_MODULES)


def test_the_code_commit_is_checked_only_for_code_in_another_repository() -> None:
    check_script_report(MODEL, None, replace_in_report("code_commits", []), REMOTE_MODULES)


def test_verify_checks_the_report_of_the_process(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    push_folder(folder, "ann/model")
    verify_in_this_process(monkeypatch, PackageLoader(folder), {"commits": ["b" * 40]})
    with raises_one_line("must load only ann/model at ", f"but it loaded {'b' * 40}", error=VerificationError):
        verify("ann/model")


@pytest.mark.parametrize(
    ("found", "is_right"),
    [
        ([1.0, 100.0], True),
        ([1.0, 100.00005], True),  # of values up to 100
        ([1.0, 100.0002], False),
        ([float("nan"), 100.0], False),
        ([1.0], False),
    ],
)
def test_outputs_may_differ_by_a_millionth(found: list[float], is_right: bool) -> None:
    wanted = {"AutoModel/logits": torch.tensor([1.0, 100.0], dtype=torch.float64)}
    answers = {"AutoModel/logits": torch.tensor(found, dtype=torch.float64)}
    if is_right:
        assert compare_outputs("ann/model", answers, wanted)["AutoModel"] <= 1e-4
    else:
        with raises_one_line("the outputs of ann/model", "AutoModel/logits", error=VerificationError):
            compare_outputs("ann/model", answers, wanted)
    for incomplete in ({}, {"AutoModel/logits": answers["AutoModel/logits"], "AutoModel/more": torch.ones(1)}):
        with raises_one_line("missing or unexpected tensors: AutoModel/", error=VerificationError):
            compare_outputs("ann/model", incomplete, wanted)


def test_the_largest_difference_of_each_loader_is_reported() -> None:
    """Differences of small values are absolute."""
    wanted = {"AutoModel/a": torch.zeros(2), "AutoModel/b": torch.full((3,), 1e-3), "AutoModel/c": torch.zeros(0)}
    wanted |= {"pipeline/scores": torch.ones(1)}
    found = wanted | {
        "AutoModel/a": torch.tensor([0.0, -4e-7]),
        "AutoModel/b": torch.tensor([1e-3 + 2e-7, 1e-3, 1e-3]),
    }
    differences = compare_outputs("ann/model", found, wanted)
    assert differences == {"AutoModel": pytest.approx(4e-7), "pipeline": 0.0}
    with raises_one_line("AutoModel/c has [1], not [0]", error=VerificationError):
        compare_outputs("ann/model", found | {"AutoModel/c": torch.zeros(1)}, wanted)
    with raises_one_line("AutoModel/a by 1.1e-06; the limit is 1e-06", error=VerificationError):
        compare_outputs("ann/model", found | {"AutoModel/a": torch.tensor([0.0, 1.1e-6])}, wanted)


REPORT = VerificationReport(
    repo_id="ann/model",
    revision="a" * 40,
    reference="the reference",
    num_files=7,
    class_names={"AutoModel": "ViTCLSModel", "AutoImageProcessor, pil": "ViTCLSImageProcessorPil"},
    differences={"AutoModel": 2.5e-7, "pipeline": 0.0},
    versions={"torch": "2.11.0"},
    code_comparison="code identical",
)
PIN = f'"ann/model", revision="{"a" * 40}"'
TRUST = "trust_remote_code=True"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, f"AutoModel.from_pretrained({PIN}, {TRUST})"),
        (
            {"code_revision": "c" * 40},
            f'AutoModel.from_pretrained({PIN}, code_revision="{"c" * 40}", {TRUST})',
        ),
        ({"is_native": True}, f"AutoModel.from_pretrained({PIN})"),
        (
            {"class_names": {"AutoModel": "x", "AutoBackbone": "y", "AutoImageProcessor, pil": "z"}},
            f"AutoBackbone.from_pretrained({PIN}, {TRUST})",
        ),
        (
            {"class_names": {"AutoModel": "x", "AutoModelForMaskedImageModeling": "y"}},
            f"AutoModelForMaskedImageModeling.from_pretrained({PIN}, {TRUST})",
        ),
    ],
    ids=["weights", "code", "native", "backbone", "masked"],
)
def test_the_printed_line_loads_the_complete_verified_model(changes: dict[str, Any], line: str) -> None:
    report = replace(REPORT, **changes)
    assert report.format_loading_code() == line
    lines = report.format_lines()
    assert lines[0] == f"verified: ann/model at {'a' * 40}" and lines[-1] == f"  {line}"
    assert lines[1] == "  7 files match their hashes; code identical" and lines[2].endswith("with the reference:")
    assert [text.split()[0] for text in lines[3:5]] == ["AutoModel", "pipeline"]
    assert [text.split()[-1] for text in lines[3:5]] == ["2.5e-07", "0.0e+00"]
    assert lines[5] == "  limit 1e-06; torch 2.11.0"
    assert ("pinned commit" in lines[6]) is not report.is_native
