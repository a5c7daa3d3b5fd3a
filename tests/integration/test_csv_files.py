"""CSV files of predictions and audits: spreadsheets run nothing, and no earlier file is lost."""

import csv
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.accelerate_state import reset_accelerate
from helpers.command_in_process import run_here
from helpers.photo_folders import write_photos
from helpers.tiny_models import build_tiny_config, save_with_processor
from helpers.tiny_options import build_tiny_options, prepare_setup

from modeling_vitcls import ViTCLSForImageClassification


pytest.importorskip("cleanlab", reason="cleanlab is in the extras `audit` and `test`")
pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("fresh_accelerate")]

NAMES = ("=1+1", "@SUM(A1)", "-2\n3")
LABELS = {
    "id2label": dict(enumerate(NAMES)),
    "label2id": {name: index for index, name in enumerate(NAMES)},
}
FORMULA_PREFIXES = tuple("=+-@\t\r")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return photographs of classes, and of a file, whose names are harmful in a table."""
    folder = write_photos(tmp_path_factory.mktemp("photos"), range(8), *NAMES)
    (folder / NAMES[0] / "0.png").rename(folder / NAMES[0] / "\x1b[31m.png")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = ViTCLSForImageClassification(build_tiny_config(**LABELS))
    return save_with_processor(model, tmp_path_factory.mktemp("models") / "model")


def audit(model: Path, photos: Path, page: Path, *flags: str) -> int:
    reset_accelerate()
    data = ["--dataset", str(photos), "--held-out-fraction", "0.5", "--num-workers", "0"]
    return run_here("evaluate", "--model", str(model), *data, "--audit", str(page), *flags)


def check_cells(file: Path) -> None:
    """Check that no cell begins like a formula or contains a control character."""
    with file.open(newline="", encoding="utf-8") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert not [cell for cell in cells if cell.startswith(FORMULA_PREFIXES)]
    assert not [cell for cell in cells if any(ord(character) < 32 for character in cell)]
    assert any("=1+1" in cell for cell in cells)
    assert any("\\x1b[31m" in cell for cell in cells)


def test_predictions_contain_no_formulas(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(photos)
    output = tmp_path / "labels.csv"
    assert (
        run_here(
            "predict", "--model", str(model), *NAMES[:2], "--top-k", "3", "--output", str(output)
        )
        == 0
    )
    check_cells(output)


def test_audits_contain_no_formulas_and_exclude_the_images_they_list(
    model: Path, photos: Path, tmp_path: Path
) -> None:
    assert audit(model, photos, tmp_path / "audit.html") == 0

    with (tmp_path / "audit.csv").open(newline="", encoding="utf-8") as stream:
        header, row, *_ = csv.reader(stream)
    values = dict(zip(header, row, strict=True))

    assert values["id"].startswith("'")
    assert values["label"].startswith("'")

    whole = prepare_setup(
        build_tiny_options(tmp_path / "whole", photos, held_out_fraction=0.5)
    ).data.train
    listed = "'" + whole.images.get_names()[0].replace("\n", "\\n").replace("\x1b", "\\x1b")
    (tmp_path / "edited.csv").write_text(f'split,id\ntrain,"{listed}"\n', encoding="utf-8")
    options = build_tiny_options(
        tmp_path / "out", photos, held_out_fraction=0.5, exclude=tmp_path / "edited.csv"
    )

    assert len(prepare_setup(options).data.excluded) == 1


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ({"cat": 1}, None),
        ({"cat": 2, "dog": 2}, "4 of 64 training images. "),
        ({"cat": 16}, "16 of 64 training images. "),
        ({"cat": 17}, "17 of 64 training images, most of those of cat. "),
    ],
)
def test_leaving_out_many_images_or_most_of_a_class_is_a_warning(
    listed: dict[str, int], expected: str | None, tmp_path: Path
) -> None:
    write_photos(tmp_path / "photos" / "train", range(32))
    write_photos(tmp_path / "photos" / "test", range(32, 36))
    table = tmp_path / "audit.csv"
    ids = [
        f"train,train/{name}/{number}.png"
        for name, count in listed.items()
        for number in range(count)
    ]
    table.write_text("\n".join(["split,id", *ids]))
    options = build_tiny_options(tmp_path / "out", tmp_path / "photos", exclude=table)
    loaded = prepare_setup(options)
    warnings = loaded.warnings()
    if expected is None:
        assert warnings == []
    else:
        (warning,) = warnings
        assert expected in warning


def test_an_edited_audit_is_replaced_only_with_overwrite(
    model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "audit.csv"
    table.write_text("split,id\n", encoding="utf-8")
    assert audit(model, photos, tmp_path / "audit.html") == 1
    assert str(table) in capsys.readouterr().err
    assert table.read_text() == "split,id\n"
    assert audit(model, photos, tmp_path / "audit.html", "--overwrite") == 0
    assert table.read_text() != "split,id\n"


@contextmanager
def limited_file_size(num_bytes: int) -> Iterator[None]:
    """Let writing fail, as on a full disk, when a file becomes larger."""
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)


@pytest.mark.parametrize("flag", ["--audit", "--per-image"])
def test_a_full_disk_keeps_the_earlier_file_and_is_named(
    flag: str, model: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / ("audit.html" if flag == "--audit" else "rows.parquet")
    file.write_text("earlier")
    data = ["--dataset", str(photos), "--held-out-fraction", "0.5", "--num-workers", "0"]
    flags = [flag, str(file), *(["--overwrite"] if flag == "--audit" else [])]
    with limited_file_size(1000):
        assert run_here("evaluate", "--model", str(model), *data, *flags) == 1
    printed = capsys.readouterr()
    assert f"cannot write {tmp_path}" in printed.err
    assert printed.err.count("\n") == 1
    assert file.read_text() == "earlier"
