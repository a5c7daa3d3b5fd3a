"""Forward passes of an inspection: their number, and the images and labels that they belong to.

The number is known in advance, and is small for large models. Images and labels stay together,
although unreadable images are skipped and batches have images of one shape.
"""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import build_tiny_config, raises_one_line
from helpers.varied_models import center_logits
from PIL import Image

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.analysis import inspection
from modeling_vitcls.analysis.ablation import MIN_IMAGES, Features, Predictions
from modeling_vitcls.analysis.inspection import (
    InspectionBatches,
    compute_confidences,
    inspect_model,
    select_images,
)
from modeling_vitcls.model.heads_vitcls import IGNORED_LABEL


NUM_IMAGES = 18
PROCESSOR = ViTCLSImageProcessor(size={"height": 32, "width": 32})


def build_images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        for _ in range(NUM_IMAGES)
    ]


def build_classifier(**fields: Any) -> ViTCLSForImageClassification:
    """1 CLS token, which the head uses, and 2 registers."""
    model = ViTCLSForImageClassification(
        build_tiny_config(**{"num_labels": 8, "num_register_tokens": 2, **fields})
    )
    return center_logits(model, PROCESSOR(build_images(), return_tensors="pt")["pixel_values"])


def test_progress_is_shown_and_large_models_use_fewer_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_classifier()
    descriptions = []

    def watch(items: Any, description: str) -> Any:
        descriptions.append((description, len(items)))
        return items

    monkeypatch.setattr(inspection, "MAX_ABLATION_FLOPS", 1)
    monkeypatch.setattr(inspection, "build_image_report", lambda *_: None)
    found = inspect_model(model, PROCESSOR, build_images(), num_shown=1, watch=watch)
    # images, batches, tokens and groups, their null distributions, and shown images
    assert [number for _, number in descriptions] == [NUM_IMAGES, 1, 4, 2, 1]
    assert descriptions[0] == ("reading images", NUM_IMAGES)
    assert ("ablating tokens", 4) in descriptions
    # large models use fewer images for effects, null distributions and decisions, but never too few
    assert found.num_ablation_images == MIN_IMAGES < found.findings.num_images == NUM_IMAGES
    effects = [effect for by_key in found.ablations.values() for effect in by_key.values()]
    assert {effect.num_images for effect in effects} == {MIN_IMAGES}


# Images and labels --------------------------------------------------------------------------------


