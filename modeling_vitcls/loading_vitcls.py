"""What is wrong with a checkpoint, said in one line that names the thing.

transformers reports mismatched weights in a table and raises without naming one, does not name a damaged file, and
builds a model of default size where config.json is missing.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_checkpoint(load: Callable, source: Any, *args: Any, **kwargs: Any) -> Any:
    """`load(source, ...)`, a `from_pretrained`, with errors for the reader.

    Raises:
        OSError: for a folder, config.json or weights that are missing or damaged.
        RuntimeError: for weights that do not fit the configuration.
    """
    config_is_elsewhere = kwargs.get("config") is not None or bool(kwargs.get("subfolder"))
    check_folder(source, config_is_elsewhere)
    try:
        return load(source, *args, **kwargs)
    except Exception as error:
        if type(error).__name__ == "SafetensorError":  # by name: what ships to the Hub imports few packages
            raise OSError(f"the weights in {source} are damaged ({error}): copy or download them again") from error
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
            raise RuntimeError(describe_mismatch(load, source, *args, **kwargs)) from error
        if isinstance(error, OSError) and "\n" in str(error):
            raise OSError(f"cannot load {source}: {' '.join(str(error).split())}") from error
        raise


def check_folder(source: Any, config_is_elsewhere: bool) -> None:
    """Raise OSError for a local checkpoint that cannot be one; ids of the Hub pass."""
    if source is None:  # a state dict is given instead
        return
    folder = Path(source)
    if not folder.exists():
        if folder.is_absolute() or len(folder.parts) > 2 or os.fspath(source).startswith((".", "~")):
            raise OSError(f"there is no folder {source}: check the path")
        return
    if folder.is_dir() and not config_is_elsewhere and not (folder / "config.json").is_file():
        raise OSError(f"there is no config.json in {source}: it is written by save_pretrained, beside the weights")


def describe_mismatch(load: Callable, source: Any, *args: Any, **kwargs: Any) -> str:
    """Name the weights whose shapes differ, by loading once more without them."""
    kwargs = {**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
    _, info = load(source, *args, **kwargs)
    mismatched = sorted(info["mismatched_keys"])
    name, saved, built = mismatched[0]
    others = f" (and {len(mismatched) - 1} more)" if len(mismatched) > 1 else ""
    return (
        f"the weights in {source} do not fit: {name} is {list(saved)} there and {list(built)} in the model{others}: "
        "use the configuration they were saved with, or ignore_mismatched_sizes=True to start these weights afresh"
    )
