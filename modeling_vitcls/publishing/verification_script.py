"""Load a published model in a process without this package, and save the outputs of the model.

    python -P verification_script.py REQUEST.json        # run by verify.py, with an empty cache

REQUEST.json contains `repo_id`, `revision`, `trust_remote_code`, `num_threads`, the folder `target`, and
`code_repo_id` and `code_revision`, which are null if the code is in the repository of the model. In `target`, the
script saves report.json with the loaded classes or the error and, on success, outputs.safetensors with the outputs for
fixed inputs.

The code of the repository runs only in this process. The reference outputs come from verification_reference.py, which
shares `collect_outputs` with this file. The script imports torch, transformers and other libraries, but not this
package.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from PIL import Image
from safetensors.torch import save_file
from transformers.utils import is_torchvision_available


PACKAGE_NAME = "modeling_vitcls"
# Model class -> Auto class that loads the complete model. AutoModel loads the encoder of any checkpoint.
AUTO_CLASSES = {
    "ViTCLSForImageClassification": "AutoModelForImageClassification",
    "ViTCLSForMultiTaskClassification": "AutoModelForImageClassification",
    "ViTCLSForMaskedImageModeling": "AutoModelForMaskedImageModeling",
    "ViTCLSBackbone": "AutoBackbone",
}
PROCESSOR_CONFIG_FILE = "preprocessor_config.json"
FLOAT32_OPTIONS: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
BATCH_SIZE = 2
SEED = 0

Outputs = dict[str, torch.Tensor]


class PackageBlocker(MetaPathFinder):
    """Import hook that makes `import modeling_vitcls` fail as if the package were not installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Raise ModuleNotFoundError for modeling_vitcls and its submodules; ignore all other modules."""
        if fullname.partition(".")[0] == PACKAGE_NAME:
            raise ModuleNotFoundError(f"No module named {fullname!r}")


def main(request_file: Path) -> None:
    """Load the model, and write report.json and outputs.safetensors."""
    request = json.loads(request_file.read_text(encoding="utf-8"))
    output_folder = Path(request["target"])
    torch.set_num_threads(request["num_threads"])  # the number of threads affects rounding
    report: dict[str, Any]
    code_repo_id, code_revision = request["code_repo_id"], request["code_revision"]
    try:
        loader = HubLoader(request["repo_id"], request["revision"], code_revision, request["trust_remote_code"])
        outputs, report = collect_outputs(loader)
    except Exception as error:  # published code may raise any error
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        report = {"error": message, "can_retry": isinstance(error, OSError)}  # network errors are instances of OSError
    else:
        save_file(outputs, output_folder / "outputs.safetensors")
        report["commits"] = list_cached_commits(request["repo_id"])
        report["code_commits"] = list_cached_commits(code_repo_id) if code_repo_id else []
    report["has_package"] = any(name.partition(".")[0] == PACKAGE_NAME for name in sys.modules)
    (output_folder / "report.json").write_text(json.dumps(report), encoding="utf-8")


def list_cached_commits(repo_id: str) -> list[str]:
    """Return the hashes of the commits whose files are in the cache of a repository."""
    cache_folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))
    return sorted(snapshot.name for snapshot in (cache_folder / "snapshots").glob("*") if any(snapshot.iterdir()))


@dataclass(frozen=True)
class HubLoader:
    """Loads a model from the Hub, or from a folder, with the Auto classes and the `pipeline` function."""

    repo_id: str
    revision: str = "main"
    code_revision: str | None = None
    # Whether the code in the repository is run; if False, the classes of transformers are used.
    trust_remote_code: bool = True

    def get_loading_options(self) -> dict[str, Any]:
        """Return keyword arguments for `from_pretrained`: the pinned commits and `trust_remote_code`."""
        loading_options: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return loading_options | ({"code_revision": self.code_revision} if self.code_revision else {})

    def load_config(self) -> Any:
        """Load the model configuration."""
        return transformers.AutoConfig.from_pretrained(self.repo_id, **self.get_loading_options())

    def load_model(self, auto_class: str, config: Any) -> tuple[Any, dict[str, Any]]:
        """Load the model in float32 with an Auto class; return the model and transformers' loading info."""
        return getattr(transformers, auto_class).from_pretrained(
            self.repo_id, **FLOAT32_OPTIONS, **self.get_loading_options()
        )

    def has_processor(self) -> bool:
        """Return whether an image processor was saved with the model."""
        file = transformers.utils.cached_file(
            self.repo_id, PROCESSOR_CONFIG_FILE, revision=self.revision, _raise_exceptions_for_missing_entries=False
        )
        return file is not None

    def load_processor(self, backend: str) -> Any:
        """Load the image processor for a backend, `torchvision` or `pil`."""
        return transformers.AutoImageProcessor.from_pretrained(
            self.repo_id, backend=backend, **self.get_loading_options()
        )

    def load_pipeline(self, config: Any) -> Any:
        """Load the image-classification pipeline on the CPU, in float32."""
        return transformers.pipeline(
            "image-classification", model=self.repo_id, device="cpu", dtype=torch.float32, **self.get_loading_options()
        )