def test_labels_and_names_stay_with_their_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of two shapes alternate, one image is unreadable, and one label is unknown."""
    generator = np.random.default_rng(1)
    shapes = [(32, 32, 3), (32, 48, 3)] * 4
    images = [
        Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes
    ]
    images[3] = Image.new("F", (32, 32))
    processor = ViTCLSImageProcessor(size={"shortest_edge": 32})
    model = build_classifier()
    readable = [index for index in range(8) if index != 3]
    probabilities = {}
    for index in readable:
        with torch.no_grad():
            logits = model(processor(images[index], return_tensors="pt")["pixel_values"]).logits[0]
        probabilities[index] = logits.softmax(dim=0)
    labels = [int(probabilities[index].argmax()) if index in readable else 0 for index in range(8)]
    labels[4] = (labels[4] + 1) % 8
    labels[5] = (labels[5] + 1) % 8
    labels[6] = IGNORED_LABEL
    monkeypatch.setattr(inspection, "MAX_ABLATION_IMAGES", 5)
    monkeypatch.setattr("modeling_vitcls.analysis.ablation.NUM_NULL_DRAWS", 2)
    warnings: list[str] = []

    found = inspect_model(
        model,
        processor,
        images,
        names=[f"name {index}" for index in range(8)],
        labels=labels,
        num_shown=4,
        batch_size=2,
        on_warning=warnings.append,
    )
    assert found.findings.num_images == 7
    assert (found.num_ablation_images, found.num_parameters) == (5, model.num_parameters())
    assert (found.model_class, found.use.has_head) == ("ViTCLSForImageClassification", True)
    assert found.num_unreadable == 1
    assert len(warnings) == 1
    assert "mode F" in warnings[0]

    confidences = {index: values.max().item() for index, values in probabilities.items()}
    wrong = sorted([4, 5], key=lambda index: -confidences[index])
    uncertain = min({0, 1, 2, 6, 7}, key=lambda index: confidences[index])

    shown = [(report.name, report.truth, report.kind) for report in found.image_reports]
    assert shown[:2] == [(f"name {index}", f"LABEL_{labels[index]}", "wrong") for index in wrong]
    assert shown[2][0] == f"name {uncertain}"
    assert [kind for *_, kind in shown[2:]] == ["uncertain", "typical"]

    for report in found.image_reports:
        index = int(report.name.removeprefix("name "))
        label, probability = report.predictions[0].labels[0]
        assert label == f"LABEL_{probabilities[index].argmax()}"
        assert probability == pytest.approx(confidences[index], abs=1e-5)


def test_unreadable_images_are_skipped_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names count all images.

    There is one warning for each unreadable image. An encoder outputs both CLS tokens.
    """
    monkeypatch.setattr("modeling_vitcls.analysis.ablation.NUM_NULL_DRAWS", 2)
    encoder = ViTCLSModel(build_tiny_config(num_cls_tokens=2, num_register_tokens=1)).eval()
    images = [Image.new("F", (32, 32)), *build_images()[:2]]
    warnings = []
    found = inspect_model(
        encoder, PROCESSOR, images, labels=["cat"] * 3, on_warning=warnings.append
    )

    assert [(report.name, report.truth) for report in found.image_reports] == [
        ("image 2", None),
        ("image 3", None),
    ]
    assert (found.num_unreadable, len(warnings)) == (1, 1)
    assert [verdict.numbers["read_layers"] for verdict in found.verdicts[:3]] == [2, 2, 1]
    assert found.patches.numbers["layer"] == 2  # the last layer


def test_hidden_states_that_are_not_finite_are_errors() -> None:
    model = ViTCLSForImageClassification(build_tiny_config(num_cls_tokens=0, pooling="mean")).eval()
    with torch.no_grad():
        model.vitcls.layers[0].mlp.fc2.bias[0] = torch.inf
    with raises_one_line("not finite"):
        inspect_model(model, PROCESSOR, build_images()[:1])


def test_samples_of_batches_keep_their_labels() -> None:
    """The order is that in which batches contain the images: first one shape, then the other."""
    model = build_classifier()
    pixels = {
        index: torch.full((3, 32, 40 if index % 2 else 32), float(index)) for index in range(9)
    }
    labels = {index: torch.tensor([10 * index]) for index in range(9)}
    batches = InspectionBatches(model, pixels, labels, batch_size=3)

    assert batches.order == [0, 2, 4, 6, 8, 1, 3, 5, 7]
    assert [len(batch.indices) for batch in batches] == [3, 2, 3, 1]
    for batch, indices in zip(batches.sample(3), [[2, 8], [5]], strict=True):
        assert batch.indices == indices
        assert batch.pixel_values[:, 0, 0, 0].tolist() == indices
        assert batch.labels.flatten().tolist() == [10 * index for index in indices]

    unlabeled = InspectionBatches(model, pixels, {}, 3).sample(3)
    assert all(batch.labels is None for batch in unlabeled)


