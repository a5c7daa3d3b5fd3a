"""Runs of scripts/finetune.py and scripts/pretrain.py that push: the verified result, and checkpoints during training.

The scripts run in this process, with a local Hub. Verification starts real processes, so most runs disable it.
"""

import json
import os
import re
import runpy
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.accelerate_state import reset_accelerate
from helpers.local_hub import LocalHub, Token, point_client_at
from helpers.warm_processes import READY, SECONDS, find_free_port, get_rank_variables, run_script
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import are_progress_bars_disabled
from safetensors.torch import load, load_file

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor
from modeling_vitcls.hub import connection
from modeling_vitcls.publishing import publish
from modeling_vitcls.training import branch_uploads


pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate")]

SCRIPTS = Path(__file__).parents[2] / "scripts"
WEIGHTS = "model.safetensors"
TINY = (
    "--model vitcls-tiny --hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --intermediate-size 24 "
    "--image-size 16 --patch-size 8 --num-register-tokens 1 --dataset digits --num-workers 0 --log-attention-every 0 "
    "--no-report"
)
RUN = f"{TINY} --max-steps 6 --batch-size 16 --log-every 1 --save-every 3"


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> LocalHub:
    """Start an empty Hub for this process and its child processes, as ann."""
    hub.tokens |= {"hf_read": Token("ann", role="read")}
    monkeypatch.setattr(connection, "RETRY_WAITS", (0.01, 0.02, 0.03))
    return hub


