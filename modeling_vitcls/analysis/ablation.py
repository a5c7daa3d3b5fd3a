"""Effects of special tokens: how outputs change if a token is hidden from attention.

    ablations = compute_ablations(model, TokenUse(model.config), batches)
    ablations["register 1"][""]    the `Effect` on the output "" (token_use.py)

No token attends to a hidden one, as if its gate were 0. For tokens that were added behind gates, that is
the model before; a mean state in the token's place would keep what acts as a constant.

An effect alone is not meaningful, because a random token is attended to as well. The effect of each
token that no head reads is therefore compared with one null distribution: the effects of hiding a
redrawn token, whose embedding is replaced with a random vector of the same norm. Effects, null
distributions and decisions use the same images.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..frozen.targets import Target
from ..inference.image_pass import ImageBatch, pass_over_images
from ..inference.intervals import (
    Interval,
    compute_bootstrap_interval,
    compute_prediction_limit,
)
from ..inference.token_names import SINGLE_TOKEN_NAMES
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.heads_vitcls import IGNORED_LABEL
from ..model.token_layout_vitcls import TokenLayout
from .token_use import TokenUse


# Batches with labels or None. Labels are [B, A] with the columns of all tasks, or [B] if A is 1.
# Each iteration yields the same batches.
Batches = Iterable[ImageBatch]
# (items, description) -> items, with a progress bar
Watch = Callable[[Collection[Any], str], Iterable[Any]]
# Name of a task -> logits [labels] of each image; or, of an encoder, name of a kind of features ->
# vectors [n, D] of each image, because images of other sizes have other numbers of patches
Outputs = dict[str, list[Tensor]]

MIN_IMAGES = 16  # With fewer images, no effect is judged
# Maximum number of images, and of floating-point operations in a pass over these images; MIN_IMAGES
# images are always used
MAX_IMAGES = 256
MAX_FLOPS = 2.5e11
MIN_CHANGE = 1e-3  # Smaller effects are rounding errors
# Minimum standard deviation of the logits over images, as a fraction of their root mean square
MIN_RELATIVE_DEVIATION = 1e-3
NUM_NULL_DRAWS = 8  # Random tokens per null distribution
NULL_LEVEL = 0.995  # 1 of 200 random tokens has an effect beyond the limit


@dataclass(frozen=True)
class Effect:
    """Effect of hiding a token on one output, with 95% confidence intervals.

    Attributes:
        size: for predictions, the root mean square change of the logits, divided by the standard
            deviation of the logits over images. For features, the mean of 1 minus the cosine
            similarity.
        interval: interval for `size`, from bootstrap samples of the images.
        num_images: number of images.
        changed: fraction of images whose prediction changes; None for features.
        accuracies: of the model, and of the model without the token; None without labels.
        drop: interval for the decrease in accuracy; None without labels.
        null_sizes: sizes of the effects of hiding redrawn tokens; empty if a head reads the token,
            because then every redrawn token has an effect.
    """

    size: float
    interval: Interval
    num_images: int
    changed: float | None = None
    accuracies: tuple[float, float] | None = None
    drop: Interval | None = None
    null_sizes: tuple[float, ...] = ()

    @property
    def limit(self) -> float | None:
        """Upper bound of the prediction interval of the null distribution at NULL_LEVEL.

        It accounts for rare large effects. None without a null distribution.
        """
        if not self.null_sizes:
            return None
        return max(compute_prediction_limit(self.null_sizes, NULL_LEVEL), MIN_CHANGE)

    @property
    def comparison(self) -> str:
        """How the effect compares with a random token's, for the table."""
        if self.num_images < MIN_IMAGES:
            return f"under {MIN_IMAGES} images"
        if self.drop is not None and self.drop[0] > 0:
            return "costs accuracy"
        # Features change if the effect is above rounding errors, predictions if any of them changes.
        low = self.interval[0] if self.changed is None else self.size
        if low <= MIN_CHANGE or self.changed == 0:
            return "no change"
        if self.limit is None:
            return "read by a head"
        return "more" if self.size > self.limit else "no more"


# Name of a token or a group -> name of an output -> effect
Ablations = dict[str, dict[str, Effect]]


