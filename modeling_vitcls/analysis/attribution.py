"""Which tokens an answer rests on, through all layers: attention rollout, and gradient-weighted attribution.

    attention_rollout(model, pixel_values)       [B, special token, key]    what reached each special token
    attribution(model, pixel_values)             [B, key]                   what speaks for the answer

Keys are in the order of `config.token_layout`; `patch_maps` (maps.py) lays the patches' part on the image. Both follow
a row of the product of all layers' maps from the last layer to the first, so that one layer's maps are in memory at a
time, and work under any attention implementation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..configuration_vitcls import ViTCLSConfig
from .attention_recorder import RecordedLayer, recorded_attention
from .model_utils import evaluating, plain_model


@torch.no_grad()
def attention_rollout(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """How much of each token of the image reached each special token (Abnar and Zuidema 2020, arXiv 2005.00928).

    A layer passes on half of a token as it is, and half as the mean of its heads' attention says. Under differential
    attention that is, of each head, the first map minus the layer's share of the second, as far as that is positive,
    normalised: what a head takes away does not flow.

    Args:
        model: any of ours, in evaluation mode or not (dropout is left out).
        pixel_values: [B, C, H, W].

    Returns:
        [B, special token, key], each row summing to 1. Without special tokens the second axis is 0 long.
    """
    model = plain_model(model)
    with evaluating(model), recorded_attention(model) as layers:
        model(pixel_values)
    attentions = [layer.attention for layer in model.base_model.layers]
    flow = rows_of_identity(layers[-1], model.config.token_layout.num_prefix_tokens)  # [B, S, N]
    for layer, attention in zip(reversed(layers), reversed(attentions), strict=True):
        flow = 0.5 * flow + 0.5 * flow @ passed_on(layer.weights(), attention)
    return flow


def passed_on(weights: torch.Tensor, attention: Any) -> torch.Tensor:
    """What a layer's maps [B, maps, N, N] pass on, the mean of its heads: [B, N, N], each row summing to 1."""
    if attention.config.attention_type != "differential":
        return weights.mean(dim=1)
    first, second = weights.unflatten(1, (-1, 2)).unbind(dim=2)  # [B, heads, N, N] each
    positive = (first - attention.second_share.float() * second).clamp(min=0)
    total = positive.sum(dim=-1, keepdim=True)
    itself = torch.eye(weights.shape[-1], device=weights.device)
    return torch.where(total > 0, positive / total, itself).mean(dim=1)  # a head that only takes away leaves it


def attribution(
    model: Any, pixel_values: torch.Tensor, target: torch.Tensor | int | None = None, task: str | None = None
) -> torch.Tensor:
    """How much each token speaks for a class: attention weighted by its gradient (Chefer et al. 2021, arXiv
    2103.15679, equations 5 and 6), from the tokens that the head reads.

    The gradient by a map is that by what it mixed, times the values, so the maps themselves need none.

    Args:
        model: a classifier.
        pixel_values: [B, C, H, W].
        target: the class, one for all or [B]; None: the one that the model answers.
        task: whose class, for a model of several tasks.

    Returns:
        [B, key], at least 0; in no unit, so compare within an image.

    Raises:
        ValueError: for a model without a classifier, an unknown task or class.
    """
    model = plain_model(model)
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
        inputs = pixel_values.detach().clone().requires_grad_()  # also through a model whose weights take no gradient
        with recorded_attention(model) as layers, recorded_sequence(model) as sequences:
            logits = logits_of(model(inputs), task)  # [B, labels]
        noted = [*(layer.attended for layer in layers), *sequences]
        *gradients, by_token = torch.autograd.grad(chosen_logits(logits, target).sum(), noted)
    with torch.no_grad():
        start = flow = tokens_read(by_token, model.config)  # [B, 1, N]
        for layer, gradient in zip(reversed(layers), reversed(gradients), strict=True):
            by_map = gradient.transpose(1, 2) @ layer.value.transpose(2, 3)  # [B, maps, N, N]
            flow = flow + flow @ (by_map * layer.weights()).clamp(min=0).mean(dim=1)
        return (flow - start).squeeze(1)  # without what the head reads whatever was attended to


@contextmanager
def recorded_sequence(model: Any) -> Iterator[list[torch.Tensor]]:
    """Note the encoder's last hidden state [B, N, D] of the forward pass made inside the block."""
    sequences: list[torch.Tensor] = []
    hook = model.base_model.register_forward_hook(lambda _, args, output: sequences.append(output.last_hidden_state))
    try:
        yield sequences
    finally:
        hook.remove()


def logits_of(outputs: Any, task: str | None) -> torch.Tensor:
    """The logits [B, labels] of a classifier, of one task where there are several."""
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError("attribution asks what speaks for an answer, and this model gives none: use a classifier")
    if not isinstance(logits, dict):
        if task is not None:
            raise ValueError(f"task is {task!r}, and this model has no tasks: leave it out")
        return logits
    if task not in logits:
        raise ValueError(f"task is {task!r}: name one of {', '.join(logits)}")
    return logits[task]


def chosen_logits(logits: torch.Tensor, target: torch.Tensor | int | None) -> torch.Tensor:
    """Each image's logit of its class: [B, labels] -> [B]."""
    if target is None:
        return logits.amax(dim=-1)
    classes = torch.as_tensor(target, device=logits.device).long()
    if classes.numel() not in (1, len(logits)):
        raise ValueError(f"target names {classes.numel()} classes for {len(logits)} images: give one, or one for each")
    classes = classes.reshape(-1).expand(len(logits))
    if not bool(((classes >= 0) & (classes < logits.shape[1])).all()):
        raise ValueError(f"target is {classes.tolist()}: the model has the classes 0 to {logits.shape[1] - 1}")
    return logits.gather(1, classes[:, None]).squeeze(1)


def tokens_read(gradient: torch.Tensor, config: ViTCLSConfig) -> torch.Tensor:
    """The share [B, 1, N] of each token in what the head reads, of which the answer has a gradient [B, N, D]: 1 of a
    special token; all patches together have 1."""
    share = (gradient != 0).any(dim=-1).float()  # [B, N]
    patches = config.token_layout.patches
    share[:, patches] /= share[:, patches].sum(dim=-1, keepdim=True).clamp(min=1)
    return share.unsqueeze(1)


def rows_of_identity(layer: RecordedLayer, num_rows: int) -> torch.Tensor:
    """The first rows [B, rows, N] of the identity."""
    batch, _, num_tokens, _ = layer.query.shape
    return torch.eye(num_rows, num_tokens, device=layer.query.device).expand(batch, -1, -1)
