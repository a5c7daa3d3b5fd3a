"""The short card of a model in training, on a branch of its own: what it is, and how to load it or go on with it.

The text is in model_cards/checkpoint.md.j2; the card of the result is in card.py.
"""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from .card_training import TEMPLATE
from .clean_process import AUTO_CLASSES
from .licences import Licence


SCRIPTS = {"ViTCLSForMaskedImageModeling": "pretrain.py"}  # that make models of this class; finetune.py the others


def checkpoint_card(
    repo_id: str,
    branch: str,
    step: int,
    architecture: str,
    metadata: dict[str, Any],
    licence: Licence,
    with_optimizer: bool,
) -> ModelCard:
    """The card of one checkpoint.

    Args:
        repo_id: `namespace/name`.
        step: optimiser steps done.
        architecture: the model's class, as its config.json says.
        metadata: licence, base model and data set, as keywords of ModelCardData.
        licence: of the weights.
        with_optimizer: whether what `--resume` needs is published, too.
    """
    return ModelCard.from_template(
        ModelCardData(**metadata, tags=["vision", "vit", "vitcls", "checkpoint"]),
        template_path=str(TEMPLATE.with_name("checkpoint.md.j2")),
        repo_id=repo_id,
        branch=branch,
        step=f"{step:,}",
        auto_class=AUTO_CLASSES.get(architecture, "AutoModel"),
        script=SCRIPTS.get(architecture, "finetune.py"),
        licence=licence,
        with_optimizer=with_optimizer,
    )
