"""Effects of special tokens: how outputs change if the states of tokens are replaced by their means.

    ablations = compute_ablations(model, TokenUse(model.config), batches)
    ablations["registers[0]"][""]    the `Effect` on the output "" (token_use.py)

The states are replaced with their means over images, after the embeddings and each layer, so that
they are the same for every image. Removing tokens or setting them to zero would instead produce
inputs that the model was never trained on.

An effect alone is not meaningful, because a random token is attended to as well. The effect of each
token that no head reads is therefore compared with one null distribution: the effects of ablating a
redrawn token, whose embedding is replaced with a random vector of the same norm. Effects, null
distributions and decisions use the same images.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import torch
from scipy import stats
from torch import nn

from ..data.labels import is_multi_label
from ..inference.image_pass import ImageBatch, pass_over_images
from ..inference.intervals import (
    Interval,
    compute_bootstrap_interval,
    compute_prediction_limit,
    compute_proportion_interval,
)
from ..inference.prediction_rows import DEFAULT_THRESHOLD
from ..model.configuration_vitcls import TokenLayout, ViTCLSConfig
from ..model.heads_vitcls import IGNORED_LABEL
from .token_use import TokenUse


# Batches with labels or None. Labels are [B, A] with the columns of all tasks (see `Predictions`),
# or [B] if A is 1. Each iteration yields the same batches.
Batches = Iterable[ImageBatch]
# (items, description) -> items, with a progress bar
Watch = Callable[[Collection[Any], str], Iterable[Any]]
Outputs = dict[str, Any]  # name of a task or a feature -> `Predictions` or `Features`

MIN_IMAGES = 16  # minimum number of images required to judge an effect
MIN_CHANGE = 1e-3  # smaller effects are rounding errors
# Minimum standard deviation of the logits over images, as a fraction of their root mean square
MIN_RELATIVE_DEVIATION = 1e-3
NUM_NULL_DRAWS = 8  # number of random draws of tokens per null distribution
MAX_REDRAW_DROP = 0.05  # maximum decrease in accuracy if a random token does as well
NULL_LEVEL = 0.995  # level of the limit: 1 of 200 random tokens has a larger effect


@dataclass(frozen=True)
class Effect:
    """Effect of an ablation on one output, with 95% confidence intervals.

    Attributes:
        size: for predictions, the root mean square change of the logits, divided by the standard
            deviation of the logits over images. For features, the mean of 1 minus the cosine
            similarity.
        interval: interval for `size`, from bootstrap samples of the images.
        num_images: number of images.
        changed: fraction of images whose prediction changes; None for features.
        changed_interval: interval for `changed`.
        accuracy_change: accuracy after the ablation minus accuracy before; None if no label is
            known.
        improvement: p-value under the null hypothesis that the accuracy does not increase (exact
            McNemar test); None if no label is known.
        is_better_than_chance: whether the accuracy after the ablation is better than chance; None
            if unknown.
        null_sizes: sizes of the effects of ablating redrawn tokens; empty if a head reads the
            token, because then every replacement has an effect.
        redraw_drop: interval for the decrease in accuracy if the token is redrawn, as a mean over
            draws; None if no label is known or a head reads the token.
    """

    size: float
    interval: Interval
    num_images: int
    changed: float | None = None
    changed_interval: Interval | None = None
    accuracy_change: float | None = None
    improvement: float | None = None
    is_better_than_chance: bool | None = None
    null_sizes: tuple[float, ...] = ()
    redraw_drop: Interval | None = None

    @property
    def limit(self) -> float | None:
        """Return the limit of the null distribution, or None if there is none.

        The limit is the upper bound of its prediction interval at NULL_LEVEL, which accounts for
        rare large effects.
        """
        if not self.null_sizes:
            return None
        return max(compute_prediction_limit(self.null_sizes, NULL_LEVEL), MIN_CHANGE)

    @property
    def is_measurable(self) -> bool:
        """Return whether the interval excludes no change.

        Any change of a prediction counts, and a change of features above rounding errors.
        """
        if self.changed is None:
            return self.interval[0] > MIN_CHANGE
        return self.changed > 0 and self.size > MIN_CHANGE

    @property
    def is_beyond_limit(self) -> bool:
        """Return whether the effect is measurable, and more than that of a random token.

        It exceeds the limit of its null distribution, or a random token in its place costs
        accuracy.
        """
        costs_accuracy = self.redraw_drop is not None and self.redraw_drop[0] > MAX_REDRAW_DROP
        return (
            self.is_measurable
            and self.limit is not None
            and (self.size > self.limit or costs_accuracy)
        )


# token key or group name -> output name -> effect
Ablations = dict[str, dict[str, Effect]]


def compute_ablations(
    model: Any, use: TokenUse, batches: Batches, watch: Watch = lambda items, description: items
) -> Ablations:
    """Return the effects of each special token and of each group of several tokens.

    The effects of tokens that no head reads have null distributions.

    Args:
        model: a classifier or an encoder, in evaluation mode.
        use: the tokens that the outputs of the model read.
        batches: batches of images and labels, over which several passes per token are made.
        watch: function that returns the same items and shows the progress.

    Raises:
        ValueError: if there are no images, or labels have the wrong shape.
    """
    layout = model.config.token_layout
    targets = get_ablation_targets(layout)
    generator = torch.Generator().manual_seed(0)
    ablations: Ablations = {}
    if not targets:
        return ablations

    # [L + 1, S, D]
    means, before = collect_mean_states(model, batches, range(layout.num_prefix_tokens))
    for key, indices in watch(targets.items(), "ablating tokens"):
        with replace_by_means(model, use, indices, means[:, indices]):
            after = collect_outputs(model, batches)
        ablations[key] = {
            name: compute_effect(output, after[name]) for name, output in before.items()
        }

    for keys, draws in watch(list(plan_redraws(layout, use)), "ablating random tokens"):
        sizes: dict[str, list[float]] = {}  # output name -> null distribution
        # (redrawn key, output name) -> drops [images] per draw
        drops: dict[tuple[str, str], list[torch.Tensor]] = {}
        for key in draws:
            with redraw_tokens(model, targets[key], generator):
                redrawn_means, redrawn = collect_mean_states(model, batches, targets[key])
                with replace_by_means(model, use, targets[key], redrawn_means):
                    replaced = collect_outputs(model, batches)

            for name, output in redrawn.items():
                size = summarize_changes(replaced[name], measure_changes(output, replaced[name]))
                sizes.setdefault(name, []).append(size)
                if isinstance(output, Predictions) and bool(output.is_known.all()):
                    was_correct = before[name].predicted == output.labels
                    is_correct = output.predicted == output.labels
                    drop_by_image = (was_correct.float() - is_correct.float()).mean(dim=1)
                    drops.setdefault((key, name), []).append(drop_by_image)

        intervals = {
            position: compute_bootstrap_interval(torch.stack(draw_drops).mean(dim=0).tolist())
            for position, draw_drops in drops.items()
        }
        for name, null_sizes in sizes.items():
            for key in keys:
                ablations[key][name] = replace(
                    ablations[key][name],
                    null_sizes=tuple(null_sizes),
                    redraw_drop=intervals.get((key, name)),
                )
    return ablations


def plan_redraws(layout: TokenLayout, use: TokenUse) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the keys that share a null distribution, and the key that each draw redraws.

    The draws cycle through the tokens of a group. Tokens that a head reads are not redrawn.
    """
    keys = get_token_keys(layout)
    for group, members in get_group_indices(layout).items():
        unread_keys = [keys[index] for index in members if index not in use.read_tokens]
        if unread_keys:
            yield unread_keys, list(islice(cycle(unread_keys), NUM_NULL_DRAWS))
        if len(unread_keys) == len(members) > 1:
            yield [group], [group] * NUM_NULL_DRAWS


