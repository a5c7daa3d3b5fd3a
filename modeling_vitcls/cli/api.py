"""The commands as Python functions, for notebooks and other programs.

    from modeling_vitcls import evaluate, finetune, inspect_tokens, look, predict
    from modeling_vitcls import add_class, add_task, verify_unchanged
    from modeling_vitcls import convert, export, push

    results = finetune("timm:vit_tiny_patch16_224", train_images, "runs/mine", epochs=5, batch_size=32)
    rows = predict("runs/mine", [image, "photo.jpg"], top_k=3)
    look("runs/mine", "photo.jpg")      # a PIL image, which a notebook shows

The functions compute with torch's default dtype, device and gradient mode, whatever the caller has
set, and leave the caller's random state as it was.

Keyword arguments are the flags of the commands: `learning_rate=1e-4` is `--learning-rate 1e-4`. They are
the fields of a class of options, which the docstring of the function names: the text below a field
explains it. Errors name these arguments. A dataset is a path, a Hub id, or data in memory
(data/in_memory.py).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..additions.options import AddClassOptions, AddTaskOptions, VerifyUnchangedOptions
from ..analysis.options import InspectOptions, LookOptions
from ..exporting.options import ExportOptions
from ..inference.options import EvaluateOptions, PredictOptions
from ..runtime.errors import warn_on_first_process
from ..runtime.flags import Options, check_types
from ..runtime.own_state import own_state
from ..training.options import FinetuneOptions
from .commands import (
    ConvertOptions,
    PushOptions,
    run_add_class,
    run_add_task,
    run_convert,
    run_finetune,
    run_push,
)
from .export import run_export


if TYPE_CHECKING:
    from ..publishing.push import PushedCommit


CommandOptions = TypeVar("CommandOptions", bound=Options)


@own_state()
def finetune(
    model: str | Path, dataset: Any, output_dir: str | Path, **flags: Any
) -> dict[str, Any]:
    """Fine-tune a model on labeled images, as `vitcls finetune` does.

    Args:
        model: a preset, a folder or any other checkpoint that `--model` accepts.
        dataset: a path, a Hub id, a `datasets.Dataset` or `DatasetDict`, a torch Dataset, a list of
            (image, label), or a dict of splits.
        output_dir: output folder of the run.
        flags: the other fields of `modeling_vitcls.training.options.FinetuneOptions`, which
            `vitcls finetune --help-all` explains.

    Returns:
        The contents of results.json.

    Raises:
        TypeError: if a flag is unknown.
        ValueError, OSError: if a flag has an invalid value, or the model or the data cannot be
            read.
        RunStopped: if the run is interrupted, its loss is not finite, or the model cannot be written.
        PushError: if `push_to_hub` is set and the push fails. The folder is complete.

    Examples:
        >>> from modeling_vitcls import finetune
        >>> results = finetune("runs/photos", "photos", "runs/mine")
        >>> print(results["accuracy"], results["num_images"])
    """
    return run_finetune(
        build_options(FinetuneOptions, model=model, dataset=dataset, output_dir=output_dir, **flags)
    )


@own_state()
def evaluate(model: str | Path, dataset: Any, **flags: Any) -> dict[str, Any]:
    """Evaluate a saved model, as `vitcls evaluate` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        dataset: as in `finetune`. All images of the split `test` are evaluated or, if there is
            none, of `validation` or the only split, except those that the model was trained on.
        flags: the other fields of `modeling_vitcls.inference.options.EvaluateOptions`, which
            `vitcls evaluate --help` explains.

    Returns:
        The metrics that `vitcls evaluate --output FILE` writes.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Examples:
        >>> from modeling_vitcls import evaluate
        >>> results = evaluate("runs/photos", "more")
        >>> results["num_images"]
        20
    """
    from ..evaluation.evaluate import evaluate_checkpoint

    return evaluate_checkpoint(
        build_options(EvaluateOptions, model=model, dataset=dataset, **flags)
    )


@own_state()
def predict(model: str | Path, images: Any = None, **flags: Any) -> list[dict[str, Any]]:
    """Predict the labels of images, or compute their features, as `vitcls predict` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        images: a path, a data URI, an encoded image (bytes or a file object), a PIL image, an array or
            a tensor, or a list of these. An array of four dimensions is a batch. A folder
            path selects all images in the folder. A `datasets.Dataset` or a DataFrame with an
            image column is the same as `dataset`.
        flags: the other fields of `modeling_vitcls.inference.options.PredictOptions`, which
            `vitcls predict --help` explains.

    Returns:
        A list with one dict per image: `index`, `image`, the predicted columns, `checksum` of its
        content, `trained` (whether it trained the model), `note` (None, or what the prediction does not see:
        other pages, nearly black scans), and `error` (None, or the reason why the
        image has no prediction).

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Examples:
        >>> from modeling_vitcls import predict
        >>> (row,) = predict("runs/photos", ["photo.jpg"])
        >>> print(row["label"], row["probability"])
    """
    from ..inference.inputs import open_input, wrap_images
    from ..inference.predictor import build_predictor

    if is_dataset(images):
        images, flags = None, {"dataset": images, **flags}
    options = build_options(PredictOptions, model=model, **flags)
    if options.strict or options.output or options.review or options.answers:
        raise ValueError(
            "`output`, `strict`, `review` and `answers` are for the command. Use the rows that are returned, "
            "such as `pandas.DataFrame(rows).to_csv(...)`, and their `error`"
        )
    if images is None:
        options.check_images()
        records, _ = open_input(options)
    elif options.dataset is None:
        records = wrap_images(images)
    else:
        raise ValueError("Set either `images` or `dataset` to select the images.")
    return list(build_predictor(options).iterate_rows(records)) if records else []


@own_state()
def inspect_tokens(model: str | Path, images: Any = (), **flags: Any) -> Any:
    """Write the report on the special tokens of a model, as `vitcls inspect` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        images: a path or a list of paths. A `datasets.Dataset` or a DataFrame with an image column is the
            same as `dataset`.
        flags: the other fields of `modeling_vitcls.analysis.options.InspectOptions`, which
            `vitcls inspect --help` explains.

    Returns:
        An `Inspection` object with the values of the report.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Examples:
        >>> from modeling_vitcls import inspect_tokens
        >>> inspection = inspect_tokens("runs/photos", dataset="more", output="report.html")
        >>> for effect in inspection.effects:
        ...     print(effect["token"], effect["verdict"])
    """
    from ..analysis.inspect_tokens import write_inspection
    from ..inference.inputs import list_sources

    if is_dataset(images):
        images, flags = (), {"dataset": images, **flags}
    paths = tuple(map(os.fspath, list_sources(images)))  # TypeError for images in memory
    return write_inspection(build_options(InspectOptions, model=model, paths=paths, **flags))


@own_state()
def look(model: str | Path, image: Any, output: str | Path | None = None, **flags: Any) -> Any:
    """Draw what a model sees in a photo, as `vitcls look` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        image: a path, encoded bytes, a PIL image, or an array or tensor of one image.
        output: HTML or image file for the sheet. Default: the sheet is only returned.
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

    options = build_options(LookOptions, model=model, output=output, **flags)
    return draw_photo(options, image)


