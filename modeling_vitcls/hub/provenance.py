"""Where a model comes from: the base model to name in its card, and the licence that goes with its weights.

    origin_of("runs/pretrained")                            a model folder: what its README.md says
    origin_of("ORG/MODEL"), origin_of("transformers:...")   a model on the Hub: what its card says
    origin_of("timm:vit_small_patch16_dinov3.lvd1689m")     what timm knows of its weights

What cannot be found out stays None: a card never names a licence that nobody gave. Nothing here fails for want of a
network.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, metadata_load, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .connection import HUB_ERRORS, endpoint, patience, quiet_client


CARD = "README.md"


def license_patterns() -> Iterator[str]:
    """Names of files that hold a licence or what it asks to be passed on: in capitals, or texts in any case."""
    for stem in ("license", "licence", "copying", "notice"):
        in_any_case = "".join(f"[{letter}{letter.upper()}]" for letter in stem)
        yield f"{stem.upper()}*"
        yield from (f"{in_any_case}{ending}" for ending in ("", "*.md", "*.txt", "*.rst"))


LICENSE_FILES = tuple(license_patterns())
PATIENCE = 5.0  # seconds of silence; a run's result does not wait for a slow Hub

# Identifiers that the Hub has for licences that timm names. Others are `other` there, with a name and a link.
LICENSES_OF_HUB = frozenset({"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "gemma", "mit"})
LICENSE_LINKS = {"dinov3-license": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"}


@dataclass(frozen=True)
class Origin:
    """What is known of the model that another is derived from.

    Attributes:
        name: as others may know it: a Hub id, a timm name, or of a folder of this machine its last part.
        base_model: the Hub id, or ids, for `base_model` of a card; None where there is none.
        license: an identifier of the Hub, or several; `other` goes with a name and a link.
        license_name: of an `other` licence.
        license_link: of an `other` licence: an address, or the name of one of `license_files`.
        license_files: its text, in files of this machine.
    """

    name: str
    base_model: str | list[str] | None = None
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_files: tuple[Path, ...] = field(default=(), repr=False)

    @property
    def license_metadata(self) -> dict[str, Any]:
        """The licence as keywords of ModelCardData."""
        return {"license": self.license, "license_name": self.license_name, "license_link": self.license_link}

    @property
    def license_in_words(self) -> str | None:
        """The licence by its name; None where it is not known."""
        named = self.license_name if self.license == "other" and self.license_name else self.license
        return ", ".join(named) if isinstance(named, list) else named

    def copy_license(self, folder: Path) -> None:
        """Put the text of the licence into a model folder.

        Raises:
            OSError: if it cannot be written.
        """
        for file in self.license_files:
            if file.resolve().parent != folder.resolve():
                shutil.copyfile(file, folder / file.name)


def origin_of(source: str) -> Origin:
    """What is known of a model folder, an id on the Hub, `timm:NAME[@FILE]` or `transformers:PATH_OR_ID`."""
    kind, colon, name = source.partition(":")
    if colon and kind in KINDS:
        return KINDS[kind](name)
    return of_folder_or_id(source)


# Folders and the Hub -------------------------------------------------------------------------------------------------


def of_folder_or_id(source: str) -> Origin:
    """A folder where there is one of this name, else a model on the Hub."""
    return of_folder(Path(source)) if Path(source).exists() else of_hub_id(source)


def of_transformers(name: str) -> Origin:
    """A folder, or a model on the Hub, perhaps with `@REVISION`."""
    return of_folder_or_id(name) if Path(name).exists() else of_hub_id(name.partition("@")[0])


def of_folder(folder: Path) -> Origin:
    """What its card says. It is no model that others can find; the one that it was made from may be."""
    card = card_metadata(folder)
    return licensed_as(Origin(folder.resolve().name, base_model=card.get("base_model")), card, folder)


def of_hub_id(repo_id: str) -> Origin:
    """What its card says, from the cache where the Hub cannot be reached or HF_HUB_OFFLINE is set."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return Origin(repo_id)
    origin = Origin(repo_id, base_model=repo_id)
    folder = local_card(repo_id)
    if folder is None:
        return origin
    return licensed_as(origin, card_metadata(folder), folder, address=f"{endpoint()}/{repo_id}/blob/main")


def local_card(repo_id: str) -> Path | None:
    """A folder with the card and the licence files of a model on the Hub; None where there is no way to them."""
    try:
        HfApi().model_info(repo_id, timeout=PATIENCE)  # snapshot_download would wait for a silent Hub for ever
        is_there = True
    except HUB_ERRORS:
        is_there = False
    try:
        with patience(PATIENCE), quiet_client(with_bars=False):
            files = [CARD, *LICENSE_FILES]
            return Path(snapshot_download(repo_id, allow_patterns=files, local_files_only=not is_there))
    except HUB_ERRORS:
        return None


def card_metadata(folder: Path) -> dict[str, Any]:
    """The header of a folder's card; empty where there is none, or none that can be read."""
    try:
        return metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def licensed_as(origin: Origin, card: dict[str, Any], folder: Path, address: str | None = None) -> Origin:
    """With the licence that a card names, and the files beside it that hold its text.

    Args:
        address: where others find the files that are not in `folder`; None: nowhere, so that no link names them.
    """
    name = card.get("license")
    if not name or name == "unknown":
        return origin
    files = license_files(folder)
    link = card.get("license_link") or (files[0].name if name == "other" and files else None)
    if link and "://" not in link and not (folder / link).is_file():
        link = f"{address}/{link}" if address else None
    return replace(
        origin,
        license=name,
        license_name=card.get("license_name"),
        license_link=link,
        license_files=files,
    )


def license_files(folder: Path) -> tuple[Path, ...]:
    """Those in a folder, licences before notices."""
    found = [file for pattern in LICENSE_FILES for file in sorted(folder.glob(pattern)) if file.is_file()]
    return tuple(dict.fromkeys(found))


# timm ----------------------------------------------------------------------------------------------------------------


def of_timm_name(name: str) -> Origin:
    """What timm knows of the weights of a model; of weights in a file of one's own nothing is known."""
    name, _, file = name.partition("@")
    where, separator, place = name.partition(":")
    if file:
        return Origin(f"timm:{name}")
    if separator:
        return of_hub_id(place.partition("@")[0]) if where.replace("_", "-") == "hf-hub" else of_folder(Path(place))
    try:
        import timm

        known = timm.get_pretrained_cfg(name)
    except (ImportError, RuntimeError):  # timm is not installed, or does not know the name
        known = None
    if known is None:
        return Origin(f"timm:{name}")
    origin = Origin(f"timm:{name}", base_model=known.hf_hub_id)
    if not known.license or known.license == "unknown":
        return origin
    if known.license in LICENSES_OF_HUB:
        return replace(origin, license=known.license)
    link = LICENSE_LINKS.get(known.license) or (
        f"https://huggingface.co/{known.hf_hub_id}" if known.hf_hub_id else None
    )
    return replace(origin, license="other", license_name=known.license, license_link=link)


KINDS: dict[str, Callable[[str], Origin]] = {"timm": of_timm_name, "transformers": of_transformers}
