"""Under which licence weights are, in a card's header and in words.

fresh weights               the licence that those who trained them name, else none
weights of another model    that model's, where it is known
the Python files            Apache-2.0, whatever the weights are under
"""

from dataclasses import dataclass
from typing import Any

from .provenance import Origin


CODE = "The Python files are under Apache-2.0."


@dataclass(frozen=True)
class Words:
    """What is said of weights with a licence, and without one that is known."""

    known: str
    unknown: str


FRESH = Words(
    "The weights are under {licence}.",
    "No licence was named for the weights: ask those who trained them before you use or pass them on.",
)
TRAINED_FURTHER = Words(
    "The weights started from those of another model, and remain under its licence: {licence}.",
    "The weights started from those of another model, whose licence is not known here: ask those who made it before "
    "you use or pass them on.",
)
CONVERTED = Words(
    "The weights remain under the licence of the source: {licence}.",
    "No licence was found with the source, so none is named here: ask those who made it before you use or pass on "
    "its weights.",
)


@dataclass(frozen=True)
class Licence:
    """What weights are under, and how that is said.

    Attributes:
        source: where the licence is from, with its name, link and text; None where nothing is known.
        teacher: of a distillation, whose licence is named beside it.
    """

    words: Words
    source: Origin | None
    teacher: Origin | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """As keywords of ModelCardData; nothing where it is not known."""
        return self.source.license_metadata if self.source else {}

    def __str__(self) -> str:
        """A few sentences."""
        sentences = [self.words.unknown]
        if self.source is not None and self.source.license_in_words is not None:
            name, link, files = self.source.license_in_words, self.source.license_link, self.source.license_files
            sentences = [self.words.known.format(licence=f"[{name}]({link})" if link else name)]
            sentences += [f"Its text is in {', '.join(file.name for file in files)}."] if files else []
        if self.teacher is not None and self.teacher.license_in_words is not None:
            sentences.append(
                f"The teacher, from whose answers they learned, is under {self.teacher.license_in_words}."
            )
        return " ".join([*sentences, CODE])


def licence_of_run(is_fresh: bool, named: str | None, origin: Origin | None, teacher: Origin | None = None) -> Licence:
    """Of weights that were trained here: an inherited licence stays, and where there is none, they name one.

    Args:
        is_fresh: whether they started from random numbers.
        named: `--license`.
        origin: of the model that they started from.
        teacher: of a distillation.
    """
    inherits = origin is not None and origin.license is not None
    if is_fresh or (named and not inherits):
        return Licence(FRESH, Origin("", license=named), teacher)
    return Licence(TRAINED_FURTHER, origin, teacher)


def overruled(named: str | None, origin: Origin | None) -> str | None:
    """A warning in one line where `--license` names another licence than the weights brought along."""
    if named is None or origin is None or origin.license in (None, named):
        return None
    return (
        f"--license {named} is not in the card: the weights started from {origin.name}, and remain under its licence, "
        f"{origin.license_in_words}"
    )
