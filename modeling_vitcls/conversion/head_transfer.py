"""Keep, replace or drop the classifier of the source, as requested by the caller.

Every converter calls `build_model` with the converted weights of the encoder and of the classifier.
"""

from contextlib import nullcontext
from typing import Literal

from transformers.initialization import no_init_weights

from ..configuration_vitcls import ViTCLSConfig
from ..modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, ViTCLSPreTrainedModel
from .weight_rules import ConversionError, Weights, load_converted_weights


ClassifierChoice = Literal["keep", "new", "drop"]


def build_model(
    config: ViTCLSConfig,
    encoder: Weights,
    head: Weights | None,
    classifier: ClassifierChoice = "keep",
    num_labels: int | None = None,
    add_pooling_layer: bool = True,
) -> ViTCLSPreTrainedModel:
    """Build a model from converted weights, in eval mode, with the dtype and device of the weights.

    Args:
        encoder: Weights of `ViTCLSModel`.
        head: Weights of `ViTCLSForImageClassification` outside the encoder; None if the source has no classifier.
        classifier: "keep" the classifier of the source, create a "new" classifier, or "drop" the classifier and
            return a `ViTCLSModel`. "keep" creates a new classifier if the source has no classifier and `num_labels` is
            set.
        num_labels: Number of labels of a new classifier.
        add_pooling_layer: Whether a `ViTCLSModel` has a pooler.

    Raises:
        ConversionError: If the source does not allow the choice of classifier, or weights do not fit; the message
            lists the weights.
    """
    create_head = requires_new_head(classifier, num_labels, None if head is None else config.num_labels)
    if num_labels is not None:
        config.num_labels = num_labels
    weights = dict(encoder)
    model: ViTCLSPreTrainedModel
    with nullcontext() if create_head else no_init_weights():
        if create_head or (classifier == "keep" and head is not None):
            model = ViTCLSForImageClassification(config)
            if create_head:
                head = {n: weight for n, weight in model.state_dict().items() if not n.startswith("vitcls.")}
            weights = {f"vitcls.{name}": weight for name, weight in encoder.items()} | (head or {})
        else:
            model = ViTCLSModel(config, add_pooling_layer=add_pooling_layer)
    kernel = encoder["embeddings.patch_embeddings.projection.weight"]
    model.to(device=kernel.device, dtype=kernel.dtype)  # type: ignore[call-arg]  # transformers wraps `to` untyped
    return load_converted_weights(model, weights)


def split_classifier(weights: Weights) -> tuple[Weights, Weights | None]:
    """Split converted weights into the encoder's weights and the classifier's weights, None without a classifier."""
    head = {name: weight for name, weight in weights.items() if name.partition(".")[0].endswith("classifier")}
    return {name: weight for name, weight in weights.items() if name not in head}, head or None


def requires_new_head(classifier: str, num_labels: int | None, source_labels: int | None) -> bool:
    """Return whether to create a new classifier; `source_labels` is None for a source without a classifier.

    Raises:
        ConversionError: If the options contradict each other or the source.
    """
    if classifier not in ("keep", "new", "drop"):
        raise ConversionError(f'classifier={classifier!r} is not supported. Use "keep", "new" or "drop"')
    if classifier == "drop":
        if num_labels is not None:
            raise ConversionError(f'classifier="drop" and num_labels={num_labels} contradict each other. Set only one')
        return False
    if classifier == "new":
        if num_labels is None and source_labels is None:
            raise ConversionError('classifier="new" requires num_labels, because the source has no classifier')
        return True
    if source_labels is None:
        return num_labels is not None
    if num_labels not in (None, source_labels):
        raise ConversionError(
            f"the classifier of the source has {source_labels} labels, but num_labels={num_labels}. Set "
            'classifier="new" to create a new classifier, or "drop" to convert only the encoder'
        )
    return False
