"""A process that has never heard of this package loads a published model, and writes down what it answers.

    python -P verification_script.py REQUEST.json        # run by verify.py, with an empty cache

REQUEST.json names `repo_id`, `revision`, where the code is in a repository of its own `code_repo_id` and
`code_revision`, `num_threads` and a folder `target`. There, report.json then says what was loaded, or why it failed,
and answers.safetensors what it answered to fixed inputs.

The code of the repository is run here, and only here: what the answers are compared with comes from
verification_reference.py, which shares `collect` with this file. Only torch, transformers and the like are imported,
nothing of ours.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from PIL import Image
from safetensors.torch import save_file
from transformers.utils import is_torchvision_available


PACKAGE = "modeling_vitcls"
# The class that a checkpoint is of -> the Auto class that gives it. AutoModel gives the encoder of all.
AUTO_CLASSES = {
    "ViTCLSForImageClassification": "AutoModelForImageClassification",
    "ViTCLSForMultiTaskClassification": "AutoModelForImageClassification",
    "ViTCLSForMaskedImageModeling": "AutoModelForMaskedImageModeling",
    "ViTCLSBackbone": "AutoBackbone",
}
PROCESSOR_CONFIG = "preprocessor_config.json"
IN_FLOAT32: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
BATCH_SIZE = 2
SEED = 0

Answers = dict[str, torch.Tensor]


class PackageBlocker(MetaPathFinder):
    """Makes `import modeling_vitcls` fail as if it was not installed, in whatever way it is."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Refuse the package; leave the rest, such as `transformers_modules.x.modeling_vitcls`, to others."""
        if fullname.partition(".")[0] == PACKAGE:
            raise ModuleNotFoundError(f"No module named {fullname!r}")


def main(request_file: Path) -> None:
    """Load, ask, and write down."""
    request = json.loads(request_file.read_text(encoding="utf-8"))
    target = Path(request["target"])
    torch.set_num_threads(request["num_threads"])  # bits depend on it
    report: dict[str, Any]
    code_repo_id, code_revision = request["code_repo_id"], request["code_revision"]
    try:
        answers, report = collect(Published(request["repo_id"], request["revision"], code_revision))
    except Exception as error:  # whatever published code raises
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        report = {"error": message, "may_pass": isinstance(error, OSError)}  # as those of the network are
    else:
        save_file(answers, target / "answers.safetensors")
        report["commits"] = cached_commits(request["repo_id"])
        report["code_commits"] = cached_commits(code_repo_id) if code_repo_id else []
    report["has_package"] = any(name.partition(".")[0] == PACKAGE for name in sys.modules)
    (target / "report.json").write_text(json.dumps(report), encoding="utf-8")


def cached_commits(repo_id: str) -> list[str]:
    """The commits of a repository that files were loaded from."""
    cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))
    return sorted(snapshot.name for snapshot in (cache / "snapshots").glob("*") if any(snapshot.iterdir()))


class Source(Protocol):
    """Where a model is loaded from, and by whose code."""

    def config(self) -> Any:
        """Its configuration."""

    def model(self, auto_class: str, config: Any) -> tuple[Any, dict[str, Any]]:
        """The model that an Auto class gives, in float32, and transformers' report on its weights."""

    def has_processor(self) -> bool:
        """Whether an image processor was saved beside it."""

    def processor(self, backend: str) -> Any:
        """The image processor of a backend, `torchvision` or `pil`."""

    def pipeline(self, config: Any) -> Any:
        """The image-classification pipeline on the CPU, in float32."""


