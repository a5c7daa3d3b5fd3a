"""A source converted, compared and written to a folder: model, image processor, certificate, card; all or nothing.

certificate = take_over("timm:vit_base_patch14_reg4_dinov2", Path("converted"))
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from ..hub.local_paths import check_output_is_empty, resolve_name, strip_folders
from ..hub.provenance import Provenance, find_provenance
from ..modeling_vitcls import ViTCLSForImageClassification, ViTCLSPreTrainedModel
from ..system import get_versions
from .conversion_card import build_conversion_card
from .head_transfer import ClassifierChoice
from .parity_report import LIMIT, Certificate, compare, hashes
from .source_models import Source, load_source
from .weight_rules import ConversionError


# Folder, model, image processor, results -> name of each image and its path from the folder.
DrawImages = Callable[[Path, ViTCLSPreTrainedModel, Any, dict[str, Any]], dict[str, str]]


def take_over(
    source_name: str,
    output: Path,
    random_init: bool = False,
    classifier: ClassifierChoice = "keep",
    num_labels: int | None = None,
    draw_images: DrawImages | None = None,
) -> Certificate:
    """Write the converted model, its image processor, the certificate, the card and the source's licence to `output`.

    Args:
        source_name: `timm:NAME` or `transformers:PATH_OR_ID`; of an id `@REVISION` may follow.
        output: A folder that does not exist yet, or is empty.
        random_init: Give the source random values first; its trained weights are not needed.
        classifier: "keep" the source's, start a "new" one, or "drop" it.
        num_labels: Of a new classifier.
        draw_images: Draws the images of the card: `analysis.card_images.write_card_images`. Default: no images.

    Raises:
        ValueError, OSError: in one line; nothing is written then. For a source that is not there or not supported, a
            difference over the limit, or an `output` that is in use.
    """
    check_output_is_empty(output)
    source = load_source(source_name, random_init)
    model = converted(source, classifier, num_labels)
    outcome = what_became_of_the_classifier(source, model, classifier)
    comparisons, not_compared = compare(source, model, with_logits=outcome == "kept")
    preprocessing = source.preprocessing()
    with complete_or_nothing(output) as folder:
        model.save_pretrained(folder)
        preprocessing.processor.save_pretrained(folder)
        check_written(folder, model)
        certificate = Certificate(
            source=strip_folders(resolve_name(source.name)),
            source_revision=source.revision,
            source_class=type(source.model).__name__,
            random_init=random_init,
            model_class=type(model).__name__,
            classifier=outcome,
            limit=LIMIT,
            comparisons=comparisons,
            not_compared=not_compared,
            preprocessing=preprocessing.described(),
            versions=get_versions("timm"),
            sha256=hashes(folder),
            notes=source.notes,
        )
        certificate.save(folder)
        pictures = draw_images(folder, model, preprocessing.processor, {}) if draw_images else {}
        write_card(folder, output.resolve().name, model, certificate, find_provenance(source_name), pictures)
    return certificate


def write_card(
    folder: Path,
    name: str,
    model: ViTCLSPreTrainedModel,
    certificate: Certificate,
    origin: Provenance,
    pictures: dict[str, str],
) -> None:
    """README.md, and the text of the licence that goes with the weights; random ones have none."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    card = build_conversion_card(name, model.config, num_parameters, certificate, origin, pictures)
    card.save(folder / "README.md")
    if not certificate.random_init:
        origin.copy_license(folder)


def converted(source: Source, classifier: ClassifierChoice, num_labels: int | None) -> ViTCLSPreTrainedModel:
    """Our model, by way of float32, in the dtype of the source where that holds the encoder exactly."""
    saved_dtype = next(source.model.parameters()).dtype
    source.model.float()
    model = source.convert(classifier, num_labels)
    if all(torch.equal(weight.to(saved_dtype).float(), weight) for weight in model.base_model.state_dict().values()):
        model.to(dtype=saved_dtype)  # type: ignore[call-arg]  # transformers wraps `to` untyped
        return model
    source.notes.append(f"the weights are written in float32: {saved_dtype} would not hold them exactly")
    return model


def what_became_of_the_classifier(source: Source, model: ViTCLSPreTrainedModel, classifier: ClassifierChoice) -> str:
    """ "kept", "new", "dropped", or "none" where there never was one."""
    if isinstance(model, ViTCLSForImageClassification):
        return "kept" if source.has_classifier and classifier == "keep" else "new"
    return "dropped" if source.has_classifier else "none"


@contextmanager
def complete_or_nothing(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place in the end, or goes if anything fails."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]  # from the innermost
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            output.rmdir()
        partial.rename(output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for folder in made[1:]:
                folder.rmdir()
        raise


def check_written(folder: Path, model: ViTCLSPreTrainedModel) -> None:
    """Raise ConversionError unless the written model loads as it is, to the bit."""
    written = type(model).from_pretrained(folder).state_dict()
    for name, weight in model.state_dict().items():
        if not torch.equal(written[name], weight):
            raise ConversionError(f"the written weights differ from the converted ones: {name}")
