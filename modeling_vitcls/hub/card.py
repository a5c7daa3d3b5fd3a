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
METRIC_NAMES = {"accuracy": "Accuracy", "top_5_accuracy": "Top-5 accuracy"}


def build_card(name: str, config: ViTCLSConfig, results: dict[str, Any], flags: dict[str, Any]) -> ModelCard:
    """The card of a fine-tuned classifier.

    Args:
        name: of the model.
        config: its configuration.
        results: what results.json holds.
        flags: the run's flags, as in config.resolved.yaml.
    """
    from_scratch = flags["model"].removeprefix("vitcls-") in PRESETS
    recipe = shareable(flags)
    return ModelCard.from_template(
        card_metadata(name, results, flags, from_scratch),
        template_path=str(TEMPLATE),
        name=name,
        config=config,
        results=results,
        metrics={label: results[key] for key, label in METRIC_NAMES.items() if key in results},
        layout=layout_picture(results["token_layout"]),
        from_scratch=from_scratch,
        base_model=recipe["model"],
        recipe=yaml.safe_dump(recipe, sort_keys=False).strip(),
    )


def card_metadata(name: str, results: dict[str, Any], flags: dict[str, Any], from_scratch: bool) -> ModelCardData:
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
        metrics=["accuracy"],
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
            for key, label in METRIC_NAMES.items()
            if key in results
        ],
    )


def layout_picture(counts: dict[str, int]) -> str:
    """The token sequence in one line, such as `[ CLS x 1 | register x 2 | patch x 16 ]`."""
    return "[ " + " | ".join(f"{TOKEN_NAMES[name]} x {count}" for name, count in counts.items() if count) + " ]"


def shareable(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that a reader can use: those that were set, without paths of the machine they were used on."""
    paths = {"output_dir": "my-model"}
    for name in ("dataset", "model"):
        if Path(flags[name]).exists():
            paths[name] = f"path/to/{Path(flags[name]).name}"
    return {name: paths.get(name, value) for name, value in flags.items() if value is not None}
