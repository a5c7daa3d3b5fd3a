"""Convert a model, and write it to a folder with its processor, parity report and license.

If an error occurs, nothing is written. The card is written afterwards, from the folder.

report = convert_checkpoint("timm:vit_base_patch14_reg4_dinov2", Path("converted"))
report = write_native_model("runs/mine", Path("native"))    # a class of transformers
"""

import pickle
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import transformers

from ..hub.connection import iter_causes
from ..hub.local_paths import resolve_name, strip_folders
from ..hub.model_checks import check_is_vitcls
from ..hub.model_files import (
    CONFIG_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    hash_settings,
    hash_weights,
)
from ..hub.model_folder import ModelFolder, open_vitcls
from ..hub.provenance import find_provenance
from ..model.modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, ViTCLSPreTrainedModel
from ..runtime.files import write_json
from ..runtime.staging import create_output_folder
from ..runtime.system import get_versions
from .parity_report import Report, list_notes, write_parity_report
from .processors import (
    apply_processor,
    build_preprocessing_record,
    check_processor,
    get_processor_size,
    select_settings,
)
from .source_files import FileSource
from .source_models import SourceModel, TimmSource, TransformersSource, convert_source
from .to_transformers import convert_to_transformers
from .weight_rules import ConversionError


SOURCE_CLASSES: dict[str, type[SourceModel]] = {
    "timm": TimmSource,
    "transformers": TransformersSource,
}


def convert_checkpoint(source_name: str, output: Path, family: str | None = None) -> Report:
    """Convert a checkpoint, and write the folder of the model.

    The folder has the model, the image processor, the parity report and the license.

    Args:
        source_name: `timm:NAME[@FILE]`, `transformers:PATH_OR_ID` (an id may end with `@REVISION`),
            or a state-dict file.
        output: A folder that does not exist or is empty.
        family: Family of a state-dict file. By default, the family is detected from the file.

    Raises:
        ValueError, OSError: If the source does not exist or is not supported, the outputs differ by
            more than the limit, or `output` is not empty. The error message is a single line, and
            nothing is written.
    """
    # The folder is checked first, because the source may be a download of gigabytes.
    with create_output_folder(output) as folder:
        source = load_source(source_name, family)
        model = convert_source(source)
        processor, preprocessing = source.convert_preprocessing()
        processor_size = get_processor_size(processor)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        notes = source.notes + list_notes(source, model.config)
        return write_parity_report(
            folder,
            source,
            model,
            processor_size,
            provenance=find_provenance(source_name).copy_to(folder),
            source=strip_folders(resolve_name(source.name)),
            source_revision=source.revision,
            source_class=type(source.model).__name__,
            classifier="kept" if isinstance(model, ViTCLSForImageClassification) else "none",
            preprocessing=preprocessing,
            versions=get_versions("timm"),
            notes=notes,
            family=source.family,
            source_sha256=source.sha256,
        )


def load_source(source_name: str, family: str | None = None) -> SourceModel:
    """Load a model of another project: `timm:NAME`, `transformers:PATH_OR_ID` or a state-dict file.

    An id may end with `@REVISION`, and a file may have a family. Raise ValueError or OSError if the
    source does not exist, is not supported, or could run code when it is read.
    """
    project, _, name = source_name.partition(":")
    # A name with a suffix is taken for a file even if there is none, so that the error names the
    # file.
    is_file = Path(source_name).is_file() or (
        project not in SOURCE_CLASSES and bool(Path(source_name).suffix)
    )
    if family is not None and not is_file:
        raise ConversionError(
            f"`family={family!r}` requires a state-dict file, but the source is {source_name}"
        )
    if not is_file and (project not in SOURCE_CLASSES or not name):
        raise ConversionError(
            f"the source {source_name!r} is not supported. Use timm:NAME, "
            "transformers:PATH_OR_ID or a state-dict file"
        )

    try:
        if is_file:
            return FileSource.load(Path(source_name), family)
        return SOURCE_CLASSES[project].load(name)
    except Exception as error:  # The projects and their downloads raise errors of many types
        is_part = is_file and Path(source_name).with_name(CONFIG_FILE).is_file()
        if is_part or Path(source_name).suffix == ".onnx":
            raise ConversionError(
                f"{source_name} is one file of a model. Set `model` to the folder that contains its "
                f"{CONFIG_FILE}"
            ) from error
        causes = list(iter_causes(error))
        if any("TorchScript archives" in str(cause) for cause in causes):
            raise ConversionError(
                f"{source_name} is a TorchScript archive. Save its state dict"
            ) from error
        if any(isinstance(cause, pickle.UnpicklingError) for cause in causes):
            raise ConversionError(
                f"{source_name} is a pickle with objects other than tensors. Loading such objects "
                "could run code. Save the tensors as safetensors"
            ) from error
        raise


