"""Labels of a dataset are matched with those of a model by their names."""

from helpers.photo_folders import get_unicode_forms
from helpers.tiny_models import raises_one_line
from pytest import LogCaptureFixture

from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.data.labels import LabelSpace, OneLabel, SeveralLabels
from modeling_vitcls.evaluation.evaluate import translate_labels


def build_single_label_space(*names: str) -> LabelSpace:
    return OneLabel({"label": list(names)})


def test_labels_are_matched_to_the_model_by_name() -> None:
    """A table of `predict` has a line break in a name as an escape sequence."""
    pictures = LabeledImages([], [0, 1, 0])
    composed, decomposed = get_unicode_forms("thé")
    assert translate_labels(
        pictures,
        build_single_label_space(composed, "du\\nsk"),
        build_single_label_space("dawn", "du\nsk", decomposed),
    ).labels == [2, 1, 2]

    with raises_one_line("'noon'", "only the labels label 0. Remove"):
        translate_labels(
            pictures,
            build_single_label_space("noon", "label 0"),
            build_single_label_space("label 0"),
        )

    # an unused name has no effect
    translate_labels(
        LabeledImages([], [1]),
        build_single_label_space("noon", "dusk"),
        build_single_label_space("dusk"),
    )


def test_labels_without_names_are_shown_how_to_get_them() -> None:
    """transformers names the labels of a model that was built with `num_labels` LABEL_0, ..."""
    unnamed = build_single_label_space("LABEL_0", "LABEL_1")
    with raises_one_line("config.json", '"id2label": {"0": "dusk", "1": "noon"}'):
        translate_labels(
            LabeledImages([], [1, 0]), build_single_label_space("dusk", "noon"), unnamed
        )


def test_labels_of_the_model_without_a_column_are_named(caplog: LogCaptureFixture) -> None:
    """Otherwise, an image that shows an owl is scored as one without an owl, without a word."""
    spaces = [SeveralLabels({"tags": ["dog", "cat", *more]}) for more in ([], ["owl"])]
    assert translate_labels(LabeledImages([], [[0, 1]]), *spaces).labels == [[0, 1]]
    assert "no image has the labels owl: they count as absent" in caplog.text
