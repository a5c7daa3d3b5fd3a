"""What the new tokens of a run with steps are worth, measured on the held-out images."""

from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import nn

from ..evaluation.evaluator import Evaluator, Predictions
from ..inference.token_names import SINGLE_TOKEN_NAMES
from ..model.attention_masks_vitcls import list_gated_tokens
from .distributed_state import distribute_like, reshard
from .plan import RunPlan


@torch.no_grad()
def measure_tokens(
    model: Any,
    prepared_model: nn.Module,
    held_out: Evaluator,
    predictions: Predictions | None,
    plan: RunPlan,
) -> tuple[dict[str, Any], str | None]:
    """Measure what the new tokens of each group are worth: the same images with their gates closed.

    An open gate is no evidence: noise at the rate of new tokens opens gates, too.

    Args:
        model, prepared_model: the trained model, and the same as Accelerate prepared it.
        held_out: images that did not train it.
        predictions: of these images; None without any, or for several tasks.
        plan: of the run.

    Returns:
        The field "tokens" of results.json, and a line for each group; neither without new gated
        tokens or predictions.
    """
    if predictions is None or "vitcls.gates.gates" not in plan.new_tokens:
        return {}, None
    groups = [group for group, _ in list_gated_tokens(model.config)]
    are_new = plan.new_tokens["vitcls.gates.gates"]
    gates = model.vitcls.gates.gates
    trained = gates.clone()
    record = {}
    lines = []
    for group in dict.fromkeys(compress(groups, are_new)):
        is_kept = [
            not is_new or each != group for each, is_new in zip(groups, are_new, strict=True)
        ]
        gates.mul_(distribute_like(torch.tensor(is_kept, dtype=gates.dtype), gates))
        without = held_out.predict(prepared_model)
        reshard(prepared_model)
        gates.copy_(trained)

        is_right, is_right_without = (
            ~np.isin(each.outputs.indices, each.list_wrong()) for each in (predictions, without)
        )
        number = len(is_right)
        loss, loss_without = (each.metrics["loss"] for each in (predictions, without))
        record[group] = {
            "num_images": number,
            "accuracy": float(is_right.mean()),
            "accuracy_without": float(is_right_without.mean()),
            "loss": loss,
            "loss_without": loss_without,
        }
        # An interval of the difference would have no width if no prediction differs.
        lines.append(
            f"the new {SINGLE_TOKEN_NAMES[group]} tokens: {is_right_without.sum()} of {number} right, with "
            f"them {is_right.sum()} ({(is_right & ~is_right_without).sum()} gained, "
            f"{(is_right_without & ~is_right).sum()} lost); log loss {loss_without:.3f}, with them {loss:.3f}"
        )
    return {"tokens": record}, "\n".join(lines)
