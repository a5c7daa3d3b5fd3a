"""The commands as Python functions, for notebooks and other programs.

    from modeling_vitcls import evaluate, finetune, inspect_tokens, look, predict, pretrain
    from modeling_vitcls import add_class, add_task, verify_unchanged

    results = finetune("timm:vit_tiny_patch16_224", train_images, "runs/mine", epochs=5, batch_size=32)
    rows = predict("runs/mine", [image, "photo.jpg"], top_k=3)
    look("runs/mine", "photo.jpg")      # a PIL image, which a notebook shows

The functions compute with torch's default dtype, device and gradient mode, whatever the caller has
set, and leave the caller's random state as it was.

Keyword arguments are the flags of the commands: `learning_rate=1e-4` is `--learning-rate 1e-4`.
`help(finetune)` lists them with their types and defaults. Errors name these arguments. A dataset is
a path, a Hub id, or data in memory (data/in_memory.py).
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

from ..analysis.options import InspectOptions, LookOptions
from ..inference.options import EvaluateOptions, PredictOptions
from ..runtime.caller_state import with_own_state
from ..runtime.flags import (
    Options,
    find_similar_flag,
    get_flag_fields,
    get_value_types,
    list_choices,
)
from ..training.options import (
    AddClassOptions,
    AddTaskOptions,
    FinetuneOptions,
    PretrainOptions,
    VerifyUnchangedOptions,
)


CommandOptions = TypeVar("CommandOptions", bound=Options)
Function = TypeVar("Function", bound=Callable[..., Any])
# Fields that are no keyword arguments, because they are flags of the command line
COMMAND_FIELDS = ("config", "paths")


def shows_flags_of(options_class: type[Options], *omitted: str) -> Callable[[Function], Function]:
    """Decorate a function that takes the fields of an options class as keyword arguments.

    `help`, notebooks and editors then show the fields with their types and defaults, except for
    those in `omitted`.
    """

    def add_signature(function: Function) -> Function:
        parameters = [
            parameter
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        shown_names = {parameter.name for parameter in parameters}.union(COMMAND_FIELDS, omitted)
        for name, field in get_flag_fields(options_class).items():
            if name not in shown_names:
                has_default = field.default is not dataclasses.MISSING
                parameters.append(
                    inspect.Parameter(
                        name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=field.default if has_default else inspect.Parameter.empty,
                        annotation=field.type,
                    )
                )
        function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return function

    return add_signature


@with_own_state
@shows_flags_of(FinetuneOptions)
def finetune(
    model: str | Path, dataset: Any, output_dir: str | Path, **flags: Any
) -> dict[str, Any]:
    """Fine-tune a model on labeled images, as `vitcls finetune` does.

    Args:
        model: a preset, a folder or any other checkpoint that `--model` accepts.
        dataset: a path, a Hub id, a `datasets.Dataset` or `DatasetDict`, a torch Dataset, a list of
            (image, label), or a dict of splits.
        output_dir: output folder of the run.
        flags: other flags of `vitcls finetune`, which `help` lists.

    Returns:
        The contents of results.json.

    Raises:
        TypeError: if a flag is unknown.
        ValueError, OSError: if a flag has an invalid value, or the model or the data cannot be
            read.
        RunStopped: if the run is interrupted or fails.
        PushError: if `push_to_hub` is set and the push fails. The folder is complete.

    Examples:
        >>> from modeling_vitcls import finetune
        >>> results = finetune("runs/photos", "photos", "runs/mine")
        >>> print(results["accuracy"], results["num_images"])
    """
    options = build_options(
        FinetuneOptions, model=model, dataset=dataset, output_dir=output_dir, **flags
    )
    return run_training(options)


@with_own_state
@shows_flags_of(PretrainOptions)
def pretrain(
    model: str | Path, dataset: Any, output_dir: str | Path, **flags: Any
) -> dict[str, Any]:
    """Pre-train a model on images without labels, as `vitcls pretrain` does.

    The arguments, return value and errors are the same as for `finetune`, and the flags are those
    of `vitcls pretrain`. The labels of the dataset are ignored.

    Examples:
        >>> from modeling_vitcls import pretrain
        >>> results = pretrain("runs/photos", "photos", "runs/encoder", epochs=1)
    """
    options = build_options(
        PretrainOptions, model=model, dataset=dataset, output_dir=output_dir, **flags
    )
    return run_training(options)


def run_training(options: Any) -> dict[str, Any]:
    """Train, then write the report and the card and push the folder.

    Return the contents of results.json.
    """
    from accelerate import PartialState

    from ..hub.model_folder import ModelFolder
    from ..publishing.after_run import finish_run, prepare_push
    from ..training.run import train

    repo_id = prepare_push(options)
    folder = train(options)
    if PartialState().is_main_process:
        finish_run(folder, options, repo_id)
    return ModelFolder(folder).saved_results


@with_own_state
@shows_flags_of(EvaluateOptions)
def evaluate(model: str | Path, dataset: Any, **flags: Any) -> dict[str, Any]:
    """Evaluate a saved model, as `vitcls evaluate` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        dataset: as in `finetune`. All images of the split `test` are evaluated or, if there is
            none, of `validation` or the only split, except those that the model was trained on.
        flags: other flags of `vitcls evaluate`, which `help` lists.

    Returns:
        The metrics that `vitcls evaluate --output FILE` writes.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Examples:
        >>> from modeling_vitcls import evaluate
        >>> results = evaluate("runs/photos", "photos")
        >>> results["num_images"]
        40
    """
    from ..inference.evaluate import evaluate_checkpoint

    return evaluate_checkpoint(
        build_options(EvaluateOptions, model=model, dataset=dataset, **flags)
    )


@with_own_state
@shows_flags_of(PredictOptions, "output")
def predict(model: str | Path, images: Any = None, **flags: Any) -> list[dict[str, Any]]:
    """Predict the labels of images, or compute their features, as `vitcls predict` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        images: a path, a data URI, an encoded image (bytes or a file object), a PIL image, an array or
            a tensor, or a list of these. An array of four dimensions is a batch. A folder
            path selects all images in the folder. To use a dataset instead, set `dataset`.
        flags: other flags of `vitcls predict`, which `help` lists.

    Returns:
        A list with one dict per image: `index`, `image`, the predicted columns, and `error` (None,
        or the reason why the image has no prediction).

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Examples:
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
    }
    if images is not None and not sources:
        return []  # an empty list, not a missing one
    options = build_options(PredictOptions, fixed_flags, model=model, **flags)
    return predict_from_options(options, sources)


