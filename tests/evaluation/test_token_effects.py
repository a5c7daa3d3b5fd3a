"""What tokens hold and what their places are worth: numbers, verdicts, and planted truths."""

from typing import Any

import pytest
import torch
from helpers.digits_models import HELD_OUT, LABELS, NUM_TRAINED, PIXELS, train_digits_model
from pytest import approx
from scipy.special import log_softmax

from modeling_vitcls.evaluation.token_effects import (
    Change,
    choose_donors,
    compare,
    judge,
    measure_effects,
)
from modeling_vitcls.frozen.targets import OneLabelTarget
from modeling_vitcls.inference.image_pass import ImageBatch


# Numbers ------------------------------------------------------------------------------------------


def test_a_change_is_of_pairs_of_images_with_a_known_label() -> None:
    rows = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40)[:, None] % 3
    labels[30:] = -100
    found, losses = compare(*map(list, rows), OneLabelTarget, labels)

    before, after = -log_softmax(rows, axis=2)[:, range(30), labels[:30, 0]]
    was_right, is_right = rows[:, :30].argmax(dim=2) == labels[:30, 0]
    assert found.num_images == 30
    assert losses == approx(after)
    assert found.loss == approx(after.mean())
    assert found.loss_change == approx((after - before).mean())
    low, high = found.loss_interval
    assert high - low == approx(3.92 * (after - before).std() / 30**0.5, rel=0.15)
    assert 30 * found.accuracy_change == approx(is_right.sum() - was_right.sum())


def change(loss: float, *accuracies: Any) -> Change:
    return Change(100, loss, (loss - 0.002, loss + 0.002), 1, 0, *accuracies)


SAME = 0.5, 0.0, (0.0, 0.0)


@pytest.mark.parametrize(
    ("absent", "content", "verdict"),
    [
        (change(0.9), change(0.8), "content"),
        (change(0.9), change(0.01), "place"),  # a tenth of the place would be content
        (change(0.0), change(0.0), "not shown"),
        (change(-0.03, *SAME), change(0.0), "better without"),
        (change(-0.03), change(0.0), "not shown"),  # no labels
        (change(-0.03, *SAME), change(0.5), "content"),  # as of a token that a head reads
        # A model that was too sure of itself
        (change(-0.03, 0.5, -0.2, (-0.3, -0.1)), change(0.0), "place"),
    ],
)
def test_four_cases_have_four_names(absent: Change, content: Change, verdict: str) -> None:
    assert judge(absent, content) == verdict


def test_the_tokens_come_from_photos_of_other_classes() -> None:
    labels = torch.tensor([[0]] * 20 + [[1]] * 10)
    assert (labels[choose_donors({"": labels}, 30)] != labels).all()
    assert (choose_donors({}, 30) != torch.arange(30)).all()
    assert choose_donors({}, 1).tolist() == [0]


# Planted truths -----------------------------------------------------------------------------------


def test_a_head_reads_the_content_of_cls_and_a_register_that_mends_a_bias_has_a_place() -> None:
    """Register 1 alone is trained, 2 is random and half faded in, 3 is hidden.

    What the second one does, nobody knows.
    """
    model = train_digits_model(num_register_tokens=0).adapt(num_register_tokens=3)
    with torch.no_grad():
        model.classifier.bias[3] += 8
        full = model.vitcls.fade_in.FULL
        model.vitcls.fade_in.progress.copy_(torch.tensor([full, full // 2, 0]))
    token = model.vitcls.embeddings.register_tokens
    optimizer = torch.optim.Adam([token], lr=0.05)
    for indices in torch.arange(NUM_TRAINED).repeat(4).split(100):
        optimizer.zero_grad()
        model(PIXELS[indices], labels=LABELS[indices]).loss.backward()
        token.grad[:, 1:] = 0
        optimizer.step()

    batches = [
        ImageBatch(HELD_OUT[0][rows], HELD_OUT[1][rows], rows.tolist())
        for rows in torch.arange(128).chunk(2)
    ]
    found, _ = measure_effects(model.eval(), batches)
    verdicts = [record["verdict"] for record in (*found[:2], found[3])]
    assert verdicts == ["content", "place", "not shown"]
    for kind in ("hidden", "content"):
        assert found[3][kind]["loss_change"] == approx(0, abs=1e-7)


SECOND_TOKEN = pytest.param({"num_cls_tokens": 2}, marks=pytest.mark.slow)


@pytest.mark.parametrize("added", [SECOND_TOKEN, {"num_register_tokens": 1}], ids=str)
def test_an_added_token_that_training_has_filled_has_an_effect(added: dict[str, int]) -> None:
    """It is the only weight that can mend the planted bias of class 3; no head reads it."""
    model = train_digits_model(num_register_tokens=0, cls_pooling="first").adapt(**added)
    with torch.no_grad():
        model.classifier.bias[3] += 8
    model.requires_grad_(False).train()
    for name in ("cls_token", "register_tokens"):
        token = getattr(model.vitcls.embeddings, name)
        if token is not None:
            token.requires_grad_()
    first = model.vitcls.embeddings.cls_token[:, :1].clone()
    tokens = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.Adam(tokens, lr=0.05)
    for indices in torch.arange(NUM_TRAINED).repeat(10).split(100):
        optimizer.zero_grad()
        model(PIXELS[indices], labels=LABELS[indices]).loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.vitcls.embeddings.cls_token[:, :1] = first

    batch = ImageBatch(HELD_OUT[0][:128], HELD_OUT[1][:128], list(range(128)))
    found, _ = measure_effects(model.eval(), [batch])
    assert found[1]["hidden"]["loss_change"] > 0.1