# Transformers classes -----------------------------------------------------------------------------


def write_native_model(source: str, output: Path) -> Report:
    """Convert a vitcls model to a transformers class, and write it to a folder.

    The folder has the model, image processor, parity report, license and the results of the
    training run.

    Unless the model is a `ViTCLSForImageClassification`, only the encoder is converted. If no
    transformers class has the same outputs for images of any size, a class with the same outputs at
    the native size is sufficient.

    Args:
        source: Folder or Hub id of a vitcls model.
        output: A folder that does not exist or is empty.

    Raises:
        ValueError, OSError: If the model does not exist, no transformers class supports the model,
            the outputs differ by more than the limit, or `output` is not empty. The error message
            is a single line.
    """
    with create_output_folder(output) as output_folder:
        folder = open_vitcls(source)
        # `open_vitcls` also opens a model that was converted to transformers before, and there is
        # nothing to convert in it.
        check_is_vitcls(source, folder.path)

        is_classifier = folder.architecture == ViTCLSForImageClassification.__name__
        model_class = ViTCLSForImageClassification if is_classifier else ViTCLSModel
        model: ViTCLSPreTrainedModel = folder.load(model_class)

        # A class with the same outputs at every size comes first. Only if there is none, one size
        # must do.
        native_size_reason = ""
        try:
            converted_model = convert_to_transformers(model)
        except ConversionError:
            converted_model = convert_to_transformers(model, native_size_only=True)
            native_size_reason = (
                "at other image sizes, the two models resample position embeddings differently"
            )
        converted_model.save_pretrained(output_folder)
        preprocessing, processor_size = write_processor(folder, output_folder)

        # The files are compared, not the model in memory: a weight that was not written would not
        # be missed there.
        reloaded_source = TransformersSource.load(str(output_folder))
        reloaded_source.model.float()
        reloaded_source.native_size_reason = native_size_reason
        copy_results(folder, output_folder)
        return write_parity_report(
            output_folder,
            reloaded_source,
            model,
            processor_size,
            is_native=True,
            provenance=find_provenance(source).copy_to(output_folder),
            source=strip_folders(resolve_name(source)),
            source_class=type(model).__name__,
            classifier="kept" if is_classifier and model.config.num_labels else "none",
            preprocessing=preprocessing,
            versions=get_versions(),
        )


def copy_results(folder: ModelFolder, output_folder: Path) -> None:
    """Copy the results and flags of the run that trained a model, for the card.

    Results of other weights are not copied.
    """
    if folder.results:
        # Results belong to weights by the hash of their file. These are the same numbers under
        # other names, in a file with another hash.
        hashes = {
            "weights_sha256": hash_weights(output_folder),
            "settings_sha256": hash_settings(output_folder),
        }
        write_json(output_folder / RESULTS_FILE, folder.results | hashes)
        with suppress(FileNotFoundError):
            shutil.copyfile(folder.path / RECIPE_FILE, output_folder / RECIPE_FILE)


def write_processor(
    folder: ModelFolder, output_folder: Path
) -> tuple[dict[str, Any], tuple[int, int] | None]:
    """Save the image processor of a model folder as a `ViTImageProcessor`.

    Return the `preprocessing` field of the parity report, and the size of the processed images.
    """
    if not folder.has_processor:
        return build_preprocessing_record("", "the model has no image processor"), None
    vitcls_processor = folder.load_processor()
    transformers.ViTImageProcessor(**select_settings(vitcls_processor)).save_pretrained(
        output_folder
    )
    preprocess = partial(
        apply_processor, transformers.ViTImageProcessor.from_pretrained(output_folder)
    )
    record = check_processor(vitcls_processor, preprocess, type(vitcls_processor).__name__)
    return record, get_processor_size(vitcls_processor)