@pytest.mark.parametrize(("fields", "num_maps"), [({}, 2), ({"attention_type": "differential"}, 4)])
def test_batches_fit_into_memory(
    fields: dict[str, Any], num_maps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch holds 2 + 8 copies of the states, 2 of the MLP activations, and 3 of the maps.

    There are 19 tokens with states of width 16 and 24 MLP activations.
    """
    pixels = dict.fromkeys(range(7), torch.zeros(3, 32, 32))
    num_bytes = 4 * (19 * 16 * (2 + 8) + 19 * 2 * 24 + 3 * num_maps * 19 * 19)
    limits = {
        4 * num_bytes: [4, 3],
        4 * num_bytes - 1: [3, 3, 1],
        1: [1] * 7,
        99 * num_bytes: [5, 2],
    }
    for limit, sizes in limits.items():
        monkeypatch.setattr(inspection, "MAX_BATCH_BYTES", limit)
        batches = InspectionBatches(build_classifier(**fields), pixels, {}, 5)
        assert [len(batch.indices) for batch in batches] == sizes


# Selection of images ------------------------------------------------------------------------------


def build_predictions(margins: list[float], is_wrong: list[int | None]) -> Predictions:
    """Return predictions of class 0; a larger margin is a higher confidence.

    None means an unknown label.
    """
    logits = torch.tensor([[margin, 0.0] for margin in margins])
    labels = torch.tensor([[IGNORED_LABEL if wrong is None else wrong] for wrong in is_wrong])
    return Predictions(logits, torch.zeros(len(margins), 1, dtype=torch.long), labels)


def test_the_most_instructive_images_are_selected() -> None:
    """At most half are wrong (confident ones first), a quarter is uncertain, the rest typical."""
    config = build_tiny_config(num_labels=2)
    select = lambda output, number: select_images({"": output}, config, number)  # noqa: E731
    before = build_predictions([5, 9, 1, 7, 3, 8, 2, 6, 4, 5.5], [1, 1, 1, 0, 0, None, 0, 0, 0, 0])
    # wrong: 1, 0, 2; others by confidence: 6, 4, 8, 9, 7, 3, 5
    assert select(before, 5) == dict.fromkeys([1, 0, 2], "wrong") | dict.fromkeys(
        [6, 4], "uncertain"
    )
    assert select(before, 4) == {1: "wrong", 0: "wrong", 6: "uncertain", 7: "typical"}
    assert list(select(before, 1)) == [1]

    everything = select(before, 10)
    assert [index for index, kind in everything.items() if kind == "typical"] == [3, 5, 7, 9]
    assert list(everything)[:6] == [1, 0, 2, 6, 4, 8]
    assert select(before, 20).keys() == everything.keys()

    # with few other images, more than half are wrong
    few = build_predictions([5, 4, 3, 2, 1], [1, 1, 1, 1, 0])
    assert select(few, 4) == dict.fromkeys([0, 1, 2], "wrong") | {4: "uncertain"}

    unknown = build_predictions([5, 4, 3, 2, 1], [None] * 5)
    assert select(unknown, 3) == {4: "uncertain", 1: "typical", 3: "typical"}
    age = Predictions(torch.zeros(2, 2), torch.zeros(2, 1), torch.tensor([[0], [0]]))
    tasks = {
        "age": age,
        "kind": Predictions(torch.zeros(2, 2), torch.zeros(2, 1), torch.tensor([[1], [0]])),
    }

    config = build_tiny_config(num_cls_tokens=2, tasks={"age": 2, "kind": 2})
    assert select_images(tasks, config, 2) == {
        0: "wrong",
        1: "uncertain",
    }  # one wrong task is sufficient
    features = Features([torch.zeros(1, 2)] * 10)
    assert select_images({"": features}, config, 3) == dict.fromkeys([1, 5, 8])


def test_the_confidence_is_the_minimum_over_labels() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    single = compute_confidences(logits, build_tiny_config())
    assert single.tolist() == pytest.approx(logits.softmax(dim=1).amax(dim=1).tolist())
    several = compute_confidences(
        torch.tensor([[3.0, -1.0, 2.0]]),
        build_tiny_config(problem_type="multi_label_classification"),
    )
    assert several.tolist() == pytest.approx([1 / (1 + np.exp(-1))], abs=1e-5)
