"""Model cards: README.md of a model folder, generated from the configuration and the measurements.

    build_card               a fine-tuned classifier            model_cards/classifier.md.j2
    build_encoder_card       a pre-trained encoder              model_cards/encoder.md.j2
    build_checkpoint_card    a training checkpoint on a branch  model_cards/checkpoint.md.j2

Sections without measured values are omitted. analysis/card_images.py draws the images of a card, and
conversion_card.py builds the card of a converted model.
"""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_vitcls import PRESETS, ViTCLSConfig
from ..hub.local_paths import BUILT_IN_DATASET, can_publish_images, is_local, strip_folders
from ..hub.provenance import DERIVED_WEIGHTS_TEXTS, NEW_WEIGHTS_TEXTS, Provenance, WeightsLicense
from .card_results import (
    CONFIDENCE_LEVEL,
    build_class_tables,
    build_metric_rows,
    describe_limitations,
    format_name,
    get_metric_names,
)
from .card_sections import CITATION, build_training_section, build_use_section, render_card


TAGS = ["vision", "vit", "vitcls"]
TOKEN_NAMES = {"cls": "CLS", "distillation": "distillation", "registers": "register", "patches": "patch"}
MAX_LISTED_CLASSES = 50
# Flags that have no effect during pre-training.
FINETUNING_FLAGS = (
    *("label_smoothing", "class_balance", "trainable", "feature_views", "lora_rank", "mixup", "cutmix"),
    *("pooling", "cls_pooling", "head_type"),
)


def build_card(
    name: str,
    config: ViTCLSConfig,
    results: dict[str, Any],
    flags: dict[str, Any],
    base_provenance: Provenance | None = None,
    teacher_provenance: Provenance | None = None,
    images: dict[str, str] | None = None,
) -> ModelCard:
    """Build the card of a fine-tuned classifier.

    `name` is the Hub id of the model or the name of its folder. `results` is the parsed results.json,
    and `flags` contains the flags of the run, as in config.resolved.yaml. `base_provenance` is the provenance of the
    model that training started from, or None for a preset. `images` maps image names to paths in the model folder, as
    returned by analysis/card_images.py.
    """
    images = images or {}
    return render_card(
        "classifier",
        build_metadata(name, config, results, flags, base_provenance),
        metrics=build_metric_rows(results, config),
        class_tables=build_class_tables(results, config),
        matrices=list_confusion_matrices(images, config),
        purpose=describe_purpose(config),
        classes=describe_classes(config),
        limitations=describe_limitations(results, config),
        use=build_use_section(name, "ViTCLSForImageClassification", has_pipeline=not config.tasks),
        **build_common_variables(
            name, config, results, flags, base_provenance, teacher_provenance, images, "finetune"
        ),
    )


def build_encoder_card(
    name: str,
    config: ViTCLSConfig,
    results: dict[str, Any],
    flags: dict[str, Any],
    base_provenance: Provenance | None = None,
    images: dict[str, str] | None = None,
) -> ModelCard:
    """Build the card of an encoder that was pre-trained with masked image modeling. See `build_card` for the
    arguments."""
    flags = {flag: value for flag, value in flags.items() if flag not in FINETUNING_FLAGS}
    return render_card(
        "encoder",
        ModelCardData(
            **build_common_metadata(flags, base_provenance),
            pipeline_tag="image-feature-extraction",
            tags=[*TAGS, "masked-image-modeling"],
        ),
        use=build_use_section(name, "ViTCLSModel", has_pipeline=False, finetune_dataset="path/to/labeled/images"),
        **build_common_variables(name, config, results, flags, base_provenance, None, images or {}, "pretrain"),
    )


