"""Convert a model, and write it to a folder with its processor, parity report and license.

If an error occurs, nothing is written. The card is written afterwards, from the folder.

report = convert_checkpoint("timm:vit_base_patch14_reg4_dinov2", Path("converted"))
report = write_native_model("runs/mine", Path("native"))    # a class of transformers
"""

import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..hub.local_paths import resolve_name, strip_folders
from ..hub.model_checks import check_is_vitcls
from ..hub.model_files import (
    PARITY_REPORT_FILE,
    RECIPE_FILE,
    RESULTS_FILE,
    hash_settings,
    hash_weights,
)
from ..hub.model_folder import ModelFolder, open_vitcls
from ..hub.provenance import find_provenance
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, ViTCLSPreTrainedModel
from ..runtime.files import write_json
from ..runtime.staging import check_output_is_empty, create_output_folder
from ..runtime.system import get_versions
from .parity_report import (
    MAX_DIFFERENCE,
    Report,
    compare_models,
    describe_pooling,
    describe_position_embeddings,
)
from .processors import (
    apply_processor,
    build_preprocessing_record,
    check_processor,
    get_processor_size,
    select_settings,
)
from .source_files import FileSource
from .source_models import SourceModel, TimmSource, TransformersSource
from .to_transformers import MIN_TRANSFORMERS_VERSIONS, convert_to_transformers
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
    check_output_is_empty(output)
    # The folder was checked first, because this may download gigabytes.
    source = load_source(source_name, family)
    model = convert_source(source)
    processor, preprocessing = source.convert_preprocessing()

    with create_output_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        # after saving: the comparison casts both models to float32. An error removes the folder.
        comparisons, not_compared = compare_models(source, model, get_processor_size(processor))
        return write_parity_report(
            folder,
            source_name,
            model,
            model.config,
            source=strip_folders(resolve_name(source.name)),
            source_revision=source.revision,
            source_class=type(source.model).__name__,
            classifier="kept" if isinstance(model, ViTCLSForImageClassification) else "none",
            comparisons=comparisons,
            not_compared=not_compared,
            preprocessing=preprocessing,
            versions=get_versions("timm"),
            notes=source.notes
            + describe_pooling(source, model.config)
            + describe_position_embeddings(source, model.config),
            family=source.family,
            source_sha256=source.sha256,
        )


def write_parity_report(
    folder: Path,
    source_name: str,
    model: PreTrainedModel,
    config: ViTCLSConfig,
    **fields: Any,
) -> Report:
    """Write the parity report of a model in a folder, and copy the license of the source.

    `config` is the configuration of the ViTCLS model, and `fields` are further fields of the report.

    docs/converting.md describes the main fields. `is_native` (whether the model is a transformers
    model), `required_versions` (the lowest versions that its class requires) and `provenance`
    (license and base model) are for the card.
    """
    provenance = find_provenance(source_name)
    provenance.copy_license(folder)
    optional_fields: Report = {"is_native": False, "required_versions": {}, "notes": []}
    optional_fields |= dict.fromkeys(("source_revision", "family", "source_sha256"))
    report = {
        **optional_fields,
        "model_class": type(model).__name__,
        "num_parameters": model.num_parameters(),
        "image_size": config.image_height_width,
        "num_labels": config.num_labels,
        "limit": MAX_DIFFERENCE,
        "sha256": hash_weights(folder),
        "provenance": provenance.to_dict(),
        **fields,
    }
    write_json(folder / PARITY_REPORT_FILE, report)
    return report


