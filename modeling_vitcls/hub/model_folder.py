"""A model folder: what is in the folder, and which of its results belong to its weights."""

import copy
import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import get_local_safetensors_metadata
from safetensors import SafetensorError
from transformers.dynamic_module_utils import get_relative_import_files

from ..model.configuration_vitcls import ViTCLSConfig
from ..model.image_processing_vitcls import ViTCLSImageProcessor
from ..model.modeling_vitcls import ViTCLSModel
from ..runtime.errors import format_error, format_name_list, warn_on_first_process
from ..runtime.files import read_json, read_text, replace_control_characters
from ..version import __version__
from .connection import silence_transformers
from .loading import get_model_folder
from .local_paths import BUILT_IN_DATASET, is_hub_dataset, strip_folders
from .model_code import SEPARATOR, compare_code, describe_code, is_newer, read_own_code
from .model_files import (
    ADDITION_FLAGS_FILE,
    ADDITIONS_KEY,
    CERTIFICATE_FILE,
    CODE_PATTERN,
    CONFIG_FILE,
    CONFIG_FILES,
    NOT_VITCLS,
    PARITY_REPORT_FILE,
    PROCESSOR_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    RESULTS_FILE,
    SAMPLE_IMAGES_FILE,
    check_is_vitcls,
    hash_settings,
    hash_weights,
    list_weight_files,
)
from .provenance import Provenance, find_provenance


# Model types that `vitcls convert --to transformers` writes.
NATIVE_MODEL_TYPES = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit")

# Model class -> Auto class; ViTCLSForMultiTaskClassification is a classifier as well
AUTO_CLASSES = {
    "ViTCLSForMultiTaskClassification": "AutoModelForImageClassification",
    "ViTCLSForMaskedImageModeling": "AutoModelForMaskedImageModeling",
    "ViTCLSBackbone": "AutoBackbone",
}

# A text such as 1e3 must be quoted: YAML 1.1 reads it as a text, and YAML 1.2 as a number
YAML_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")

# First parts of the names of weights that an encoder without a classifier does not use.
HEADS = {
    "classifier",
    "classifiers",
    "class_distance",
    "distillation_classifier",
    "extra_heads",
    "decoder",
}

MAX_PARAMETERS_PER_BYTE = 10  # No format of weights stores more
SOURCE_FLAGS = ("dataset", "model", "teacher")  # Flags that may contain local paths
# Names or prefixes of the flags that are not published: the destination of a push, and how the run
# was started
PRIVATE_FLAGS = ("push_to_hub", "hub_", "resume", "overwrite", "answers", "more_data")


def build_processor(config: ViTCLSConfig) -> ViTCLSImageProcessor:
    """Build the default image processor for a model; without three channels, with the mean 0.5."""
    height, width = config.image_height_width
    processor = ViTCLSImageProcessor(size={"height": height, "width": width})
    if config.num_channels != 3:
        processor.do_convert_rgb = False
        processor.image_mean = processor.image_std = (0.5,) * config.num_channels  # type: ignore[assignment]
    return processor


