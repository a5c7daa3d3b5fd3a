"""The diagnosis finds planted truths in small models, and raises no false alarms."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from helpers.digits_models import (
    HELD_OUT,
    LABELS,
    NUM_TRAINED,
    PIXELS,
    build_digits_config,
    train_digits_model,
)
from helpers.tiny_models import build_images, build_tiny_config, randomize
from helpers.varied_models import center_logits, collect_findings
from torch.nn import functional as F

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSForMultiTaskClassification
from modeling_vitcls.analysis.ablation import (
    MIN_IMAGES,
    compute_ablations,
)
from modeling_vitcls.analysis.diagnosis import Verdict, diagnose_patches, diagnose_tokens
from modeling_vitcls.analysis.report import build_effect_rows
from modeling_vitcls.analysis.token_use import TokenUse
from modeling_vitcls.inference.image_pass import ImageBatch


NUM_EPOCHS = 5
UNIMPORTANT = {"replaceable", "no measurable effect"}
TASKS = {"parity": 2, "size": 2}


def judge(
    model: Any,
    pixels: torch.Tensor = HELD_OUT[0],
    labels: torch.Tensor | None = HELD_OUT[1],
) -> dict[str, Verdict]:
    """Return the verdicts on tokens and groups by name."""
    batches = [ImageBatch(pixels, labels)]
    use = TokenUse(model.config)
    findings = collect_findings(model, pixels)
    verdicts = diagnose_tokens(use, findings, compute_ablations(model, use, batches))
    return {verdict.token: verdict for verdict in verdicts}


@contextmanager
def hide_keys(model: Any, hidden: slice) -> Iterator[None]:
    """Mask the keys `hidden` for the CLS token in all layers."""

    def mask_keys(attention: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        states = args[0] if args else kwargs["hidden_states"]
        mask = torch.ones(1, 1, states.shape[1], states.shape[1], dtype=torch.bool)
        mask[:, :, :1, hidden] = False
        return (states, mask, *args[2:]), kwargs

    with ExitStack() as hooks:
        for layer in model.base_model.layers:
            hooks.enter_context(
                layer.attention.register_forward_pre_hook(mask_keys, with_kwargs=True)
            )
        yield


def train(model: Any, compute_loss: Callable[[Any, torch.Tensor], torch.Tensor]) -> Any:
    """Train a model on digits; `compute_loss` takes its output and the indices of the images."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(NUM_EPOCHS):
        for indices in torch.randperm(NUM_TRAINED).split(100):
            optimizer.zero_grad()
            compute_loss(model(PIXELS[indices]), indices).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained() -> ViTCLSForImageClassification:
    return train_digits_model(epochs=NUM_EPOCHS)


@pytest.fixture
def model(trained: ViTCLSForImageClassification) -> Iterator[ViTCLSForImageClassification]:
    """Return a trained model of digits with two registers; changes of its weights are undone."""
    weights = {name: value.clone() for name, value in trained.state_dict().items()}
    yield trained
    trained.load_state_dict(weights)


# One task -----------------------------------------------------------------------------------------


def test_a_token_that_alone_feeds_the_head_is_read_by_the_classifier(model: Any) -> None:
    found = judge(model)["CLS"]
    effect = found.numbers["effects"][""]
    assert (found.headline, found.rating) == ("read by the classifier", "good")
    assert effect["limit"] is None
    assert effect["changed"] > 0.5  # there is no test
    assert effect["changed_interval"][0] < effect["changed"] < effect["changed_interval"][1]
    with hide_keys(model, slice(1, None)):
        assert judge(model)["CLS"].headline == "same for all images"


