"""Ablations: the change in outputs if the information or the presence of special tokens is removed.

    information   the states of the tokens are replaced by their means over images, after the embeddings and each
                  layer, so that the states are the same for every image. Removing tokens or setting them to zero would
                  instead produce inputs that the model was never trained on.
    presence      the tokens are hidden by the attention mask, so that no token attends to them.

    ablations = compute_ablations(model, batches, findings.mean_states)
    ablations["information"]["registers[0]"].effect        the effect, with a 95 % interval (effects.py)
    ablations["information"]["registers"].is_beyond_null   whether the effect of all registers exceeds the null

An effect alone is not meaningful, because ablating any patch also changes predictions. Each effect is therefore
compared with two null distributions on the same images: the effect of random patches, and the effect of the same token
after it was redrawn at random with the same norm.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import stats
from torch import nn

from ..configuration_vitcls import TokenLayout
from .effects import CONFIDENCE, AblationEffect, Interval, compute_effect
from .maps import get_read_tokens
from .model_outputs import Batches, Predictions, collect_outputs, collect_predictions, join_outputs, read_outputs
from .model_utils import evaluation_mode, get_runner, is_classifier, unwrap_model


KINDS = ("information", "presence")
MIN_NULL_LIMIT = 1e-3  # lower bound on the limit of a null distribution; smaller effects are rounding errors
NUM_NULL = 8  # number of random draws of patches, and of tokens, in a null distribution


@dataclass(frozen=True)
class Ablation:
    """The effect of ablating one token or a group of tokens, and its null distributions.

    Attributes:
        effect: the effect over all images.
        compared: size of the effect on the images of the null distributions, which may be a subset of all images.
        patches: sizes of the effect of ablating the same number of random patches.
        redrawn: sizes of the effect of ablating the tokens after they were redrawn at random with the same norm. Empty
            for tokens that the head reads, because each of these tokens has an effect.
        redraw_effect: mean size of the effect of redrawing the tokens; None if not measured.
    """

    effect: Any
    compared: float
    patches: list[float] = field(default_factory=list)
    redrawn: list[float] = field(default_factory=list)
    redraw_effect: float | None = None

    @property
    def null(self) -> Interval | None:
        """Return the smallest null effect, and the limit that an effect beyond the null exceeds; None if the null
        distributions are not measured."""
        if not self.patches:
            return None
        limits = [compute_null_limit(values) for values in (self.patches, self.redrawn) if values]
        return min(self.patches + self.redrawn), max(limits)

    @property
    def is_beyond_null(self) -> bool:
        """Return whether outputs change, and by more than the limits of both null distributions."""
        null = self.null
        return null is not None and self.effect.changes_outputs and self.compared > null[1]


Ablations = dict[str, dict[str, Ablation]]  # kind -> key of a token or name of a group -> ablation


def compute_null_limit(values: Sequence[float]) -> float:
    """Return the limit of a null distribution: its maximum, or the upper end of its 95 % prediction interval if this
    is larger (normal distribution, unknown variance), since few random draws miss rare large values."""
    num_values = len(values)
    limit = max(*values, MIN_NULL_LIMIT)
    if num_values < 2:
        return limit
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, num_values - 1))
    return max(limit, statistics.fmean(values) + quantile * statistics.stdev(values) * math.sqrt(1 + 1 / num_values))


def compute_ablations(
    model: Any,
    batches: Batches,
    mean_states: torch.Tensor,
    before: Any = None,
    sample: tuple[Batches, Sequence[int]] | None = None,
    known_outputs: dict[str, Any] | None = None,
) -> Ablations:
    """Return the ablations of each special token and of each group of several tokens, with their null distributions.

    Args:
        model: any ViTCLS model.
        batches: callable that returns an iterable over batches of images and labels.
        mean_states: [L + 1, S, D], mean states of the embeddings and after each layer (`Findings.mean_states`).
        before: `collect_outputs(model, batches)`, if already computed.
        sample: batches of images for the null distributions, and the indices of these images. Default: all images.
        known_outputs: already computed outputs with hidden tokens, by key of the token or name of the group.

    Raises:
        ValueError: if there are no images, or labels have the wrong shape.
    """
    model = unwrap_model(model)
    before = collect_outputs(model, batches) if before is None else before
    sample_batches, sampled_indices = sample or (batches, range(len(before)))
    parts = get_ablated_parts(model.config.token_layout)
    ablations: Ablations = {kind: {} for kind in KINDS}
    if not parts:
        return ablations
    generator, sampled_before = torch.Generator().manual_seed(0), before.select(sampled_indices)
    # Effect, and size of the effect on the sample. Outputs for all images are in memory for one part at a time.
    effects: dict[str, dict[str, tuple[Any, float]]] = {kind: {} for kind in KINDS}
    hidden_outputs = {}  # sequence indices of hidden tokens -> outputs for the sample
    for key, indices in parts.items():
        with replace_by_means(model, indices, mean_states[:, indices]):
            after = collect_constant_outputs(model, batches, before, indices) or collect_outputs(model, batches)
        sampled_after = after.select(sampled_indices)
        effects["information"][key] = compute_effect(before, after), compute_effect(sampled_before, sampled_after).size
        after = (known_outputs or {}).get(key) or collect_outputs(model, batches, indices)
        hidden_outputs[tuple(indices)] = sampled_after = after.select(sampled_indices)
        effects["presence"][key] = compute_effect(before, after), compute_effect(sampled_before, sampled_after).size
    sizes = {len(indices) for indices in parts.values()}
    patch_effects = measure_patch_effects(model, sample_batches, sampled_before, sizes, generator)
    redraw_effects = measure_redraw_effects(model, sample_batches, sampled_before, hidden_outputs, generator)
    for kind, by_key in effects.items():
        for key, (effect, sampled_size) in by_key.items():
            redraw_effect, redrawn = redraw_effects[key]
            ablations[kind][key] = Ablation(
                effect=effect,
                compared=sampled_size,
                patches=patch_effects[kind, len(parts[key])],
                redrawn=redrawn[kind],
                redraw_effect=redraw_effect,
            )
    return ablations


def compute_ablation_effects(
    model: Any, batches: Batches, mean_states: torch.Tensor, before: Predictions | None = None
) -> dict[str, AblationEffect]:
    """Return the effect of replacing each special token by its mean, with keys such as `cls[0]`, without null
    distributions (`compute_ablations`).

    Args:
        model: a classifier.
        batches: callable that returns an iterable over batches of images and labels.
        mean_states: [L + 1, S, D], mean states of the embeddings and after each layer (`Findings.mean_states`).
        before: `collect_predictions(model, batches)`, if already computed.

    Raises:
        ValueError: if the model has no classifier, there are no images, or labels have the wrong shape.
    """
    model = unwrap_model(model)
    before = collect_predictions(model, batches) if before is None else before
    effects = {}
    for index, key in enumerate(get_token_keys(model.config.token_layout)):
        with replace_by_means(model, [index], mean_states[:, [index]]):
            effects[key] = compute_effect(before, collect_predictions(model, batches))
    return effects


def collect_constant_outputs(model: Any, batches: Batches, before: Any, indices: Sequence[int]) -> Predictions | None:
    """Return the predictions for all images, or None if the classifier also reads other tokens than those at these
    sequence indices, which are replaced by their means. The output is then the same for every image, so one forward
    pass is sufficient."""
    read_indices = {index for index, is_read in enumerate(get_read_tokens(model.config)) if is_read}
    if not isinstance(before, Predictions) or not read_indices <= set(indices):
        return None
    first_image = next(iter(batches()))[0][:1]
    single_outputs = collect_outputs(model, lambda: [(first_image, None)])
    return Predictions(
        single_outputs.logits.expand_as(before.logits),
        single_outputs.predicted.expand_as(before.predicted),
        before.labels,
    )


# Null distributions --------------------------------------------------------------------------------------------------


def measure_patch_effects(
    model: Any, batches: Batches, before: Any, sizes: set[int], generator: torch.Generator
) -> dict[tuple[str, int], list[float]]:
    """Return the sizes of the effects of ablating random patches, by kind and number of patches."""
    layout: TokenLayout = model.config.token_layout
    get_grid_size = model.base_model.embeddings.patch_embeddings.get_grid_size
    num_tokens = min(layout.get_num_tokens(*get_grid_size(pixel_values)) for pixel_values, _ in batches())
    patches = torch.arange(num_tokens)[layout.patches]  # sequence indices of patches that all images have
    sets_by_size = {size: draw_patches(patches, size, generator) for size in sorted(sizes)}
    used_indices = sorted({index for sets in sets_by_size.values() for indices in sets for index in indices})
    means, _ = collect_mean_states(model, batches, used_indices)
    return {
        (kind, size): [
            compute_effect(before, ablate(kind, model, batches, indices, means[:, positions])).size
            for indices in sets
            for positions in [[used_indices.index(index) for index in indices]]
        ]
        for size, sets in sets_by_size.items()
        for kind in KINDS
    }


def draw_patches(patches: torch.Tensor, size: int, generator: torch.Generator) -> list[list[int]]:
    """Return NUM_NULL random sets of `size` of the n patches; single patches are not repeated (at most n sets)."""
    if size == 1:
        return patches[torch.randperm(len(patches), generator=generator)[:NUM_NULL]].unsqueeze(1).tolist()
    orders = [torch.randperm(len(patches), generator=generator) for _ in range(NUM_NULL)]
    return [sorted(patches[order[:size]].tolist()) for order in orders]


def measure_redraw_effects(
    model: Any,
    batches: Batches,
    before: Any,
    hidden_outputs: dict[tuple[int, ...], Any],
    generator: torch.Generator,
) -> dict[str, tuple[float, dict[str, list[float]]]]:
    """Return two values by key of a token or name of a group: the mean size of the effect of redrawing the tokens, and
    the sizes of the effects of ablating the redrawn tokens, by kind. Tokens of a group share a null distribution.

    `hidden_outputs` are the outputs with the tokens at these sequence indices hidden from attention. The outputs are
    the same for redrawn tokens, because neither other tokens nor the head read the hidden tokens.
    """
    effects: dict[str, tuple[float, dict[str, list[float]]]] = {}
    for keys, sets, has_null in plan_redraws(model):
        sizes: dict[str, list[float]] = {kind: [] for kind in KINDS}
        changes = []
        for indices in sets:
            with redraw_tokens(model, indices, generator):
                means, redrawn = collect_mean_states(model, batches, indices)
                changes.append(compute_effect(before, redrawn).size)
                if has_null:
                    ablated_outputs = ablate("information", model, batches, indices, means)
                    sizes["information"].append(compute_effect(redrawn, ablated_outputs).size)
                    sizes["presence"].append(compute_effect(redrawn, hidden_outputs[tuple(indices)]).size)
        effects |= dict.fromkeys(keys, (sum(changes) / len(changes), sizes))
    return effects


def plan_redraws(model: Any) -> Iterator[tuple[list[str], list[list[int]], bool]]:
    """Yield the keys that share a null distribution, the sequence indices of each draw, and whether to measure the
    effects of redrawn tokens. Each draw replaces one token of a group, in turn, or all tokens of the group.

    These effects are not measured for tokens that the head reads, because all of these tokens have an effect.
    """
    layout = model.config.token_layout
    keys, reads = get_token_keys(layout), get_read_tokens(model.config, is_classifier(model))
    for group, members in get_groups(layout).items():
        by_read = {is_read: [index for index in members if reads[index] == is_read] for is_read in (False, True)}
        ablations = [([keys[index] for index in tokens], [[index] for index in tokens]) for tokens in by_read.values()]
        if len(members) > 1:
            ablations.append(([group], [members]))
        for names, choices in ablations:
            if choices:
                has_null = not any(reads[index] for index in choices[0])
                num_draws = NUM_NULL if has_null else NUM_NULL // 2
                yield names, [choices[draw % len(choices)] for draw in range(num_draws)], has_null


def count_null_passes(model: Any) -> int:
    """Return the maximum number of passes over the images of the null distributions. The first pass only determines
    the number of tokens."""
    sizes = {len(indices) for indices in get_ablated_parts(model.config.token_layout).values()}
    num_redraws = sum(len(sets) * (2 if has_null else 1) for _, sets, has_null in plan_redraws(model))
    return 2 + 2 * NUM_NULL * len(sizes) + num_redraws if sizes else 0


# Tokens --------------------------------------------------------------------------------------------------------------


def get_groups(layout: TokenLayout) -> dict[str, list[int]]:
    """Return the sequence indices of the special tokens by group; groups without tokens are omitted."""
    special_indices = range(layout.num_prefix_tokens)
    return {name: list(special_indices[group]) for name, group in layout.items() if special_indices[group]}


def get_token_keys(layout: TokenLayout) -> list[str]:
    """Return the keys of the special tokens as in metrics.jsonl (`cls[0]`, `registers[1]`), in sequence order."""
    return [f"{group}[{index}]" for group, members in get_groups(layout).items() for index in range(len(members))]


def get_ablated_parts(layout: TokenLayout) -> dict[str, list[int]]:
    """Return the sequence indices of each token by key, and of each group of several tokens by name."""
    parts = {key: [index] for index, key in enumerate(get_token_keys(layout))}
    return parts | {name: members for name, members in get_groups(layout).items() if len(members) > 1}


@torch.no_grad()
def collect_mean_states(model: Any, batches: Batches, indices: Sequence[int]) -> tuple[torch.Tensor, Any]:
    """Return the mean states [L + 1, n, D] of the tokens at these sequence indices, in double precision, and the
    outputs of the same forward passes."""
    batch_outputs, sums, runner = [], [], get_runner(model)
    with evaluation_mode(model):
        for pixel_values, labels in batches():
            outputs = runner(pixel_values, output_hidden_states=True)
            states = torch.stack([state[:, list(indices)] for state in outputs.hidden_states], dim=1)
            sums.append(states.cpu().double().sum(dim=0))
            batch_outputs.append(read_outputs(model, outputs, labels))
    joined_outputs = join_outputs(batch_outputs)
    return torch.stack(sums).sum(dim=0) / len(joined_outputs), joined_outputs


def ablate(kind: str, model: Any, batches: Batches, indices: list[int], mean_states: torch.Tensor) -> Any:
    """Return the outputs with the tokens at these sequence indices replaced by their mean states [L + 1, n, D]
    ("information") or hidden from attention ("presence")."""
    if kind == "presence":
        return collect_outputs(model, batches, indices)
    with replace_by_means(model, indices, mean_states):
        return collect_outputs(model, batches)


@contextmanager
def replace_by_means(model: Any, indices: Sequence[int], mean_states: torch.Tensor) -> Iterator[None]:
    """Replace the states of the tokens at these sequence indices by `mean_states` [L + 1, n, D], after the embeddings
    and after each layer. The last layer is included only if the head reads one of the tokens."""
    encoder, reads = model.base_model, get_read_tokens(model.config, is_classifier(model))
    modules = [encoder.embeddings, *encoder.layers]
    if not any(reads[min(index, len(reads) - 1)] for index in indices):
        modules.pop()  # a hook on the last layer would make it compute all tokens
    with ExitStack() as hooks:
        hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code does not call hooks
        for module, means in zip(modules, mean_states, strict=False):
            hooks.enter_context(replace_tokens(module, indices, means))
        yield


@contextmanager
def redraw_tokens(model: Any, indices: Sequence[int], generator: torch.Generator) -> Iterator[None]:
    """Replace the embeddings of the tokens at these sequence indices by random directions with the same norms."""
    directions = nn.functional.normalize(torch.randn(len(indices), model.config.hidden_size, generator=generator))

    def redraw(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.norm(dim=-1, keepdim=True) * directions.to(tokens)

    with torch.compiler.set_stance("force_eager"), replace_tokens(model.base_model.embeddings, indices, redraw):
        yield


def replace_tokens(
    module: nn.Module, indices: Sequence[int], new_tokens: torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
) -> torch.utils.hooks.RemovableHandle:
    """Replace the tokens [B, n, D] at these sequence indices in the output of a module, until the handle is removed.
    The new tokens are [n, D] or [B, n, D], or computed from the old tokens."""

    def hook(module: nn.Module, args: tuple, hidden_states: torch.Tensor) -> torch.Tensor:
        new_states = hidden_states.clone()  # [B, N, D]
        new = new_tokens(new_states[:, list(indices)]) if callable(new_tokens) else new_tokens
        new_states[:, list(indices)] = new.to(hidden_states)
        return new_states

    return module.register_forward_hook(hook)
