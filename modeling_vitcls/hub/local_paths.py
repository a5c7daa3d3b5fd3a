"""Local paths as names of datasets, models and teachers.

    resolve_name("data/teach")                  -> "/home/me/data/teach"        if the path exists
    resolve_name("timm:resnet18@weights.pt")    -> "timm:resnet18@/home/me/weights.pt"
    resolve_name("someone/their-model")         -> unchanged, like any name that is not an existing path
    make_relative("/home/me/data/teach")        -> "./data/teach"               for the files of a run
    make_relative("/home/me/.cache/vit")        -> "~/.cache/vit"               outside of the working folder
    strip_folders("/home/me/data/teach")        -> "path/to/teach"              for publication
    get_title("/home/me/data/teach")            -> "teach"                      for titles

The first three also convert each of several names, such as of several datasets.

Each name is resolved once, when a run starts, relative to the working directory. Afterwards,
absolute paths and paths that start with `./` or `../` are treated as local paths, even if the files
have been removed or another process has a different working directory. The files of a run contain
relative paths, so the run can be repeated from the same folder.
"""

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from ..runtime.flags import expand_home


# scikit-learn's digits need no download, so examples and tests work without a network.
BUILT_IN_DATASET = "digits"
RELATIVE_PREFIXES = ("./", "../", "~/")  # Prefixes of relative paths; no Hub id starts with a dot


def convert_each(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Let a function of one name convert each of several names as well."""

    @wraps(convert)
    def convert_names(names: Any) -> Any:
        if isinstance(names, list | tuple):
            return type(names)(map(convert, names))
        return convert(names)

    return convert_names


@convert_each
def resolve_name(name: str) -> str:
    """Make the path of an existing file or folder in a name absolute.

    `name` is a path, a Hub id, `timm:NAME`, `timm:local-dir:FOLDER` or `transformers:...`. A
    path takes precedence over a built-in name (`digits`, a preset) and over the name of another
    project's model.
    """
    # The whole name comes first, since a file name may contain `:` or `@` itself.
    prefix, path = ("", name) if Path(name).exists() else split_prefix(name)
    # A Hub id stays as it is, even if a folder has the same name.
    if path and prefix != "timm:hf-hub:" and Path(path).exists():
        return f"{prefix}{Path(path).absolute()}"
    return name


def is_local(name: Any) -> bool:
    """Check whether a resolved name is a local file or folder; False for other values."""
    if not isinstance(name, str):
        return False
    path = split_prefix(name)[1]
    return Path(path).is_absolute() or path.startswith(RELATIVE_PREFIXES)


@convert_each
def make_relative(name: Any) -> Any:
    """Make the local path in a resolved name relative to the working directory.

    Any other value is returned unchanged.
    """
    if not is_local(name):
        return name
    prefix, path = split_prefix(name)
    try:
        relative_path = Path(os.path.relpath(path)).as_posix()
    except ValueError:  # The paths are on different Windows drives
        return name
    home = os.path.expanduser("~")  # noqa: PTH111  # Path.home raises an error without one
    if relative_path.startswith("../") and Path(path).is_relative_to(home):
        # Such as a cache: a path that climbs out of the project would depend on its place
        return f"{prefix}~/{Path(path).relative_to(home).as_posix()}"
    # Without `./`, the folder `data/teach` would look like a model of the user `data`.
    return prefix + (
        relative_path if relative_path.startswith(RELATIVE_PREFIXES) else f"./{relative_path}"
    )


def is_hub_dataset(name: Any) -> bool:
    """Check whether a resolved name is the id of a dataset on the Hub."""
    return (
        isinstance(name, str)
        and name != BUILT_IN_DATASET
        and not is_local(name)
        and ":" not in name
    )


@convert_each
def strip_folders(name: str) -> str:
    """Replace the folders of a local path in a resolved name with `path/to`, for publication."""
    prefix, path = split_prefix(name)
    return f"{prefix}path/to/{Path(path).name}" if is_local(name) else name


def is_same_source(stored_name: Any, current_name: Any) -> bool:
    """Check whether two names refer to the same dataset or model, which may have moved.

    Of several datasets, each is compared with the one in its place.
    """
    if isinstance(stored_name, list) and isinstance(current_name, list):
        pairs = zip(stored_name, current_name, strict=False)
        is_same = (is_same_source(*pair) for pair in pairs)
        return len(stored_name) == len(current_name) and all(is_same)
    if stored_name == current_name or not (isinstance(stored_name, str) and is_local(current_name)):
        return bool(stored_name == current_name)
    old_prefix, old_path = split_prefix(expand_home(stored_name))
    new_prefix, new_path = split_prefix(current_name)
    is_same_file = Path(old_path).resolve() == Path(new_path).resolve()
    # A run can be resumed after its data was moved. If the old path still exists, the new one is
    # another dataset with the same name.
    has_moved = (
        is_local(stored_name)
        and not Path(old_path).exists()
        and Path(old_path).name == Path(new_path).name
    )
    return old_prefix == new_prefix and (is_same_file or has_moved)


def split_prefix(name: str) -> tuple[str, str]:
    """Split a name into a prefix and a path or Hub id.

    The prefix of `timm:NAME@FILE` is `timm:NAME@`. The path is "" if the name contains no path.
    """
    for prefix in ("transformers:", "timm:local-dir:", "timm:hf-hub:"):
        if name.startswith(prefix):
            return prefix, name.removeprefix(prefix)
    if name.startswith("timm:"):
        model, separator, file = name.partition("@")
        return f"{model}{separator}", file
    return "", name


def get_title(name: str) -> str:
    """Shorten a name to a title: without the folders of a local path, and without a revision."""
    name = name if Path(name).exists() else name.partition("@")[0]
    path = split_prefix(name)[1]
    return Path(path).resolve().name if path and Path(path).exists() else name
