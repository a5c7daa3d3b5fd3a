"""The model card of a pre-trained encoder: README.md of the folder that pre-training wrote.

The text is in model_cards/encoder.md.j2; a classifier's card is in card.py.
"""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..configuration_vitcls import ViTCLSConfig
from .card import facts_of_any_model, metadata_of_any_model
from .card_training import TEMPLATE
from .origin import Origin


ONLY_WITH_LABELS = ("label_smoothing", "class_balance", "trainable", "mixup", "cutmix")  # flags of both scripts


def build_encoder_card(
    name: str,
    config: ViTCLSConfig,
    results: dict[str, Any],
    flags: dict[str, Any],
    origin: Origin | None = None,
    pictures: dict[str, str] | None = None,
) -> ModelCard:
    """The card of an encoder that was pre-trained by masked image modelling.

    Args:
        name: of the model: its id on the Hub, or its folder's name.
        config: its configuration.
        results: what results.json holds.
        flags: the run's flags, as in config.resolved.yaml.
        origin: of the model that it started from; None for a preset.
        pictures: name -> path in the folder, as `write_pictures` returns them.
    """
    used = {flag: value for flag, value in flags.items() if flag not in ONLY_WITH_LABELS}
    return ModelCard.from_template(
        ModelCardData(
            **metadata_of_any_model(flags, origin),
            pipeline_tag="image-feature-extraction",
            tags=["vision", "vit", "vitcls", "masked-image-modeling"],
        ),
        template_path=str(TEMPLATE.with_name("encoder.md.j2")),
        **facts_of_any_model(name, config, results, used, origin, None, pictures or {}, "pretrain.py"),
    )
