"""The commands as Python functions, for notebooks and other programs.

    from modeling_vitcls import evaluate, finetune, inspect_tokens, look, predict, pretrain
    from modeling_vitcls import add_class, add_task, verify_unchanged

    results = finetune("timm:vit_tiny_patch16_224", train_images, "runs/mine", epochs=5, batch_size=32)
    rows = predict("runs/mine", [image, "photo.jpg"], top_k=3)
    look("runs/mine", "photo.jpg")      # a PIL image, which a notebook shows

The functions compute with torch's default dtype, device and gradient mode, whatever the caller has
set, and leave the caller's random state as it was.

Keyword arguments are the flags of the commands: `learning_rate=1e-4` is `--learning-rate 1e-4`.
flags.py lists them with their types, for editors and type checkers. Errors name these arguments. A
dataset is a path, a Hub id, or data in memory (data/in_memory.py).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Unpack, get_args, get_origin, get_type_hints

from ..analysis.options import InspectOptions, LookOptions
from ..inference.options import EvaluateOptions, PredictOptions
from ..runtime.caller_state import with_own_state
from ..runtime.flags import find_similar_flag, get_flag_fields, get_value_types
from ..training.options import (
    AddClassOptions,
    AddTaskOptions,
    FinetuneOptions,
    PretrainOptions,
    VerifyUnchangedOptions,
)
from .flags import (
    EvaluateFlags,
    FinetuneFlags,
    InspectFlags,
    LookFlags,
    PredictFlags,
    PretrainFlags,
)


Options = TypeVar("Options")


@with_own_state
def finetune(
    model: str | Path, dataset: Any, output_dir: str | Path, **flags: Unpack[FinetuneFlags]
) -> dict[str, Any]:
    """Fine-tune a model on labeled images, as `vitcls finetune` does.

    Args:
        model: a preset, a folder or any other checkpoint that `--model` accepts.
        dataset: a path, a Hub id, a `datasets.Dataset` or `DatasetDict`, a torch Dataset, a list of
            (image, label), or a dict of splits.
        output_dir: output folder of the run.
        flags: other flags of `vitcls finetune`, which `FinetuneFlags` in flags.py lists.

    Returns:
        The contents of results.json, or of folds.json if `folds` is set.

    Raises:
        TypeError: if a flag is unknown.
        ValueError, OSError: if a flag has an invalid value, or the model or the data cannot be
            read.
        RunStopped: if the run is interrupted or fails.
        PushError: if `push_to_hub` is set and the push fails. The folder is complete.

    Example:
        >>> from modeling_vitcls import finetune
        >>> results = finetune("runs/photos", "photos", "runs/mine")
        >>> print(results["accuracy"], results["num_images"])
    """
    options = build_options(
        FinetuneOptions, model=model, dataset=dataset, output_dir=output_dir, **flags
    )
    return run_training(options)


@with_own_state
def pretrain(
    model: str | Path, dataset: Any, output_dir: str | Path, **flags: Unpack[PretrainFlags]
) -> dict[str, Any]:
    """Pre-train a model on images without labels, as `vitcls pretrain` does.

    The arguments, return value and errors are the same as for `finetune`, and the flags are those
    in `PretrainFlags`. The labels of the dataset are ignored.

    Example:
        >>> from modeling_vitcls import pretrain
        >>> results = pretrain("runs/photos", "photos", "runs/encoder", epochs=1)
    """
    options = build_options(
        PretrainOptions, model=model, dataset=dataset, output_dir=output_dir, **flags
    )
    return run_training(options)


def run_training(options: Any) -> dict[str, Any]:
    """Train, then write the report and the card and push the folder.

    Return the contents of results.json or folds.json, or an empty dict if `dry_run` is set.
    """
    from accelerate import PartialState

    from ..hub.model_folder import ModelFolder
    from ..publishing.after_run import build_uploader, finish_run, prepare_push
    from ..training.folds import run_folds
    from ..training.run import train

    repo_id = prepare_push(options)

    def train_one(options: Any) -> dict[str, Any]:
        folder = train(options, build_uploader(options.run, repo_id))
        if options.run.dry_run:
            return {}
        if PartialState().is_main_process:
            finish_run(folder, options.run, repo_id)
        return ModelFolder(folder).saved_results

    if options.data.folds is not None and options.data.fold is None and not options.run.dry_run:
        return run_folds(options, train_one)
    return train_one(options)


@with_own_state
def evaluate(model: str | Path, dataset: Any, **flags: Unpack[EvaluateFlags]) -> dict[str, Any]:
    """Evaluate a saved model or its frozen features, as `vitcls evaluate` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        dataset: as in `finetune`. All images of the split `test` are evaluated or, if there is
            none, of `validation` or the only split, except those that the model was trained on.
        flags: other flags of `vitcls evaluate`, which `EvaluateFlags` in flags.py lists.

    Returns:
        The metrics that `vitcls evaluate --output FILE` writes or, if `audit` is set, the numbers
        of issues, and the accuracy of the predictions that the labels were checked with.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Example:
        >>> from modeling_vitcls import evaluate
        >>> results = evaluate("runs/photos", "photos")
        >>> results["num_images"]
        40
    """
    return run_evaluation(build_options(EvaluateOptions, model=model, dataset=dataset, **flags))


def run_evaluation(options: EvaluateOptions) -> dict[str, Any]:
    """Evaluate the classifier or the frozen features, or audit the dataset."""
    from ..inference.evaluate import evaluate_checkpoint
    from ..inference.frozen import evaluate_frozen

    if options.audit is not None:
        from ..analysis.audit import audit_checkpoint

        return audit_checkpoint(options)
    if options.frozen:
        return evaluate_frozen(options)
    return evaluate_checkpoint(options)


@with_own_state
def predict(
    model: str | Path, images: Any = None, **flags: Unpack[PredictFlags]
) -> list[dict[str, Any]]:
    """Predict the labels of images, or compute their features, as `vitcls predict` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        images: a path, a URL, a data URI, an encoded image (bytes or a file object), a PIL image, an
            array or a tensor, or a list of these. An array of four dimensions is a batch. A folder
            path selects all images in the folder. To use a dataset instead, set `dataset`.
        flags: other flags of `vitcls predict`, which `PredictFlags` in flags.py lists.

    Returns:
        A list with one dict per image: `index`, `image`, the predicted columns, and `error` (None,
        or the reason why the image has no prediction).

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Example:
        >>> from modeling_vitcls import predict
        >>> (row,) = predict("runs/photos", ["photo.jpg"])
        >>> print(row["label"], row["probability"])
    """
    from ..inference.inputs import list_sources
    from ..inference.predict import predict_from_options

    sources = [] if images is None else list_sources(images)
    # PredictOptions requires one path per image
    placeholder_paths = tuple(map(str, range(len(sources))))
    # features require an output file
    fixed_flags: dict[str, Any] = {
        "paths": placeholder_paths,
        "output": Path("not-written.json"),
        "shard": None,
    }
    if images is not None and not sources:
        return []  # an empty list, not a missing one
    options = build_options(PredictOptions, model=model, **fixed_flags, **flags)
    return predict_from_options(options, sources)


@with_own_state
def inspect_tokens(model: str | Path, images: Any = (), **flags: Unpack[InspectFlags]) -> Any:
    """Write the report on the special tokens of a model, as `vitcls inspect` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        images: a path, a URL, or a list of paths or URLs. To inspect the images of a dataset
            instead, set `dataset`.
        flags: other flags of `vitcls inspect`, which `InspectFlags` in flags.py lists.

    Returns:
        An `Inspection` object with the values of the report.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Example:
        >>> from modeling_vitcls import inspect_tokens
        >>> inspection = inspect_tokens("runs/photos", dataset="photos", output="report.html")
        >>> for verdict in inspection.verdicts:
        ...     print(verdict.token, verdict.headline)
    """
    from ..analysis.inspect_tokens import inspect_tokens
    from ..inference.inputs import list_sources

    paths = list_sources(images)
    for path in paths:
        if not isinstance(path, str | Path):
            raise ValueError(
                f"`images` must be paths or URLs, but one is of type {type(path).__name__}. Save "
                "the images in files, or set `dataset` to a list of (image, label)"
            )
    return inspect_tokens(
        build_options(InspectOptions, model=model, paths=tuple(map(str, paths)), **flags)
    )


@with_own_state
def look(model: str | Path, image: Any, **flags: Unpack[LookFlags]) -> Any:
    """Draw what a model sees in a photo, as `vitcls look` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        image: a path, a URL, encoded bytes, a PIL image, or an array or tensor of one image.
        flags: `image_size` and `fit`, as in `vitcls look`.

    Returns:
        The sheet as a PIL image, 1,800 pixels wide. A notebook displays the image.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Example:
        >>> from modeling_vitcls import look
        >>> sheet = look("runs/photos", "photo.jpg")
        >>> sheet.width
        1800
    """
    from ..analysis.look import draw_photo

    fixed_flags: dict[str, Any] = {"paths": ("image",), "output": LookOptions.output, "json": None}
    return draw_photo(build_options(LookOptions, model=model, **fixed_flags, **flags), image)


@with_own_state
def add_task(
    model: str | Path, dataset: Any, name: str | None, output_dir: str | Path, **flags: Any
) -> dict[str, Any]:
    """Add a task to a finished model, as `vitcls add-task` does.

    The other outputs stay equal to the bit.

    Args:
        model: a classifier, a multi-task model or an encoder: a folder, a Hub id or any other ViT.
        dataset: images with the labels of the task, as in `finetune`.
        name: name of the task. None to only remove one (`remove_task`).
        output_dir: output folder, which must be empty or must not exist.
        flags: other flags of `vitcls add-task`.

    Returns:
        The record of the task in results.json: what its classifier reads, and its accuracy.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`; ValueError if another output would change.

    Example:
        >>> from modeling_vitcls import add_task
        >>> record = add_task("runs/digits", "photos", "pet", "runs/with-pet")
    """
    options = build_options(
        AddTaskOptions, model=model, dataset=dataset, name=name, output_dir=output_dir, **flags
    )
    return run_addition(options)


@with_own_state
def add_class(
    model: str | Path, dataset: Any, output_dir: str | Path, **flags: Any
) -> dict[str, Any]:
    """Add classes to a finished classifier, as `vitcls add-class` does.

    The logits of the old classes stay equal to the bit.

    Args:
        model: a classifier with one label per image: a folder or a Hub id.
        dataset: images of the new classes, as in `finetune`.
        output_dir: output folder, which must be empty or must not exist.
        flags: other flags of `vitcls add-class`, such as `old_dataset`.

    Returns:
        The record of the classes in results.json: their recall, and what the old classes lose.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`; ValueError if the old classes would lose
            too much.

    Example:
        >>> from modeling_vitcls import add_class
        >>> record = add_class("runs/digits", "photos", "runs/with-cats-and-dogs")
    """
    if not isinstance(flags.get("old_dataset", ""), str | Path | None):
        from ..data.in_memory import add_dataset

        flags["old_dataset"] = add_dataset(flags["old_dataset"])
    options = build_options(
        AddClassOptions, model=model, dataset=dataset, output_dir=output_dir, **flags
    )
    return run_addition(options)


def run_addition(options: AddTaskOptions | AddClassOptions) -> dict[str, Any]:
    """Add a task or classes, and write the card. Return the record of the addition."""
    from ..hub.model_folder import ModelFolder
    from ..publishing.card import write_card
    from ..training.additions import add_classes_from_options, add_task_from_options

    if isinstance(options, AddClassOptions):
        record = add_classes_from_options(options)
    else:
        record = add_task_from_options(options)
    write_card(ModelFolder(options.output_dir))
    return record


@with_own_state
def verify_unchanged(
    old: str | Path, new: str | Path, dataset: Any = None, **flags: Any
) -> dict[str, Any]:
    """Compare two models to the bit, as `vitcls verify-unchanged` does.

    The weights and the outputs are compared.

    Args:
        old, new: folders or Hub ids.
        dataset: images to compare the outputs with, as in `finetune`. Default: random pixels.
        flags: other flags of `vitcls verify-unchanged`.

    Returns:
        The certificate with `difference` None or, if the models differ, only `difference`.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Example:
        >>> from modeling_vitcls import add_task, verify_unchanged
        >>> record = add_task("runs/digits", "photos", "animal", "runs/with-animal")
        >>> verify_unchanged("runs/digits", "runs/with-animal")["difference"] is None
        True
    """
    from ..training.certificate import verify_models

    if dataset is not None:
        flags["dataset"] = dataset
    return verify_models(build_options(VerifyUnchangedOptions, old=old, new=new, **flags))


# Options ------------------------------------------------------------------------------------------


def build_options(options_class: type[Options], /, **flags: Any) -> Options:
    """Build the options of a command.

    An in-memory dataset is registered under a generated name. Raise TypeError if a flag is unknown,
    and ValueError if a value is not allowed.
    """
    known_flags = get_flag_fields(options_class).keys() - {"config"}
    for name in flags:
        if name not in known_flags:
            similar = find_similar_flag(name, known_flags)
            hint = f". Use {similar}" if similar else ""
            raise TypeError(f"unknown keyword argument {name!r}{hint}")
    if "dataset" in flags and not isinstance(flags["dataset"], str | Path):
        from ..data.in_memory import add_dataset

        flags["dataset"] = add_dataset(flags["dataset"])
    return build_dataclass(options_class, flags)


def build_dataclass(dataclass_type: Any, flags: dict[str, Any]) -> Any:
    """Build an options dataclass, including nested dataclasses, from flags (name -> value)."""
    field_values = {}
    type_hints = get_type_hints(dataclass_type)
    for field in dataclasses.fields(dataclass_type):
        if dataclasses.is_dataclass(field.type):
            field_values[field.name] = build_dataclass(field.type, flags)
        elif field.name in flags:
            field_values[field.name] = convert_value(
                field.name, flags[field.name], type_hints[field.name]
            )
    return dataclass_type(**field_values)


def convert_value(name: str, value: Any, type_hint: Any) -> Any:
    """Convert a value to the type of the flag `name`.

    Sequences become tuples, and strings become paths if the flag expects a path. Raise ValueError
    if the value is not one of the flag's choices.
    """
    value_types = get_value_types(type_hint)
    choices = get_choices(value_types)
    has_only_choices = choices and all(
        get_origin(type_) is Literal or type_ is type(None) for type_ in value_types
    )
    if choices and value not in [None, *choices] and (has_only_choices or isinstance(value, str)):
        raise ValueError(
            f"`{name}` is {value!r}. Set `{name}` to one of {', '.join(map(repr, choices))}"
        )
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(value)
    if (
        isinstance(value, str)
        and value not in choices
        and any(get_origin(type_) is tuple for type_ in value_types)
    ):
        return (value,)  # the flag accepts several values
    if isinstance(value, str) and Path in value_types:
        return Path(value)
    if isinstance(value, str) and not choices and str not in value_types:
        raise ValueError(
            f"`{name}` must be of type {value_types[0].__name__}, but it is the string {value!r}"
        )
    return str(value) if isinstance(value, Path) and Path not in value_types else value


def get_choices(value_types: tuple[Any, ...]) -> list[Any]:
    """Return the values of all Literal types."""
    literals = [type_ for type_ in value_types if get_origin(type_) is Literal]
    return [choice for literal in literals for choice in get_args(literal)]
