"""What special tokens do, measured in pairs: the same images as they are, and with an intervention.

    hidden     no token attends to the token: what its place is worth
    content    another photo's token stands in its place, of another class if there are labels: what
               the token holds about the photo. It works for tokens that a head reads, too.

    batches, messages = read_batches(model, processor, images, label_space, batch_size)
    effects = measure_effects(model, list_token_sets(model.config), batches)
    effects["register 1"][""].verdict       of the output "", which is that of a classifier

Without labels, losses are those of the model's own predictions; of an encoder, they are the cosine
distances of its features. The interventions are in inference/interventions.py.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.images import LabeledImages
from ..data.labels import LabelSpace, is_multi_label
from ..frozen.targets import OneLabelTarget, SeveralLabelsTarget, Target
from ..inference.image_pass import ImageBatch, pass_over_images, prepare_batches, read_pixels
from ..inference.intervals import Interval, compute_bootstrap_interval
from ..inference.interventions import LayerRange, hide, list_groups, record_states, replace
from ..inference.metrics import compute_losses
from ..inference.token_names import SINGLE_TOKEN_NAMES, get_token_names
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.heads_vitcls import IGNORED_LABEL
from ..model.token_layout_vitcls import TokenLayout


# Batches of images; each iteration yields the same ones. Labels are [B, A] with the columns of all
# tasks, or [B] if A is 1.
Batches = Iterable[ImageBatch]
# Name of a task -> logits [labels] of each image; or, of an encoder, name of a kind of features ->
# vectors [n, D] of each image, because images of other sizes have other numbers of patches
Outputs = dict[str, list[Tensor]]
# Positions of the images of a batch -> context of its pass
Intervene = Callable[[range], AbstractContextManager]

MIN_IMAGES = 16  # With fewer images, nothing is shown
MIN_CHANGE = 1e-3  # Smaller changes of a loss or a distance are rounding errors
# A token without which a model is lost has content if another photo's token costs this share of that
MIN_CONTENT_SHARE = 0.1
EFFECT_TITLES = {"hidden": "hidden", "content": "another photo's", "without": "without"}
# Verdicts
CONTENT, PLACE, NOT_SHOWN, BETTER_WITHOUT = "content", "place", "not shown", "better without"


@dataclass(frozen=True)
class TokenSet:
    """A special token, or all tokens of a group: its name, its group and its indices in the sequence."""

    name: str
    group: str
    indices: list[int]


@dataclass(frozen=True)
class Change:
    """What an intervention changes in one output, on the same images.

    Attributes:
        losses: [2, N] log losses before and after; of features, zeros and cosine distances.
        num_changed: number of images whose prediction changes; None for features.
        is_right: [2, N] before and after; None without labels.
    """

    losses: np.ndarray
    num_changed: int | None = None
    is_right: np.ndarray | None = None

    @property
    def cost(self) -> float:
        """By how much the mean loss rises."""
        return float(np.diff(self.losses, axis=0).mean())

    @cached_property
    def cost_interval(self) -> Interval:
        """95% confidence interval of the cost, from bootstrap samples of the images."""
        return compute_bootstrap_interval(np.diff(self.losses, axis=0)[0].tolist())

    @cached_property
    def accuracy_interval(self) -> Interval:
        """95% confidence interval of the change of accuracy; (0, 0) without labels."""
        if self.is_right is None:
            return 0.0, 0.0
        return compute_bootstrap_interval(np.diff(self.is_right.astype(float), axis=0)[0].tolist())

    @property
    def is_harmful(self) -> bool:
        """Whether the loss rises, or fewer images are right."""
        return self.cost_interval[0] > MIN_CHANGE or self.accuracy_interval[1] < 0

    @property
    def is_helpful(self) -> bool:
        """Whether labels say that the loss falls, and not that fewer images are right."""
        is_lower = self.is_right is not None and self.cost_interval[1] < -MIN_CHANGE
        return is_lower and not self.is_harmful

    def build_record(self) -> dict[str, Any]:
        """Build the numbers for results.json and tables; changes are after minus before."""
        if self.num_changed is None:
            return {"distance": self.cost, "distance_interval": [*self.cost_interval]}
        record: dict[str, Any] = {
            "num_changed": self.num_changed,
            "loss": float(self.losses[1].mean()),
            "loss_change": self.cost,
            "loss_interval": [*self.cost_interval],
        }
        if self.is_right is None:
            return record
        before, after = self.is_right
        return record | {
            "accuracy": float(after.mean()),
            "accuracy_change": float(after.mean() - before.mean()),
            "accuracy_interval": [*self.accuracy_interval],
            "gained": int((after & ~before).sum()),
            "lost": int((before & ~after).sum()),
        }


@dataclass(frozen=True)
class Effect:
    """What hiding a token changes in an output, and what another photo's token in its place changes."""

    hidden: Change
    content: Change

    @property
    def verdict(self) -> str:
        """What the token has: see `judge`."""
        return judge(self.hidden, self.content)


# Name of a token or a group -> name of an output -> effect
Effects = dict[str, dict[str, Effect]]