@pytest.mark.parametrize("num_registers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_registers_that_carry_all_information_have_an_effect(num_registers: int) -> None:
    """CLS attends to itself and the registers only.

    Two registers may share the information; the group is found.
    """
    torch.manual_seed(0)
    config = build_digits_config(num_register_tokens=num_registers, num_labels=10)
    model = ViTCLSForImageClassification(config)
    with hide_keys(model, slice(1 + num_registers, None)):
        train(model, lambda outputs, indices: F.cross_entropy(outputs.logits, LABELS[indices]))
        found = judge(model)
    verdict = found["register" if num_registers == 1 else "all 2 registers"]
    assert (verdict.headline, verdict.rating) == ("has an effect", "good")
    assert verdict.numbers["effects"][""]["limit"] is not None


@pytest.mark.parametrize("num_images", [1, 2, MIN_IMAGES - 1])
def test_too_few_images_or_patches_give_no_verdict(model: Any, num_images: int) -> None:
    found = judge(model, HELD_OUT[0][:num_images], HELD_OUT[1][:num_images])
    assert {verdict.headline for verdict in found.values()} == {"too few images to tell"}
    patches = diagnose_patches(
        TokenUse(model.config), collect_findings(model, HELD_OUT[0][:num_images])
    )
    assert patches.headline == "too few patches to tell"


# Several tasks ------------------------------------------------------------------------------------


def get_task_labels(labels: torch.Tensor) -> torch.Tensor:
    """Return the labels [images, 2] of the tasks parity and size."""
    return torch.stack([labels % 2, (labels >= 5).long()], dim=1)


@pytest.fixture(scope="module")
def trained_tasks() -> ViTCLSForMultiTaskClassification:
    torch.manual_seed(0)
    config = build_digits_config(num_cls_tokens=2, num_register_tokens=1, tasks=TASKS)
    targets = get_task_labels(LABELS)

    def compute_loss(outputs: Any, indices: torch.Tensor) -> torch.Tensor:
        pairs = zip(outputs.logits.values(), targets[indices].T, strict=True)
        return sum(F.cross_entropy(logits, labels) for logits, labels in pairs)

    return train(ViTCLSForMultiTaskClassification(config), compute_loss)


def judge_tasks(model: Any, labels: torch.Tensor | None = None) -> dict[str, Verdict]:
    return judge(model, HELD_OUT[0], get_task_labels(HELD_OUT[1]) if labels is None else labels)


def test_each_task_has_its_own_effects(trained_tasks: Any) -> None:
    """Scaling the head of one task by 10 changes no value of the other task."""
    found = judge_tasks(trained_tasks)
    for task in TASKS:
        assert found[f"CLS {task}"].headline == "read by the classifier"
        assert found[f"CLS {task}"].rating == "good"
        assert found[f"CLS {task}"].numbers["heads"] == [task]
    assert "all 2 CLS tokens" in found

    decided = [
        row["token"] for row in build_effect_rows(list(found.values())) if "•" in row["output"]
    ]
    assert decided == [name for name, verdict in found.items() if "decided_by" in verdict.numbers]

    with torch.no_grad():
        trained_tasks.classifiers["task_size"].weight *= 10
        scaled = judge_tasks(trained_tasks)
        trained_tasks.classifiers["task_size"].weight /= 10
    for name in ("CLS parity", "register"):
        assert scaled[name].headline == found[name].headline
        assert scaled[name].numbers["effects"]["parity"]["size"] == pytest.approx(
            found[name].numbers["effects"]["parity"]["size"], rel=1e-4
        )


def test_a_token_that_a_head_of_zeros_reads_is_doubtful(trained_tasks: Any) -> None:
    head = trained_tasks.classifiers["task_size"]
    weights = {name: value.clone() for name, value in head.state_dict().items()}
    with torch.no_grad():
        head.weight.zero_()
    found = judge_tasks(trained_tasks)
    head.load_state_dict(weights)

    assert found["CLS parity"].rating == "good"
    assert found["CLS size"].rating == "doubtful"


# Constructed and random models --------------------------------------------------------------------


def build_random_model(seed: int, **fields: Any) -> Any:
    tokens = {
        "num_distillation_tokens": 1,
        "num_register_tokens": 2,
        "num_hidden_layers": 3,
        "num_labels": 8,
    }
    torch.manual_seed(seed)
    config = build_tiny_config(**(tokens | fields))
    return center_logits(
        randomize(ViTCLSForImageClassification(config), seed), build_images(MIN_IMAGES)
    )


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 10))]
)
def test_random_models_raise_no_false_alarm(seed: int) -> None:
    pixels = build_images(MIN_IMAGES, seed=seed)
    model = build_random_model(seed)
    found = judge(model, pixels, torch.arange(len(pixels)) % 8)
    for name in ("register 1", "register 2", "all 2 registers"):
        assert found[name].headline in UNIMPORTANT, found[name]
