"""Layers that leave out Python, on any device: they call operations instead of modules.

    use_fast_modules(model)     ViTCLSLayer -> LeanLayer, and the CPU kernels
    use_plain_modules(model)    restores the plain classes (cpu_kernels.py)

A GPU computes a small model faster than Python calls its modules. Queries, keys and values are one
product on GPUs, and for small inputs on CPUs; each pass joins their weights anew. The plain class
computes what is unusual: hooks, replaced parts, other attention functions, compiled programs. The
switches of cpu_kernels.py turn lean layers off, too.

What is gained (docs/speed.md): on an NVIDIA H200 in bfloat16, a forward pass of a ViT-S with one
image takes 0.80 of the time of plain layers, a training step with 64 images 0.77. A CUDA graph
leaves nothing of the first gain: it starts all kernels without Python, and a lean pass has 150 of
them, a plain one 151. The gain remains for training, and for inference without a graph.
"""

from itertools import repeat
from operator import contains
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from ..model.blocks_vitcls import (
    ViTCLSGLU,
    ViTCLSLayer,
    ViTCLSMLP,
    ViTCLSPatchEmbeddings,
)
from ..model.positions_vitcls import PositionEmbeddings, rotate_patches
from ..model.variants_vitcls import ATTENTION_CLASSES
from .cpu_kernels import (
    CPUMLP,
    KERNEL_CLASSES,
    CPUAttention,
    CPULinear,
    FastModule,
    Model,
    can_use_cpu_kernels,
    has_hooks,
    has_plain_parameters,
    must_be_plain,
    sdpa_attention,
)


