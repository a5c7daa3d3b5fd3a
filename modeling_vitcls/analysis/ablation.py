"""Ablations: the change in predictions or features when special tokens lose their information or their presence.

    information   the states of the tokens are held at their means over images after the embeddings and each layer, so
                  that they are the same for every image. Removing tokens or setting them to zero would instead produce
                  inputs that the model was never trained on.
    presence      the tokens are hidden from attention by the mask, so that no token reads them.

    ablations = compute_ablations(model, batches, findings.mean_states)
    ablations["information"]["registers[0]"].effect        the effect, with a 95 % interval
    ablations["information"]["registers"].is_beyond_null   of all registers together, compared with the null

An effect alone is not meaningful, because holding any patch also changes predictions. Each effect is therefore
compared with two null distributions on the same images: the effect of random patches, and the effect of the same token
after it was redrawn at random with the same norm. Classifiers are compared by their predictions (`Predictions`), and
all other models by their features (`Features`). `get_predicted_labels` defines the prediction of a model for the whole
analysis.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from scipy import stats
from sklearn.neighbors import NearestNeighbors
from torch import nn

from ..configuration_vitcls import TokenLayout, ViTCLSConfig
from ..data.labels import is_multi_label
from ..heads_vitcls import IGNORED_LABEL
from ..inference.prediction_rows import THRESHOLD
from .maps import is_read
from .model_utils import evaluation_mode, get_runner, is_classifier, unwrap_model


# pixel_values [B, C, H, W] on the model's device, and labels or None. Labels are [B, A] (see `Predictions`), or [B] if
# A is 1. Called repeatedly, each time for the same images.
Batches = Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor | None]]]
Interval = tuple[float, float]  # 95 % confidence

KINDS = ("information", "presence")
MIN_VARIATION = 1e-3  # minimum standard deviation of the logits over images, as a fraction of their root mean square
MIN_IMAGES = 16  # minimum number of images to judge an effect
MIN_NULL_LIMIT = 1e-3  # minimum limit of a null distribution; smaller effects are rounding errors
NUM_NULL = 8  # number of random patches, and of random tokens, of a null distribution
NUM_RESAMPLES = 1000  # number of bootstrap samples of the images
NUM_NEIGHBORS = 5  # number of nearest neighbors by which features are compared
CONFIDENCE = 0.95


# Outputs of a model --------------------------------------------------------------------------------------------------


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

    def __len__(self) -> int:
        return len(self.predicted)

    def select(self, indices: Sequence[int]) -> "Predictions":
        """Return the predictions for some of the images."""
        chosen = list(indices)
        return Predictions(
            self.logits[chosen], self.predicted[chosen], None if self.labels is None else self.labels[chosen]
        )

    def accuracy(self) -> float | None:
        """Return the fraction of correct predictions among images with known labels; None if no label is known."""
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
class Features:
    """Features of an encoder: for "cls" (if there are CLS tokens), "pooled" (the pooler's output, or the mean of the
    patches) and "patches", one tensor [vectors, D] per image."""

    vectors: dict[str, list[torch.Tensor]]

    def __len__(self) -> int:
        return len(self.vectors["patches"])

    def select(self, indices: Sequence[int]) -> "Features":
        """Return the features of some of the images."""
        return Features({name: [rows[index] for index in indices] for name, rows in self.vectors.items()})

    def find_neighbors(self) -> list[set[int]] | None:
        """Return the indices of the NUM_NEIGHBORS most similar other images of each image, by the CLS tokens or the
        pooled features; None for fewer than MIN_IMAGES images."""
        if len(self) < MIN_IMAGES:
            return None
        rows = torch.stack([row.flatten() for row in self.vectors.get("cls", self.vectors["pooled"])]).numpy()
        neighbors = NearestNeighbors(n_neighbors=NUM_NEIGHBORS, metric="cosine").fit(rows)
        return [set(row) for row in neighbors.kneighbors(return_distance=False).tolist()]


Outputs = Predictions | Features


class OutputCollector:
    """Collects the outputs of a model over batches: `Predictions` of a classifier, `Features` of any other model."""

    def __init__(self, model: Any) -> None:
        self.config: ViTCLSConfig = model.config
        self.is_classifier = is_classifier(model)
        self.logits: list[torch.Tensor] = []
        self.predicted: list[torch.Tensor] = []
        self.labels: list[torch.Tensor] = []
        self.vectors: dict[str, list[torch.Tensor]] = {}

    def add(self, outputs: Any, labels: torch.Tensor | None = None) -> None:
        """Add the output of the classifier, or of the encoder inside another model, for a batch."""
        if not self.is_classifier:
            for name, vectors in extract_features(outputs, self.config).items():
                self.vectors.setdefault(name, []).extend(vectors.float().cpu())
            return
        by_task = get_task_logits(outputs)
        self.logits.append(torch.cat(by_task, dim=-1).float().cpu())
        self.predicted.append(get_predicted_labels(by_task, self.config).cpu())
        if labels is not None:
            self.labels.append(reshape_labels(labels, self.predicted[-1]))

    def build(self) -> Any:
        """Return `Predictions` or `Features` of all images.

        Raises:
            ValueError: if there are no images.
        """
        if not self.predicted and not self.vectors:
            raise ValueError("Ablation requires at least one image, but there are no images. Pass one or more images.")
        if not self.is_classifier:
            return Features(self.vectors)
        has_labels = len(self.labels) == len(self.predicted)
        labels = torch.cat(self.labels) if has_labels else None
        return Predictions(torch.cat(self.logits), torch.cat(self.predicted), labels)


@torch.no_grad()
def collect_outputs(model: Any, batches: Batches, hidden: Sequence[int] = ()) -> Any:
    """Return `Predictions` of a classifier or `Features` of any other model for all images, on the CPU.

    Args:
        hidden: sequence indices of the tokens to hide from attention.
    """
    collector, runner = OutputCollector(model), get_runner(model)
    with evaluation_mode(model):
        for pixel_values, labels in batches():
            mask = build_hiding_mask(model, pixel_values, hidden) if hidden else None
            collector.add(runner(pixel_values, attention_mask=mask), labels)
    return collector.build()


def collect_predictions(model: Any, batches: Batches) -> Predictions:
    """Return the model's predictions for all images, on the CPU.

    Raises:
        ValueError: if the model has no classifier, there are no images, or labels have the wrong shape.
    """
    check_is_classifier(model)
    return collect_outputs(model, batches)


@torch.no_grad()
def collect_mean_states(model: Any, batches: Batches, indices: Sequence[int]) -> tuple[torch.Tensor, Any]:
    """Return the mean states [L + 1, n, D] of the tokens at these sequence indices, in double precision, and the
    outputs of the same forward passes."""
    collector, runner = OutputCollector(model), get_runner(model)
    total, num_images = torch.zeros(()), 0
    with evaluation_mode(model):
        for pixel_values, labels in batches():
            outputs = runner(pixel_values, output_hidden_states=True)
            states = torch.stack([state[:, list(indices)] for state in outputs.hidden_states], dim=1)
            total = total + states.cpu().double().sum(dim=0)
            num_images += len(pixel_values)
            collector.add(outputs, labels)
    return total / max(num_images, 1), collector.build()


def check_is_classifier(model: Any) -> None:
    """Raise ValueError if the model has no classifier."""
    if not is_classifier(model):
        raise ValueError("Ablation requires predictions, but this model has no classifier. Use a classifier.")


def get_task_logits(outputs: Any) -> list[torch.Tensor]:
    """Return the logits [B, labels] of each task, or a list of one element if the model has no tasks."""
    return list(outputs.logits.values()) if isinstance(outputs.logits, dict) else [outputs.logits]


def extract_features(outputs: Any, config: ViTCLSConfig) -> dict[str, torch.Tensor]:
    """Return the features [B, vectors, D] by name (`Features`) from the output of an encoder."""
    layout, states = config.token_layout, outputs.last_hidden_state
    pooled = getattr(outputs, "pooler_output", None)
    if pooled is None:
        pooled = states[:, layout.patches].mean(dim=1)
    features = {"cls": states[:, layout.cls], "pooled": pooled.unsqueeze(1), "patches": states[:, layout.patches]}
    return {name: vectors for name, vectors in features.items() if vectors.shape[1]}


def get_predicted_labels(by_task: list[torch.Tensor], config: ViTCLSConfig) -> torch.Tensor:
    """Return the predicted labels [B, A] (`Predictions.predicted`) for the logits [B, labels] of each task.

    A multi-label model predicts each label whose probability reaches THRESHOLD, as in inference/prediction_rows.py.
    """
    if is_multi_label(config):
        return (by_task[0].float().sigmoid() >= THRESHOLD).long()
    return torch.stack([logits.argmax(dim=-1) for logits in by_task], dim=-1)


def encode_label(label: Any, config: ViTCLSConfig) -> torch.Tensor:
    """Return a dataset label (data/images.py) as [A] (`Predictions.labels`), with IGNORED_LABEL for None.

    For a multi-label model, a class index means that only this label applies.
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
        ValueError: if the labels have a different shape.
    """
    if labels.shape not in (predicted.shape, predicted.shape[:1]) or labels.numel() != predicted.numel():
        raise ValueError(
            f"Labels must have the shape of the predictions, {list(predicted.shape)} [images, labels per image], but "
            f"they are {list(labels.shape)}. Pass one label per prediction."
        )
    return labels.cpu().view_as(predicted)


# Effects -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AblationEffect:
    """Effect of an ablation on predictions. Intervals are 95 % confidence intervals.

    Attributes:
        changed_answers: fraction of images whose prediction changes.
        logit_change: root mean square change of the logits, divided by their standard deviation over images (at least
            a thousandth of their root mean square, because smaller deviations are rounding errors). With a single
            image, the mean is the token's own state, so the effect is 0 and has no meaning.
        accuracy_change: accuracy after minus accuracy before; None if no label is known.
        num_images: number of images.
        changed_interval: exact interval of `changed_answers` (Clopper and Pearson 1934).
        logit_interval: interval of `logit_change`, from bootstrap samples of the images.
        improvement: p-value of the hypothesis that the accuracy does not rise (exact McNemar test); None if no label
            is known.
        is_better_than_chance: whether the accuracy after the ablation is better than chance; None if unknown.
    """

    changed_answers: float
    logit_change: float
    accuracy_change: float | None
    num_images: int
    changed_interval: Interval = (0.0, 1.0)
    logit_interval: Interval = (0.0, math.inf)
    improvement: float | None = None
    is_better_than_chance: bool | None = None

    @property
    def size(self) -> float:
        """Return the value that is compared with null distributions."""
        return self.logit_change

    @property
    def interval(self) -> Interval:
        """Return the 95 % interval of `size`."""
        return self.logit_interval

    @property
    def changes_outputs(self) -> bool:
        """Return whether a prediction changes."""
        return self.changed_answers > 0


@dataclass(frozen=True)
class FeatureEffect:
    """Effect of an ablation on the features of an encoder.

    Attributes:
        cosine_change: 1 minus the cosine similarity of features before and after, by name (`Features`), mean over
            images.
        knn_agreement: mean fraction of the NUM_NEIGHBORS nearest images that stay the same; None for few images.
        num_images: number of images.
        interval: 95 % interval of `size`, from bootstrap samples of the images.
    """

    cosine_change: dict[str, float]
    knn_agreement: float | None
    num_images: int
    interval: Interval

    @property
    def size(self) -> float:
        """Return the value that is compared with null distributions, the largest cosine change."""
        return max(self.cosine_change.values())

    @property
    def changes_outputs(self) -> bool:
        """Return whether features change by more than rounding errors."""
        return self.size > MIN_NULL_LIMIT


Effect = AblationEffect | FeatureEffect


def compute_effect(before: Any, after: Any) -> Any:
    """Return the difference of two outputs: `AblationEffect` of `Predictions`, `FeatureEffect` of `Features`."""
    return compare_features(before, after) if isinstance(before, Features) else compare_predictions(before, after)


def compare_predictions(before: Predictions, after: Predictions) -> AblationEffect:
    """Return the effect of an ablation on predictions."""
    size = compute_rms(before.logits)
    deviations = (before.logits - before.logits.mean(dim=0)).square().mean(dim=1)  # [images]
    scale = deviations.mean().sqrt().clamp(min=MIN_VARIATION * size).clamp(min=1e-12)
    changes = (after.logits - before.logits).square().mean(dim=1) / scale.square()  # [images]
    is_changed = (before.predicted != after.predicted).any(dim=-1)
    accuracy_before, accuracy_after = before.accuracy(), after.accuracy()
    accuracy_change = improvement = None
    if accuracy_before is not None and accuracy_after is not None:
        accuracy_change, improvement = accuracy_after - accuracy_before, compute_improvement(before, after)
    low, high = bootstrap_mean(changes)
    return AblationEffect(
        changed_answers=is_changed.float().mean().item(),
        logit_change=changes.mean().sqrt().item(),
        accuracy_change=accuracy_change,
        num_images=len(before),
        changed_interval=compute_binomial_interval(int(is_changed.sum()), len(before)),
        logit_interval=(low**0.5, high**0.5),
        improvement=improvement,
        is_better_than_chance=after.is_better_than_chance(),
    )


def compare_features(before: Features, after: Features) -> FeatureEffect:
    """Return the effect of an ablation on features."""
    changes = {
        name: torch.stack([compute_cosine_change(*pair) for pair in zip(rows, after.vectors[name], strict=True)])
        for name, rows in before.vectors.items()
    }  # [images] each
    neighbors, neighbors_after = before.find_neighbors(), after.find_neighbors()
    agreement = None
    if neighbors is not None and neighbors_after is not None:
        pairs = zip(neighbors, neighbors_after, strict=True)
        agreement = sum(len(one & other) for one, other in pairs) / (NUM_NEIGHBORS * len(before))
    largest = max(changes.values(), key=lambda values: values.mean().item())
    means = {name: values.mean().item() for name, values in changes.items()}
    return FeatureEffect(means, agreement, len(before), bootstrap_mean(largest))


def compute_cosine_change(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return 1 minus the mean cosine similarity of vectors [n, D] before and after, as a scalar tensor."""
    return (1 - nn.functional.cosine_similarity(before, after, dim=-1).mean()).clamp(min=0)


