"""Build the card of a converted model: source, differences from the source, license and usage.

The template of the card is model_cards/conversion.md.j2. The differences come from the parity report. The source and
its license come from hub/provenance.py.
"""

import shlex
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from ..configuration_vitcls import ViTCLSConfig
from ..hub.provenance import CONVERTED_WEIGHTS_TEXTS, Provenance, WeightsLicense
from ..publishing.card import describe_token_layout, format_token_layout
from ..publishing.card_sections import CITATION, build_use_section, render_card


if TYPE_CHECKING:
    from .parity_report import ParityReport


CLASSIFIER_SENTENCES = {
    "kept": "The model has the classifier of the source, with {num_labels} labels.",
    "new": "The classifier, with {num_labels} labels, is new and untrained. Fine-tune the model before you use it.",
    "dropped": "The classifier of the source was dropped. The model contains only the encoder.",
    "none": "The model is an encoder, like its source.",
}


def build_conversion_card(
    name: str,
    config: ViTCLSConfig,
    num_parameters: int,
    report: "ParityReport",
    provenance: Provenance,
    images: dict[str, str] | None = None,
    is_native: bool = False,
) -> ModelCard:
    """Build the card of a converted model.

    `name` is the folder name of the model, which `vitcls push` replaces with the repository name. `images` contains
    paths relative to the folder, as returned by `write_card_images`. `is_native` is True for a transformers model.
    """
    sequence_length = config.token_layout.get_num_tokens(*config.grid_size)
    layout = {group: len(range(sequence_length)[token_slice]) for group, token_slice in config.token_layout.items()}
    # whether the base model in the card's header is the source itself, rather than the base model of the source
    is_copy = isinstance(provenance.base_model, str) and provenance.name in (provenance.base_model, report.source)
    return render_card(
        "conversion",
        build_metadata(report, provenance, is_native),
        is_native=is_native,
        name=name,
        config=config,
        num_parameters=num_parameters,
        report=report,
        random_init=report.random_init,
        source=describe_source(report, provenance, is_copy),
        layout=format_token_layout(layout),
        layout_description=describe_token_layout(layout),
        images=images or {},
        is_copy=is_copy,
        sequence_length=sequence_length,
        image_size=" x ".join(map(str, config.image_height_width)),
        classifier=CLASSIFIER_SENTENCES[report.classifier].format(num_labels=config.num_labels),
        preprocessing=describe_preprocessing(report),
        use=build_use_section(
            name,
            report.model_class,
            has_pipeline=report.classifier == "kept" and not report.random_init,
            finetune_dataset=None if is_native else "path/to/images",
            is_native=is_native,
        ),
        citation=CITATION,
        license_text=WeightsLicense(CONVERTED_WEIGHTS_TEXTS, provenance, has_code=not is_native),
        command=build_command(name, report, config),
    )


def build_metadata(report: "ParityReport", provenance: Provenance, is_native: bool) -> ModelCardData:
    """Build the YAML header of the card. For random weights, the header has no base model and no license."""
    # `base_model_relation` is not set, because the Hub has no relation for exact copies.
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if report.classifier == "kept" else "image-feature-extraction",
        tags=["vision", "vit", *([] if is_native else ["vitcls"])],
        base_model=None if report.random_init else provenance.base_model,
        **({} if report.random_init else provenance.license_metadata),
    )


def describe_source(report: "ParityReport", provenance: Provenance, is_copy: bool) -> str:
    """Return the name of the source in Markdown, with a link (if it is on the Hub) and the commit (if known)."""
    name = f"`{provenance.name}`"
    if is_copy:
        name = f"[{name}](https://huggingface.co/{provenance.base_model})"
    return f"{name} (at commit `{report.source_revision}`)" if report.source_revision else name


def describe_preprocessing(report: "ParityReport") -> str:
    """Return sentences about the settings of the image processor and the largest pixel difference."""
    preprocessing = report.preprocessing
    if preprocessing["assumed_because"]:
        return (
            f"The settings of the image processor are assumed, because {preprocessing['assumed_because']}. Check "
            "these settings before you use the model."
        )
    difference = preprocessing["largest_difference_in_grey_levels"]
    return (
        f"The image processor has the settings of {preprocessing['origin']}. On test images, the pixel values "
        f"differ from those of the source by at most {difference:.2g} gray levels (0 to 255)."
    )


def build_command(name: str, report: "ParityReport", config: ViTCLSConfig) -> str:
    """Build the command line that reproduces the conversion, with the commit of the source if it is known."""
    source = report.source
    if report.source_revision:
        source = f"{source.partition('@')[0]}@{report.source_revision}"
    flags = ["--source", source, "--output", name]
    flags += ["--random-init"] if report.random_init else []
    flags += ["--family", report.family] if report.family else []
    flags += ["--classifier", "new", "--num-labels", str(config.num_labels)] if report.classifier == "new" else []
    flags += ["--classifier", "drop"] if report.classifier == "dropped" else []
    return f"vitcls convert {shlex.join(flags)}"
