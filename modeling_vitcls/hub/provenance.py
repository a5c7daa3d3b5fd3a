"""Base model and license of a model's weights.

    find_provenance("runs/pretrained")                      a model folder: from README.md, or its records
    find_provenance("ORG/MODEL")                            a model on the Hub: from the card; also transformers:...
    find_provenance("timm:vit_small_patch16_dinov3.lvd1689m")   from timm's pretrained configuration

Unknown values are None: a card never states a license that the authors did not specify. Without a
network connection, values that are not in the cache are unknown; no error is raised.
"""

import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import yaml
from huggingface_hub import metadata_load

from ..runtime.errors import format_error
from ..runtime.files import read_json
from .loading import get_model_folder, is_hub_id, split_revision
from .local_paths import split_prefix
from .model_files import (
    CARD_FILE,
    CONFIG_FILE,
    LICENSE_FILES,
    PARITY_REPORT_FILE,
    RESULTS_FILE,
    list_license_files,
)


WEB_ADDRESS = re.compile(r"https?://[^\s()<>]+")  # The rest would end a link in Markdown
# timm's license identifiers that the Hub supports. Any other license is `other` on the Hub, with a
# name and a link.
HUB_LICENSES = frozenset(
    {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "gemma", "mit"}
)


@dataclass(frozen=True)
class Provenance:
    """Name, base model and license of a source model, for the card of a derived model."""

    name: str  # Public name: a Hub id, a timm name, or the last component of a local path
    # The Hub id or ids for `base_model` in a card; None if unknown
    base_model: str | list[str] | None = None
    # One or more Hub license identifiers; `other` requires a name and a link.
    license: str | list[str] | None = None
    license_name: str | None = None  # Name of an `other` license
    # URL of the text of an `other` license, or the name of one of `license_files`
    license_link: str | None = None
    # Local files with the license text
    license_files: tuple[Path, ...] = field(default=(), repr=False)

    @property
    def license_metadata(self) -> dict[str, Any]:
        """The license as keyword arguments of ModelCardData."""
        return {
            "license": self.license,
            "license_name": self.license_name,
            "license_link": self.license_link,
        }

    @property
    def license_label(self) -> str | None:
        """The name of the license; None if the license is unknown."""
        label = self.license_name if self.license == "other" and self.license_name else self.license
        return ", ".join(label) if isinstance(label, list) else label

    def to_dict(self) -> dict[str, Any]:
        """Convert the provenance for results.json. License files are represented by their names."""
        return asdict(self) | {"license_files": [file.name for file in self.license_files]}

    @classmethod
    def from_dict(cls, values: dict[str, Any], folder: Path) -> Self:
        """Restore the provenance that `to_dict` stored in the results.json of a model folder.

        Raise ValueError for a record with other fields.
        """
        try:
            # The file may have been downloaded. A name such as ../id_rsa must not lead out of the
            # folder, because license files are published.
            names = [name for name in values.get("license_files", ()) if name in LICENSE_FILES]
            files = (folder / name for name in names)
            cleaned = {
                "license_link": check_link(values.get("license_link"), names),
                "license_files": tuple(file for file in files if file.is_file()),
            }
            return cls(**values | cleaned)
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"cannot read the provenance in {folder}: {format_error(error)}. Remove it from "
                "results.json and parity_report.json"
            ) from error

    def copy_to(self, folder: Path) -> dict[str, Any]:
        """Copy the license text to the folder of a derived model, and build the record for it.

        Raise OSError if the files cannot be written.
        """
        for file in self.license_files:
            shutil.copyfile(file, folder / file.name)
        return self.to_dict()


def check_link(link: Any, license_files: Collection[str]) -> str | None:
    """Return the link to a license if it is a web address, or one of the license files."""
    if isinstance(link, str) and (link in license_files or WEB_ADDRESS.fullmatch(link)):
        return link
    return None


def find_provenance(source: str) -> Provenance:
    """Find the provenance of a model by its name, from its card and license files.

    The name is a folder, a Hub id, `timm:NAME[@FILE]` or `transformers:PATH_OR_ID`. A model on the
    Hub is itself the base model; the base model of a folder is read from its card. A card without a
    license may be a deleted one, so what a run or a conversion recorded in the folder then applies.
    """
    prefix, location = split_prefix(source)
    # Other prefixes of timm, such as timm:hf-hub:, say where the files are.
    is_timm_name = prefix.startswith("timm:") and not prefix.endswith(":")
    if is_timm_name:
        return find_timm_provenance(prefix)

    folder = Path(location)
    repo_id = None
    if not folder.exists():
        repo_id, _ = split_revision(location)
        try:
            # If the Hub does not respond, this is the cached card.
            patterns = (CONFIG_FILE, CARD_FILE, *LICENSE_FILES)
            folder = Path(get_model_folder(location, patterns))
        except OSError:
            # No network is no reason to stop: the base model is known from its name, and only the
            # license is not.
            return Provenance(repo_id, repo_id if is_hub_id(repo_id) else None)

    try:
        card_metadata = metadata_load(folder / CARD_FILE) or {}
    except (OSError, ValueError, yaml.YAMLError):  # No readable card
        card_metadata = {}

    provenance = Provenance(
        repo_id or folder.resolve().name, base_model=repo_id or card_metadata.get("base_model")
    )
    license_id = card_metadata.get("license")
    if not license_id or license_id == "unknown":
        return fill_from_records(provenance, folder)

    license_files = tuple(folder / name for name in list_license_files(folder))
    names = [file.name for file in license_files]
    license_link = check_link(card_metadata.get("license_link"), names)
    if not license_link and license_id == "other" and names:
        license_link = names[0]
    return replace(
        provenance,
        license=license_id,
        license_name=card_metadata.get("license_name"),
        license_link=license_link,
        license_files=license_files,
    )


def fill_from_records(provenance: Provenance, folder: Path) -> Provenance:
    """Add the license and base model that results.json or the parity report of a folder records."""
    for name in (RESULTS_FILE, PARITY_REPORT_FILE):
        with suppress(OSError, KeyError, ValueError):  # No record, or one of others
            recorded = Provenance.from_dict(read_json(folder / name)["provenance"], folder)
            return replace(
                recorded,
                name=provenance.name,
                base_model=provenance.base_model or recorded.base_model,
            )
    return provenance


def find_timm_provenance(name: str) -> Provenance:
    """Find the provenance of `timm:NAME`. Weights in a local file, `timm:NAME@`, have only the name."""
    import timm

    # Weights in a file may come from anywhere, so the license of timm's own weights does not apply
    # to them.
    config = None if name.endswith("@") else timm.get_pretrained_cfg(name.removeprefix("timm:"))
    if config is None:
        return Provenance(name.rstrip("@"))

    provenance = Provenance(name, base_model=config.hf_hub_id)
    if not config.license or config.license == "unknown":
        return provenance
    if config.license in HUB_LICENSES:
        return replace(provenance, license=config.license)
    return replace(
        provenance,
        license="other",
        license_name=config.license,
        license_link=f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else None,
    )