def build_checkpoint_card(
    repo_id: str,
    branch: str,
    step: int,
    architecture: str,
    metadata: dict[str, Any],
    weights_license: WeightsLicense,
    with_optimizer: bool,
) -> ModelCard:
    """Build the card of the checkpoint that was saved after `step` optimizer steps, on a branch of `repo_id`.

    `architecture` is the name of the model class. `metadata` contains the license, base model and dataset as keyword
    arguments of ModelCardData. `with_optimizer` is True if the files for `--resume` are published as well.
    """
    return render_card(
        "checkpoint",
        ModelCardData(**metadata, tags=[*TAGS, "checkpoint"]),
        repo_id=repo_id,
        branch=branch,
        step=f"{step:,}",
        use=build_use_section(repo_id, architecture, has_pipeline=False, revision=branch),
        citation=CITATION,
        command="pretrain" if architecture == "ViTCLSForMaskedImageModeling" else "finetune",
        license_text=weights_license,
        with_optimizer=with_optimizer,
    )


def build_common_variables(
    name: str,
    config: ViTCLSConfig,
    results: dict[str, Any],
    flags: dict[str, Any],
    base_provenance: Provenance | None,
    teacher_provenance: Provenance | None,
    images: dict[str, str],
    command: str,
) -> dict[str, Any]:
    """Return the template variables that the cards of classifiers and encoders share."""
    return {
        "name": name,
        "config": config,
        "results": results,
        "sequence_length": results["sequence_length"],
        "dataset": format_name(results["dataset"]),
        "layout": format_token_layout(results["token_layout"]),
        "layout_description": describe_token_layout(results["token_layout"]),
        "image_size": " x ".join(map(str, config.image_height_width)),
        "from_scratch": is_from_scratch(flags),
        "base_model": describe_base_model(flags, base_provenance),
        "images": images,
        "report": images.get("report") if can_publish_images(flags) else None,
        "citation": CITATION,
        "training": build_training_section(config, results, flags, command, teacher_provenance),
        "license_text": get_license(flags, base_provenance, teacher_provenance),
    }


def is_from_scratch(flags: dict[str, Any]) -> bool:
    """Return whether the run started from a preset, with random weights."""
    return flags["model"].removeprefix("vitcls-") in PRESETS


# Metadata ------------------------------------------------------------------------------------------------------------


def build_metadata(
    name: str, config: ViTCLSConfig, results: dict[str, Any], flags: dict[str, Any], base_provenance: Provenance | None
) -> ModelCardData:
    """Return the metadata of a classifier's card."""
    tags = [*TAGS]
    tags += ["distillation"] if results.get("teacher") else []
    tags += ["multi-task"] if config.tasks else []
    tags += ["multi-label"] if config.problem_type == "multi_label_classification" else []
    return ModelCardData(
        **build_common_metadata(flags, base_provenance),
        # The image-classification pipeline does not support multi-task models.
        pipeline_tag="image-feature-extraction" if config.tasks else "image-classification",
        tags=tags,
        metrics=["accuracy" if "accuracy" in results else "mean_average_precision"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=results["dataset"],
                dataset_name=results["dataset"],
                dataset_split=results["split"],
                dataset_args={"num_images": results["num_images"]},
                metric_type=key,
                metric_name=label,
                metric_value=round(results[key], 6),
                # `metric_args` accepts arbitrary keys.
                metric_args={"confidence_level": CONFIDENCE_LEVEL, "confidence_interval": results[f"{key}_interval"]}
                if results.get(f"{key}_interval")
                else None,
            )
            for key, label in get_metric_names(results, config).items()
        ],
    )


def build_common_metadata(flags: dict[str, Any], base_provenance: Provenance | None) -> dict[str, Any]:
    """Return the license, base model and Hub dataset as keyword arguments of ModelCardData."""
    dataset = flags["dataset"]
    metadata = {
        "library_name": "transformers",
        "datasets": None if dataset == BUILT_IN_DATASET or is_local(dataset) else [dataset],
        **get_license(flags, base_provenance).metadata,
    }
    if base_provenance is None or not base_provenance.base_model:
        return metadata
    return metadata | {"base_model": base_provenance.base_model, "base_model_relation": "finetune"}