# Effects ------------------------------------------------------------------------------------------


def compute_effect(before: Any, after: Any) -> Effect:
    """Return the effect of an ablation on one output (`Predictions` or `Features`)."""
    changes = measure_changes(before, after)
    size = summarize_changes(after, changes)
    low, high = compute_bootstrap_interval(changes.tolist())
    if isinstance(before, Features):
        return Effect(size, (low, high), len(before))

    is_changed = (before.predicted != after.predicted).any(dim=-1)
    num_changed = int(is_changed.sum())
    changed_low, changed_high = compute_proportion_interval(num_changed, len(before)) or (0.0, 1.0)
    effect = Effect(
        size=size,
        interval=(low**0.5, high**0.5),
        num_images=len(before),
        changed=is_changed.float().mean().item(),
        changed_interval=(changed_low, changed_high),
    )

    was_correct = (before.predicted == before.labels)[before.is_known]
    is_correct = (after.predicted == before.labels)[before.is_known]
    if not len(is_correct):
        return effect

    num_gained = int((is_correct & ~was_correct).sum())
    num_lost = int((was_correct & ~is_correct).sum())
    p_value = 1.0
    if num_gained:
        test = stats.binomtest(num_gained, num_gained + num_lost, alternative="greater")
        p_value = test.pvalue

    return replace(
        effect,
        accuracy_change=(num_gained - num_lost) / len(is_correct),
        improvement=float(p_value),
        is_better_than_chance=after.is_better_than_chance(),
    )