class ModelFolder:
    """The contents of a folder with a model, read on first access.

    Results, reports and ONNX files that contain the hash of other weights are ignored.

    Args:
        path: The folder.
        source: What the user named, for error messages, such as a Hub id. Default: the folder.

    Raises:
        ValueError: If the folder does not contain a model.
    """

    def __init__(self, path: Path, source: str | None = None) -> None:
        self.path = path
        self.source = str(path) if source is None else source
        if not path.is_dir():
            raise ValueError(f"{self.source} is not a folder. Specify the folder of a saved model")
        if not self.is_native:
            check_is_vitcls(self.source, path)

    @property
    def name(self) -> str:
        """The name of the folder, for titles."""
        return replace_control_characters(self.path.resolve().name)

    # Model ----------------------------------------------------------------------------------------

    @cached_property
    def is_native(self) -> bool:
        """Whether the model was converted to a class of transformers, and requires no code."""
        # The model type alone says nothing: any ViT of transformers has it. Only a conversion by
        # this package writes a parity report.
        return (
            self.read_saved(CONFIG_FILE).get("model_type") in NATIVE_MODEL_TYPES
            and (self.path / PARITY_REPORT_FILE).is_file()
            and not self.code_references
        )

    @cached_property
    def code_references(self) -> list[str]:
        """The code references in `auto_map`, such as `modeling_vitcls.ViTCLSModel`."""
        return list_code_references(
            [self.read_saved(name).get("auto_map") for name in CONFIG_FILES]
        )

    @cached_property
    def code_files(self) -> set[str]:
        """The names of the code files that the model requires, also indirectly."""
        names = {
            f"{reference.partition('.')[0]}.py"
            for reference in self.code_references
            if SEPARATOR not in reference
        }
        for name in list(names):
            # A missing file stays in the set, so that a push can report it.
            if (self.path / name).is_file():
                imported_files = get_relative_import_files(self.path / name)
                names |= {Path(file).name for file in imported_files}
        return names

    @cached_property
    def code_repository(self) -> str | None:
        """The repository whose code the Auto classes run; None for the code next to the weights."""
        repositories = [
            reference.partition(SEPARATOR)[0]
            for reference in self.code_references
            if SEPARATOR in reference
        ]
        return repositories[0] if repositories else None

    @cached_property
    def code(self) -> dict[str, bytes]:
        """The content of the code files by name; of this package if the folder has none.

        This package never runs the files of the folder.
        """
        names = {file.name for file in self.path.glob(CODE_PATTERN)} | self.code_files
        files = [self.path / name for name in names if (self.path / name).is_file()]
        return {file.name: file.read_bytes() for file in files} or read_own_code()

    @cached_property
    def other_code(self) -> list[str]:
        """The names of code files that differ from this package's; none if the folder has no code."""
        return compare_code(self.code, read_own_code())

    @cached_property
    def config(self) -> Any:
        """The `ViTCLSConfig` of a vitcls model; None for a class of transformers."""
        return None if self.is_native else ViTCLSConfig.from_pretrained(self.path)

    @cached_property
    def architecture(self) -> str:
        """The name of the model class."""
        names = self.read_saved(CONFIG_FILE).get("architectures") or ["ViTCLSModel"]
        return names[0]

    @property
    def auto_class(self) -> str:
        """The Auto class that loads the complete model. AutoModel loads the encoder of any model."""
        if "ForImageClassification" in self.architecture:
            return "AutoModelForImageClassification"
        return AUTO_CLASSES.get(self.architecture, "AutoModel")

    @property
    def has_processor(self) -> bool:
        """Whether the folder contains the settings of an image processor."""
        return (self.path / PROCESSOR_FILE).is_file()

    def load_processor(self) -> ViTCLSImageProcessor:
        """Load the image processor; without its file, build the default one with a warning."""
        if not self.has_processor:
            # As in folders that Trainer or PEFT wrote, which save only the model
            processor = build_processor(self.config)
            warn_on_first_process(
                f"{self.source} has no {PROCESSOR_FILE}: images are resized to {self.config.image_size} "
                f"pixels and normalized with the mean {processor.image_mean} and the standard "
                f"deviation {processor.image_std}. If the model was trained with another image "
                "processor, save it there: `processor.save_pretrained(FOLDER)`"
            )
            return processor
        file = self.path / PROCESSOR_FILE
        for name in read_json(file):
            if callable(getattr(ViTCLSImageProcessor, name, None)):
                raise ValueError(f"{file} sets {name}, which is no setting. Remove it")
        try:
            # Whoever calls it chooses the device.
            return ViTCLSImageProcessor.from_pretrained(self.path, device=None)
        except (TypeError, AttributeError, LookupError) as error:  # A value of another type
            raise ValueError(
                f"cannot use {file}: {format_error(error)}. Copy the file of the model again"
            ) from error

    def load(self, model_class: Any, **arguments: Any) -> Any:
        """Load the model in evaluation mode; `arguments` are of `from_pretrained`.

        Raise ValueError if a weight is missing, and as `load_partly` does.
        """
        model, missing_weights = self.load_partly(model_class, **arguments)
        if missing_weights:
            raise ValueError(
                f"the checkpoint {self.source} does not contain the weight {min(missing_weights)}. "
                "Train the model first"
            )
        return model

    def load_partly(self, model_class: Any, **arguments: Any) -> tuple[Any, set[str]]:
        """Load the model, and return it with the names of the weights that the folder lacks.

        `arguments` are passed to `from_pretrained`. Raise OSError without weights, and ValueError if the
        folder has weights that config.json has no place for. Heads may be unused.
        """
        # Results name the weights that are read here.
        if self.weights_sha256 is None:
            raise OSError(
                f"{self.source} lacks weights: {format_name_list(self.weight_files)}. Copy them there; an ONNX "
                "file serves without them (docs/exporting.md)"
            )
        self.warn_about_edited_settings()
        self.warn_about_other_code()

        arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        # Weights of the shape in config.json may exceed the memory, before they are compared
        with torch.device("meta"):
            size = model_class(copy.deepcopy(self.config)).num_parameters()
        num_bytes = sum((self.path / name).stat().st_size for name in self.weight_files)
        if size > MAX_PARAMETERS_PER_BYTE * num_bytes:
            raise ValueError(
                f"{CONFIG_FILE} of {self.source} is of a model with {size:,} parameters, but the "
                f"weights have {num_bytes:,} bytes. Use the configuration of the weights"
            )
        try:
            # Without transformers' warnings about missing and unused weights
            with silence_transformers():
                model, loading_info = model_class.from_pretrained(self.path, **arguments)
            # How a program wanted the outputs that saved the model
            model.config.return_dict = True
            model.config.output_hidden_states = False
            # Files that are mapped into memory and then overwritten change the outputs, and
            # shortened ones end the process.
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
        except SafetensorError as error:
            raise OSError(
                f"cannot load the weights in {self.source}: {format_error(error)}. Copy the file again"
            ) from error
        if self.read_weight_states() != self.first_weight_states:
            raise OSError(
                f"the weights in {self.source} were replaced while they were read, and it is not known which "
                "ones were read. Run the command again"
            )
        if mismatched := sorted(loading_info["mismatched_keys"]):
            name, saved_shape, expected_shape = mismatched[0]
            raise ValueError(
                f"{self.source} has weights of another shape than its {CONFIG_FILE} and the flags "
                f"say: {name} has shape {list(saved_shape)}, but the model requires "
                f"{list(expected_shape)}. Use the configuration of the weights"
            )

        # An encoder may be loaded from the folder of a classifier. Any other surplus weight means
        # that config.json describes a different model, which would compute something else without
        # an error.
        unused_modules = HEADS if model_class is ViTCLSModel else set()
        if getattr(model.base_model, "pooler", None) is None:
            unused_modules = unused_modules | {"pooler"}
        unexpected = [
            name
            for name in sorted(loading_info["unexpected_keys"])
            if name.removeprefix("vitcls.").partition(".")[0] not in unused_modules
        ]
        if unexpected:
            raise ValueError(
                f"{self.source} has {len(unexpected)} weights that {CONFIG_FILE} has no place for, "
                f"such as {', '.join(unexpected[:3])}. Restore the {CONFIG_FILE} that belongs to the "
                "weights. If a wrapper, such as DataParallel or Lightning's, put a prefix before the "
                "names, save the model inside it"
            )
        return model, set(loading_info["missing_keys"])

    def warn_about_other_code(self) -> None:
        """Log a line if the folder has other code than this package, which computes instead of it."""
        version = self.read_saved(CONFIG_FILE).get("code_version")
        if is_newer(version):
            warn_on_first_process(
                f"{self.source} has the code of modeling_vitcls {version}, which is newer than {__version__}, "
                "whose code computes here. Install the newer version"
            )
        elif self.other_code:
            warn_on_first_process(
                f"{self.source}: {describe_code(self.other_code)}, whose code computes here. The Auto classes "
                "run the code of the model with `trust_remote_code=True`"
            )

    def warn_about_edited_settings(self) -> None:
        """Log a line if settings of the model or the image processor changed after training."""
        trained_settings = self.results_of_any_weights.get("settings_sha256", {})
        if not isinstance(trained_settings, dict):
            raise ValueError(
                f"`settings_sha256` in {self.path / RESULTS_FILE} must be an object. Remove the file "
                "to use the model without its results"
            )
        settings = hash_settings(self.path)
        edited = [
            name
            for name in CONFIG_FILES
            if name in trained_settings and trained_settings[name] != settings.get(name)
        ]
        if edited:
            warn_on_first_process(
                f"{' and '.join(edited)} of {self.source} changed after training, so the outputs "
                f"may differ from those that {RESULTS_FILE} describes"
            )

    @cached_property
    def weight_files(self) -> list[str]:
        """The names of the weight files that the model loads, also of missing ones."""
        return list_weight_files(self.path)

    @cached_property
    def num_parameters(self) -> int:
        """The number of values in the weight files, without class statistics."""
        files = get_local_safetensors_metadata(self.path).files_metadata.values()
        return sum(
            tensor.parameter_count
            for file in files
            for name, tensor in file.tensors.items()
            if not name.startswith("class_distance.")
        )

    def check_is_complete(self) -> None:
        """Raise ValueError if files are missing."""
        for name in sorted(self.code_files.union(self.weight_files)):
            if not (self.path / name).is_file():
                raise ValueError(
                    f"{self.path} lacks {name}, which is required to load the model. Save the "
                    "model again"
                )

    # Run and conversion ---------------------------------------------------------------------------

    @cached_property
    def weights_sha256(self) -> dict[str, str] | None:
        """The SHA-256 of each weight file; None if one is missing."""
        if all((self.path / name).is_file() for name in self.weight_files):
            _ = self.first_weight_states
            return hash_weights(self.path)
        return None

    @cached_property
    def first_weight_states(self) -> list[tuple[int, ...]]:
        """The state of the weight files before they are hashed."""
        return self.read_weight_states()

    def read_weight_states(self) -> list[tuple[int, ...]]:
        """Read what changes if a weight file is replaced or written: its number, size and time."""
        states = [(self.path / name).stat() for name in self.weight_files]
        return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]

    @cached_property
    def results_of_any_weights(self) -> dict[str, Any]:
        """The contents of results.json, also of other weights; empty if there is no file."""
        return self.read_saved(RESULTS_FILE)

    @cached_property
    def results(self) -> dict[str, Any]:
        """The contents of results.json; empty if the results belong to other weights."""
        return self.read_current(RESULTS_FILE, "weights_sha256")

    @cached_property
    def parity_report(self) -> dict[str, Any]:
        """The contents of the parity report; empty if it belongs to other weights."""
        return self.read_current(PARITY_REPORT_FILE, "sha256")

    @cached_property
    def certificate(self) -> dict[str, Any]:
        """The certificate of an added task or class; empty if it belongs to other weights."""
        return self.read_current(CERTIFICATE_FILE, "weights_sha256")

    @cached_property
    def exports(self) -> dict[str, dict[str, Any]]:
        """The reports (FILE.json) of the exported files by file name.

        Files that were exported from other weights, or with other settings, are left out.
        """
        reports = {}
        for file in sorted(self.path.glob("*.onnx")):
            report = self.read_current(f"{file.name}.json", "weights_sha256")
            if not report:
                continue
            if report.get("settings_sha256") == hash_settings(self.path):
                reports[file.name] = report
            else:
                warn_on_first_process(
                    f"ignoring {file.name}, because {' or '.join(CONFIG_FILES)} changed after the "
                    "export. Remove it, and run `vitcls export` again"
                )
        return reports

    def read_saved(self, name: str) -> dict[str, Any]:
        """Read a JSON file; return an empty dict if there is none."""
        return read_json(self.path / name) if (self.path / name).is_file() else {}

    def read_current(self, name: str, key: str) -> dict[str, Any]:
        """Read a JSON file; return an empty dict if it belongs to other weights.

        `key` is the field with the hashes of the weights.
        """
        content = self.read_saved(name)
        if not content or content.get(key) == self.weights_sha256:
            return content
        warn_on_first_process(
            f"ignoring {name}, because it belongs to other weights, or weights in other files, than {self.path}"
        )
        return {}

    @cached_property
    def flags(self) -> dict[str, Any]:
        """The flags of the run that wrote the model; empty if they are missing or unreadable."""
        return self.read_flags(RECIPE_FILE)

    @cached_property
    def shown_flags(self) -> dict[str, Any]:
        """The flags of the command whose photos the report shows: the last addition, or the run."""
        return self.read_flags(ADDITION_FLAGS_FILE) if self.additions else self.flags

    def read_flags(self, name: str) -> dict[str, Any]:
        """Read a file of flags; return an empty dict if it is missing or unreadable."""
        try:
            flags: Any = yaml.safe_load(read_text(self.path / name))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            warn_on_first_process(f"ignoring {self.path / name}: {format_error(error)}")
            return {}
        return flags if isinstance(flags, dict) else {}

    @property
    def shareable_flags(self) -> dict[str, Any]:
        """The flags for publication, without unset flags, local folders or PRIVATE_FLAGS."""
        sources = {
            name: strip_folders(self.flags[name]) for name in SOURCE_FLAGS if self.flags.get(name)
        }
        # Readers repeat the run in a folder of their own, and a local path may contain the name of
        # a person.
        shareable_paths: dict[str, Any] = sources | {"output_dir": "my-model"}
        return {
            name: shareable_paths.get(name, value)
            for name, value in self.flags.items()
            if value is not None and not name.startswith(PRIVATE_FLAGS)
        }

    @cached_property
    def provenance(self) -> Provenance | None:
        """The provenance of the initial weights; None for random initial weights.

        It is read from results.json or the parity report, or else from the card.
        """
        # Also valid for weights that were changed afterwards
        for content in (self.results_of_any_weights, self.read_saved(PARITY_REPORT_FILE)):
            if "provenance" in content:
                values = content["provenance"]
                return None if values is None else Provenance.from_dict(values, self.path)
        return find_provenance(self.source)

    @cached_property
    def teacher_provenance(self) -> Provenance | None:
        """The provenance of the distillation teacher, if any."""
        values = self.results.get("teacher_provenance")
        return None if values is None else Provenance.from_dict(values, self.path)

    @property
    def hub_dataset(self) -> str | None:
        """The id of the dataset of the run, if it is on the Hub."""
        dataset = self.flags.get("dataset")
        return dataset if is_hub_dataset(dataset) else None

    @property
    def private_files(self) -> set[str]:
        """The files that show images, unless the only dataset is public."""
        dataset = self.shown_flags.get("dataset")
        is_public = dataset == BUILT_IN_DATASET or is_hub_dataset(dataset)
        return (
            set()
            if is_public and not self.shown_flags.get("more_data")
            else {REPORT_FILE, SAMPLE_IMAGES_FILE}
        )

    @property
    def additions(self) -> dict[str, Any]:
        """The records of the added tasks and classes that the model has: head -> record."""
        records = self.results.get(ADDITIONS_KEY, {})
        heads = self.config.get_extra_heads() if self.config is not None else {}
        return {name: records[name] for name in heads if name in records}


