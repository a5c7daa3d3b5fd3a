"""The one door to a model of any kind: what a user names -> `ModelFolder`. Conversions are cached.

    open_model("runs/mine")                     a vitcls model: the same folder
    open_model("someone/their-model@COMMIT")    a vitcls model on the Hub: the downloaded folder
    open_model("facebook/dinov2-small")         a transformers model: the converted model
    open_model("timm:vit_small_patch16_224")    a timm model: the converted model
    open_model("dinov2_vits14_pretrain.pth")    a published state dict: the converted model

A command opens its model once, and passes the folder on.

Conversions are checked in the same way as in `vitcls convert`: a converted model is cached only if
its outputs match the source to within 1e-5. The parity report records the source, the
commit and the versions. The cache is the folder `vitcls/converted` next to the Hub cache. If the
source or the version of this package changes, the model is converted again.
"""

import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ..hub.connection import name_cache
from ..hub.loading import (
    append_commit,
    get_cached_commit,
    get_model_folder,
    pin_revision,
)
from ..hub.local_paths import split_prefix
from ..hub.model_files import (
    CONFIG_FILE,
    PARITY_REPORT_FILE,
    PROCESSOR_FILE,
)
from ..hub.model_folder import ModelFolder
from ..model.configuration_vitcls import PRESETS, ViTCLSConfig
from ..runtime.errors import warn_on_first_process
from ..runtime.files import compute_json_digest, read_json
from ..runtime.staging import hold_lock
from ..version import __version__


SOURCE_PREFIXES = ("timm:", "transformers:")

# Argument of `from_pretrained` -> what to do instead before a conversion
REMEDIES = {
    "cache_dir": "set HF_HUB_CACHE",
    "force_download": "run `hf cache rm`",
    "local_files_only": "set HF_HUB_OFFLINE=1",
    "proxies": "set HTTPS_PROXY",
    "subfolder": "name the downloaded folder",
    "token": "set HF_TOKEN",
}

logger = logging.getLogger(__name__)


def is_preset(name: str) -> bool:
    """Check whether `name` is a preset, such as `vitcls-tiny`, and not an existing path."""
    kind, _, preset = name.partition("-")
    return kind == "vitcls" and preset in PRESETS and not Path(name).exists()


def open_model(source: str) -> ModelFolder:
    """Open the folder of a vitcls model, after downloading or converting the source if necessary.

    Args:
        source: A folder, `namespace/name` on the Hub with an optional `@REVISION`, `timm:NAME`,
            `transformers:PATH_OR_ID` with an optional `@REVISION`, or a file with a published state
            dict. Of a vitcls model on the Hub, only the model is downloaded, and the records of its
            training and its conversion.

    Raises:
        ValueError: If the source is a preset, an unfinished run, or not supported, or the
            conversion is not exact.
        OSError: If the source cannot be found or read.
    """
    if is_preset(source):
        raise ValueError(
            f"{source} is a preset without trained weights. Set `model` to a folder or a model on "
            "the Hub"
        )
    if Path(source, "checkpoints").is_dir() and not Path(source, CONFIG_FILE).exists():
        raise ValueError(
            f"{source} contains an unfinished run without a model. Continue the run: `vitcls "
            "finetune ... --resume`"
        )
    is_named = source.startswith(SOURCE_PREFIXES) and not Path(source).exists()
    if is_named or Path(source).is_file():
        folder = convert_once(pin_revision(source))
    else:
        folder = get_model_folder(source)
        name = append_commit(source, folder)
        if prefix := find_prefix(folder):
            folder = convert_once(prefix + name)
    return ModelFolder(Path(folder), source)


def open_checkpoint(source: Any, revision: str | None = None, **keywords: Any) -> str:
    """Find or make the folder of a vitcls model, as `from_pretrained` of the models does.

    Args:
        source: As in `open_model`.
        revision: Commit, branch or tag of a Hub id.
        keywords: Other arguments of `from_pretrained` about files, which conversions do not take.

    Returns:
        The folder: of a vitcls model, or of the exact conversion of another ViT.

    Raises:
        ValueError, OSError: As in `open_model`; ValueError if an argument has no effect.

    Examples:
        >>> from modeling_vitcls import open_checkpoint
        >>> folder = open_checkpoint("facebook/dinov2-small")  # doctest: +SKIP
    """
    name = str(source)
    if is_preset(name):
        raise ValueError(
            f"{name} is a preset without trained weights. For random weights, build the model: "
            f"`ViTCLSModel(ViTCLSConfig.from_preset({name.removeprefix('vitcls-')!r}))`"
        )
    for keyword in keywords:
        if keywords[keyword] is not True or keyword != "token":  # True is what is done anyway
            raise ValueError(
                f"`{keyword}` has no effect on {name}, which is converted first: leave it out, and "
                f"{REMEDIES[keyword]}"
            )
    if revision is not None and not Path(name).exists():
        name = f"{name}@{revision}"
    return str(open_model(name).path)


def find_prefix(folder: str) -> str:
    """Find out which project a model is from: the prefix of its name, which is empty for ours."""
    file = Path(folder, CONFIG_FILE)
    config = read_json(file) if file.is_file() else {}
    model_type = config.get("model_type")
    if model_type not in (None, ViTCLSConfig.model_type):
        return "transformers:"
    if model_type is None and isinstance(config.get("architecture"), str):  # timm saved the model
        return "timm:local-dir:" if get_cached_commit(folder) is None else "timm:hf-hub:"
    return ""


@name_cache()
def convert_once(source: str) -> str:
    """Convert a source, pinned to a commit, unless it is in the cache; return its folder there."""
    # Imported here, because it imports many models of transformers, and most commands convert
    # nothing.
    from .convert import convert_checkpoint

    folder = (
        Path(constants.HF_HUB_CACHE).parent / "vitcls" / "converted" / compute_cache_name(source)
    )
    # All processes of a run open the same model. One of them converts it, and the others find it
    # done.
    lock_path = folder.with_name(f"{folder.name}.lock")
    with hold_lock(lock_path, folder, "model", timeout=-1):
        # This file is moved last, so a folder that has it is complete.
        if not (folder / CONFIG_FILE).is_file():
            logger.warning("converting %s to the cache, %s", source, folder)
            report = convert_checkpoint(source, folder)
            for note in report["notes"]:
                logger.warning("%s", note)
    # Said in every run, and not only in the one that converts: no number shows it.
    preprocessing = read_json(folder / PARITY_REPORT_FILE)["preprocessing"]
    if reason := preprocessing["assumed_because"]:
        warn_on_first_process(
            f"{source}: {reason}, so images are normalized with the mean and standard deviation of "
            f"ImageNet. If it was trained with others, run `vitcls convert {source} FOLDER`, set "
            f"them in FOLDER/{PROCESSOR_FILE}, and use FOLDER"
        )
    return str(folder)


def compute_cache_name(source: str) -> str:
    """Compute a name of a model's files: the folder of its conversion has it.

    It depends on the commit or the local files of the source, and on the package version.
    """
    path = Path(split_prefix(source)[1] or source.removeprefix("timm:"))
    cache_key: list[object] = [source, __version__]
    if path.exists():
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        cache_key.append(str(path.resolve()))
        for file in filter(Path.exists, files):  # Editors lock a file by a broken link
            # No hash of the contents: each command computes this name, and reading large weights
            # takes seconds. A copy or an archive may keep the time of modification, but its change
            # time is new.
            status = file.stat()
            cache_key.append((file.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    digest = compute_json_digest(cache_key)
    return re.sub(r"[^\w.-]", "-", f"{path.name}-{digest[:16]}")
