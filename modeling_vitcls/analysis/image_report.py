"""What a model makes of one picture, for the report: its answer, and maps of what its tokens attend to.

    read_picture(model, processor, picture, name)      a Reading

Figures over many pictures are in token_statistics.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..configuration_vitcls import ViTCLSConfig
from ..data.labels import is_multi_label, labels_of
from ..inference.prediction_rows import Label, all_probable, most_probable
from .attribution import attention_rollout, attribution
from .maps import SeenPart, patch_maps, seen_part, upright
from .model_utils import evaluating, is_classifier, plain_model


MOST_LABELS = 3  # that are shown of an answer


@dataclass(frozen=True)
class Answer:
    """A model's answer to one question.

    Attributes:
        task: of a model of several tasks, else None.
        labels: names and probabilities, the most probable first; of a model of several labels those that hold, which
            may be none.
        first: the most probable label, whether it holds or not.
    """

    task: str | None
    labels: list[Label]
    first: str


@dataclass(frozen=True)
class Reading:
    """A picture as a model sees it. L layers, H heads, S special tokens, gh x gw patches.

    Attributes:
        name: of the picture.
        picture: upright, RGB.
        seen: the part of it that the patches cover.
        truth: the right answer in words; None where it is not known.
        answers: one, or one per task; none of an encoder.
        attention: [L, H, S, gh, gw], the part of each special token's attention that goes to patches.
        rollout: [S, gh, gw], through all layers (`attention_rollout`).
        attributions: [gh, gw] for each answer: what speaks for the most probable label (`attribution`).
    """

    name: str
    picture: Image.Image
    seen: SeenPart
    truth: str | None
    answers: list[Answer]
    attention: torch.Tensor
    rollout: torch.Tensor
    attributions: list[torch.Tensor]


def read_picture(
    model: Any, processor: Any, picture: Image.Image, name: str = "", truth: str | None = None
) -> Reading:
    """Ask the model about one picture.

    Args:
        name: what to call it.
        truth: the right answer in words.

    Raises:
        ValueError: for a picture that the processor or the model cannot take.
    """
    model = plain_model(model)
    config: ViTCLSConfig = model.config
    pixel_values = processor(picture, return_tensors="pt")["pixel_values"].to(model.device)  # [1, C, H, W]
    size = (pixel_values.shape[-2], pixel_values.shape[-1])
    shown = upright(picture)
    with torch.no_grad(), evaluating(model):
        rows = model.token_attention(pixel_values)[0]  # [L, H, S, N]
        answers = answers_in_words(model(pixel_values).logits, config) if is_classifier(model) else []
    attributed = [attribution(model, pixel_values, task=answer.task)[0] for answer in answers]  # [N] each
    return Reading(
        name=name,
        picture=shown,
        seen=seen_part(processor, (shown.height, shown.width), config.patch_height_width),
        truth=truth,
        answers=answers,
        attention=patch_maps(rows.float().cpu(), config, size),
        rollout=patch_maps(attention_rollout(model, pixel_values)[0].float().cpu(), config, size),
        attributions=[patch_maps(row.float().cpu(), config, size) for row in attributed],
    )


# Answers -------------------------------------------------------------------------------------------------------------


def answers_in_words(logits: Any, config: ViTCLSConfig) -> list[Answer]:
    """Logits [1, labels] of a picture, or such for each task."""
    if config.tasks:
        return [answer(task, logits[task], names) for task, names in config.task_labels().items()]
    return [answer(None, logits, labels_of(config).names, is_multi_label(config))]


def answer(task: str | None, logits: torch.Tensor, names: list[str], has_several: bool = False) -> Answer:
    """What logits [1, labels] say."""
    (ordered,) = most_probable(logits, names, MOST_LABELS)
    (holding,) = all_probable(logits, names) if has_several else [ordered]
    return Answer(task, holding, first=ordered[0][0])
