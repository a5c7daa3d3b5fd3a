"""The name of the model in a card: a push replaces only generated names."""

import pytest
from card_of_folder import OWN_CARD

from modeling_vitcls.hub.card_renaming import replace_model_name


CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


@pytest.mark.parametrize(
    ("text", "is_changed"),
    [
        (OWN_CARD.replace("my-run\n", "ann/other\n").replace('"my-run"', '"ann/other"').replace("l my", "l x"), False),
        (CARD, False),  # written by hand
        ("# my-run\n", False),  # a heading that is not the name of a model
        ('# old/name\nfrom_pretrained("old/name")\n', True),  # written for another repository
        ('---\nlicense: mit\n---\n\n# old/name\nfrom_pretrained("old/name")\n', True),
        ("---\nlicense: [\n---\n# x\n", False),  # the Hub returns the error
        ("---\nmodel-index: 3\n---\n", False),
        ("---\nmodel-index: [3, {name: [x]}]\n---\n# x\n", False),
        ("---\n- a\n---\n# x\n", False),
        ('---\nmodel-index:\n- name: old/name\n---\n# x\nfrom_pretrained("old/name")\n', True),
        ("---\r\nlicense: mit\r\n---\r\n# x\r\n", False),
        ("", False),
    ],
)
def test_other_cards_are_not_changed(text: str, is_changed: bool) -> None:
    found = replace_model_name("ann/other", text, "my-run")
    assert found == (text.replace("old/name", "ann/other") if is_changed else text)


def test_the_name_of_the_folder_in_the_model_index_is_replaced() -> None:
    card = "---\nlicense: mit\nmodel-index:\n- name: my-run\n  results: []\n---\n# Notes\n"
    assert replace_model_name("ann/other", card, "my-run") == card.replace("my-run", "ann/other")
