"""A finding is measured, judged and shown as its row says (CONTRIBUTING.md, "How to add a finding")."""

from typing import Any

import pytest
from pytest import MonkeyPatch

from modeling_vitcls.frozen import findings
from modeling_vitcls.frozen.findings import CARD, PAGE, RUN, Finding


@pytest.fixture(autouse=True)
def mirror(monkeypatch: MonkeyPatch) -> None:
    """Replace the table by one new row."""
    row = Finding(
        name="mirror",
        measure=lambda data, head: None if head is None else {"share": head},
        judge=lambda record: "mirrored" if record["share"] > 0.5 else None,
        places=(RUN, CARD),
        is_of_result=True,
    )
    monkeypatch.setattr(findings, "FINDINGS", (row,))


def examine(head: Any, is_result: bool = True) -> dict[str, Any]:
    """Measure the row for a classifier."""
    data = None
    return findings.examine(data, head, is_result)


def test_a_sentence_is_shown_in_the_places_of_its_row_if_it_is_worth_one() -> None:
    records = examine(head=0.7)
    assert records == {"mirror": {"share": 0.7}}
    for place in (RUN, CARD):
        assert findings.describe_findings(records, place) == {"mirror": "mirrored"}
    assert not findings.describe_findings(records, PAGE)
    assert not findings.describe_findings(examine(head=0.2), RUN)


def test_what_cannot_be_measured_or_is_not_of_the_result_has_no_record() -> None:
    assert not examine(head=None)
    assert not examine(head=0.7, is_result=False)