class ScriptResult:
    """The printed text and the exit status of a script."""

    def __init__(self, status: Any, out: str, err: str) -> None:
        self.status = status or 0
        self.out = out
        self.err = err

    def lines(self, start: str) -> list[str]:
        """Return the printed lines that start with this text."""
        return [line for line in self.out.splitlines() if line.startswith(start)]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Any:
    """Return a function that runs a script in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("COLUMNS", "400")

    def run(name: str, flags: str, *more: object) -> ScriptResult:
        reset_accelerate()
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *flags.split(), *map(str, more)])
        try:
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
            status: Any = 0
        except SystemExit as ended:
            status = ended.code
        return ScriptResult(status, *capsys.readouterr())

    return run


def get_stored_weights(hub: LocalHub, repo_id: str, revision: str = "main") -> dict[str, torch.Tensor]:
    return load(hub.read(repo_id, WEIGHTS, revision))


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


# The result ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fast_verification")
def test_a_run_pushes_its_result_and_prints_the_certificate(hub: LocalHub, tmp_path: Path, script: Any) -> None:
    """The Hub is overloaded, drops connections and requests retries."""
    hub.fail("POST", "/preupload/", 500)
    hub.fail("PUT", "/objects/", "drop")
    hub.fail("POST", "/commit/", 429, retry_after=0)
    folder = tmp_path / "my-run"
    ended = script(
        "finetune.py", RUN, "--output-dir", folder, "--push-to-hub", "--hub-model-id", "small", "--hub-private"
    )
    assert ended.status == 0, ended.err
    repository = hub.repositories["ann/small"]
    commit = repository.branches["main"]
    assert repository.private and set(repository.branches) == {"main"}
    assert ended.lines("pushed") == [f"pushed    {hub.url}/ann/small/commit/{commit} (private)"]
    assert f"verified: ann/small at {commit}" in ended.out
    assert len(re.findall("largest difference", ended.out)) == 5
    line = f'AutoModelForImageClassification.from_pretrained("ann/small", revision="{commit}", trust_remote_code=True)'
    assert ended.out.rstrip().endswith(line)
    assert not any("checkpoint" in name or "optimizer" in name for name in hub.files("ann/small"))
    assert get_stored_weights(hub, "ann/small").keys() == load_file(folder / WEIGHTS).keys()


def test_damage_on_the_hub_is_a_one_line_error(hub: LocalHub, tmp_path: Path, script: Any) -> None:
    """The model was pushed without verification and changed on the Hub. The printed command verifies it."""
    folder = tmp_path / "my-run"
    flags = [RUN, "--output-dir", folder, "--push-to-hub"]
    ended = script("finetune.py", *flags, "--no-hub-verify")
    assert ended.status == 0 and "verif" not in ended.out
    hub.corrupt("ann/my-run", WEIGHTS)
    ended = script("finetune.py", *flags, "--resume")
    commit = hub.repositories["ann/my-run"].branches["main"]
    assert ended.status == 1
    assert ended.err.splitlines() == [ended.err.strip()] and ended.err.startswith("the model was pushed, but not ver")
    for words in (
        "is damaged on the Hub: the hash of model.safetensors",
        f"saved in {folder}",
        f"vitcls push --verify-only ann/my-run --revision {commit}",
    ):
        assert words in ended.err
    ViTCLSForImageClassification.from_pretrained(folder)
    ended = script("push_to_hub.py", f"--verify-only ann/my-run --revision {commit}")
    assert ended.status == 1 and "is damaged on the Hub: the hash of model.safetensors" in ended.err
    ended = script("push_to_hub.py", f"--model {folder}")
    assert ended.status == 1 and ended.err.startswith("error: the model was pushed, but not verified: ")
    assert f"--verify-only ann/my-run --revision {commit}" in ended.err


def test_the_hub_stops_before_verification(hub: LocalHub, tmp_path: Path, script: Any) -> None:
    hub.fail("GET", "/revision/", 500, times=3)
    ended = script("finetune.py", RUN, "--output-dir", tmp_path / "my-run", "--push-to-hub")
    assert ended.status == 1 and len(ended.err.strip().splitlines()) <= 3  # with the warnings about retries
    assert "the model was pushed, but not verified: cannot look up" in ended.err.splitlines()[-1]
    assert WEIGHTS in hub.files("ann/my-run")


@pytest.mark.parametrize(
    ("token", "words"),
    [(None, "requires a Hugging Face token"), ("hf_wrong", "is invalid"), ("hf_read", "is read-only")],
)
def test_training_does_not_start_without_permission_to_push(
    hub: LocalHub, tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch, token: str | None, words: str
) -> None:
    point_client_at(hub.url, token, monkeypatch, tmp_path / "home")
    for more in ([], ["--dry-run"]):
        ended = script("finetune.py", RUN, "--output-dir", tmp_path / "my-run", "--push-to-hub", *more)
        assert ended.status == 1 and words in ended.err and len(ended.err.splitlines()) == 1
    assert not hub.repositories and not (tmp_path / "my-run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--hub-checkpoint-every 2", "--hub-checkpoint-every requires --push-to-hub"),
        ("--hub-push-optimizer", "--hub-push-optimizer requires --push-to-hub"),
        ("--push-to-hub --hub-checkpoint-every 0", "--hub-checkpoint-every is 0"),
        ("--push-to-hub --hub-checkpoint-branch main", "--hub-checkpoint-branch is main"),
    ],
)
def test_incompatible_flags(tmp_path: Path, script: Any, flags: str, words: str) -> None:
    ended = script("finetune.py", RUN, "--output-dir", tmp_path / "my-run", *flags.split())
    assert ended.status == 2 and words in " ".join((ended.out + ended.err).split())


# Checkpoints on a branch ---------------------------------------------------------------------------------------------


def test_the_branch_contains_the_evaluated_model(hub: LocalHub, tmp_path: Path, script: Any) -> None:
    """The weights are averaged. The branch loads, and its card describes it."""
    folder = tmp_path / "my-run"
    had_none = are_progress_bars_disabled()
    flags = "--push-to-hub --no-hub-verify --hub-checkpoint-every 3 --hub-private --license mit"
    flags += " --ema-decay 0.9 --keep-checkpoints 9"
    ended = script("finetune.py", RUN, "--output-dir", folder, *flags.split())
    assert ended.status == 0 and "WARNING" not in ended.out, ended.out
    repository = hub.repositories["ann/my-run"]
    commit = repository.branches["checkpoints"]
    assert repository.private and repository.commits[commit].message == "Step 3"
    assert f"pushed    step 3 to the branch checkpoints, commit {commit}" in ended.out
    assert len(repository.commits) == 3  # the initial commit, step 3, the result
    files = hub.files("ann/my-run", "checkpoints")
    names = {"README.md", "config.json", "preprocessor_config.json", "modeling_vitcls.py", "metrics.jsonl"}
    assert names | {"config.resolved.yaml"} <= set(files)
    assert not any("/" in name for name in files)
    steps = [json.loads(line)["step"] for line in hub.read("ann/my-run", "metrics.jsonl", commit).splitlines()]
    assert steps == [1, 2, 3]
    card = hub.read("ann/my-run", "README.md", commit).decode()
    assert "# ann/my-run, step 3\n" in card and "AutoModelForImageClassification.from_pretrained" in card
    assert "license: mit" in card and "The weights are licensed under mit." in card and "--resume" not in card
    checkpoint = folder / "checkpoints" / "step-00000003"
    wanted = load_file(checkpoint / WEIGHTS) | load_file(checkpoint / "ema.safetensors")
    assert_same(get_stored_weights(hub, "ann/my-run", commit), wanted)
    downloaded = snapshot_download("ann/my-run", revision="checkpoints", local_dir=tmp_path / "downloaded")
    ViTCLSForImageClassification.from_pretrained(downloaded)
    ViTCLSImageProcessor.from_pretrained(downloaded)
    assert not (folder / ".hub-checkpoint").exists()
    assert are_progress_bars_disabled() == had_none


def test_pushing_checkpoints_does_not_change_the_run(
    hub: LocalHub, tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each upload is finished before the next one is due. The branch contains only the last checkpoint."""
    flags = f"{RUN} --ema-decay 0.9 --drop-path-rate 0.2"
    assert script("finetune.py", flags, "--output-dir", tmp_path / "alone").status == 0
    start_push = branch_uploads.BranchUploader.start_push

    def push_and_wait(uploader: branch_uploads.BranchUploader, step: int) -> None:
        start_push(uploader, step)
        assert uploader.thread is not None and uploader.thread.daemon  # does not delay the end of the process
        uploader.thread.join()

    monkeypatch.setattr(branch_uploads.BranchUploader, "start_push", push_and_wait)
    pushing = "--push-to-hub --no-hub-verify --hub-checkpoint-every 2 --hub-push-optimizer".split()
    ended = script("finetune.py", flags, "--output-dir", tmp_path / "pushed", *pushing)
    assert ended.status == 0 and not ended.lines("WARNING")
    assert [line.split(",")[0] for line in ended.lines("pushed    step")] == [
        f"pushed    step {step} to the branch checkpoints" for step in (2, 4)
    ]
    assert_same(load_file(tmp_path / "pushed" / WEIGHTS), load_file(tmp_path / "alone" / WEIGHTS))
    files = ("ema", "model", "optimizer")
    state = {f"checkpoints/step-00000004/{name}.safetensors" for name in files}
    found = {name for name in hub.files("ann/pushed", "checkpoints") if name.startswith("checkpoints/")}
    assert found == state | {"checkpoints/step-00000004/state.json"}
    assert "--resume" in hub.read("ann/pushed", "README.md", "checkpoints").decode()