def open_vitcls(source: str) -> ModelFolder:
    """Open a vitcls model without converting anything: a folder, or `ID[@REVISION]` on the Hub.

    Raise ValueError for a model of another project.
    """
    # No id has a colon, but names such as timm:NAME have one.
    if Path(source).is_file() or (":" in source and not Path(source).is_dir()):
        raise ValueError(NOT_VITCLS.format(source))
    folder = ModelFolder(Path(get_model_folder(source)), source)
    if folder.is_native:
        raise ValueError(NOT_VITCLS.format(source))
    return folder


def list_code_references(auto_map: Any) -> list[str]:
    """List the references in an `auto_map` of config.json or preprocessor_config.json."""
    strings = re.findall(r'"([^"]*)"(:?)', json.dumps(auto_map))
    # A string before a colon is a key of a nested dict, not a reference.
    return [value for value, colon in strings if not colon]


class FlagsDumper(yaml.SafeDumper):
    """Writes YAML that means the same in the versions 1.1 and 1.2."""


FlagsDumper.add_implicit_resolver("tag:yaml.org,2002:float", YAML_NUMBER, None)


def dump_flags(flags: dict[str, Any]) -> str:
    """Write flags as the text of a recipe."""
    return yaml.dump(flags, Dumper=FlagsDumper, sort_keys=False)
