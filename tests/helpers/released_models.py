"""Write small models of a release, with their outputs, to tests/fixtures/released/VERSION/KIND/.

    PYTHONPATH=tests:. python tests/helpers/released_models.py  # once per release

A folder contains config.json, preprocessor_config.json and model.safetensors, as written by
`save_pretrained`, without the code, and answers.safetensors: the outputs of the model and of the
image processor for the inputs below. The files are written at a release and never changed.
test_released_checkpoints.py loads them with the current code. The inputs are formulas, because
random numbers may change with the version of a library.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import modeling_vitcls as vitcls
from helpers.load_without_package import flatten
from modeling_vitcls.version import __version__
from scripts.tools.random_weights import randomize_weights


RELEASED = Path(__file__).parents[1] / "fixtures/released"
ANSWERS = "answers.safetensors"

SIZES = {
    "image_size": [16, 24],
    "patch_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
}
# Kind -> model class, configuration fields and processor settings.
KINDS = {
    "classifier": (
        vitcls.ViTCLSForImageClassification,
        {
            "num_distillation_tokens": 1,
            "num_register_tokens": 2,
            "layer_scale_init_value": 0.1,
            "id2label": {0: "cat", 1: "dog", 2: "owl"},
        },
        {"size": {"height": 16, "width": 24}},
    ),
    "multi_task": (
        vitcls.ViTCLSForMultiTaskClassification,
        {
            "num_cls_tokens": 2,
            "tasks": {"species": ["cat", "dog", "owl"], "age": 2},
            "mlp_type": "swiglu",
        },
        {"size": {"height": 16, "width": 24}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
    "no_cls": (
        vitcls.ViTCLSModel,
        {
            "num_cls_tokens": 0,
            "pooling": "mean",
            "position_embedding_type": "rope_2d",
            "qk_norm": True,
        },
        {
            "size": {"shortest_edge": 24},
            "do_center_crop": True,
            "crop_size": {"height": 16, "width": 24},
        },
    ),
    "masked": (
        vitcls.ViTCLSForMaskedImageModeling,
        {
            "num_register_tokens": 1,
            "position_embedding_type": "sincos_2d",
            "norm_pixel_target": True,
        },
        {"size": {"height": 16, "width": 24}, "resample": 2},
    ),
}


def main() -> None:
    """Write the models of this version, unless they exist."""
    folder = RELEASED / __version__
    if folder.exists():
        sys.exit(
            f"{folder} exists, and what a release saved does not change: set a different version "
            "in version.py"
        )
    for kind in KINDS:
        write(kind, folder / kind)
    print(f"wrote {folder}: commit it with the release")


def write(kind: str, folder: Path) -> None:
    """Save the model of a kind, its image processor and their outputs."""
    model_class, fields, settings = KINDS[kind]
    model = randomize_weights(model_class(vitcls.ViTCLSConfig(**SIZES, **fields)))
    processor = vitcls.ViTCLSImageProcessor(**settings)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    save_file(compute_outputs(model, processor), folder / ANSWERS)


@torch.no_grad()
def compute_outputs(model: Any, processor: Any) -> dict[str, torch.Tensor]:
    """Return the outputs of the model and the processor, by name."""
    inputs = {"pixel_values": build_pixel_values(model.config)}
    if isinstance(model, vitcls.ViTCLSForMaskedImageModeling):
        inputs["bool_masked_pos"] = torch.arange(2 * 6).view(2, 6) % 3 == 0  # [2, patches]
    found = {name: tensor.clone() for name, tensor in flatten(dict(model.eval()(**inputs))).items()}
    return found | {"processor": processor(build_image(), return_tensors="pt")["pixel_values"]}


def build_pixel_values(config: Any) -> torch.Tensor:
    """Return sine waves [2, 3, H, W] in the image size of the model."""
    height, width = config.image_height_width
    count = 2 * 3 * height * width
    return torch.sin(torch.arange(count, dtype=torch.float32) * 0.7).view(2, 3, height, width)


def build_image() -> torch.Tensor:
    """Return a pattern [3, 30, 40], uint8."""
    return (torch.arange(3 * 30 * 40) * 37 % 256).to(torch.uint8).view(3, 30, 40)


if __name__ == "__main__":
    main()
