"""The encoder layer: attention and MLP, each with a norm, added to the residual stream.

    standard    x = x + drop_path(scale(attention(norm(x))));   x = x + drop_path(scale(mlp(norm(x))))
    post        x = x + drop_path(scale(norm(attention(x))));   x = x + drop_path(scale(norm(mlp(x))))
    parallel    y = norm(x);   x = x + drop_path(scale(attention(y) + mlp(y)))

Special tokens are ordinary rows here: they attend and are updated in every layer. A layer may be computed for the
first of them alone (`num_tokens`): see last_layer_vitcls.py. Names of modules follow the ViT of transformers, so that
LoRA targets and tensor-parallel plans carry over. Attention is in attention_vitcls.py.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_vitcls import ATTENTIONS
from .configuration_vitcls import ViTCLSConfig
from .linear_vitcls import Linear, activated, as_autocast_will, contracted, has_hooks
from .norms_vitcls import build_norm
from .recomputing_vitcls import recomputed
from .rotary_vitcls import Rotation


class EncoderLayer(GradientCheckpointingLayer):
    """Any kind of layer: what transformers records hidden states of, and checkpoints."""


class ViTCLSLayer(EncoderLayer):
    """One pre-norm Transformer layer, [B, N, D] -> [B, N, D]."""

    def __init__(self, config: ViTCLSConfig, layer_index: int, drop_path_rate: float) -> None:
        super().__init__()
        self.layernorm_before = build_norm(config)
        self.attention = ATTENTIONS[config.attention_type](config)
        self.layer_scale1 = _layer_scale(config)
        self.layernorm_after = build_norm(config)
        self.mlp = MLPS[config.mlp_type](config, layer_index)
        self.layer_scale2 = _layer_scale(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotation: Rotation = None,
        num_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Attend, then transform each token; `rotation` is this layer's from rotary_vitcls.py.

        Only the first `num_tokens`, all of them special, are computed; all by default.
        """
        normalised = self.layernorm_before(hidden_states)
        attended, _ = self.attention(normalised, attention_mask, rotation, num_tokens, **kwargs)  # [B, n, D]
        hidden_states = hidden_states[:, :num_tokens] + self.drop_path(self.layer_scale1(self.dropout(attended)))
        transformed = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.layer_scale2(self.dropout(transformed)))


class ViTCLSPostNormLayer(ViTCLSLayer):
    """A layer whose norms stand behind attention and MLP, before they are added (EVA-CLIP's largest model)."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotation: Rotation = None,
        num_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """[B, N, D] -> [B, n, D], as in `ViTCLSLayer`."""
        attended, _ = self.attention(hidden_states, attention_mask, rotation, num_tokens, **kwargs)
        attended = self.layernorm_before(self.dropout(attended))
        hidden_states = hidden_states[:, :num_tokens] + self.drop_path(self.layer_scale1(attended))
        transformed = self.layernorm_after(self.dropout(self.mlp(hidden_states)))
        return hidden_states + self.drop_path(self.layer_scale2(transformed))


class ViTCLSParallelLayer(EncoderLayer):
    """Attention and MLP side by side on one norm, [B, N, D] -> [B, N, D] (ViT-22B, arXiv 2302.05442, section 2)."""

    def __init__(self, config: ViTCLSConfig, layer_index: int, drop_path_rate: float) -> None:
        super().__init__()
        self.layernorm_before = build_norm(config)
        self.attention = ATTENTIONS[config.attention_type](config)
        self.mlp = MLPS[config.mlp_type](config, layer_index)
        self.layer_scale1 = _layer_scale(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotation: Rotation = None,
        num_tokens: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """Attend to and transform the same normalised tokens: [B, N, D] -> [B, n, D], as in `ViTCLSLayer`."""
        normalised = self.layernorm_before(hidden_states)
        attended, _ = self.attention(normalised, attention_mask, rotation, num_tokens, **kwargs)
        both = self.dropout(attended) + self.dropout(self.mlp(normalised[:, :num_tokens]))
        return hidden_states[:, :num_tokens] + self.drop_path(self.layer_scale1(both))


LAYERS = {"standard": ViTCLSLayer, "post": ViTCLSPostNormLayer, "parallel": ViTCLSParallelLayer}


class ViTCLSMLP(nn.Module):
    """Linear, activation, Linear on each token."""

    def __init__(self, config: ViTCLSConfig, layer_index: int) -> None:
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.move_neurons = build_neuron_mover(config, layer_index)
        self.norm = build_norm(config, config.intermediate_size) if config.mlp_norm else nn.Identity()
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]."""
        if not torch.is_grad_enabled():
            return self.contract(activated(self.fc1, self.activation_fn, hidden_states))
        expanded = self.fc1(hidden_states)  # [B, N, intermediate]
        at_once = contracted(self.fc2, self.activation_fn, expanded) if self.has_nothing_between() else None
        return recomputed(self, self.activate_and_contract, expanded) if at_once is None else at_once

    def has_nothing_between(self) -> bool:
        """Whether activations go on to the second layer as they are, and nobody listens."""
        between = (self.move_neurons, self.norm)
        return all(type(module) is nn.Identity and not has_hooks(module) for module in between)

    def activate_and_contract(self, expanded: torch.Tensor) -> torch.Tensor:
        """[B, N, intermediate] -> [B, N, D]."""
        return self.contract(self.activation_fn(expanded))

    def contract(self, activations: torch.Tensor) -> torch.Tensor:
        """[B, N, intermediate] -> [B, N, D]."""
        return self.fc2(self.norm(self.move_neurons(activations)))


