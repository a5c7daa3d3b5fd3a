"""What the score of a label loses without a part of the photo, measured by hiding parts.

    masks = draw_masks(rows, columns)      # [M, rows, columns]: half of the parts, then the other half
    scores = compute_scores(logits, kind)  # [M, labels], of the photos in which these parts are hidden
    effects, errors = fit_effects(...)     # [rows, columns]: the score with a part minus without it

A token has seen the whole photo, so a sum over tokens and attention can both miss what decides. Hiding
parts at random and fitting the score follows RISE (Petsiuk et al. 2018, arXiv 1806.07421) and LIME
(Ribeiro et al. 2016, arXiv 1602.04938).
"""

from typing import Any

import numpy as np
import torch
from sklearn.linear_model import BayesianRidge
from torch import nn

from ..inference.prediction_rows import get_logits_by_task
from ..runtime.distributed import build_autocast


MAX_PARTS = 6  # per side; with smaller parts, a pass says less about each of them
# A pair is a random half and its complement, which cancels what two parts do only together. With a random encoder,
# 24 pairs find 5 of 8 stickers, and 32 to 48 find 8; with a trained ViT-S/14, 9 of 10, without pairs 8.
NUM_PAIRS = 32
BATCH_SIZE = 16


def draw_masks(rows: int, columns: int) -> torch.Tensor:
    """Draw halves of the parts of a photo: [2 * NUM_PAIRS, rows, columns], 1 where a part is hidden.

    Each half is followed by its complement.
    """
    draws = np.random.default_rng(0).random((NUM_PAIRS, rows * columns))
    halves = draws.argsort(axis=1) < rows * columns // 2
    masks = np.stack([halves, ~halves], axis=1)
    return torch.from_numpy(masks).reshape(-1, rows, columns).float()


@torch.no_grad()
def hide_parts(
    model: Any, pixel_values: torch.Tensor, masks: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Compute the logits [M, labels] by task of a photo [1, C, H, W] whose parts are hidden.

    A hidden part has the mean color of the photo.
    """
    gray = pixel_values.mean(dim=(2, 3), keepdim=True)
    logits = []
    # Rounded to bf16, effects of up to 0.54 differed by 0.01, a tenth of their standard errors.
    autocast = build_autocast("auto", pixel_values.device, model.config)
    for batch in masks[:, None].to(pixel_values).split(BATCH_SIZE):
        is_hidden = nn.functional.interpolate(batch, pixel_values.shape[-2:])
        with autocast():
            outputs = model(torch.where(is_hidden > 0, gray, pixel_values))
        logits.append(get_logits_by_task(outputs))
    return {task: torch.cat([each[task] for each in logits]).double().cpu() for task in logits[0]}


def compute_scores(logits: torch.Tensor, has_one_label: bool) -> torch.Tensor:
    """Compute the log odds [M, labels] of labels: of each against all others, or against its absence."""
    if not has_one_label or logits.shape[1] == 1:
        return logits
    others = ~torch.eye(logits.shape[1], dtype=torch.bool)
    return logits - torch.stack([logits[:, row].logsumexp(dim=1) for row in others], dim=1)


def fit_effects(masks: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit what a score [2 * NUM_PAIRS] loses if a part is hidden, and the standard errors, [rows, columns].

    The fit is Bayesian ridge regression on the differences within pairs.
    """
    is_shown = 1 - masks.flatten(1).double().numpy()
    pairs = is_shown[0::2] - is_shown[1::2]
    differences = (scores[0::2] - scores[1::2]).numpy()
    shape = masks.shape[1:]
    regression = BayesianRidge(fit_intercept=False).fit(pairs, differences)
    effects = torch.from_numpy(regression.coef_).reshape(shape).float()
    errors = torch.from_numpy(regression.sigma_.diagonal().copy()).sqrt().reshape(shape).float()
    return effects, errors
