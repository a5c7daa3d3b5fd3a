"""Models that are only read: weights are joined, cast and put into the order of the CPU once.

    packed = pack(model)       an object of its own; the model stays plain, and nothing watches it
    packed(pixel_values)       the outputs of the model up to rounding, without gradients

A GPU, and a CPU with a small model, computes faster than Python calls modules. A packed model calls
operations instead: queries, keys and values are one product, as are the two inputs of a gated MLP. Weights
are joined, cast to the precision of the pass and put into the order of the CPU (cpu_kernels.py) in the
first pass, and the last layer computes only the tokens that the heads read. docs/speed.md has the times of
whole models.
"""

import copy
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..model.blocks_vitcls import (
    ViTCLSAttention,
    ViTCLSGLU,
    ViTCLSLayer,
    ViTCLSLayers,
    ViTCLSMLP,
)
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.positions_vitcls import rotate_patches
from .cpu_kernels import (
    attend,
    can_use_cpu_kernels,
    count_dispatch_modes,
    has_hooks,
    has_own_hooks,
    must_be_plain,
    reorder_weight,
    select_linear,
)


Model = TypeVar("Model", bound=nn.Module)

# The linear layers of each product
ATTENTION_LINEARS = (("q_proj", "k_proj", "v_proj"), ("o_proj",))
MLP_LINEARS: dict[type[nn.Module], tuple[tuple[str, ...], ...]] = {
    ViTCLSMLP: (("fc1",), ("fc2",)),
    ViTCLSGLU: (("gate_proj", "up_proj"), ("down_proj",)),
}

Product = tuple[Tensor, Tensor | None]  # Weight [out, in] and bias [out]


# Packing ------------------------------------------------------------------------------------------
def pack(model: Model) -> Model:
    """Build an object for reading from a model in its present state.

    It has the methods and outputs of the model, shares the memory of its weights, and adds copies of the
    weights of its layers in the precision of the pass: a quarter to the whole of their memory. Train and
    edit the model, not this object, which sees such changes only in part: pack again after them. What is
    unusual stays plain: another attention function, adapters, quantized weights, hooks. With
    VITCLS_CPU_KERNELS=0, so does everything.

    Args:
        model: any ViTCLS model.

    Returns:
        A model in evaluation mode, whose logits, tokens and distances are those of `model` up to rounding.

    Examples:
        >>> from modeling_vitcls import ViTCLSForImageClassification, pack
        >>> model = pack(ViTCLSForImageClassification.from_pretrained("runs/photos"))
    """
    if is_packed(model):
        return model
    packed: Any = copy_structure(model).eval()
    if not can_use_cpu_kernels():
        return packed
    encoder = packed.base_model
    distance = getattr(packed, "class_distance", None)
    if distance is not None and not distance.counts.is_meta:
        off = torch.autocast(distance.counts.device.type, enabled=False)
        with off, torch.inference_mode(False), torch.no_grad():
            distance.terms = distance.compute_terms()
    if hasattr(packed, "apply_heads"):
        packed.num_output_tokens = count_output_tokens(encoder)
    if type(encoder.layers) is ViTCLSLayers and not has_hooks(encoder.layers.modules()):
        layers = list(encoder.layers)
        if all(map(is_usual, layers)):
            encoder.layers = PackedLayers(layers).eval()
    return packed


def is_packed(model: nn.Module) -> bool:
    """Tell whether a model is what `pack` has returned."""
    return vars(model).get("is_packed", False)


def copy_structure(module: nn.Module) -> nn.Module:
    """Copy modules, which share their parameters and buffers with the original ones."""
    copied = copy.copy(module)
    vars(copied)["is_packed"] = True
    for name, value in vars(module).items():
        if isinstance(value, dict):
            vars(copied)[name] = copy.copy(value)
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else copy_structure(child)
    return copied


def count_output_tokens(encoder: Any) -> int | None:
    """Count the special tokens that the heads of a classifier read in the last layer; None for all tokens."""
    config = encoder.config
    # Without labels, the logits are the pooler output of the encoder, to the bit
    if config.compute_all_tokens or not config.num_labels or not can_trim_last_layer(config):
        return None
    # Classifiers of tasks have no pooler, and statistics may read what the classifier does not
    if config.pooling != "cls" or [-1, "mean"] in (config.class_statistics or {}).get("tokens", ()):
        return None
    if getattr(encoder.pooler, "pooling", "cls") != "cls" or has_hooks(encoder.modules()):
        return None
    return config.num_cls_tokens + config.num_distillation_tokens * config.has_distillation_head


