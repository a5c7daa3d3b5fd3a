"""The certificate that a model gives the same answers as an earlier one, to the bit.

    tensors of OLD = tensors of NEW     SHA-256 of each; of class statistics, the rows of the old classes
    settings of the image processor     equal
    logits of OLD = logits of NEW       torch.equal, at three batch sizes, in float32 and, where supported, bfloat16

`certify` compares two model folders and raises an error at the first difference. `verify_models`
does the same for any two models, and prints the difference.

What is not proven:
- That old photos keep their predictions: the logits of the old classes are equal, but a new class may have
  a higher one. A new task changes no prediction.
- Outputs of the code in a folder or repository, which is compared but not run: `verify_models` certifies
  nothing if it differs.
- That the new classes or tasks are good: results.json has their own measurements.
- Anything but this machine and the versions, precisions and batch sizes that certificate.json lists, on
  images of the size of the image processor.
"""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import chain, groupby, product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ..conversion.parity_report import build_random_images
from ..data.evaluation_data import load_photographs
from ..data.images import LabeledImages
from ..data.labels import get_label_space
from ..data.options import DataOptions
from ..hub.model_code import compare_code
from ..hub.model_files import list_weight_files
from ..hub.model_folder import ModelFolder, open_vitcls
from ..inference.image_pass import read_pixels
from ..model.modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSForMultiTaskClassification,
    ViTCLSModel,
)
from ..runtime.errors import explain_damage, format_name_list
from ..runtime.progress import track
from ..runtime.system import format_device_name, get_versions, has_bfloat16
from ..version import __version__
from .options import VerifyUnchangedOptions


MODEL_CLASSES = {
    model_class.__name__: model_class
    for model_class in (ViTCLSModel, ViTCLSForImageClassification, ViTCLSForMultiTaskClassification)
}
NUM_IMAGES = 64  # The tensors are equal, so more images would say little more
# Batch size -> maximum number of images. Libraries choose a kernel by the shape of its input, so
# equal bits at one batch size prove nothing for another.
MAX_IMAGES = {16: NUM_IMAGES, 3: 12, 1: 4}
ENCODER_PREFIX = "vitcls."
# Class statistics, to which an added class appends a row; `distance` reads them
GROWING_PREFIXES = tuple(f"class_distance.{name}" for name in ("means_", "counts", "scales"))

# Of the weights, in class statistics of older versions, which nothing reads
OLD_FINGERPRINT = "class_distance.fingerprint"


class ModelsDiffer(ValueError):
    """Error about two models that should have the same outputs. Its message names a difference."""


# Models and images --------------------------------------------------------------------------------


def load_old_model(folder: ModelFolder) -> Any:
    """Load a classifier, a multi-task model or an encoder. Raise ValueError for other models."""
    if folder.architecture not in MODEL_CLASSES:
        raise ValueError(
            f"a classifier or an encoder is required, but {folder.source} contains "
            f"{folder.architecture}. Set `model` to the output of `vitcls finetune`"
        )
    return folder.load(MODEL_CLASSES[folder.architecture])


def draw_pixels(images: LabeledImages, processor: Any, num_channels: int) -> list[Tensor]:
    """Read the pixels [C, H, W] of readable images, drawn at random."""
    drawn = images.draw(NUM_IMAGES)
    pixels = [
        read_pixels(drawn.images, processor, num_channels, index) for index in range(len(drawn))
    ]
    # A text is the reason why an image is unreadable, which the pass over the images reports.
    return [each for each in pixels if not isinstance(each, str)]


# Comparison ---------------------------------------------------------------------------------------


