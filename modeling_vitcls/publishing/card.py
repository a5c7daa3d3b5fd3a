"""The card (README.md) of a model folder, rendered from its files with one template per kind.

    write_card(ModelFolder(path))                   README.md for the name of the folder
    render_card(ModelFolder(path), "me/mine")       the text for a repository, as a push publishes it

    classifier.md.j2    a fine-tuned classifier: results.json and config.resolved.yaml of `vitcls finetune`
    conversion.md.j2    the output of `vitcls convert`, in both directions: parity_report.json
    model.md.j2         any other vitcls model, such as a merged adapter or a model saved by hand

The templates, with all text, are in templates/. Sections without values are omitted. Values of the
files are escaped, because a folder may have been downloaded. A card that was edited is never replaced:
the last line of a generated card contains a digest of the card.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, TemplateError
from markupsafe import Markup

from ..conversion.to_transformers import find_transformers_class
from ..conversion.weight_rules import ConversionError
from ..evaluation.token_effects import describe_change
from ..frozen.findings import CARD, describe_findings
from ..frozen.linear_probe import describe_candidate
from ..hub.loading import split_revision
from ..hub.model_code import describe_code
from ..hub.model_files import (
    CARD_FILE,
    CONFIG_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    SAMPLE_IMAGES_FILE,
)
from ..hub.model_folder import ModelFolder
from ..hub.provenance import Provenance
from ..inference.stated_result import (
    build_class_tables,
    build_metric_table,
    format_name,
    format_percent,
    format_small_percent,
    list_metrics,
    state_addition,
)
from ..inference.token_names import SINGLE_TOKEN_NAMES, count_tokens
from ..model.configuration_vitcls import MIN_TRANSFORMERS_VERSION
from ..runtime.errors import format_error, format_name_list
from ..runtime.files import replace_control_characters, write_text
from ..version import __version__
from .card_parts import is_edited, sign


TAGS = ("vision", "vit", "vitcls")
MAX_LISTED_CLASSES = 50


# Cards --------------------------------------------------------------------------------------------


def write_card(folder: ModelFolder | Path | str, name: str | None = None) -> None:
    """Write the card of a model folder, README.md. A card that a person wrote or edited is kept.

    Args:
        folder: The folder.
        name: Id of the repository, for the title and the code. Default: the name of the folder.

    Raises:
        ValueError: As in `render_card`, or if the folder does not contain a model.

    Examples:
        >>> from modeling_vitcls import write_card
        >>> write_card("runs/photos", "ann/photos")  # then: hf upload ann/photos runs/photos
    """
    if not isinstance(folder, ModelFolder):
        folder = ModelFolder(Path(folder))
    if not has_edited_card(folder):
        write_text(folder.path / CARD_FILE, render_card(folder, name))


def has_edited_card(folder: ModelFolder) -> bool:
    """Check whether a person wrote or edited the card of a folder."""
    file = folder.path / CARD_FILE
    return file.is_file() and is_edited(file.read_text(encoding="utf-8"))


def render_card(
    folder: ModelFolder,
    name: str | None = None,
    hidden_files: Collection[str] = (),
    license_id: str | None = None,
    code_from: str | None = None,
) -> str:
    """Write the text of a card from the files of a model folder.

    Args:
        folder: The folder.
        name: Id of the repository. Default: the name of the folder.
        hidden_files: Files of the folder that the card must not show, because they are not
            published.
        license_id: License of the weights, such as apache-2.0. Default: the license of the
            initial weights.
        code_from: `ID@COMMIT` of the repository with the code, if it is not next to the weights.

    Raises:
        ValueError: If the initial weights have another license, or a file of the folder has values
            of other types than this package writes.
    """
    # As it was given; of an absolute path, two parts, as `photos` alone may be the photos
    name = name or replace_control_characters("/".join(folder.path.parts[-2:]) or folder.name)
    # First, because it may raise: a card must not be written under a license that the weights do
    # not have.
    license_source = get_license_source(folder, license_id)
    # A report and images of other weights are not shown.
    shown_files = [
        file
        for file in (REPORT_FILE, SAMPLE_IMAGES_FILE)
        if folder.results and (folder.path / file).is_file() and file not in hidden_files
    ]
    code_repository, code_revision = split_revision(code_from or folder.code_repository or "")
    variables = {
        "name": name,
        "native_class": Markup(describe_native_class(folder)),
        "code_repository": code_repository,
        "code_revision": code_revision or Markup("<commit hash of the code>"),
        "shown_files": shown_files,
        "license": license_source,
        "added_classes": list_added_classes(folder),
        **{
            name: getattr(folder, name)
            for name in (
                "additions",
                "auto_class",
                "certificate",
                "config",
                "exports",
                "is_native",
                "num_parameters",
                "other_code",
                "parity_report",
                "provenance",
                "results",
                "shareable_flags",
                "teacher_provenance",
            )
        },
    }

    template = "model"
    if folder.parity_report:
        # A conversion may carry the results of the run that trained its source, so it is asked for
        # first.
        template = "conversion"
    elif "num_processes" in folder.results and folder.flags:
        template = "classifier"
    try:
        classifier = folder.results.get("frozen", {})
        variables |= {
            "findings": describe_findings(classifier.get("findings", {}), CARD),
            "card_data": Markup(
                ModelCardData(**build_metadata(folder, name, license_source)).to_yaml()
            ),
            "metrics": build_metric_table(folder.results, format_name)["Metrics"],
            "class_tables": build_class_tables(folder.results, format_name),
        }
        return sign(TEMPLATES.get_template(f"{template}.md.j2").render(variables))
    except (TypeError, AttributeError, LookupError, OverflowError, TemplateError) as error:
        raise ValueError(
            f"cannot write the card of {folder.source} from its {RESULTS_FILE} and {CONFIG_FILE}: "
            f"{format_error(error)}. Copy these files again"
        ) from error


# Metadata -----------------------------------------------------------------------------------------


def build_metadata(folder: ModelFolder, name: str, license_source: Provenance) -> dict[str, Any]:
    """Collect the header of the card as keyword arguments of ModelCardData."""
    results = folder.results
    base_model = folder.provenance.base_model if folder.provenance else None
    # On the Hub, a model is a finetune, adapter, merge or quantized version of another. There is no
    # word for an exact copy.
    relation = "finetune" if base_model and not folder.parity_report else None
    is_classifier = "ForImageClassification" in folder.architecture
    dataset: Any = folder.hub_dataset if results else None
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification" if is_classifier else "image-feature-extraction",
        "tags": [tag for tag in TAGS if tag != "vitcls" or not folder.is_native],
        "datasets": [dataset] if dataset else None,
        "base_model": base_model,
        "base_model_relation": relation,
        **license_source.license_metadata,
    }

    # A dataset type is required in the model index, and the only valid types are datasets on the
    # Hub. Results from before classes were added, or on images that trained the encoder, are left
    # out.
    is_comparable = "num_seen_images" not in results and not list_added_classes(folder)
    measured = list(list_metrics(results))
    if measured:
        metadata["metrics"] = ["accuracy" if "accuracy" in results else "mean_average_precision"]
    if measured and dataset and is_comparable:
        metadata["model_name"] = name
        metadata["eval_results"] = [
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=results["dataset"],
                dataset_split=results.get("held_out_split"),
                dataset_args={"num_images": results["num_images"]},
                metric_type=key,
                metric_name=label,
                metric_value=round(metrics[key], 6),
            )
            for metrics, key, label in measured
        ]
    return metadata


def list_added_classes(folder: ModelFolder) -> list[str]:
    """List the classes that were added after the results of the run were measured."""
    records = folder.additions.values()
    return [
        label for record in records if record["kind"] == "classes" for label in record["labels"]
    ]


# License ------------------------------------------------------------------------------------------


def get_license_source(folder: ModelFolder, license_id: str | None) -> Provenance:
    """Find whose license applies: the initial weights' license, if it is known.

    A license also applies to the weights that are derived from the licensed ones.
    """
    initial = folder.provenance
    if initial is None or initial.license is None:
        return Provenance("", license=license_id)
    if license_id not in (None, initial.license):
        raise ValueError(
            f"`license={license_id!r}`: the initial weights of {folder.path} are under the license "
            f"{initial.license_label}, which applies to the model, too. Remove `license`"
        )
    return initial


# Templates ----------------------------------------------------------------------------------------


def escape_text(value: Any) -> Any:
    """Escape a text for Markdown, on one line. Text that is Markdown already is marked `safe`."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*|\[\]<>])", r"\\\1", replace_control_characters(value))


