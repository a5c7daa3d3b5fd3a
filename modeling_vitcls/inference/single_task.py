"""A classifier for one added task of a model: for pipelines of transformers, and for `evaluate --task`."""

import copy
from typing import Any

from ..model.configuration_vitcls import ViTCLSConfig
from ..model.modeling_vitcls import ViTCLSForImageClassification


def select_task(model: Any, name: str) -> ViTCLSForImageClassification:
    """Build a classifier for one of the tasks that were added to a model (`vitcls add-task`).

    Args:
        model: a classifier or multi-task model. Both share the weights of the encoder.
        name: of one of `model.config.extra_heads`.

    Returns:
        A classifier whose logits have the same bits as `outputs.task_logits[name]` of the model.

    Raises:
        ValueError: if the model has no such added task.

    Examples:
        >>> from modeling_vitcls import ViTCLSForImageClassification, select_task
        >>> model = ViTCLSForImageClassification.from_pretrained("runs/photos")
        >>> model = model.adapt(extra_heads={"weather": {"labels": ["rain", "sun"]}})
        >>> weather = select_task(model, "weather")
    """
    classifier = ViTCLSForImageClassification(build_task_config(model.config, name))
    weights = model.state_dict()
    # Assigned, not copied, so that both models share them
    selected = {key: weights[key] for key in classifier.state_dict()}
    classifier.load_state_dict(selected, assign=True)
    classifier.train(model.training)
    return classifier


def build_task_config(config: ViTCLSConfig, name: str) -> ViTCLSConfig:
    """Build the configuration of a classifier for an added task alone: all of its classes are added ones."""
    tasks = config.get_added_tasks()
    if name not in tasks:
        choice = f"Choose from {', '.join(tasks)}" if tasks else "Add it with `vitcls add-task`"
        raise ValueError(
            f"task {name}: the model has no such added task. {choice}; its own tasks need no `task`"
        )
    head = tasks[name]

    changes = {
        "tasks": None,
        "architectures": None,
        "compute_all_tokens": config.compute_all_tokens or not config.num_labels,
        # An extra head on its own, without the other classifier, has the same bits
        "extra_heads": {
            name: {
                "labels": head.labels,
                "pooling": head.pooling,
                "pooled_layers": head.pooled_layers,
                "adds_classes": True,
            }
        },
        "id2label": dict(enumerate(head.labels)),
        "label2id": {label: index for index, label in enumerate(head.labels)},
        "problem_type": head.problem_type,
        "class_statistics": None,
        "distance_threshold": None,
    }
    task_config = copy.deepcopy(config)
    for field, value in changes.items():
        setattr(task_config, field, value)
    return task_config
