"""Convert a model, and write it to a folder with its processor, parity report and license.

If an error occurs, nothing is written. The card is written afterwards, from the folder.

report = convert_checkpoint("timm:vit_base_patch14_reg4_dinov2", Path("converted"))
report = convert_to_native("runs/mine", Path("native"))    # a class of transformers
"""

import pickle
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path

import transformers

from ..hub.connection import iter_causes
from ..hub.model_files import (
    CONFIG_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    hash_settings,
    hash_weights,
)
from ..hub.model_folder import ModelFolder, open_vitcls
from ..model.modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, ViTCLSPreTrainedModel
from ..runtime.files import write_json
from ..runtime.staging import create_output_folder
from .parity_report import Report, write_parity_report
from .processors import apply_processor, check_processor, select_settings
from .source_files import FileSource
from .source_models import SourceModel, TimmSource, TransformersSource, convert_source
from .to_transformers import build_transformers_model, find_transformers_class
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
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        return write_parity_report(
            folder, source_name, source, model, preprocessing=preprocessing, is_native=False
        )


def convert_to_native(source_name: str, output: Path) -> Report:
    """Convert a vitcls model, a folder or Hub id, to a class of transformers, and write its folder.

    The folder also has the results of the run that trained the model. The errors are as in
    `convert_checkpoint`.

    Unless the model is a `ViTCLSForImageClassification`, only the encoder is converted. If no
    transformers class has the same outputs for images of any size, a class with the same outputs at
    the native size is sufficient.
    """
    with create_output_folder(output) as output_folder:
        folder = open_vitcls(source_name)
        classifier = ViTCLSForImageClassification
        model_class = classifier if folder.architecture == classifier.__name__ else ViTCLSModel
        model: ViTCLSPreTrainedModel = folder.load(model_class)

        target, config, resampling = find_transformers_class(type(model).__name__, model.config)
        build_transformers_model(target, config, model).save_pretrained(output_folder)
        if folder.has_processor:
            processor = folder.load_processor()
            native_processor = transformers.ViTImageProcessor(**select_settings(processor))
            preprocess = partial(apply_processor, native_processor)
            check_processor(processor, preprocess, type(processor).__name__)
            native_processor.save_pretrained(output_folder)
        copy_results(folder, output_folder)  # With the hash of the processor's settings

        # The files are compared, not the model in memory: a weight that was not written would not
        # be missed there.
        native = TransformersSource.from_name(str(output_folder))
        native.model.float()
        if resampling:
            native.native_size_reason = (
                "at other image sizes, the two models resample position embeddings differently"
            )
        if not folder.has_processor:
            native.notes.append("neither model has an image processor")
        if model.config.class_statistics:
            native.notes.append(
                "the classes of transformers return no `distance`, so no photo is `unknown`"
            )
        return write_parity_report(
            output_folder,
            source_name,
            native,
            model,
            preprocessing={"assumed_because": ""},
            is_native=True,
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


def load_source(source_name: str, family: str | None = None) -> SourceModel:
    """Load a model of another project: `timm:NAME`, `transformers:PATH_OR_ID` or a state-dict file.

    An id may end with `@REVISION`, and a file may have a family. Raise ValueError or OSError if the
    source does not exist, is not supported, or could run code when it is read.
    """
    project, _, name = source_name.partition(":")
    file = Path(source_name)
    # A name with a suffix is taken for a file even if there is none, so that the error names the
    # file.
    is_file = file.is_file() or (project not in SOURCE_CLASSES and bool(file.suffix))
    architecture: str | None = None
    if project == "timm" and ":" not in name and "@" in name and not is_file:
        architecture, _, path = name.partition("@")
        file = Path(path)
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
        if is_file or architecture:
            return FileSource.from_file(file, family, architecture)
        return SOURCE_CLASSES[project].from_name(name)
    except Exception as error:  # The projects and their downloads raise errors of many types
        if file.is_file() and (file.suffix == ".onnx" or file.with_name(CONFIG_FILE).is_file()):
            raise ConversionError(
                f"{file} is one file of a model. Set `model` to the folder that contains its "
                f"{CONFIG_FILE}"
            ) from error
        if any(
            isinstance(cause, pickle.UnpicklingError) or "TorchScript archives" in str(cause)
            for cause in iter_causes(error)
        ):
            raise ConversionError(
                f"{source_name} is no file of weights, or a TorchScript archive or a pickle with objects "
                "other than tensors, and loading it could run code. Save its state dict as safetensors"
            ) from error
        raise