def compute_rms(values: torch.Tensor) -> torch.Tensor:
    """Return the root mean square of all elements, as a scalar tensor."""
    return values.square().mean().sqrt()


def compute_binomial_interval(count: int, total: int) -> Interval:
    """Return the exact 95 % interval of a fraction (Clopper and Pearson 1934), one-sided if the fraction is 0 or 1:
    0 of 256 means at most 1.2 %."""
    if count in (0, total):
        bound = (1 - CONFIDENCE) ** (1 / total)
        return (0.0, 1 - bound) if count == 0 else (bound, 1.0)
    low, high = stats.binomtest(count, total).proportion_ci(CONFIDENCE, method="exact")
    return float(low), float(high)


def bootstrap_mean(values: torch.Tensor) -> Interval:
    """Return the 95 % interval of the mean of values [images], from bootstrap samples of the images."""
    generator = torch.Generator().manual_seed(0)
    resamples = torch.randint(len(values), (NUM_RESAMPLES, len(values)), generator=generator)
    tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = values.float()[resamples].mean(dim=1).quantile(tails).tolist()
    return low, high


def compute_improvement(before: Predictions, after: Predictions) -> float:
    """Return the p-value of the hypothesis that the accuracy does not rise (exact one-sided test, McNemar 1947)."""
    assert before.labels is not None
    is_known = before.labels != IGNORED_LABEL
    was_right, is_right = ((each.predicted == before.labels)[is_known] for each in (before, after))
    gained, lost = int((is_right & ~was_right).sum()), int((was_right & ~is_right).sum())
    return float(stats.binom.sf(gained - 1, gained + lost, 0.5)) if gained else 1.0


