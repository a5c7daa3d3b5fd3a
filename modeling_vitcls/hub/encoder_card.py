"""The model card of a pre-trained encoder: README.md of the folder that pre-training wrote.

The text is in model_cards/encoder.md.j2; a classifier's card is in card.py.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..configuration_vitcls import ViTCLSConfig
from .card import TEMPLATE, facts_of_any_model, is_from_scratch


def build_encoder_card(name: str, config: ViTCLSConfig, results: dict[str, Any], flags: dict[str, Any]) -> ModelCard:
    """The card of an encoder that was pre-trained by masked image modelling.

    Args:
        name: of the model.
        config: its configuration.
        results: what results.json holds.
        flags: the run's flags, as in config.resolved.yaml.
    """
    from_scratch = is_from_scratch(flags)
    return ModelCard.from_template(
        ModelCardData(
            license="apache-2.0" if from_scratch else None,
            base_model=None if from_scratch or Path(flags["model"]).exists() else flags["model"],
            library_name="transformers",
            pipeline_tag="image-feature-extraction",
            tags=["vision", "vit", "vitcls", "masked-image-modeling"],
            datasets=None if Path(flags["dataset"]).exists() else [flags["dataset"]],
            model_name=name,
        ),
        template_path=str(TEMPLATE.with_name("encoder.md.j2")),
        **facts_of_any_model(name, config, results, flags),
    )
