"""What special tokens do, measured in pairs: the same images as they are, and with an intervention.

    hidden     no token attends to the token: what its place is worth
    content    another photo's token stands in its place, of another class if there are labels: what
               the token holds about the photo. It works for tokens that a head reads, too.
    without    (distillation tokens) the model without the tokens and without their head

    records, losses = measure_effects(model, batches)
    records[0]      {"token": "CLS", "group": "cls", "output": "", "verdict": "content", "hidden": {...}, ...}

These records are the effects of an `Inspection`, `tokens` in results.json, and what page and card show.
Without labels, losses are those of the model's own predictions; of an encoder, they are the cosine
distances of its features. The interventions are in inference/interventions.py.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.images import LabeledImages
from ..data.labels import LabelSpace, is_multi_label
from ..frozen.targets import OneLabelTarget, SeveralLabelsTarget, Target
from ..inference.image_pass import ImageBatch, pass_over_images, prepare_batches, read_pixels
from ..inference.intervals import Interval, compute_bootstrap_interval
from ..inference.interventions import LayerRange, intervene
from ..inference.metrics import compute_losses
from ..inference.token_names import SINGLE_TOKEN_NAMES, get_token_names
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.heads_vitcls import IGNORED_LABEL
from ..model.token_layout_vitcls import TOKEN_KINDS, TokenLayout


# Batches of images. Labels are [B, A] with the columns of all tasks, or [B] if A is 1.
Batches = Sequence[ImageBatch]
# (items, description) -> items, with a progress bar
Watch = Callable[[Any, str], Iterable[Any]]
# Name of a task -> logits [labels] of each image; or, of an encoder, name of a kind of features ->
# vectors [n, D] of each image, because images of other sizes have other numbers of patches
Outputs = dict[str, list[Tensor]]

MIN_IMAGES = 16  # With fewer images, nothing is shown
MIN_CHANGE = 1e-3  # Smaller changes of a loss or a distance are rounding errors
# A token without which a model is lost has content if another photo's token costs this share of that
MIN_CONTENT_SHARE = 0.1
EFFECT_TITLES = {"hidden": "hidden", "content": "another photo's", "without": "without"}


@dataclass(frozen=True)
class Change:
    """What an intervention changes in one output, on the same images, with 95% confidence intervals.

    Attributes:
        num_images: number of images, of those with a known label if there are any.
        loss_change: by how much the mean log loss rises; of features, the mean cosine distance.
        loss_interval: interval for `loss_change`.
        loss: the mean log loss with the intervention; None for features.
        num_changed: number of images whose prediction changes; None for features.
        accuracy: with the intervention; None without labels, as is what follows.
        accuracy_change: by how much the accuracy rises.
        accuracy_interval: interval for `accuracy_change`.
    """

    num_images: int
    loss_change: float
    loss_interval: Interval
    loss: float | None = None
    num_changed: int | None = None
    accuracy: float | None = None
    accuracy_change: float | None = None
    accuracy_interval: Interval | None = None

    @property
    def is_harmful(self) -> bool:
        """Whether the loss rises, or fewer images are right."""
        is_less_accurate = self.accuracy_interval is not None and self.accuracy_interval[1] < 0
        return self.loss_interval[0] > MIN_CHANGE or is_less_accurate


def judge(absent: Change, content: Change) -> str:
    """Say what a token has, by what is lost without it, and with another photo's token in its place.

    Returns:
        content: another photo's token does not do, so the token holds something about the photo.
        place: it does, but without the token the model loses: a constant, or a sink of attention.
        better without: without the token, the loss is lower, and no fewer images are right.
        not shown: none of these is shown by these images.
    """
    if absent.num_images < MIN_IMAGES:
        return "not shown"
    has_content = (
        content.is_harmful and content.loss_change >= MIN_CONTENT_SHARE * absent.loss_change
    )
    # Without labels, a lower loss only says that the model is more sure of itself
    has_lower_loss = absent.accuracy is not None and absent.loss_interval[1] < -MIN_CHANGE
    if has_lower_loss and not absent.is_harmful:
        is_worth_it = has_content and content.loss_change > -absent.loss_change
        return "content" if is_worth_it else "better without"
    if has_content:
        return "content"
    return "place" if absent.is_harmful else "not shown"


def measure_effects(
    model: Any,
    batches: Batches,
    layers: LayerRange = None,
    has_members: bool = True,
    watch: Watch = lambda items, description: items,
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Measure what hiding and replacing tokens changes, in two passes for each token and each group.

    Args:
        model: a classifier or an encoder, in evaluation mode.
        batches: batches of images.
        layers: the first and the last layer of the interventions, from 1. Default: all.
        has_members: whether tokens are measured one by one, and not in groups alone.
        watch: function that returns the same items and shows the progress.

    Returns:
        A record for each of them and each output: `token`, `group`, `output`, `verdict`, and of `hidden`,
        `content` and perhaps `without` the fields of a `Change`. And the losses of the images in the last
        output, as `loss_hidden_registers`, after the last intervention on each group.
    """
    config = model.config

    def gather(
        positions: list[int], sources: Iterator[Any], reads_cls_head: bool = False
    ) -> Outputs:
        def run(pixel_values: Tensor) -> Any:
            outputs = intervene(model, pixel_values, positions, next(sources), layers)
            if reads_cls_head:
                outputs.logits = outputs.cls_logits
            return outputs

        return gather_outputs(model, batches, run)

    before, states = measure_states(model, batches)
    labels = collect_labels(batches, config)
    donors = choose_donors(labels, states.shape[1])
    sources = states[:, donors].split([len(batch.indices) for batch in batches], dim=1)
    groups = list_groups(config)
    records = []
    losses = {}
    token_sets = list_token_sets(config, has_members).items()
    for name, positions in watch(token_sets, "hiding and replacing tokens"):
        (group,) = (each for each, members in groups.items() if positions[0] in members)
        after = {
            "hidden": gather(positions, repeat(None)),
            "content": gather(positions, iter(sources)),
        }
        has_two_heads = getattr(model, "distillation_classifier", None) is not None
        if has_two_heads and layers is None and positions == groups["distillation"]:
            after["without"] = gather(positions, repeat(None), reads_cls_head=True)
        for output, rows in before.items():
            changes = {}
            for kind, outputs in after.items():
                changes[kind], losses[f"loss_{kind}_{group}"] = compare(
                    rows, outputs[output], get_target(config), labels.get(output)
                )
            verdict = judge(changes.get("without", changes["hidden"]), changes["content"])
            records.append(
                {"token": name, "group": group, "output": output, "verdict": verdict}
                | {kind: asdict(change) for kind, change in changes.items()}
            )
    return records, losses