class ViTCLSGLU(nn.Module):
    """An MLP gated by its activation (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ViTCLSConfig, layer_index: int) -> None:
        super().__init__()
        self.activation_fn = ACT2FN["silu" if config.mlp_type == "swiglu" else config.hidden_act]
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.move_neurons = build_neuron_mover(config, layer_index)
        self.norm = build_norm(config, config.intermediate_size) if config.mlp_norm else nn.Identity()
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]."""
        hidden_states = as_autocast_will(hidden_states)
        gate, expanded = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        return recomputed(self, self.activate_and_contract, gate, expanded)

    def activate_and_contract(self, gate: torch.Tensor, expanded: torch.Tensor) -> torch.Tensor:
        """Two of [B, N, intermediate] -> [B, N, D]."""
        gated = self.activation_fn(gate) * expanded
        return self.down_proj(self.norm(self.move_neurons(gated)))


MLPS = {"mlp": ViTCLSMLP, "glu": ViTCLSGLU, "swiglu": ViTCLSGLU}


class NeuronMover(nn.Module):
    """Moves the activations of register neurons from the patches to the last register, without training.

    The register receives the patches' largest activation, by magnitude (a gated MLP's may be negative), the patches
    none; other special tokens keep theirs, as in the authors' code (Jiang et al. 2025, arXiv 2506.08010, section 4).
    """

    def __init__(self, config: ViTCLSConfig, neurons: list[int]) -> None:
        super().__init__()
        self.neurons = neurons
        self.patches = config.token_layout.patches
        self.register = config.token_layout.registers.stop - 1

    def forward(self, activations: torch.Tensor) -> torch.Tensor:
        """[B, N, intermediate] -> [B, N, intermediate]."""
        of_patches = activations[:, self.patches, self.neurons]  # [B, patches, neurons]
        largest = of_patches.abs().argmax(dim=1, keepdim=True)  # [B, 1, neurons]
        moved = activations.clone()
        moved[:, self.patches, self.neurons] = 0
        moved[:, self.register, self.neurons] = of_patches.gather(1, largest).squeeze(1)
        return moved

    def extra_repr(self) -> str:
        """The neurons, for `print(model)`."""
        return f"neurons={self.neurons}"


def build_neuron_mover(config: ViTCLSConfig, layer_index: int) -> nn.Module:
    """A `NeuronMover` for the layer's register neurons, identity if it has none."""
    neurons = [neuron for layer, neuron in config.register_neurons or () if layer == layer_index]
    return NeuronMover(config, neurons) if neurons else nn.Identity()


class LayerScale(nn.Module):
    """A learned factor per channel (CaiT, arXiv 2103.17239)."""

    def __init__(self, hidden_size: int, init_value: float) -> None:
        super().__init__()
        self.init_value = float(init_value)
        self.lambda1 = nn.Parameter(torch.empty(hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]."""
        return hidden_states * self.lambda1


class DropPath(nn.Module):
    """Drops a residual branch for whole images in training (stochastic depth, arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate  # a Python float: a tensor would not survive loading on the meta device

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, N, D] -> [B, N, D]; kept branches are scaled up so that the expectation stays."""
        if not self.training:
            return hidden_states
        keep_rate = 1 - self.rate
        kept = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(keep_rate)
        return hidden_states * kept / keep_rate

    def extra_repr(self) -> str:
        """The rate, for `print(model)`."""
        return f"rate={self.rate}"


def drop_path_rates(config: ViTCLSConfig) -> list[float]:
    """One rate per layer, rising linearly from 0 to `config.drop_path_rate`."""
    last = max(config.num_hidden_layers - 1, 1)
    return [config.drop_path_rate * index / last for index in range(config.num_hidden_layers)]


def _layer_scale(config: ViTCLSConfig) -> nn.Module:
    if config.layer_scale_init_value is None:
        return nn.Identity()
    return LayerScale(config.hidden_size, config.layer_scale_init_value)
