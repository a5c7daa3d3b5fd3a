"""Small models, random weights and images, and a check for one-line errors."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSForMaskedImageModeling,
    ViTCLSForMultiTaskClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
)
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.model.attention_masks_vitcls import TokenFadeIn
from modeling_vitcls.runtime.files import read_json, write_json


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 3,
}

# Name -> fields of the token layouts with which all model classes are tested.
LAYOUTS = {
    "one_cls": {},
    "cls_distillation_registers": {"num_distillation_tokens": 1, "num_register_tokens": 4},
    "no_cls": {"num_cls_tokens": 0, "num_register_tokens": 2, "pooling": "mean"},
    "three_cls": {"num_cls_tokens": 3},
    "no_special_tokens": {"num_cls_tokens": 0, "pooling": "mean"},
    "several_of_each": {
        "num_cls_tokens": 2,
        "num_distillation_tokens": 2,
        "num_register_tokens": 3,
    },
}

each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# Two CLS, one distillation and three register tokens.
TOKENS = {
    "num_cls_tokens": 2,
    "num_distillation_tokens": 1,
    "num_register_tokens": 3,
}

# A mask of these tokens and 16 patches, which hides four patches of the second image.
MASK = torch.ones(2, 6 + 16, dtype=torch.long)
MASK[1, 10:14] = 0

# Group of special tokens -> its parameter of the embeddings
PARAMETERS = {
    "cls": "cls_token",
    "distillation": "distillation_token",
    "registers": "register_tokens",
}

TASKS = {"species": 4, "age": 2}

# Layer and kind of the pooled tokens that class statistics and linear probes read
CLS, MEAN = (-1, "cls"), (-1, "mean")

PROCESSOR = ViTCLSImageProcessor(size=32)  # no test changes it

IMAGE_LABELS = torch.tensor([0, 2])  # of `IMAGES`


class Kind(NamedTuple):
    """A class of models, the fields that it requires, and inputs in addition to the images."""

    model_class: type
    fields: Fields
    inputs: dict[str, Any]

    def build(self, **fields: Any) -> Any:
        """Return a tiny model with random parameters, in eval mode."""
        return build_random(self.model_class, **self.fields, **fields)


KINDS = {
    "model": Kind(ViTCLSModel, {}, {}),
    "classifier": Kind(
        ViTCLSForImageClassification,
        {"num_distillation_tokens": 1},
        {"labels": IMAGE_LABELS},
    ),
    "multi_task": Kind(
        ViTCLSForMultiTaskClassification,
        {"num_cls_tokens": 2, "tasks": TASKS},
        {"labels": {"species": torch.tensor([3, 0]), "age": torch.tensor([1, 0])}},
    ),
    "masked": Kind(
        ViTCLSForMaskedImageModeling,
        {},
        {"bool_masked_pos": torch.arange(32).view(2, 16) % 3 == 0},
    ),
    "backbone": Kind(ViTCLSBackbone, {"out_indices": [0, 2]}, {}),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)

# Name -> fields that change the blocks.
BLOCKS = {
    "layer_scale": {"layer_scale_init_value": 1e-5},
    "drop_path": {"drop_path_rate": 0.5},
    "dropout": {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.3},
    "swiglu": {"mlp_type": "swiglu"},
    "qk_norm": {"qk_norm": True},
    "no_qkv_bias": {"qkv_bias": False},
    "no_key_bias": {"key_bias": False},
    "no_bias": {
        "qkv_bias": False,
        "projection_bias": False,
        "mlp_bias": False,
        "patch_bias": False,
    },
    "pre_norm": {"pre_norm": True},
    "relu": {"hidden_act": "relu"},
    "mlp_head": {"head_type": "mlp", "head_hidden_size": 7},
    "attention_pooling": {"pooling": "attention"},
    "rope": {"position_embedding_type": "rope_2d"},
    "sincos": {"position_embedding_type": "sincos_2d"},
    "no_positions": {"position_embedding_type": "none"},
    "scopes": {"num_cls_tokens": 2, "cls_scopes": ["image", [2, 2, 0, 1]]},
    "tokens": TOKENS,
}

POSITIONS = ["learned", "sincos_2d", "rope_2d", "none"]

Model = TypeVar("Model", bound=nn.Module)


def build_tiny_config(**fields: Any) -> ViTCLSConfig:
    """Return a configuration with 4 x 4 patches, width 16 and two layers, with changed fields."""
    return ViTCLSConfig(**{**SIZES, **fields})


@torch.no_grad()
def randomize(model: Model, seed: int = 0) -> Model:
    """Set all parameters, and how far tokens are faded in, to random values; enter eval mode.

    Zeros and ones would hide errors.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    for module in model.modules():
        if isinstance(module, TokenFadeIn):
            module.progress.random_(module.FULL, generator=generator)
    return model.eval()