def compute_ablations(
    model: Any,
    use: TokenUse,
    batches: Sequence[ImageBatch],
    watch: Watch = lambda items, description: items,
) -> Ablations:
    """Measure the effects of each special token and of each group of several tokens.

    The effects of tokens that no head reads have null distributions.

    Args:
        model: a classifier or an encoder, in evaluation mode.
        use: the tokens that the outputs of the model read.
        batches: batches of images and labels, in random order. Up to 9 passes per token are made
            over the first ones: as many as `take_batches` says.
        watch: function that returns the same items and shows the progress.
    """
    targets = {name: [index] for index, name in enumerate(use.names)}
    for group, indices in use.groups.items():
        if len(indices) > 1:
            targets[name_group(group)] = indices
    # A generator of its own, so the same tokens are redrawn at every call.
    generator = torch.Generator().manual_seed(0)
    ablations: Ablations = {}
    batches = take_batches(model, batches)
    before = gather_outputs(model, batches)
    labels = collect_labels(batches, use.config)
    hidden: dict[str, Outputs] = {}
    for name, indices in watch(targets.items(), "hiding tokens"):
        hidden[name] = gather_outputs(model, batches, partial(run_without, model, indices))
        ablations[name] = {
            output: compute_effect(rows, hidden[name][output], use.target, labels.get(output))
            for output, rows in before.items()
        }

    for names, draws in watch(list(plan_redraws(use)), "hiding random tokens"):
        sizes: dict[str, list[float]] = {}  # Output -> null distribution
        for name in draws:
            # A hidden token changes nothing, so without it, the model with a redrawn one is the same.
            with redraw_tokens(model, targets[name], generator):
                redrawn = gather_outputs(model, batches)
            for output, rows in redrawn.items():
                sizes.setdefault(output, []).append(compute_size(rows, hidden[name][output]))

        for output, null_sizes in sizes.items():
            for name in names:
                ablations[name][output] = replace(
                    ablations[name][output], null_sizes=tuple(null_sizes)
                )
    return ablations


def take_batches(model: Any, batches: Sequence[ImageBatch]) -> Sequence[ImageBatch]:
    """Take as many of the batches as effects can be measured on: fewer for a large model."""
    first: Any = batches[0].pixel_values  # [B, C, H, W]
    grid_size = model.config.get_grid_size(first.shape[-2:])
    num_tokens = model.config.token_layout.get_num_tokens(*grid_size)
    num_affordable = max(MAX_FLOPS / (2 * model.num_parameters() * num_tokens), MIN_IMAGES)
    return batches[: math.ceil(min(num_affordable, MAX_IMAGES) / len(first))]


def plan_redraws(use: TokenUse) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the names that share a null distribution, and the token that each draw redraws.

    The draws cycle through the tokens of a group. Tokens that a head reads are not redrawn.
    """
    for group, indices in use.groups.items():
        unread = [use.names[index] for index in indices if index not in use.read_tokens]
        if unread:
            yield unread, list(islice(cycle(unread), NUM_NULL_DRAWS))
        if len(unread) == len(indices) > 1:
            yield [name_group(group)], [name_group(group)] * NUM_NULL_DRAWS


def name_group(group: str) -> str:
    """Name all tokens of a group, as in the table of effects."""
    return f"all {SINGLE_TOKEN_NAMES[group]} tokens"


# Effects ------------------------------------------------------------------------------------------


def compute_effect(
    before: list[Tensor],
    after: list[Tensor],
    target: Target,
    labels: Tensor | None = None,
) -> Effect:
    """Compare one output of all images before and after an ablation.

    `labels` have the shape of the predictions; IGNORED_LABEL is unknown.
    """
    changes = measure_changes(before, after)
    low, high = compute_bootstrap_interval(changes.tolist())
    size = compute_size(before, after)
    if has_vectors(before):
        return Effect(size, (low, high), len(before))

    predicted, new = (predict_labels(rows, target) for rows in (before, after))
    effect = Effect(
        size=size,
        interval=(low**0.5, high**0.5),
        num_images=len(before),
        changed=(predicted != new).any(dim=1).float().mean().item(),
    )
    if labels is None or not len(known := (labels != IGNORED_LABEL).all(dim=1).nonzero()[:, 0]):
        return effect
    was_right, is_right = ((each == labels).all(dim=1)[known].float() for each in (predicted, new))
    return replace(
        effect,
        accuracies=(was_right.mean().item(), is_right.mean().item()),
        drop=compute_bootstrap_interval((was_right - is_right).tolist()),
    )


def compute_size(before: list[Tensor], after: list[Tensor]) -> float:
    """Average the changes over images, as in `Effect.size`."""
    mean = measure_changes(before, after).mean().item()
    return mean if has_vectors(before) else math.sqrt(mean)


def measure_changes(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Measure the change [images] of an output.

    For logits, it is the squared change in units of their variance over images; for features, 1
    minus the cosine similarity.
    """
    if has_vectors(before):
        pairs = zip(before, after, strict=True)
        return 1 - torch.stack(
            [nn.functional.cosine_similarity(*pair, dim=-1).mean() for pair in pairs]
        ).clamp(max=1)

    logits = torch.stack(before)  # [images, labels]
    root_mean_square = logits.square().mean().sqrt()
    # In units of their spread over images, because a model with large logits has large changes. If
    # they hardly vary, the unit has a minimum, or rounding errors would look like large effects.
    variances = (logits - logits.mean(dim=0)).square().mean(dim=1)  # [images]
    scale = (
        variances.mean()
        .sqrt()
        .clamp(min=MIN_RELATIVE_DEVIATION * root_mean_square)
        .clamp(min=1e-12)
    )
    return (torch.stack(after) - logits).square().mean(dim=1) / scale.square()