def collect_outputs(loader: Any) -> tuple[Outputs, dict[str, Any]]:
    """Compute the outputs of the model, the image processors and the pipeline for fixed inputs.

    Args:
        loader: A `HubLoader`, or a `PackageLoader` from verification_reference.py.

    Returns:
        The outputs in float32 by name, such as `{"AutoModel/last_hidden_state": ...}`, and a report on the loaded
        classes. In the report, `models` maps each Auto class to the loaded class (name and module) and the weights
        that the checkpoint lacks. `processors` maps each backend to the name of the loaded class.
    """
    config = loader.load_config()
    architecture = (config.architectures or ["ViTCLSModel"])[0]
    outputs: Outputs = {}
    report: dict[str, Any] = {"models": {}, "processors": {}}
    for auto_class in dict.fromkeys(["AutoModel", get_auto_class(architecture)]):
        torch.manual_seed(SEED)  # for a reproducible initialization of missing weights
        model, loading_info = loader.load_model(auto_class, config)
        report["models"][auto_class] = {
            "class": type(model).__name__,
            "module": type(model).__module__,
            # Classes other than the saved class may have a head that the checkpoint lacks.
            "missing": sorted(loading_info["missing_keys"]) if type(model).__name__ == architecture else [],
        }
        with torch.inference_mode():
            model_output = model.eval()(build_pixel_values(config))
        outputs |= {f"{auto_class}/{name}": tensor for name, tensor in flatten_outputs(model_output)}
    if loader.has_processor():
        for backend in ("torchvision", "pil") if is_torchvision_available() else ("pil",):
            processor = loader.load_processor(backend)
            report["processors"][backend] = type(processor).__name__
            image = torch.from_numpy(build_image(config, processor))  # [H, W, C]
            pixel_values = processor(image.movedim(-1, 0), return_tensors="pt")["pixel_values"]
            outputs[f"AutoImageProcessor, {backend}/pixel_values"] = pixel_values
        is_classifier = get_auto_class(architecture) == "AutoModelForImageClassification"
        # The pipeline converts images to RGB and supports only models with one task.
        if is_classifier and getattr(config, "tasks", None) is None and config.num_channels == 3:
            outputs["pipeline/scores"] = compute_pipeline_scores(loader, config, processor)
    return {name: tensor.detach().clone().contiguous() for name, tensor in outputs.items()}, report


def get_auto_class(architecture: str) -> str:
    """Return the Auto class for a model class of modeling_vitcls, or for a transformers classifier or encoder."""
    is_classifier = "ForImageClassification" in architecture
    return AUTO_CLASSES.get(architecture, "AutoModelForImageClassification" if is_classifier else "AutoModel")


def get_image_size(config: Any) -> tuple[int, int]:
    """Return the height and width of the model's input images in pixels."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def build_pixel_values(config: Any) -> torch.Tensor:
    """Return fixed random images [B, C, H, W] with the image size of the model."""
    height, width = get_image_size(config)
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(BATCH_SIZE, config.num_channels, height, width, generator=generator)


def build_image(config: Any, processor: Any) -> Any:
    """Return a fixed random `uint8` image [H, W, C] that is larger than the model's images and has a different aspect
    ratio."""
    height, width = get_image_size(config)
    num_channels = 3 if processor.do_convert_rgb else config.num_channels
    generator = torch.Generator().manual_seed(SEED)
    shape = (height * 5 // 4 + 1, width * 3 // 2 + 1, num_channels)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).numpy()


def compute_pipeline_scores(loader: Any, config: Any, processor: Any) -> torch.Tensor:
    """Return the scores [num_labels] of the image-classification pipeline in the order of the label indices."""
    pipeline = loader.load_pipeline(config)
    image = Image.fromarray(build_image(config, processor))
    scores = {prediction["label"]: prediction["score"] for prediction in pipeline(image, top_k=config.num_labels)}
    return torch.tensor([scores[label] for _, label in sorted(config.id2label.items())])


def flatten_outputs(outputs: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested dicts and tuples, with names such as `logits.species`."""
    named_values = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    for name, value in named_values:
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping | tuple | list):
            yield from flatten_outputs(value, f"{prefix}{name}.")


if __name__ == "__main__":
    sys.meta_path.insert(0, PackageBlocker())
    main(Path(sys.argv[1]))
