"""The shipped files: their number and length, the files that a forward pass executes, and their imports."""

import json
import os
from pathlib import Path

import pytest
from helpers.fresh_processes import run_fresh

from .source import (
    KERNEL_FILE,
    SHIPPED_FILES,
    find_guarded_block,
    find_private_names,
    get_subject,
    list_imported_siblings,
)


MAX_FILES = 13
MAX_LINES = 4700
MAX_EXECUTED_FILES = 5

# Each file imports only files of earlier rows. tests/test_import_order.py checks for import cycles.
ORDER = (
    ("configuration",),
    ("positions",),
    ("blocks", "attention_masks"),
    ("heads", "variants"),
    ("cpu_kernels", "adaptation", "token_attention"),
    ("modeling",),
)

# Prints the shipped files whose code a forward pass executes, during inference and in a training step.
FORWARD_PASS = """
import json, sys
from pathlib import Path
import torch
import modeling_vitcls
from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification

sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
model = ViTCLSForImageClassification(ViTCLSConfig(image_size=32, patch_size=8, num_labels=3, **sizes))
pixel_values, labels = torch.zeros(2, 3, 32, 32), torch.tensor([0, 2])
folder = Path(modeling_vitcls.__file__).parent
executed = set()

def record(frame, event, argument):
    if event == "call":
        executed.add(frame.f_code.co_filename)

sys.setprofile(record)
model.eval()(pixel_values)
model.train()(pixel_values, labels=labels)
sys.setprofile(None)
print(json.dumps(sorted(Path(file).name for file in executed if Path(file).parent == folder)))
"""


def test_at_most_13_files() -> None:
    assert len(SHIPPED_FILES) <= MAX_FILES, [file.name for file in SHIPPED_FILES]


def test_at_most_4700_lines() -> None:
    lines = {file.name: len(file.read_text().splitlines()) for file in SHIPPED_FILES}
    assert sum(lines.values()) <= MAX_LINES, lines


def run_forward_pass(**environment: str) -> list[str]:
    """Return the names of the shipped files that a forward pass of the default classifier executes."""
    ran = run_fresh("-c", FORWARD_PASS, environment={**os.environ, **environment})
    assert ran.returncode == 0, ran.stderr[-4000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_a_forward_pass_executes_at_most_5_files_and_no_kernels() -> None:
    executed = run_forward_pass(VITCLS_CPU_KERNELS="0")
    assert {"modeling_vitcls.py", "blocks_vitcls.py"} <= set(executed)
    assert KERNEL_FILE.name not in executed
    assert len(executed) <= MAX_EXECUTED_FILES, executed


def test_private_names_are_in_one_guarded_block() -> None:
    guarded = find_guarded_block()
    allowed = range(guarded.lineno, guarded.handlers[0].lineno)
    names = {file: find_private_names(file) for file in SHIPPED_FILES}
    assert len(names[KERNEL_FILE]) >= 5  # the search finds them
    for file, found in names.items():
        for name, lines in found.items():
            outside = [line for line in sorted(lines) if file != KERNEL_FILE or line not in allowed]
            assert not outside, f"{name} is used in {file.name}, lines {outside}"


@pytest.mark.parametrize("file", SHIPPED_FILES, ids=lambda file: file.name)
def test_imports_follow_the_order(file: Path) -> None:
    rows = {name: row for row, names in enumerate(ORDER) for name in names}
    own_row = rows.get(get_subject(file))
    if own_row is None:
        assert "modeling" not in list_imported_siblings(file)
        return
    for name in list_imported_siblings(file) & rows.keys():
        assert rows[name] < own_row, f"{file.name} imports {name}_vitcls.py"