# Tokens -------------------------------------------------------------------------------------------


def run_without(model: Any, indices: Sequence[int], pixel_values: Tensor) -> Any:
    """Run a model on images [B, C, H, W]; no token attends to the special tokens `indices`."""
    config = model.config
    grid_size = config.get_grid_size(pixel_values.shape[-2:])
    num_tokens = config.token_layout.get_num_tokens(*grid_size)
    mask = torch.ones(len(pixel_values), num_tokens, dtype=torch.long, device=pixel_values.device)
    mask[:, list(indices)] = 0
    return model(pixel_values, attention_mask=mask)


def redraw_tokens(
    model: Any, indices: Sequence[int], generator: torch.Generator
) -> torch.utils.hooks.RemovableHandle:
    """Replace the embeddings of some tokens with random vectors of the same norms.

    A `with` block of the returned handle restores them at its end.
    """
    # [n, D]
    directions = nn.functional.normalize(
        torch.randn(len(indices), model.config.hidden_size, generator=generator)
    )

    def redraw(module: nn.Module, args: tuple, hidden_states: Tensor) -> Tensor:
        new_states = hidden_states.clone()  # [B, N, D]
        norms = new_states[:, list(indices)].norm(dim=-1, keepdim=True)
        new_states[:, list(indices)] = norms * directions.to(new_states)
        return new_states

    embeddings: nn.Module = model.base_model.embeddings
    return embeddings.register_forward_hook(redraw)


# Outputs ------------------------------------------------------------------------------------------


def measure_states(
    model: Any, use: TokenUse, batches: Sequence[ImageBatch], watch: Watch
) -> tuple[Outputs, dict[int, Tensor], list[Tensor]]:
    """Run the model on all images once.

    Returns:
        The outputs of all images; the states [images, S, D] of the special tokens after the layers in
        which one of them is used for the last time; and the norms [B, P] of the patches of each batch
        after the last layer that uses them.

    Raises:
        ValueError: if the states are not finite.
    """
    layout = use.config.token_layout
    *used_layers, patch_layer = use.num_layers
    parts: dict[int, list[Tensor]] = {layer: [] for layer in used_layers}
    patch_norms = []

    def run(pixel_values: Tensor) -> Any:
        outputs = model(pixel_values, output_hidden_states=True)
        for layer, states in parts.items():
            special = outputs.hidden_states[layer][:, : layout.num_prefix_tokens]
            states.append(special.float().cpu())
        if not all(state.isfinite().all() for state in outputs.hidden_states):
            raise ValueError(
                "The hidden states of the model are not finite. Check the weights, or load them in "
                "float32."
            )
        patches = outputs.hidden_states[patch_layer][:, layout.patches]
        patch_norms.append(patches.float().norm(dim=-1).cpu())
        return outputs

    outputs = gather_outputs(model, watch(batches, "measuring tokens"), run)
    return outputs, {layer: torch.cat(states) for layer, states in parts.items()}, patch_norms


def gather_outputs(
    model: Any, batches: Batches, run: Callable[[Tensor], Any] | None = None
) -> Outputs:
    """Collect the outputs for all images, on the CPU.

    Args:
        model: a classifier or an encoder, in evaluation mode.
        batches: batches of images.
        run: function from images [B, C, H, W] to the output of the model. Default: the model.
    """
    collected: Outputs = {}
    for _, outputs in pass_over_images(run or model, batches, model.device):
        for name, rows in select_outputs(outputs, model.config.token_layout).items():
            collected.setdefault(name, []).extend(rows.float().cpu())
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


def has_vectors(rows: list[Tensor]) -> bool:
    """Whether an output is features, with several vectors per image, and not logits."""
    return rows[0].ndim == 2


# Labels -------------------------------------------------------------------------------------------


def predict_labels(rows: list[Tensor], target: Target) -> Tensor:
    """Predict the class [images, 1] from the logits [labels] of each image.

    With several labels per image, the prediction is a mask [images, labels].
    """
    answers = torch.from_numpy(target.predict(torch.stack(rows).numpy()))
    return answers.view(len(rows), -1)


def collect_labels(batches: Batches, config: ViTCLSConfig) -> dict[str, Tensor]:
    """Collect the labels of each task, in the shape of its predictions; empty without labels.

    Unknown labels are IGNORED_LABEL.
    """
    parts = [
        batch.labels.view(len(batch.labels), -1) for batch in batches if batch.labels is not None
    ]
    if not parts:
        return {}
    labels = torch.cat(parts)  # [images, columns]
    if not config.tasks:
        return {"": labels}
    return dict(zip(config.task_labels(), labels.split(1, dim=1), strict=True))