def choose_donors(labels: Mapping[str, Tensor], number: int) -> Tensor:
    """Choose whose tokens each image gets [N]: those of a random image with other labels.

    Without labels, or if all are the same, it is any other image.
    """
    rows = torch.cat([torch.zeros(number, 1), *labels.values()], dim=1)
    differs = (rows[:, None] != rows).any(dim=2)
    if not differs.any():
        differs = ~torch.eye(number, dtype=torch.bool)
    draws = torch.rand(number, number, generator=torch.Generator().manual_seed(0))
    return (differs * draws).argmax(dim=1)


def compare(
    before: list[Tensor], after: list[Tensor], target: Target, labels: Tensor | None = None
) -> tuple[Change, np.ndarray]:
    """Compare one output of all images before and after an intervention.

    Args:
        before, after: logits [labels] or features [n, D] of each image.
        target: what the logits predict.
        labels: [N, columns]. Images without a known label (IGNORED_LABEL) are left out. None: what
            the model predicts.

    Returns:
        The change, and the loss of each image with a label after it, or the distance of its features.
    """
    if before[0].ndim == 2:  # Several vectors of an image are features
        pairs = zip(before, after, strict=True)
        similarities = [nn.functional.cosine_similarity(*pair, dim=-1).mean() for pair in pairs]
        distances = 1 - torch.stack(similarities).numpy()
        return Change(len(before), *average(distances)), distances

    # [2, N, labels]
    logits = np.stack([torch.stack(rows).double().numpy() for rows in (before, after)])
    if labels is not None:
        is_known = (labels != IGNORED_LABEL).all(dim=1).numpy()
        logits = logits[:, is_known]
    predicted, new = map(target.predict, logits)
    truth = predicted
    if labels is not None:
        truth = labels.numpy()[is_known].reshape(predicted.shape)

    losses, new_losses = (compute_losses(each, truth) for each in logits)
    change = Change(
        len(truth),
        *average(new_losses - losses),
        loss=float(new_losses.mean()),
        num_changed=int((~target.find_right(new, predicted)).sum()),
    )
    if labels is None:
        return change, new_losses
    was_right, is_right = (
        target.find_right(each, truth).astype(float) for each in (predicted, new)
    )
    accuracy_change, accuracy_interval = average(is_right - was_right)
    change = replace(
        change,
        accuracy=float(is_right.mean()),
        accuracy_change=accuracy_change,
        accuracy_interval=accuracy_interval,
    )
    return change, new_losses


def average(values: np.ndarray) -> tuple[float, Interval]:
    """Average values [N] over images, with a 95% confidence interval."""
    return float(values.mean()), compute_bootstrap_interval(values.tolist())


def describe_effect(record: Mapping[str, Any]) -> str:
    """Say what a token has, and what each intervention changes (a record of `measure_effects`)."""
    changes = [
        f"{title} {describe_change(record[kind])}"
        for kind, title in EFFECT_TITLES.items()
        if kind in record
    ]
    name = ", ".join(filter(None, (record["token"], record["output"])))
    return f"{name}: {record['verdict']} ({'; '.join(changes)})"


