"""Ablations: how outputs change if special tokens are replaced with their means or hidden from attention.

    information   the states of the tokens are replaced with their means over images, after the embeddings and each
                  layer, so that the states are the same for every image. Removing tokens or setting them to zero would
                  instead produce inputs that the model was never trained on.
    presence      the tokens are hidden by the attention mask, so that no token attends to them.

    ablations = compute_ablations(model, batches, findings.mean_states)
    ablations["information"]["registers[0]"].effect        the effect, with a 95% interval (effects.py)
    ablations["information"]["registers"].is_beyond_null   whether the effect of all registers exceeds the limits
                                                           of its null distributions

An effect alone is not meaningful, because ablating any patch also changes the outputs. Each effect is therefore
compared with null distributions on the same images: effects of ablating random patches and, unless the head uses the
token, effects of ablating a redrawn token, whose embedding is replaced with a random vector of the same norm.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..configuration_vitcls import TokenLayout
from ..intervals import CONFIDENCE_LEVEL, Interval, compute_prediction_limit
from .effects import AblationEffect, compute_effect
from .maps import get_used_token_mask
from .model_outputs import (
    Batches,
    Predictions,
    collect_outputs,
    collect_predictions,
    count_tokens,
    extract_outputs,
    join_outputs,
)
from .model_utils import evaluation_mode, get_classifier_or_encoder, is_classifier, unwrap_model


ABLATION_KINDS = ("information", "presence")
# Lower bound on the limit of a null distribution; smaller effects are treated as rounding errors.
MIN_NULL_LIMIT = 1e-3
NUM_NULL_DRAWS = 8  # number of random draws of patches or tokens per null distribution


@dataclass(frozen=True)
class Ablation:
    """Effect of ablating a token or a group of tokens, with null distributions.

    Attributes:
        effect: effect over all images.
        effect_on_null_images: effect size on the images that the null distributions use (all or a subset).
        patch_effects: effect sizes of ablating the same number of random patches.
        redrawn_effects: effect sizes of ablating redrawn tokens. The list is empty for tokens that the head uses,
            because ablating these tokens always has an effect.
        redraw_effect: mean effect size of redrawing the tokens; None if the effect was not measured.
    """

    effect: Any
    effect_on_null_images: float
    patch_effects: list[float] = field(default_factory=list)
    redrawn_effects: list[float] = field(default_factory=list)
    redraw_effect: float | None = None

    @property
    def null_interval(self) -> Interval | None:
        """Return the smallest effect and the largest limit of the null distributions, or None if the distributions
        were not measured."""
        if not self.patch_effects:
            return None
        limits = [compute_null_limit(sizes) for sizes in (self.patch_effects, self.redrawn_effects) if sizes]
        return min(self.patch_effects + self.redrawn_effects), max(limits)

    @property
    def is_beyond_null(self) -> bool:
        """Return whether outputs change and the effect exceeds the limits of its null distributions."""
        interval = self.null_interval
        return interval is not None and self.effect.has_changed_outputs and self.effect_on_null_images > interval[1]


Ablations = dict[str, dict[str, Ablation]]  # kind -> token key or group name -> ablation


def compute_null_limit(effect_sizes: Sequence[float]) -> float:
    """Return the limit of a null distribution: the maximum of MIN_NULL_LIMIT, all effect sizes, and the upper bound of
    the 95% prediction interval (normal distribution with unknown variance). The interval accounts for rare large
    effects that a few random draws may miss."""
    return max(compute_prediction_limit(effect_sizes, (1 + CONFIDENCE_LEVEL) / 2), MIN_NULL_LIMIT)


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
        mean_states: [L + 1, S, D], mean states after the embeddings and after each layer (`Findings.mean_states`).
        before: outputs without ablation (`collect_outputs(model, batches)`), if already computed.
        sample: batches of images for the null distributions, and the indices of these images. Default: all images.
        known_outputs: dict that maps token keys or group names to outputs with these tokens hidden, if already
            computed.

    Raises:
        ValueError: if there are no images, or labels have the wrong shape.
    """
    model = unwrap_model(model)
    before = collect_outputs(model, batches) if before is None else before
    sample_batches, sampled_indices = sample or (batches, range(len(before)))
    targets = get_ablation_targets(model.config.token_layout)
    ablations: Ablations = {kind: {} for kind in ABLATION_KINDS}
    if not targets:
        return ablations
    generator, sampled_before = torch.Generator().manual_seed(0), before.select(sampled_indices)
    # Effect on all images, and effect size on the sample. Only the outputs of one ablation are kept in memory.
    effects: dict[str, dict[str, tuple[Any, float]]] = {kind: {} for kind in ABLATION_KINDS}
    outputs_without_tokens = {}  # sequence indices of hidden tokens -> outputs for the sample
    for key, indices in targets.items():
        with replace_by_means(model, indices, mean_states[:, indices]):
            after = collect_constant_outputs(model, batches, before, indices) or collect_outputs(model, batches)
        sampled_size = compute_effect(sampled_before, after.select(sampled_indices)).size
        effects["information"][key] = compute_effect(before, after), sampled_size
        after = (known_outputs or {}).get(key) or collect_outputs(model, batches, indices)
        outputs_without_tokens[tuple(indices)] = sampled_after = after.select(sampled_indices)
        effects["presence"][key] = compute_effect(before, after), compute_effect(sampled_before, sampled_after).size
    set_sizes = {len(indices) for indices in targets.values()}
    patch_effects = measure_patch_effects(model, sample_batches, sampled_before, set_sizes, generator)
    redraw_effects = measure_redraw_effects(model, sample_batches, sampled_before, outputs_without_tokens, generator)
    for kind, effects_by_key in effects.items():
        for key, (effect, effect_on_null_images) in effects_by_key.items():
            redraw_effect, redrawn_effects = redraw_effects[key]
            ablations[kind][key] = Ablation(
                effect=effect,
                effect_on_null_images=effect_on_null_images,
                patch_effects=patch_effects[kind, len(targets[key])],
                redrawn_effects=redrawn_effects[kind],
                redraw_effect=redraw_effect,
            )
    return ablations


