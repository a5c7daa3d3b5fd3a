"""Layer by layer, what each group of tokens carries: the table of `vitcls inspect`, as means over images.

    norm         of the tokens after the layer, before the final norm
    attention    that a token receives in the layer, of all heads and tokens, times that of uniform attention
    outliers     fraction of the tokens whose norms are outliers (Darcet et al. 2023, arXiv 2309.16588)
    similarity   cosine similarity of a token to itself before the layer

A token with much attention and a large norm whose state does not change is a sink: it has a place, but
no content.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..evaluation.token_effects import Outputs, check_finite, gather_outputs, list_groups
from ..inference.image_pass import ImageBatch
from .photo import OUTLIER_RATIO, trace_attention


MEASURES = ["norm", "attention", "outliers", "similarity"]


def measure_layers(model: Any, batches: Iterable[ImageBatch]) -> tuple[pd.DataFrame, Outputs]:
    """Measure the tokens of each group after each layer, in one pass over the images.

    Args:
        model: a classifier or an encoder, in evaluation mode.
        batches: batches of images.

    Returns:
        The columns MEASURES, with a row for each layer (from 1) and each group of tokens (of
        `config.token_layout`) that the model has; and the outputs of the model for all images.

    Raises:
        ValueError: if a hidden state is not finite.
    """
    groups = {**list_groups(model.config), "patches": model.config.token_layout.patches}
    parts = []

    def run(pixel_values: Tensor) -> Any:
        # [B, N] of each layer
        outputs, attention = trace_attention(
            model, pixel_values, lambda rows: rows.mean(dim=(1, 2))
        )
        check_finite(outputs.hidden_states)
        layers = zip(pairwise(outputs.hidden_states), attention, strict=True)
        for layer, ((before, after), received) in enumerate(layers, start=1):
            norms = after.float().norm(dim=-1)  # [B, N]
            limits = OUTLIER_RATIO * norms[:, groups["patches"]].median(dim=1, keepdim=True).values
            similarity = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            times_uniform = received * received.shape[1]
            measures = torch.stack([norms, times_uniform, norms > limits, similarity], dim=-1)
            for group, tokens in groups.items():
                rows = measures[:, tokens].mean(dim=1).cpu()  # [B, measures]
                table = pd.DataFrame(rows, columns=MEASURES)
                parts.append(table.assign(layer=layer, group=group))
        return outputs

    outputs = gather_outputs(model, batches, run)
    return pd.concat(parts).groupby(["layer", "group"], sort=False).mean(), outputs
