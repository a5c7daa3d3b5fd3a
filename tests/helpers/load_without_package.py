"""Loads checkpoints as a user without this package does. Run by test_remote_code.py in a process of its own:

    python -I load_without_package.py INPUTS TARGET THREADS CHECKPOINT...

Each checkpoint, a folder or a Hub id, is loaded through every Auto class, asked, saved to TARGET and loaded from there
again. TARGET/report.json says what came back, TARGET/answers.safetensors what it answered.
"""

import json
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module


AUTO_CLASSES = ("AutoModel", "AutoModelForImageClassification", "AutoModelForMaskedImageModeling", "AutoBackbone")
BACKENDS = (None, "torchvision", "pil")
SEED = 0


class PackageBlocker(MetaPathFinder):
    """Makes `import modeling_vitcls` fail, as where it is not installed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Refuse the package; leave everything else, such as `transformers_modules.x.modeling_vitcls`, to others."""
        if fullname.partition(".")[0] == "modeling_vitcls":
            raise ModuleNotFoundError(f"No module named {fullname!r}")


def main(inputs_file: str, target: Path, num_threads: int, sources: list[str]) -> None:
    """Load, ask, save and load again every source."""
    torch.set_num_threads(num_threads)  # bits depend on it
    inputs = load_file(inputs_file)
    report: dict[str, Any] = {}
    found: dict[str, torch.Tensor] = {}
    for source in sources:
        name = Path(source).name
        report[name] = {}
        for auto_class in AUTO_CLASSES:
            model, loading = load(source, auto_class)
            report[name][auto_class] = described(model, loading)
            found |= prefixed(f"{name}/{auto_class}", answers(model, inputs["pixel_values"]))
            if type(model).__name__ in model.config.architectures:
                model.save_pretrained(target / name)
                again, _ = load(str(target / name), auto_class)
                found |= prefixed(f"{name}/again", answers(again, inputs["pixel_values"]))
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
        report[name]["AutoConfig"] = {"class": type(config).__name__, "module": type(config).__module__}
        report[name]["AutoImageProcessor"] = {}
        for backend in BACKENDS:
            processor = transformers.AutoImageProcessor.from_pretrained(
                source, backend=backend, trust_remote_code=True
            )
            report[name]["AutoImageProcessor"][str(backend)] = type(processor).__name__
            found[f"{name}/processor/{backend}"] = processor(inputs["image"], return_tensors="pt")["pixel_values"]
            processor.save_pretrained(target / name)  # the backend saved last must not be the only one left
        report[name]["pipeline"] = classified(source, inputs["image"]) if name == "classifier" else None
        larger = transformers.AutoModel.from_pretrained(source, image_size=[24, 32], trust_remote_code=True)
        found |= prefixed(f"{name}/larger", answers(larger, inputs["larger_pixel_values"]))
    save_file(found, target / "answers.safetensors")
    (target / "report.json").write_text(json.dumps(report))


def load(source: str, auto_class: str) -> tuple[Any, dict[str, Any]]:
    """The model and what transformers tells about its loading; heads that are not stored start from one seed."""
    torch.manual_seed(SEED)
    options = {"trust_remote_code": True, "output_loading_info": True}
    if auto_class == "AutoBackbone" and Path(source).is_dir():
        # AutoBackbone.from_pretrained knows Hub ids only: it asks the Hub whether the repository exists, and takes
        # "no" to mean a backbone of timm. The class that it would pick is named in the configuration.
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
        backbone_class: Any = get_class_from_dynamic_module(config.auto_map[auto_class], source)
        return backbone_class.from_pretrained(source, output_loading_info=True)
    return getattr(transformers, auto_class).from_pretrained(source, **options)


def answers(model: torch.nn.Module, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """All tensors that the model gives for these images, by name."""
    with torch.no_grad():
        return flattened(dict(model.eval()(pixel_values)))


def flattened(outputs: Any) -> dict[str, torch.Tensor]:
    """The tensors of nested dicts and tuples as one dict, `{"logits.species": ...}`."""
    items = outputs.items() if isinstance(outputs, dict) else enumerate(outputs)
    flat: dict[str, torch.Tensor] = {}
    for name, value in items:
        if isinstance(value, torch.Tensor):
            flat[str(name)] = value.contiguous()
        elif isinstance(value, dict | tuple | list):
            flat |= {f"{name}.{inner}": tensor for inner, tensor in flattened(value).items()}
    return flat


def prefixed(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, each a copy of its own, under `prefix/name`."""
    return {f"{prefix}/{name}": tensor.clone() for name, tensor in tensors.items()}


def described(model: Any, loading: dict[str, Any]) -> dict[str, Any]:
    """What came back: class, where its code is, and which weights the checkpoint did not have."""
    return {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "missing": sorted(loading["missing_keys"]),
    }


def classified(source: str, image: torch.Tensor) -> list[dict[str, Any]]:
    """What the image-classification pipeline says about an image [C, H, W]."""
    from torchvision.transforms.functional import to_pil_image

    return transformers.pipeline("image-classification", model=source, trust_remote_code=True)(to_pil_image(image))


if __name__ == "__main__":
    sys.meta_path.insert(0, PackageBlocker())
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
