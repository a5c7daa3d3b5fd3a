"""Write a model as a class of transformers: weights, image processor, parity report and card. No code is required.

report = write_native_model("runs/mine", Path("native"))
"""

from pathlib import Path
from typing import Any

import PIL.Image
import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..configuration_vitcls import ViTCLSConfig
from ..hub.card_training import TEMPLATE
from ..hub.card_use import CITATION, build_use_section
from ..hub.licenses import CONVERTED_WEIGHTS, WeightsLicense
from ..hub.loading import MODEL_FILES, check_is_vitcls, get_model_folder
from ..hub.local_paths import check_output_is_empty, resolve_name, strip_folders
from ..hub.provenance import Provenance, find_provenance
from ..image_processing_vitcls import ViTCLSImageProcessor
from ..modeling_vitcls import ViTCLSForImageClassification, ViTCLSModel, ViTCLSPreTrainedModel
from ..system import get_versions
from .convert import create_folder
from .parity_report import LIMIT, ParityReport, compare_models, hash_files
from .processors import SHARED_SETTINGS, ConvertedPreprocessing, check_processor
from .source_models import TransformersSource
from .to_transformers import convert_to_transformers
from .weight_rules import ConversionError


NO_RESAMPLING = "transformers resamples the positions of {name} differently for other image sizes"


def write_native_model(source: str, output: Path, any_size: bool = False) -> ParityReport:
    """Write the model, image processor, parity report, card and license to `output`, or write nothing.

    For models other than classifiers for one task, only the encoder is written.

    Args:
        source: Folder or Hub id of a vitcls model.
        output: A folder that does not exist or is empty.
        any_size: Whether the outputs have to be the same for images of any size. Default: if no class of transformers
            supports this, a class with the same outputs at the native size is used.

    Raises:
        ValueError, OSError: If the model does not exist, no class of transformers supports the model, a difference
            exceeds the limit, or `output` is not empty. The message has one line.
    """
    check_output_is_empty(output)
    folder = Path(get_model_folder(source, MODEL_FILES))
    check_is_vitcls(source, folder)
    model = load_model(folder)
    converted, is_exact_at_any_size = convert_model(model, any_size)
    reason = "" if is_exact_at_any_size else NO_RESAMPLING.format(name=type(converted).__name__)
    with create_folder(output) as target:
        converted.save_pretrained(target)
        preprocessing = write_processor(folder, target)
        written = TransformersSource.load(str(target), random_init=False)
        written.model.float()
        has_logits = isinstance(model, ViTCLSForImageClassification) and bool(model.num_labels)
        comparisons, not_compared = compare_models(written, model, has_logits, native_size_only=reason)
        report = ParityReport(
            source=strip_folders(resolve_name(source)),
            source_revision=None,
            source_class=type(model).__name__,
            random_init=False,
            model_class=type(converted).__name__,
            classifier="kept" if has_logits else "none",
            limit=LIMIT,
            comparisons=comparisons,
            not_compared=not_compared,
            preprocessing=preprocessing,
            versions=get_versions(),
            sha256=hash_files(target.glob("*.safetensors")),
            notes=[],
        )
        report.save(target)
        provenance = find_provenance(source)
        card = build_native_card(output.resolve().name, model.config, converted.num_parameters(), report, provenance)
        card.save(target / "README.md")
        provenance.copy_license(target)
    return report


def load_model(folder: Path) -> ViTCLSPreTrainedModel:
    """Load a classifier for one task, or the encoder of any other model."""
    architectures = ViTCLSConfig.from_pretrained(folder).architectures or []
    is_classifier = ViTCLSForImageClassification.__name__ in architectures
    model_class = ViTCLSForImageClassification if is_classifier else ViTCLSModel
    model: ViTCLSPreTrainedModel = model_class.from_pretrained(folder).eval()
    return model


def convert_model(model: ViTCLSPreTrainedModel, any_size: bool) -> tuple[PreTrainedModel, bool]:
    """Return the model of transformers, and whether its outputs are the same for images of any size."""
    try:
        return convert_to_transformers(model), True
    except ConversionError as error:
        if any_size:
            raise
        try:
            return convert_to_transformers(model, native_size_only=True), False
        except ConversionError:
            raise error from None


def write_processor(folder: Path, target: Path) -> dict[str, Any]:
    """Write the image processor of a model folder as `ViTImageProcessor`, and return its description.

    Raises:
        ValueError: If the pixels differ from the pixels of the original image processor.
    """
    if not (folder / "preprocessor_config.json").is_file():
        return ConvertedPreprocessing(ViTCLSImageProcessor(), "", None, "the model has no image processor").describe()
    original = ViTCLSImageProcessor.from_pretrained(folder)
    settings = original.to_dict()
    settings = {name: settings[name] for name in SHARED_SETTINGS if settings.get(name) is not None}
    processor = transformers.ViTImageProcessor(**settings)
    processor.save_pretrained(target)
    written = transformers.ViTImageProcessor.from_pretrained(target)

    def preprocess(image: PIL.Image.Image) -> torch.Tensor:
        pixels: torch.Tensor = written(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    return check_processor(original, original, preprocess, type(original).__name__).describe()


def build_native_card(
    name: str, config: ViTCLSConfig, num_parameters: int, report: ParityReport, provenance: Provenance
) -> ModelCard:
    """Build the card of a model that was converted to a class of transformers.

    Args:
        name: Name of the model's folder. A push replaces it by the name of the repository.
        config: Configuration of the vitcls model.
        num_parameters: Number of parameters of the converted model.
        report: Parity report of the conversion.
        provenance: Provenance of the vitcls model.
    """
    has_classifier = report.classifier == "kept"
    height, width = config.image_height_width
    card: ModelCard = ModelCard.from_template(
        ModelCardData(
            library_name="transformers",
            pipeline_tag="image-classification" if has_classifier else "image-feature-extraction",
            tags=["vision", "vit"],
            base_model=provenance.base_model,
            **provenance.license_metadata,
        ),
        template_path=str(TEMPLATE.with_name("native.md.j2")),
        name=name,
        report=report,
        num_parameters=num_parameters,
        image_size=f"{height} x {width}",
        use=build_use_section(name, report.model_class, has_pipeline=has_classifier, is_native=True),
        citation=CITATION,
        license_text=WeightsLicense(CONVERTED_WEIGHTS, provenance, has_code=False),
    )
    return card