# Null distributions --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ablation:
    """The effect of ablating one token or a group of tokens, and its null distributions.

    Attributes:
        effect: the effect over all images.
        compared: size of the effect on the images of the null distributions, which may be fewer.
        patches: sizes of the effect of ablating the same number of random patches.
        redrawn: sizes of the effect of ablating the tokens after they were redrawn at random with the same norm. Empty
            for tokens that the head reads, because all of these have an effect.
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
        """Return whether outputs change, and by more than in both null distributions."""
        null = self.null
        return null is not None and self.effect.changes_outputs and self.compared > null[1]


Ablations = dict[str, dict[str, Ablation]]  # kind -> key of a token or name of a group -> ablation


def compute_null_limit(values: Sequence[float]) -> float:
    """Return the limit of a null distribution: its maximum, or the upper end of its 95 % prediction interval if this
    is larger (normal distribution, unknown variance), since few random draws miss rare large values."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return max(*values, mean, MIN_NULL_LIMIT)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return max(*values, mean + quantile * deviation * math.sqrt(1 + 1 / count), MIN_NULL_LIMIT)


def compute_ablations(
    model: Any,
    batches: Batches,
    mean_states: torch.Tensor,
    before: Any = None,
    sample: tuple[Batches, Sequence[int]] | None = None,
    known: dict[str, Any] | None = None,
) -> Ablations:
    """Return the ablations of each special token and of each group of several tokens, with their null distributions.

    Args:
        model: any ViTCLS model.
        batches: returns the images.
        mean_states: [L + 1, S, D], mean states of the embeddings and after each layer (`Findings.mean_states`).
        before: `collect_outputs(model, batches)`, if already computed.
        sample: batches of the images for the null distributions, and their indices among all images. Default: all.
        known: outputs with hidden tokens that are already computed, by key of the token or name of the group.

    Raises:
        ValueError: if there are no images, or labels have the wrong shape.
    """
    model = unwrap_model(model)
    before = collect_outputs(model, batches) if before is None else before
    sample_batches, sampled = sample or (batches, range(len(before)))
    parts = get_ablated_parts(model.config.token_layout)
    if not parts:
        return {kind: {} for kind in KINDS}
    nulls = measure_null_effects(model, sample_batches, before.select(sampled), parts)
    ablations: Ablations = {kind: {} for kind in KINDS}
    for key, indices in parts.items():
        with hold_tokens(model, indices, mean_states[:, indices]):
            held = collect_constant_outputs(model, batches, before, indices) or collect_outputs(model, batches)
        hidden = (known or {}).get(key) or collect_outputs(model, batches, indices)
        for kind, after in zip(KINDS, (held, hidden), strict=True):
            ablations[kind][key] = Ablation(
                effect=compute_effect(before, after),
                compared=compute_effect(before.select(sampled), after.select(sampled)).size,
                patches=nulls.patches[kind][len(indices)],
                redrawn=nulls.redrawn[kind].get(key, []),
                redraw_effect=nulls.redraw_effects.get(key),
            )
    return ablations