def can_trim_last_layer(config: ViTCLSConfig) -> bool:
    """Tell whether the last layer can compute only the first tokens: not with flash attention."""
    return config._attn_implementation in (None, "sdpa", "eager")


def is_usual(layer: nn.Module) -> bool:
    """Tell whether `run_layer` computes what a layer computes."""
    if type(layer) is not ViTCLSLayer or type(layer.attention) is not ViTCLSAttention:
        return False
    linears = [linear for names in list_products(layer) for linear in names]
    if type(layer.mlp) not in MLP_LINEARS or {*map(type, linears)} != {nn.Linear}:
        return False
    weights = [weight for linear in linears for weight in linear.parameters()]
    return (
        {*map(type, weights)} == {nn.Parameter}  # No quantized or sharded ones
        and layer.attention.get_attention_function() is sdpa_attention_forward
        and not any("forward" in vars(module) for module in layer.modules())
    )


def list_products(layer: Any) -> list[list[nn.Linear]]:
    """List the linear layers of each product of a layer."""
    products = [*ATTENTION_LINEARS, *MLP_LINEARS.get(type(layer.mlp), ())]
    owners = [layer.attention] * 2 + [layer.mlp] * 2
    return [
        [getattr(owner, name) for name in names]
        for owner, names in zip(owners, products, strict=False)
    ]


# Layers -------------------------------------------------------------------------------------------
class LayerParts(NamedTuple):
    """The modules of a usual layer; lists are without identities."""

    layer: ViTCLSLayer
    attention: ViTCLSAttention
    mlp: nn.Module
    query_modules: list[nn.Module]  # The norm of queries, if there is one, and so on
    key_modules: list[nn.Module]
    attention_modules: list[nn.Module]
    attention_branch: list[nn.Module]  # Layer scale
    mlp_modules: list[nn.Module]
    mlp_branch: list[nn.Module]


class PackedLayers(ViTCLSLayers):
    """Layers of a packed model, which call operations instead of modules.

    Attributes:
        parts: the modules of each layer.
        products: the weights of the four products of each layer, by precision.
    """

    def __init__(self, layers: Sequence[Any] = ()) -> None:
        super().__init__(layers)
        self.parts = [
            LayerParts(
                layer=layer,
                attention=layer.attention,
                mlp=layer.mlp,
                query_modules=skip_identities(layer.attention.q_norm),
                key_modules=skip_identities(layer.attention.k_norm),
                attention_modules=skip_identities(layer.attention.norm),
                attention_branch=skip_identities(layer.layer_scale1),
                mlp_modules=skip_identities(layer.mlp.norm),
                mlp_branch=skip_identities(layer.layer_scale2),
            )
            for layer in layers
        ]
        self.products: dict[torch.dtype, list[list[Product]]] = {}

    def __getitem__(self, index: Any) -> Any:
        """Select a layer, or some with their weights."""
        selected = super().__getitem__(index)
        if isinstance(index, slice):
            selected.training = self.training
            selected.products = {dtype: each[index] for dtype, each in self.products.items()}
        return selected

    def forward(
        self,
        hidden_states: Tensor,
        inputs: Sequence[Sequence[Any]],
        read_layers: Collection[int],
        **kwargs: Any,
    ) -> dict[int, Tensor]:
        """Apply the layers as `ViTCLSLayers` does."""
        if self.training or torch.is_grad_enabled() or must_be_plain() or self.have_readers():
            all_tokens = [each[:2] for each in inputs]
            return super().forward(hidden_states, all_tokens, read_layers, **kwargs)

        products = self.get_products(hidden_states)
        states = {0: hidden_states}
        for index, parts in enumerate(self.parts, start=1):
            layer_input = hidden_states
            hidden_states = run_layer(parts, products[index - 1], layer_input, *inputs[index - 1])
            # The hooks with which transformers records hidden states
            for hook in parts.layer._forward_hooks.values():
                hook(parts.layer, (layer_input,), hidden_states)
            if index in read_layers:
                states[index] = hidden_states
        return states

    def have_readers(self) -> bool:
        """Tell whether recorders or hooks read the layers in this pass: they get all tokens, as in the model."""
        has_recorder = any(parts.attention.recorder is not None for parts in self.parts)
        return has_recorder or has_own_hooks(parts.layer for parts in self.parts)

    @torch.no_grad()
    def get_products(self, inputs: Tensor) -> list[list[Product]]:
        """Get the weights for a pass, which the first one prepares."""
        dtype = get_matmul_dtype(inputs)
        kept = self.products.get(dtype)
        # What counts FLOPs or fakes tensors knows no reordered weights
        if count_dispatch_modes() and (kept is None or kept[0][0][0].is_mkldnn):
            return self.join_products(dtype)
        if kept is None:
            with torch.inference_mode(False):
                products = self.join_products(dtype)
                products = [
                    [(reorder_weight(weight, inputs), bias) for weight, bias in each]
                    for each in products
                ]
            # While a CUDA graph is recorded, nothing is computed that could be kept.
            if inputs.is_cuda and torch.cuda.is_current_stream_capturing():
                return products
            self.products[dtype] = products
        return self.products[dtype]

    def join_products(self, dtype: torch.dtype) -> list[list[Product]]:
        """Join the weights of the products of each layer."""
        return [
            [join_weights(linears, dtype) for linears in list_products(layer)] for layer in self
        ]


