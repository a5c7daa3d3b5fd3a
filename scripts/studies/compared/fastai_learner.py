# ruff: noqa: F403, F405
"""fastai's `fine_tune`: one epoch with the frozen encoder and five with all weights."""

import os

from fastai.vision.all import *


set_seed(0)
photos = Path(os.environ["PHOTOS"])
data = ImageDataLoaders.from_folder(
    photos,
    train="train",
    valid="test",
    item_tfms=Resize(256),
    batch_tfms=[*aug_transforms(size=224), Normalize.from_stats(*imagenet_stats)],
    bs=16,
    num_workers=1,
)
learner = vision_learner(
    data,
    "vit_small_patch14_dinov2",
    metrics=accuracy,
    normalize=False,
    pretrained_cfg_overlay={"file": os.environ["TIMM_WEIGHTS"]},
    img_size=224,
)
with learner.no_bar():
    learner.fine_tune(5)
print("accuracy", learner.validate()[1])