def collect_constant_outputs(model: Any, batches: Batches, before: Any, indices: Sequence[int]) -> Predictions | None:
    """Return the predictions for all images from a forward pass of one image, if the classifier reads only the tokens
    at these sequence indices, which are held at their means; None otherwise."""
    groups = get_groups(model.config.token_layout) | {"patches": [-1]}
    reads = {
        members[index]
        for group, members in groups.items()
        for index in range(len(members))
        if is_read(model.config, group, index)
    }
    if not isinstance(before, Predictions) or not reads <= set(indices):
        return None
    first = next(iter(batches()))[0][:1]
    one = collect_outputs(model, lambda: [(first, None)])
    return Predictions(one.logits.expand_as(before.logits), one.predicted.expand_as(before.predicted), before.labels)


@dataclass
class NullEffects:
    """Sizes of null effects: of random patches by kind and number of patches, of random tokens by kind and key, and of
    redrawing tokens by key."""

    patches: dict[str, dict[int, list[float]]]
    redrawn: dict[str, dict[str, list[float]]]
    redraw_effects: dict[str, float]


def measure_null_effects(
    model: Any, batches: Batches, before: Any, parts: dict[str, list[int]], seed: int = 0
) -> NullEffects:
    """Measure the effects of random patches, and of random tokens with the norms of the model's own tokens.

    The tokens of a group share their null distribution: each draw replaces one token, in turn.
    """
    generator = torch.Generator().manual_seed(seed)
    layout: TokenLayout = model.config.token_layout
    nulls = NullEffects({kind: {} for kind in KINDS}, {kind: {} for kind in KINDS}, {})
    num_patches = count_common_patches(model, batches)
    for size in sorted({len(indices) for indices in parts.values()}):
        draws = draw_patches(num_patches, size, generator)
        sets = [[layout.num_prefix_tokens + index for index in draw] for draw in draws]
        used = sorted({index for indices in sets for index in indices})
        means, _ = collect_mean_states(model, batches, used)
        for kind in KINDS:
            nulls.patches[kind][size] = [
                compute_effect(before, ablate(kind, model, batches, indices, means[:, positions])).size
                for indices in sets
                for positions in [[used.index(index) for index in indices]]
            ]
    for keys, sets, has_null in plan_redraws(model):
        sizes: dict[str, list[float]] = {kind: [] for kind in KINDS}
        changes = []
        for indices in sets:
            with redraw_tokens(model, indices, generator):
                means, redrawn = collect_mean_states(model, batches, indices)
                changes.append(compute_effect(before, redrawn).size)
                for kind in KINDS if has_null else ():
                    after = ablate(kind, model, batches, indices, means)
                    sizes[kind].append(compute_effect(redrawn, after).size)
        for kind in KINDS:
            nulls.redrawn[kind] |= dict.fromkeys(keys, sizes[kind])
        nulls.redraw_effects |= dict.fromkeys(keys, sum(changes) / len(changes))
    return nulls