def certify(old: ModelFolder, new: ModelFolder, pixels: Sequence[Tensor]) -> dict[str, Any]:
    """Certify that a new model folder has the outputs of an old one.

    The models are compared on the accelerator, if there is one, with images [C, H, W].

    Raises:
        ModelsDiffer: at the first difference.
    """
    # The cheap comparisons come first. They also say what differs, which logits cannot.
    tensor_hashes = compare_tensors(old.path, new.path)
    compare_processors(old, new)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    old_model = load_old_model(old).to(device)
    new_model = load_old_model(new).to(device)
    check_labels_and_threshold(old_model, new_model)
    # In this order: weights that were rounded to bfloat16 cannot be used in float32 any more.
    dtypes = [torch.float32, *([torch.bfloat16] if has_bfloat16(device) else [])]
    passes = list(product(dtypes, MAX_IMAGES))
    for dtype, batch_size in track(passes, "comparing outputs, pass", len(passes), unit=""):
        old_model.to(dtype)
        new_model.to(dtype)
        compared = pixels[: MAX_IMAGES[batch_size]]
        outputs = compare_outputs(old_model, new_model, compared, batch_size)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "old_weights_sha256": old.weights_sha256,
        "num_images": len(pixels),
        "outputs": outputs,
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in dtypes],
        "batch_sizes": list(MAX_IMAGES),
        "num_tensors": len(tensor_hashes),
        "tensors_sha256": tensor_hashes,
        "device": format_device_name(device),
        "versions": get_versions(),
    }


