"""What a special token is worth to the answer: the model's answers with and without what the token says of the image.

    effect = ablation_effects(model, batches, findings.mean_states)["registers[0]"]
    effect.changed_answers, effect.accuracy_change

A token is not removed, nor set to zero, which the model has never seen: after each layer its state is replaced by its
mean over images there (mean ablation), so that it says the same of every image. What counts as an answer is said here,
for all of the analysis: `decisions`.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..configuration_vitcls import TokenLayout, ViTCLSConfig
from ..data.labels import is_multi_label
from ..heads_vitcls import IGNORED_LABEL
from ..inference.prediction_rows import THRESHOLD
from .model_utils import evaluating, plain_model


# pixel_values [B, C, H, W] on the model's device, and the right answers [B, A] (see `Answers`), [B] where A is 1, or
# None; called again and again, for the same images.
Batches = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor | None]]]

UNKNOWN = IGNORED_LABEL  # in place of a right answer
LEAST_VARIATION = 1e-3  # of logits, as a part of their size


@dataclass(frozen=True)
class Answers:
    """What a classifier says of all images.

    Attributes:
        logits: [images, labels], of all tasks side by side.
        chosen: [images, A]: the class (A = 1), that of each task (in the order of `config.task_labels()`), or of a
            multi-label model 0 or 1 for each label.
        right: as `chosen`, UNKNOWN where it is not known; None where nothing is.
    """

    logits: torch.Tensor
    chosen: torch.Tensor
    right: torch.Tensor | None

    def accuracy(self) -> float | None:
        """Share of the answers that are right, of those that are known."""
        if self.right is None or not bool((self.right != UNKNOWN).any()):
            return None
        return (self.chosen == self.right)[self.right != UNKNOWN].float().mean().item()

    def chance(self) -> float | None:
        """The accuracy of always giving the most frequent right answer (to each question its own)."""
        if self.right is None or not bool((self.right != UNKNOWN).any()):
            return None
        known = [column[column != UNKNOWN] for column in self.right.unbind(dim=1)]
        hits = [column.unique(return_counts=True)[1].max().item() for column in known if len(column)]
        return sum(hits) / sum(map(len, known))

    def is_better_than_chance(self) -> bool | None:
        """Whether the accuracy is beyond `chance` by two standard errors; None where it is not known."""
        accuracy, chance = self.accuracy(), self.chance()
        if self.right is None or accuracy is None or chance is None:
            return None
        num_images = int((self.right != UNKNOWN).any(dim=1).sum())
        return accuracy > chance + 2 * math.sqrt(chance * (1 - chance) / num_images)


@dataclass(frozen=True)
class Effect:
    """Of replacing one token by its mean.

    Attributes:
        changed_answers: share of images that get another answer.
        logit_change: root mean square change of the logits, as a part of how much they vary over images (or of a
            thousandth of their size, if that is more: what varies less is rounding). A token's mean over a single
            image is its state there, so that the effect over one image is 0 and says nothing.
        accuracy_change: accuracy afterwards minus before; None where no right answers are known.
        num_images: that were answered.
    """

    changed_answers: float
    logit_change: float
    accuracy_change: float | None
    num_images: int


def ablation_effects(
    model: Any, batches: Batches, mean_states: torch.Tensor, before: Answers | None = None
) -> dict[str, Effect]:
    """The effect of each special token, by names such as `cls[0]`.

    Args:
        model: a classifier.
        batches: gives the images.
        mean_states: [L + 1, S, D], of the embeddings and after each layer (`Findings.mean_states`).
        before: `answers_of(model, batches)`, where that is known already.

    Raises:
        ValueError: for a model without a classifier, no images, or right answers of another shape.
    """
    model = plain_model(model)
    before = answers_of(model, batches) if before is None else before
    effects = {}
    for place, name in enumerate(token_keys(model.config.token_layout)):
        with held_at_mean(model, place, mean_states[:, place]):
            effects[name] = effect(before, answers_of(model, batches))
    return effects


def token_keys(layout: TokenLayout) -> list[str]:
    """`cls[0]`, `registers[1]`: names of the special tokens as in metrics.jsonl, in the order of the sequence."""
    special = range(layout.num_prefix_tokens)
    return [f"{name}[{index}]" for name, group in layout.items() for index, _ in enumerate(special[group])]


@torch.no_grad()
def answers_of(model: Any, batches: Batches) -> Answers:
    """The model's answers to all images, on the CPU."""
    logits, chosen, right = [], [], []
    with evaluating(model):
        for pixel_values, labels in batches():
            by_task = logits_by_task(model(pixel_values))
            logits.append(torch.cat(by_task, dim=-1).float().cpu())
            chosen.append(decisions(by_task, model.config).cpu())
            if labels is not None:
                right.append(as_answers(labels, chosen[-1]))
    if not chosen:
        raise ValueError("there are no answers to no images: give one or more")
    is_known = len(right) == len(chosen)
    return Answers(torch.cat(logits), torch.cat(chosen), torch.cat(right) if is_known else None)