def describe_change(record: Mapping[str, Any]) -> str:
    """Say what an intervention changes (fields of a `Change`), with 95% confidence intervals."""
    low, high = record["loss_interval"]
    if record["loss"] is None:
        return f"{record['loss_change']:.2g} ({low:.2g} to {high:.2g})"
    text = (
        f"{record['num_changed']} of {record['num_images']} changed, log loss "
        f"{record['loss_change']:+.3f} ({low:+.3f} to {high:+.3f})"
    )
    if record["accuracy"] is None:
        return text
    low, high = (100 * bound for bound in record["accuracy_interval"])
    return f"{100 * record['accuracy_change']:+.1f} points ({low:+.1f} to {high:+.1f}), {text}"


# Tokens -------------------------------------------------------------------------------------------


def list_token_sets(config: ViTCLSConfig, has_members: bool) -> dict[str, list[int]]:
    """List the positions of each special token, if they are asked for, and of each group, by name."""
    names = get_token_names(config)
    token_sets: dict[str, list[int]] = {}
    for group, members in list_groups(config).items():
        if has_members or len(members) == 1:
            token_sets |= {names[index]: [index] for index in members}
        if len(members) > 1:
            token_sets[f"all {SINGLE_TOKEN_NAMES[group]} tokens"] = members
    return token_sets


def list_groups(config: ViTCLSConfig) -> dict[str, list[int]]:
    """Map each group of special tokens that is not empty to their positions in the sequence."""
    layout = config.token_layout
    special = range(layout.num_prefix_tokens)
    groups = {group: list(special[tokens]) for group, tokens in layout.items()}
    return {group: members for group, members in groups.items() if members}


# Outputs and labels -------------------------------------------------------------------------------


def read_batches(
    model: Any,
    processor: Any,
    images: LabeledImages,
    label_space: LabelSpace,
    batch_size: int,
    watch: Watch = lambda items, description: items,
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
            f"tokens are measured with images, but none of {len(images)} can be "
            f"read{first_error}. Check the images."
        )
    return batches, error_messages


def measure_states(model: Any, batches: Iterable[ImageBatch]) -> tuple[Outputs, Tensor]:
    """Run the model on all images once.

    Returns:
        The outputs of all images, and the states [1 + layers, images, S, D] of the special tokens before
        the first layer and after each layer.

    Raises:
        ValueError: if the states are not finite.
    """
    num_special = model.config.token_layout.num_prefix_tokens
    states = []

    def run(pixel_values: Tensor) -> Any:
        # Accelerate replaces `forward` of a model by one in the precision of a run
        outputs = type(model).forward(model, pixel_values, output_hidden_states=True)
        check_finite(outputs.hidden_states)
        special = [each[:, :num_special] for each in outputs.hidden_states]
        states.append(torch.stack(special).float().cpu())
        return outputs

    return gather_outputs(model, batches, run), torch.cat(states, dim=1)


def check_finite(states: Iterable[Tensor]) -> None:
    """Raise ValueError if any hidden state is not finite: a mean of them would be no measurement."""
    if not all(each.isfinite().all() for each in states):
        raise ValueError(
            "The hidden states of the model are not finite. Check the weights, or load them in float32."
        )


def gather_outputs(
    model: Any, batches: Iterable[ImageBatch], run: Callable[[Tensor], Any]
) -> Outputs:
    """Collect the outputs for all images, on the CPU.

    Args:
        model: a classifier or an encoder, in evaluation mode.
        batches: batches of images.
        run: function from images [B, C, H, W] to the output of the model.
    """
    collected: Outputs = {}
    for _, outputs in pass_over_images(run, batches, model.device):
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
    unread = {kind.group for kind in TOKEN_KINDS if kind.twin_of is None}
    features = {name: states[:, tokens] for name, tokens in layout.items() if name not in unread}
    return {name: vectors for name, vectors in features.items() if vectors.shape[1]}


def get_target(config: ViTCLSConfig) -> Target:
    """What the heads of a model predict: one label per image, or several."""
    return SeveralLabelsTarget if is_multi_label(config) else OneLabelTarget


def collect_labels(batches: Batches, config: ViTCLSConfig) -> dict[str, Tensor]:
    """Collect the labels [N, columns] of each task of which any is known.

    Unknown labels are IGNORED_LABEL.
    """
    if batches[0].labels is None:
        return {}
    columns = torch.cat([batch.labels.view(len(batch.labels), -1) for batch in batches])
    labels = {"": columns}
    if config.tasks:
        labels = dict(zip(config.task_labels(), columns.split(1, dim=1), strict=True))
    return {task: each for task, each in labels.items() if (each != IGNORED_LABEL).all(dim=1).any()}