def judge(absent: Change, content: Change) -> str:
    """Say what a token has, by what is lost without it, and with another photo's token in its place.

    Returns:
        CONTENT: another photo's token does not do, so the token holds something about the photo.
        PLACE: it does, but without the token the model loses: a constant, or a sink of attention.
        BETTER_WITHOUT: without the token, the loss is lower.
        NOT_SHOWN: none of these is shown by these images.
    """
    if absent.losses.shape[1] < MIN_IMAGES:
        return NOT_SHOWN
    has_content = content.is_harmful and content.cost >= MIN_CONTENT_SHARE * absent.cost
    if absent.is_helpful and not (has_content and content.cost > -absent.cost):
        return BETTER_WITHOUT
    if has_content:
        return CONTENT
    return PLACE if absent.is_harmful else NOT_SHOWN


def measure_effects(
    model: Any,
    token_sets: Iterable[TokenSet],
    batches: Batches,
    layers: LayerRange = None,
    watch: Callable[[Any, str], Iterable[Any]] = lambda items, description: items,
    run: Callable[[Tensor], Any] | None = None,
) -> Effects:
    """Measure what hiding and replacing tokens changes, in two passes for each.

    Args:
        model: a classifier or an encoder, in evaluation mode.
        token_sets: the tokens.
        batches: batches of images.
        layers: the first and the last layer of the interventions, from 1. Default: all.
        watch: function that returns the same items and shows the progress.
        run: function from images [B, C, H, W] to the outputs. Default: the model.
    """
    parts: list[Tensor] = []

    def record(pixel_values: Tensor) -> Any:
        with record_states(model) as states:
            outputs = (run or model)(pixel_values)
        parts.append(torch.stack(states, dim=1).cpu())
        return outputs

    before = gather_outputs(model, batches, run=record)
    labels = collect_labels(batches, model.config)
    states = torch.cat(parts)  # [N, 1 + layers, S, D]
    states = states[choose_donors(labels, len(states))]
    target = get_target(model.config)
    effects: Effects = {}
    for tokens in watch(token_sets, "hiding and replacing tokens"):
        hide_tokens, replace_tokens = list_interventions(model, tokens.indices, states, layers)
        hidden = gather_outputs(model, batches, hide_tokens, run)
        replaced = gather_outputs(model, batches, replace_tokens, run)
        effects[tokens.name] = {}
        for output, rows in before.items():
            truth = labels.get(output, labels.get(""))
            effects[tokens.name][output] = Effect(
                compare(rows, hidden[output], target, truth),
                compare(rows, replaced[output], target, truth),
            )
    return effects


def list_interventions(
    model: Any, indices: Sequence[int], states: Tensor, layers: LayerRange = None
) -> tuple[Intervene, Intervene]:
    """Hide tokens, and replace them with the states of others, in a batch of images at some positions."""

    def replace_rows(rows: range) -> AbstractContextManager:
        return replace(model, indices, states[rows].to(model.device), layers)

    return lambda rows: hide(model, indices, layers), replace_rows


def choose_donors(labels: Mapping[str, Tensor], number: int) -> list[int]:
    """Choose whose tokens each image gets: of the next image, in random order, with other labels.

    Without labels, or if all are the same, it is the next image.
    """
    order = np.random.default_rng(0).permutation(number).tolist()
    columns = [each.view(number, -1) for each in labels.values()]
    rows = torch.cat(columns, dim=1).tolist() if columns else order
    donors = {}
    for place, index in enumerate(order):
        others = order[place + 1 :] + order[: place + 1]
        donors[index] = next((each for each in others if rows[each] != rows[index]), others[0])
    return [donors[index] for index in range(number)]


def compare(
    before: Sequence[Tensor], after: Sequence[Tensor], target: Target, labels: Tensor | None
) -> Change:
    """Compare one output of all images before and after an intervention.

    Images without a known label (IGNORED_LABEL) are left out; if none has one, labels are what the model
    predicts.
    """
    if before[0].ndim == 2:  # Several vectors of an image are features, not logits
        pairs = zip(before, after, strict=True)
        distances = [1 - nn.functional.cosine_similarity(*pair, dim=-1).mean() for pair in pairs]
        costs = torch.stack(distances).clamp(min=0).numpy()
        return Change(np.stack([0 * costs, costs]))

    # [N, labels] each
    logits = [torch.stack(list(rows)).double().numpy() for rows in (before, after)]
    predicted, new = map(target.predict, logits)
    num_changed = int((~target.find_right(new, predicted)).sum())
    is_known = np.zeros(len(predicted), bool)
    if labels is not None:
        is_known = (labels != IGNORED_LABEL).view(len(labels), -1).all(dim=1).numpy()
    if labels is None or not is_known.any():
        return Change(np.stack([compute_losses(each, predicted) for each in logits]), num_changed)

    truth = labels.numpy()[is_known]
    if target is OneLabelTarget:
        truth = truth.ravel()
    return Change(
        np.stack([compute_losses(each[is_known], truth) for each in logits]),
        num_changed,
        np.stack([target.find_right(each[is_known], truth) for each in (predicted, new)]),
    )


