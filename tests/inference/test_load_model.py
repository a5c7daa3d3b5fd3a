"""Loading of a model for evaluation or prediction."""

import torch

from modeling_vitcls import ViTCLSConfig, ViTCLSImageProcessor
from modeling_vitcls.inference.load_model import choose_batch_size


def test_the_batch_size_on_cpus_follows_the_processed_images_not_the_native_size() -> None:
    config = ViTCLSConfig(image_size=518, patch_size=14)
    processor = ViTCLSImageProcessor(
        size={"shortest_edge": 256}, do_center_crop=True, crop_size={"height": 224, "width": 224}
    )
    cpu = torch.device("cpu")
    assert choose_batch_size(None, config, processor, cpu, default=32) == 6
    assert choose_batch_size(5, config, processor, cpu, default=32) == 5