class LeanLayer(FastModule, ViTCLSLayer):
    """ViTCLSLayer that calls operations instead of modules.

    Attributes:
        usual: what `is_usual_layer` found out in an earlier pass. It is neither copied nor pickled.
    """

    usual: tuple[Any, list[Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled."""
        return {name: value for name, value in vars(self).items() if name != "usual"}

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_embeddings: PositionEmbeddings | None = None,
        num_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> Tensor:
        """Apply attention, then the MLP, and return all tokens or only the first `num_tokens`."""
        if must_be_plain() or not is_usual_layer(self, kwargs):
            return super().forward(
                hidden_states, attention_mask, position_embeddings, num_tokens, **kwargs
            )
        # A lookup in a dict is ten times as fast as an attribute, which nn.Module searches in Python.
        modules: Any = self._modules
        attention, mlp = modules["attention"], modules["mlp"]
        has_kernels = has_cpu_kernels(hidden_states)
        arguments = (attention_mask, position_embeddings, num_tokens)

        inputs = normalize(modules["layernorm_before"], hidden_states)
        if has_kernels:
            branch, _ = attention.forward(inputs, *arguments)
        else:
            branch = attend(attention, inputs, *arguments)
        branch = skip_identity(modules["layer_scale1"], branch)
        if num_tokens is not None:
            hidden_states = hidden_states[:, :num_tokens]
        hidden_states = hidden_states + skip_identity(modules["drop_path"], branch)

        inputs = normalize(modules["layernorm_after"], hidden_states)
        branch = mlp.forward(inputs) if has_kernels else compute_mlp(mlp, inputs)
        branch = skip_identity(modules["layer_scale2"], branch)
        return hidden_states + skip_identity(modules["drop_path"], branch)


FAST_CLASSES = {**KERNEL_CLASSES, ViTCLSLayer: LeanLayer}
# Classes whose linear layers and convolutions are replaced; in other classes, they may be a person's.
OWNERS = (
    ViTCLSLayer,
    *ATTENTION_CLASSES.values(),
    ViTCLSMLP,
    ViTCLSGLU,
    ViTCLSPatchEmbeddings,
)


def use_fast_modules(model: Model) -> Model:
    """Replace modules inside ViTCLS layers with faster ones in place, and return the model.

    Parameters, state dicts, hooks and `isinstance` checks stay as they are; outputs agree up to
    rounding errors. `use_plain_modules` undoes it. With VITCLS_CPU_KERNELS=0, nothing changes.

    Args:
        model: any model that contains ViTCLS layers.

    Examples:
        >>> from modeling_vitcls import ViTCLSModel, use_fast_modules, use_plain_modules
        >>> model = use_fast_modules(ViTCLSModel.from_pretrained("runs/photos"))
        >>> type(use_plain_modules(model).layers[0].mlp).__name__
        'ViTCLSMLP'
    """
    if not can_use_cpu_kernels():
        return model
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # FSDP and device maps look for layers by class name.
            module._no_split_modules = {*(module._no_split_modules or ()), LeanLayer.__name__}
        if type(module) in OWNERS:
            for child in module.children():
                if type(child) in (nn.Linear, nn.Conv2d):
                    child.__class__ = FAST_CLASSES[type(child)]
            module.__class__ = FAST_CLASSES.get(type(module), type(module))
    return model


# Number of multiplications [..., in] x [in, in] from which CPUs use the CPU kernels.
MIN_MULTIPLICATIONS_OF_KERNELS = 400_000


def has_cpu_kernels(inputs: Tensor) -> bool:
    """Check whether CPU kernels compute inputs [..., in]: on CPUs, unless these are too small."""
    return inputs.is_cpu and (
        inputs.numel() * inputs.shape[-1] >= MIN_MULTIPLICATIONS_OF_KERNELS
        or inputs.dtype != torch.float32
        or torch.is_autocast_enabled("cpu")
    )


def is_usual_layer(layer: LeanLayer, kwargs: Any) -> bool:
    """Check that a layer has no hooks or replaced parts, and no attention but SDPA.

    This runs in every layer of every pass, hence the loops of `map`.
    """
    modules: Any = layer._modules
    attention, mlp = modules["attention"], modules["mlp"]
    parts = [*modules.values(), *attention._modules.values(), *mlp._modules.values()]
    # Every new hook has a new number. If none is new, what was found before is still true.
    state = (RemovableHandle.next_id, parts, [*map(type, parts)])
    if layer.usual is None or layer.usual[0] != state:
        is_usual = has_usual_parts(layer) and not has_hooks(parts)
        layer.usual = (state, [*map(vars, parts)]) if is_usual else None
    return (
        layer.usual is not None
        and not any(map(contains, layer.usual[1], repeat("forward")))
        and kwargs.keys() <= {"num_items_in_batch"}  # Trainer's number of labels, for the loss
        and attention.recorder is None
        and attention.get_attention_function() is sdpa_attention
        and not (layer.training and modules["dropout"].p)
    )


def has_usual_parts(layer: LeanLayer) -> bool:
    """Check that the parts of a layer that are not called have the usual classes and parameters."""
    attention, mlp = layer.attention, layer.mlp
    linears: list[Any] = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    if type(mlp) is CPUMLP:
        linears += mlp.fc1, mlp.fc2
    return (
        type(attention) is CPUAttention
        and type(mlp) in (CPUMLP, ViTCLSGLU)
        and {*map(type, linears)} == {CPULinear}
        and all(map(has_plain_parameters, linears))
        and type(layer.dropout) is nn.Dropout
    )


def attend(
    attention: CPUAttention,
    inputs: Tensor,
    attention_mask: Any,
    position_embeddings: PositionEmbeddings | None,
    num_queries: int | None,
) -> Tensor:
    """Attend, [B, N, D] -> [B, n, D], as `ViTCLSAttention.forward`."""
    modules: Any = attention._modules
    parameters = [modules[name]._parameters for name in ("q_proj", "k_proj", "v_proj")]
    weights = [each.get("weight") for each in parameters]
    biases = [each.get("bias") for each in parameters]
    if not can_be_joined(weights, biases):
        output, _ = attention.forward(inputs, attention_mask, position_embeddings, num_queries)
        return output

    # Joined in every pass: a copy that is kept could become stale.
    bias = None if biases[0] is None else torch.cat(biases)
    qkv = nn.functional.linear(inputs, torch.cat(weights), bias)  # [B, N, 3 * heads * head_dim]
    qkv = qkv.view(*inputs.shape[:-1], 3, -1, attention.head_dim)
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, head_dim] each
    if num_queries is not None:
        query = query[:, :, :num_queries]
        attention_mask = None if attention_mask is None else attention_mask[:, :, :num_queries]
    query, key = skip_identity(modules["q_norm"], query), skip_identity(modules["k_norm"], key)
    if position_embeddings is not None:
        query, key = rotate_patches(query, key, position_embeddings)

    dropout = attention.attention_dropout if attention.training else 0.0
    output = nn.functional.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, scale=attention.scaling
    )
    output = output.transpose(1, 2).flatten(2)  # [B, n, heads * head_dim]
    return apply_linear(modules["o_proj"], skip_identity(modules["norm"], output))


def can_be_joined(weights: list[Any], biases: list[Any]) -> bool:
    """Check that queries, keys and values have plain weights of one shape, and all or no biases.

    This is checked in every pass, because people replace parameters between passes.
    """
    return (
        {*map(type, weights)} == {nn.Parameter}
        and weights[0].shape == weights[1].shape == weights[2].shape
        and len({*map(type, biases)}) == 1
    )


def compute_mlp(mlp: nn.Module, inputs: Tensor) -> Tensor:
    """Apply an MLP, [B, N, D] -> [B, N, D]; the usual one without calls of its modules."""
    if type(mlp) is not CPUMLP:
        return mlp.forward(inputs)
    modules: Any = mlp._modules
    activations = modules["activation_fn"].forward(apply_linear(modules["fc1"], inputs))
    return apply_linear(modules["fc2"], skip_identity(modules["norm"], activations))


def skip_identity(module: nn.Module, inputs: Tensor) -> Tensor:
    """Apply a module unless it is the identity."""
    return inputs if type(module) is nn.Identity else module.forward(inputs)


def apply_linear(module: nn.Module, inputs: Tensor) -> Tensor:
    """Apply a linear layer."""
    parameters: Any = module._parameters
    if len(parameters) != 2:  # MAML replaces parameters with tensors
        return module.forward(inputs)
    return nn.functional.linear(inputs, parameters["weight"], parameters["bias"])


def normalize(norm: nn.Module, inputs: Tensor) -> Tensor:
    """Apply a norm."""
    parameters: Any = norm._parameters
    if type(norm) is not nn.LayerNorm or len(parameters) != 2:
        return norm.forward(inputs)
    weight, bias = parameters["weight"], parameters["bias"]
    return torch.layer_norm(inputs, norm.normalized_shape, weight, bias, norm.eps)
