"""Operations of a forward pass, and bytes of a training step, computed from the configuration.

    forward_flops(model, image_size)      patches + layers + pooler + heads; a multiply-add counts as two
    estimate_memory(model, image_size)    parameters + gradients + AdamW's moments + what autograd keeps

Counted are matrix products and the patch projection; norms, activations, softmax, rotations and the resampling of
positions are left out, under 1 % of a ViT-S at 224 pixels. Backward passes cost about twice the forward pass. What is
measured, and not counted, is in benchmarking/.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..blocks_vitcls import LayerScale, ViTCLSAttention, ViTCLSGLU
from ..configuration_vitcls import ViTCLSConfig
from ..heads_vitcls import AttentionPooler
from ..modeling_vitcls import get_num_tokens_read
from ..variants_vitcls import get_num_kept_patches


ImageSize = int | tuple[int, int] | list[int] | None

FLOAT32 = 4  # bytes of a number


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step with AdamW. An estimate: `estimate_memory` says of what.

    Attributes:
        parameters: all weights.
        gradients: of those that are trained.
        optimizer: two moments of each of these.
        activations: what autograd keeps of the forward pass for the backward pass.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations


# Operations ----------------------------------------------------------------------------------------------------------


def forward_flops(model: Any, image_size: ImageSize = None, batch_size: int = 1) -> int:
    """Return the operations of a forward pass, by formula; `model.flops()` counts them by running a copy."""
    encoder = model.base_model
    num_patches, num_tokens = sequence_lengths(model.config, image_size)
    per_image = 2 * encoder.embeddings.patch_embeddings.projection.weight.numel() * num_patches
    for layer, num_queries in zip(encoder.layers, queries_per_layer(model, num_tokens), strict=True):
        per_image += layer_flops(layer, num_queries, num_tokens)
    per_batch = 0
    if encoder.pooler is not None:
        per_image += linear_flops(encoder.pooler)
        for pooler in filter(is_attention_pooler, encoder.pooler.modules()):
            per_image += attention_pooler_flops(pooler, num_patches, num_tokens)
            per_batch += linear_flops(pooler.q_proj)  # of the probe, which is the same for all images
    per_image += linear_flops(*heads_of(model))
    if hasattr(model, "decoder"):
        per_image += num_patches * linear_flops(model.decoder)
    return batch_size * per_image + per_batch


def sequence_lengths(config: ViTCLSConfig, image_size: ImageSize) -> tuple[int, int]:
    """Patches and tokens of images of that size.

    Raises:
        ValueError: for images smaller than a patch.
    """
    height, width = image_sides(config, image_size)
    patch_height, patch_width = config.patch_height_width
    num_patches = (height // patch_height) * (width // patch_width)
    if not num_patches:
        raise ValueError(
            f"image_size is {height} x {width}, smaller than one patch of {patch_height} x {patch_width} pixels"
        )
    return num_patches, config.token_layout.num_prefix_tokens + num_patches


def image_sides(config: ViTCLSConfig, image_size: ImageSize) -> tuple[int, int]:
    """Height and width in pixels; the model's own by default."""
    if image_size is None:
        return config.image_height_width
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


def queries_per_layer(model: Any, num_tokens: int) -> list[int]:
    """How many tokens each layer computes: the last one only the tokens that the classifiers read."""
    read = get_num_tokens_read(model.base_model, {}) if heads_of(model) else None
    return [num_tokens] * (model.config.num_hidden_layers - 1) + [num_tokens if read is None else read]


def layer_flops(layer: Any, num_queries: int, num_tokens: int) -> int:
    """Of one image: projections and MLP of the tokens that are computed, keys and values of all, and their mixing."""
    attention: ViTCLSAttention = layer.attention
    of_keys = linear_flops(attention.k_proj, attention.v_proj)
    of_queries = linear_flops(attention.q_proj, attention.o_proj, layer.mlp)
    return num_queries * of_queries + num_tokens * of_keys + mixing_flops(attention, num_queries, num_tokens)


def mixing_flops(attention: ViTCLSAttention, num_queries: int, num_keys: int) -> int:
    """Scores, and values weighted by them; where a head has two maps, both weight all of its values."""
    maps_per_head = attention.head_dim // attention.qk_head_dim
    return 2 * num_queries * num_keys * inner_width(attention) * (1 + maps_per_head)


def attention_pooler_flops(pooler: AttentionPooler, num_patches: int, num_tokens: int) -> int:
    """What `linear_flops` of the whole, which takes each layer once, leaves out for one image, and has too much."""
    num_keys = num_tokens if pooler.tokens == slice(None) else num_patches
    mixing = 4 * num_keys * pooler.probe.shape[-1]
    return (num_keys - 1) * linear_flops(pooler.k_proj, pooler.v_proj) + mixing - linear_flops(pooler.q_proj)