@with_own_state
@shows_flags_of(InspectOptions)
def inspect_tokens(model: str | Path, images: Any = (), **flags: Any) -> Any:
    """Write the report on the special tokens of a model, as `vitcls inspect` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        images: a path or a list of paths. To inspect the images of a dataset instead, set
            `dataset`.
        flags: other flags of `vitcls inspect`, which `help` lists.

    Returns:
        An `Inspection` object with the values of the report.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Examples:
        >>> from modeling_vitcls import inspect_tokens
        >>> inspection = inspect_tokens("runs/photos", dataset="photos", output="report.html")
        >>> for token, output, effect in inspection.effects:
        ...     print(token, effect.changed, effect.comparison)
    """
    from ..analysis.inspect_tokens import inspect_tokens
    from ..inference.inputs import list_sources

    paths = list_sources(images)
    for path in paths:
        if not isinstance(path, str | Path):
            raise ValueError(
                f"`images` must be paths, but one is of type {type(path).__name__}. Save "
                "the images in files, or set `dataset` to a list of (image, label)"
            )
    return inspect_tokens(
        build_options(InspectOptions, model=model, paths=tuple(map(str, paths)), **flags)
    )


@with_own_state
@shows_flags_of(LookOptions, "json")
def look(model: str | Path, image: Any, output: str | Path | None = None, **flags: Any) -> Any:
    """Draw what a model sees in a photo, as `vitcls look` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        image: a path, encoded bytes, a PIL image, or an array or tensor of one image.
        output: image file for the sheet. Default: the sheet is only returned.
        flags: `image_size` and `resize`, as in `vitcls look`.

    Returns:
        The sheet as a PIL image, 1,800 pixels wide. A notebook displays the image.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Examples:
        >>> from modeling_vitcls import look
        >>> sheet = look("runs/photos", "photo.jpg")
        >>> sheet.width
        1800
    """
    from ..analysis.look import draw_photo

    fixed_flags: dict[str, Any] = {"paths": ("image",), "json": None}
    if output is not None:
        flags["output"] = output
    sheet = draw_photo(build_options(LookOptions, fixed_flags, model=model, **flags), image)
    if output is not None:
        sheet.save(output)
    return sheet


