"""CLS tokens of all photographs with timm and a DataLoader."""

import os

import numpy as np
import timm
import torch
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder


model = timm.create_model(
    "vit_small_patch14_dinov2",
    pretrained=True,
    pretrained_cfg_overlay={"file": os.environ["TIMM_WEIGHTS"]},
    img_size=224,
    num_classes=0,
).eval()
config = resolve_data_config({"input_size": (3, 224, 224), "crop_pct": 0.875}, model=model)
photos = ImageFolder(os.environ["PHOTOS"], create_transform(**config))
tokens = []
is_bf16 = os.environ["PRECISION"] == "bf16"
with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
    for images, _ in DataLoader(photos, batch_size=8, num_workers=2):
        tokens.append(model(images).float().numpy())
np.save(os.environ["OUTPUT"], np.concatenate(tokens))
