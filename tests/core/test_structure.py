"""The shipped files: their number and length, the files that a forward pass executes, and their imports."""

import ast
import json
import os
import re
from pathlib import Path

import pytest
from helpers.fresh_processes import run_fresh

import modeling_vitcls


SHIPPED_FILES = sorted(Path(modeling_vitcls.__file__).parent.glob("*_vitcls.py"))
KERNEL_FILE = "cpu_kernels_vitcls.py"
PRIVATE_NAME = re.compile(r"\btorch(\.\w+)*\._[a-zA-Z]|from torch(\.\w+)* import _|from torch(\.\w+)*\._\w+ import")

MAX_FILES = 12
MAX_LINES = 4300
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


def test_number_and_length_of_the_shipped_files() -> None:
    assert len(SHIPPED_FILES) <= MAX_FILES, [file.name for file in SHIPPED_FILES]
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
    assert KERNEL_FILE not in executed
    assert len(executed) <= MAX_EXECUTED_FILES, executed


def test_private_names_of_pytorch_are_in_one_guarded_block() -> None:
    found = []
    for file in SHIPPED_FILES:
        text = file.read_text()
        blocks = [node for node in ast.parse(text).body if isinstance(node, ast.Try)]
        guarded = [range(block.lineno, block.end_lineno or 0) for block in blocks if file.name == KERNEL_FILE]
        for number, line in enumerate(text.splitlines(), start=1):
            if PRIVATE_NAME.search(line):
                found.append(line)
                assert any(number in lines for lines in guarded), f"{file.name}, line {number}: {line}"
    assert len(found) >= 3  # the search finds them


@pytest.mark.parametrize("file", SHIPPED_FILES, ids=lambda file: file.name)
def test_imports_follow_the_order(file: Path) -> None:
    rows = {f"{name}_vitcls": row for row, names in enumerate(ORDER) for name in names}
    imported = re.findall(r"^from \.(\w+) import", file.read_text(), re.MULTILINE)
    own_row = rows.get(file.stem, -1)
    if own_row < 0:  # image processors
        assert "modeling_vitcls" not in imported
        return
    for name in imported:
        assert rows[name] < own_row, f"{file.name} imports {name}.py"
