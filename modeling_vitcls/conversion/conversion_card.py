"""The card of a converted model: what it was made from, how exact it is, under which licence, and how to load it.

The text is in model_cards/conversion.md.j2. The numbers are those of the certificate, which convert.py
measures; where a source and its license are named is in hub/provenance.py.
"""

import math
import shlex
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from ..configuration_vitcls import ViTCLSConfig
from ..hub.card import describe_token_layout, format_token_layout
from ..hub.card_training import TEMPLATE
from ..hub.card_use import CITATION, build_use_section
from ..hub.licenses import CONVERTED, WeightsLicense
from ..hub.provenance import Provenance


if TYPE_CHECKING:
    from .parity_report import Certificate


CLASSIFIER = {
    "kept": "The classifier of the source, of {num_labels} labels, is kept.",
    "new": "The classifier, of {num_labels} labels, is new and untrained: fine-tune the model before it is asked.",
    "dropped": "The classifier of the source was left out: this is its encoder alone.",
    "none": "The model is an encoder, as its source is.",
}


def build_conversion_card(
    name: str,
    config: ViTCLSConfig,
    num_parameters: int,
    certificate: "Certificate",
    origin: Provenance,
    pictures: dict[str, str] | None = None,
) -> ModelCard:
    """The card of a model that was taken over from another project.

    Args:
        name: of the model: its folder's, until a push puts the repository's in its place.
        config: of the converted model.
        num_parameters: of the converted model.
        certificate: what was measured.
        origin: of the source. Random weights have none of its licence.
        pictures: name -> path in the folder, as `write_card_images` returns them.
    """
    random_init = certificate.random_init
    sequence_length = config.token_layout.num_prefix_tokens + math.prod(config.grid_size)
    layout = {group: len(range(sequence_length)[tokens]) for group, tokens in config.token_layout.items()}
    return ModelCard.from_template(
        card_metadata(certificate, origin),
        template_path=str(TEMPLATE.with_name("conversion.md.j2")),
        name=name,
        config=config,
        num_parameters=num_parameters,
        certificate=certificate,
        random_init=random_init,
        source=described(certificate, origin),
        layout=format_token_layout(layout),
        layout_description=describe_token_layout(layout),
        images=pictures or {},
        is_copy=is_copy(certificate, origin),
        sequence_length=sequence_length,
        classifier=CLASSIFIER[certificate.classifier].format(num_labels=config.num_labels),
        preprocessing=preprocessing(certificate),
        use=build_use_section(
            name,
            certificate.model_class,
            has_pipeline=certificate.classifier == "kept" and not random_init,
            finetune_dataset="path/to/images",
        ),
        citation=CITATION,
        license_text=WeightsLicense(CONVERTED, origin),
        command=command(name, certificate, config),
    )


def card_metadata(certificate: "Certificate", origin: Provenance) -> ModelCardData:
    """The card's YAML header. Random weights are derived from nothing.

    No `base_model_relation`: the Hub knows `adapter`, `finetune`, `merge` and `quantized`, and a copy that keeps every
    number is none of them.
    """
    tags = ["vision", "vit", "vitcls"]
    can_classify = certificate.classifier == "kept"
    pipeline_tag = "image-classification" if can_classify else "image-feature-extraction"
    if certificate.random_init:
        return ModelCardData(library_name="transformers", pipeline_tag=pipeline_tag, tags=tags)
    return ModelCardData(
        base_model=origin.base_model,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=tags,
        **origin.license_metadata,
    )


def is_copy(certificate: "Certificate", origin: Provenance) -> bool:
    """Whether the base model in the header is the source itself, rather than what the source was made from."""
    return isinstance(origin.base_model, str) and origin.name in (origin.base_model, certificate.source)


def described(certificate: "Certificate", origin: Provenance) -> str:
    """The source in Markdown: a link where others can find it, and the commit where it is known."""
    name = f"`{origin.name}`"
    if is_copy(certificate, origin):
        name = f"[{name}](https://huggingface.co/{origin.base_model})"
    revision = certificate.source_revision
    return f"{name} (at commit `{revision}`)" if revision else name


def preprocessing(certificate: "Certificate") -> str:
    """Where the image processor is from, in a sentence or two."""
    facts = certificate.preprocessing
    if facts["assumed_because"]:
        return f"The image processor is ASSUMED, because {facts['assumed_because']}: check it before you rely on it."
    difference = facts["largest_difference_in_grey_levels"]
    return (
        f"The image processor has the settings of {facts['origin']}, and differs from it by at most {difference:.2g} "
        "of 255 grey levels on a check picture."
    )


def command(name: str, certificate: "Certificate", config: ViTCLSConfig) -> str:
    """The command line that makes the model again, from the same commit where that is known."""
    source = certificate.source
    if certificate.source_revision:
        source = f"{source.partition('@')[0]}@{certificate.source_revision}"
    flags = ["--source", source, "--output", name]
    flags += ["--random-init"] if certificate.random_init else []
    flags += ["--classifier", "new", "--num-labels", str(config.num_labels)] if certificate.classifier == "new" else []
    flags += ["--classifier", "drop"] if certificate.classifier == "dropped" else []
    return f"python scripts/convert.py {shlex.join(flags)}"
