"""The model card: README.md of a model folder, from what was configured and measured.

    card.py             metadata, and what the text is made of
    card_results.py     measured values as tables and sentences
    licenses.py         under which licence it is
    card_training.py    how it was trained, as a section of text
    analysis/card_images.py    the pictures

The text is in model_cards/template.md.j2. A section for which nothing was measured does not appear.

The model card of a pre-trained encoder: README.md of the folder that pre-training wrote.

The text is in model_cards/encoder.md.j2; a classifier's card is in card.py.

The short card of a model in training, on a branch of its own: what it is, and how to load it or go on with it.

The text is in model_cards/checkpoint.md.j2; the card of the result is in card.py.
"""

import re
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_vitcls import PRESETS, ViTCLSConfig
from .card_results import CONFIDENCE, class_tables, interval, measured_limits, metric_names, metric_rows, quoted
from .card_training import TEMPLATE, training_section
from .licenses import Licence, licence_of_run
from .local_paths import BUILT_IN, is_local, without_folders
from .provenance import Origin
from .verification_script import AUTO_CLASSES


TOKEN_NAMES = {"cls": "CLS", "distillation": "distillation", "registers": "register", "patches": "patch"}
MOST_CLASSES_NAMED = 50


def build_card(
    name: str,
    config: ViTCLSConfig,
    results: dict[str, Any],
    flags: dict[str, Any],
    origin: Origin | None = None,
    teacher: Origin | None = None,
    pictures: dict[str, str] | None = None,
) -> ModelCard:
    """The card of a fine-tuned classifier.

    Args:
        name: of the model: its id on the Hub, or its folder's name.
        config: its configuration.
        results: what results.json holds.
        flags: the run's flags, as in config.resolved.yaml.
        origin: of the model that it started from; None for a preset.
        teacher: of a distillation.
        pictures: name -> path in the folder, as `write_pictures` returns them.
    """
    pictures = pictures or {}
    return ModelCard.from_template(
        card_metadata(name, config, results, flags, origin),
        template_path=str(TEMPLATE),
        metrics=metric_rows(results, config),
        class_tables=class_tables(results, config),
        matrices=matrix_pictures(pictures, config),
        purpose=purpose(config),
        classes=class_lists(config),
        limits=measured_limits(results, config),
        **facts_of_any_model(name, config, results, flags, origin, teacher, pictures, "finetune.py"),
    )


def facts_of_any_model(
    name: str,
    config: ViTCLSConfig,
    results: dict[str, Any],
    flags: dict[str, Any],
    origin: Origin | None,
    teacher: Origin | None,
    pictures: dict[str, str],
    script: str,
) -> dict[str, Any]:
    """What the cards of classifiers and encoders both say."""
    return {
        "name": name,
        "config": config,
        "results": results,
        "layout": layout_picture(results["token_layout"]),
        "layout_in_words": layout_in_words(results["token_layout"]),
        "image_size": " x ".join(map(str, config.image_height_width)),
        "from_scratch": is_from_scratch(flags),
        "base_model": base_model_in_words(flags, origin),
        "pictures": pictures,
        "training": training_section(config, results, flags, script, teacher),
        "licence": licence_of(flags, origin, teacher),
    }


def is_from_scratch(flags: dict[str, Any]) -> bool:
    """Whether the run started from a preset's fresh weights."""
    return flags["model"].removeprefix("vitcls-") in PRESETS


# Metadata ------------------------------------------------------------------------------------------------------------


def card_metadata(
    name: str, config: ViTCLSConfig, results: dict[str, Any], flags: dict[str, Any], origin: Origin | None
) -> ModelCardData:
    """The card's YAML header."""
    return ModelCardData(
        **metadata_of_any_model(flags, origin),
        pipeline_tag="image-classification",
        tags=tags(config, results),
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
                metric_args=interval_metadata(results, key),
            )
            for key, label in metric_names(results, config).items()
        ],
    )


def metadata_of_any_model(flags: dict[str, Any], origin: Origin | None) -> dict[str, Any]:
    """Licence, base model and data set, as keywords of ModelCardData.

    A local folder is no data set that the Hub could link to.
    """
    metadata = {
        "library_name": "transformers",
        "datasets": None if flags["dataset"] == BUILT_IN or is_local(flags["dataset"]) else [flags["dataset"]],
        **licence_of(flags, origin).metadata,
    }
    if origin is None or not origin.base_model:
        return metadata
    return metadata | {"base_model": origin.base_model, "base_model_relation": "finetune"}


def licence_of(flags: dict[str, Any], origin: Origin | None, teacher: Origin | None = None) -> Licence:
    """Under which licence the run's weights are."""
    return licence_of_run(is_from_scratch(flags), flags.get("license"), origin, teacher)


def tags(config: ViTCLSConfig, results: dict[str, Any]) -> list[str]:
    """What the model can be found by, besides its task."""
    more = {
        "distillation": bool(results.get("teacher")),
        "multi-task": bool(config.tasks),
        "multi-label": config.problem_type == "multi_label_classification",
    }
    return ["vision", "vit", "vitcls", *(tag for tag, applies in more.items() if applies)]


def interval_metadata(results: dict[str, Any], key: str) -> dict[str, Any] | None:
    """A metric's confidence interval; `args`, of any keys, is where the Hub's model-index has room for it."""
    known = interval(results, key)
    return {"confidence_level": CONFIDENCE, "confidence_interval": known} if known else None


