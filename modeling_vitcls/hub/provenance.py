"""Base model and license of a model's weights.

    find_provenance("runs/pretrained")                      a model folder: from README.md
    find_provenance("ORG/MODEL")                            a model on the Hub: from the card; also transformers:...
    find_provenance("timm:vit_small_patch16_dinov3.lvd1689m")   from timm's pretrained configuration

Unknown values are None: a card never states a license that the authors did not specify. Without a
network connection, values that are not in the cache are unknown; no error is raised.
"""

import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import yaml
from huggingface_hub import constants, metadata_load

from .connection import hide_hub_progress_bars
from .loading import get_model_folder, is_hub_id
from .model_files import CARD_FILE, CONFIG_FILE, LICENSE_PATTERNS, is_match


# timm's license identifiers that the Hub supports. Any other license is `other` on the Hub, with a
# name and a link.
HUB_LICENSES = frozenset(
    {"apache-2.0", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "gemma", "mit"}
)
LICENSE_LINKS = {
    "dinov3-license": "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
}


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
        """Restore the provenance that `to_dict` stored in the results.json of a model folder."""
        # The file may have been downloaded. A name such as ../id_rsa must not lead out of the
        # folder, because license files are published.
        names = [
            name for name in values.get("license_files", ()) if is_match(name, LICENSE_PATTERNS)
        ]
        files = (folder / name for name in names)
        return cls(**values | {"license_files": tuple(file for file in files if file.is_file())})

    def copy_to(self, folder: Path) -> dict[str, Any]:
        """Copy the license text to the folder of a derived model, and build the record for it.

        Raise OSError if the files cannot be written.
        """
        for file in self.license_files:
            # shutil raises an error if a file is copied onto itself.
            if file.resolve().parent != folder.resolve():
                shutil.copyfile(file, folder / file.name)
        return self.to_dict()


def find_provenance(source: str) -> Provenance:
    """Find the provenance of a model by its name, from its card and license files.

    The name is a folder, a Hub id, `timm:NAME[@FILE]` or `transformers:PATH_OR_ID`. A model on the
    Hub is itself the base model; the base model of a folder is read from its card.
    """
    kind = ""
    path = source.removeprefix("transformers:")
    if source.startswith("timm:"):
        kind, is_located, path = source.removeprefix("timm:").partition(":")
        if not is_located:
            return find_timm_provenance(kind)

    folder = Path(path)
    repo_id = None
    if kind.replace("_", "-") == "hf-hub" or not (kind or folder.exists()):
        repo_id = path.partition("@")[0]
        if not is_hub_id(repo_id):
            return Provenance(repo_id)
        try:
            # If the Hub does not respond, this is the cached card.
            with hide_hub_progress_bars():
                patterns = (CONFIG_FILE, CARD_FILE, *LICENSE_PATTERNS)
                folder = Path(get_model_folder(repo_id, patterns))
        except OSError:
            # No network is no reason to stop: the base model is known from its name, and only the
            # license is not.
            return Provenance(repo_id, base_model=repo_id)

    try:
        card_metadata = metadata_load(folder / CARD_FILE) or {}
    except (OSError, ValueError, yaml.YAMLError):  # No readable card
        card_metadata = {}

    provenance = Provenance(
        repo_id or folder.resolve().name, base_model=repo_id or card_metadata.get("base_model")
    )
    license_id = card_metadata.get("license")
    if not license_id or license_id == "unknown":
        return provenance

    matching_files = (
        file
        for pattern in LICENSE_PATTERNS
        for file in sorted(folder.glob(pattern))
        if file.is_file()
    )
    # The patterns of licenses come before the patterns of notices, and the first file is linked as
    # the license.
    license_files = tuple(dict.fromkeys(matching_files))
    license_link = card_metadata.get("license_link")
    if not license_link and license_id == "other" and license_files:
        license_link = license_files[0].name
    if license_link and "://" not in license_link and not (folder / license_link).is_file():
        license_link = (
            f"{constants.ENDPOINT}/{repo_id}/blob/main/{license_link}" if repo_id else None
        )

    return replace(
        provenance,
        license=license_id,
        license_name=card_metadata.get("license_name"),
        license_link=license_link,
        license_files=license_files,
    )


def find_timm_provenance(name: str) -> Provenance:
    """Find the provenance of NAME[@FILE] of timm; weights in a local file have only the name."""
    name, _, file = name.partition("@")
    provenance = Provenance(f"timm:{name}")
    # These weights may come from anywhere, so the license of timm's own weights does not apply to
    # them.
    if file:
        return provenance
    import timm

    config = None
    with suppress(RuntimeError):  # There is no timm model with this name
        config = timm.get_pretrained_cfg(name)
    if config is None:
        return provenance

    provenance = replace(provenance, base_model=config.hf_hub_id)
    if not config.license or config.license == "unknown":
        return provenance
    if config.license in HUB_LICENSES:
        return replace(provenance, license=config.license)
    card_link = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else None
    return replace(
        provenance,
        license="other",
        license_name=config.license,
        license_link=LICENSE_LINKS.get(config.license) or card_link,
    )
