"""Convert a source and write the model, image processor, parity report and card to a folder, or write nothing.

report = convert_checkpoint("timm:vit_base_patch14_reg4_dinov2", Path("converted"))
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
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..modeling_vitcls import ViTCLSForImageClassification, ViTCLSPreTrainedModel
from ..system import get_versions
from .conversion_card import build_conversion_card
from .head_transfer import ClassifierChoice
from .parity_report import LIMIT, ParityReport, compare_models, describe_policies, hash_files
from .source_files import FileSource
from .source_models import SourceModel, load_source
from .weight_rules import ConversionError


# Folder, model, image processor, results -> name of each image and its path from the folder.
DrawImages = Callable[[Path, ViTCLSPreTrainedModel, Any, dict[str, Any]], dict[str, str]]


def convert_checkpoint(
    source_name: str,
    output: Path,
    random_init: bool = False,
    classifier: ClassifierChoice = "keep",
    num_labels: int | None = None,
    draw_images: DrawImages | None = None,
    family: str | None = None,
) -> ParityReport:
    """Write the converted model, image processor, parity report, card and license of the source to `output`.

    Args:
        source_name: `timm:NAME`, `transformers:PATH_OR_ID`, optionally with `@REVISION`, or a file of weights.
        output: A folder that does not exist or is empty.
        random_init: Whether to fill the source with random values; its trained weights are then not required.
        classifier: "keep" the classifier of the source, create a "new" classifier, or "drop" the classifier.
        num_labels: Number of labels of a new classifier.
        draw_images: Function that draws the images of the card, such as `analysis.card_images.write_card_images`.
            Default: no images.
        family: Family of a state-dict file. Default: detected.

    Raises:
        ValueError, OSError: If the source does not exist or is not supported, a difference exceeds the limit, or
            `output` is not empty. The message has one line, and nothing is written.
    """
    check_output_is_empty(output)
    source = load_any_source(source_name, random_init, family)
    model = convert_source(source, classifier, num_labels)
    classifier_state = get_classifier_state(source, model, classifier)
    comparisons, not_compared = compare_models(source, model, with_logits=classifier_state == "kept")
    if not isinstance(source, FileSource):
        source.notes += describe_policies(source.name.partition(":")[0], model.config)
    preprocessing = source.convert_preprocessing()
    with create_folder(output) as folder:
        model.save_pretrained(folder)
        preprocessing.processor.save_pretrained(folder)
        check_saved_weights(folder, model)
        report = ParityReport(
            source=strip_folders(resolve_name(source.name)),
            source_revision=source.revision,
            source_class=type(source.model).__name__,
            random_init=random_init,
            model_class=type(model).__name__,
            classifier=classifier_state,
            limit=LIMIT,
            comparisons=comparisons,
            not_compared=not_compared,
            preprocessing=preprocessing.describe(),
            versions=get_versions("timm"),
            sha256=hash_files(folder.glob("*.safetensors")),
            notes=source.notes,
            family=source.family if isinstance(source, FileSource) else None,
            source_sha256=source.sha256 if isinstance(source, FileSource) else None,
        )
        report.save(folder)
        images = draw_images(folder, model, preprocessing.processor, {}) if draw_images else {}
        provenance = find_provenance(source_name)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        card = build_conversion_card(output.resolve().name, model.config, num_parameters, report, provenance, images)
        card.save(folder / "README.md")
        if not random_init:
            provenance.copy_license(folder)
    return report


def load_any_source(source_name: str, random_init: bool = False, family: str | None = None) -> SourceModel:
    """Load `timm:NAME`, `transformers:PATH_OR_ID`, or a state-dict file with an optional family.

    Raises:
        ValueError, OSError: If the source does not exist or is not supported; the message has one line.
    """
    if source_name.startswith(("timm:", "transformers:")) or not Path(source_name).suffix:
        if family is not None:
            raise ConversionError(f"--family {family} requires a state-dict file, but the source is {source_name}")
        return load_source(source_name, random_init)
    if random_init:
        raise ConversionError(f"--random-init requires timm:NAME or transformers:PATH_OR_ID, not {source_name}")
    return FileSource.load(Path(source_name), family)


def load_model_file(
    file: Path, family: str | None = None, classifier: ClassifierChoice = "keep", num_labels: int | None = None
) -> tuple[ViTCLSPreTrainedModel, ViTCLSImageProcessor, Provenance]:
    """Load a published state-dict file as a model, after a comparison with the reference of its family.

    Args:
        file: A .npz, .safetensors or PyTorch file; see source_files.py.
        family: Family of the weights. Default: detected.
        classifier: "keep" the classifier of the file, create a "new" classifier, or "drop" it.
        num_labels: Number of labels of a new classifier.

    Returns:
        The model in eval mode, its image processor, and its provenance, whose license is unknown.

    Raises:
        ValueError, OSError: If the file is not supported, or a difference exceeds the limit.
    """
    source = FileSource.load(file, family)
    model = convert_source(source, classifier, num_labels)
    compare_models(source, model, with_logits=get_classifier_state(source, model, classifier) == "kept")
    return model, source.convert_preprocessing().processor, Provenance(file.name)


def convert_source(source: SourceModel, classifier: ClassifierChoice, num_labels: int | None) -> ViTCLSPreTrainedModel:
    """Convert a source in float32; the model has the dtype of the source if that dtype is exact for the encoder."""
    saved_dtype = next(source.model.parameters()).dtype
    source.model.float()
    model = source.convert(classifier, num_labels)
    if all(torch.equal(weight.to(saved_dtype).float(), weight) for weight in model.base_model.state_dict().values()):
        model.to(dtype=saved_dtype)  # type: ignore[call-arg]  # transformers wraps `to` untyped
        return model
    source.notes.append(f"the weights are written in float32, because {saved_dtype} does not represent them exactly")
    return model


def get_classifier_state(source: SourceModel, model: ViTCLSPreTrainedModel, classifier: ClassifierChoice) -> str:
    """Return "kept", "new", "dropped", or "none" if neither the source nor the model has a classifier."""
    if isinstance(model, ViTCLSForImageClassification):
        return "kept" if source.has_classifier and classifier == "keep" else "new"
    return "dropped" if source.has_classifier else "none"


@contextmanager
def create_folder(output: Path) -> Iterator[Path]:
    """Create a temporary folder next to `output`, rename it to `output` at the end, or remove it after an error."""
    created = [folder for folder in (output, *output.parents) if not folder.exists()]  # innermost first
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
            for folder in created[1:]:
                folder.rmdir()
        raise


def check_saved_weights(folder: Path, model: ViTCLSPreTrainedModel) -> None:
    """Raise ConversionError if the loaded weights are not bit-identical to the weights of the model."""
    loaded = type(model).from_pretrained(folder).state_dict()
    for name, weight in model.state_dict().items():
        if not torch.equal(loaded[name], weight):
            raise ConversionError(f"the written weights differ from the converted weights: {name}")
