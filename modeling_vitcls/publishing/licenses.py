"""The license of a model's weights, in a card:

    new weights                 the license given with `--license`, or no license
    weights of another model    the license of that model, if known
    the Python files            Apache-2.0, independently of the license of the weights
"""

from dataclasses import dataclass
from typing import Any

from ..hub.provenance import Provenance


# Sentences about weights whose license is known, and about weights whose license is unknown.
NEW_WEIGHTS_TEXTS = (
    "The weights are licensed under {license}.",
    "The authors did not specify a license for the weights. Ask the authors before you use or redistribute the "
    "weights.",
)
DERIVED_WEIGHTS_TEXTS = (
    "The weights are derived from another model and remain under its license: {license}.",
    "The weights are derived from another model whose license is unknown. Ask the authors of that model before you "
    "use or redistribute the weights.",
)
CONVERTED_WEIGHTS_TEXTS = (
    "The weights remain under the license of the source: {license}.",
    "No license was found for the source. Ask the authors of the source before you use or redistribute the weights.",
)


@dataclass(frozen=True)
class WeightsLicense:
    """License of a model's weights, and the sentences that describe the license."""

    sentences: tuple[str, str]  # sentence for a known license, sentence for an unknown license
    source: Provenance | None  # provenance with the name, link and text of the license; None if unknown
    teacher: Provenance | None = None  # distillation teacher, whose license is also stated
    has_code: bool = True  # whether the repository contains code; if so, the license of the code is also named

    @property
    def metadata(self) -> dict[str, Any]:
        """Return the license as keyword arguments of ModelCardData; empty if the license is unknown."""
        return self.source.license_metadata if self.source else {}

    def __str__(self) -> str:
        """Return the sentences, separated by spaces."""
        known_license_sentence, unknown_license_sentence = self.sentences
        sentences = [unknown_license_sentence]
        if self.source is not None and self.source.license_label is not None:
            label, link, files = self.source.license_label, self.source.license_link, self.source.license_files
            sentences = [known_license_sentence.format(license=f"[{label}]({link})" if link else label)]
            sentences += [f"The license text is in {', '.join(file.name for file in files)}."] if files else []
        if self.teacher is not None and self.teacher.license_label is not None:
            sentences.append(f"The teacher model of the distillation is licensed under {self.teacher.license_label}.")
        sentences += ["The Python files are licensed under Apache-2.0."] if self.has_code else []
        return " ".join(sentences)


def describe_license_conflict(license_flag: str | None, base_provenance: Provenance | None) -> str | None:
    """Return a one-line warning if `--license` differs from the inherited license; None otherwise."""
    if license_flag is None or base_provenance is None or base_provenance.license in (None, license_flag):
        return None
    return (
        f"--license {license_flag} is ignored: the weights are derived from {base_provenance.name} and remain under "
        f"the license {base_provenance.license_label}"
    )
