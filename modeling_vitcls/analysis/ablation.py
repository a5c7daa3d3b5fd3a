"""Mean ablation: the change in predictions when a special token carries no information about the image.

    effect = compute_ablation_effects(model, batches, findings.mean_states)["registers[0]"]
    effect.changed_answers, effect.accuracy_change

After each layer, the state of the token is replaced by its mean over images, so that it is the same for every image.
Removing the token or setting it to zero would instead produce inputs that the model was never trained on.
`get_predicted_labels` defines the prediction of a model for the whole analysis.
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
from .model_utils import evaluation_mode, unwrap_model


# pixel_values [B, C, H, W] on the model's device, and labels or None. Labels are [B, A] (see `Predictions`), or [B] if
# A is 1. Called repeatedly, each time for the same images.
Batches = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor | None]]]

MIN_VARIATION = 1e-3  # minimum standard deviation of the logits over images, as a fraction of their root mean square


@dataclass(frozen=True)
class Predictions:
    """Predictions of a classifier for all images.

    Attributes:
        logits: [images, labels], all tasks concatenated.
        predicted: [images, A]: class indices. A is 1 for a single-label model and the number of tasks for a multi-task
            model (in the order of `config.task_labels()`). For a multi-label model, 0 or 1 for each label.
        labels: like `predicted`, IGNORED_LABEL if unknown; None if no label is known.
    """

    logits: torch.Tensor
    predicted: torch.Tensor
    labels: torch.Tensor | None

    def accuracy(self) -> float | None:
        """Return the fraction of correct predictions among those with known labels; None if no label is known."""
        if self.labels is None or not bool((self.labels != IGNORED_LABEL).any()):
            return None
        return (self.predicted == self.labels)[self.labels != IGNORED_LABEL].float().mean().item()

    def chance(self) -> float | None:
        """Return the accuracy of always predicting the most frequent label (of each column); None if no label is
        known."""
        if self.labels is None or not bool((self.labels != IGNORED_LABEL).any()):
            return None
        known = [column[column != IGNORED_LABEL] for column in self.labels.unbind(dim=1)]
        hits = [column.unique(return_counts=True)[1].max().item() for column in known if len(column)]
        return sum(hits) / sum(map(len, known))

    def is_better_than_chance(self) -> bool | None:
        """Return whether the accuracy exceeds `chance` by two standard errors; None if no label is known."""
        accuracy, chance = self.accuracy(), self.chance()
        if self.labels is None or accuracy is None or chance is None:
            return None
        num_images = int((self.labels != IGNORED_LABEL).any(dim=1).sum())
        return accuracy > chance + 2 * math.sqrt(chance * (1 - chance) / num_images)


@dataclass(frozen=True)
class AblationEffect:
    """Effect of replacing one token by its mean.

    Attributes:
        changed_answers: fraction of images whose prediction changes.
        logit_change: root mean square change of the logits, divided by their standard deviation over images (at least
            a thousandth of their root mean square, since smaller deviations are rounding). With a single image, the
            mean is the token's own state, so the effect is 0 and has no meaning.
        accuracy_change: accuracy after minus accuracy before; None if no label is known.
        num_images: number of images.
    """

    changed_answers: float
    logit_change: float
    accuracy_change: float | None
    num_images: int


def compute_ablation_effects(
    model: Any, batches: Batches, mean_states: torch.Tensor, before: Predictions | None = None
) -> dict[str, AblationEffect]:
    """Return the effect of each special token, with keys such as `cls[0]`.

    Args:
        model: a classifier.
        batches: returns the images.
        mean_states: [L + 1, S, D], mean states of the embeddings and after each layer (`Findings.mean_states`).
        before: `collect_predictions(model, batches)`, if already computed.

    Raises:
        ValueError: if the model has no classifier, there are no images, or labels have the wrong shape.
    """
    model = unwrap_model(model)
    before = collect_predictions(model, batches) if before is None else before
    effects = {}
    for index, name in enumerate(get_token_keys(model.config.token_layout)):
        with replace_token_by_mean(model, index, mean_states[:, index]):
            effects[name] = compute_effect(before, collect_predictions(model, batches))
    return effects


def get_token_keys(layout: TokenLayout) -> list[str]:
    """Return the keys of the special tokens as in metrics.jsonl (`cls[0]`, `registers[1]`), in sequence order."""
    special = range(layout.num_prefix_tokens)
    return [f"{name}[{index}]" for name, group in layout.items() for index, _ in enumerate(special[group])]


@torch.no_grad()
def collect_predictions(model: Any, batches: Batches) -> Predictions:
    """Return the model's predictions for all images, on the CPU."""
    logits, predicted, known_labels = [], [], []
    with evaluation_mode(model):
        for pixel_values, labels in batches():
            by_task = get_task_logits(model(pixel_values))
            logits.append(torch.cat(by_task, dim=-1).float().cpu())
            predicted.append(get_predicted_labels(by_task, model.config).cpu())
            if labels is not None:
                known_labels.append(reshape_labels(labels, predicted[-1]))
    if not predicted:
        raise ValueError("Ablation requires at least one image, but there are no images. Pass one or more images.")
    has_labels = len(known_labels) == len(predicted)
    return Predictions(torch.cat(logits), torch.cat(predicted), torch.cat(known_labels) if has_labels else None)


