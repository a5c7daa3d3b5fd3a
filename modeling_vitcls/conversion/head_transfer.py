"""What becomes of the source's classifier: kept, replaced by a new one, or dropped; always by the caller's choice.

Every converter ends here, with the encoder's and the classifier's weights by our names.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Literal

import torch
from transformers.initialization import no_init_weights

from ..configuration_vitcls import ViTCLSConfig
from ..modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, ViTCLSPreTrainedModel
from .weight_rules import ConversionError, load_converted


Weights = Mapping[str, torch.Tensor]
ClassifierChoice = Literal["keep", "new", "drop"]


def assemble(
    config: ViTCLSConfig,
    encoder: Weights,
    head: Weights | None,
    classifier: ClassifierChoice = "keep",
    num_labels: int | None = None,
    with_pooler: bool = True,
) -> ViTCLSPreTrainedModel:
    """Build the model of converted weights, in eval mode, with their dtype and on their device.

    Args:
        encoder: weights of `ViTCLSModel`.
        head: weights of `ViTCLSForImageClassification` besides the encoder's; None if the source has no classifier.
        classifier: "keep" the source's (a source without one gives a `ViTCLSModel`, or a new classifier where
            `num_labels` is given), start a "new" one, or "drop" it for a `ViTCLSModel`.
        num_labels: of a new classifier.
        with_pooler: whether a `ViTCLSModel` pools.

    Raises:
        ConversionError: for a choice that the source does not allow, or weights that do not fit; they are listed.
    """
    wants_new = is_new(classifier, num_labels, None if head is None else config.num_labels)
    if num_labels is not None:
        config.num_labels = num_labels
    classifies = wants_new or (classifier == "keep" and head is not None)
    model: ViTCLSPreTrainedModel
    with nullcontext() if wants_new else no_init_weights():
        if classifies:
            model = ViTCLSForImageClassification(config)
        else:
            model = ViTCLSModel(config, add_pooling_layer=with_pooler)
    weights = dict(encoder)
    if classifies:
        fresh = {name: weight for name, weight in model.state_dict().items() if not name.startswith("vitcls.")}
        weights = {f"vitcls.{name}": weight for name, weight in encoder.items()}
        weights |= fresh if wants_new else dict(head or {})
    like = encoder["embeddings.patch_embeddings.projection.weight"]
    model.to(device=like.device, dtype=like.dtype)  # type: ignore[call-arg]  # transformers wraps `to` untyped
    return load_converted(model, weights)


def split_classifier(weights: Weights) -> tuple[Weights, Weights | None]:
    """Weights by our names -> the encoder's, the classifier's (None if there is none)."""
    head = {name: weight for name, weight in weights.items() if name.partition(".")[0].endswith("classifier")}
    return {name: weight for name, weight in weights.items() if name not in head}, head or None


def is_new(classifier: str, num_labels: int | None, source_labels: int | None) -> bool:
    """Whether a new classifier is to be made; `source_labels` is None for a source without one.

    Raises:
        ConversionError: for contradictions.
    """
    if classifier not in ("keep", "new", "drop"):
        raise ConversionError(f'classifier={classifier!r}: choose "keep", "new" or "drop"')
    if classifier == "drop":
        if num_labels is not None:
            raise ConversionError(f'classifier="drop" and num_labels={num_labels} contradict each other: choose one')
        return False
    if classifier == "new":
        if num_labels is None and source_labels is None:
            raise ConversionError('classifier="new" on a source without classifier: give num_labels')
        return True
    if source_labels is None:
        return num_labels is not None
    if num_labels not in (None, source_labels):
        raise ConversionError(
            f'the source\'s classifier has {source_labels} labels and num_labels={num_labels}: pass classifier="new" '
            'to start a new one, or "drop" to convert the encoder alone'
        )
    return False