def format_places(config: Any, group: str) -> str:
    """Format the places of a group of tokens in the sequence, such as `1 to 4`."""
    layout = config.token_layout
    slices: dict[str, slice] = dict(layout.items())
    places = range(layout.get_num_tokens(*config.grid_size))[slices[group]]
    return str(places[0]) if len(places) == 1 else f"{places[0]} to {places[-1]}"


def describe_native_class(folder: ModelFolder) -> str:
    """Say which class of transformers has the outputs of a model, or what prevents it; empty for one.

    The lines are of the model's configuration: `vitcls push --native` compares the outputs.
    """
    if folder.config is None:
        return ""
    try:
        target, _, resampling = find_transformers_class(folder.architecture, folder.config)
    except ConversionError as error:
        return (
            f"No class of transformers computes the same, so the model requires its code: {error}."
        )
    sizes = " at the native image size" if resampling else ""
    distance = ", without `distance`" if folder.config.class_statistics else ""
    return (
        f"transformers' `{target}` computes the same{sizes}{distance}: `vitcls push --native` publishes it "
        "in this class, which requires no `trust_remote_code`."
    )


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")), finalize=escape_text
)
TEMPLATES.filters |= {
    "code": lambda name: Markup(format_name(name)),
    "text": escape_text,
    "percent": format_percent,
    "number": "{:,}".format,
    "small_percent": format_small_percent,
    "class_list": lambda names: Markup(
        format_name_list(list(map(format_name, names)), MAX_LISTED_CLASSES)
    ),
    "describe_code": describe_code,
    "candidate": describe_candidate,
    "change": describe_change,
    "addition_result": state_addition,
    "token_counts": count_tokens,
    "token_places": format_places,
}
TEMPLATES.globals |= {
    "version": __version__,
    "min_transformers": MIN_TRANSFORMERS_VERSION,
    "token_names": SINGLE_TOKEN_NAMES | {"patches": "patch"},
}
