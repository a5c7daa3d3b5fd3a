"""The certificate that a model gives the same answers as an earlier one, to the bit.

    tensors of OLD = tensors of NEW     SHA-256 of each
    settings of the image processor     equal
    logits of OLD = logits of NEW       torch.equal, at three batch sizes, in float32 and, where supported, bfloat16

`certify` compares two model folders and raises an error at the first difference. `verify_models`
does the same for any two models, and prints the difference.
"""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from torch import Tensor

from ..conversion.open_model import open_model
from ..data.evaluation_data import load_evaluation_data
from ..data.images import LabeledImages
from ..data.options import DataOptions
from ..hub.model_files import list_weight_files
from ..hub.model_folder import ModelFolder
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from ..runtime.files import read_json
from ..runtime.system import format_device_name, get_versions, has_bfloat16
from .options import VerifyUnchangedOptions


MODEL_CLASSES = {
    model_class.__name__: model_class
    for model_class in (ViTCLSModel, ViTCLSForImageClassification, ViTCLSForMultiTaskClassification)
}
NUM_IMAGES = 256
MAX_IMAGES = {16: NUM_IMAGES, 3: 48, 1: 16}  # batch size -> maximum number of images
ENCODER_PREFIX = "vitcls."
HEAD_PREFIX = "extra_heads.task_"
# class statistics, which gain the mean of an added class; no logit reads them
GROWING_PREFIXES = ("class_distance.means_", "class_distance.counts")


# Models and images --------------------------------------------------------------------------------


def load_old_model(folder: ModelFolder) -> Any:
    """Load a classifier, a multi-task model or an encoder. Raise ValueError for other models."""
    if folder.architecture not in MODEL_CLASSES:
        raise ValueError(
            f"a classifier or an encoder is required, but {folder.source} contains "
            f"{folder.architecture}. Set `model` to the output of `vitcls finetune` or `vitcls "
            "pretrain`"
        )
    return folder.load(MODEL_CLASSES[folder.architecture])


def read_pixels(
    images: LabeledImages, processor: Any, num_images: int = NUM_IMAGES
) -> list[Tensor]:
    """Return the pixels [C, H, W] of readable images, drawn at random."""
    pixels = []
    drawn = images.draw(num_images)
    for index in range(len(drawn)):
        try:
            pixels.append(processor(drawn.images[index], return_tensors="pt")["pixel_values"][0])
        except ValueError:  # an unreadable image, which the pass over the images reports
            continue
    return pixels


# Comparison ---------------------------------------------------------------------------------------


def certify(
    old_folder: Path,
    new_folder: Path,
    old_name: str,
    pixels: Sequence[Tensor],
    device: torch.device,
    changed_heads: Collection[str] = (),
) -> dict[str, Any]:
    """Return the certificate that a new model has the outputs of an old one.

    Args:
        old_folder, new_folder: model folders.
        old_name: name of the old model for errors and for the certificate.
        pixels: images [C, H, W].
        device: device of the models.
        changed_heads: names of extra heads of the old model that are replaced or removed.

    Raises:
        ValueError: at the first difference.
    """
    tensor_hashes = compare_tensors(old_folder, new_folder, changed_heads)
    compare_processors(old_folder, new_folder)
    old, new = (
        load_old_model(ModelFolder(folder, old_name)).to(device)
        for folder in (old_folder, new_folder)
    )
    passes = []
    dtypes = [torch.float32, *([torch.bfloat16] if has_bfloat16(device) else [])]
    for dtype in dtypes:
        for model in (old, new):
            model.to(dtype)
        for batch_size, max_images in MAX_IMAGES.items():
            compared = pixels[:max_images]
            hashes = compare_logits(old, new, compared, batch_size, changed_heads)
            record = {
                "dtype": str(dtype).removeprefix("torch."),
                "batch_size": batch_size,
                "num_images": len(compared),
                "logits_sha256": hashes,
            }
            passes.append(record)
    return {
        "old_model": old_name,
        "num_images": len(pixels),
        "images_sha256": hash_tensors(pixels),
        "passes": passes,
        "changed_heads": sorted(changed_heads),
        "num_tensors": len(tensor_hashes),
        "tensors_sha256": tensor_hashes,
        "device": format_device_name(device),
        "versions": get_versions(),
    }


