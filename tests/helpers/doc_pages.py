"""The pages of the documentation: their fenced blocks, and the commands in bash blocks."""

import ast
import importlib
import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "modeling_vitcls"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "AGENTS.md",
    *sorted((ROOT / "docs").glob("*.md")),
]

FENCE = re.compile(
    r"(?:^<!-- (?P<comment>.*?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
REPLACEMENT = re.compile(r'run with: "(.+)" instead of "(.+)"')


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, and the HTML comment before it."""

    page: Path
    line: int
    language: str
    text: str
    comment: str

    @property
    def is_run(self) -> bool:
        """Return whether a test runs the block."""
        return self.language in ("python", "bash") and not self.comment.startswith("not run: ")

    def get_source(self) -> str:
        """Return a Python block with its replacements."""
        if found := REPLACEMENT.fullmatch(self.comment):
            new, old = found.groups()
            assert old in self.text, f"{self}: no {old!r}"
            return self.text.replace(old, new)
        return self.text

    def get_commands(self) -> list[str]:
        """Return the commands of a bash block, each in one line."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line and not line.startswith("#")]

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def read_blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            page,
            text.count("\n", 0, found.start()) + 1,
            found["language"],
            found["text"],
            found["comment"] or "",
        )
        for found in FENCE.finditer(text)
    ]


def read_program(name: str) -> str:
    """Read a program of docs/serving.md, which begins with its name."""
    blocks = read_blocks(ROOT / "docs/serving.md")
    return next(block.text for block in blocks if block.text.startswith(f"# {name}\n"))


def read_prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def check_imports(program: str) -> int:
    """Check that a program imports names that the package has, and return their number."""
    num_names = 0
    for node in ast.walk(ast.parse(program)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("modeling_vitcls"):
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {missing}"
            num_names += len(node.names)
    return num_names