def test_lora_weights_are_merged_on_the_branch(hub: LocalHub, tmp_path: Path, script: Any) -> None:
    """The license of the base model is copied."""
    assert script("finetune.py", RUN, "--output-dir", tmp_path / "base").status == 0
    terms = "---\nlicense: other\nlicense_name: terms\nlicense_link: LICENSE.md\n---\n"
    (tmp_path / "base" / "README.md").write_text(terms)
    (tmp_path / "base" / "LICENSE.md").write_text("The terms.")
    flags = f"{RUN} --model {tmp_path / 'base'} --trainable lora --lora-rank 2 --learning-rate 0.1"
    pushing = "--push-to-hub --no-hub-verify --hub-checkpoint-every 3 --keep-checkpoints 9".split()
    assert script("finetune.py", flags, "--output-dir", tmp_path / "lora", *pushing).status == 0
    assert terms.splitlines()[1] in hub.read("ann/lora", "README.md", "checkpoints").decode()
    assert hub.read("ann/lora", "LICENSE.md", "checkpoints") == b"The terms."
    found = get_stored_weights(hub, "ann/lora", "checkpoints")
    state = load_file(tmp_path / "lora" / "checkpoints" / "step-00000003" / WEIGHTS)
    assert found.keys() == load_file(tmp_path / "base" / WEIGHTS).keys()
    layer = "vitcls.layers.0.attention.q_proj"
    added = state[f"{layer}.lora_B.default.weight"] @ state[f"{layer}.lora_A.default.weight"]
    assert added.abs().max() > 0
    torch.testing.assert_close(found[f"{layer}.weight"], state[f"{layer}.base_layer.weight"] + added)


