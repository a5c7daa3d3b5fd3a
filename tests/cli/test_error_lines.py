"""Commands that end with one line: damaged model folders, limits of the system, and Ctrl-C."""

import errno
import io
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.command_in_process import fail, run_here
from helpers.photo_folders import write_photos
from helpers.tiny_models import edit_config, save_classifier
from pytest import CaptureFixture, MonkeyPatch
from transformers import PreTrainedModel, ViTConfig

from modeling_vitcls.runtime import files
from modeling_vitcls.runtime.files import read_json


pytestmark = pytest.mark.usefixtures("place")

PREDICT = "predict --model model photos".split()
FINETUNE = "finetune --model vitcls-tiny --dataset photos --output-dir run".split()
NOBODY = 65534  # the user of Linux without permissions
CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"
INDEX = "model.safetensors.index.json"
NAN, INF = float("nan"), float("inf")
WEIGHT_MAPS = ["x", ["model.safetensors"], {"a": 3}, {"a": "../x.safetensors"}, None]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Yield a folder that every user can reach."""
    path = Path(tempfile.mkdtemp())
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize(
    ("name", "values", "word"),
    [
        (CONFIG, {"id2label": None}, "config.json"),
        (CONFIG, {"id2label": True}, "id2label"),
        (CONFIG, {"architectures": 5}, "architectures"),
        (CONFIG, {"dtype": "evil"}, "dtype"),
        *((CONFIG, {"distance_threshold": value}, "distance_threshold") for value in (NAN, INF)),
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
        # too deep
        (CONFIG, '{"a": ' * 100_000, "config.json"),
        (CONFIG, "[]", "config.json"),
        (CONFIG, "{}", "is not a vitcls model"),
        (CONFIG, '{"model_type": "vitcls", "a": ' + "[" * 50_000, "config.json"),
        (PROCESSOR, {"image_std": "x"}, "preprocessor_config.json"),
        (PROCESSOR, {"crop_rounding": []}, "preprocessor_config.json"),
        (PROCESSOR, {"preprocess": "x"}, "preprocess"),
        (PROCESSOR, {"size": {"height": 10_000, "width": 10_000}}, "4,096 pixels"),
        (PROCESSOR, {"size": {"shortest_edge": 10**6}}, "4,096 pixels"),
        (PROCESSOR, {"do_pad": True, "pad_size": {"height": 10**6, "width": 9}}, "4,096 pixels"),
        (PROCESSOR, "[]", "preprocessor_config.json"),
        ("results.json", {"settings_sha256": 5}, "settings_sha256"),
        *((INDEX, {"metadata": {}, "weight_map": value}, "weight_map") for value in WEIGHT_MAPS),
    ],
)
def test_a_wrong_value_in_a_file_of_the_model_is_named(
    name: str, values: dict[str, Any] | str, word: str
) -> None:
    """`values` replace some of the file, or its text."""
    file = Path("model", name)
    if name == INDEX:
        Path("model/model.safetensors").rename("x.safetensors")
    if isinstance(values, dict):
        saved = read_json(file) if file.exists() else {}
        values = json.dumps(saved | values)
    file.write_text(values)
    error = fail(*PREDICT)
    assert word in error
    assert error.rstrip("\n").isprintable()


def test_a_list_of_training_images_that_no_memory_holds_is_not_read(
    monkeypatch: MonkeyPatch,
) -> None:
    rows = {"key": [1, 2, 3], "split": ["train"] * 3, "task": [""] * 3}
    pandas.DataFrame(rows).to_parquet("model/splits.parquet")
    for name in ("MAX_ROWS", "MAX_BYTES"):
        with monkeypatch.context() as patch:
            patch.setattr(files, name, 2)
            assert "splits.parquet: it has 3 rows" in fail(*PREDICT)


@pytest.mark.parametrize(
    ("file", "columns", "command"),
    [
        ("model/splits.parquet", ["split", "task"], PREDICT),
        ("train.parquet", ["image", "label"], [*FINETUNE, "--dataset", "train.parquet"]),
    ],
)
def test_a_table_is_bounded_by_its_texts_in_memory_before_a_copy_is_written(
    file: str, columns: list[str], command: list[str]
) -> None:
    """The file stores a long text once, and its rows as numbers of a few bits."""
    numbers = np.zeros(3_000_000, np.int32)
    texts = pa.DictionaryArray.from_arrays(numbers, ["x" * 1000])
    table = pa.table({"key": numbers.astype(np.uint64)} | dict.fromkeys(columns, texts))
    pq.write_table(table, file, compression="zstd")
    assert Path(file).stat().st_size < 1e6
    error = fail(*command)
    assert f"{Path(file).name}: it has 3,000,000 rows, which take more than 2,1" in error


def test_weights_of_another_shape_take_no_memory(monkeypatch: MonkeyPatch) -> None:
    edit_config(Path("model"), hidden_size=60_000)
    loads = Mock()
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", loads)
    error = fail(*PREDICT)
    assert "config.json of model is of a model with" in error
    assert not loads.called


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="requires named pipes")
@pytest.mark.usefixtures("time_limit")
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "recipe.yaml"])
def test_a_named_pipe_instead_of_a_file_is_an_error(name: str) -> None:
    """Reading it would wait for ever."""
    file = Path("model", name)
    file.unlink(missing_ok=True)
    os.mkfifo(file)
    is_recipe = name == "recipe.yaml"
    flags = ["--config", file] if is_recipe else ["--model", "model"]
    error = fail(*FINETUNE, *flags, status=2 if is_recipe else 1)
    assert f"{name} is not a regular file" in error


@pytest.mark.slow
@pytest.mark.usefixtures("time_limit")
def test_a_million_labels_in_the_configuration_are_counted_before_they_are_checked() -> None:
    edit_config(Path("model"), id2label={str(number): f"class {number}" for number in range(10**6)})
    assert "config.json of model has 1,000,000 labels, but the heads" in fail(*PREDICT)


@pytest.mark.parametrize(
    ("command", "flag", "name"),
    [
        ("evaluate", "--output", "model/config.json"),
        ("evaluate", "--per-image", "model/predictions.parquet"),
        ("predict", "--output", "model/results.json"),
        ("evaluate", "--output", "link.json"),
        ("predict", "--output", "pipe.parquet"),
        ("evaluate", "--per-image", "pipe.parquet"),
        ("evaluate", "--per-image", "/dev/stdout"),  # a link, which a file would replace
    ],
)
def test_outputs_replace_no_file_of_a_model_no_link_and_no_device(
    command: str, flag: str, name: str
) -> None:
    """A pipe stands for /dev/null, which the superuser would replace with a file."""
    os.mkfifo("pipe.parquet")
    Path("link.json").symlink_to("other.json")
    Path("other.json").touch()
    before = Path("model/config.json").read_bytes()
    error = fail(*f"{command} --model model --dataset photos {flag} {name}".split(), status=2)
    assert flag in error
    assert name in error
    assert Path("model/config.json").read_bytes() == before
    assert Path("pipe.parquet").is_fifo()


@pytest.mark.parametrize("flags", [["--dataset", ""], ["--dataset="], ["--output-dir", " "]])
def test_an_empty_value_is_an_error_and_not_the_current_folder(flags: list[str]) -> None:
    """It comes from a shell variable that is not set."""
    error = fail("finetune", "--model", "model", *flags, status=2)
    assert "is empty" in error
    assert flags[0] in error


def test_a_rank_without_a_launcher_hides_no_error(monkeypatch: MonkeyPatch) -> None:
    """Managers of clusters set RANK in each container; the command is still the only process."""
    monkeypatch.setenv("RANK", "1")
    assert "runs/absent" in fail("predict", "--model", "runs/absent", "photos")


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "WORLD_SIZE"])
def test_variables_left_by_a_launcher_start_no_processes(
    name: str, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "3")
    assert run_here(*PREDICT) == 0


def test_a_working_folder_that_was_removed_is_named(place: Path, monkeypatch: MonkeyPatch) -> None:
    Path("gone").mkdir()
    monkeypatch.chdir("gone")
    (place / "gone").rmdir()
    assert "working folder was removed" in fail(
        "predict", "--model", place / "model", place / "photos"
    )


def test_an_output_folder_whose_disk_is_gone_is_named(place: Path) -> None:
    Path("run").symlink_to(place / "disk")
    assert f"link to {place / 'disk'}, which does not exist" in fail(*FINETUNE)


def test_names_that_the_terminal_cannot_encode_are_escaped(monkeypatch: MonkeyPatch) -> None:
    Path("photos/cat/0.png").rename("photos/été.png")
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, "ascii"))
    assert run_here("predict", "--model", "model", "photos/été.png") == 0
    sys.stdout.flush()
    assert b"\\xe9t\\xe9.png" in content.getvalue()


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
        ("photos/cat/0.png", "predict --model model photos/cat/0.png"),
        ("weights.pth", "convert timm:test_vit@weights.pth out"),
    ],
)
def test_a_pointer_of_git_lfs_is_named_with_the_command_that_replaces_it(
    file: str, command: str, capsys: CaptureFixture
) -> None:
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
@pytest.mark.parametrize(
    "command", ["predict --model vit photos", "evaluate --model model --dataset table.parquet"]
)
def test_a_cache_that_cannot_be_written_to_is_named_by_its_variable(
    command: str, monkeypatch: MonkeyPatch
) -> None:
    """As in a container with the home folder of another user."""
    home = "/sys/kernel/.cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", home)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"{home}/hub")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", f"{home}/datasets")
    ViTConfig().save_pretrained("vit")
    table = pandas.DataFrame({"image": ["photos/cat/0.png"], "label": ["cat"]})
    table.to_parquet("table.parquet")
    assert "Set HF_HOME to a folder that can be written to" in fail(*command.split())


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="Windows has other permissions")
def test_weights_without_read_permission_are_not_called_missing(open_folder: Path) -> None:
    folder = save_classifier(open_folder / "model")
    photos = write_photos(open_folder / "photos", range(1))
    (folder / "model.safetensors").chmod(0)

    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(NOBODY)
    try:
        error = fail("predict", "--model", folder, photos)
    finally:
        if is_root:
            os.seteuid(0)

    assert "Permission denied" in error
    assert "model.safetensors" in error
    assert "Errno" not in error


@pytest.mark.parametrize("command", [[*PREDICT, "--output", "rows.csv"], FINETUNE])
def test_a_folder_that_cannot_be_read_is_not_left_out(
    command: list[str], monkeypatch: MonkeyPatch
) -> None:
    """The superuser could read it, so that reading is replaced."""
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name == "dog":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "cannot read the folder" in fail(*command)
    assert not any(Path(name).exists() for name in ("rows.csv", "run/model.safetensors"))


def test_a_limit_of_threads_is_named(capfd: CaptureFixture, monkeypatch: MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        # what Python raises at the limit of `ulimit -u`
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", refuse)
    assert run_here(*PREDICT) == 1
    assert "ulimit -u" in capfd.readouterr().err


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_prediction_ends_with_one_line(
    capsys: CaptureFixture, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr("modeling_vitcls.inference.predictor.prepare_image", interrupt)
    capsys.readouterr()
    assert run_here(*PREDICT) == 128 + signal.SIGINT
    error = capsys.readouterr().err
    assert error == "interrupted by Ctrl-C. To start again or go on, repeat the command\n"


def test_a_frozen_run_that_is_interrupted_starts_again_with_the_same_command(
    monkeypatch: MonkeyPatch,
) -> None:
    flags = [*"--model model --trainable head".split(), "--no-report"]
    with monkeypatch.context() as patch:
        patch.setattr("modeling_vitcls.frozen.linear_probe.LinearProbe.fit", interrupt)
        assert run_here(*FINETUNE, *flags) == 128 + signal.SIGINT
    assert run_here(*FINETUNE, *flags) == 0


def test_a_dataset_without_images_is_an_error_before_anything_is_written() -> None:
    Path("empty").mkdir()
    assert "contains no images" in fail(*FINETUNE, "--dataset", "empty")
    assert not Path("run").exists()