def measure_changes(before: Any, after: Any) -> torch.Tensor:
    """Return the change [images] of an output.

    For logits, it is the squared change in units of their variance over images; for features, 1
    minus the cosine similarity.
    """
    if isinstance(before, Features):
        pairs = zip(before.vectors, after.vectors, strict=True)
        return 1 - torch.stack(
            [nn.functional.cosine_similarity(*pair, dim=-1).mean() for pair in pairs]
        ).clamp(max=1)

    root_mean_square = before.logits.square().mean().sqrt()
    variances = (before.logits - before.logits.mean(dim=0)).square().mean(dim=1)  # [images]
    scale = (
        variances.mean()
        .sqrt()
        .clamp(min=MIN_RELATIVE_DEVIATION * root_mean_square)
        .clamp(min=1e-12)
    )
    return (after.logits - before.logits).square().mean(dim=1) / scale.square()


def summarize_changes(output: Any, changes: torch.Tensor) -> float:
    """Return `Effect.size` for changes [images]."""
    mean = changes.mean().item()
    return math.sqrt(mean) if isinstance(output, Predictions) else mean


# Tokens -------------------------------------------------------------------------------------------


def get_group_indices(layout: TokenLayout) -> dict[str, list[int]]:
    """Return a dict that maps each nonempty group to the sequence indices of its special tokens."""
    special_indices = range(layout.num_prefix_tokens)
    return {
        name: list(special_indices[group])
        for name, group in layout.items()
        if special_indices[group]
    }


def get_token_keys(layout: TokenLayout) -> list[str]:
    """Return the keys of the special tokens, such as `cls[0]`, as in metrics.jsonl."""
    groups = get_group_indices(layout)
    return [
        f"{group}[{index}]" for group, members in groups.items() for index in range(len(members))
    ]


def get_ablation_targets(layout: TokenLayout) -> dict[str, list[int]]:
    """Return the sequence indices of each token, and of each group of several tokens, by key."""
    targets = {key: [index] for index, key in enumerate(get_token_keys(layout))}
    return targets | {
        name: members for name, members in get_group_indices(layout).items() if len(members) > 1
    }


def collect_mean_states(
    model: Any, batches: Batches, indices: Sequence[int]
) -> tuple[torch.Tensor, Outputs]:
    """Return the mean states [L + 1, n, D] of some tokens, and the outputs of the same passes.

    The tokens are those at the sequence indices `indices`. The means are in double precision.
    """
    state_sums = []

    def run(pixel_values: torch.Tensor) -> Any:
        outputs = model(pixel_values, output_hidden_states=True)
        # [B, L + 1, n, D]
        states = torch.stack([state[:, list(indices)] for state in outputs.hidden_states], dim=1)
        state_sums.append(states.cpu().double().sum(dim=0))
        return outputs

    outputs = collect_outputs(model, batches, run)
    return torch.stack(state_sums).sum(dim=0) / count_images(outputs), outputs