def load_source(source_name: str, family: str | None = None) -> SourceModel:
    """Load a model of another project: `timm:NAME`, `transformers:PATH_OR_ID` or a state-dict file.

    An id may end with `@REVISION`, and a file may have a family. Raise ValueError or OSError if the
    source does not exist or is not supported.
    """
    project, _, name = source_name.partition(":")
    is_file = Path(source_name).is_file()
    if not is_file and (project in SOURCE_CLASSES or not Path(source_name).suffix):
        if family is not None:
            raise ConversionError(
                f"`family={family!r}` requires a state-dict file, but the source is {source_name}"
            )
        if project not in SOURCE_CLASSES or not name:
            raise ConversionError(
                f"the source {source_name!r} is not supported. Use timm:NAME, "
                "transformers:PATH_OR_ID or a state-dict file"
            )
        return SOURCE_CLASSES[project].load(name)

    # A name with a suffix is taken for a file even if there is none, so that the error names the
    # file.
    return FileSource.load(Path(source_name), family)


def convert_source(source: SourceModel) -> ViTCLSPreTrainedModel:
    """Convert a source model in float32.

    Cast the result to the dtype of the source if this dtype represents all encoder weights exactly.
    """
    # Rewrites add and multiply weights, which half precision would round. If nothing had to be
    # rewritten, the weights go back to their dtype without a loss, and the file stays as small as
    # it was.
    saved_dtype = source.saved_dtype
    source.model.float()
    model = source.convert()
    if all(
        torch.equal(weight.to(saved_dtype).float(), weight)
        for weight in model.base_model.state_dict().values()
    ):
        model.to(dtype=saved_dtype)  # type: ignore[call-arg]  # `to` is untyped in transformers
        return model
    source.notes.append(
        f"the weights are written in float32, because {saved_dtype} cannot represent all weights "
        "exactly"
    )
    return model


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
    check_output_is_empty(output)
    folder = open_vitcls(source)
    # `open_vitcls` also opens a model that was converted to transformers before, and there is
    # nothing to convert in it.
    check_is_vitcls(source, folder.path)

    is_classifier = folder.architecture == ViTCLSForImageClassification.__name__
    model_class = ViTCLSForImageClassification if is_classifier else ViTCLSModel
    model: ViTCLSPreTrainedModel = folder.load(model_class)

    # A class with the same outputs at every size comes first. Only if there is none, one size must
    # do.
    native_size_reason = ""
    try:
        converted_model = convert_to_transformers(model)
    except ConversionError:
        converted_model = convert_to_transformers(model, native_size_only=True)
        native_size_reason = (
            "at other image sizes, the two models resample position embeddings differently"
        )

    with create_output_folder(output) as output_folder:
        converted_model.save_pretrained(output_folder)
        preprocessing = write_processor(folder, output_folder)

        # The files are compared, not the model in memory: a weight that was not written would not
        # be missed there.
        reloaded_source = TransformersSource.load(str(output_folder))
        reloaded_source.model.float()
        reloaded_source.native_size_reason = native_size_reason
        processor = folder.load_processor() if folder.has_processor else None
        processor_size = None if processor is None else get_processor_size(processor)
        comparisons, not_compared = compare_models(reloaded_source, model, processor_size)

        copy_results(folder, output_folder)
        return write_parity_report(
            output_folder,
            source,
            converted_model,
            model.config,
            source=strip_folders(resolve_name(source)),
            source_class=type(model).__name__,
            is_native=True,
            classifier="kept" if is_classifier and model.config.num_labels else "none",
            comparisons=comparisons,
            not_compared=not_compared,
            preprocessing=preprocessing,
            versions=get_versions(),
            required_versions={
                "transformers": MIN_TRANSFORMERS_VERSIONS[type(converted_model).__name__]
            },
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


def write_processor(folder: ModelFolder, output_folder: Path) -> dict[str, Any]:
    """Save the image processor of a model folder as a `ViTImageProcessor`.

    Return the `preprocessing` field of the parity report.
    """
    if not folder.has_processor:
        return build_preprocessing_record("", "the model has no image processor")
    vitcls_processor = folder.load_processor()
    transformers.ViTImageProcessor(**select_settings(vitcls_processor)).save_pretrained(
        output_folder
    )
    preprocess = partial(
        apply_processor, transformers.ViTImageProcessor.from_pretrained(output_folder)
    )
    return check_processor(vitcls_processor, preprocess, type(vitcls_processor).__name__)
