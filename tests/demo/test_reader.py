"""The results of the demo for an image, compared with the analysis functions."""

from pathlib import Path

import torch
from PIL import Image
from tiny_models import build_tiny_config, get_largest_difference, randomize

from modeling_vitcls import ViTCLSForMultiTaskClassification, ViTCLSImageProcessor
from modeling_vitcls.analysis import compute_attribution
from modeling_vitcls.demo.reader import DemoModel


def test_each_task_has_the_attribution_of_its_own_label(tmp_path: Path) -> None:
    tasks = {"species": ["oak", "elm", "ash"], "age": ["young", "old"]}
    model = randomize(ViTCLSForMultiTaskClassification(build_tiny_config(num_cls_tokens=2, tasks=tasks)))
    processor = ViTCLSImageProcessor(size=32)
    file = tmp_path / "noise.png"
    Image.effect_noise((32, 32), 90).convert("RGB").save(file)
    result = DemoModel(model, processor, "mine", None, None, is_classifier=True).predict(file)
    pixel_values = processor(file, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(pixel_values).logits
    expected = {}
    for task, labels in tasks.items():
        best = int(logits[task].argmax())
        (tokens,) = compute_attribution(model, pixel_values, best, task)
        expected[f"{task}: {labels[best]}"] = tokens[model.config.token_layout.patches].view(4, 4)
    assert result.attributions.keys() == expected.keys()
    for name, values in expected.items():
        assert get_largest_difference(result.attributions[name], values) <= 1e-6 * values.max().item(), name
