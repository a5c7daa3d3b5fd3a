"""Read the shipped source files: the imports between them, and the names of PyTorch that they use."""

import ast
from collections.abc import Iterator
from pathlib import Path

import modeling_vitcls


PACKAGE = Path(modeling_vitcls.__file__).parent
SHIPPED_FILES = sorted(PACKAGE.glob("*_vitcls.py"))
KERNEL_FILE = PACKAGE / "cpu_kernels_vitcls.py"


def list_imported_siblings(file: Path) -> set[str]:
    """Return the names of the shipped files that a file imports, without `_vitcls.py`."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return {get_subject(Path(f"{node.module}.py")) for node in nodes if node.level == 1 and node.module}


def get_subject(file: Path) -> str:
    """Return the name of a shipped file without `_vitcls.py`."""
    return file.name.removesuffix("_vitcls.py")


def find_guarded_block(file: Path = KERNEL_FILE) -> ast.Try:
    """Return the only top-level `try` of a file that handles ImportError and AttributeError."""
    blocks = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Try)]
    (guarded,) = [
        block
        for block in blocks
        if {"ImportError", "AttributeError"}
        <= {node.id for handler in block.handlers for node in ast.walk(handler) if isinstance(node, ast.Name)}
    ]
    return guarded


def find_private_names(file: Path) -> dict[str, set[int]]:
    """Return the private names of PyTorch in a file, such as `torch._C._functorch`, with their lines.

    A name is private if a part after `torch` starts with one underscore. Aliases are resolved: after `from
    torch.autograd import forward_ad`, `forward_ad._current_level` is `torch.autograd.forward_ad._current_level`. If an
    import binds a private name, each use of it under a private name counts.
    """
    tree = ast.parse(file.read_text())
    aliases = read_torch_aliases(tree)
    names: dict[str, set[int]] = {}
    for node in ast.walk(tree):
        for name in read_torch_names(node, aliases):
            if is_private(name):
                names.setdefault(name, set()).add(node.lineno)  # type: ignore[attr-defined]
    return names


def read_torch_aliases(tree: ast.AST) -> dict[str, str]:
    """Return the names that imports bind: local name -> full name in PyTorch."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [name for name in node.names if is_torch(name.name)]
            aliases |= {name.asname or "torch": name.name if name.asname else "torch" for name in modules}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and is_torch(node.module or ""):
            aliases |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    return aliases


def read_torch_names(node: ast.AST, aliases: dict[str, str]) -> Iterator[str]:
    """Yield the full names in PyTorch that this node itself contains."""
    if isinstance(node, ast.Import):
        yield from (name.name for name in node.names if is_torch(name.name))
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and is_torch(node.module or ""):
        yield from (f"{node.module}.{name.name}" for name in node.names)
    elif isinstance(node, ast.Name) and node.id in aliases and node.id.startswith("_"):
        yield aliases[node.id]
    elif isinstance(node, ast.Attribute) and (name := resolve(node, aliases)):
        yield name
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
        owner, name_node = resolve(node.args[0], aliases), node.args[1]
        if owner and isinstance(name_node, ast.Constant):
            yield f"{owner}.{name_node.value}"


def resolve(node: ast.AST, aliases: dict[str, str]) -> str | None:
    """Return the full name of `a.b.c` if `a` is part of PyTorch, otherwise None."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := resolve(node.value, aliases)):
        return f"{owner}.{node.attr}"
    return None


def is_torch(module: str) -> bool:
    """Return whether a module belongs to PyTorch."""
    return module.partition(".")[0] == "torch"


def is_private(name: str) -> bool:
    """Return whether a part of a dotted name starts with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
