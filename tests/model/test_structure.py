"""The shipped files: their number, which of them run, and private names of PyTorch."""

import ast
import re
import sys
from pathlib import Path
from types import FrameType

from helpers.tiny_models import IMAGE_LABELS, IMAGES, build_tiny_config

import modeling_vitcls
from modeling_vitcls import ViTCLSForImageClassification


SHIPPED_FILES = sorted((Path(modeling_vitcls.__file__).parent / "model").glob("*_vitcls.py"))
KERNELS = SHIPPED_FILES[0].parents[1] / "speed/cpu_kernels.py"
PRIVATE_NAME = re.compile(
    r"\btorch(\.\w+)*\._[a-zA-Z]|from torch(\.\w+)* import _|from torch(\.\w+)*\._\w+ import"
)

MAX_EXECUTED_FILES = 6


def test_a_forward_pass_executes_at_most_6_files_that_are_shipped() -> None:
    """Inference and a training step of the default classifier."""
    model = ViTCLSForImageClassification(build_tiny_config())
    paths: set[str] = set()

    def record(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            paths.add(frame.f_code.co_filename)

    sys.setprofile(record)
    model.eval()(IMAGES)
    model.train()(IMAGES, labels=IMAGE_LABELS)
    sys.setprofile(None)
    executed = {file.name for file in map(Path, paths) if file.parent == SHIPPED_FILES[0].parent}
    assert {"modeling_vitcls.py", "blocks_vitcls.py"} <= executed
    assert not [path for path in paths if "modeling_vitcls/speed/" in path]
    assert len(executed) <= MAX_EXECUTED_FILES, executed


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
