"""Layers that call operations instead of modules, on any device, and weights that are prepared once.

    use_fast_modules(model)                 ViTCLSLayers -> LeanLayers
    use_fast_modules(model, packed=True)    the same, and passes without gradients use packed weights
    use_plain_modules(model)                restores the plain class

A GPU, and a CPU with a small model, computes faster than Python calls modules. Queries, keys and
values are one product, as are the two inputs of a gated MLP: a pass joins their weights. Packed
weights are joined, cast to the precision of the pass and put into the order of the CPU
(cpu_kernels.py) once, instead of in every pass. The plain class computes what is unusual: hooks, replaced parts and
functions, other attention functions, compiled programs. docs/speed.md has the times of whole models.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..model.blocks_vitcls import (
    ViTCLSAttention,
    ViTCLSGLU,
    ViTCLSLayer,
    ViTCLSLayers,
    ViTCLSMLP,
)
from ..model.positions_vitcls import rotate_patches
from .cpu_kernels import (
    attend,
    can_use_cpu_kernels,
    count_dispatch_modes,
    has_hooks,
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
# Functions that are not called, although people replace them in a class
REPLACEABLE = (
    (ViTCLSLayers, "forward"),
    (ViTCLSLayer, "forward"),
    (ViTCLSAttention, "forward"),
    (ViTCLSAttention, "attend"),
    (ViTCLSAttention, "project_qkv"),
    (ViTCLSMLP, "forward"),
    (ViTCLSGLU, "forward"),
    (GELUActivation, "forward"),
    (nn.Dropout, "forward"),
    (nn.Linear, "forward"),
    (nn.LayerNorm, "forward"),
)
USUAL_FUNCTIONS = [getattr(owner, name) for owner, name in REPLACEABLE]
# Attributes of modules that change what a layer computes, and may change between passes
WATCHED = {
    ViTCLSLayer: ("forward", "training", "gradient_checkpointing"),
    ViTCLSAttention: (
        "forward",
        "attend",
        "project_qkv",
        "get_attention_function",
        "recorder",
        "config",
    ),
    nn.Dropout: ("forward", "training", "p"),
}
# The only ones that usual layers have
USUAL_ATTRIBUTES = {"training", "gradient_checkpointing", "config", "p"}
# Arguments without an effect on layers with SDPA
IGNORED_ARGUMENTS = {"num_items_in_batch", "output_hidden_states", "output_attentions"}

Product = tuple[Tensor, Tensor | None]  # Weight [out, in] and bias [out]
# What the products of all layers were prepared from, as numbers and as tensors, and the products
PackedWeights = tuple[list[int], list[Tensor], list[Product]]


class LayerParts(NamedTuple):
    """The modules of a usual layer; lists are without identities."""

    layer: ViTCLSLayer
    attention: ViTCLSAttention
    mlp: nn.Module
    query_modules: list[nn.Module]  # The norm of queries, if there is one, and so on
    key_modules: list[nn.Module]
    attention_modules: list[nn.Module]
    attention_branch: list[nn.Module]  # Layer scale and drop path
    mlp_modules: list[nn.Module]
    mlp_branch: list[nn.Module]


class Plan(NamedTuple):
    """What an earlier pass found out about usual layers."""

    layers: list[LayerParts]
    weights: list[Any]
    biases: list[Any]
    groups: list[slice]  # The weights of each product, four per layer
    # What a pass reads to find out whether all of this is still true
    containers: list[dict[str, Any]]  # `_modules` and `_parameters`
    classed: list[nn.Module]  # Modules whose class matters
    watched: tuple[list[dict[str, Any]], list[str]]  # `vars` of a module, and a name
    state: list[Any]


# Installing ---------------------------------------------------------------------------------------
def use_fast_modules(model: Model, packed: bool = False) -> Model:
    """Make the layers of a model faster in place, and return the model.

    Parameters, state dicts, hooks and `isinstance` checks stay as they are; outputs agree up to
    rounding errors. `use_plain_modules` undoes it. With VITCLS_CPU_KERNELS=0, nothing changes.

    Args:
        model: any model that contains ViTCLS layers.
        packed: whether the model is only read, in one process. Without gradients, its layers then
            use copies of the weights, in the precision of `torch.autocast` or else of the model.
            They are made in the next pass, and again after the weights have changed. PyTorch does
            not count edits of `parameter.data` in place, and steps of fused optimizers
            (`torch.optim.AdamW(..., fused=True)`): after these, call this function again, or the
            outputs mix old and new weights. `model.train()` and a pass with gradients of the
            weights end it, so a training loop needs no call.

    Examples:
        >>> from modeling_vitcls import ViTCLSModel, use_fast_modules, use_plain_modules
        >>> model = use_fast_modules(ViTCLSModel.from_pretrained("runs/photos"), packed=True)
        >>> type(use_plain_modules(model).layers).__name__
        'ViTCLSLayers'
    """
    if not can_use_cpu_kernels():
        return model
    for module in model.modules():
        if type(module) is ViTCLSLayers:
            module.__class__ = LeanLayers
        if type(module) is LeanLayers:
            module.packed_weights = {} if packed else None
    return model


def use_plain_modules(model: Model) -> Model:
    """Undo `use_fast_modules` in place, and return the model.

    Examples:
        >>> from modeling_vitcls import ViTCLSModel, use_plain_modules
        >>> model = use_plain_modules(ViTCLSModel.from_pretrained("runs/photos"))
    """
    for module in model.modules():
        if type(module) is LeanLayers:
            module.__class__ = ViTCLSLayers  # type: ignore[assignment]
            for name in ("plan", "packed_weights"):
                vars(module).pop(name, None)
    return model


# Layers -------------------------------------------------------------------------------------------
class LeanLayers(ViTCLSLayers):
    """ViTCLSLayers that call operations instead of modules.

    Attributes:
        plan: what an earlier pass found out about the layers; copies find it out themselves.
        packed_weights: the weights by precision; None if those of the model are used. Copies
            prepare their own.
    """

    plan: Plan | None = None
    packed_weights: dict[torch.dtype, PackedWeights] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is copied and pickled."""
        is_packed = self.packed_weights is not None
        return vars(self) | {"plan": None, "packed_weights": {} if is_packed else None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore copied or pickled layers, as plain ones where kernels cannot be used."""
        super().__setstate__(state)
        if not can_use_cpu_kernels():
            use_plain_modules(self)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, as in PyTorch; layers that train have no packed weights."""
        if mode:
            self.packed_weights = None
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the layers, as in PyTorch, and forget the copies of their weights."""
        if self.packed_weights is not None:
            self.packed_weights = {}
        return super()._apply(fn, recurse)

    def forward(
        self,
        hidden_states: Tensor,
        inputs: Sequence[Sequence[Any]],
        read_layers: Collection[int],
        **kwargs: Any,
    ) -> dict[int, Tensor]:
        """Apply the layers as `ViTCLSLayers` does."""
        plan = None if must_be_plain() else find_plan(self, kwargs)
        products = None if plan is None else find_products(self, plan, hidden_states)
        if plan is None or products is None:
            return super().forward(hidden_states, inputs, read_layers, **kwargs)

        kernels = select_linear(products[0][0].is_mkldnn)
        states = {0: hidden_states}
        for index, parts in enumerate(plan.layers, start=1):
            layer_input = hidden_states
            hidden_states = run_layer(
                parts,
                kernels,
                products[4 * index - 4 : 4 * index],
                layer_input,
                *inputs[index - 1],
            )
            # The hooks with which transformers records hidden states
            for hook in parts.layer._forward_hooks.values():
                hook(parts.layer, (layer_input,), hidden_states)
            if index in read_layers:
                states[index] = hidden_states
        return states


def run_layer(
    parts: LayerParts,
    kernels: tuple[Callable[..., Tensor], Callable[..., Tensor]],
    products: list[Product],
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    position_embeddings: Any,
    num_tokens: int | None,
) -> Tensor:
    """Apply attention, then the MLP, as `ViTCLSLayer` does."""
    linear, linear_with_gelu = kernels
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
    dropout = attention.attention_dropout if attention.training else 0.0
    branch = attend(query, key, value, attention_mask, attention.scaling, dropout).flatten(2)
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
    if torch.is_grad_enabled():
        return hidden_states + branch
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


# Conditions ---------------------------------------------------------------------------------------
def find_plan(layers: LeanLayers, kwargs: dict[str, Any]) -> Plan | None:
    """Find the parts of layers that are usual: no hooks, nothing replaced, and SDPA as attention."""
    plan = layers.plan
    # A replica of DataParallel has the plan of its model, but `_modules` of its own.
    if (
        plan is None
        or plan.containers[0] is not layers._modules
        or not is_same(read_state(plan.containers, plan.classed, plan.watched), plan.state)
    ):
        plan = layers.plan = build_plan(layers)
    is_usual = (
        plan is not None
        and [getattr(owner, name) for owner, name in REPLACEABLE] == USUAL_FUNCTIONS
        and plan.layers[0].attention.get_attention_function() is sdpa_attention_forward
        and all(kwargs[name] is None for name in kwargs.keys() - IGNORED_ARGUMENTS)
    )
    return plan if is_usual else None


def read_state(
    containers: list[Any], classed: list[Any], watched: tuple[list[Any], list[str]]
) -> list[Any]:
    """Read what changes if a part, its class, an attribute or a hook does, in every pass.

    Every new hook has a new number. If none is new, there is still none.
    """
    return [
        RemovableHandle.next_id,
        *chain.from_iterable(map(dict.values, containers)),
        *map(type, classed),
        *map(dict.get, *watched),
    ]


def is_same(found: list[Any], expected: list[Any]) -> bool:
    """Check that lists have the same objects, without comparing the values of tensors."""
    return len(found) == len(expected) and all(map(is_, found, expected))


def build_plan(layers: LeanLayers) -> Plan | None:
    """Collect the parts of layers; None if they are unusual."""
    containers: list[dict[str, Any]] = [layers._modules]
    classed: list[nn.Module] = []
    layer_parts: list[LayerParts] = []
    linears: list[Any] = []
    groups: list[slice] = []
    for layer in layers:
        if type(layer) is not ViTCLSLayer or type(layer.attention) is not ViTCLSAttention:
            return None
        attention, mlp = layer.attention, layer.mlp
        if type(mlp) not in MLP_LINEARS or type(layer.dropout) is not nn.Dropout:
            return None
        # Monte Carlo dropout trains this part of the layer alone
        if layer.dropout.training and layer.dropout.p:
            return None
        if layer.training and layer.gradient_checkpointing:
            return None
        containers += [layer._modules, attention._modules, mlp._modules]
        classed += [layer, attention, mlp, layer.dropout]
        layer_parts.append(
            LayerParts(
                layer=layer,
                attention=attention,
                mlp=mlp,
                query_modules=skip_identities(attention.q_norm),
                key_modules=skip_identities(attention.k_norm),
                attention_modules=skip_identities(attention.norm),
                attention_branch=skip_identities(layer.layer_scale1, layer.drop_path),
                mlp_modules=skip_identities(mlp.norm),
                mlp_branch=skip_identities(layer.layer_scale2, layer.drop_path),
            )
        )
        for owner, products in ((attention, ATTENTION_LINEARS), (mlp, MLP_LINEARS[type(mlp)])):
            for names in products:
                groups.append(slice(len(linears), len(linears) + len(names)))
                linears += [getattr(owner, name) for name in names]

    parts = [*chain.from_iterable(map(dict.values, containers))]
    watched = [
        (vars(part), name) for part in parts for name in WATCHED.get(type(part), ("forward",))
    ]
    parameters = [linear._parameters for linear in linears]
    weights = [each.get("weight") for each in parameters]
    biases = [each.get("bias") for each in parameters]
    is_usual = (
        {*map(type, linears)} == {nn.Linear}
        # Quantized, sharded and functional weights (MAML) stay plain; a bias may be None
        and {*map(len, parameters)} == {2}
        and {*map(type, weights)} == {nn.Parameter}
        and {*map(type, biases)} <= {nn.Parameter, type(None)}
        and len({id(each.attention.config) for each in layer_parts}) == 1
        and not any(
            attributes.get(name) for attributes, name in watched if name not in USUAL_ATTRIBUTES
        )
        and not has_hooks(parts)
    )
    if not is_usual:
        return None
    containers += parameters
    classed += linears
    places = ([attributes for attributes, _ in watched], [name for _, name in watched])
    return Plan(
        layers=layer_parts,
        weights=weights,
        biases=biases,
        groups=groups,
        containers=containers,
        classed=classed,
        watched=places,
        state=read_state(containers, classed, places),
    )


def skip_identities(*modules: nn.Module) -> list[nn.Module]:
    """List the modules that are not the identity."""
    return [module for module in modules if type(module) is not nn.Identity]


# Weights ------------------------------------------------------------------------------------------
def find_products(layers: LeanLayers, plan: Plan, inputs: Tensor) -> list[Product] | None:
    """Take the packed products of the layers, or join them for this pass; None if unusual."""
    sources = [each for each in plan.weights + plan.biases if each is not None]
    if torch.is_grad_enabled() and any(each.requires_grad for each in sources):
        # An optimizer may follow, and fused ones do not count their edits
        layers.packed_weights = None
    packed = layers.packed_weights
    if packed is None or torch.is_grad_enabled() or count_dispatch_modes():
        return join_weights(plan)

    try:
        versions = [each._version for each in sources]
    except RuntimeError:  # Tensors of inference mode do not count their edits
        return join_weights(plan)
    state = [
        *versions,
        *map(id, sources),
        *map(Tensor.data_ptr, sources),
        # Another view of the same memory, in place of `parameter.data`
        *map(Tensor.numel, plan.weights),
        *map(Tensor.is_contiguous, plan.weights),
    ]
    dtype = get_matmul_dtype(inputs)
    if dtype in packed:
        packed_state, _, found = packed[dtype]
        if packed_state == state:
            return found

    with torch.inference_mode(False), torch.no_grad():
        products = join_weights(plan)
        # While a CUDA graph is recorded, nothing is computed that could be kept.
        if products is None or (inputs.is_cuda and torch.cuda.is_current_stream_capturing()):
            return products
        products = [
            (reorder_weight(weight.to(dtype), inputs), None if bias is None else bias.to(dtype))
            for weight, bias in products
        ]
    # Kept, as other tensors could otherwise get their addresses
    kept = [*sources, *(each.detach() for each in sources)]
    packed[dtype] = state, kept, products
    return products


def get_matmul_dtype(inputs: Tensor) -> torch.dtype:
    """Find the dtype of matrix products of `inputs`; autocast changes all but float64."""
    device = inputs.device.type
    # FLOPs are counted on "meta", which has no autocast.
    if inputs.dtype == torch.float64 or inputs.is_meta or not torch.is_autocast_enabled(device):
        return inputs.dtype
    return torch.get_autocast_dtype(device)


def join_weights(plan: Plan) -> list[Product] | None:
    """Join the weights and the biases of each product; None if the weights have several shapes."""
    products: list[Product] = []
    for group in plan.groups:
        weights, biases = plan.weights[group], plan.biases[group]
        if len(weights) == 1:
            products.append((weights[0], biases[0]))
            continue
        if any(weight.shape != weights[0].shape for weight in weights):
            return None
        bias = None
        if any(each is not None for each in biases):
            size = len(weights[0])
            bias = torch.cat(
                [weights[0].new_zeros(size) if each is None else each for each in biases]
            )
        products.append((torch.cat(weights), bias))
    return products