@torch.no_grad()
def initialize(model: Model) -> Model:
    """Draw the matrices of a new model, equal with all versions of PyTorch; `trunc_normal_` is not."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape) * 0.02)
    return model


def build_random(model_class: Callable[[ViTCLSConfig], Model], **fields: Any) -> Model:
    """Return a tiny model with random parameters, in eval mode; `fields` are of its configuration."""
    return randomize(model_class(build_tiny_config(**fields)))


def save_both(model: Any, folder: Path, processor: Any) -> Path:
    """Save a model and its image processor; return the folder."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def edit_weights(folder: Path) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the weights of a saved model, which may be changed, and save them again."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    yield weights
    save_file(weights, file, metadata={"format": "pt"})


def edit_config(folder: Path, file: str = "config.json", **values: Any) -> None:
    """Change values in a JSON file of a saved model."""
    path = folder / file
    write_json(path, read_json(path) | values)


def save_with_processor(model: PreTrainedModel, folder: Path, processor: Any = None) -> Path:
    """Save a model with random parameters and an image processor; return the folder."""
    return save_both(randomize(model), folder, processor or PROCESSOR)


def save_classifier(folder: Path, *names: str, **fields: Any) -> Path:
    """Save a tiny classifier with a register token and its image processor; return the folder.

    Without `names`, it has three labels.
    """
    if names:
        fields |= {"num_labels": len(names), "id2label": dict(enumerate(names))}
    config = build_tiny_config(**{"num_register_tokens": 1} | fields)
    return save_with_processor(ViTCLSForImageClassification(config), folder)


def save_encoder(folder: Path, **fields: Any) -> Path:
    """Save a tiny encoder and its image processor; return the folder."""
    return save_with_processor(ViTCLSModel(build_tiny_config(**fields)), folder)


def build_tiny_resnet(
    names: Iterable[str] | None = ("ant", "bee", "cat"), **fields: Any
) -> ResNetForImageClassification:
    """Return a small CNN of transformers, a teacher."""
    sizes = {
        "embedding_size": 8,
        "hidden_sizes": [8, 8],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    labels = {"num_labels": 3} if names is None else {"id2label": dict(enumerate(names))}
    return ResNetForImageClassification(ResNetConfig(**sizes, **labels, **fields))


def build_images(
    batch: int = 2, height: int = 32, width: int = 32, channels: int = 3, seed: int = 0
) -> torch.Tensor:
    """Return random images [batch, channels, height, width]."""
    return torch.randn(
        batch, channels, height, width, generator=torch.Generator().manual_seed(seed)
    )


IMAGES = build_images()  # [2, 3, 32, 32]; no test changes them


def record_outputs(module: nn.Module) -> list[Any]:
    """Return a list that collects the outputs of a module.

    The module's `forward` is replaced, because with a hook on the last layer, classifiers compute
    all of its tokens.
    """
    forward = module.forward
    outputs = []

    def record(*args: Any, **kwargs: Any) -> Any:
        outputs.append(forward(*args, **kwargs))
        return outputs[-1]

    module.forward = record  # type: ignore[method-assign]
    return outputs


def assert_no_recording(*models: nn.Module) -> None:
    """Check that models contain no recorder and no hooks except those of transformers."""
    for model in models:
        for module in model.modules():
            hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
            assert all(hook.__module__.startswith("transformers.") for hook in hooks)
            assert getattr(module, "recorder", None) is None


def get_largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the largest absolute difference between two tensors; 0 if they are empty."""
    assert first.shape == second.shape
    return (first - second).abs().max().item() if first.numel() else 0.0


def list_tensors(output: Any) -> list[torch.Tensor]:
    """Return all tensors in an output, in order."""
    return [part for part in tree_leaves(output) if isinstance(part, torch.Tensor)]


def assert_same_outputs(first: Any, second: Any, tolerance: float = 0.0) -> None:
    """Check that two outputs, or dicts or tuples of outputs, contain the same tensors."""
    first_values, second_values = map(list_tensors, (first, second))
    assert first_values
    for one, other in zip(first_values, second_values, strict=True):
        assert get_largest_difference(one, other) <= tolerance


# Names, and values to the bit
assert_same_bits = partial(assert_close, rtol=0, atol=0)


@contextlib.contextmanager
def raises_one_line(
    *words: str, error: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> Iterator[None]:
    """Expect an error with a one-line message that contains all `words`."""
    with pytest.raises(error) as raised:
        yield
    message = str(raised.value)
    assert "\n" not in message, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