@own_state()
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
    return run_add_task(
        build_options(
            AddTaskOptions, model=model, dataset=dataset, name=name, output_dir=output_dir, **flags
        )
    )


@own_state()
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
    return run_add_class(
        build_options(AddClassOptions, model=model, dataset=dataset, output_dir=output_dir, **flags)
    )


@own_state()
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
        The certificate with `difference` None; what differs in the models or their code otherwise.

    Raises:
        TypeError, ValueError, OSError: as in `finetune`.

    Examples:
        >>> from modeling_vitcls import add_task, verify_unchanged
        >>> record = add_task("runs/digits", "photos", "animal", "runs/with-animal")
        >>> verify_unchanged("runs/digits", "runs/with-animal")["difference"] is None
        True
    """
    from ..additions.certificate import verify_models

    options = build_options(VerifyUnchangedOptions, old=old, new=new, dataset=dataset, **flags)
    return verify_models(options)


@own_state()
def convert(model: str | Path, output: str | Path, **flags: Any) -> dict[str, Any]:
    """Convert a ViT of another project, and write its folder, as `vitcls convert` does.

    `ViTCLSModel.from_pretrained(model)` converts, too, and keeps the folder in a cache.

    Args:
        model: `timm:NAME`, `transformers:PATH_OR_ID` or a file of weights; with
            `to="transformers"`, a folder or Hub id of a vitcls model.
        output: output folder, which must be empty or must not exist.
        flags: `to` and `family`, as in `vitcls convert`.

    Returns:
        The contents of parity_report.json: the largest differences of the outputs, by image size.

    Raises:
        TypeError: if a flag is unknown.
        ValueError, OSError: if the source cannot be read or converted, or the outputs differ. Nothing is
            written then.

    Examples:
        >>> from modeling_vitcls import convert
        >>> report = convert("facebook/dinov2-small", "converted")  # doctest: +SKIP
        >>> report["comparisons"][0]["image_size"]  # doctest: +SKIP
        (518, 518)
    """
    return run_convert(build_options(ConvertOptions, model=model, output=output, **flags))


@own_state()
def export(model: str | Path, output: str | Path, **flags: Any) -> dict[str, Any]:
    """Export a model to ONNX, and compare the outputs, as `vitcls export` does.

    Args:
        model: a folder, a Hub id or any other checkpoint that `--model` accepts.
        output: a file (.onnx) that does not exist yet, or a folder for `model.onnx`.
        flags: `image_size`, `dynamic` and `dtype`, as in `vitcls export`.

    Returns:
        The contents of OUTPUT.json: the largest differences, inputs and outputs of the graph.

    Raises:
        TypeError, ValueError, OSError: as in `convert`.

    Examples:
        >>> from modeling_vitcls import export
        >>> report = export("runs/photos", "photos.onnx")
    """
    return run_export(build_options(ExportOptions, model=model, output=output, **flags))


@own_state()
def push(model: str | Path, hub_model_id: str | None = None, **flags: Any) -> "PushedCommit":
    """Push a model folder to the Hub with a card, and verify the commit, as `vitcls push` does.

    Args:
        model: the folder of a model.
        hub_model_id: the repository. Default: in your account, named after the folder.
        flags: `private`, `branch`, `create_pr`, `license`, `code_from`, `native`, `card_samples` and `verify`, as
            in `vitcls push`.

    Returns:
        The commit, with `repo_id`, `sha` and `url`.

    Raises:
        TypeError: if a flag is unknown.
        ValueError, OSError: if the folder is incomplete, or the token may not write to the repository.
        PushError: if the push fails. The message ends with the command that completes it.

    Examples:
        >>> from modeling_vitcls import push
        >>> commit = push("runs/photos", "ann/photos", private=True)  # doctest: +SKIP
        >>> print(commit.sha)  # doctest: +SKIP
    """
    return run_push(build_options(PushOptions, model=model, hub_model_id=hub_model_id, **flags))


# Options ------------------------------------------------------------------------------------------


def build_options(options_class: type[CommandOptions], /, **flags: Any) -> CommandOptions:
    """Build and check the options of a command. A dataset in memory gets a name.

    Raise TypeError if a flag is unknown, and ValueError if a value is not allowed.
    """
    warn_on_first_process.cache_clear()  # A line about skipped images is one of each call
    # A command reads the recipe before its other flags, and here nothing would.
    if "config" in flags:
        raise TypeError("`config` is a flag of the command. Set the values of the recipe instead")
    if not isinstance(flags.get("dataset"), str | Path | None):
        from ..data.in_memory import add_dataset

        # Options are written to the files of a run, where data in memory can only be a name.
        flags["dataset"] = add_dataset(flags["dataset"])
    options = options_class(**flags)
    # tyro checks the types of flags on a command line. Keywords come without such a check.
    check_types(options, flags)
    options.check()
    return options


def is_dataset(images: Any) -> bool:
    """Check whether images are a `datasets.Dataset` or a DataFrame."""
    return hasattr(images, "columns") or hasattr(images, "column_names")
