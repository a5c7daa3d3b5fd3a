"""The norms that a configuration can ask for."""

from torch import nn

from .configuration_vitcls import ViTCLSConfig


NORMS: dict[str, type[nn.Module]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}


def build_norm(config: ViTCLSConfig, width: int | None = None) -> nn.Module:
    """The norm of `config.norm_type` over the last axis, `width` or `config.hidden_size` wide."""
    return NORMS[config.norm_type](width or config.hidden_size, eps=config.layer_norm_eps)