@contextmanager
def replace_by_means(
    model: Any, use: TokenUse, indices: Sequence[int], mean_states: torch.Tensor
) -> Iterator[None]:
    """Replace the states of the special tokens `indices` with `mean_states` [L + 1, n, D].

    They are replaced after the embeddings and after each layer. The last layer is included only if
    the head uses one of the tokens.
    """
    encoder = model.base_model
    modules = [encoder.embeddings, *encoder.layers]
    if use.read_tokens.isdisjoint(indices):
        modules.pop()  # a hook on the last layer would make the layer compute all tokens

    with ExitStack() as hooks:
        # compiled code does not call hooks
        hooks.enter_context(torch.compiler.set_stance("force_eager"))
        for module, means in zip(modules, mean_states, strict=False):
            hooks.enter_context(replace_tokens(module, indices, means))
        yield


@contextmanager
def redraw_tokens(model: Any, indices: Sequence[int], generator: torch.Generator) -> Iterator[None]:
    """Replace the embeddings of the tokens `indices` with random vectors of the same norms."""
    # [n, D]
    directions = nn.functional.normalize(
        torch.randn(len(indices), model.config.hidden_size, generator=generator)
    )

    def redraw(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.norm(dim=-1, keepdim=True) * directions.to(tokens)

    with (
        torch.compiler.set_stance("force_eager"),
        replace_tokens(model.base_model.embeddings, indices, redraw),
    ):
        yield


def replace_tokens(
    module: nn.Module,
    indices: Sequence[int],
    new_tokens: torch.Tensor | Callable[[torch.Tensor], torch.Tensor],
) -> torch.utils.hooks.RemovableHandle:
    """Replace the special tokens `indices` in the output of a module until the handle is removed.

    `new_tokens` is a tensor [n, D], or a function that maps the old tokens [B, n, D] to the new
    tokens.
    """

    def hook(module: nn.Module, args: tuple, hidden_states: torch.Tensor) -> torch.Tensor:
        new_states = hidden_states.clone()  # [B, N, D]
        replacements = (
            new_tokens(new_states[:, list(indices)]) if callable(new_tokens) else new_tokens
        )
        new_states[:, list(indices)] = replacements.to(hidden_states)
        return new_states

    return module.register_forward_hook(hook)


# Outputs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Predictions:
    """Predictions of one task for all images."""

    logits: torch.Tensor  # [images, labels]
    # [images, 1], class indices; [images, labels] with values 0 or 1 for a multi-label model
    predicted: torch.Tensor
    labels: torch.Tensor  # same shape as `predicted`; IGNORED_LABEL if unknown

    def __len__(self) -> int:
        return len(self.predicted)

    @property
    def is_known(self) -> torch.Tensor:
        """Return a mask with the shape of `predicted` of the known labels."""
        return self.labels != IGNORED_LABEL

    def compute_accuracy(self) -> float | None:
        """Return the fraction of correct predictions for known labels, or None without any."""
        is_correct = (self.predicted == self.labels)[self.is_known]
        return is_correct.float().mean().item() if len(is_correct) else None

    def compute_chance(self) -> float:
        """Return the accuracy of predicting the most frequent label of each column."""
        columns = [column[column != IGNORED_LABEL] for column in self.labels.unbind(dim=1)]
        counts = [
            column.unique(return_counts=True)[1].max().item() for column in columns if len(column)
        ]
        return sum(counts) / sum(map(len, columns))

    def is_better_than_chance(self) -> bool | None:
        """Return whether the accuracy exceeds chance by more than 2 standard errors.

        Return None if no label is known.
        """
        accuracy = self.compute_accuracy()
        if accuracy is None:
            return None
        chance = self.compute_chance()
        num_known_images = int(self.is_known.any(dim=1).sum())
        return accuracy > chance + 2 * math.sqrt(chance * (1 - chance) / num_known_images)


@dataclass(frozen=True)
class Features:
    """One kind of features of an encoder: one tensor [vectors, D] per image."""

    vectors: list[torch.Tensor]

    def __len__(self) -> int:
        return len(self.vectors)


def collect_outputs(
    model: Any, batches: Batches, run: Callable[[torch.Tensor], Any] | None = None
) -> Outputs:
    """Return the outputs for all images, on the CPU.

    Args:
        model: a classifier or an encoder, in evaluation mode.
        batches: batches of images and labels.
        run: function from images [B, C, H, W] to the output of the model. Default: the model.

    Raises:
        ValueError: if there are no images, or the shape of the labels does not match the
            predictions.
    """
    batch_outputs = []
    for batch, outputs in pass_over_images(run or model, batches, model.device):
        if hasattr(outputs, "logits"):
            batch_outputs.append(extract_predictions(outputs, batch.labels, model.config))
        else:
            batch_outputs.append(extract_features(outputs, model.config.token_layout))
    return join_outputs(batch_outputs)


def extract_features(outputs: Any, layout: TokenLayout) -> Outputs:
    """Return the features of a batch, on the CPU.

    They are "cls" and "distillation" (if there are such tokens), "pooled" (`pooler_output`) or,
    without a pooler, "mean of patches", and "patches".
    """
    states = outputs.last_hidden_state  # [B, N, D]
    features = {"cls": states[:, layout.cls], "distillation": states[:, layout.distillation]}
    if outputs.pooler_output is not None:
        features["pooled"] = outputs.pooler_output.unsqueeze(1)
    else:
        features["mean of patches"] = states[:, layout.patches].mean(dim=1, keepdim=True)
    features["patches"] = states[:, layout.patches]
    return {
        name: Features(list(rows.float().cpu())) for name, rows in features.items() if rows.shape[1]
    }


def extract_predictions(outputs: Any, labels: torch.Tensor | None, config: ViTCLSConfig) -> Outputs:
    """Return the predictions of each task for a batch, on the CPU.

    Raise ValueError if the shape of the labels does not match the predictions.
    """
    logits_by_task = outputs.logits if isinstance(outputs.logits, dict) else {"": outputs.logits}
    # [B, 1] each, or [B, labels] for a multi-label model
    predicted = {
        task: predict_labels(logits, config).cpu() for task, logits in logits_by_task.items()
    }

    shape = torch.cat(list(predicted.values()), dim=1).shape
    labels = torch.full(shape, IGNORED_LABEL) if labels is None else labels.cpu()
    if len(labels) != shape[0] or labels.numel() != shape.numel():
        raise ValueError(
            f"The predictions have shape {list(shape)} [images, labels per image], but the labels "
            f"have shape {list(labels.shape)}. Pass one label per prediction."
        )

    label_columns = labels.view(shape).split(
        [columns.shape[1] for columns in predicted.values()], dim=1
    )
    return {
        task: Predictions(logits.float().cpu(), predicted[task], columns)
        for (task, logits), columns in zip(logits_by_task.items(), label_columns, strict=True)
    }


def join_outputs(batches: Sequence[Outputs]) -> Outputs:
    """Return the outputs of all batches. Raise ValueError if there are no batches."""
    if not batches:
        raise ValueError(
            "Ablation requires at least one image, but there are no images. Pass one or more "
            "images."
        )

    joined: Outputs = {}
    for name, first in batches[0].items():
        if isinstance(first, Features):
            joined[name] = Features([row for batch in batches for row in batch[name].vectors])
        else:
            fields = zip(*(vars(batch[name]).values() for batch in batches), strict=True)
            joined[name] = Predictions(*map(torch.cat, fields))
    return joined


def count_images(outputs: Outputs) -> int:
    """Return the number of images."""
    return len(next(iter(outputs.values())))


# Labels -------------------------------------------------------------------------------------------


def predict_labels(logits: torch.Tensor, config: ViTCLSConfig) -> torch.Tensor:
    """Return the predicted labels (`Predictions.predicted`) for the logits [B, labels] of a task.

    A multi-label model predicts each label whose probability is at least DEFAULT_THRESHOLD.
    """
    if is_multi_label(config):
        return (logits.float().sigmoid() >= DEFAULT_THRESHOLD).long()
    return logits.argmax(dim=-1, keepdim=True)