def logits_by_task(outputs: Any) -> list[torch.Tensor]:
    """[B, labels] of each task, or the one there is."""
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError("ablation compares answers, and this model gives none: use a classifier")
    return list(logits.values()) if isinstance(logits, dict) else [logits]


def decisions(by_task: list[torch.Tensor], config: ViTCLSConfig) -> torch.Tensor:
    """Logits [B, labels] of each task, or the one there is -> [B, A]: see `Answers.chosen`.

    As predictions are (inference/prediction_rows.py): of several labels each holds from a probability on.
    """
    if is_multi_label(config):
        return (by_task[0].float().sigmoid() >= THRESHOLD).long()
    return torch.stack([logits.argmax(dim=-1) for logits in by_task], dim=-1)


def right_answers(label: Any, config: ViTCLSConfig) -> torch.Tensor:
    """A label as data sets have it (data/images.py) -> [A] of `Answers.right`; UNKNOWN where it is None.

    To a multi-label model, the index of a class says that this one holds and no other.
    """
    if config.tasks:
        by_task = label or {}
        return torch.tensor([by_task.get(task, UNKNOWN) for task in config.task_labels()])
    if not is_multi_label(config):
        return torch.tensor([UNKNOWN if label is None else int(label)])
    if isinstance(label, list | tuple):
        return torch.tensor([int(value) for value in label])
    if label is None or label < 0:
        return torch.full((config.num_labels or 0,), UNKNOWN)
    return torch.tensor([int(index == label) for index in range(config.num_labels or 0)])


def as_answers(labels: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The right answers [B, A], on the CPU, of [B, A] or [B]; raises ValueError for any other shape."""
    if labels.shape not in (chosen.shape, chosen.shape[:1]) or labels.numel() != chosen.numel():
        raise ValueError(
            f"right answers are {list(labels.shape)} and the model's {list(chosen.shape)} [images, answers of each]"
        )
    return labels.cpu().view_as(chosen)


def effect(before: Answers, after: Answers) -> Effect:
    """Compare the answers to the same images."""
    size = root_mean_square(before.logits)
    scale = root_mean_square(before.logits - before.logits.mean(dim=0)).clamp(min=LEAST_VARIATION * size)
    change = root_mean_square(after.logits - before.logits)
    was, now = before.accuracy(), after.accuracy()
    return Effect(
        changed_answers=(before.chosen != after.chosen).any(dim=-1).float().mean().item(),
        logit_change=(change / scale.clamp(min=1e-12)).item(),
        accuracy_change=now - was if was is not None and now is not None else None,
        num_images=len(before.chosen),
    )


def root_mean_square(values: torch.Tensor) -> torch.Tensor:
    """Of all numbers, as a tensor of one."""
    return values.square().mean().sqrt()


@contextmanager
def held_at_mean(model: Any, place: int, mean_states: torch.Tensor) -> Iterator[None]:
    """The token at this place of the sequence has, after each layer, the state `mean_states` [L + 1, D] there."""

    def replacing(mean: torch.Tensor) -> Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]:
        def hook(layer: nn.Module, args: tuple, hidden_states: torch.Tensor) -> torch.Tensor:
            if place >= hidden_states.shape[1]:  # not computed in the last layer, as no head reads it
                return hidden_states
            replaced = hidden_states.clone()  # [B, N, D]
            replaced[:, place] = mean.to(hidden_states)
            return replaced

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code has no hooks
        for layer, mean in zip(model.base_model.layers, mean_states[1:], strict=True):
            hooks.enter_context(layer.register_forward_hook(replacing(mean)))
        yield