def get_license(
    flags: dict[str, Any], base_provenance: Provenance | None, teacher_provenance: Provenance | None = None
) -> WeightsLicense:
    """Return the license of the run's weights: the inherited license if it is known, otherwise `--license`."""
    is_inherited = base_provenance is not None and base_provenance.license is not None
    if is_from_scratch(flags) or (flags.get("license") and not is_inherited):
        return WeightsLicense(NEW_WEIGHTS_TEXTS, Provenance("", license=flags.get("license")), teacher_provenance)
    return WeightsLicense(DERIVED_WEIGHTS_TEXTS, base_provenance, teacher_provenance)


# Text ----------------------------------------------------------------------------------------------------------------


def describe_purpose(config: ViTCLSConfig) -> str:
    """Return the purpose of a classifier as a phrase, such as "for image classification with 10 classes"."""
    if config.tasks:
        tasks = [f"{task} ({len(labels)} classes)" for task, labels in config.task_labels().items()]
        return f"for multi-task image classification: {', '.join(tasks)}"
    kind = "multi-label image" if config.problem_type == "multi_label_classification" else "image"
    return f"for {kind} classification with {config.num_labels} classes"


def describe_classes(config: ViTCLSConfig) -> list[str]:
    """Return one sentence per task, with a list of its classes."""
    if config.tasks:
        return [
            f"The classes of {task} are {format_class_list(names)}." for task, names in config.task_labels().items()
        ]
    class_list = format_class_list([name for _, name in sorted((config.id2label or {}).items())])
    if config.problem_type == "multi_label_classification":
        return [f"The model predicts any number of these classes: {class_list}. Other image content is not predicted."]
    return [f"The model predicts one of these classes, even if an image shows none of them: {class_list}."]


def format_class_list(class_names: list[str]) -> str:
    """Return a string with at most `MAX_LISTED_CLASSES` class names and the number of remaining classes."""
    text = ", ".join(map(format_name, class_names[:MAX_LISTED_CLASSES]))
    if len(class_names) <= MAX_LISTED_CLASSES:
        return text
    return f"{text} and {len(class_names) - MAX_LISTED_CLASSES:,} more (see `id2label` in config.json)"


def list_confusion_matrices(images: dict[str, str], config: ViTCLSConfig) -> list[tuple[str, str]]:
    """Return the description and the image path of each confusion matrix."""
    suffixes = {"confusion_matrix": ""} | {f"confusion_matrix_{task}": f" of {task}" for task in config.task_labels()}
    return [
        (f"Confusion matrix{suffix}: rows are true classes, columns are predicted classes", images[key])
        for key, suffix in suffixes.items()
        if key in images
    ]


def format_token_layout(counts: dict[str, int]) -> str:
    """Return the token sequence in one line, such as `[ CLS x 1 | register x 2 | patch x 16 ]`."""
    return "[ " + " | ".join(f"{TOKEN_NAMES[name]} x {count}" for name, count in counts.items() if count) + " ]"


def describe_token_layout(counts: dict[str, int]) -> str:
    """Return the token sequence as alternative text, such as "1 CLS, 2 register and 16 patch tokens"."""
    phrases = [f"{count} {TOKEN_NAMES[name]}" for name, count in counts.items() if count]
    return re.sub(r", (?=[^,]*$)", " and ", ", ".join(phrases)) + " tokens"


def describe_base_model(flags: dict[str, Any], base_provenance: Provenance | None) -> str:
    """Return the name of the initial model in Markdown, followed by links to any other base models."""
    model_name = format_name(strip_folders(flags["model"]))
    base_models = base_provenance.base_model if base_provenance else None
    if isinstance(base_models, str):
        base_models = [base_models]
    if not base_models or base_models == [flags["model"]]:
        return model_name
    links_text = ", ".join(f"[{base_model}](https://huggingface.co/{base_model})" for base_model in base_models)
    return f"{model_name}, which is derived from {links_text},"
