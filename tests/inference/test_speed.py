"""The inference speed in results.json, cards and the description of exported files."""

import torch
from helpers.tiny_models import build_tiny_config

from modeling_vitcls import ViTCLSModel
from modeling_vitcls.inference.speed import MAX_BATCH_SIZE, measure_inference_speed


def test_a_small_model_is_measured_with_the_largest_batch() -> None:
    batch_sizes: list[int] = []
    model = ViTCLSModel(build_tiny_config()).eval()
    model.register_forward_pre_hook(lambda module, inputs: batch_sizes.append(len(inputs[0])))
    with torch.no_grad():
        speed = measure_inference_speed(model, torch.device("cpu"))
    assert speed["batch_size"] == max(batch_sizes) == MAX_BATCH_SIZE
    assert batch_sizes.count(MAX_BATCH_SIZE) == speed["repeats"] + 1  # one to warm up
    assert speed["images_per_second"] > 0 and speed["dtype"] == "float32"
