"""The base model of a model and the license of its weights, for the card.

    find_provenance("runs/pretrained")                      a model folder: from its README.md
    find_provenance("ORG/MODEL")                            a model on the Hub: from its card; also transformers:...
    find_provenance("timm:vit_small_patch16_dinov3.lvd1689m")   from timm's pretrained configuration

Unknown values are None: a card never names a license that the authors did not name. Without a network connection,
values are unknown, and no error is raised.
"""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, metadata_load, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .connection import HUB_ERRORS, get_endpoint, set_hub_timeout, silence_hub_client
from .loading import split_revision


CARD = "README.md"


def list_license_patterns() -> Iterator[str]:
    """Yield patterns of license and notice files: any ending in upper case, text endings in any case."""
    for stem in ("license", "licence", "copying", "notice"):
        any_case = "".join(f"[{letter}{letter.upper()}]" for letter in stem)
        yield f"{stem.upper()}*"
        yield from (f"{any_case}{ending}" for ending in ("", "*.md", "*.txt", "*.rst"))


LICENSE_FILES = tuple(list_license_patterns())
TIMEOUT = 5.0  # seconds without a response; a finished run does not wait for a slow Hub

# timm's license identifiers that the Hub supports. Any other license is `other` on the Hub, with a name and a link.
HUB_LICENSES = frozenset({"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "gemma", "mit"})
LICENSE_LINKS = {"dinov3-license": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"}


@dataclass(frozen=True)
class Provenance:
    """The name, base model and license of the model that another model is derived from.

    Attributes:
        name: Public name: a Hub id, a timm name, or the last component of a local folder.
        base_model: The Hub id or ids for `base_model` in a card; None if there is none.
        license: One or several license identifiers of the Hub; `other` requires a name and a link.
        license_name: Name of an `other` license.
        license_link: Link of an `other` license: an address, or the name of one of `license_files`.
        license_files: Local files with the license text.
    """

    name: str
    base_model: str | list[str] | None = None
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    license_files: tuple[Path, ...] = field(default=(), repr=False)

    @property
    def license_metadata(self) -> dict[str, Any]:
        """The license as keywords of ModelCardData."""
        return {"license": self.license, "license_name": self.license_name, "license_link": self.license_link}

    @property
    def license_label(self) -> str | None:
        """The name of the license; None if it is unknown."""
        label = self.license_name if self.license == "other" and self.license_name else self.license
        return ", ".join(label) if isinstance(label, list) else label

    def copy_license(self, folder: Path) -> None:
        """Copy the license text to a model folder.

        Raises:
            OSError: If the files cannot be written.
        """
        for file in self.license_files:
            if file.resolve().parent != folder.resolve():
                shutil.copyfile(file, folder / file.name)


def find_provenance(source: str) -> Provenance:
    """Return the provenance of a model folder, a Hub id, `timm:NAME[@FILE]` or `transformers:PATH_OR_ID`."""
    if source.startswith("timm:"):
        return find_timm_provenance(source.removeprefix("timm:"))
    if source.startswith("transformers:"):
        source = source.removeprefix("transformers:")
        if not Path(source).exists():
            return fetch_hub_provenance(source.partition("@")[0])
    return (
        read_folder_provenance(Path(source))
        if Path(source).exists()
        else fetch_hub_provenance(split_revision(source)[0])
    )


# Folders and the Hub -------------------------------------------------------------------------------------------------


def read_folder_provenance(folder: Path) -> Provenance:
    """Return the provenance in a folder's card. The base model is the base model of the folder's model."""
    card = read_card_metadata(folder)
    return add_license(Provenance(folder.resolve().name, base_model=card.get("base_model")), card, folder)


def fetch_hub_provenance(repo_id: str) -> Provenance:
    """Return the provenance in a card on the Hub, or in its cached copy if the Hub cannot be reached."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return Provenance(repo_id)
    provenance = Provenance(repo_id, base_model=repo_id)
    folder = download_card(repo_id)
    if folder is None:
        return provenance
    return add_license(provenance, read_card_metadata(folder), folder, address=f"{get_endpoint()}/{repo_id}/blob/main")


def download_card(repo_id: str) -> Path | None:
    """Return a folder with the card and the license files of a model on the Hub; None if they are unavailable."""
    try:
        HfApi().model_info(repo_id, timeout=TIMEOUT)  # snapshot_download has no timeout of its own
        is_reachable = True
    except HUB_ERRORS:
        is_reachable = False
    try:
        with set_hub_timeout(TIMEOUT), silence_hub_client(show_progress=False):
            files = [CARD, *LICENSE_FILES]
            return Path(snapshot_download(repo_id, allow_patterns=files, local_files_only=not is_reachable))
    except HUB_ERRORS:
        return None


def read_card_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a folder's card; empty if there is no readable card."""
    try:
        return metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def add_license(provenance: Provenance, card: dict[str, Any], folder: Path, address: str | None = None) -> Provenance:
    """Return the provenance with the license of a card and the license files of its folder.

    Args:
        provenance: Provenance without a license.
        card: Metadata of the card.
        folder: Folder of the card.
        address: Address of files that are not in `folder`; None if they are not published.
    """
    name = card.get("license")
    if not name or name == "unknown":
        return provenance
    files = find_license_files(folder)
    link = card.get("license_link") or (files[0].name if name == "other" and files else None)
    if link and "://" not in link and not (folder / link).is_file():
        link = f"{address}/{link}" if address else None
    return replace(
        provenance,
        license=name,
        license_name=card.get("license_name"),
        license_link=link,
        license_files=files,
    )


def find_license_files(folder: Path) -> tuple[Path, ...]:
    """Return the license files in a folder; licenses come before notices."""
    files = [file for pattern in LICENSE_FILES for file in sorted(folder.glob(pattern)) if file.is_file()]
    return tuple(dict.fromkeys(files))


# timm ----------------------------------------------------------------------------------------------------------------


def find_timm_provenance(name: str) -> Provenance:
    """Return the provenance of timm weights; only the name is known for weights in a local file."""
    name, _, file = name.partition("@")
    kind, separator, location = name.partition(":")
    if file:
        return Provenance(f"timm:{name}")
    if separator:
        is_hub = kind.replace("_", "-") == "hf-hub"
        return fetch_hub_provenance(location.partition("@")[0]) if is_hub else read_folder_provenance(Path(location))
    try:
        import timm

        config = timm.get_pretrained_cfg(name)
    except (ImportError, RuntimeError):  # timm is not installed, or has no model of this name
        config = None
    if config is None:
        return Provenance(f"timm:{name}")
    provenance = Provenance(f"timm:{name}", base_model=config.hf_hub_id)
    if not config.license or config.license == "unknown":
        return provenance
    if config.license in HUB_LICENSES:
        return replace(provenance, license=config.license)
    link = LICENSE_LINKS.get(config.license) or (
        f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else None
    )
    return replace(provenance, license="other", license_name=config.license, license_link=link)
