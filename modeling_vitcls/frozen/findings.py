"""Possible problems of a result, such as a border that decides: each finding is a row of `FINDINGS`.

    a fitted classifier -> examine -> name of each finding -> record     `findings` of the classifier in results.json
    records -> describe_findings -> name -> one sentence                 printed by the run, and on its page and card

A record has numbers and names, and no sentence. Whether they are worth a sentence is judged in one
function, wherever it is shown. To add a finding, write its two functions and a row, and a test that
plants what is found and checks that nothing is said without it.

What is known before a classifier is fitted is printed earlier: the scenes (scenes.py), and leaks and
missing classes of the data (data/splits.py).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..data.splits import TrainingData
from ..inference.metrics import round_floats
from .border import describe_border, measure_border
from .camera import describe_camera, measure_camera
from .curve import describe_learning_curve, measure_learning_curve
from .heads import FrozenHead, describe_threshold, measure_threshold
from .pairs import describe_pairs, measure_pairs


Record = dict[str, Any]
# Where a sentence may be shown
RUN, PAGE, CARD = "run", "page", "card"


@dataclass(frozen=True)
class Finding:
    """A row of `FINDINGS`.

    Attributes:
        name: of its record and of the printed line.
        measure: computes the record; None if it cannot be measured.
        judge: says what the record means, in one sentence, or returns None if that is nothing.
        places: where the sentence is shown.
        is_of_result: whether it is measured only for the one classifier that a run saves, and not for
            the start of steps or for each of several tasks.
    """

    name: str
    measure: Callable[[TrainingData, FrozenHead], Record | None]
    judge: Callable[[Record], str | None]
    places: tuple[str, ...]
    is_of_result: bool = False


FINDINGS = (
    Finding("border", measure_border, describe_border, (RUN, PAGE, CARD)),
    Finding("camera", measure_camera, describe_camera, (RUN, PAGE, CARD)),
    Finding("curve", measure_learning_curve, describe_learning_curve, (RUN, PAGE), True),
    Finding("pairs", measure_pairs, describe_pairs, (RUN, PAGE, CARD), True),
    Finding("unknown", measure_threshold, describe_threshold, (RUN,), True),
)


def examine(data: TrainingData, head: FrozenHead, is_result: bool) -> dict[str, Record]:
    """Measure each finding of a classifier; those that cannot be measured have no record."""
    records = {}
    for each in FINDINGS:
        if is_result or not each.is_of_result:
            record = each.measure(data, head)
            if record is not None:
                records[each.name] = round_floats(record)
    return records


def describe_findings(records: Mapping[str, Record], place: str) -> dict[str, str]:
    """Say what the records of a classifier mean: the sentences of a place by name, those that there are."""
    return {
        each.name: text
        for each in FINDINGS
        if place in each.places
        and each.name in records
        and (text := each.judge(records[each.name]))
    }