def test_pretraining_also_pushes_its_checkpoints(hub: LocalHub, tmp_path: Path, script: Any) -> None:
    flags = "--push-to-hub --no-hub-verify --hub-checkpoint-every 4 --hub-checkpoint-branch way/there"
    ended = script("pretrain.py", RUN, "--output-dir", tmp_path / "my-run", *flags.split())
    assert ended.status == 0, ended.err
    assert set(hub.repositories["ann/my-run"].branches) == {"main", "way/there"}
    card = hub.read("ann/my-run", "README.md", "way/there").decode()
    assert "AutoModelForMaskedImageModeling" in card and 'revision="way/there"' in card


def release_during_wait(hub: LocalHub) -> None:
    """Release the requests that the Hub holds once the run only waits for its upload."""
    main_thread = threading.main_thread().ident

    def watch() -> None:
        while not hub.released.is_set():
            stack = traceback.extract_stack(sys._current_frames()[main_thread])
            if any(frame.name == "wait_for_upload" and frame.filename == branch_uploads.__file__ for frame in stack):
                hub.released.set()
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()


def test_uploads_are_sequential_and_the_run_waits_for_the_last(hub: LocalHub, tmp_path: Path, script: Any) -> None:
    hub.fail("POST", "/commit/checkpoints", "hold")
    release_during_wait(hub)
    flags = "--push-to-hub --no-hub-verify --hub-checkpoint-every 1"
    ended = script("finetune.py", RUN, "--output-dir", tmp_path / "my-run", *flags.split())
    assert ended.status == 0
    skipped = ended.lines("WARNING: ")
    assert len(skipped) == 1 and "step 2 is not pushed, because the upload of step 1 is still running" in skipped[0]
    lines = ended.out.splitlines()
    waiting = next(index for index, line in enumerate(lines) if line.startswith("waiting   for the upload of step 1"))
    assert lines[waiting - 1].startswith("step 6/6")
    assert lines[waiting + 1].startswith("pushed    step 1 to the branch checkpoints")
    assert not ended.err  # no progress bars and no warnings of the client


@pytest.mark.parametrize("status", [403, 500])
def test_a_failed_upload_prints_one_line(hub: LocalHub, tmp_path: Path, script: Any, status: int) -> None:
    hub.fail("POST", "/branch/", status, times=4)
    flags = "--push-to-hub --no-hub-verify --hub-checkpoint-every 5"
    ended = script("finetune.py", RUN, "--output-dir", tmp_path / "my-run", *flags.split())
    assert ended.status == 0 and "trying again" not in ended.err
    (warning,) = ended.lines("WARNING: ")
    assert f"step 5 was not pushed to the branch checkpoints: HTTP {status}" in warning
    assert "vitcls push" not in warning  # which could not finish this upload
    assert set(hub.repositories["ann/my-run"].branches) == {"main"}
    assert WEIGHTS in hub.files("ann/my-run")


def test_a_folder_that_cannot_be_written_prints_one_line(hub: LocalHub, tmp_path: Path, script: Any) -> None:
    folder = tmp_path / "my-run"
    folder.mkdir()
    (folder / ".hub-checkpoint").write_text("in the way")
    flags = "--push-to-hub --no-hub-verify --hub-checkpoint-every 5"
    ended = script("finetune.py", RUN, "--output-dir", folder, *flags.split())
    assert ended.status == 0
    (warning,) = ended.lines("WARNING: ")
    assert "step 5 is not pushed, because the model cannot be written" in warning