def plan_redraws(model: Any) -> Iterator[tuple[list[str], list[list[int]], bool]]:
    """Yield the keys that share a null distribution, the sequence indices of each draw, and whether to measure the
    effects of redrawn tokens.

    These effects are not measured for tokens that the head reads, because all of these tokens have an effect.
    """
    config, has_head = model.config, is_classifier(model)
    for group, members in get_groups(config.token_layout).items():
        reads = [is_read(config, group, index, has_head) for index in range(len(members))]
        for is_member_read in sorted(set(reads)):
            chosen = [index for index, read in enumerate(reads) if read == is_member_read]
            num_draws = NUM_NULL // 2 if is_member_read else NUM_NULL
            sets = [[members[chosen[draw % len(chosen)]]] for draw in range(num_draws)]
            yield [f"{group}[{index}]" for index in chosen], sets, not is_member_read
        if len(members) > 1:
            yield [group], [members] * (NUM_NULL // 2 if any(reads) else NUM_NULL), not any(reads)


def draw_patches(num_patches: int, size: int, generator: torch.Generator) -> list[list[int]]:
    """Return NUM_NULL random sets of `size` patches; for single patches without repetition, so at most all patches."""
    if size == 1:
        return [[index] for index in torch.randperm(num_patches, generator=generator)[:NUM_NULL].tolist()]
    return [sorted(torch.randperm(num_patches, generator=generator)[:size].tolist()) for _ in range(NUM_NULL)]


def count_common_patches(model: Any, batches: Batches) -> int:
    """Return the number of patches of the smallest image."""
    get_grid_size = model.base_model.embeddings.patch_embeddings.get_grid_size
    return min(math.prod(get_grid_size(pixel_values)) for pixel_values, _ in batches())


def count_null_passes(model: Any) -> int:
    """Return the maximum number of passes over the images of the null distributions."""
    sizes = {len(indices) for indices in get_ablated_parts(model.config.token_layout).values()}
    num_redraws = sum(len(sets) * (3 if has_null else 1) for _, sets, has_null in plan_redraws(model))
    return 1 + len(sizes) * (1 + 2 * NUM_NULL) + num_redraws if sizes else 0


# Tokens --------------------------------------------------------------------------------------------------------------


def get_token_keys(layout: TokenLayout) -> list[str]:
    """Return the keys of the special tokens as in metrics.jsonl (`cls[0]`, `registers[1]`), in sequence order."""
    return [f"{group}[{index}]" for group, members in get_groups(layout).items() for index in range(len(members))]


def get_groups(layout: TokenLayout) -> dict[str, list[int]]:
    """Return the sequence indices of the special tokens by group; groups without tokens are omitted."""
    special = range(layout.num_prefix_tokens)
    groups = {name: list(special[group]) for name, group in layout.items()}
    return {name: members for name, members in groups.items() if members}


def get_ablated_parts(layout: TokenLayout) -> dict[str, list[int]]:
    """Return the sequence indices of each token by key, and of each group of several tokens by name."""
    parts = {key: [index] for index, key in enumerate(get_token_keys(layout))}
    return parts | {name: members for name, members in get_groups(layout).items() if len(members) > 1}


def compute_ablation_effects(
    model: Any, batches: Batches, mean_states: torch.Tensor, before: Predictions | None = None
) -> dict[str, AblationEffect]:
    """Return the effect of holding each special token at its mean, with keys such as `cls[0]`, without null
    distributions (`compute_ablations`).

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
    for index, key in enumerate(get_token_keys(model.config.token_layout)):
        with hold_tokens(model, [index], mean_states[:, [index]]):
            effects[key] = compare_predictions(before, collect_predictions(model, batches))
    return effects


def ablate(kind: str, model: Any, batches: Batches, indices: list[int], mean_states: torch.Tensor) -> Any:
    """Return the outputs with the tokens at these sequence indices held at their mean states [L + 1, n, D]
    ("information") or hidden from attention ("presence")."""
    if kind == "presence":
        return collect_outputs(model, batches, indices)
    with hold_tokens(model, indices, mean_states):
        return collect_outputs(model, batches)


def build_hiding_mask(model: Any, pixel_values: torch.Tensor, hidden: Sequence[int]) -> torch.Tensor:
    """Return an attention mask [B, N] that hides the tokens at these sequence indices from all tokens."""
    grid = model.base_model.embeddings.patch_embeddings.get_grid_size(pixel_values)
    num_tokens = model.config.token_layout.get_num_tokens(*grid)
    mask = torch.ones(len(pixel_values), num_tokens, dtype=torch.long, device=pixel_values.device)
    mask[:, list(hidden)] = 0
    return mask


@contextmanager
def hold_tokens(model: Any, indices: Sequence[int], mean_states: torch.Tensor) -> Iterator[None]:
    """Hold the states of the tokens at these sequence indices at `mean_states` [L + 1, n, D], after the embeddings and
    each layer."""
    encoder = model.base_model
    with ExitStack() as hooks:
        hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code does not call hooks
        for module, means in zip([encoder.embeddings, *encoder.layers], mean_states, strict=True):
            hooks.enter_context(module.register_forward_hook(build_replacing_hook(indices, means)))
        yield


@contextmanager
def redraw_tokens(model: Any, indices: Sequence[int], generator: torch.Generator) -> Iterator[None]:
    """Replace the embeddings of the tokens at these sequence indices by random directions with the same norms."""
    directions = nn.functional.normalize(torch.randn(len(indices), model.config.hidden_size, generator=generator))

    def redraw(module: nn.Module, args: tuple, embeddings: torch.Tensor) -> torch.Tensor:
        redrawn = embeddings.clone()  # [B, N, D]
        norms = embeddings[:, list(indices)].norm(dim=-1, keepdim=True)
        redrawn[:, list(indices)] = norms * directions.to(embeddings)
        return redrawn

    with torch.compiler.set_stance("force_eager"), model.base_model.embeddings.register_forward_hook(redraw):
        yield


def build_replacing_hook(
    indices: Sequence[int], values: torch.Tensor
) -> Callable[[nn.Module, tuple, torch.Tensor], torch.Tensor]:
    """Return a hook that replaces the output of a module at these sequence indices by values [n, D]."""

    def hook(module: nn.Module, args: tuple, hidden_states: torch.Tensor) -> torch.Tensor:
        replaced = hidden_states.clone()  # [B, N, D]
        replaced[:, list(indices)] = values.to(hidden_states)
        return replaced

    return hook
