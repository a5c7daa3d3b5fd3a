"""Load checkpoints with their own code. test_remote_code.py runs the script in a separate process:

    python -I load_without_package.py INPUTS TARGET THREADS CHECKPOINT...

Each checkpoint, a folder or a Hub id, is loaded through every Auto class, run on the inputs, saved
to TARGET and loaded from there. TARGET/report.json describes the loaded objects,
TARGET/answers.safetensors contains their outputs. In a process that has imported the package, `main`
loads its classes instead.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets.fingerprint import Hasher
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module


AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForImageClassification",
    "AutoModelForMaskedImageModeling",
    "AutoBackbone",
)
BACKENDS = (None, "torchvision", "pil")
SEED = 0


def main(inputs_file: str, target: Path, num_threads: int, sources: list[str]) -> None:
    """Load, run, save and load again all checkpoints."""
    torch.set_num_threads(num_threads)  # results depend on the number of threads
    inputs = load_file(inputs_file)
    report = {}
    found: dict[str, torch.Tensor] = {}
    for source in sources:
        name = Path(source).name
        report[name] = {}
        for auto_class in AUTO_CLASSES:
            model, loading = load(source, auto_class)
            report[name][auto_class] = {
                "class": type(model).__name__,
                "module": type(model).__module__,
                "missing": sorted(loading["missing_keys"]),
            }
            found |= add_prefix(
                f"{name}/{auto_class}", compute_outputs(model, inputs["pixel_values"])
            )
            if type(model).__name__ in model.config.architectures:
                model.save_pretrained(target / name)
                again, _ = load(str(target / name), auto_class)
                found |= add_prefix(f"{name}/again", compute_outputs(again, inputs["pixel_values"]))
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
        report[name]["AutoConfig"] = {
            "class": type(config).__name__,
            "module": type(config).__module__,
        }
        report[name]["AutoImageProcessor"] = {}
        for backend in BACKENDS:
            processor = transformers.AutoImageProcessor.from_pretrained(
                source, backend=backend, trust_remote_code=True
            )
            report[name]["AutoImageProcessor"][str(backend)] = type(processor).__name__
            Hasher.hash(processor)  # `Dataset.map` finds its results again
            found[f"{name}/processor/{backend}"] = processor(inputs["image"], return_tensors="pt")[
                "pixel_values"
            ]
            # saving must keep the settings of the other backends
            processor.save_pretrained(target / name)
        larger = transformers.AutoModel.from_pretrained(
            source, image_size=[24, 32], trust_remote_code=True
        )
        found |= add_prefix(
            f"{name}/larger", compute_outputs(larger, inputs["larger_pixel_values"])
        )
    report["another ViT"] = load_another_vit(type(model), target / "vit")
    save_file(found, target / "answers.safetensors")
    (target / "report.json").write_text(json.dumps(report))


def load(source: str, auto_class: str) -> tuple[Any, dict[str, Any]]:
    """Return the model and its loading information.

    Weights that the checkpoint lacks have a fixed seed.
    """
    torch.manual_seed(SEED)
    options = {"trust_remote_code": True, "output_loading_info": True}
    if auto_class == "AutoBackbone" and Path(source).is_dir():
        # AutoBackbone.from_pretrained supports only Hub ids: if the id does not exist on the Hub,
        # it loads a timm backbone. The configuration contains the class that it would load.
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
        registered = transformers.AutoBackbone._model_mapping
        if type(config) in registered:
            backbone_class = registered[type(config)]
        else:
            backbone_class = get_class_from_dynamic_module(config.auto_map[auto_class], source)
        return backbone_class.from_pretrained(source, output_loading_info=True)
    return getattr(transformers, auto_class).from_pretrained(source, **options)


def load_another_vit(model_class: Any, folder: Path) -> str:
    """Load a ViT of transformers with a class of a checkpoint, and return the error."""
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.ViTModel(config).save_pretrained(folder)
    try:
        model_class.from_pretrained(folder)
    except ValueError as error:
        return str(error)
    return ""


@torch.no_grad()
def compute_outputs(model: nn.Module, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the model's output tensors for these images, by name."""
    return flatten(dict(model.eval()(pixel_values)))


def flatten(outputs: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of nested dicts and tuples as one dict, `{"logits.species": ...}`."""
    items = outputs.items() if isinstance(outputs, dict) else enumerate(outputs)
    flat: dict[str, torch.Tensor] = {}
    for name, value in items:
        if isinstance(value, torch.Tensor):
            flat[str(name)] = value.contiguous()
        elif isinstance(value, dict | tuple | list):
            flat |= {f"{name}.{inner}": tensor for inner, tensor in flatten(value).items()}
    return flat


def add_prefix(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of the tensors with names `prefix/name`."""
    return {f"{prefix}/{name}": tensor.clone() for name, tensor in tensors.items()}


if __name__ == "__main__":
    sys.modules["modeling_vitcls"] = None  # `import` fails, as if it were not installed
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