def test_a_dry_run_pushes_nothing(hub: LocalHub, tmp_path: Path, script: Any) -> None:
    flags = "--push-to-hub --hub-checkpoint-every 1 --hub-push-optimizer --dry-run"
    for name in ("finetune.py", "pretrain.py"):
        ended = script(name, RUN, "--output-dir", tmp_path / "my-run", *flags.split())
        assert ended.status == 0 and "pushing to ann/my-run is permitted" in ended.out
    assert not hub.repositories and {method for method, _ in hub.requests} == {"GET"}
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}


# Signals -------------------------------------------------------------------------------------------------------------


def stop_at(step: int, folder: Path) -> None:
    """Send SIGTERM to this process when the run has logged a step."""

    def watch() -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            file = folder / "metrics.jsonl"
            if file.exists() and file.read_text(encoding="utf-8").count("\n") >= step:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.001)

    threading.Thread(target=watch, daemon=True).start()


LONG = f"{TINY} --max-steps 100000 --batch-size 16 --log-every 1 --save-every 100000"


def test_a_signal_waits_for_the_upload(hub: LocalHub, tmp_path: Path, script: Any) -> None:
    hub.fail("POST", "/commit/checkpoints", "hold")
    release_during_wait(hub)
    stop_at(3, tmp_path / "my-run")
    flags = "--push-to-hub --hub-checkpoint-every 2"
    ended = script("finetune.py", LONG, "--output-dir", tmp_path / "my-run", *flags.split())
    assert ended.status == 143 and "a checkpoint was saved. Repeat the command with --resume" in ended.err
    assert "waiting   for the upload of step 2, up to 20 s" in ended.out
    assert (
        hub.repositories["ann/my-run"].commits[hub.repositories["ann/my-run"].branches["checkpoints"]].message
        == "Step 2"
    )
    assert set(hub.files("ann/my-run")) == {".gitattributes"}
    assert not (tmp_path / "my-run" / ".hub-checkpoint").exists()


def test_a_signal_does_not_wait_longer_than_the_limit(
    hub: LocalHub, tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch_uploads, "UPLOAD_TIMEOUT_AFTER_SIGNAL", 0.2)
    monkeypatch.setattr(publish, "TIMEOUT", 1.0)
    hub.fail("POST", "/commit/checkpoints", "wait", times=9)
    stop_at(3, tmp_path / "my-run")
    flags = "--push-to-hub --hub-checkpoint-every 2"
    ended = script("finetune.py", LONG, "--output-dir", tmp_path / "my-run", *flags.split())
    assert ended.status == 143
    assert "WARNING: the upload of step 2 to the branch checkpoints did not finish in time" in ended.out
    assert not (tmp_path / "my-run" / ".hub-checkpoint").exists()


