"""The license of the weights, in a card's header and in its text.

new weights                 the license given with `--license`, or no license
weights of another model    the license of that model, if it is known
the Python files            Apache-2.0, independent of the license of the weights
"""

from dataclasses import dataclass
from typing import Any

from .provenance import Provenance


CODE_LICENSE = "The Python files are licensed under Apache-2.0."


@dataclass(frozen=True)
class LicenseSentences:
    """Sentences about weights whose license is known, and about weights whose license is unknown."""

    known: str
    unknown: str


NEW_WEIGHTS = LicenseSentences(
    "The weights are licensed under {license}.",
    "The authors named no license for the weights. Ask the authors before you use or redistribute the weights.",
)
DERIVED_WEIGHTS = LicenseSentences(
    "The weights are derived from another model and remain under its license: {license}.",
    "The weights are derived from another model whose license is unknown. Ask its authors before you use or "
    "redistribute the weights.",
)
CONVERTED_WEIGHTS = LicenseSentences(
    "The weights remain under the license of the source: {license}.",
    "No license was found for the source. Ask its authors before you use or redistribute the weights.",
)


@dataclass(frozen=True)
class WeightsLicense:
    """The license of weights, and the sentences that describe it.

    Attributes:
        sentences: Sentences for a known and an unknown license.
        source: Provenance with the license's name, link and text; None if nothing is known.
        teacher: Provenance of the teacher of a distillation, whose license is named as well.
        has_code: Whether the repository contains code, whose license is named as well.
    """

    sentences: LicenseSentences
    source: Provenance | None
    teacher: Provenance | None = None
    has_code: bool = True

    @property
    def metadata(self) -> dict[str, Any]:
        """The license as keywords of ModelCardData; empty if it is unknown."""
        return self.source.license_metadata if self.source else {}

    def __str__(self) -> str:
        """Return a few sentences."""
        sentences = [self.sentences.unknown]
        if self.source is not None and self.source.license_label is not None:
            label, link, files = self.source.license_label, self.source.license_link, self.source.license_files
            sentences = [self.sentences.known.format(license=f"[{label}]({link})" if link else label)]
            sentences += [f"The license text is in {', '.join(file.name for file in files)}."] if files else []
        if self.teacher is not None and self.teacher.license_label is not None:
            sentences.append(f"The teacher model of the distillation is licensed under {self.teacher.license_label}.")
        return " ".join([*sentences, CODE_LICENSE] if self.has_code else sentences)


def get_run_license(
    is_from_random_weights: bool, license_flag: str | None, base: Provenance | None, teacher: Provenance | None = None
) -> WeightsLicense:
    """Return the license of weights that were trained here.

    An inherited license is kept. `--license` applies if there is none.

    Args:
        is_from_random_weights: Whether training started from random weights.
        license_flag: Value of `--license`.
        base: Provenance of the model that training started from.
        teacher: Provenance of the teacher of a distillation.
    """
    is_inherited = base is not None and base.license is not None
    if is_from_random_weights or (license_flag and not is_inherited):
        return WeightsLicense(NEW_WEIGHTS, Provenance("", license=license_flag), teacher)
    return WeightsLicense(DERIVED_WEIGHTS, base, teacher)


def describe_license_conflict(license_flag: str | None, base: Provenance | None) -> str | None:
    """Return a one-line warning if `--license` differs from the inherited license; None otherwise."""
    if license_flag is None or base is None or base.license in (None, license_flag):
        return None
    return (
        f"--license {license_flag} is ignored: the weights are derived from {base.name} and remain under its license, "
        f"{base.license_label}"
    )
