"""The inference speed in results.json, cards and the description of exported files."""

from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import build_tiny_config

from modeling_vitcls import ViTCLSModel
from modeling_vitcls.inference import speed
from modeling_vitcls.runtime.system import format_device_name


@pytest.mark.parametrize(("seconds", "batch_size"), [(0.001, 32), (0.0125, 13), (9.0, 1)])
def test_the_batch_is_as_large_as_the_time_permits(
    seconds: float, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three passes take about half a second; a slow model is measured once.

    Each forward pass takes the same time.
    """
    times = iter(seconds * number for number in range(100))
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=times.__next__))
    device = torch.device("cpu")
    repeats = 1 if seconds > speed.MEASUREMENT_SECONDS else 3
    model = ViTCLSModel(build_tiny_config()).eval()
    sizes = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    found = speed.measure_inference_speed(model, device)

    assert found == {
        "images_per_second": pytest.approx(batch_size / seconds, abs=0.1),
        "batch_size": batch_size,
        "repeats": repeats,
        "dtype": "float32",
        "device": format_device_name(device),
    }
    assert sizes == [1, 1, *[batch_size] * repeats]
