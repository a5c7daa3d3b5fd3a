"""What each token contributes to a label, and the attention of every layer of a forward pass.

    trace = trace_attention(model, pixel_values, needs_gradients=True)
    trace.compute_contributions(trace.outputs.logits, 2)  # [B, key], they add up to the logit of class 2
    trace.compute_attribution(trace.outputs.logits, 2)    # [B, key], for heads that read CLS alone

    with process_attention_layers(model, layers.append):
        model(pixel_values)
    layers[0].compute_weights()    # [B, maps, N, N]; only the maps of this layer are in memory

The `recorder` of each layer's attention receives queries, keys and values instead of attention
maps, so memory grows with N, not N².

Keys are in the order of `config.token_layout`; `extract_patch_maps` (maps.py) selects the patches.
The attribution multiplies row vectors by the maps of each layer, from the last layer to the first,
so only the maps of one layer are in memory. Every attention implementation is supported.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..inference.frozen_features import has_searchable_pooling
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.token_attention_vitcls import compute_attention_rows, record_attention


@dataclass(frozen=True)
class RecordedLayer:
    """Inputs and output of one layer's attention.

    Each head has one map, or two maps with differential attention.
    """

    query: torch.Tensor  # [B, maps, N, d]
    key: torch.Tensor  # [B, maps, N, d]
    value: torch.Tensor  # [B, maps, N, head_dim]
    mask: Any
    scaling: float
    attention_output: torch.Tensor  # [B, N, maps, head_dim]

    def compute_weights(self, num_rows: int | None = None) -> torch.Tensor:
        """Compute the maps [B, maps, N, N], or only the rows of the first `num_rows` tokens.

        They are the maps of eager attention, computed in float32: rows sum to 1 even for
        half-precision models.
        """
        query = self.query[:, :, :num_rows].float()
        return compute_attention_rows(query, self.key.float(), self.mask, self.scaling)


@contextmanager
def process_attention_layers(
    model: Any, process_layer: Callable[[RecordedLayer], None]
) -> Iterator[None]:
    """Call `process_layer` with the attention of each layer during forward passes inside the block.

    The attention includes all tokens of the last layer.
    """

    def record(_: int, *fields: Any) -> None:
        process_layer(RecordedLayer(*fields))

    with record_attention(model, range(len(model.base_model.layers)), record):
        yield


@dataclass(frozen=True)
class AttentionTrace:
    """Outputs and recorded attention of a forward pass."""

    config: ViTCLSConfig
    outputs: Any  # Outputs of the model, with hidden states
    layers: list[RecordedLayer]
    # Layer -> tokens [B, n, D] that the heads read; the last layer may be None (backbone)
    read_tokens: dict[int, Any]

    @torch.no_grad()
    def compute_attention(self) -> torch.Tensor:
        """Compute the attention of each special token to all tokens [B, L, maps, S, N].

        It is what `model.token_attention` returns. In a model without CLS tokens, the mean over the
        patches comes first.
        """
        layout = self.config.token_layout
        has_cls = bool(self.config.num_cls_tokens)
        layers = []
        # The layers take turns, because the full maps of all layers may not fit into memory.
        for layer in self.layers:
            if has_cls:
                layers.append(layer.compute_weights(layout.num_prefix_tokens))
                continue
            weights = layer.compute_weights()
            patches = weights[:, :, layout.patches].mean(dim=2, keepdim=True)
            special_tokens = weights[:, :, : layout.num_prefix_tokens]
            layers.append(torch.cat([patches, special_tokens], dim=2))
        return torch.stack(layers, dim=1)

    def compute_contributions(self, logits: torch.Tensor, label: int) -> torch.Tensor:
        """Divide the logit of a class among the tokens that the head reads, [B, N].

        A token contributes its product with the gradient, summed over the layers. For a linear
        head (`is_linear`), the contributions and the bias add up to the logit, and the patches'
        contributions are the class activation map of Zhou et al. 2016 (arXiv 1512.04150, equation 2).
        Tokens that the head does not read contribute 0. The trace must be recorded with
        `needs_gradients=True`.

        Args:
            logits: logits [B, labels] of the classifier or of a task, from `outputs`.
            label: class index.
        """
        tokens = list(self.read_tokens.values())
        with torch.inference_mode(False), torch.enable_grad():
            gradients = torch.autograd.grad(
                logits[:, label].sum(), tokens, retain_graph=True, allow_unused=True
            )
        contributions = tokens[-1].new_zeros(tokens[-1].shape[:2], dtype=torch.float32)
        with torch.no_grad():
            for states, gradient in zip(tokens, gradients, strict=True):
                if gradient is not None:
                    contributions += (states.float() * gradient.float()).sum(dim=-1)
        return contributions

    def compute_attribution(self, logits: torch.Tensor, label: int) -> torch.Tensor:
        """Attribute a class to each token [B, N].

        It is the attention weighted by its gradient, starting from the tokens that the head uses.
        Source: Chefer et al. 2021, arXiv 2103.15679, equations 5 and 6. The gradient of a map is
        computed from the value vectors and the gradient of the attention output, so the maps do
        not have to be part of the autograd graph. The trace must be recorded with
        `needs_gradients=True`.

        Args:
            logits: logits [B, labels] of the classifier or of a task, from `outputs`.
            label: class index.

        Returns:
            Nonnegative values, which have no unit and are comparable only within an image.
        """
        attention_outputs = [layer.attention_output for layer in self.layers]
        with torch.inference_mode(False), torch.enable_grad():
            # None for layers above the last layer that the head reads
            # The graph is kept, because the labels of one photo are attributed one after another.
            gradients = torch.autograd.grad(
                logits[:, label].sum(),
                [*attention_outputs, *self.read_tokens.values()],
                retain_graph=True,
                allow_unused=True,
            )
        token_gradients = dict(zip(self.read_tokens, gradients[len(self.layers) :], strict=True))

        with torch.no_grad():
            # [1, 1, N]; [B, 1, N] after the first addition
            relevance = start_weights = (
                attention_outputs[0].new_zeros(1, 1, self.layers[0].key.shape[2]).float()
            )
            for index in range(len(self.layers), 0, -1):
                layer = self.layers[index - 1]
                gradient = gradients[index - 1]  # [B, N, maps, d]
                if token_gradients.get(index) is not None:
                    layer_weights = compute_start_weights(
                        token_gradients[index], self.config, relevance.shape[-1]
                    )
                    relevance = relevance + layer_weights
                    start_weights = start_weights + layer_weights
                if gradient is not None:
                    # [B, maps, N, N]
                    map_gradient = gradient.transpose(1, 2) @ layer.value.transpose(2, 3)
                    # [B, N, N]
                    weighted_map = (map_gradient * layer.compute_weights()).clamp(min=0).mean(dim=1)
                    relevance = relevance + relevance @ weighted_map
            # The start weights go, because they do not depend on attention.
            return (relevance - start_weights).squeeze(1)


def is_linear(config: ViTCLSConfig, task: str, label: int) -> bool:
    """Whether the logit of a label is a sum over tokens and a bias.

    Args:
        task: name of a task; empty for the classifier itself.
        label: class index.
    """
    num_added = sum(map(len, config.get_added_classes().values()))
    is_added = not task and label >= (config.num_labels or 0) - num_added
    if is_added or task in config.get_added_tasks():
        return True
    return config.head_type == "linear" and (bool(config.tasks) or has_searchable_pooling(config))


def trace_attention(
    model: Any, pixel_values: torch.Tensor, needs_gradients: bool = False
) -> AttentionTrace:
    """Run a model on images, and record the attention of all layers.

    Args:
        model: any ViTCLS model without wrappers, in evaluation mode.
        pixel_values: [B, C, H, W].
        needs_gradients: whether the attribution will be computed.
    """
    encoder_outputs: list[Any] = []
    layers: list[RecordedLayer] = []
    hook = model.base_model.register_forward_hook(
        lambda _, args, output: encoder_outputs.append(output)
    )

    with (
        hook,
        torch.inference_mode(False),
        torch.set_grad_enabled(needs_gradients),
    ):
        # Pixels that require gradients make attention part of the autograd graph even if all
        # weights are frozen.
        inputs = pixel_values.detach().clone().requires_grad_(needs_gradients)
        # Gradients of the weights are not used, and would take as long as the gradients of attention.
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        for weight in weights:
            weight.requires_grad = False
        try:
            with process_attention_layers(model, layers.append):
                outputs = model(inputs, output_hidden_states=True)
        finally:
            for weight in weights:
                weight.requires_grad = True

    encoder_output = encoder_outputs[-1]
    read_tokens = {
        **getattr(encoder_output, "layer_tokens", {}),
        len(layers): getattr(encoder_output, "last_hidden_state", None),  # None for a backbone
    }
    return AttentionTrace(model.config, outputs, layers, read_tokens)


def compute_start_weights(
    gradient: torch.Tensor, config: ViTCLSConfig, num_tokens: int
) -> torch.Tensor:
    """Compute the start weight [B, 1, N] of each token.

    The weight is 1 for a special token that the head uses, 1 in total for all patches that the head
    uses, and 0 for other tokens. The head uses tokens with a nonzero `gradient` [B, n, D], in which
    the tokens after the first n may be missing.
    """
    weights = (gradient != 0).any(dim=-1).float()  # [B, n]
    weights = torch.nn.functional.pad(weights, (0, num_tokens - weights.shape[1]))  # [B, N]
    patches = config.token_layout.patches
    weights[:, patches] /= weights[:, patches].sum(dim=-1, keepdim=True).clamp(min=1)
    return weights.unsqueeze(1)