def join_weights(linears: Sequence[nn.Linear], dtype: torch.dtype) -> Product:
    """Join and cast the weights and biases of linear layers with one input."""
    weights = [linear.weight.detach().to(dtype) for linear in linears]
    biases = [
        each.weight.new_zeros(each.out_features, dtype=dtype)
        if each.bias is None
        else each.bias.detach().to(dtype)
        for each in linears
    ]
    has_bias = any(linear.bias is not None for linear in linears)
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return weight, torch.cat(biases) if has_bias else None


def get_matmul_dtype(inputs: Tensor) -> torch.dtype:
    """Find the dtype of matrix products of `inputs`; autocast changes all but float64."""
    device = inputs.device.type
    # FLOPs are counted on "meta", which has no autocast.
    if inputs.dtype == torch.float64 or inputs.is_meta or not torch.is_autocast_enabled(device):
        return inputs.dtype
    return torch.get_autocast_dtype(device)


def skip_identities(*modules: nn.Module) -> list[nn.Module]:
    """List the modules that are not the identity."""
    return [module for module in modules if type(module) is not nn.Identity]


def run_layer(
    parts: LayerParts,
    products: list[Product],
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_embeddings: Any,
    num_tokens: int | None = None,
) -> Tensor:
    """Apply attention, then the MLP, as `ViTCLSLayer` does."""
    linear, linear_with_gelu = select_linear(products[0][0].is_mkldnn)
    qkv, projection, mlp_input, mlp_output = products
    attention, mlp = parts.attention, parts.mlp
    modules: Any = parts.layer._modules  # Attributes are slower, as nn.Module searches in Python

    # Attention
    states = linear(normalize(modules["layernorm_before"], hidden_states), *qkv)
    batch, num_keys, _ = states.shape
    states = states.view(batch, num_keys, 3, -1, attention.head_dim)
    query, key, value = states.permute(2, 0, 3, 1, 4).unbind(0)  # [B, heads, N, head_dim] each
    if num_tokens is not None:
        hidden_states = hidden_states[:, :num_tokens]
        query = query[:, :, :num_tokens]
        attention_mask = None if attention_mask is None else attention_mask[:, :, :num_tokens]
    query = apply_modules(parts.query_modules, query)
    key = apply_modules(parts.key_modules, key)
    if position_embeddings is not None:
        query, key = rotate_patches(query, key, position_embeddings)
    branch = attend(query, key, value, attention_mask, attention.scaling).flatten(2)
    branch = linear(apply_modules(parts.attention_modules, branch), *projection)
    hidden_states = hidden_states + apply_modules(parts.attention_branch, branch)

    # MLP
    inputs = normalize(modules["layernorm_after"], hidden_states)
    activation: Any = mlp._modules["activation_fn"]
    if type(mlp) is ViTCLSGLU:
        gates, values = linear(inputs, *mlp_input).chunk(2, dim=-1)
        branch = activation.forward(gates) * values
    elif type(activation) is GELUActivation and activation.act is nn.functional.gelu:
        branch = linear_with_gelu(inputs, *mlp_input)
    else:
        branch = activation.forward(linear(inputs, *mlp_input))
    branch = linear(apply_modules(parts.mlp_modules, branch), *mlp_output)
    branch = apply_modules(parts.mlp_branch, branch)
    return hidden_states.add_(branch)  # This tensor is new; the input of the layer is unchanged


def apply_modules(modules: list[nn.Module], states: Tensor) -> Tensor:
    """Apply modules, which have no hooks, one after another."""
    for module in modules:
        states = module.forward(states)
    return states


def normalize(norm: nn.Module, inputs: Tensor) -> Tensor:
    """Apply a norm."""
    parameters: Any = norm._parameters
    if type(norm) is not nn.LayerNorm or len(parameters) != 2:
        return norm.forward(inputs)
    weight, bias = parameters["weight"], parameters["bias"]
    return torch.layer_norm(inputs, norm.normalized_shape, weight, bias, norm.eps)