def get_task_logits(outputs: Any) -> list[torch.Tensor]:
    """Return the logits [B, labels] of each task, or a list of one element if the model has no tasks."""
    logits = getattr(outputs, "logits", None)
    if logits is None:
        raise ValueError("Ablation requires predictions, but this model has no classifier. Use a classifier.")
    return list(logits.values()) if isinstance(logits, dict) else [logits]


def get_predicted_labels(by_task: list[torch.Tensor], config: ViTCLSConfig) -> torch.Tensor:
    """Return the predicted labels [B, A] (`Predictions.predicted`) for the logits [B, labels] of each task.

    A multi-label model predicts each label whose probability reaches THRESHOLD, as in inference/prediction_rows.py.
    """
    if is_multi_label(config):
        return (by_task[0].float().sigmoid() >= THRESHOLD).long()
    return torch.stack([logits.argmax(dim=-1) for logits in by_task], dim=-1)


def encode_label(label: Any, config: ViTCLSConfig) -> torch.Tensor:
    """Return a dataset label (data/images.py) as [A] (`Predictions.labels`), with IGNORED_LABEL for None.

    For a multi-label model, a class index means that only this label holds.
    """
    if config.tasks:
        by_task = label or {}
        return torch.tensor([by_task.get(task, IGNORED_LABEL) for task in config.task_labels()])
    if not is_multi_label(config):
        return torch.tensor([IGNORED_LABEL if label is None else int(label)])
    if isinstance(label, list | tuple):
        return torch.tensor([int(value) for value in label])
    if label is None or label < 0:
        return torch.full((config.num_labels or 0,), IGNORED_LABEL)
    return torch.tensor([int(index == label) for index in range(config.num_labels or 0)])


def reshape_labels(labels: torch.Tensor, predicted: torch.Tensor) -> torch.Tensor:
    """Return labels [B, A] or [B] as [B, A] on the CPU.

    Raises:
        ValueError: if the labels have another shape.
    """
    if labels.shape not in (predicted.shape, predicted.shape[:1]) or labels.numel() != predicted.numel():
        raise ValueError(
            f"Labels must have the shape of the predictions, {list(predicted.shape)} [images, labels per image], but "
            f"they are {list(labels.shape)}. Pass one label per prediction."
        )
    return labels.cpu().view_as(predicted)


def compute_effect(before: Predictions, after: Predictions) -> AblationEffect:
    """Compare two sets of predictions for the same images."""
    size = compute_rms(before.logits)
    scale = compute_rms(before.logits - before.logits.mean(dim=0)).clamp(min=MIN_VARIATION * size)
    change = compute_rms(after.logits - before.logits)
    accuracy_before, accuracy_after = before.accuracy(), after.accuracy()
    return AblationEffect(
        changed_answers=(before.predicted != after.predicted).any(dim=-1).float().mean().item(),
        logit_change=(change / scale.clamp(min=1e-12)).item(),
        accuracy_change=None
        if accuracy_before is None or accuracy_after is None
        else accuracy_after - accuracy_before,
        num_images=len(before.predicted),
    )


def compute_rms(values: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of all elements, as a scalar tensor."""
    return values.square().mean().sqrt()


@contextmanager
def replace_token_by_mean(model: Any, index: int, mean_states: torch.Tensor) -> Iterator[None]:
    """Replace the state of the token at this sequence index after each layer by `mean_states` [L + 1, D]."""

    def build_hook(mean: torch.Tensor) -> Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]:
        def hook(layer: nn.Module, args: tuple, hidden_states: torch.Tensor) -> torch.Tensor:
            if index >= hidden_states.shape[1]:  # the last layer skips tokens that no head reads
                return hidden_states
            replaced = hidden_states.clone()  # [B, N, D]
            replaced[:, index] = mean.to(hidden_states)
            return replaced

        return hook

    with ExitStack() as hooks:
        hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code does not call hooks
        for layer, mean in zip(model.base_model.layers, mean_states[1:], strict=True):
            hooks.enter_context(layer.register_forward_hook(build_hook(mean)))
        yield
