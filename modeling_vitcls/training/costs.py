"""FLOPs of a forward pass and memory of a training step, computed from the configuration.

    count_forward_flops(model, image_size)    patches + layers + pooler + heads; a multiply-add counts as two FLOPs
    estimate_memory(model, image_size)        parameters + gradients + AdamW's moments + activations

The FLOPs include matrix products and the patch projection. Norms, activation functions, softmax, rotary position
embeddings and the interpolation of position embeddings are excluded (less than 1% of the FLOPs of a ViT-S at 224 x
224 pixels). A backward pass requires about twice the FLOPs of a forward pass. For measurements, see benchmarking/.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..blocks_vitcls import LayerScale, ViTCLSAttention, ViTCLSGLU
from ..configuration_vitcls import ViTCLSConfig
from ..heads_vitcls import AttentionPooler
from ..modeling_vitcls import get_num_output_tokens
from ..variants_vitcls import get_num_kept_patches


# Side length or (height, width) in pixels; None means the image size in the configuration.
ImageSize = int | tuple[int, int] | list[int] | None


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Estimated memory of a training step with AdamW, in bytes."""

    parameters: int  # all weights
    gradients: int  # gradients of the trainable parameters
    optimizer: int  # two moments of each trainable parameter
    activations: int  # tensors that autograd stores for the backward pass

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations


# FLOPs ---------------------------------------------------------------------------------------------------------------


def count_forward_flops(model: Any, image_size: ImageSize = None, batch_size: int = 1) -> int:
    """Return the FLOPs of a forward pass, computed from the sizes of the layers. In contrast, `model.flops()` counts
    the operations that a copy of the model executes."""
    encoder = model.base_model
    num_patches, num_tokens = get_num_patches_and_tokens(model.config, image_size)
    flops_per_image = 2 * encoder.embeddings.patch_embeddings.projection.weight.numel() * num_patches
    flops_per_image += sum(count_layer_flops(*layer) for layer in get_layers_with_token_counts(model, num_tokens))
    flops_per_batch = 0
    if encoder.pooler is not None:
        flops_per_image += count_linear_flops(encoder.pooler)
    for pooler in (module for module in encoder.modules() if isinstance(module, AttentionPooler)):
        num_keys = num_tokens if pooler.token_slice == slice(None) else num_patches
        flops_per_image += 4 * num_keys * pooler.probe.shape[-1]  # attention scores and weighted sums of values
        # `count_linear_flops(encoder.pooler)` counts each linear layer for one token per image, but `k_proj` and
        # `v_proj` are applied to `num_keys` tokens, and the query is the same for all images of a batch.
        flops_per_image += (num_keys - 1) * count_linear_flops(pooler.k_proj, pooler.v_proj)
        flops_per_image -= count_linear_flops(pooler.q_proj)
        flops_per_batch += count_linear_flops(pooler.q_proj)
    flops_per_image += count_linear_flops(*get_classifiers(model))
    if hasattr(model, "decoder"):
        flops_per_image += num_patches * count_linear_flops(model.decoder)
    return batch_size * flops_per_image + flops_per_batch


def get_num_patches_and_tokens(config: ViTCLSConfig, image_size: ImageSize) -> tuple[int, int]:
    """Return the number of patches and the number of tokens. Raise ValueError if the image is smaller than a patch."""
    height, width = resolve_image_size(config, image_size)
    patch_height, patch_width = config.patch_height_width
    rows, columns = height // patch_height, width // patch_width
    if not rows * columns:
        raise ValueError(
            f"image_size is {height} x {width} pixels, but the patch size is {patch_height} x {patch_width} "
            "pixels. Set image_size to at least the patch size"
        )
    return rows * columns, config.token_layout.get_num_tokens(rows, columns)


def resolve_image_size(config: ViTCLSConfig, image_size: ImageSize) -> tuple[int, int]:
    if image_size is None:
        return config.image_height_width
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