# Texts --------------------------------------------------------------------------------------------


def describe_change(record: Mapping[str, Any], num_images: int) -> str:
    """Say what an intervention changes (`Change.build_record`), with 95% confidence intervals."""
    if "distance" in record:
        low, high = record["distance_interval"]
        return f"{record['distance']:.2g} ({low:.2g} to {high:.2g})"
    low, high = record["loss_interval"]
    loss = f"log loss {record['loss_change']:+.3f} ({low:+.3f} to {high:+.3f})"
    if "accuracy" not in record:
        return f"{record['num_changed']} of {num_images} predictions, {loss}"
    low, high = (100 * bound for bound in record["accuracy_interval"])
    points = f"{100 * record['accuracy_change']:+.1f} points"
    if record["gained"] or record["lost"]:  # Otherwise, the interval has no width
        points += f" ({low:+.0f} to {high:+.0f})"
    return f"{points}, {loss}"


# Tokens -------------------------------------------------------------------------------------------


def list_token_sets(config: ViTCLSConfig) -> list[TokenSet]:
    """List each special token, and each group of several."""
    names = get_token_names(config)
    token_sets = []
    for group, members in list_groups(config).items():
        token_sets += [TokenSet(names[index], group, [index]) for index in members]
        if len(members) > 1:
            token_sets.append(TokenSet(name_group(group), group, members))
    return token_sets


def name_group(group: str) -> str:
    """Name all tokens of a group, as in the table of effects."""
    return f"all {SINGLE_TOKEN_NAMES[group]} tokens"


# Outputs and labels -------------------------------------------------------------------------------


def read_batches(
    model: Any,
    processor: Any,
    images: LabeledImages,
    label_space: LabelSpace,
    batch_size: int,
    watch: Callable[[Any, str], Iterable[Any]] = lambda items, description: items,
) -> tuple[list[ImageBatch], list[str]]:
    """Preprocess images in random order, because datasets are often sorted by class.

    Return the batches of readable images, and one message per unreadable image.
    """
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    prepare = partial(read_pixels, images.images, processor, model.config.num_channels)
    batches = []
    error_messages: list[str] = []
    for part in watch(parts, "reading images"):
        for batch in prepare_batches(prepare, [part]):
            error_messages += batch.error_messages.values()
            if label_space.columns:
                batch.labels = label_space.collate([images.labels[each] for each in batch.indices])
            if batch.indices:
                batches.append(batch)
    if not batches:
        first_error = f" ({error_messages[0]})" if error_messages else ""
        raise ValueError(
            f"the tokens are measured with images, but none of {len(images)} can be "
            f"read{first_error}. Check the images."
        )
    return batches, error_messages


def gather_outputs(
    model: Any,
    batches: Batches,
    intervene: Intervene = lambda rows: nullcontext(),
    run: Callable[[Tensor], Any] | None = None,
) -> Outputs:
    """Collect the outputs for all images, on the CPU.

    Args:
        model: a classifier or an encoder, in evaluation mode.
        batches: batches of images.
        intervene: returns the context of the pass of the images at some positions.
        run: function from images [B, C, H, W] to the outputs. Default: the model.
    """
    collected: Outputs = {}
    start = 0
    for batch in batches:
        stop = start + len(batch.indices)
        with intervene(range(start, stop)):
            ((_, outputs),) = pass_over_images(run or model, [batch], model.device)
        for name, rows in select_outputs(outputs, model.config.token_layout).items():
            collected.setdefault(name, []).extend(rows.float().cpu())
        start = stop
    return collected


def select_outputs(outputs: Any, layout: TokenLayout) -> dict[str, Tensor]:
    """Select the logits [B, labels] of each task, or the features [B, n, D] of an encoder.

    The features are "cls" and "distillation" (if there are such tokens), and "patches".
    """
    if hasattr(outputs, "logits"):
        return outputs.logits if isinstance(outputs.logits, dict) else {"": outputs.logits}
    states = outputs.last_hidden_state  # [B, N, D]
    features = {name: states[:, tokens] for name, tokens in layout.items() if name != "registers"}
    return {name: vectors for name, vectors in features.items() if vectors.shape[1]}


def get_target(config: ViTCLSConfig) -> Target:
    """What the heads of a model predict: one label per image, or several."""
    return SeveralLabelsTarget if is_multi_label(config) else OneLabelTarget


def collect_labels(batches: Batches, config: ViTCLSConfig) -> dict[str, Tensor]:
    """Collect the labels [N, columns] of each task; empty without labels. Unknown ones are IGNORED_LABEL."""
    parts = [
        batch.labels.view(len(batch.labels), -1) for batch in batches if batch.labels is not None
    ]
    if not parts:
        return {}
    labels = torch.cat(parts)  # [images, columns]
    if not config.tasks:
        return {"": labels}
    return dict(zip(config.task_labels(), labels.split(1, dim=1), strict=True))
