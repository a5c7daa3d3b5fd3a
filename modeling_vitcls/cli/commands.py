"""The commands, each a function of its options; `vitcls NAME` runs COMMANDS["NAME"].

The docstring of a function is a summary and, for `vitcls NAME --help`, examples. At module level, this file
and the files of options import only the standard library and tyro, because flags are parsed before torch is
imported.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from ..additions.options import AddClassOptions, AddTaskOptions, VerifyUnchangedOptions
from ..analysis.options import InspectOptions, LookOptions
from ..inference.options import EvaluateOptions, PredictOptions
from ..runtime.flags import Options, check_each
from ..training.options import FinetuneOptions
from .demo import run_demo
from .export import run_export


if TYPE_CHECKING:
    from ..hub.model_folder import ModelFolder
    from ..publishing.push import PushedCommit

LIBRARIES = "huggingface_hub datasets timm peft onnxruntime gradio tyro".split()
# Instructions that make bf16 and int8 fast, as in /proc/cpuinfo
INSTRUCTIONS = {"amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx_vnni"}


def run_finetune(options: FinetuneOptions) -> dict[str, Any]:
    """Fine-tune a ViT on labeled images.

    Examples:
        vitcls finetune --config scripts/recipes/digits.yaml --output-dir runs/digits
        vitcls finetune --model vitcls-tiny --dataset path/to/images --output-dir runs/mine

    To continue an interrupted run, repeat the command with --resume.
    """
    from accelerate import PartialState

    from ..hub.model_folder import ModelFolder
    from ..publishing.push import prepare_repository
    from ..publishing.report import finish_run
    from ..publishing.verify import push_and_verify
    from ..training.run import train

    repo_id = None
    # A token that may not write should be found now, not after hours of training. The run has not
    # built the Accelerator yet, so the launcher's variable has to tell the main process from the
    # others.
    if options.push_to_hub and os.environ.get("RANK", "0") == "0":
        repo_id = prepare_repository(options.hub_model_id, options.output_dir.resolve().name)
    path = train(options)
    folder = ModelFolder(path)
    if PartialState().is_main_process:
        finish_run(folder, options.report)
    if repo_id is not None:
        push_and_verify(folder, repo_id)
    return folder.results_of_any_weights


def run_evaluate(options: EvaluateOptions) -> None:
    """Evaluate a model on labeled images, each image exactly once.

    Examples:
        vitcls evaluate --model runs/digits --dataset digits
    """
    from ..evaluation.evaluate import evaluate_checkpoint

    evaluate_checkpoint(options)


def run_predict(options: PredictOptions) -> None:
    """Predict the labels of images, or write their features.

    Examples:
        vitcls predict --model runs/mine photo.jpg path/to/folder
        vitcls predict --model runs/mine --dataset table.csv --output labels.csv
        vitcls predict --model runs/mine --dataset path/or/hub-id --features cls --output cls.parquet
        vitcls predict --model runs/mine collection --output labels.csv --review review.html
    """
    from ..inference.predict import predict_images

    rows = predict_images(options)
    if options.review is not None:
        from ..publishing.review import write_review  # imports pandas

        write_review(options.review, options, rows)


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(Options):
    """Convert a ViT and save the converted model.

    Nothing is written if the outputs of the two models differ by more than the limit.
    """

    output: Path
    """Output folder, which must be empty or must not exist."""
    to: Literal["vitcls", "transformers"] = "vitcls"
    """Convert to a vitcls model, or a vitcls model to one of transformers, which requires no remote
    code."""
    model: str
    """timm:NAME, timm:NAME@FILE (weights from a file), transformers:PATH_OR_ID or a state-dict
    file. An id may end with @REVISION (commit, branch or tag). With --to transformers: folder or
    Hub id of a vitcls model."""
    family: str | None = None
    """Model family of a state-dict file, such as dino, deit, mae or dinov2. Default: detected from
    the parameter names."""


def run_convert(options: ConvertOptions) -> dict[str, Any]:
    """Convert a timm or transformers ViT, or convert a model back.

    Examples:
        vitcls convert timm:vit_base_patch14_reg4_dinov2.lvd142m converted
        vitcls convert transformers:facebook/dinov2-base@COMMIT converted
        vitcls convert dinov2_vits14_reg4_pretrain.pth converted
        vitcls convert runs/mine native --to transformers

    The first argument is `--model`, the second `--output`.
    """
    from ..conversion.convert import convert_checkpoint, convert_to_native
    from ..hub.model_folder import ModelFolder
    from ..publishing.card import write_card
    from ..publishing.push import build_push_command

    if options.to == "transformers":
        report = convert_to_native(options.model, options.output)
    else:
        report = convert_checkpoint(options.model, options.output, options.family)
    # The card is rendered from the files of the folder, so it comes last.
    write_card(ModelFolder(options.output))

    print(
        f"Largest differences between {report['model_class']} and {report['source']} (limit "
        f"{report['limit']:g}):"
    )
    for comparison in report["comparisons"]:
        differences = ", ".join(
            f"{name} {value:.1e}" for name, value in comparison["differences"].items()
        )
        print("- {} x {} pixels: {}".format(*comparison["image_size"], differences))
    if reason := report["preprocessing"]["assumed_because"]:
        print(f"Image processor: the settings are assumed, because {reason}. Check them")
    if report["not_compared"]:
        print(f"The models were not compared at a second size: {report['not_compared']}")
    print(*report["notes"], f"Classifier: {report['classifier']}", sep="\n")
    print(
        f"\nWritten to {options.output}. README.md has the code that loads the model. To push and "
        "verify the model, run"
    )
    repo_id = f"YOUR-NAME/{options.output.resolve().name}"
    print(f"  {build_push_command(options.output, repo_id)}")
    return report


def run_inspect(options: InspectOptions) -> None:
    """Show what the special tokens of a model do, in a report and a summary.

    Examples:
        vitcls inspect --model runs/mine photo.jpg path/to/folder --output report.html
        vitcls inspect --model runs/mine --dataset path/to/classes --output report.html
    """
    from ..analysis.inspect_tokens import write_inspection

    write_inspection(options)


def run_look(options: LookOptions) -> None:
    """Show what a model sees in a photo, on one sheet.

    Examples:
        vitcls look photo.jpg --model runs/mine -o sheet.html
        vitcls look path/to/folder --model timm:vit_small_patch16_224 -o sheets --image-size 448
    """
    from ..analysis.look import write_sheets

    write_sheets(options, options.output or Path("look.html"))


def run_add_task(options: AddTaskOptions) -> dict[str, Any]:
    """Add a task to a finished model, whose other outputs stay equal to the bit.

    Examples:
        vitcls add-task --model runs/mine --dataset path/to/weather --name weather --output-dir runs/with-weather
    """
    from ..additions.add_task import build_task
    from ..additions.extend import open_old_model
    from ..additions.records import write_addition
    from ..hub.model_folder import ModelFolder
    from ..publishing.report import finish_run

    with open_old_model(options) as old:
        record = write_addition(old, build_task(old, options))
    finish_run(ModelFolder(options.output_dir))
    return record


def run_add_class(options: AddClassOptions) -> dict[str, Any]:
    """Add classes to a classifier, whose old logits stay equal to the bit.

    Examples:
        vitcls add-class --model runs/mine --dataset path/to/new --output-dir runs/with-new
    """
    from ..additions.add_class import build_classes
    from ..additions.extend import open_old_model
    from ..additions.records import write_addition
    from ..hub.model_folder import ModelFolder
    from ..publishing.report import finish_run

    with open_old_model(options) as old:
        record = write_addition(old, build_classes(old, options))
    finish_run(ModelFolder(options.output_dir))
    return record


def run_verify_unchanged(options: VerifyUnchangedOptions) -> None:
    """Compare the weights and the outputs of two models, to the bit.

    Examples:
        vitcls verify-unchanged runs/mine runs/with-weather --dataset path/to/images
    """
    from ..additions.certificate import verify_models

    if verify_models(options)["difference"]:
        raise SystemExit(1)


@dataclass(frozen=True, kw_only=True)
class PushOptions(Options):
    """Push a model folder to the Hub and verify the pushed commit."""

    model: Path
    """Folder of the model."""
    hub_model_id: str | None = None
    """Repository to push to. Default: a repository in your account, named after the folder."""
    private: bool = False
    """If the repository does not exist, create it as a private repository."""
    branch: str | None = None
    """Branch to push to, created if it does not exist. Default: main."""
    create_pr: bool = False
    """Open a pull request in a repository that exists, for somebody who may write to it to merge."""
    license: str | None = None
    """License of the weights for the model card: a Hub identifier such as apache-2.0. Default: the
    license of the initial weights, if they have one."""
    code_from: str | None = None
    """Repository with the code, as ID[@REVISION]: the model is pushed without code and refers to it.
    `vitcls push-code` publishes one. Default: the code is pushed with the model, unless the model
    refers to a repository already."""
    native: bool = False
    """Convert the model to a class of transformers with the same outputs, and push that. It requires no
    code and no `trust_remote_code`. The card of a model says whether this is possible."""
    card_samples: bool = False
    """Show a few held-out images in the model card, and publish report.html with held-out and
    training images, even if the repository is public and the images are local files. Images of
    `digits` and of datasets on the Hub are always published."""
    verify: bool = True
    """Load the model from the pushed commit in a new process, and compare its outputs with the
    outputs of --model."""

    def check(self) -> None:
        super().check()
        is_identifier = re.compile(r"[a-z0-9.-]+").fullmatch
        check_each(self, is_identifier, "an identifier, such as apache-2.0", "license")


def run_push(options: PushOptions) -> "PushedCommit":
    """Push a model folder to the Hub and verify the pushed commit.

    Examples:
        vitcls push --model runs/mine --hub-model-id me/my-model

    A push requires a token: run `hf auth login`, or set HF_TOKEN.
    """
    import tempfile

    from ..hub.model_folder import ModelFolder

    if not options.native:
        return push_model_folder(ModelFolder(options.model), options)
    with tempfile.TemporaryDirectory(prefix="vitcls-native-") as parent:
        folder = convert_to_push(options.model, Path(parent, options.model.resolve().name))
        return push_model_folder(folder, options)


def convert_to_push(model: Path, output: Path) -> "ModelFolder":
    """Convert a complete model to a class of transformers, compare the outputs, and write its card.

    Raise ConversionError, a ValueError, if no class has the outputs of the model.
    """
    from ..conversion.convert import convert_to_native
    from ..conversion.to_transformers import find_transformers_class
    from ..hub.model_folder import ModelFolder, open_vitcls
    from ..publishing.card import write_card

    folder = open_vitcls(str(model))
    # A conversion of a model with other heads would have its encoder only
    find_transformers_class(folder.architecture, folder.config)
    report = convert_to_native(str(model), output)
    largest = max(value for each in report["comparisons"] for value in each["differences"].values())
    print(f"converted to transformers: {report['model_class']}, largest difference {largest:.1e}")
    write_card(ModelFolder(output))
    return ModelFolder(output)


def push_model_folder(folder: "ModelFolder", options: PushOptions) -> "PushedCommit":
    """Check a folder and the right to push, then push and verify it."""
    from ..publishing.published_files import collect_files
    from ..publishing.push import find_code, prepare_repository
    from ..publishing.verify import push_and_verify

    # This comes first, so a folder that cannot be pushed leaves no empty repository on the Hub.
    folder.check_is_complete()
    folder.warn_about_edited_settings()
    name = options.model.resolve().name
    code_from = find_code(folder, options.code_from)
    collect_files(folder, options.hub_model_id or name, options.license, code_from=code_from)
    repo_id = prepare_repository(
        options.hub_model_id, name, options.private, create_pr=options.create_pr
    )
    return push_and_verify(
        folder,
        repo_id,
        options.verify,
        private=options.private,
        branch=options.branch,
        create_pr=options.create_pr,
        license_id=options.license,
        card_samples=options.card_samples,
        code_from=options.code_from,
        native_of=options.model if options.native else None,
    )


@dataclass(frozen=True, kw_only=True)
class PushCodeOptions(Options):
    """Publish the code of this package as a repository, to which models can refer."""

    hub_model_id: Annotated[str, Positional, arg(metavar="ID")]
    """The repository, such as ME/vitcls-code."""
    private: bool = False
    """If the repository does not exist, create it as a private repository."""


def run_push_code(options: PushCodeOptions) -> "PushedCommit":
    """Publish the code that travels with models as a repository of its own.

    Examples:
        vitcls push-code me/vitcls-code
        vitcls push --model runs/mine --code-from me/vitcls-code

    Models that refer to the repository run its newest code, unless a program sets `code_revision`. Each
    version of the code has a tag.
    """
    from ..publishing.shared_code import push_code

    pushed, tag = push_code(options.hub_model_id, options.private)
    print(f"pushed    {pushed.url} (tag {tag})")
    print(f"refer to it:\n  vitcls push --model FOLDER --code-from {pushed.repo_id}")
    return pushed


@dataclass(frozen=True, kw_only=True)
class UpdateCodeOptions(Options):
    """List the code of published models, and replace it by the code of this package."""

    names: Annotated[tuple[str, ...], Positional, arg(metavar="ACCOUNT|ID")]
    """Accounts, whose models are all listed, and models."""
    push: bool = False
    """Replace the code where all outputs are equal to the bit. Default: only list the models."""
    create_pr: bool = False
    """Open a pull request in each of these repositories instead."""


def run_update_code(options: UpdateCodeOptions) -> list[Any]:
    """List the code of published models; with --push, replace what computes the same.

    Examples:
        vitcls update-code my-lab
        vitcls update-code my-lab/birds my-lab/cats --push

    Before the code of a model is replaced, the old and the new code compute the outputs for fixed images,
    each in a new process without this package. The code in the repositories runs there. A model whose
    outputs differ keeps its code, and the exit status is 1.
    """
    from ..publishing.shared_code import update_code

    rows = update_code(options.names, options.push or options.create_pr, options.create_pr)
    if any(row.reason for row in rows):
        raise SystemExit(1)
    return rows


class EnvOptions(Options):
    """Print versions, the device, CPU kernels and where features are kept, for bug reports."""


def run_env(options: EnvOptions) -> None:
    """Print versions, the device, CPU kernels and where features are kept, for bug reports."""
    import platform

    import torch

    from ..inference.feature_store import describe_store
    from ..runtime.system import format_device_name, get_processor_name, get_versions
    from ..speed import cpu_kernels as kernels

    cpuinfo = Path("/proc/cpuinfo")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    cpu_flags = set(cpuinfo.read_text(encoding="utf-8").split()) if cpuinfo.is_file() else set()
    environment = get_versions(*LIBRARIES) | {
        "platform": platform.platform(),
        "processor": get_processor_name(),
        "instructions": ", ".join(
            [torch.backends.cpu.get_cpu_capability(), *sorted(INSTRUCTIONS & cpu_flags)]
        ),
        "device": format_device_name(accelerator or torch.device("cpu")),
        "CPU kernels": "on" if kernels.can_use_cpu_kernels() else "off",
        "kept features": describe_store(),
    }
    for name, value in environment.items():
        print(f"{name:<16}  {value}")


# In the order of the help
COMMANDS: dict[str, Callable[[Any], Any]] = {
    "finetune": run_finetune,
    "evaluate": run_evaluate,
    "predict": run_predict,
    "convert": run_convert,
    "inspect": run_inspect,
    "look": run_look,
    "add-task": run_add_task,
    "add-class": run_add_class,
    "verify-unchanged": run_verify_unchanged,
    "push": run_push,
    "push-code": run_push_code,
    "update-code": run_update_code,
    "export": run_export,
    "demo": run_demo,
    "env": run_env,
}
