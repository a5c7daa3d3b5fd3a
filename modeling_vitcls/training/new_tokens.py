"""What the special tokens of a run with steps are worth, measured on the held-out images.

    results.json["tokens"][group]
        verdict, num_images, accuracy, loss      of the model as it is saved
        hidden, content                          as in `vitcls inspect` (evaluation/token_effects.py)
        without                                  of a group that a head reads: a model without it

All is computed in float32: rounding to bf16 moves as many of 120 photos as four registers do.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.splits import TrainingData
from ..evaluation.evaluator import Predictions
from ..evaluation.token_effects import (
    EFFECT_TITLES,
    Change,
    Effect,
    TokenSet,
    collect_labels,
    compare,
    describe_change,
    gather_outputs,
    judge,
    measure_effects,
    read_batches,
)
from ..frozen.linear_probe import LinearProbe
from ..inference.image_pass import ImageBatch
from ..inference.interventions import hide, list_groups
from ..inference.token_names import SINGLE_TOKEN_NAMES
from ..model.configuration_vitcls import ViTCLSConfig
from .model import list_token_parameters
from .run_inputs import RunInputs


# Maximum number of held-out images, and of training images of a classifier that is fitted again
MAX_IMAGES = 500


@dataclass(frozen=True)
class MeasuredTokens:
    """What a run says of its tokens.

    Attributes:
        record: the field "tokens" of results.json.
        losses: columns of predictions.parquet, the loss of each image without a group.
        text: a line for each group.
    """

    record: dict[str, Any]
    losses: dict[str, np.ndarray]
    text: str | None


@torch.no_grad()
def measure_tokens(
    inputs: RunInputs,
    data: TrainingData,
    predictions: Predictions | None,
    new_tokens: Mapping[str, Sequence[bool]],
) -> MeasuredTokens:
    """Measure what the special tokens of each group are worth; of a group that has grown, the new ones.

    An open gate is no evidence: noise at the rate of new tokens opens gates, too. Every process measures
    the same images.

    Args:
        inputs: of the run, with the trained model.
        data: images of the run. Training images serve a classifier without a group.
        predictions: of the held-out images; None without any, or for several tasks.
        new_tokens: which tokens of a parameter are new (`find_new_tokens`).

    Returns:
        Nothing in any field without predictions, for one special token, or for a sharded model.
    """
    model = inputs.model
    is_sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    if predictions is None or model.config.token_layout.num_prefix_tokens < 2 or is_sharded:
        return MeasuredTokens({}, {}, None)
    arguments = inputs.pass_arguments
    read = partial(
        read_batches,
        model,
        arguments["processor"],
        label_space=arguments["label_space"],
        batch_size=arguments["batch_size"],
    )
    rows = np.sort(np.random.default_rng(0).permutation(len(data.held_out))[:MAX_IMAGES])
    batches, _ = read(data.held_out.select(rows.tolist()))
    rows = rows[[index for batch in batches for index in batch.indices]]
    names = list_token_parameters(model)
    token_sets = []
    for group, members in list_groups(model.config).items():
        are_new = new_tokens.get(names[group], [True] * len(members))
        token_sets.append(TokenSet(group, group, list(compress(members, are_new))))

    def run(pixel_values: Tensor) -> Any:
        # Accelerate has replaced `forward` of this model by one in the precision of the run
        outputs: Any = type(model).forward(model, pixel_values)
        heads = {"": outputs.logits, "cls": outputs.cls_logits}
        return SimpleNamespace(logits=heads if model.distillation_classifier else {"": heads[""]})

    effects = measure_effects(model, token_sets, batches, run=run)
    labels = collect_labels(batches, model.config)[""]
    is_known = (labels >= 0).view(len(labels), -1).all(dim=1).numpy()
    record: dict[str, Any] = {}
    losses: dict[str, np.ndarray] = {}
    lines = []
    for tokens in token_sets:
        by_output = effects[tokens.group]
        changes = vars(by_output[""]) | {}
        if tokens.group == "distillation" and "cls" in by_output:
            changes["without"] = read_cls_head(by_output)
        elif tokens.group == "cls" and can_fit_without(model.config, tokens.indices):
            train, _ = read(data.train.draw(MAX_IMAGES))
            start, after = fit_without(model, tokens.indices, train, batches)
            changes["without"] = compare([*start], [*after], predictions.target, labels)

        hidden = changes["hidden"]
        absent = changes.get("without", hidden)
        number = hidden.losses.shape[1]
        assert hidden.is_right is not None, "held-out images have labels"
        verdict = judge(absent, changes["content"])
        record[tokens.group] = {
            "verdict": verdict,
            "num_images": number,
            "accuracy": float(hidden.is_right[0].mean()),
            "loss": float(hidden.losses[0].mean()),
        } | {name: change.build_record() for name, change in changes.items()}
        column = np.full(len(data.held_out), np.nan)
        column[rows[is_known]] = absent.losses[1]
        losses[f"loss_without_{tokens.group}"] = column[predictions.outputs.indices]
        texts = [
            f"{EFFECT_TITLES[name]} {describe_change(change.build_record(), number)}"
            for name, change in changes.items()
        ]
        title = SINGLE_TOKEN_NAMES[tokens.group]
        lines.append(f"{title} tokens: {verdict} ({'; '.join(texts)})")
    return MeasuredTokens({"tokens": record}, losses, "\n".join(lines))


# Without tokens that a head reads -----------------------------------------------------------------


def read_cls_head(effects: Mapping[str, Effect]) -> Change:
    """Compare a model with its CLS head alone, whose tokens do not see the distillation tokens."""
    both, cls = effects[""].hidden, effects["cls"].hidden
    assert both.is_right is not None and cls.is_right is not None, "held-out images have labels"
    return Change(
        np.stack([both.losses[0], cls.losses[1]]),
        int((both.is_right[0] != cls.is_right[1]).sum()),
        np.stack([both.is_right[0], cls.is_right[1]]),
    )


def list_read_cls(config: ViTCLSConfig) -> list[int]:
    """List the CLS tokens that the classifier reads, without weights of the pooler in between."""
    is_plain = config.pooled_activation is None and not config.pooled_norm
    if config.pooling not in ("cls", "cls_mean") or not is_plain:
        return []
    tokens = list(config.pooled_cls_tokens or range(config.num_cls_tokens))
    return tokens[:1] if config.cls_pooling == "first" else tokens


def can_fit_without(config: ViTCLSConfig, indices: Collection[int]) -> bool:
    """Check whether the classifier reads some of these CLS tokens, and something else."""
    read = set(list_read_cls(config))
    others = read - set(indices) or config.pooling == "cls_mean"
    return bool(read & set(indices) and others)


def fit_without(
    model: Any, indices: Sequence[int], train: list[ImageBatch], held_out: list[ImageBatch]
) -> list[Tensor]:
    """Fit the frozen classifier to the trained features, with some CLS tokens and without them.

    Without them, no token attends to them either.

    Returns:
        Two times the logits [N, labels] of the held-out images.
    """
    labels = collect_labels(train, model.config)[""].numpy()
    is_known = (labels >= 0).all(axis=1)
    fitted = []
    for hidden in ([], indices):
        kept = [index for index in list_read_cls(model.config) if index not in hidden]
        run = partial(pool_tokens, model.vitcls, kept)
        features = []
        for batches in (train, held_out):
            with hide(model, hidden):
                pooled = gather_outputs(model, batches, run=run)
            features.append(torch.stack(pooled["features"]).numpy())
        probe = LinearProbe().fit(features[0][is_known], labels[is_known])
        found = probe.predict_proba(features[1])
        probabilities = np.zeros((len(found), model.config.num_labels))
        probabilities[:, probe.classes_] = found  # A class without images has no column
        fitted.append(torch.from_numpy(probe.target_.to_logits(probabilities)))
    return fitted


def pool_tokens(encoder: Any, tokens: list[int], pixel_values: Tensor) -> Any:
    """Compute what a classifier of some CLS tokens reads: them and perhaps the mean of the patches."""
    config = encoder.config
    outputs = encoder(pixel_values, output_hidden_states=True)
    parts = []
    for layer in encoder.pooled_layer_indices:
        states = encoder.normalize(outputs.hidden_states[layer])
        parts.append(states[:, tokens].flatten(1))
        if config.pooling == "cls_mean":
            parts.append(states[:, config.token_layout.patches].mean(dim=1))
    return SimpleNamespace(logits={"features": torch.cat(parts, dim=1)})