@dataclass(frozen=True)
class Published:
    """A model on the Hub, as anyone loads it: through the Auto classes and pipeline, by the repository's own code."""

    repo_id: str
    revision: str
    code_revision: str | None

    def options(self) -> dict[str, Any]:
        """What is pinned."""
        return {"revision": self.revision, "code_revision": self.code_revision, "trust_remote_code": True}

    def config(self) -> Any:
        """See `Source`."""
        return transformers.AutoConfig.from_pretrained(self.repo_id, **self.options())

    def model(self, auto_class: str, config: Any) -> tuple[Any, dict[str, Any]]:
        """See `Source`."""
        return getattr(transformers, auto_class).from_pretrained(self.repo_id, **IN_FLOAT32, **self.options())

    def has_processor(self) -> bool:
        """See `Source`."""
        found = transformers.utils.cached_file(
            self.repo_id, PROCESSOR_CONFIG, revision=self.revision, _raise_exceptions_for_missing_entries=False
        )
        return found is not None

    def processor(self, backend: str) -> Any:
        """See `Source`."""
        return transformers.AutoImageProcessor.from_pretrained(self.repo_id, backend=backend, **self.options())

    def pipeline(self, config: Any) -> Any:
        """See `Source`."""
        return transformers.pipeline(
            "image-classification", model=self.repo_id, device="cpu", dtype=torch.float32, **self.options()
        )


def collect(source: Source) -> tuple[Answers, dict[str, Any]]:
    """What a model answers to fixed inputs through every way to load it, and which classes those ways gave.

    Returns:
        Named tensors, `{"AutoModel/last_hidden_state": ...}`, in float32; and a dict: `models`, by Auto class, the
        class, its module, and which of its weights the checkpoint lacks; `processors`, by backend, the class.
    """
    config = source.config()
    architecture = (config.architectures or ["ViTCLSModel"])[0]
    answers: Answers = {}
    report: dict[str, Any] = {"models": {}, "processors": {}}
    for auto_class in dict.fromkeys(["AutoModel", AUTO_CLASSES.get(architecture, "AutoModel")]):
        torch.manual_seed(SEED)  # of weights that the checkpoint lacks
        model, info = source.model(auto_class, config)
        report["models"][auto_class] = {
            "class": type(model).__name__,
            "module": type(model).__module__,
            # AutoModel drops and adds heads.
            "missing": sorted(info["missing_keys"]) if type(model).__name__ == architecture else [],
        }
        with torch.inference_mode():
            outputs = model.eval()(pixel_values_for(config))
        answers |= {f"{auto_class}/{name}": tensor for name, tensor in flattened(outputs)}
    if source.has_processor():
        for backend in ("torchvision", "pil") if is_torchvision_available() else ("pil",):
            processor = source.processor(backend)
            report["processors"][backend] = type(processor).__name__
            pixels = torch.from_numpy(picture_for(config, processor))  # [H, W, C]
            batch = processor(pixels.movedim(-1, 0), return_tensors="pt")
            answers[f"AutoImageProcessor, {backend}/pixel_values"] = batch["pixel_values"]
        if architecture == "ViTCLSForImageClassification" and config.num_channels in (1, 3):
            answers["pipeline/scores"] = pipeline_scores(source, config, processor)
    return {name: tensor.detach().clone().contiguous() for name, tensor in answers.items()}, report


def pixel_values_for(config: Any) -> torch.Tensor:
    """Random images [B, C, H, W] of the model's size, always the same."""
    height, width = config.image_height_width
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(BATCH_SIZE, config.num_channels, height, width, generator=generator)


def picture_for(config: Any, processor: Any) -> Any:
    """A random picture [H, W, C], uint8, larger than the model's and of another shape; always the same."""
    height, width = config.image_height_width
    channels = 3 if processor.do_convert_rgb else config.num_channels
    generator = torch.Generator().manual_seed(SEED)
    shape = (height * 5 // 4 + 1, width * 3 // 2 + 1, channels)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8).numpy()


def pipeline_scores(source: Source, config: Any, processor: Any) -> torch.Tensor:
    """What the image-classification pipeline says about the picture, in the order of the labels [num_labels]."""
    classify = source.pipeline(config)
    picture = Image.fromarray(picture_for(config, processor).squeeze())  # [H, W] is grey
    scores = {entry["label"]: entry["score"] for entry in classify(picture, top_k=config.num_labels)}
    return torch.tensor([scores[label] for _, label in sorted(config.id2label.items())])


def flattened(outputs: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in nested dicts and tuples, with names such as `logits.species`."""
    items = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    for name, value in items:
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, Mapping | tuple | list):
            yield from flattened(value, f"{prefix}{name}.")


if __name__ == "__main__":
    sys.meta_path.insert(0, PackageBlocker())
    main(Path(sys.argv[1]))
