"""Layer by layer, what each group of tokens carries: the table of `vitcls inspect`, as means over images.

    norm         of the tokens after the layer, before the final norm
    attention    that a token receives in the layer, of all heads and tokens, times that of uniform attention
    outliers     fraction of the tokens whose norms are outliers (Darcet et al. 2023, arXiv 2309.16588)
    similarity   cosine similarity of a token to itself before the layer

A token with much attention and a large norm whose state does not change is a sink: it has a place, but
no content.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluation.token_effects import list_groups
from ..inference.image_pass import ImageBatch, pass_over_images
from ..model.token_attention_vitcls import compute_attention_rows, record_attention


MEASURES = "norm", "attention", "outliers", "similarity"
# Minimum norm of an outlier, as a multiple of the median norm of the patches of the image. Darcet et
# al. choose an absolute norm for each model.
OUTLIER_RATIO = 3.0


def measure_layers(model: Any, batches: Iterable[ImageBatch]) -> list[dict[str, Any]]:
    """Measure the tokens of each group after each layer, in one pass over the images.

    Args:
        model: a classifier or an encoder, in evaluation mode.
        batches: batches of images.

    Returns:
        A record of `layer` (from 1), `group` (of `config.token_layout`) and MEASURES for each layer and
        each group of tokens that the model has.
    """
    received: list[Tensor] = []

    def record(_: int, query: Tensor, key: Tensor, mask: Any, scaling: float) -> None:
        weights = compute_attention_rows(query.float(), key.float(), mask, scaling)
        received.append(weights.mean(dim=(1, 2)) * weights.shape[-1])  # [B, N]

    def run(pixel_values: Tensor) -> Any:
        received.clear()
        with record_attention(model, range(len(model.base_model.layers)), record):
            # Accelerate replaces `forward` of a model by one in the precision of a run
            return type(model).forward(model, pixel_values, output_hidden_states=True)

    groups = {**list_groups(model.config), "patches": model.config.token_layout.patches}
    totals: dict[str, list[Tensor]] = {}
    for _, outputs in pass_over_images(run, batches, model.device):
        states = torch.stack(outputs.hidden_states).float()  # [1 + L, B, N, D]
        norms = states[1:].norm(dim=-1)
        limits = OUTLIER_RATIO * norms[:, :, groups["patches"]].median(dim=2, keepdim=True).values
        similarity = nn.functional.cosine_similarity(states[1:], states[:-1], dim=-1)
        measures = torch.stack([norms, torch.stack(received), norms > limits, similarity])
        for group, tokens in groups.items():
            # [measures, L, B]
            totals.setdefault(group, []).append(measures[..., tokens].mean(dim=-1).cpu())

    means = {group: torch.cat(parts, dim=-1).mean(dim=-1) for group, parts in totals.items()}
    return [
        {"layer": layer, "group": group} | dict(zip(MEASURES, values.tolist(), strict=True))
        for group, columns in means.items()
        for layer, values in enumerate(columns.T, start=1)
    ]
