"""Random damaged inputs: a result or a one-line error, in time, and no code is executed.

The examples are the same in every run.
"""

import contextlib
import io
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from helpers.photo_folders import draw_pixels
from helpers.published_weights import build_timm_vit
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_vitcls import ViTCLSConfig, ViTCLSImageProcessor
from modeling_vitcls.conversion.from_state_dict import (
    FAMILIES,
    build_timm_model,
    convert_family_model,
    prepare_weights,
)
from modeling_vitcls.data.dataset import read_dataset
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.inference.stated_result import format_name
from modeling_vitcls.model.image_processing_vitcls import IMAGE_FORMATS


pytestmark = pytest.mark.slow

FORBIDDEN_EVENTS = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "pickle.find_class",
    "socket.connect",
)
watched = []


def watch(event: str, arguments: Any) -> None:
    """Record processes, connections and unpickled classes (an audit hook)."""
    if event in FORBIDDEN_EVENTS:
        watched.append(f"{event}: {arguments}")


sys.addaudithook(watch)


def run_watched(function: Callable[[], Any]) -> Any:
    """Return the result of a function, None if it raises a ValueError of one line.

    It may start, connect to and unpickle nothing. Other errors are raised.
    """
    watched.clear()
    result = None
    try:
        result = function()
    except ValueError as raised:
        assert str(raised), raised
        assert "\n" not in str(raised), raised
    assert not watched, watched
    return result


def examples(number: int) -> Any:
    """Return settings with a number of examples, each of which may take 20 s."""
    return settings(max_examples=number, deadline=20_000, derandomize=True)


NUMBERS = st.one_of(st.integers(), st.sampled_from([10**9, 2**63, 10**30, -1, 0]), st.floats())
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=9)),
    lambda values: st.one_of(
        st.lists(values, max_size=4), st.dictionaries(st.text(max_size=9), values, max_size=4)
    ),
    max_leaves=8,
)
# transformers reads the dtype without checking it
FIELDS = sorted(ViTCLSConfig().to_dict().keys() - {"dtype"})


@examples(300)
@given(st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
def test_random_configurations_are_accepted_or_one_line_errors(fields: dict[str, Any]) -> None:
    run_watched(lambda: ViTCLSConfig.from_dict(ViTCLSConfig().to_dict() | fields))


# State dicts --------------------------------------------------------------------------------------


WEIGHTS = build_timm_vit("deit_small_patch16_224", num_classes=3).state_dict()


CHANGED_TENSORS = {
    "flat": torch.Tensor.flatten,
    "scalar": torch.Tensor.sum,
    "empty": lambda tensor: tensor[:0],
    "shorter": lambda tensor: tensor[..., :-1],
    "integers": torch.Tensor.long,
    "not finite": lambda tensor: tensor * float("nan"),
    "text": lambda tensor: "text",
    "nothing": lambda tensor: None,
    "array": lambda tensor: tensor.numpy(),
    "dict": lambda tensor: {"x": tensor},
}
CHANGED_NAMES = {
    "gone": lambda name: "",
    "gap": lambda name: name.replace("blocks.1.", "blocks.999999."),
    "huge": lambda name: name.replace("blocks.1.", f"blocks.{10**30}."),
    "negative": lambda name: name.replace("blocks.1.", "blocks.-1."),
    "nested": lambda name: f"model.{name}",
    "text": lambda name: f"{name}\n\x1b[31m",
}
CHANGES = st.tuples(
    st.sampled_from(sorted(WEIGHTS)), st.sampled_from([*CHANGED_TENSORS, *CHANGED_NAMES])
)


@examples(200)
@given(family=st.sampled_from(sorted(FAMILIES)), changes=st.lists(CHANGES, max_size=3))
def test_damaged_state_dicts_are_converted_or_one_line_errors(
    family: str, changes: list[tuple[str, str]]
) -> None:
    weights = dict(WEIGHTS)
    for name, change in changes:
        tensor = weights.pop(name, None)
        if change in CHANGED_NAMES and tensor is not None:
            weights[CHANGED_NAMES[change](name)] = tensor
        elif isinstance(tensor, torch.Tensor):
            weights[name] = CHANGED_TENSORS[change](tensor) if tensor.ndim else tensor

    def convert() -> None:
        tensors = prepare_weights(weights, family)
        convert_family_model(build_timm_model(tensors, family), tensors, family)

    run_watched(convert)


# Files --------------------------------------------------------------------------------------------


@cache
def encode_images() -> dict[str, bytes]:
    """Return a small image in every format that Pillow writes."""
    PIL.Image.init()
    pixels = draw_pixels(16, 16, 3)
    files: dict[str, bytes] = {}
    for name in sorted({*PIL.Image.SAVE, *IMAGE_FORMATS}):
        for mode in ("RGB", "L", "1"):
            buffer = io.BytesIO()
            with contextlib.suppress(Exception):  # each format supports some modes
                PIL.Image.fromarray(pixels).convert(mode).save(buffer, name)
                files.setdefault(name, buffer.getvalue())
    return files


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=4,
)


def damage(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    """Return changed content."""
    for kind, position, new in edits:
        at = int(position * len(content))
        changed = {
            "flip": content[:at] + new + content[at + len(new) :],
            "cut": content[:at],
            "insert": content[:at] + new + content[at:],
            "repeat": content[:at] + content[at : at + 64] * 3 + content[at + 64 :],
        }
        content = changed[kind]
    return content


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@examples(400)
@given(
    file_format=st.deferred(lambda: st.sampled_from(sorted(encode_images()))),
    edits=st.one_of(st.just([]), EDITS),
    suffix=st.sampled_from([".png", ".jpg", ".eps"]),
)
def test_damaged_image_files_are_read_or_one_line_errors(
    file_format: str, edits: list[tuple[str, float, bytes]], suffix: str
) -> None:
    content = damage(encode_images()[file_format], edits)
    processor = ViTCLSImageProcessor(size=16)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"image{suffix}"
        file.write_bytes(content)
        for source in (file, content):
            batch = run_watched(lambda source=source: processor(source, return_tensors="pt"))
            assert batch is None or batch["pixel_values"].shape == (1, 3, 16, 16)
            if not edits and file_format not in (*IMAGE_FORMATS, "DIB", "MPO"):
                assert batch is None, f"{file_format} is not a supported format"


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@examples(25)
@given(
    header=st.sampled_from(["file_name,label", "file_name", "label", "file_name,label,label", ""]),
    rows=st.lists(
        st.tuples(st.sampled_from(["1.png", "2.png", "../1.png", "/etc/passwd", ""]), TEXT),
        max_size=4,
    ),
    garbage=st.binary(max_size=8),
)
def test_random_metadata_tables_are_read_or_one_line_errors(
    header: str, rows: list[tuple[str, str]], garbage: bytes
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in (1, 2):
            PIL.Image.new("L", (8, 8)).save(folder / f"{number}.png")
        lines = [header, *(",".join(row) for row in rows)]
        (folder / "metadata.csv").write_bytes("\n".join(lines).encode() + garbage)
        run_watched(lambda: read_dataset(DataOptions(dataset=str(folder))))


@examples(300)
@given(st.text())
def test_any_name_of_a_label_is_one_line_of_markdown(name: str) -> None:
    code = format_name(name)
    assert code.startswith("`")
    assert code.endswith("`")
    assert "`" not in code[1:-1]
    assert len(code.splitlines()) == 1
    assert code.isprintable()
