"""Build the card of a converted model from its folder: source, differences from the source, license and usage.

The template of the card is model_cards/conversion.md.j2. All values come from parity_report.json (conversion) and
config.json.
"""

import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..configuration_vitcls import ViTCLSConfig
from ..files import read_json
from ..hub.loading import PARITY_REPORT_FILE
from ..hub.provenance import CARD_FILE, CONVERTED_WEIGHTS_TEXTS, Provenance, WeightsLicense
from .card import describe_token_layout, format_token_layout
from .card_sections import CITATION, build_use_section, render_card


Report = dict[str, Any]  # parsed parity_report.json, with the fields of `conversion.parity_report.ParityReport`

CLASSIFIER_SENTENCES = {
    "kept": "The model has the classifier of the source, with {num_labels} labels.",
    "new": "The classifier, with {num_labels} labels, is new and untrained. Fine-tune the model before you use it.",
    "dropped": "The classifier of the source was dropped. The model contains only the encoder.",
    "none": "The model is an encoder, like its source.",
}


def write_conversion_card(folder: Path, images: dict[str, str] | None = None) -> None:
    """Write the card of a converted model to its folder. `images` contains paths relative to the folder, as returned
    by `write_card_images`."""
    report = read_json(folder / PARITY_REPORT_FILE)
    config = None if report["is_native"] else ViTCLSConfig.from_pretrained(folder)
    build_conversion_card(folder.resolve().name, report, config, images).save(folder / CARD_FILE)


def build_conversion_card(
    name: str, report: Report, config: ViTCLSConfig | None, images: dict[str, str] | None = None
) -> ModelCard:
    """Build the card of a converted model.

    `name` is the folder name of the model, which `vitcls push` replaces with the repository name. `config` is None for
    a transformers model.
    """
    provenance, is_native = read_provenance(report), config is None
    token_variables: dict[str, Any] = {}
    if config is not None:
        sequence_length = config.token_layout.get_num_tokens(*config.grid_size)
        layout = {group: len(range(sequence_length)[tokens]) for group, tokens in config.token_layout.items()}
        token_variables = {
            "config": config,
            "sequence_length": sequence_length,
            "layout": format_token_layout(layout),
            "layout_description": describe_token_layout(layout),
        }
    # whether the base model in the card's header is the source itself, rather than the base model of the source
    is_copy = isinstance(provenance.base_model, str) and provenance.name in (provenance.base_model, report["source"])
    return render_card(
        "conversion",
        build_metadata(report, provenance),
        **token_variables,
        is_native=is_native,
        name=name,
        num_parameters=report["num_parameters"],
        report=report,
        random_init=report["random_init"],
        source=describe_source(report, provenance, is_copy),
        images=images or {},
        is_copy=is_copy,
        image_size=" x ".join(map(str, report["image_size"])),
        classifier=CLASSIFIER_SENTENCES[report["classifier"]].format(num_labels=report["num_labels"]),
        preprocessing=describe_preprocessing(report),
        use=build_use_section(
            name,
            report["model_class"],
            has_pipeline=report["classifier"] == "kept" and not report["random_init"],
            finetune_dataset=None if is_native else "path/to/images",
            is_native=is_native,
        ),
        citation=CITATION,
        license_text=WeightsLicense(CONVERTED_WEIGHTS_TEXTS, provenance, has_code=not is_native),
        command=build_command(name, report),
    )


def read_provenance(report: Report) -> Provenance:
    """Return the provenance of the source. The license files are in the folder of the converted model."""
    fields = report["provenance"] | {"license_files": tuple(map(Path, report["provenance"]["license_files"]))}
    return Provenance(**fields)


def build_metadata(report: Report, provenance: Provenance) -> ModelCardData:
    """Build the YAML header of the card. For random weights, the header has no base model and no license."""
    # `base_model_relation` is not set, because the Hub has no relation for exact copies.
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if report["classifier"] == "kept" else "image-feature-extraction",
        tags=["vision", "vit", *([] if report["is_native"] else ["vitcls"])],
        base_model=None if report["random_init"] else provenance.base_model,
        **({} if report["random_init"] else provenance.license_metadata),
    )


def describe_source(report: Report, provenance: Provenance, is_copy: bool) -> str:
    """Return the name of the source in Markdown, with a link (if it is on the Hub) and the commit (if known)."""
    name = f"`{provenance.name}`"
    if is_copy:
        name = f"[{name}](https://huggingface.co/{provenance.base_model})"
    commit = report["source_revision"]
    return f"{name} (at commit `{commit}`)" if commit else name


def describe_preprocessing(report: Report) -> str:
    """Return sentences about the settings of the image processor and the largest pixel difference."""
    preprocessing = report["preprocessing"]
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


def build_command(name: str, report: Report) -> str:
    """Build the command line that reproduces the conversion, with the commit of the source if it is known."""
    source, commit = report["source"], report["source_revision"]
    flags = ["--source", f"{source.partition('@')[0]}@{commit}" if commit else source, "--output", name]
    flags += ["--random-init"] if report["random_init"] else []
    flags += ["--family", report["family"]] if report["family"] else []
    flags += {
        "new": ["--classifier", "new", "--num-labels", str(report["num_labels"])],
        "dropped": ["--classifier", "drop"],
    }.get(report["classifier"], [])
    return f"vitcls convert {shlex.join(flags)}"
