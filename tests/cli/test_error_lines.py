"""Commands that end with one line: damaged model folders, limits of the system, and Ctrl-C."""

import errno
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
from helpers.command_in_process import run_here
from helpers.photo_folders import write_photos
from helpers.tiny_models import save_classifier
from transformers import ViTConfig

from modeling_vitcls.runtime import files


pytestmark = pytest.mark.usefixtures("fresh_accelerate")

NOBODY = 65534  # the user of Linux without permissions


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of two photographs."""
    return write_photos(tmp_path / "photos", range(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the folder of a classifier."""
    return save_classifier(tmp_path / "model")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Yield a folder that every user can reach."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"


@pytest.mark.parametrize(
    ("name", "values", "word"),
    [
        (CONFIG, {"id2label": None}, "config.json"),
        (CONFIG, {"id2label": True}, "id2label"),
        (CONFIG, {"architectures": 5}, "architectures"),
        (CONFIG, {"image_size": 10**9}, "image_size"),
        (CONFIG, {"dtype": "evil"}, "dtype"),
        (CONFIG, {"num_hidden_layers": []}, "num_hidden_layers"),
        (CONFIG, {"num_hidden_layers": 10_000}, "num_hidden_layers"),
        # of another model
        (CONFIG, {"id2label": dict(enumerate("abcde")), "label2id": None}, "classifier"),
        # names of the class, whose methods and properties they would replace
        (CONFIG, {"validate": "x"}, "validate"),
        (CONFIG, {"to_dict": None}, "to_dict"),
        (CONFIG, {"token_layout": [1]}, "token_layout"),
        (CONFIG, {"_skip_validation": True}, "_skip_validation"),
        # a code that a terminal runs
        (CONFIG, {"pooling": "\x1b[31mRED"}, "'pooling'"),
        (CONFIG, {"hidden_act": "\x1b[31mRED"}, "'hidden_act'"),
        (PROCESSOR, {"image_std": "x"}, "preprocessor_config.json"),
        (PROCESSOR, {"crop_rounding": []}, "preprocessor_config.json"),
        (PROCESSOR, {"preprocess": "x"}, "preprocess"),
        (PROCESSOR, {"size": {"height": 200_000, "width": 200_000}}, "10,000 pixels"),
        (PROCESSOR, {"size": {"shortest_edge": 10**6}}, "10,000 pixels"),
        (PROCESSOR, {"do_pad": True, "pad_size": {"height": 10**6, "width": 9}}, "10,000 pixels"),
        ("results.json", {"settings_sha256": 5}, "settings_sha256"),
    ],
)
def test_a_wrong_value_in_a_file_of_the_model_is_named(
    name: str,
    values: dict[str, Any],
    word: str,
    folder: Path,
    photos: Path,
    run_with_error: Callable[..., str],
) -> None:
    file = folder / name
    saved = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(saved | values))
    error = run_with_error("predict", "--model", folder, photos)
    assert word in error
    assert error.rstrip("\n").isprintable()


def test_a_device_that_another_machine_had_is_not_used(folder: Path, photos: Path) -> None:
    file = folder / PROCESSOR
    file.write_text(json.dumps(json.loads(file.read_text()) | {"device": "cuda:9"}))
    assert run_here("predict", "--model", folder, photos) == 0