def compute_ablation_effects(
    model: Any, batches: Batches, mean_states: torch.Tensor, before: Predictions | None = None
) -> dict[str, AblationEffect]:
    """Return a dict that maps token keys such as `cls[0]` to the effect of replacing the token with its mean. Null
    distributions are not measured (use `compute_ablations`).

    Args:
        model: a classifier.
        batches: callable that returns an iterable over batches of images and labels.
        mean_states: [L + 1, S, D], mean states after the embeddings and after each layer (`Findings.mean_states`).
        before: predictions without ablation (`collect_predictions(model, batches)`), if already computed.

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
    """Return the predictions for all images if the classifier uses only the replaced tokens at `indices`, and None
    otherwise. The replaced tokens, and thus the predictions, are the same for every image."""
    used_indices = {index for index, is_used in enumerate(get_used_token_mask(model.config)) if is_used}
    if not isinstance(before, Predictions) or not used_indices <= set(indices):
        return None
    first_image = next(iter(batches()))[0][:1]
    outputs = collect_outputs(model, lambda: [(first_image, None)])
    logits, predicted = outputs.logits.expand_as(before.logits), outputs.predicted.expand_as(before.predicted)
    return Predictions(logits, predicted, before.labels)


# Null distributions --------------------------------------------------------------------------------------------------


def measure_patch_effects(
    model: Any, batches: Batches, before: Any, set_sizes: set[int], generator: torch.Generator
) -> dict[tuple[str, int], list[float]]:
    """Return a dict that maps (kind of ablation, number of patches) to the effect sizes of ablating random patches."""
    min_tokens = min(count_tokens(model, pixel_values) for pixel_values, _ in batches())
    # Sequence indices of the patches that all images have.
    patch_indices = torch.arange(min_tokens)[model.config.token_layout.patches]
    sets_by_size = {size: sample_patch_sets(patch_indices, size, generator) for size in sorted(set_sizes)}
    sampled_indices = sorted({index for sets in sets_by_size.values() for indices in sets for index in indices})
    means, _ = collect_mean_states(model, batches, sampled_indices)
    return {
        (kind, size): [
            compute_effect(before, collect_ablated_outputs(kind, model, batches, indices, means[:, positions])).size
            for indices in sets
            for positions in [[sampled_indices.index(index) for index in indices]]
        ]
        for size, sets in sets_by_size.items()
        for kind in ABLATION_KINDS
    }


def sample_patch_sets(patch_indices: torch.Tensor, size: int, generator: torch.Generator) -> list[list[int]]:
    """Return NUM_NULL_DRAWS random sets of `size` patches, as sequence indices. Single patches are drawn without
    replacement, so there may be fewer sets if `size` is 1."""
    if size == 1:
        order = torch.randperm(len(patch_indices), generator=generator)
        return patch_indices[order[:NUM_NULL_DRAWS]].unsqueeze(1).tolist()
    orders = [torch.randperm(len(patch_indices), generator=generator) for _ in range(NUM_NULL_DRAWS)]
    return [sorted(patch_indices[order[:size]].tolist()) for order in orders]


def measure_redraw_effects(
    model: Any,
    batches: Batches,
    before: Any,
    outputs_without_tokens: dict[tuple[int, ...], Any],
    generator: torch.Generator,
) -> dict[str, tuple[float, dict[str, list[float]]]]:
    """Return a dict that maps token keys and group names to two values: the mean effect size of redrawing the tokens,
    and the effect sizes of ablating the redrawn tokens, by kind.

    `outputs_without_tokens` maps the sequence indices of tokens to the outputs with these tokens hidden from
    attention. If the head does not use these tokens, the same outputs are valid for the redrawn tokens.
    """
    effects: dict[str, tuple[float, dict[str, list[float]]]] = {}
    for keys, sets, has_null in plan_redraws(model):
        redrawn_effects: dict[str, list[float]] = {kind: [] for kind in ABLATION_KINDS}
        redraw_effects = []
        for indices in sets:
            with redraw_tokens(model, indices, generator):
                means, redrawn_outputs = collect_mean_states(model, batches, indices)
                redraw_effects.append(compute_effect(before, redrawn_outputs).size)
                if has_null:
                    ablated_outputs = {
                        "information": collect_ablated_outputs("information", model, batches, indices, means),
                        "presence": outputs_without_tokens[tuple(indices)],
                    }
                    for kind, outputs in ablated_outputs.items():
                        redrawn_effects[kind].append(compute_effect(redrawn_outputs, outputs).size)
        effects |= dict.fromkeys(keys, (sum(redraw_effects) / len(redraw_effects), redrawn_effects))
    return effects


def plan_redraws(model: Any) -> Iterator[tuple[list[str], list[list[int]], bool]]:
    """Yield the keys that share a null distribution, the sequence indices of each draw, and whether to ablate the
    redrawn tokens. Each draw replaces all tokens of a group, or one token; the draws cycle through the tokens."""
    layout = model.config.token_layout
    keys, is_used_by_head = get_token_keys(layout), get_used_token_mask(model.config, is_classifier(model))
    for group, members in get_group_indices(layout).items():
        candidates = []
        for is_used in (False, True):
            if indices := [index for index in members if is_used_by_head[index] == is_used]:
                candidates.append(([keys[index] for index in indices], [[index] for index in indices]))
        if len(members) > 1:
            candidates.append(([group], [members]))
        for shared_keys, sets in candidates:
            has_null = not any(is_used_by_head[index] for index in sets[0])  # see `Ablation.redrawn_effects`
            num_draws = NUM_NULL_DRAWS if has_null else NUM_NULL_DRAWS // 2
            yield shared_keys, [sets[draw % len(sets)] for draw in range(num_draws)], has_null


def count_null_passes(model: Any) -> int:
    """Return the maximum number of passes over the images for the null distributions. The first pass only determines
    the number of tokens."""
    set_sizes = {len(indices) for indices in get_ablation_targets(model.config.token_layout).values()}
    num_redraws = sum(len(sets) * (2 if has_null else 1) for _, sets, has_null in plan_redraws(model))
    return 2 + 2 * NUM_NULL_DRAWS * len(set_sizes) + num_redraws if set_sizes else 0


# Tokens --------------------------------------------------------------------------------------------------------------


def get_group_indices(layout: TokenLayout) -> dict[str, list[int]]:
    """Return a dict that maps each nonempty group to the sequence indices of its special tokens."""
    special_indices = range(layout.num_prefix_tokens)
    return {name: list(special_indices[group]) for name, group in layout.items() if special_indices[group]}


def get_token_keys(layout: TokenLayout) -> list[str]:
    """Return the keys of the special tokens as in metrics.jsonl (`cls[0]`, `registers[1]`), in sequence order."""
    groups = get_group_indices(layout)
    return [f"{group}[{index}]" for group, members in groups.items() for index in range(len(members))]


def get_ablation_targets(layout: TokenLayout) -> dict[str, list[int]]:
    """Return a dict that maps token keys, and names of groups with several tokens, to sequence indices."""
    targets = {key: [index] for index, key in enumerate(get_token_keys(layout))}
    return targets | {name: members for name, members in get_group_indices(layout).items() if len(members) > 1}


@torch.no_grad()
def collect_mean_states(model: Any, batches: Batches, indices: Sequence[int]) -> tuple[torch.Tensor, Any]:
    """Return the mean states [L + 1, n, D] of the tokens at sequence indices `indices`, in double precision, and the
    outputs of the same forward passes."""
    batch_outputs, state_sums, module = [], [], get_classifier_or_encoder(model)
    with evaluation_mode(model):
        for pixel_values, labels in batches():
            outputs = module(pixel_values, output_hidden_states=True)
            states = torch.stack([state[:, list(indices)] for state in outputs.hidden_states], dim=1)
            state_sums.append(states.cpu().double().sum(dim=0))
            batch_outputs.append(extract_outputs(model, outputs, labels))
    joined_outputs = join_outputs(batch_outputs)
    return torch.stack(state_sums).sum(dim=0) / len(joined_outputs), joined_outputs


def collect_ablated_outputs(
    kind: str, model: Any, batches: Batches, indices: list[int], mean_states: torch.Tensor
) -> Any:
    """Return the outputs with the tokens at sequence indices `indices` replaced with their mean states [L + 1, n, D]
    ("information") or hidden from attention ("presence")."""
    if kind == "presence":
        return collect_outputs(model, batches, indices)
    with replace_by_means(model, indices, mean_states):
        return collect_outputs(model, batches)


@contextmanager
def replace_by_means(model: Any, indices: Sequence[int], mean_states: torch.Tensor) -> Iterator[None]:
    """Replace the states of the tokens at sequence indices `indices` with `mean_states` [L + 1, n, D], after the
    embeddings and after each layer. The last layer is included only if the head uses one of the tokens."""
    encoder, is_used_by_head = model.base_model, get_used_token_mask(model.config, is_classifier(model))
    modules = [encoder.embeddings, *encoder.layers]
    if not any(is_used_by_head[min(index, len(is_used_by_head) - 1)] for index in indices):
        modules.pop()  # a hook on the last layer would make the layer compute all tokens
    with ExitStack() as hooks:
        hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code does not call hooks
        for module, means in zip(modules, mean_states, strict=False):
            hooks.enter_context(replace_tokens(module, indices, means))
        yield


@contextmanager
def redraw_tokens(model: Any, indices: Sequence[int], generator: torch.Generator) -> Iterator[None]:
    """Replace the embeddings of the tokens at sequence indices `indices` with random vectors of the same norms."""
    directions = nn.functional.normalize(torch.randn(len(indices), model.config.hidden_size, generator=generator))

    def redraw(tokens: torch.Tensor) -> torch.Tensor:
        return tokens.norm(dim=-1, keepdim=True) * directions.to(tokens)

    with torch.compiler.set_stance("force_eager"), replace_tokens(model.base_model.embeddings, indices, redraw):
        yield


def replace_tokens(
    module: nn.Module, indices: Sequence[int], new_tokens: torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
) -> torch.utils.hooks.RemovableHandle:
    """Replace the tokens at sequence indices `indices` in the output of a module until the returned handle is removed.
    `new_tokens` is a tensor [n, D], or a function that maps the old tokens [B, n, D] to the new tokens."""

    def hook(module: nn.Module, args: tuple, hidden_states: torch.Tensor) -> torch.Tensor:
        new_states = hidden_states.clone()  # [B, N, D]
        replacements = new_tokens(new_states[:, list(indices)]) if callable(new_tokens) else new_tokens
        new_states[:, list(indices)] = replacements.to(hidden_states)
        return new_states

    return module.register_forward_hook(hook)
