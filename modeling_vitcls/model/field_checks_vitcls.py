# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""Checks of fields, files and checkpoints, and one-line errors.

hidden_size: int = width(default=768)       1 to 1,000,000
open_regular_file(path)                     no pipe, no device, no pointer of Git LFS
find_checkpoint(source, keywords)           a checkpoint of these classes, or its conversion
"""

import json
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import as_validated_field
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import find_adapter_config_file, is_torch_available


Size = tuple[int, int]  # Height and width in pixels, or rows and columns of patches

MAX_LABELS = 1_000_000  # Maximum number of labels of one classifier
MAX_PATCHES = 2**22  # Maximum number of patches of an image
MAX_PATCH_SIDE = 4096  # Maximum height and width of a patch, in pixels

MODEL_TYPE = "vitcls"
# Arguments of `from_pretrained` that say where files are
HUB_KEYWORDS = "cache_dir force_download local_files_only proxies revision subfolder token".split()
LFS_SIGNATURE = b"version https://git-lfs.github.com/spec/"


# Bounds of fields ---------------------------------------------------------------------------------
def bounded(is_valid: Callable[[Any], bool], requirement: str) -> Any:
    """Build a kind of field whose values are None or meet a requirement, such as "positive"."""

    def check(value: Any) -> None:
        if value is not None and not is_valid(value):
            raise ValueError(f"must be {requirement}, but it is {value!r}")

    return as_validated_field(check)


def between(minimum: int, maximum: int) -> Any:
    """Build a kind of field with values from `minimum` to `maximum`."""
    return bounded(
        lambda value: minimum <= value <= maximum, f"between {minimum:,} and {maximum:,}"
    )


def extent(maximum: int) -> Any:
    """Build a kind of field with one number for both axes, or [height, width]."""
    return bounded(
        lambda value: (
            (isinstance(value, int) or len(value) == 2)
            and 1 <= min(to_pair(value)) <= max(to_pair(value)) <= maximum
        ),
        f"1 to {maximum:,}, or [height, width]",
    )


def is_activation(name: str) -> bool:
    """Check for an activation of transformers. `AutoConfig` works without PyTorch, which these need."""
    if not is_torch_available():
        return True
    from transformers.activations import ACT2FN

    return name in ACT2FN


# The upper limits only reject typos that would exhaust the memory.
token_count = between(0, 100_000)
width = between(1, 1_000_000)
probability = between(0, 1)
rate = bounded(lambda value: 0 <= value < 1, "at least 0 and below 1")
positive = bounded(lambda value: 0 < value < math.inf, "a finite positive number")
finite = bounded(math.isfinite, "finite or None")
activation = bounded(is_activation, 'an activation of transformers, such as "gelu"')


# Errors -------------------------------------------------------------------------------------------
@contextmanager
def raise_one_line_errors(owner: str = "") -> Iterator[None]:
    """Raise one-line `ValueError`s instead of the errors of two lines that `strict` raises.

    A check of several fields (`validate_*`) has a message of its own, without the words of `strict`.
    """
    try:
        yield
    except (StrictDataclassError, TypeError, ValueError) as error:
        is_check = isinstance(error, StrictDataclassClassValidationError)
        message = textwrap.shorten(str(error.__cause__ if is_check else error), 600)
        # A value in a file may hold codes that a terminal runs.
        raise ValueError(owner + "".join(filter(str.isprintable, message))) from None


def shorten_errors(strict_class: Any) -> Any:
    """Make a strict class raise one-line errors."""
    for name in ("__init__", "__setattr__", "validate"):
        setattr(strict_class, name, raise_one_line_errors()(getattr(strict_class, name)))
    return strict_class


def to_pair(value: int | Sequence[int]) -> Size:
    """Read a size, one number for both axes or [height, width], as (height, width)."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


# Files and checkpoints ----------------------------------------------------------------------------
def open_regular_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file for reading.

    Raise OSError if it is missing, not a regular file after links (a named pipe would block, and a
    device would fill the memory), or what Git leaves in place of a large file.
    """
    file = Path(os.path.expanduser(path))  # noqa: PTH111  # unlike Path's, without errors
    if file.exists() and not file.is_file():
        raise OSError(f"{path} is not a regular file")
    stream = file.open("rb")
    if stream.peek().startswith(LFS_SIGNATURE):
        stream.close()
        raise OSError(
            f"{path} is a pointer of Git LFS instead of the file. Run `git lfs pull` in its folder"
        )
    return stream


def find_checkpoint(source: Any, keywords: Mapping[str, Any]) -> Any:
    """Find the vitcls checkpoint for what a person names: `source`, or the folder of its conversion.

    The installed package converts other ViTs. Code from the Hub alone refuses them, because the model
    would have random weights.

    Args:
        source: argument of `from_pretrained`: a folder or Hub id, `timm:NAME` or a file of weights.
        keywords: other arguments of `from_pretrained`.

    Raises:
        ValueError: if the checkpoint is of another model, and cannot be converted.
    """
    if source is None or is_own_checkpoint(source, keywords):
        return source
    try:
        from modeling_vitcls import open_checkpoint
    except ImportError as error:
        raise ValueError(
            f"{source} is a checkpoint of another project, and only the package can convert it: "
            "`pip install modeling_vitcls`, and import the class from there"
        ) from error
    return open_checkpoint(
        source, **{name: keywords[name] for name in HUB_KEYWORDS if keywords.get(name)}
    )


def is_own_checkpoint(source: Any, keywords: Mapping[str, Any]) -> bool:
    """Tell whether a checkpoint is of this class; also if there is none, which transformers says."""
    name = str(source)
    path = Path(name)
    if path.is_file() and path.suffix != ".json":
        return False
    if name.startswith(("timm:", "transformers:", "vitcls-")) and not path.exists():
        return False
    hub_keywords = {key: keywords[key] for key in HUB_KEYWORDS if key in keywords}
    try:
        settings, _ = PreTrainedConfig.get_config_dict(source, **hub_keywords)
    except OSError:
        settings = {}
    if not settings:
        return is_adapter_of_own_checkpoint(name, hub_keywords)
    # timm writes `architecture`, and no model type
    return settings.get("model_type", MODEL_TYPE) == MODEL_TYPE and "architecture" not in settings


def is_adapter_of_own_checkpoint(name: str, hub_keywords: dict[str, Any]) -> bool:
    """Tell whether a folder without a model has no adapter, or one of a checkpoint of this class.

    Raise ValueError for an adapter of another model: transformers would load it onto random weights.
    """
    adapter = find_adapter_config_file(name, **hub_keywords)
    if adapter is None:
        return True
    base = json.loads(Path(adapter).read_text()).get("base_model_name_or_path")
    if base is None or is_own_checkpoint(base, {}):
        return True
    raise ValueError(
        f"{name} is an adapter of {base}, which has to be converted before: "
        f"`PeftModel.from_pretrained(MODEL_CLASS.from_pretrained({base!r}), {name!r})`"
    )