# Text ----------------------------------------------------------------------------------------------------------------


def purpose(config: ViTCLSConfig) -> str:
    """What the model does, after its size."""
    if config.tasks:
        tasks = [f"{task} ({len(labels)} classes)" for task, labels in config.task_labels().items()]
        return f"that answers several questions about an image: {', '.join(tasks)}"
    if config.problem_type == "multi_label_classification":
        return f"that says which of {config.num_labels} classes an image shows, none or several"
    return f"that sorts images into {config.num_labels} classes"


def class_lists(config: ViTCLSConfig) -> list[str]:
    """What it can answer, a sentence for each task."""
    if config.tasks:
        return [f"It answers {task} with {listed(names)}." for task, names in config.task_labels().items()]
    names = list((config.id2label or {}).values())
    if config.problem_type == "multi_label_classification":
        return [f"It answers with any number of these: {listed(names)}; what else an image shows, it leaves out."]
    return [f"It answers with one of these, also where an image shows none of them: {listed(names)}."]


def listed(names: list[str]) -> str:
    """Class names, the first of them where there are many."""
    shown = ", ".join(map(quoted, names[:MOST_CLASSES_NAMED]))
    more = len(names) - MOST_CLASSES_NAMED
    return f"{shown} and {more:,} more (see `id2label` in config.json)" if more > 0 else shown


def matrix_pictures(pictures: dict[str, str], config: ViTCLSConfig) -> list[tuple[str, str]]:
    """What each picture of a confusion matrix shows, and its path."""
    tasks = {f"confusion_matrix_{task}": f" of {task}" for task in config.task_labels()}
    words = {"confusion_matrix": ""} | tasks
    return [
        (f"Confusion matrix{of_task}: rows are the true classes, columns the answers", pictures[key])
        for key, of_task in words.items()
        if key in pictures
    ]


def layout_picture(counts: dict[str, int]) -> str:
    """The token sequence in one line, such as `[ CLS x 1 | register x 2 | patch x 16 ]`."""
    return "[ " + " | ".join(f"{TOKEN_NAMES[name]} x {count}" for name, count in counts.items() if count) + " ]"


def layout_in_words(counts: dict[str, int]) -> str:
    """The same for those who do not see the picture: "1 CLS, 2 register and 16 patch tokens"."""
    words = [f"{count} {TOKEN_NAMES[name]}" for name, count in counts.items() if count]
    return re.sub(r", (?=[^,]*$)", " and ", ", ".join(words)) + " tokens"


def base_model_in_words(flags: dict[str, Any], origin: Origin | None) -> str:
    """The model that it started from, in Markdown; of a folder of this machine also where that is from."""
    given = f"`{without_folders(flags['model'])}`"
    bases = [origin.base_model] if origin and isinstance(origin.base_model, str) else (origin and origin.base_model)
    if not bases or bases == [flags["model"]]:
        return given
    links = ", ".join(f"[{base}](https://huggingface.co/{base})" for base in bases)
    return f"{given}, which is derived from {links},"


ONLY_WITH_LABELS = ("label_smoothing", "class_balance", "trainable", "mixup", "cutmix")  # flags of both scripts


def build_encoder_card(
    name: str,
    config: ViTCLSConfig,
    results: dict[str, Any],
    flags: dict[str, Any],
    origin: Origin | None = None,
    pictures: dict[str, str] | None = None,
) -> ModelCard:
    """The card of an encoder that was pre-trained by masked image modelling.

    Args:
        name: of the model: its id on the Hub, or its folder's name.
        config: its configuration.
        results: what results.json holds.
        flags: the run's flags, as in config.resolved.yaml.
        origin: of the model that it started from; None for a preset.
        pictures: name -> path in the folder, as `write_pictures` returns them.
    """
    used = {flag: value for flag, value in flags.items() if flag not in ONLY_WITH_LABELS}
    return ModelCard.from_template(
        ModelCardData(
            **metadata_of_any_model(flags, origin),
            pipeline_tag="image-feature-extraction",
            tags=["vision", "vit", "vitcls", "masked-image-modeling"],
        ),
        template_path=str(TEMPLATE.with_name("encoder.md.j2")),
        **facts_of_any_model(name, config, results, used, origin, None, pictures or {}, "pretrain.py"),
    )


SCRIPTS = {"ViTCLSForMaskedImageModeling": "pretrain.py"}  # that make models of this class; finetune.py the others


def checkpoint_card(
    repo_id: str,
    branch: str,
    step: int,
    architecture: str,
    metadata: dict[str, Any],
    licence: Licence,
    with_optimizer: bool,
) -> ModelCard:
    """The card of one checkpoint.

    Args:
        repo_id: `namespace/name`.
        step: optimiser steps done.
        architecture: the model's class, as its config.json says.
        metadata: licence, base model and data set, as keywords of ModelCardData.
        licence: of the weights.
        with_optimizer: whether what `--resume` needs is published, too.
    """
    return ModelCard.from_template(
        ModelCardData(**metadata, tags=["vision", "vit", "vitcls", "checkpoint"]),
        template_path=str(TEMPLATE.with_name("checkpoint.md.j2")),
        repo_id=repo_id,
        branch=branch,
        step=f"{step:,}",
        auto_class=AUTO_CLASSES.get(architecture, "AutoModel"),
        script=SCRIPTS.get(architecture, "finetune.py"),
        licence=licence,
        with_optimizer=with_optimizer,
    )
