"""CLS tokens of all photographs with transformers' pipeline."""

import os
from pathlib import Path

import numpy as np
import torch
from transformers import pipeline


dtype = torch.bfloat16 if os.environ["PRECISION"] == "bf16" else torch.float32
extract = pipeline(
    "image-feature-extraction", model=os.environ["ENCODER"], dtype=dtype, batch_size=8
)
files = sorted(map(str, Path(os.environ["PHOTOS"]).glob("*/*")))
tokens = [output[:, 0].float().numpy() for output in extract(files, return_tensors=True)]
np.save(os.environ["OUTPUT"], np.concatenate(tokens))
