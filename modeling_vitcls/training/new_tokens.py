"""What the special tokens of a run with steps hold, and what their places are worth, on held-out images."""

from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch.distributed.fsdp import FSDPModule

from ..data.images import LabeledImages
from ..evaluation.evaluator import Predictions
from ..evaluation.token_effects import (
    describe_effect,
    measure_effects,
    read_batches,
)
from .run_inputs import RunInputs


MAX_IMAGES = 500


@torch.no_grad()
def measure_tokens(
    inputs: RunInputs, images: LabeledImages, predictions: Predictions | None
) -> tuple[dict[str, Any], str | None, Predictions | None]:
    """Measure each group of special tokens, in float32. Every process measures the same images.

    Args:
        inputs: of the run, with the trained model.
        images: that did not train it.
        predictions: of these images; None without any, or for several tasks.

    Returns:
        The field "tokens" of results.json, a line for each group, and the predictions with the losses of
        the measured images; none of these without predictions, for fewer than two special tokens, or for
        a sharded model.
    """
    model = inputs.model
    num_tokens = model.config.token_layout.num_prefix_tokens
    if predictions is None or num_tokens < 2 or isinstance(model, FSDPModule):
        return {}, None, predictions
    drawn = replace(images, labels=range(len(images))).draw(MAX_IMAGES).labels
    batches, _ = read_batches(
        model,
        inputs.pass_arguments["processor"],
        images.select(drawn),
        inputs.pass_arguments["label_space"],
        inputs.pass_arguments["batch_size"],
    )
    records, losses = measure_effects(model, batches, has_members=False)
    rows = [drawn[index] for batch in batches for index in batch.indices]
    predictions = replace(predictions, token_losses=pd.DataFrame(losses, index=rows))
    text = "\n".join(map(describe_effect, records))
    return {"tokens": {record["group"]: record for record in records}}, text, predictions