def compare_tensors(old_folder: Path, new_folder: Path) -> dict[str, str]:
    """Compare all tensors of the old model with the new one, and return the SHA-256 of each.

    Raises:
        ModelsDiffer: If the new model lacks one of them or has another value.
    """
    old = load_tensors(old_folder)
    new = load_tensors(new_folder)
    hashes = {}
    changed = []
    for name, tensor in old.items():
        if name == OLD_FINGERPRINT:
            continue
        hashes[name] = hash_tensor(tensor)
        found = new.get(name, new.get(f"{ENCODER_PREFIX}{name}"))  # OLD may be an encoder
        if found is None:
            raise ModelsDiffer(f"the tensor {name} is missing in the new model")
        if name.startswith(GROWING_PREFIXES):
            found = found[: len(tensor)]
        if hash_tensor(found) != hashes[name]:
            changed.append(name)
    if changed:
        raise ModelsDiffer(
            f"the tensor {format_name_list(changed)} has other values in the new model; the other "
            f"{len(old) - len(changed):,} tensors are equal to the bit"
        )
    return hashes


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Load the tensors in the weight files of a folder, by name."""
    tensors: dict[str, Tensor] = {}
    for file_name in list_weight_files(folder):
        with explain_damage(folder / file_name, "Copy the file again"):
            tensors |= load_file(folder / file_name)
    return dict(sorted(tensors.items()))


def hash_tensor(tensor: Tensor) -> str:
    """Hash the type, the shape and the bytes of a tensor (SHA-256)."""
    return hashlib.sha256(save({"": tensor.contiguous()})).hexdigest()


def compare_processors(old_folder: ModelFolder, new_folder: ModelFolder) -> None:
    """Raise ModelsDiffer if the settings of the image processors differ; a missing one is the default."""
    old, new = (folder.load_processor().to_dict() for folder in (old_folder, new_folder))
    for name in sorted(old.keys() | new.keys()):
        names_code = name in ("auto_map", "image_processor_type") or name.startswith("_")
        if not names_code and old.get(name) != new.get(name):
            raise ModelsDiffer(
                f"the image processors differ: {name} was {old.get(name)} and is {new.get(name)}"
            )


@torch.no_grad()
def compare_outputs(old: Any, new: Any, pixels: Sequence[Tensor], batch_size: int) -> list[str]:
    """Compare the outputs of both models, and return the names of the old ones.

    Raise ModelsDiffer if one of the new outputs differs.
    """
    names: list[str] = []
    by_shape = sorted(pixels, key=lambda image: image.shape)
    # Images of the same shape, in batches [B, C, H, W]
    for batch in chain.from_iterable(
        torch.stack(list(images)).split(batch_size)
        for _, images in groupby(by_shape, key=lambda image: image.shape)
    ):
        inputs = batch.to(old.device, old.dtype)
        outputs = compute_outputs(old, inputs)
        new_outputs = compute_outputs(new, inputs)
        for name, expected in outputs.items():
            if name not in new_outputs:
                raise ModelsDiffer(f"the output {name} is missing in the new model")
            found = new_outputs[name][:, : expected.shape[1]]
            if not torch.equal(found, expected):
                difference = (found - expected).abs().max().item()
                raise ModelsDiffer(
                    f"the output {name} differs by {difference:.1e} in batches of {batch_size} "
                    f"images, {old.dtype}"
                )
        names = list(outputs)
    return names


def check_labels_and_threshold(old: Any, new: Any) -> None:
    """Raise ModelsDiffer if the old labels are not the first of the new ones, or `unknown` changed."""
    thresholds = [model.config.distance_threshold for model in (old, new)]
    if thresholds[0] != thresholds[1]:
        raise ModelsDiffer(f"`distance_threshold` was {thresholds[0]} and is {thresholds[1]}")
    if isinstance(old, ViTCLSModel):  # Has no labels
        return
    new_columns = get_label_space(new.config).columns
    for column, names in get_label_space(old.config).columns.items():
        if new_columns.get(column, [])[: len(names)] != names:
            raise ModelsDiffer(f"the labels of {column!r} are not the first ones of the new model")


def compute_outputs(model: Any, pixel_values: Tensor) -> dict[str, Tensor]:
    """Compute the outputs of a model, by name.

    The pooled vector of an encoder is called "logits", because a classifier without labels returns
    it as its logits.
    """
    outputs = model(pixel_values)
    if isinstance(model, ViTCLSModel):
        return {"logits": outputs.pooler_output}
    named = dict(outputs.logits) if isinstance(outputs.logits, dict) else {"logits": outputs.logits}
    for name in ("cls_logits", "distillation_logits"):
        if outputs.get(name) is not None and outputs[name].shape[1]:
            named[name] = outputs[name]
    return named | (outputs.task_logits or {})


def describe_certificate(certificate: dict[str, Any]) -> str:
    """Describe a certificate in one line."""
    dtypes = " and ".join(certificate["dtypes"])
    batch_sizes = ", ".join(map(str, certificate["batch_sizes"]))
    return (
        f"{certificate['num_tensors']} tensors and all logits for {certificate['num_images']:,} "
        f"images are equal to the bit ({dtypes}, batches of {batch_sizes})"
    )


# Two models ---------------------------------------------------------------------------------------


def verify_models(options: VerifyUnchangedOptions) -> dict[str, Any]:
    """Compare two models on a split of a dataset or on random pixels, print and return the result.

    The result is the certificate with `difference` None, or only `difference`.

    Raises:
        ValueError, OSError: if a model or the dataset cannot be read.
    """
    old_folder = open_vitcls(options.old)
    new_folder = open_vitcls(options.new)
    config = old_folder.config
    if options.dataset is not None:
        images = DataOptions(dataset=options.dataset)
        data = load_photographs(images, options.split)
        pixels = draw_pixels(data.images, old_folder.load_processor(), config.num_channels)
        if not pixels:
            raise ValueError(f"no image of {options.dataset} can be read. Set another `dataset`")
    else:
        shape = (NUM_IMAGES, config.num_channels, *config.image_height_width)
        pixels = list(build_random_images(shape))

    try:
        certificate = certify(old_folder, new_folder, pixels)
    except ModelsDiffer as error:
        print(f"changed: {error}")
        return {"difference": str(error)}
    names = compare_code(old_folder.code, new_folder.code)
    if old_folder.code_repository != new_folder.code_repository:
        names = [
            f"in {folder.code_repository or folder.source}" for folder in (old_folder, new_folder)
        ]
    if names:
        difference = (
            f"the code {format_name_list(names)}; the tensors and the logits were compared with the code "
            f"of modeling_vitcls {__version__}, which is not what the Auto classes run"
        )
        print(f"not certified: {difference}")
        return {**certificate, "difference": difference}
    print(f"unchanged: {describe_certificate(certificate)}")
    return {"difference": None, **certificate}