def linear_flops(*modules: nn.Module) -> int:
    """Of all linear layers in these modules, for one vector each."""
    return sum(2 * linear.in_features * linear.out_features for linear in linears_in(modules))


def linears_in(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """The linear layers in modules, at any depth."""
    return [part for module in modules for part in module.modules() if isinstance(part, nn.Linear)]


def heads_of(model: Any) -> list[nn.Module]:
    """The classifiers that a model has, each of which reads one vector per image."""
    heads = (getattr(model, name, None) for name in ("classifier", "classifiers", "distillation_classifier"))
    return [head for head in heads if head is not None]


def is_attention_pooler(module: nn.Module) -> bool:
    """Whether it attends to tokens by a learned query."""
    return isinstance(module, AttentionPooler)


def inner_width(attention: ViTCLSAttention) -> int:
    """Channels of all heads."""
    return attention.config.num_attention_heads * attention.head_dim


# Memory --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a step is made: how many bytes numbers take, and where.

    Attributes:
        stream: a number of the residual stream, and of what goes into norms.
        product: a number that goes into or comes out of a matrix product.
        casts: whether autocast makes the latter from the former.
        on_cpu: whether on CPUs, which compute some things again (cpu_kernels_vitcls.py).
    """

    stream: int
    product: int
    casts: bool
    on_cpu: bool


def estimate_memory(
    model: Any,
    image_size: ImageSize = None,
    batch_size: int = 1,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> MemoryEstimate:
    """Return the bytes of a training step with AdamW: weights, gradients, moments, and what autograd keeps.

    What autograd keeps is within a fifth of what was measured. The estimate assumes fused attention unless the
    implementation is "eager", activations that keep their inputs, without what CPUs recompute (cpu_kernels_vitcls.py),
    and one process. It excludes temporary buffers, the allocator's overhead, and images before they are moved or cast.
    Frozen parameters and gradient checkpointing count as they are set. Patch dropout counts unless embeddings and
    first layers are frozen.

    Args:
        image_size: height and width in pixels, or one number for both. Default: the model's own.
        batch_size: number of images.
        autocast: dtype of mixed precision, if it is used.
        device: where the step runs, if the model is still elsewhere: CPUs keep less. Default: the model's device.

    Raises:
        ValueError: for images smaller than a patch.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    stored = model.dtype.itemsize
    on_cpu = torch.device(model.device if device is None else device).type == "cpu"
    setting = Setting(stored, stored if autocast is None else autocast.itemsize, autocast is not None, on_cpu)
    activations = batch_size * activation_bytes(model, image_size, setting)
    if setting.casts:
        activations += setting.product * weights_cast(model, on_cpu)
    return MemoryEstimate(
        parameters=num_bytes(model.parameters()),
        gradients=num_bytes(trained),
        optimizer=2 * num_bytes(trained),
        activations=activations,
    )


def num_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of all of them."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def weights_cast(model: Any, on_cpu: bool) -> int:
    """Numbers in those weights of linear layers that autocast copies, and autograd keeps."""
    layers = list(model.base_model.layers)
    skipped: list[nn.Module] = layers if recomputes(layers) else layers[: first_trained_layer(model.base_model)]
    if on_cpu:
        skipped = skipped + [linears_in([layer.mlp])[-1] for layer in layers[len(skipped) :]]
    weights = [sum(linear.weight.numel() for linear in linears_in(part)) for part in ([model], skipped)]
    return weights[0] - weights[1]


def activation_bytes(model: Any, image_size: ImageSize, setting: Setting) -> int:
    """What is kept of one image: by the embeddings, by each layer from the first that learns on, and at the end."""
    config, encoder = model.config, model.base_model
    num_patches, num_embedded = sequence_lengths(config, image_size)
    num_tokens = tokens_in_training(model, num_patches, num_embedded)  # in the layers
    queries = queries_per_layer(model, num_tokens)
    height, width = image_sides(config, image_size)
    pixels = config.num_channels * height * width
    layers = [
        layer_bytes(layer, num_queries, num_tokens, setting)
        for layer, num_queries in zip(encoder.layers, queries, strict=True)
    ][first_trained_layer(encoder) :]
    if recomputes(encoder.layers):
        inputs = num_tokens * config.hidden_size * setting.stream
        layers = [inputs] * len(layers) + [max(layers, default=0)]  # one layer at a time is computed again
    kept = sum(layers)
    if layers:
        kept += queries[-1] * norm_bytes(config, setting)  # the final one
    if learns(encoder.embeddings):
        kept += pixels * setting.product + num_embedded * norm_bytes(config, setting) * config.pre_norm
    if encoder.pooler is not None and any(map(is_attention_pooler, encoder.pooler.modules())):
        kept += 3 * num_tokens * config.hidden_size * setting.product  # tokens, keys, values
    if hasattr(model, "decoder"):
        kept += num_patches * config.hidden_size * setting.product + 2 * pixels * setting.stream  # and the loss
    return kept


def layer_bytes(layer: Any, num_queries: int, num_tokens: int, setting: Setting) -> int:
    """What one layer keeps of one image."""
    config, product = layer.attention.config, setting.product
    width = config.hidden_size
    kept = num_tokens * (norm_bytes(config, setting) + width * product)
    kept += attention_bytes(layer.attention, num_queries, num_tokens, setting)
    if config.layer_type != "parallel":  # there the MLP reads what attention does
        kept += num_queries * norm_bytes(config, setting)
    if config.layer_type != "parallel" or setting.casts:
        kept += num_queries * width * product
    kept += num_queries * mlp_width(layer.mlp, setting.on_cpu) * product
    num_scales = sum(isinstance(part, LayerScale) for part in layer.children())
    kept += num_queries * width * product * num_scales
    return kept + 2 * num_queries * width * (config.hidden_dropout_prob > 0)  # masks of a byte each


def norm_bytes(config: ViTCLSConfig, setting: Setting) -> int:
    """What a norm keeps of one token: its input, RMSNorm twice."""
    return config.hidden_size * setting.stream * (2 if config.norm_type == "rmsnorm" else 1)


def attention_bytes(attention: ViTCLSAttention, num_queries: int, num_keys: int, setting: Setting) -> int:
    """Queries, keys, values, what comes of them, and attention maps only where no fused kernel does without."""
    config, width = attention.config, inner_width(attention)
    num_maps, maps_per_head = width // attention.qk_head_dim, attention.head_dim // attention.qk_head_dim
    of_both = 1 + config.qk_norm + 2 * config.position_embedding_type.endswith("rope_mixed")  # whose angles learn
    channels = (num_queries + num_keys) * of_both
    channels += (num_queries + num_keys) * maps_per_head  # mixed, and values
    channels += num_queries * config.attention_norm
    channels += 4 * num_queries * (maps_per_head - 1)  # of both maps the difference, normalised
    numbers_per_query = maps_kept(attention, setting.on_cpu) * num_keys or 1  # of the softmax; fused kernels keep one
    return width * channels * setting.product + num_maps * num_queries * FLOAT32 * numbers_per_query


def maps_kept(attention: ViTCLSAttention, on_cpu: bool) -> int:
    """How often whole attention maps are kept: in eager attention, and where no fused kernel does all of it, as with
    scores to which something learned is added, values that are wider than queries, and, on CPUs, dropout.
    """
    config = attention.config
    if config.attention_probs_dropout_prob > 0 and on_cpu:
        return 4  # scores, weights, what is dropped, what is left
    learns_scores = bool(config.gated_tokens) or config.relative_position_bias != "none"
    return int(config._attn_implementation == "eager" or learns_scores or config.attention_type == "differential")


def mlp_width(mlp: Any, on_cpu: bool) -> int:
    """Channels that an MLP keeps of a token: before its activation, of both branches if it has a gate; and after it,
    but on CPUs, which compute that again (cpu_kernels_vitcls.py).
    """
    first = linears_in([mlp])[0]
    branches = 2 if isinstance(mlp, ViTCLSGLU) else 1
    after = 0 if on_cpu else branches + (mlp.norm is not None)
    return (branches + after) * first.out_features


def tokens_in_training(model: Any, num_patches: int, num_tokens: int) -> int:
    """How many of the tokens of an image the layers get in training: patch dropout leaves out the others, unless the
    first layers are frozen, which then see whole images (training/trainable.py)."""
    if first_trained_layer(model.base_model) > 0:
        return num_tokens
    return num_tokens - num_patches + get_num_kept_patches(model.config.patch_drop_rate, num_patches)


def recomputes(layers: Iterable[Any]) -> bool:
    """Whether gradient checkpointing is on."""
    return any(layer.gradient_checkpointing for layer in layers)


def first_trained_layer(encoder: Any) -> int:
    """Index of the first layer that the backward pass has to reach; the number of layers if none."""
    if learns(encoder.embeddings):
        return 0
    trained = [index for index, layer in enumerate(encoder.layers) if learns(layer)]
    return min(trained, default=len(encoder.layers))


def learns(module: nn.Module) -> bool:
    """Whether any of its parameters is trained."""
    return any(parameter.requires_grad for parameter in module.parameters())