def compare_tensors(
    old_folder: Path, new_folder: Path, changed_heads: Collection[str]
) -> dict[str, str]:
    """Return the SHA-256 of each tensor of the old model.

    Raises:
        ValueError: If the new model lacks one of them or has another value.
    """
    old = hash_weight_tensors(old_folder)
    new = hash_weight_tensors(new_folder)
    is_encoder = not any(name.startswith(ENCODER_PREFIX) for name in old)
    hashes = {}
    for name, old_hash in old.items():
        if name.startswith(GROWING_PREFIXES):
            continue
        if name.rpartition(".")[0].removeprefix(HEAD_PREFIX) in changed_heads and name.startswith(
            HEAD_PREFIX
        ):
            continue
        new_name = f"{ENCODER_PREFIX}{name}" if is_encoder and name not in new else name
        if new.get(new_name) != old_hash:
            problem = "has other values" if new_name in new else "is missing"
            raise ValueError(f"the tensor {new_name} {problem} in the new model")
        hashes[name] = old_hash
    return hashes


def hash_weight_tensors(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each tensor in the weight files of a folder, by name."""
    hashes = {}
    for file_name in list_weight_files(folder):
        with safe_open(folder / file_name, "pt") as file:
            for name in sorted(file.keys()):
                hashes[name] = hash_tensors([file.get_tensor(name)])
    return hashes


def hash_tensors(tensors: Sequence[Tensor]) -> str:
    """Return the SHA-256 of the types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(content.numpy().tobytes())
    return digest.hexdigest()


def compare_processors(old_folder: Path, new_folder: Path) -> None:
    """Raise ValueError if the settings of the image processors differ."""
    old, new = (read_processor_settings(folder) for folder in (old_folder, new_folder))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise ValueError(
                f"the image processors differ: {name} was {old.get(name)} and is {new.get(name)}"
            )


def read_processor_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the image processor of a folder, without those that name its code."""
    settings = read_json(folder / "preprocessor_config.json")
    is_code = ("auto_map", "image_processor_type")
    return {
        name: value
        for name, value in settings.items()
        if name not in is_code and not name.startswith("_")
    }


@torch.no_grad()
def compare_logits(
    old: Any,
    new: Any,
    pixels: Sequence[Tensor],
    batch_size: int,
    changed_heads: Collection[str],
) -> dict[str, str]:
    """Return the SHA-256 of the old outputs by name.

    Raise ValueError if one of the new outputs differs.
    """
    check_labels(old.config, new.config)
    outputs: dict[str, list[Tensor]] = {}
    for batch in iterate_batches(pixels, batch_size):
        inputs = batch.to(old.device, old.dtype)
        old_outputs = compute_outputs(old, inputs)
        new_outputs = compute_outputs(new, inputs)
        for name, expected in old_outputs.items():
            if name in changed_heads:
                continue
            found = new_outputs.get(name)
            if found is None:
                raise ValueError(f"the output {name} is missing in the new model")
            found = found[:, : expected.shape[1]]
            if not torch.equal(found, expected):
                difference = (
                    (found - expected).abs().max().item()
                    if found.shape == expected.shape
                    else float("nan")
                )
                dtype = str(old.dtype).removeprefix("torch.")
                raise ValueError(
                    f"the output {name} differs by {difference:.1e} in batches of {batch_size} "
                    f"images, {dtype}"
                )
            outputs.setdefault(name, []).append(expected)
    return {name: hash_tensors(tensors) for name, tensors in outputs.items()}


def check_labels(old: ViTCLSConfig, new: ViTCLSConfig) -> None:
    """Raise ValueError if the names of the old labels differ."""
    old_labels, new_labels = (list_labels(config) for config in (old, new))
    for index, label in enumerate(old_labels):
        if index >= len(new_labels) or new_labels[index] != label:
            raise ValueError(
                f"label {index} of the old model, {label!r}, is not label {index} of the new model"
            )


def list_labels(config: ViTCLSConfig) -> list[str]:
    """Return the labels of a model; those of several tasks with the name of the task."""
    if config.tasks:
        return [
            f"{task}: {label}" for task, labels in config.task_labels().items() for label in labels
        ]
    id2label: dict[Any, str] = dict(config.id2label or {})
    return (
        [id2label[index] for index in range(len(id2label))]
        if config.architectures != ["ViTCLSModel"]
        else []
    )


def compute_outputs(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """Return the outputs of a model by name.

    The pooled vector of an encoder has the name of the logits, which it is in a classifier without
    labels.
    """
    outputs = model(pixel_values)
    if isinstance(model, ViTCLSModel):
        return {"logits": outputs.pooler_output}
    named = dict(outputs.logits) if isinstance(outputs.logits, dict) else {"logits": outputs.logits}
    for name in ("cls_logits", "distillation_logits"):
        value = outputs.get(name)
        if value is not None and value.shape[1]:
            named[name] = value
    return named | (outputs.task_logits or {})


def iterate_batches(pixels: Sequence[Tensor], batch_size: int) -> Iterator[Tensor]:
    """Yield batches [B, C, H, W] of images of the same shape."""
    batch: list[Tensor] = []
    for image in sorted(pixels, key=lambda image: image.shape):
        if batch and (len(batch) == batch_size or batch[0].shape != image.shape):
            yield torch.stack(batch)
            batch = []
        batch.append(image)
    if batch:
        yield torch.stack(batch)


def describe_certificate(certificate: dict[str, Any]) -> str:
    """Return the certificate as a line."""
    dtypes = " and ".join(dict.fromkeys(row["dtype"] for row in certificate["passes"]))
    batch_sizes = ", ".join(map(str, sorted({row["batch_size"] for row in certificate["passes"]})))
    return (
        f"{certificate['num_tensors']} tensors and all outputs for {certificate['num_images']:,} "
        f"images are equal to the bit ({dtypes}, batches of {batch_sizes})"
    )


# Two models ---------------------------------------------------------------------------------------


def verify_models(options: VerifyUnchangedOptions) -> dict[str, Any]:
    """Compare two models, print and return the result.

    The result is the certificate with `difference` None, or only `difference`.

    Raises:
        ValueError, OSError: if a model or the dataset cannot be read.
    """
    old_folder = open_model(options.old)
    new_folder = open_model(options.new)
    old = load_old_model(old_folder)
    load_old_model(new_folder)
    if options.dataset is not None:
        data_options = DataOptions(dataset=options.dataset)
        data = load_evaluation_data(data_options, options.split, use_labels=False)
        pixels = read_pixels(data.images, old_folder.load_processor())
    else:
        generator = torch.Generator().manual_seed(0)
        shape = (NUM_IMAGES, old.config.num_channels, *old.config.image_height_width)
        pixels = list(torch.randn(shape, generator=generator))

    console = Console(emoji=False, soft_wrap=True, highlight=False)
    device = (
        torch.accelerator.current_accelerator()
        if torch.accelerator.is_available()
        else torch.device("cpu")
    )
    assert device is not None
    try:
        certificate = certify(old_folder.path, new_folder.path, options.old, pixels, device)
    except ValueError as error:
        console.print(f"changed: {error}", markup=False)
        return {"difference": str(error)}
    console.print(f"unchanged: {describe_certificate(certificate)}", markup=False)
    return {"difference": None, **certificate}