@with_own_state
@shows_flags_of(AddTaskOptions)
def add_task(
    model: str | Path, dataset: Any, name: str, output_dir: str | Path, **flags: Any
) -> dict[str, Any]:
    """Add a task to a finished model, as `vitcls add-task` does.

    The other outputs stay equal to the bit.

    Args:
        model: a vitcls model (classifier, multi-task model or encoder): a folder or a Hub id.
        dataset: images with the labels of the task, as in `finetune`.
        name: name of the task.
        output_dir: output folder, which must be empty or must not exist.
        flags: other flags of `vitcls add-task`.

    Returns:
        The record of the task in results.json: what its classifier reads, and its accuracy.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`; ValueError if another output would change.

    Examples:
        >>> from modeling_vitcls import add_task
        >>> record = add_task("runs/digits", "photos", "pet", "runs/with-pet")
    """
    from ..training.additions import add_task_from_options

    return add_task_from_options(
        build_options(
            AddTaskOptions, model=model, dataset=dataset, name=name, output_dir=output_dir, **flags
        )
    )


@with_own_state
@shows_flags_of(AddClassOptions)
def add_class(
    model: str | Path, dataset: Any, output_dir: str | Path, **flags: Any
) -> dict[str, Any]:
    """Add classes to a finished classifier, as `vitcls add-class` does.

    The logits of the old classes stay equal to the bit.

    Args:
        model: a vitcls classifier with class statistics, as `finetune` writes it: a folder or a
            Hub id.
        dataset: images of the new classes, as in `finetune`.
        output_dir: output folder, which must be empty or must not exist.
        flags: other flags of `vitcls add-class`.

    Returns:
        The record of the classes in results.json, with their recall.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`; ValueError if an old logit would change.

    Examples:
        >>> from modeling_vitcls import add_class
        >>> record = add_class("runs/digits", "photos", "runs/with-cats-and-dogs")
    """
    from ..training.additions import add_classes_from_options

    return add_classes_from_options(
        build_options(AddClassOptions, model=model, dataset=dataset, output_dir=output_dir, **flags)
    )


@with_own_state
@shows_flags_of(VerifyUnchangedOptions)
def verify_unchanged(
    old: str | Path, new: str | Path, dataset: Any = None, **flags: Any
) -> dict[str, Any]:
    """Compare two models to the bit, as `vitcls verify-unchanged` does.

    The weights and the outputs are compared.

    Args:
        old, new: folders or Hub ids of vitcls models.
        dataset: images to compare the outputs with, as in `finetune`. Default: random pixels.
        flags: other flags of `vitcls verify-unchanged`.

    Returns:
        The certificate with `difference` None or, if the models differ, only `difference`.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Examples:
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


def build_options(
    options_class: type[CommandOptions], /, fixed: dict[str, Any] | None = None, **flags: Any
) -> CommandOptions:
    """Build and check the options of a command.

    An in-memory dataset is registered under a generated name. Raise TypeError if a flag is unknown,
    and ValueError if a value is not allowed.

    Args:
        options_class: the class of the options.
        fixed: values of fields that the caller of the function cannot set.
        flags: values of the other fields.
    """
    fixed = fixed or {}
    fields = get_flag_fields(options_class)
    known_flags = fields.keys() - fixed.keys() - {"config"}
    for name in flags:
        if name not in known_flags:
            similar = find_similar_flag(name, known_flags)
            hint = f". Use {similar}" if similar else ""
            raise TypeError(f"unknown keyword argument {name!r}{hint}")
    if "dataset" in flags and not isinstance(flags["dataset"], str | Path | None):
        from ..data.in_memory import add_dataset

        flags["dataset"] = add_dataset(flags["dataset"])
    values = {name: convert_value(fields[name], value) for name, value in flags.items()}
    options = options_class(**fixed, **values)
    options.check()
    return options


def convert_value(field: dataclasses.Field[Any], value: Any) -> Any:
    """Convert a value to the type of a field.

    Sequences become tuples, a single text becomes a tuple if the field has several values, and
    texts become paths if the field is a path. Raise ValueError if the value has another type, or is
    not one of the choices.
    """
    from huggingface_hub.dataclasses import type_validator

    value_types = get_value_types(field.type)
    if isinstance(value, str | Path):
        if Path in value_types:
            value = Path(value)
        elif str in value_types:
            value = str(value)
        elif value != "native" and any(get_origin(each) is tuple for each in value_types):
            value = (str(value),)
    elif isinstance(value, Sequence):
        value = tuple(value)
    elif type(value) is int and float in value_types and int not in value_types:  # no bool
        value = float(value)

    try:
        type_validator(field.name, value, field.type)
    except (TypeError, ValueError):
        choices = ", ".join(map(repr, list_choices(field.type)))
        expected = f"one of {choices}" if choices else inspect.formatannotation(field.type)
        raise ValueError(f"`{field.name}` is {value!r}, but it must be {expected}") from None
    return value
