"""Folders of the package import each other in one direction, and files never in a ring."""

import ast
import json
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from helpers.doc_pages import PACKAGE, ROOT


# From the bottom up: a folder may import only entries before it in this tuple. Those of one line
# meet in a model folder, which additions and runs write and publishing reads. Top level: version.py.
ORDER = (
    ("model",),
    ("speed",),
    ("top level",),
    ("runtime",),
    ("hub",),
    ("conversion", "data"),
    ("inference",),
    ("frozen",),
    ("evaluation",),
    ("analysis", "training"),
    ("additions", "publishing", "exporting"),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}


def load_import_graph() -> dict[str, list[str]]:
    """Return file -> files of the package that it imports, anywhere in the file."""
    command = [sys.executable, "-m", "ruff", "analyze", "graph", "modeling_vitcls"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return json.loads(done.stdout)


def get_layer(file: str) -> str:
    """Return the entry of ORDER for a file."""
    _, *folders, _ = Path(file).parts
    return folders[0] if folders else "top level"


def test_folders_import_only_lower_folders_and_no_ring_joins_files() -> None:
    graph = load_import_graph()
    graph.pop("modeling_vitcls/__init__.py")  # has the public names of several folders

    assert len(graph) > 100

    wrong = []
    for module, imported in graph.items():
        for other in {*imported} - {"modeling_vitcls/__init__.py"}:
            mine = get_layer(module)
            theirs = get_layer(other)
            if mine != theirs and RANK[mine] <= RANK[theirs]:
                wrong.append(f"{module} imports {other}")

    assert not wrong, sorted(wrong)

    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_the_picture_of_a_run_names_what_the_code_has() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    picture = text.split("```text\n")[1].split("```")[0]
    words = set(re.findall(r"\b(?:[a-z]+_[a-z_]+|[A-Z][a-z]+[A-Z]\w+)\b", picture))
    assert {"open_model", "plan_run", "divide_images", "run_frozen", "save_output"} <= words
    code = "\n".join(file.read_text() for file in PACKAGE.rglob("*.py"))
    for word in words:
        assert re.search(rf"^(?:class|def) {word}\b", code, re.MULTILINE), word
    stages = re.findall(r"^    (\w+\.py)", text, re.MULTILINE)
    assert "run_inputs.py" in stages
    for name in stages:
        assert (PACKAGE / "training" / name).is_file(), name


def test_a_folder_explains_each_of_its_files() -> None:
    for file in PACKAGE.glob("*/*.py"):
        docstring = ast.get_docstring(ast.parse((file.parent / "__init__.py").read_text("utf-8")))
        assert file.name.startswith("__") or file.name in str(docstring), file
