"""Measured results in a card: tables of classes, names of classes, and sentences about limitations."""

import pytest
from helpers.rendered_cards import PER_CLASS, render_card

from modeling_vitcls.publishing.card_results import format_name


def test_many_classes_have_no_table() -> None:
    for count, has_table in ((20, True), (21, False)):
        card = render_card(per_class=[PER_CLASS[0] | {"name": f"class-{index}"} for index in range(count)])
        assert ("| `class-0` |" in card.text) is has_table


def test_limits_are_the_measured_ones() -> None:
    card = render_card(
        accuracy_interval=[0.964, 0.9925],
        calibration_error=0.0123,
        per_class=[PER_CLASS[0], PER_CLASS[1] | {"recall": 0.9}],
        confusion_matrix=[[198, 2], [16, 144]],
    )
    assert "measured on 360 images. The 95% confidence interval is 96.40% to 99.25%." in card.text
    assert (
        "weakest class is `noon|late`: recall 90.00% on 160 images, 16 of which were predicted as `dusk`" in card.text
    )
    assert "differs from the accuracy by 1.23 percentage points on average" in card.text
    assert "differs from the accuracy by 0.00 percentage points on average" in render_card(calibration_error=0.0).text
    rows = [PER_CLASS[0], PER_CLASS[1] | {"recall": 0.9}]
    without_errors = "weakest class is `noon|late`: recall 90.00% on 160 images."
    assert without_errors in render_card(per_class=rows).text
    assert without_errors in render_card(per_class=rows, confusion_matrix=[[198, 2], [0, 144]]).text
    single = render_card(
        per_class=[rows[0], rows[1] | {"images": 1, "recall": 0.0}], confusion_matrix=[[1, 0], [1, 0]]
    )
    assert "recall 0.00% on 1 image, 1 of which was predicted as `dusk`" in single.text
    alike = [row | {"recall": 0.9} for row in PER_CLASS]
    for unknown in ({}, {"per_class": alike}, {"per_class": PER_CLASS[1:]}):
        assert "weakest" not in render_card(**unknown).text


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("a`b", "`a'b`"),
        ("two\nlines", "`two lines`"),
        ("x" * 100, f"`{'x' * 100}`"),
        ("x" * 101, f"`{'x' * 99}…`"),
    ],
)
def test_names_are_inline_code_of_one_line(name: str, code: str) -> None:
    assert format_name(name) == code