def test_a_list_of_training_images_that_no_memory_holds_is_not_read(
    folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, run_with_error: Callable[..., str]
) -> None:
    rows = {"key": [1, 2, 3], "split": ["train"] * 3, "task": [""] * 3}
    pandas.DataFrame(rows).to_parquet(folder / "splits.parquet")
    for name in ("MAX_ROWS", "MAX_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(files, name, 2)
            assert "splits.parquet: it has 3 rows" in run_with_error(
                "predict", "--model", folder, photos
            )


@pytest.fixture
def time_limit() -> Iterator[None]:
    """End the tests instead of a wait without end."""
    signal.alarm(300)
    yield
    signal.alarm(0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="requires named pipes")
@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "recipe.yaml"])
def test_a_named_pipe_instead_of_a_file_is_an_error(
    name: str, folder: Path, photos: Path, run_with_error: Callable[..., str]
) -> None:
    """Reading it would wait for ever."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    write_photos(photos, range(4))
    command = ["finetune", "--model", folder, "--dataset", photos, "--output-dir", folder / "run"]
    flags = {"recipe.yaml": ["--config", folder / name]}
    status = 2 if name == "recipe.yaml" else 1
    assert name in run_with_error(*command, *flags.get(name, []), status=status)


@pytest.mark.parametrize(
    ("command", "flag", "name"),
    [
        ("evaluate", "--output", "model/config.json"),
        ("evaluate", "--per-image", "model/predictions.parquet"),
        ("predict", "--output", "model/results.json"),
        ("evaluate", "--output", "photos"),
        ("predict", "--output", "pipe"),
        ("evaluate", "--per-image", "pipe"),
    ],
)
def test_outputs_replace_no_file_of_a_model_no_folder_and_no_device(
    command: str,
    flag: str,
    name: str,
    folder: Path,
    photos: Path,
    tmp_path: Path,
    run_with_error: Callable[..., str],
) -> None:
    """A pipe stands for /dev/null, which the superuser would replace with a file."""
    os.mkfifo(tmp_path / "pipe")
    before = (folder / "config.json").read_bytes()
    error = run_with_error(
        *(command, "--model", folder, "--dataset", photos, flag, tmp_path / name), status=2
    )
    assert flag in error
    assert str(tmp_path / name) in error
    assert (folder / "config.json").read_bytes() == before
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("flags", [["--dataset", ""], ["--dataset="], ["--output-dir", " "]])
def test_an_empty_value_is_an_error_and_not_the_current_folder(
    flags: list[str], folder: Path, run_with_error: Callable[..., str]
) -> None:
    """It comes from a shell variable that is not set."""
    error = run_with_error("finetune", "--model", folder, *flags, status=2)
    assert "is empty" in error
    assert flags[0] in error


def test_a_rank_without_a_launcher_hides_no_error(
    photos: Path, monkeypatch: pytest.MonkeyPatch, run_with_error: Callable[..., str]
) -> None:
    """Managers of clusters set RANK in each container; the command is still the only process."""
    monkeypatch.setenv("RANK", "1")
    assert "runs/absent" in run_with_error("predict", "--model", "runs/absent", photos)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE"])
def test_variables_left_by_a_launcher_start_no_processes(
    name: str, folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "3")
    assert run_here("predict", "--model", folder, photos) == 0


def test_a_working_folder_that_was_removed_is_named(
    folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    (folder / "gone").rmdir()
    assert run_here("predict", "--model", folder, photos) == 1
    error = capsys.readouterr().err
    assert "working folder was removed" in error
    assert error.count("\n") == 1


def test_an_output_folder_whose_disk_is_gone_is_named(
    photos: Path, tmp_path: Path, run_with_error: Callable[..., str]
) -> None:
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    flags = ["--model", "vitcls-tiny", "--dataset", photos, "--output-dir", tmp_path / "runs/a"]
    assert f"link to {tmp_path / 'disk'}, which does not exist" in run_with_error(
        "finetune", *flags
    )


def test_names_that_the_terminal_cannot_encode_are_escaped(
    folder: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "cat" / "0.png").rename(photos / "été.png")
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "ascii"))
    assert run_here("predict", "--model", folder, photos / "été.png") == 0
    sys.stdout.flush()
    assert b"\\xe9t\\xe9.png" in content.getvalue()


@pytest.mark.parametrize(
    "text", ['{"a": ' * 100_000, '{"model_type": "vitcls", "a": ' + "[" * 50_000]
)
def test_a_deeply_nested_configuration_is_an_error(
    text: str, folder: Path, photos: Path, run_with_error: Callable[..., str]
) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in run_with_error("predict", "--model", folder, photos)


@pytest.mark.parametrize(
    "weight_map", ["x", ["model.safetensors"], {"a": 3}, {"a": "../x.safetensors"}, None]
)
def test_a_malformed_index_of_the_weights_is_an_error(
    weight_map: Any, folder: Path, photos: Path, run_with_error: Callable[..., str]
) -> None:
    (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    assert "weight_map" in run_with_error("predict", "--model", folder, photos)


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("model/model.safetensors", "predict --model model photos"),
        ("vit/pytorch_model.bin", "predict --model vit photos"),
        ("model/config.json", "predict --model model photos"),
        ("vit/config.json", "predict --model vit photos"),
        ("deit.pth", "convert deit.pth out --family deit"),
        ("table.parquet", "evaluate --model model --dataset table.parquet"),
        ("table.csv", "evaluate --model model --dataset table.csv"),
        ("photos/metadata.parquet", "evaluate --model model --dataset photos"),
        ("photos/cat/0.png", "predict --model model photos/cat"),
        (
            "weights.pth",
            "finetune --model vitcls-tiny --dataset digits --output-dir out "
            "--teacher timm:resnet18@weights.pth",
        ),
    ],
)
def test_a_pointer_of_git_lfs_is_named_with_the_command_that_replaces_it(
    file: str,
    command: str,
    folder: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder.parent)
    ViTConfig().save_pretrained("vit")
    digest = "0" * 64
    Path(file).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize 12345\n"
    )
    assert run_here(*command.split()) == 1
    printed = "".join(capsys.readouterr())
    assert f"{file} is a pointer of Git LFS" in printed
    assert "git lfs pull" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that root cannot write to")
@pytest.mark.parametrize("kind", ["conversion", "table"])
def test_a_cache_that_cannot_be_written_to_is_named_by_its_variable(
    kind: str,
    folder: Path,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_with_error: Callable[..., str],
) -> None:
    """As in a container with the home folder of another user."""
    home = "/sys/kernel/.cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", home)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"{home}/hub")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", f"{home}/datasets")
    monkeypatch.chdir(folder.parent)
    ViTConfig().save_pretrained("vit")
    table = pandas.DataFrame({"image": [str(photos / "cat/0.png")], "label": ["cat"]})
    table.to_parquet("table.parquet")
    command = {
        "conversion": "predict --model vit photos",
        "table": "evaluate --model model --dataset table.parquet",
    }
    assert "Set HF_HOME to a folder that can be written to" in run_with_error(
        *command[kind].split()
    )


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has other permissions")
def test_weights_without_read_permission_are_not_called_missing(
    open_folder: Path, run_with_error: Callable[..., str]
) -> None:
    folder = save_classifier(open_folder / "model")
    photos = write_photos(open_folder / "photos", range(1))
    (folder / "model.safetensors").chmod(0)

    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        error = run_with_error("predict", "--model", folder, photos)
    finally:
        if is_root:
            os.seteuid(0)

    assert "Permission denied" in error
    assert "model.safetensors" in error
    assert "Errno" not in error


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "command",
    [
        "predict --model model photos --output rows.csv",
        "finetune --model vitcls-tiny --dataset photos --output-dir run",
    ],
)
def test_a_folder_that_cannot_be_read_is_not_left_out(
    command: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_with_error: Callable[..., str],
) -> None:
    """The superuser could read it, so that reading is replaced."""
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "dog":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.chdir(photos.parent)
    monkeypatch.setattr(os, "scandir", refuse)
    assert "cannot read the folder" in run_with_error(*command.split())
    assert not any(Path(name).exists() for name in ("rows.csv", "run/model.safetensors"))


def test_a_limit_of_threads_is_named(
    folder: Path,
    photos: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        # what Python raises at the limit of `ulimit -u`
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    assert run_here("predict", "--model", folder, photos) == 1
    assert "ulimit -u" in capfd.readouterr().err


def test_an_interrupted_prediction_ends_with_one_line(
    folder: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("modeling_vitcls.inference.predictor.prepare_image", interrupt)
    capsys.readouterr()
    assert run_here("predict", "--model", folder, photos) == 128 + signal.SIGINT
    error = capsys.readouterr().err
    assert error == "interrupted by Ctrl-C. To start again or go on, repeat the command\n"


def test_a_frozen_run_that_is_interrupted_starts_again_with_the_same_command(
    folder: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_photos(photos, range(8))
    flags = ["--model", str(folder), "--dataset", str(photos), "--trainable", "head"]
    command = ["finetune", *flags, "--output-dir", tmp_path / "run", "--no-report"]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("modeling_vitcls.inference.linear_probe.LinearProbe.fit", interrupt)
        assert run_here(*command) == 128 + signal.SIGINT
    assert run_here(*command) == 0


@pytest.mark.parametrize(
    ("num_photos", "command", "words"),
    [
        (8, "evaluate", ["'cat'", "LABEL_0", "`id2label`"]),
        (0, "finetune --output-dir run", ["contains no images"]),
    ],
)
def test_a_dataset_that_does_not_fit_the_command_is_an_error_before_anything_is_written(
    num_photos: int,
    command: str,
    words: list[str],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "animals").mkdir()
    write_photos(tmp_path / "animals", range(num_photos))
    flags = ["--model", folder, "--dataset", "animals", "--num-workers", "0"]

    assert run_here(*command.split(), *flags) == 1

    error = capsys.readouterr().err.strip().splitlines()[-1]  # libraries print warnings before
    assert all(word in error for word in words)
    assert not list(tmp_path.glob("run/**/model.safetensors"))
