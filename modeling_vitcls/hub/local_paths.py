"""Names of data sets, models and teachers: of this machine, or such as others know them by.

    settled("data/teach")                       -> "/home/me/data/teach"        where there is such a folder
    settled("timm:resnet18@weights.pt")         -> "timm:resnet18@/home/me/weights.pt"
    settled("someone/their-model")              -> itself, as any name that is no path here
    without_folders("/home/me/data/teach")      -> "path/to/teach"              as it may be published

A name is settled once, when a run starts, in the folder that it was given in. From then on nothing is looked up: what
is absolute is of this machine, also where it has gone since or another process looks from elsewhere.
"""

from pathlib import Path
from typing import Any


BUILT_IN = "digits"  # a data set that comes with a library, and is not on the Hub


def settled(name: str, known: bool = False) -> str:
    """The name, with the file or folder that it stands for as an absolute path.

    Args:
        name: a path, an id on the Hub, `timm:NAME`, `timm:NAME@FILE`, `timm:local-dir:FOLDER` or `transformers:...`.
        known: whether it is a name of this package's own (`digits`, a preset), which goes before any path.
    """
    before, path = divided(name)
    return f"{before}{Path(path).absolute()}" if path and not known and Path(path).exists() else name


def is_local(name: Any) -> bool:
    """Whether a settled name is a file or folder of this machine; what is no text is none."""
    return isinstance(name, str) and Path(divided(name)[1]).is_absolute()


def without_folders(name: str) -> str:
    """A settled name as others may know it: of a file or folder of this machine the last part."""
    before, path = divided(name)
    return f"{before}path/to/{Path(path).name}" if is_local(name) else name


def is_same_place(before: Any, now: Any) -> bool:
    """Whether two names stand for the same, however they are written; also if that has been moved in between."""
    if before == now or not (isinstance(before, str) and is_local(now)):
        return bool(before == now)
    (kind, old), (kind_now, new) = divided(before), divided(now)
    is_one = Path(old).resolve() == Path(new).resolve()
    has_moved = is_local(before) and not Path(old).exists() and Path(old).name == Path(new).name
    return kind == kind_now and (is_one or has_moved)


def divided(name: str) -> tuple[str, str]:
    """What stands before a path, and the path, or what may be one; "" where there is none."""
    if name.startswith("timm:"):
        kind, colon, folder = name.removeprefix("timm:").partition(":")
        if colon:
            return (f"timm:{kind}:", folder) if kind.replace("_", "-") == "local-dir" else (name, "")
        model, at, file = name.partition("@")
        return f"{model}{at}", file
    if name.startswith("transformers:"):
        return "transformers:", name.removeprefix("transformers:")
    return "", name


def check_free(output: Path) -> None:
    """Raise ValueError unless `output` is a folder that can be made, or an empty one."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists, and is not empty: give another --output, or remove it")
