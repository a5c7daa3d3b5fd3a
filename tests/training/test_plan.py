"""What a run is: frozen or with steps, and which images it holds out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.photo_folders import write_two_colors
from helpers.tiny_models import save_encoder
from helpers.tiny_options import build_tiny_options, run_to_folder, run_training
from pytest import CaptureFixture, MonkeyPatch
from torch import nn

from modeling_vitcls.data.dataset import Dataset
from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.data.labels import OneLabel
from modeling_vitcls.training import plan
from modeling_vitcls.training.options import FinetuneOptions
from modeling_vitcls.training.plan import RunPlan, plan_run


def make_inputs(
    num_images: int = 600,
    num_labels: int = 10,
    has_frozen_start: bool = True,
    num_fitted: int = 0,
    **flags: Any,
) -> Any:
    labels = [index % num_labels for index in range(num_images)]
    photos = LabeledImages(range(num_images), labels, np.arange(num_images))
    names = [str(label) for label in range(num_labels)]
    return SimpleNamespace(
        options=FinetuneOptions(model="encoder", dataset="photos", output_dir=Path("run"), **flags),
        initial=SimpleNamespace(has_random_weights=not has_frozen_start),
        images=Dataset("photos", OneLabel({"label": names}), {"train": photos}),
        model=nn.Identity(),
        has_trained_heads=False,
        head_search=object() if has_frozen_start else None,
        missing_start_reason="",
        forward_flops=1e12,
        num_fitted=num_fitted,
    )


def leave_model_unread(monkeypatch: MonkeyPatch) -> None:
    """Read no schedule and no new tokens from the model, which is none."""
    monkeypatch.setattr(plan, "resolve_schedule", lambda options, *_, **__: (options, {}))
    monkeypatch.setattr(plan, "find_new_tokens", lambda *arguments: {})


def make_plan(
    monkeypatch: MonkeyPatch,
    step_minutes: int | None = None,
    is_resumed: bool = False,
    **settings: Any,
) -> RunPlan:
    """Plan a run of a trained encoder; `step_minutes` is the duration of its steps on a CPU."""
    device = torch.device("cuda" if step_minutes is None else "cpu")
    monkeypatch.setattr(plan, "measure_step_minutes", lambda *arguments: step_minutes)
    leave_model_unread(monkeypatch)
    inputs = make_inputs(**settings)
    return plan_run(inputs, SimpleNamespace(device=device), is_resumed)  # type: ignore[arg-type]


FITTED = {"epochs": 1.0, "num_images": 299}


@pytest.mark.parametrize(
    ("settings", "kind", "held_out", "averaging"),
    [
        ({}, "frozen", 0.0, 0.0),
        ({"held_out_fraction": 0.3}, "frozen", 0.3, 0.0),
        ({"num_images": 1_999}, "frozen", 0.0, 0.0),
        ({"num_images": 2_000}, "steps", 0.1, 0.5),
        ({"num_images": 2_000, "num_labels": 41}, "frozen", 0.0, 0.0),
        ({"num_images": 2_000, "step_minutes": 10}, "steps", 0.1, 0.5),
        ({"num_images": 2_000, "step_minutes": 11}, "frozen", 0.0, 0.0),
        ({"epochs": 2.0}, "steps", 0.2, 0.5),
        ({"epochs": 2.0, "step_minutes": 150}, "steps", 0.2, 0.5),
        ({"epochs": 1.0, "average_with_start": 0.0}, "steps", 0.2, 0.0),
        ({"max_steps": 1}, "steps", 0.2, 0.5),
        ({"learning_rate": 1e-5}, "steps", 0.2, 0.5),
        ({"trainable": "lora"}, "steps", 0.2, 0.5),
        ({"trainable": "head", "num_images": 9_000}, "frozen", 0.0, 0.0),
        ({"trainable": "head", "epochs": 1.0}, "steps", 0.2, 0.5),
        ({"has_frozen_start": False}, "steps", 0.2, 0.0),
        ({"is_resumed": True}, "steps", 0.2, 0.5),
        ({"epochs": 1.0, "num_images": 49}, "steps", 0.0, 0.5),  # fewer than five of each class
        (FITTED | {"num_fitted": 299}, "steps", 0.0, 0.5),  # it continues a run
        (FITTED | {"num_fitted": 239}, "steps", 0.2, 0.5),  # which held out a fifth
        ({"epochs": 1.0, "num_images": 300, "num_fitted": 300}, "steps", 0.2, 0.5),
    ],
)
def test_a_run_has_steps_if_somebody_asks_or_they_pay_and_only_then_holds_out_and_averages(
    settings: dict[str, Any],
    kind: str,
    held_out: float,
    averaging: float,
    monkeypatch: MonkeyPatch,
) -> None:
    """The last weights are averaged with trained ones only."""
    planned = make_plan(monkeypatch, **settings)
    assert planned.kind == kind
    assert planned.options.held_out_fraction == held_out
    assert planned.averaging == averaging


@pytest.mark.parametrize(
    ("num_images", "step_seconds", "reason"),
    [
        (2_000, 30, "2,000 images, about 1 min on this CPU"),
        (2_000, 601, "5 epochs would take about 11 min on this CPU, more than 10"),
        (600, None, "600 images, fewer than 2,000"),  # nothing is measured
    ],
)
def test_the_speed_of_this_cpu_decides_if_nothing_else_does(
    num_images: int, step_seconds: float | None, reason: str, monkeypatch: MonkeyPatch
) -> None:
    """A step takes as long as three forward passes."""

    def measure(model: Any) -> float:
        assert step_seconds is not None
        return 3 * 5 * num_images / step_seconds

    monkeypatch.setattr(plan, "measure_cpu_speed", measure)
    leave_model_unread(monkeypatch)
    inputs = make_inputs(num_images)
    assert plan_run(inputs, Accelerator(cpu=True), is_resumed=False).reason == reason


def test_a_model_is_continued_with_all_of_its_few_images(
    tmp_path: Path, capsys: CaptureFixture
) -> None:
    """To fewer images, its classifier would be fitted anew, and would be worse than before."""
    encoder = save_encoder(tmp_path / "encoder")
    (tmp_path / "photos").mkdir()
    photos = write_two_colors(tmp_path / "photos", 23)
    flags = {"probe": True}
    options = build_tiny_options(tmp_path / "first", photos, model=str(encoder), **flags)
    first = run_to_folder(options)

    flags |= {"model": str(first), "max_steps": 1}
    results = run_training(build_tiny_options(tmp_path / "next", photos, **flags))
    assert results["num_training_images"] == 46
    text = f"{first} was fitted to 46 of these images, "
    assert f"{text}so none is held out. `held_out_fraction=0.2`" in capsys.readouterr().out

    options = build_tiny_options(tmp_path / "measured", photos, held_out_fraction=0.2, **flags)
    num_left = run_training(options)["num_training_images"]
    printed = capsys.readouterr().out
    assert f"{text}and this run trains on {num_left}, so it may end worse" in printed
    assert "`held_out_fraction=0.0` keeps all" in printed
