"""Any checkpoint that this package can use -> the folder of a vitcls model, converted once and cached.

    folder = resolve_checkpoint("runs/mine")                            a vitcls folder is returned unchanged
    folder = resolve_checkpoint("someone/their-model@COMMIT")           a vitcls model on the Hub
    folder = resolve_checkpoint("facebook/dinov2-small")                converted by transformers
    folder = resolve_checkpoint("timm:vit_small_patch16_224")           converted by timm
    folder = resolve_checkpoint("transformers:path/to/checkpoint")

A conversion is checked as in scripts/convert.py: it is cached only if its outputs equal those of the source. Its
certificate records the source, the commit and the versions. The cache is `vitcls/converted` next to the cache of the
Hub; a changed source or another version of this package is converted again.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import constants
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..configuration_vitcls import ViTCLSConfig
from ..hub.loading import CONFIG, CONFIG_FILES, MODEL_FILES, get_cached_commit, get_model_folder
from ..version import __version__


PREFIXES = ("timm:", "transformers:")

log = logging.getLogger(__name__)


def resolve_checkpoint(source: str, files: Sequence[str] = MODEL_FILES) -> str:
    """Return the folder of a vitcls model: the source itself, its download, or its conversion.

    Args:
        source: a folder, `namespace/name` on the Hub with an optional `@REVISION`, `timm:NAME`, or
            `transformers:PATH_OR_ID` with an optional `@REVISION`.
        files: patterns of the required files of a vitcls model.

    Raises:
        ValueError: if the source cannot be converted exactly.
        OSError: if the source cannot be found or read.
    """
    if source.startswith(PREFIXES):
        return convert_once(source)
    name, revision = split_revision(source)
    folder = get_model_folder(name, files, revision)
    model_type = read_model_type(folder)
    if model_type == ViTCLSConfig.model_type or model_type not in CONFIG_MAPPING_NAMES:
        return folder  # errors about models without a type name the source
    commit = get_cached_commit(folder)
    return convert_once(f"transformers:{name}@{commit}" if commit else f"transformers:{name}")


def pin_revision(source: str) -> str:
    """Return the name of a model on the Hub with the hash of its commit; other names are returned unchanged.

    Raises:
        ValueError, OSError: as `resolve_checkpoint`.
    """
    prefix = "transformers:" if source.startswith("transformers:") else ""
    if not prefix and source.startswith(PREFIXES):
        return source
    name, revision = split_revision(source.removeprefix(prefix))
    if Path(name).exists():
        return source
    commit = get_cached_commit(get_model_folder(name, CONFIG_FILES, revision))
    return f"{prefix}{name}@{commit}" if commit else source


def split_revision(source: str) -> tuple[str, str | None]:
    """Split `ID@REVISION`. An existing path is not split."""
    name, at, revision = source.rpartition("@")
    return (name, revision) if at and revision and not Path(source).exists() else (source, None)


def read_model_type(folder: str) -> str | None:
    """Return `model_type` of a folder's configuration; None if it has none or cannot be read."""
    if not Path(folder, CONFIG).is_file():
        return None
    try:
        return PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
    except (OSError, ValueError):
        return None


def convert_once(source: str) -> str:
    """Return the cached conversion of `timm:NAME` or `transformers:PATH_OR_ID`; convert it if there is none.

    Raises:
        ValueError, OSError: as `take_over`.
    """
    from .convert import take_over  # imports timm and transformers' models

    folder = get_cache_folder() / compute_cache_name(source)
    if not (folder / CONFIG).is_file():
        log.warning("converting %s once; the result is kept in %s", source, folder)
        take_over(source, folder)
    return str(folder)


def get_cache_folder() -> Path:
    """Return the folder of all conversions."""
    return Path(constants.HF_HUB_CACHE).parent / "vitcls" / "converted"


def compute_cache_name(source: str) -> str:
    """Return the folder name of a conversion. It changes with the source's files and the version of this package."""
    path = Path(source.partition(":")[2])
    facts: list[object] = [source, __version__]
    if path.exists():
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        facts += [str(path.resolve()), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)]
    elif source.startswith("transformers:"):
        facts.append(pin_revision(source))
    readable = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in path.name)
    return f"{readable}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"