def get_layers_with_token_counts(model: Any, num_tokens: int) -> list[tuple[Any, int, int]]:
    """Return (layer, number of queries, number of keys) for each layer. The last layer has queries only for the tokens
    that the pooler and the heads use."""
    encoder = model.base_model
    num_output_tokens = get_num_output_tokens(encoder, {}) if get_classifiers(model) else None
    num_queries = [num_tokens] * (model.config.num_hidden_layers - 1) + [num_output_tokens or num_tokens]
    return [(layer, count, num_tokens) for layer, count in zip(encoder.layers, num_queries, strict=True)]


def count_layer_flops(layer: Any, num_queries: int, num_tokens: int) -> int:
    """Return the FLOPs of one layer for one image. Keys and values are computed for all tokens."""
    attention: ViTCLSAttention = layer.attention
    flops = num_queries * count_linear_flops(attention.q_proj, attention.o_proj, layer.mlp)
    flops += num_tokens * count_linear_flops(attention.k_proj, attention.v_proj)
    return flops + count_attention_flops(attention, num_queries, num_tokens)


def count_attention_flops(attention: ViTCLSAttention, num_queries: int, num_keys: int) -> int:
    """Return the FLOPs of attention scores and weighted sums of values. Differential attention multiplies two maps per
    head by all values of the head."""
    num_maps_per_head = attention.head_dim // attention.qk_head_dim
    return 2 * num_queries * num_keys * attention.o_proj.in_features * (1 + num_maps_per_head)


def count_linear_flops(*modules: nn.Module) -> int:
    """Return the FLOPs of all linear layers in the given modules, for one input vector per layer."""
    return sum(2 * linear.in_features * linear.out_features for linear in get_linear_layers(modules))


