"""The shipped files: private names of PyTorch."""

import ast
import re
from pathlib import Path

import modeling_vitcls


SHIPPED_FILES = sorted((Path(modeling_vitcls.__file__).parent / "model").glob("*_vitcls.py"))
KERNELS = SHIPPED_FILES[0].parents[1] / "speed/cpu_kernels.py"
PRIVATE_NAME = re.compile(
    r"\btorch(\.\w+)*\._[a-zA-Z]|from torch(\.\w+)* import _|from torch(\.\w+)*\._\w+ import"
)


def test_private_names_of_pytorch_are_in_one_guarded_block() -> None:
    found = []
    for file in (*SHIPPED_FILES, KERNELS):
        text = file.read_text()
        blocks = [node for node in ast.parse(text).body if isinstance(node, ast.Try)]
        guarded = [
            range(block.lineno, block.end_lineno or 0) for block in blocks if file == KERNELS
        ]
        for number, line in enumerate(text.splitlines(), start=1):
            if PRIVATE_NAME.search(line):
                found.append(line)
                assert any(number in lines for lines in guarded), (
                    f"{file.name}, line {number}: {line}"
                )
    assert len(found) >= 3  # the search finds them
