"""What a run is: frozen or with steps, and which images it holds out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modeling_vitcls.training import plan
from modeling_vitcls.training.options import FinetuneOptions
from modeling_vitcls.training.plan import RunPlan, plan_run


def make_plan(
    monkeypatch: pytest.MonkeyPatch,
    num_images: int = 600,
    num_labels: int = 10,
    has_probe: bool = True,
    cpu_flops: float | None = None,
    is_resumed: bool = False,
    **flags: Any,
) -> RunPlan:
    """Plan a run of a trained encoder; `cpu_flops` are those of a forward pass on a CPU."""
    device = torch.device("cuda" if cpu_flops is None else "cpu")
    monkeypatch.setattr(plan, "PartialState", lambda: SimpleNamespace(device=device))
    monkeypatch.setattr(plan, "resolve_schedule", lambda options, *arguments: (options, {}))
    inputs = SimpleNamespace(
        options=FinetuneOptions(model="encoder", dataset="photos", output_dir=Path("run"), **flags),
        initial=SimpleNamespace(has_random_weights=not has_probe),
        images=SimpleNamespace(
            train=range(num_images),
            label_space=SimpleNamespace(columns={"label": list(range(num_labels))}),
        ),
        setup=SimpleNamespace(
            probe=object() if has_probe else None,
            model=None,
            has_known_head=has_probe,
            missing_probe_reason="",
        ),
        forward_flops=cpu_flops or 1e12,
    )
    return plan_run(inputs, is_resumed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({}, "frozen"),
        ({"num_images": 1_999}, "frozen"),
        ({"num_images": 2_000}, "steps"),
        ({"num_images": 2_000, "num_labels": 41}, "frozen"),
        ({"num_images": 2_000, "cpu_flops": 6e9}, "steps"),
        ({"num_images": 2_000, "cpu_flops": 6.1e9}, "frozen"),
        ({"epochs": 2.0}, "steps"),
        ({"epochs": 2.0, "cpu_flops": 1e12}, "steps"),
        ({"max_steps": 1}, "steps"),
        ({"select": "best"}, "steps"),
        ({"learning_rate": 1e-5}, "steps"),
        ({"trainable": "lora"}, "steps"),
        ({"trainable": "head", "num_images": 9_000}, "frozen"),
        ({"trainable": "head", "epochs": 1.0}, "steps"),
        ({"has_probe": False}, "steps"),
        ({"is_resumed": True}, "steps"),
    ],
)
def test_a_run_has_steps_if_somebody_asks_for_them_or_if_they_pay(
    settings: dict[str, Any], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_plan(monkeypatch, **settings).kind == kind


@pytest.mark.parametrize(
    ("settings", "fraction"),
    [
        ({}, 0.0),
        ({"held_out_fraction": 0.3}, 0.3),
        ({"epochs": 1.0}, 0.2),
        ({"epochs": 1.0, "num_images": 2_000}, 0.1),
        ({"epochs": 1.0, "num_images": 49}, 0.0),  # fewer than five of each class
    ],
)
def test_only_steps_hold_images_out_by_default(
    settings: dict[str, Any], fraction: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_plan(monkeypatch, **settings).options.held_out_fraction == fraction


@pytest.mark.parametrize(
    ("settings", "averaging"),
    [
        ({"epochs": 1.0}, 0.5),
        ({"epochs": 1.0, "average_with_start": 0.0}, 0.0),
        ({"epochs": 1.0, "select": "best"}, 0.0),
        ({"has_probe": False}, 0.0),
        ({}, 0.0),
    ],
)
def test_the_last_weights_are_averaged_with_trained_ones_only(
    settings: dict[str, Any], averaging: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert make_plan(monkeypatch, **settings).averaging == averaging