def get_linear_layers(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    """Return all linear layers in the given modules, at any depth."""
    return [submodule for module in modules for submodule in module.modules() if isinstance(submodule, nn.Linear)]


def get_classifiers(model: Any) -> list[nn.Module]:
    """Return the classifiers, which are applied to one vector per image. Multi-task models have one
    classifier per task."""
    task_classifiers = list(getattr(model, "classifiers", {}).values())
    classifiers = [getattr(model, name, None) for name in ("classifier", "distillation_classifier")]
    return task_classifiers + [classifier for classifier in classifiers if classifier is not None]


# Memory --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """Element sizes and device type of a training step."""

    residual_element_size: int  # bytes per element in the residual stream and in the inputs of norms
    matmul_element_size: int  # bytes per element in inputs and outputs of matrix products
    uses_autocast: bool  # whether autocast casts inputs of matrix products
    is_on_cpu: bool  # whether the step runs on a CPU, where some activations are recomputed (cpu_kernels_vitcls.py)


def estimate_memory(
    model: Any,
    image_size: ImageSize = None,
    batch_size: int = 1,
    autocast: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> MemoryEstimate:
    """Return the estimated memory of a training step with AdamW: parameters, gradients, moments and activations.

    The estimated size of the activations is within 20% of the measured size. The estimate assumes one process and
    activation functions that store their inputs. Attention is assumed to be fused, except in the cases that
    `count_stored_attention_maps` lists. On CPUs, some activations are recomputed (cpu_kernels_vitcls.py). The estimate
    excludes temporary buffers, the allocator's overhead, and images that are not yet cast or moved to the device.
    Frozen parameters, gradient checkpointing and patch dropout are taken into account. Patch dropout has no effect if
    the embeddings and the first layer are frozen.

    Args:
        model: a ViTCLS model.
        image_size: side length or (height, width) in pixels (default: the model's image size).
        batch_size: number of images per step.
        autocast: dtype of mixed precision; None if mixed precision is not used.
        device: device of the step (default: the model's device).

    Raises:
        ValueError: if the image size is smaller than the patch size.
    """
    num_trainable_bytes = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    itemsize = model.dtype.itemsize
    is_on_cpu = torch.device(model.device if device is None else device).type == "cpu"
    settings = StepSettings(
        itemsize, itemsize if autocast is None else autocast.itemsize, autocast is not None, is_on_cpu
    )
    activations = batch_size * count_activation_bytes(model, image_size, settings)
    if settings.uses_autocast:
        activations += settings.matmul_element_size * count_cast_weights(model, is_on_cpu)
    return MemoryEstimate(
        parameters=sum(parameter.nbytes for parameter in model.parameters()),
        gradients=num_trainable_bytes,
        optimizer=2 * num_trainable_bytes,
        activations=activations,
    )


def count_cast_weights(model: Any, is_on_cpu: bool) -> int:
    """Return the number of linear-layer weights whose autocast copies are stored for the backward pass."""
    layers = list(model.base_model.layers)
    num_excluded_layers = get_first_trainable_layer(model.base_model)
    if any(layer.gradient_checkpointing for layer in layers):
        num_excluded_layers = len(layers)
    excluded_linear_layers = set(get_linear_layers(layers[:num_excluded_layers]))
    if is_on_cpu:
        excluded_linear_layers.update(get_linear_layers([layer.mlp])[-1] for layer in layers[num_excluded_layers:])
    return sum(linear.weight.numel() for linear in get_linear_layers([model]) if linear not in excluded_linear_layers)


def count_activation_bytes(model: Any, image_size: ImageSize, settings: StepSettings) -> int:
    """Return the number of bytes per image that autograd stores for the embeddings, for the layers that the backward
    pass reaches, and for the modules after the layers."""
    config, encoder = model.config, model.base_model
    num_patches, num_embedded_tokens = get_num_patches_and_tokens(config, image_size)
    num_tokens = get_num_training_tokens(model, num_patches, num_embedded_tokens)  # tokens per image in the layers
    height, width = resolve_image_size(config, image_size)
    num_pixel_values = config.num_channels * height * width
    layers = get_layers_with_token_counts(model, num_tokens)
    layer_bytes = [count_layer_bytes(*layer, settings) for layer in layers[get_first_trainable_layer(encoder) :]]
    if any(layer.gradient_checkpointing for layer in encoder.layers):
        input_bytes = num_tokens * config.hidden_size * settings.residual_element_size
        # The backward pass recomputes the activations of one layer at a time.
        layer_bytes = [input_bytes] * len(layer_bytes) + [max(layer_bytes, default=0)]
    num_bytes = sum(layer_bytes)
    if layer_bytes:
        _, num_queries, _ = layers[-1]
        num_bytes += num_queries * count_norm_bytes(config, settings)  # final norm
    if has_trainable_parameters(encoder.embeddings):
        num_bytes += num_pixel_values * settings.matmul_element_size
        num_bytes += num_embedded_tokens * count_norm_bytes(config, settings) * config.pre_norm
    if any(isinstance(module, AttentionPooler) for module in encoder.modules()):
        num_bytes += 3 * num_tokens * config.hidden_size * settings.matmul_element_size  # tokens, keys, values
    if hasattr(model, "decoder"):
        num_bytes += num_patches * config.hidden_size * settings.matmul_element_size
        num_bytes += 2 * num_pixel_values * settings.residual_element_size  # reconstruction and loss
    return num_bytes


def count_layer_bytes(layer: Any, num_queries: int, num_tokens: int, settings: StepSettings) -> int:
    """Return the number of bytes per image that one layer stores for the backward pass."""
    config, matmul_element_size = layer.attention.config, settings.matmul_element_size
    width = config.hidden_size
    num_bytes = num_tokens * (count_norm_bytes(config, settings) + width * matmul_element_size)
    num_bytes += count_attention_bytes(layer.attention, num_queries, num_tokens, settings)
    if config.layer_type != "parallel":  # parallel layers share one norm
        num_bytes += num_queries * count_norm_bytes(config, settings)
    if config.layer_type != "parallel" or settings.uses_autocast:
        num_bytes += num_queries * width * matmul_element_size
    num_bytes += num_queries * count_stored_mlp_channels(layer.mlp, settings.is_on_cpu) * matmul_element_size
    num_layer_scales = sum(isinstance(submodule, LayerScale) for submodule in layer.children())
    num_bytes += num_queries * width * matmul_element_size * num_layer_scales
    if config.hidden_dropout_prob > 0:
        num_bytes += 2 * num_queries * width  # dropout masks of one byte per element
    return num_bytes


def count_norm_bytes(config: ViTCLSConfig, settings: StepSettings) -> int:
    """Return the bytes per token that a norm stores: the size of the input, or twice this size for RMSNorm."""
    return config.hidden_size * settings.residual_element_size * (2 if config.norm_type == "rmsnorm" else 1)


def count_attention_bytes(attention: ViTCLSAttention, num_queries: int, num_keys: int, settings: StepSettings) -> int:
    """Return the bytes per image that attention stores: queries, keys, values, outputs, and the attention maps if no
    fused kernel is used."""
    config, width = attention.config, attention.o_proj.in_features  # channels of the values of all heads
    num_maps, num_maps_per_head = width // attention.qk_head_dim, attention.head_dim // attention.qk_head_dim
    has_learned_frequencies = config.position_embedding_type.endswith("rope_mixed")
    num_copies = 1 + config.qk_norm + 2 * has_learned_frequencies  # copies of queries and keys
    num_vectors = (num_queries + num_keys) * num_copies  # queries and keys
    num_vectors += (num_queries + num_keys) * num_maps_per_head  # outputs and values
    num_vectors += num_queries * config.attention_norm
    num_vectors += 4 * num_queries * (num_maps_per_head - 1)  # normalized difference of the two maps' outputs
    # Fused kernels store the log-sum-exp of the scores of each query instead of attention maps.
    num_elements_per_query = count_stored_attention_maps(attention, settings.is_on_cpu) * num_keys or 1
    num_map_elements = num_maps * num_queries * num_elements_per_query
    return width * num_vectors * settings.matmul_element_size + num_map_elements * torch.float32.itemsize


def count_stored_attention_maps(attention: ViTCLSAttention, is_on_cpu: bool) -> int:
    """Return the number of copies of the attention maps that autograd stores. Maps are stored if attention is eager or
    differential, if learned terms are added to the scores, or if attention dropout is used on a CPU."""
    config = attention.config
    if config.attention_probs_dropout_prob > 0 and is_on_cpu:
        return 4  # scores, weights, dropout mask, weights after dropout
    has_learned_bias = bool(config.gated_tokens) or config.relative_position_bias != "none"
    return int(config._attn_implementation == "eager" or has_learned_bias or config.attention_type == "differential")


def count_stored_mlp_channels(mlp: Any, is_on_cpu: bool) -> int:
    """Return the number of channels per token that an MLP stores for the backward pass. The stored channels are the
    inputs (both branches of a gated MLP) and the outputs of the activation function. On CPUs, the outputs are
    recomputed and not stored (cpu_kernels_vitcls.py)."""
    num_inputs = 2 if isinstance(mlp, ViTCLSGLU) else 1
    num_outputs = 0 if is_on_cpu else num_inputs + (mlp.norm is not None)
    return (num_inputs + num_outputs) * get_linear_layers([mlp])[0].out_features


def get_num_training_tokens(model: Any, num_patches: int, num_tokens: int) -> int:
    """Return the number of tokens per image in the encoder layers during training. Patch dropout reduces this number,
    unless the embeddings and the first layer are frozen (`set_train_mode` in model.py)."""
    if get_first_trainable_layer(model.base_model) > 0:
        return num_tokens
    return num_tokens - num_patches + get_num_kept_patches(model.config.patch_drop_rate, num_patches)


def get_first_trainable_layer(encoder: Any) -> int:
    """Return the lowest index of a layer that the backward pass reaches, or the number of layers if there is none."""
    if has_trainable_parameters(encoder.embeddings):
        return 0
    trainable_indices = [index for index, layer in enumerate(encoder.layers) if has_trainable_parameters(layer)]
    return min(trainable_indices, default=len(encoder.layers))


def has_trainable_parameters(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