# Resume on another machine -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_user_resumes_from_the_branch(
    hub: LocalHub, tmp_path: Path, script: Any, capsys: pytest.CaptureFixture
) -> None:
    """Use the commands in the branch's card. The published recipe and state contain no paths of the first machine."""
    whole = tmp_path / "home of ann" / "my-run"
    flags = f"{RUN} --ema-decay 0.9 --drop-path-rate 0.2"
    pushing = "--push-to-hub --no-hub-verify --hub-checkpoint-every 4 --hub-push-optimizer"
    assert script("finetune.py", flags, *pushing.split(), "--output-dir", whole).status == 0
    card = hub.read("ann/my-run", "README.md", "checkpoints").decode()
    assert "hf download ann/my-run --revision checkpoints --local-dir runs/mine" in card
    command = re.search(r"accelerate launch -m modeling_vitcls.cli finetune (.*)", card)
    assert command is not None

    mine = tmp_path / "mine"
    HfApi().snapshot_download("ann/my-run", revision="checkpoints", local_dir=mine)
    assert sorted(path.name for path in (mine / "checkpoints" / "step-00000004").iterdir()) == [
        "ema.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    for name in ("checkpoints/step-00000004/state.json", "config.resolved.yaml"):
        text = (mine / name).read_text()
        assert "home of ann" not in text
    assert not [flag for flag in yaml.safe_load((mine / "config.resolved.yaml").read_text()) if "hub" in flag]
    (mine / ".hub-checkpoint" / "left by a killed run").mkdir(parents=True)
    pushing = "--push-to-hub --no-hub-verify --hub-model-id second --hub-checkpoint-every 5"
    ended = script("finetune.py", f"{command[1]} {pushing}".replace("runs/mine", str(mine)))
    assert ended.status == 0, ended.err
    assert "resumed   after step 4 of 6" in ended.out
    second = hub.repositories["ann/second"]
    assert second.commits[second.branches["checkpoints"]].message == "Step 5"
    assert not (mine / ".hub-checkpoint").exists()
    assert_same(load_file(mine / WEIGHTS), load_file(whole / WEIGHTS))


def test_the_optimizer_state_is_published_by_flag(hub: LocalHub, tmp_path: Path, script: Any) -> None:
    """The run publishes it, then push_to_hub.py. A push without the flag removes it."""
    folder = tmp_path / "my-run"
    flags = "--push-to-hub --no-hub-verify --hub-push-optimizer"
    assert script("finetune.py", RUN, "--output-dir", folder, *flags.split()).status == 0
    state = {f"checkpoints/step-00000006/{name}" for name in (WEIGHTS, "optimizer.safetensors", "state.json")}
    assert {name for name in hub.files("ann/my-run") if name.startswith("checkpoints")} == state
    assert hub.files("ann/my-run")["checkpoints/step-00000006/optimizer.safetensors"].is_lfs
    assert script("push_to_hub.py", f"--model {folder} --no-verify").status == 0
    assert not state & set(hub.files("ann/my-run"))
    assert script("push_to_hub.py", f"--model {folder} --no-verify --push-optimizer").status == 0
    HfApi().snapshot_download("ann/my-run", allow_patterns="checkpoints/*", local_dir=tmp_path / "mine")
    ended = script("finetune.py", RUN, "--output-dir", tmp_path / "mine", "--resume")
    assert ended.status == 0 and "resumed   after step 6 of 6" in ended.out
    assert_same(load_file(tmp_path / "mine" / WEIGHTS), load_file(folder / WEIGHTS))


# Two processes -------------------------------------------------------------------------------------------------------


def run_as(rank: int, port: int, url: str, folder: Path, flags: str, fsdp: bool) -> None:
    """Run one of two processes with the Hub at `url`. Its output is written to FOLDER.RANK.log."""
    log = folder.with_name(f"{folder.name}.{rank}.log")
    point_client_at(url, "hf_ann", pytest.MonkeyPatch(), folder.with_name("home"))
    several = get_rank_variables(rank, 2, port)
    if fsdp:
        several |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        }
    run_script("finetune.py", ["--output-dir", str(folder), *flags.split()], log, log, several)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["fsdp2", "ddp"])
def test_two_processes_push_and_verify_once(hub: LocalHub, tmp_path: Path, fsdp: bool) -> None:
    """All processes gather the weights, which are sharded with FSDP. The second waits while the first verifies."""
    folder, port = tmp_path / "my-run", find_free_port()
    flags = f"{RUN} --ema-decay 0.9 --keep-checkpoints 9 --push-to-hub --hub-checkpoint-every 3 --hub-push-optimizer"
    started = [READY.Process(target=run_as, args=(rank, port, hub.url, folder, flags, fsdp)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join(timeout=SECONDS)
    first, second = (folder.with_name(f"my-run.{rank}.log").read_text() for rank in range(2))
    assert [process.exitcode for process in started] == [0, 0], first + second
    assert not second
    commit = hub.repositories["ann/my-run"].branches["main"]
    assert f"verified: ann/my-run at {commit}" in first
    assert len(hub.repositories["ann/my-run"].commits) == 3
    checkpoint = folder / "checkpoints" / "step-00000003"
    wanted = load_file(checkpoint / WEIGHTS) | load_file(checkpoint / "ema.safetensors")
    assert_same(get_stored_weights(hub, "ann/my-run", "checkpoints"), wanted)
    config = json.loads(hub.read("ann/my-run", "config.json", "checkpoints"))
    assert config == json.loads(hub.read("ann/my-run", "config.json"))
    assert config["architectures"] == ["ViTCLSForImageClassification"]
    for name in (WEIGHTS, "optimizer.safetensors", "ema.safetensors"):
        published = hub.read("ann/my-run", f"checkpoints/step-00000003/{name}", "checkpoints")
        assert published == (checkpoint / name).read_bytes(), name
