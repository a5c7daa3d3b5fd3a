"""The commands as Python functions, for notebooks and other programs.

    from modeling_vitcls import evaluate, finetune, inspect_tokens, predict, pretrain

    results = finetune("timm:vit_tiny_patch16_224", train_images, "runs/mine", epochs=5, batch_size=32)
    rows = predict("runs/mine", [image, "photo.jpg"], top_k=3)

Keyword arguments are the flags of the commands: `--learning-rate 1e-4` is `learning_rate=1e-4`. A dataset is a path,
a Hub id, or data in memory (data/in_memory.py).
"""

import dataclasses
import difflib
import types
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .options import (
    EvaluateOptions,
    FinetuneOptions,
    InspectOptions,
    PredictOptions,
    PretrainOptions,
    get_flag_names,
)


Options = TypeVar("Options")

COMMAND_ONLY_FLAGS = {"config"}  # flags that the functions do not have


def finetune(model: str | Path, dataset: Any, output_dir: str | Path, **flags: Any) -> dict[str, Any]:
    """Fine-tune a model on labeled images, as `vitcls finetune` does.

    Args:
        model: a preset, a folder or any other checkpoint that `--model` accepts.
        dataset: a path, a Hub id, a `datasets.Dataset` or `DatasetDict`, a torch Dataset, a list of (image, label), or
            a dict of splits.
        output_dir: folder to write.
        flags: flags of `vitcls finetune`.

    Returns:
        The content of results.json; with `folds`, the content of folds.json.

    Raises:
        TypeError: for an unknown flag.
        ValueError, OSError: if a flag has a wrong value, or the model or the data cannot be read.
        RunStopped: if the run stops early.
    """
    from .training.finetune import FinetuneTask

    options = build_options(FinetuneOptions, model=model, dataset=dataset, output_dir=output_dir, **flags)
    return run_training(FinetuneTask, options)


def pretrain(model: str | Path, dataset: Any, output_dir: str | Path, **flags: Any) -> dict[str, Any]:
    """Pre-train a model on images without labels, as `vitcls pretrain` does.

    Arguments, results and errors are as in `finetune`; labels of the dataset are not used.
    """
    from .training.pretrain import PretrainTask

    options = build_options(PretrainOptions, model=model, dataset=dataset, output_dir=output_dir, **flags)
    return run_training(PretrainTask, options)


def run_training(task_class: Any, options: Any) -> dict[str, Any]:
    """Run a task and return the content of results.json; empty for `dry_run=True`."""
    from .training.task import dry_run, run_folds, run_task

    if options.run.dry_run:
        dry_run(task_class, options)
        return {}
    if options.data.folds is not None and options.data.fold is None:
        return run_folds(task_class, options)
    return run_task(task_class(options))


def evaluate(model: str | Path, dataset: Any, **flags: Any) -> dict[str, Any]:
    """Evaluate a saved model, or its frozen features with `frozen="knn"`, as `vitcls evaluate` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        dataset: as in `finetune`. If the dataset has no splits, the images that `finetune` holds out are evaluated;
            `{"test": images}` evaluates all images.
        flags: flags of `vitcls evaluate`.

    Returns:
        The metrics, as `--output` writes them. Errors are as in `finetune`.
    """
    from .inference.evaluate import evaluate_checkpoint
    from .inference.frozen import evaluate_frozen

    options = build_options(EvaluateOptions, model=model, dataset=dataset, **flags)
    return evaluate_frozen(options) if options.frozen else evaluate_checkpoint(options)


def predict(model: str | Path, images: Any = (), **flags: Any) -> list[dict[str, Any]]:
    """Predict the labels of images, or compute their features with `features="cls"`, as `vitcls predict` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        images: a path, a URL, or a list of paths, URLs, encoded bytes, PIL images and arrays. A folder is replaced by
            the images in it. Alternatively, set `dataset`.
        flags: flags of `vitcls predict`, except `output` and `shard_size`.

    Returns:
        One dict for each image: `index`, `image`, the predicted columns, and `error` (None, or the reason why an
        image has no prediction). Errors are as in `finetune`.
    """
    from .inference.predict import predict_from_options

    images = [images] if isinstance(images, str | bytes | Path) else list(images)
    names = tuple(map(str, range(len(images))))  # names of images in memory, checked like paths
    fixed_options = {"output": Path("not-written.json"), "shard_size": PredictOptions.shard_size}
    options = build_options(PredictOptions, fixed_options, model=model, paths=names, **flags)
    return predict_from_options(options, images)


def inspect_tokens(model: str | Path, images: Any = (), **flags: Any) -> Any:
    """Write the report on the special tokens of a model, as `vitcls inspect` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        images: a path, a URL or a list of them. Alternatively, set `dataset`.
        flags: flags of `vitcls inspect`.

    Returns:
        The `Inspection`, which contains the values of the report. Errors are as in `finetune`.
    """
    from .analysis.inspect_tokens import inspect_tokens

    paths = [images] if isinstance(images, str | Path) else images
    return inspect_tokens(build_options(InspectOptions, model=model, paths=tuple(map(str, paths)), **flags))


# Options -------------------------------------------------------------------------------------------------------------


def build_options(
    options_class: type[Options], command_values: dict[str, Any] | None = None, /, **flags: Any
) -> Options:
    """Build the options of a command from flags by name. Data in memory is registered.

    `command_values` contains the values of flags that are not keyword arguments. Raise TypeError for an unknown flag,
    and ValueError if a value is not allowed.
    """
    known = get_flag_names(options_class) - COMMAND_ONLY_FLAGS - set(command_values or {})
    for name in flags:
        if name not in known:
            similar_names = difflib.get_close_matches(name, known, n=1)
            hint = f". Use {similar_names[0]}" if similar_names else ""
            raise TypeError(f"unknown keyword argument {name!r}{hint}")
    if "dataset" in flags and not isinstance(flags["dataset"], str | Path):
        from .data.in_memory import add_dataset

        flags["dataset"] = add_dataset(flags["dataset"])
    return fill_options(options_class, flags | (command_values or {}))


def fill_options(options_class: Any, flags: dict[str, Any]) -> Any:
    """Build a dataclass of options, including its nested dataclasses, from flags by name."""
    values, hints = {}, get_type_hints(options_class)
    for field in dataclasses.fields(options_class):
        if dataclasses.is_dataclass(field.type):
            values[field.name] = fill_options(field.type, flags)
        elif field.name in flags:
            values[field.name] = convert_value(field.name, flags[field.name], hints[field.name])
    return options_class(**values)


def convert_value(name: str, value: Any, hint: Any) -> Any:
    """Return a value in the type of its flag. Lists become tuples, and strings become paths if the flag is a path.
    Raise ValueError for a value that is not one of the choices."""
    hints = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    choices = [choice for option in hints if get_origin(option) is Literal for choice in get_args(option)]
    if choices and value is not None and value not in choices:
        raise ValueError(f"{name} is {value!r}. Set one of {', '.join(map(repr, choices))}")
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and any(get_origin(option) is tuple for option in hints):
        return (value,)  # one value of a flag that accepts several
    if isinstance(value, str) and Path in hints:
        return Path(value)
    return str(value) if isinstance(value, Path) and Path not in hints else value
