"""The model card: README.md of a model folder, from what was configured and measured.

The text is in model_cards/template.md.j2. A section for which nothing was measured does not appear.
"""

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..configuration_vitcls import PRESETS, ViTCLSConfig


TEMPLATE = Path(__file__).parents[2] / "model_cards" / "template.md.j2"

TOKEN_NAMES = {"cls": "CLS", "distillation": "distillation", "registers": "register", "patches": "patch"}
METRIC_NAMES = {
    "accuracy": "Accuracy",
    "top_5_accuracy": "Top-5 accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "cls_accuracy": "Accuracy, CLS head",
    "distillation_accuracy": "Accuracy, distillation head",
    "mean_average_precision": "Mean average precision",
    "micro_f1": "F1, over all answers",
    "macro_f1": "F1, mean over the classes",
    "exact_match": "Images with every class right",
    "calibration_error": "Calibration error",
}
CLASS_COLUMNS = {
    "recall": "Recall",
    "precision": "Precision",
    "f1": "F1",
    "average_precision": "Average precision",
}
MOST_CLASSES_SHOWN = 20


def build_card(name: str, config: ViTCLSConfig, results: dict[str, Any], flags: dict[str, Any]) -> ModelCard:
    """The card of a fine-tuned classifier.

    Args:
        name: of the model.
        config: its configuration.
        results: what results.json holds.
        flags: the run's flags, as in config.resolved.yaml.
    """
    return ModelCard.from_template(
        card_metadata(name, config, results, flags, is_from_scratch(flags)),
        template_path=str(TEMPLATE),
        metrics=metric_rows(results, config),
        class_tables=class_tables(results, config),
        purpose=purpose(config),
        **facts_of_any_model(name, config, results, flags),
    )


def facts_of_any_model(
    name: str, config: ViTCLSConfig, results: dict[str, Any], flags: dict[str, Any]
) -> dict[str, Any]:
    """What the cards of classifiers and encoders both say."""
    recipe = shareable(flags)
    return {
        "name": name,
        "config": config,
        "results": results,
        "layout": layout_picture(results["token_layout"]),
        "from_scratch": is_from_scratch(flags),
        "base_model": recipe["model"],
        "recipe": yaml.safe_dump(recipe, sort_keys=False).strip(),
    }


def is_from_scratch(flags: dict[str, Any]) -> bool:
    """Whether the run started from a preset's fresh weights."""
    return flags["model"].removeprefix("vitcls-") in PRESETS


def card_metadata(
    name: str, config: ViTCLSConfig, results: dict[str, Any], flags: dict[str, Any], from_scratch: bool
) -> ModelCardData:
    """The card's YAML header.

    The licence of a model that started from another's weights is not ours to name, and a local folder is no data set
    that the Hub could link to.
    """
    is_hub_id = not from_scratch and not Path(flags["model"]).exists()
    return ModelCardData(
        license="apache-2.0" if from_scratch else None,
        base_model=flags["model"] if is_hub_id else None,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["vision", "vit", "vitcls"],
        datasets=None if Path(flags["dataset"]).exists() else [flags["dataset"]],
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
            )
            for key, label in metric_names(results, config).items()
        ],
    )


# Results -------------------------------------------------------------------------------------------------------------


def metric_names(results: dict[str, Any], config: ViTCLSConfig) -> dict[str, str]:
    """What the measured metrics are called: over all, then of each task where there are several."""
    names = METRIC_NAMES | {
        f"{task}_{key}": f"{task}: {label}" for task in config.task_labels() for key, label in METRIC_NAMES.items()
    }
    return {key: name for key, name in names.items() if results.get(key) is not None}


def metric_rows(results: dict[str, Any], config: ViTCLSConfig) -> list[list[str]]:
    """Name and value of each measured metric, with its confidence interval where there is one."""
    rows = []
    for key, name in metric_names(results, config).items():
        interval = results.get(f"{key}_interval")
        between = f" (95 % interval: {percent(interval[0])} to {percent(interval[1])})" if interval else ""
        rows.append([name, percent(results[key]) + between])
    return rows


def class_tables(results: dict[str, Any], config: ViTCLSConfig) -> dict[str, list[dict[str, str]]]:
    """A title and one row per class, for each task that has few classes."""
    titles = {"": "Per class"} | {f"{task}_": f"{task}, per class" for task in config.task_labels()}
    tables = {title: results.get(f"{prefix}per_class", []) for prefix, title in titles.items()}
    return {
        title: [class_row(row) for row in rows]
        for title, rows in tables.items()
        if 0 < len(rows) <= MOST_CLASSES_SHOWN
    }


def class_row(measured: dict[str, Any]) -> dict[str, str]:
    """The metrics of one class by the name of their column."""
    values = {CLASS_COLUMNS[key]: percent(value) for key, value in measured.items() if key not in ("name", "images")}
    return {"Class": measured["name"], "Images": f"{measured['images']:,}", **values}


def percent(value: float | None) -> str:
    """A part of one; a dash where it is not known."""
    return "–" if value is None else f"{value:.2%}"


# Text ----------------------------------------------------------------------------------------------------------------


def purpose(config: ViTCLSConfig) -> str:
    """What the model does, after its size."""
    if config.tasks:
        tasks = [f"{task} ({len(labels)} classes)" for task, labels in config.task_labels().items()]
        return f"that answers several questions about an image: {', '.join(tasks)}"
    if config.problem_type == "multi_label_classification":
        return f"that says which of {config.num_labels} classes an image shows, none or several"
    return f"that sorts images into {config.num_labels} classes"


def layout_picture(counts: dict[str, int]) -> str:
    """The token sequence in one line, such as `[ CLS x 1 | register x 2 | patch x 16 ]`."""
    return "[ " + " | ".join(f"{TOKEN_NAMES[name]} x {count}" for name, count in counts.items() if count) + " ]"


def without_folders(source: str) -> str:
    """A data set, model or teacher as others may know it: of a file or folder of this machine the last part."""
    name, separator, file = source.partition("@")  # timm:NAME@FILE
    if separator and Path(file).exists():
        return f"{name}@path/to/{Path(file).name}"
    return f"path/to/{Path(source).name}" if Path(source).exists() else source


def shareable(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that a reader can use: those that were set, without paths of the machine they were used on."""
    paths = {"output_dir": "my-model"}
    for name in ("dataset", "model", "teacher"):
        if flags.get(name):
            paths[name] = without_folders(flags[name])
    return {name: paths.get(name, value) for name, value in flags.items() if value is not None}
