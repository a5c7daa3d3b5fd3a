"""A process that has never heard of this package loads a published model, and writes down what it answers.

    python -P clean_process.py REQUEST.json        # run by verify.py, with an empty cache

REQUEST.json names `repo_id`, `revision`, `num_threads` and a folder `target`. There, report.json then says what was
loaded, or why it failed, and answers.safetensors what it answered to fixed inputs. verify.py calls `collect` too, on
the model that the answers are compared with.

Only torch, transformers and the like are imported here, nothing of ours.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from PIL import Image
from safetensors.torch import save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import is_torchvision_available


PACKAGE = "modeling_vitcls"
# The class that a checkpoint is of -> the Auto class that gives it. AutoModel gives the encoder of all.
AUTO_CLASSES = {
    "ViTCLSForImageClassification": "AutoModelForImageClassification",
    "ViTCLSForMultiTaskClassification": "AutoModelForImageClassification",
    "ViTCLSForMaskedImageModeling": "AutoModelForMaskedImageModeling",
    "ViTCLSBackbone": "AutoBackbone",
}
BATCH_SIZE = 2
SEED = 0
CODE_TRUSTED: dict[str, Any] = {"trust_remote_code": True}

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
    try:
        answers, report = collect(request["repo_id"], request["revision"])
    except Exception as error:  # whatever published code raises
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        report = {"error": message, "may_pass": isinstance(error, OSError)}  # as those of the network are
    else:
        save_file(answers, target / "answers.safetensors")
        report["commits"] = cached_commits(request["repo_id"])
    report["has_package"] = any(name.partition(".")[0] == PACKAGE for name in sys.modules)
    (target / "report.json").write_text(json.dumps(report), encoding="utf-8")


def cached_commits(repo_id: str) -> list[str]:
    """The commits of a repository that files were loaded from."""
    cache = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=repo_id, repo_type="model"))
    return sorted(snapshot.name for snapshot in (cache / "snapshots").glob("*") if any(snapshot.iterdir()))


def collect(source: str, revision: str | None = None) -> tuple[Answers, dict[str, Any]]:
    """What a model answers to fixed inputs through every way to load it, and which classes those ways gave.

    Args:
        source: a folder, or a repository's id.
        revision: of the repository.

    Returns:
        Named tensors, `{"AutoModel/last_hidden_state": ...}`, in float32; and a dict: `models`, by Auto class, the
        class, its module, and which of its weights the checkpoint lacks; `processors`, by
        backend, the class.
    """
    config = transformers.AutoConfig.from_pretrained(source, revision=revision, **CODE_TRUSTED)
    architecture = (config.architectures or ["ViTCLSModel"])[0]
    answers: Answers = {}
    report: dict[str, Any] = {"models": {}, "processors": {}}
    for auto_class in dict.fromkeys(["AutoModel", AUTO_CLASSES.get(architecture, "AutoModel")]):
        model, missing = load(auto_class, config, source, revision)
        report["models"][auto_class] = {
            "class": type(model).__name__,
            "module": type(model).__module__,
            "missing": missing if type(model).__name__ == architecture else [],  # AutoModel drops and adds heads
        }
        with torch.inference_mode():
            outputs = model.eval()(pixel_values_for(config))
        answers |= {f"{auto_class}/{name}": tensor for name, tensor in flattened(outputs)}
    if has_processor(source, revision):
        for backend in ("torchvision", "pil") if is_torchvision_available() else ("pil",):
            processor = transformers.AutoImageProcessor.from_pretrained(
                source, revision=revision, backend=backend, **CODE_TRUSTED
            )
            report["processors"][backend] = type(processor).__name__
            pixels = torch.from_numpy(picture_for(config, processor))  # [H, W, C]
            batch = processor(pixels.movedim(-1, 0), return_tensors="pt")
            answers[f"AutoImageProcessor, {backend}/pixel_values"] = batch["pixel_values"]
        if architecture == "ViTCLSForImageClassification" and config.num_channels in (1, 3):
            answers["pipeline/scores"] = pipeline_scores(source, revision, config, processor)
    return {name: tensor.detach().clone().contiguous() for name, tensor in answers.items()}, report


def load(auto_class: str, config: Any, source: str, revision: str | None) -> tuple[Any, list[str]]:
    """The model in float32, and the names of weights that the checkpoint does not have, which then are random."""
    torch.manual_seed(SEED)
    options = {"dtype": torch.float32, "output_loading_info": True}
    if auto_class == "AutoBackbone" and Path(source).is_dir():
        # AutoBackbone knows Hub ids only, and asks the Hub about a folder.
        loader: Any = get_class_from_dynamic_module(config.auto_map[auto_class], source)
    else:
        loader, options = getattr(transformers, auto_class), options | CODE_TRUSTED | {"revision": revision}
    model, info = loader.from_pretrained(source, **options)
    return model, sorted(info["missing_keys"])


def has_processor(source: str, revision: str | None) -> bool:
    """Whether an image processor was saved beside the model."""
    return bool(
        transformers.utils.cached_file(
            source, "preprocessor_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
    )


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


def pipeline_scores(source: str, revision: str | None, config: Any, processor: Any) -> torch.Tensor:
    """What the image-classification pipeline says about the picture, in the order of the labels [num_labels]."""
    classify = transformers.pipeline(
        "image-classification", model=source, revision=revision, device="cpu", dtype=torch.float32, **CODE_TRUSTED
    )
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
