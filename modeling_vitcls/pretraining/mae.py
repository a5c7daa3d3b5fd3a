"""Masked autoencoder: pre-training by reconstruction of masked patches.

MAE, He et al. 2021, arXiv 2111.06377.

    image -> visible patches -> encoder -> linear -> with mask tokens and positions -> decoder -> masked pixels

The encoder computes only the visible patches and the special tokens. The decoder has plain ViT
layers and is dropped after pre-training. The loss is the squared difference from the pixels of
masked patches, normalized per patch (section 3). `ViTCLSForMaskedImageModeling` is the other form
of masked image modeling, in which the encoder sees all patches, and mask tokens replace the masked
ones (BEiT, SimMIM).
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import MaskedImageModelingOutput

from ..data.batches import Batch, Normalizer
from ..model.blocks_vitcls import SinCosPositionEmbeddings, build_norm
from ..model.configuration_vitcls import ViTCLSConfig
from ..model.heads_vitcls import PixelDecoder, compute_masked_pixel_loss
from ..model.modeling_vitcls import ViTCLSModel, ViTCLSPreTrainedModel
from ..model.positions_vitcls import PositionEmbeddings
from ..model.variants_vitcls import ATTENTION_CLASSES, LAYER_CLASSES
from ..training.losses import Losses


NUM_DECODER_LAYERS = 4  # The paper has 8 for ViT-B; 4 fine-tune as well (table 1a)
HEAD_DIM = 32  # The decoder's heads, as in the paper (512 channels, 16 heads)


def build_decoder_config(config: ViTCLSConfig) -> ViTCLSConfig:
    """Build the configuration of a decoder with two thirds of the encoder's width.

    This is the ratio of the paper for ViT-B.
    """
    width = HEAD_DIM * max(1, round(config.hidden_size * 2 / 3 / HEAD_DIM))
    return ViTCLSConfig(
        hidden_size=width,
        num_hidden_layers=NUM_DECODER_LAYERS,
        num_attention_heads=width // HEAD_DIM,
        intermediate_size=4 * width,
        layer_norm_eps=config.layer_norm_eps,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
    )


class MAE(ViTCLSPreTrainedModel):
    """An encoder of visible patches and a decoder of all patches.

    Examples:
        >>> import torch
        >>> from modeling_vitcls import ViTCLSConfig, ViTCLSModel
        >>> from modeling_vitcls.pretraining.mae import MAE, build_decoder_config
        >>> config = ViTCLSConfig.from_preset("tiny", image_size=32, patch_size=8)
        >>> method = MAE(ViTCLSModel(config), build_decoder_config(config))
        >>> mask = (torch.arange(16) % 4 > 0).expand(2, -1)  # three of four patches of both images
        >>> loss = method(torch.randn(2, 3, 32, 32), bool_masked_pos=mask).loss
    """

    def __init__(self, encoder: ViTCLSModel, decoder_config: ViTCLSConfig) -> None:
        config = encoder.config
        super().__init__(config)
        decoder_config._attn_implementation = config._attn_implementation
        self.num_prefix_tokens = config.token_layout.num_prefix_tokens
        # A copy, because `config` is saved with the encoder, for which these losses mean nothing.
        self.loss_config = copy.copy(config)
        self.loss_config.mim_loss = "l2"
        self.loss_config.norm_pixel_target = True

        width = decoder_config.hidden_size
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.decoder_positions = SinCosPositionEmbeddings(decoder_config)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        layer_class = LAYER_CLASSES[decoder_config.layer_type]
        attention_class = ATTENTION_CLASSES[decoder_config.attention_type]
        self.decoder_layers = nn.ModuleList(
            layer_class(decoder_config, 0.0, attention_class)
            for _ in range(decoder_config.num_hidden_layers)
        )
        self.decoder_norm = build_norm(decoder_config)
        self.decoder = PixelDecoder(decoder_config)

        self.post_init()
        self.vitcls = encoder  # After the initialization of the decoder, which keeps these weights
        if encoder.pooler is not None:
            encoder.pooler.requires_grad_(False)  # The loss does not depend on it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.trunc_normal_(self.mask_token, mean=0.0, std=self.config.initializer_range)
        else:
            super()._init_weights(module)

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Reconstruct images from their visible patches.

        Args:
            pixel_values: [B, C, H, W].
            bool_masked_pos: [B, rows * columns]; True for masked patches; the same number in every
                image. If None, the encoder's output for all patches is returned.

        Returns:
            The loss over the masked patches, and `reconstruction` [B, C, H, W], normalized per
            patch.
        """
        if bool_masked_pos is None:
            return self.vitcls(pixel_values, **kwargs)

        grid_size = self.vitcls.embeddings.patch_embeddings.get_grid_size(pixel_values)
        num_visible = int((~bool_masked_pos[0]).sum())
        # [B, K], ascending
        visible = bool_masked_pos.int().argsort(dim=1, stable=True)[:, :num_visible]

        keep_visible = partial(
            keep_patches, kept_indices=visible, num_prefix_tokens=self.num_prefix_tokens
        )
        outputs = self.vitcls(pixel_values, edit_inputs=keep_visible)
        tokens = self.decoder_embed(outputs.last_hidden_state)  # [B, prefix + K, width]

        special_tokens, patches = tokens.split([self.num_prefix_tokens, num_visible], dim=1)
        mask_token = self.mask_token.to(tokens.dtype)
        # [B, patches, width]: the mask token, replaced with the encoder's output at visible patches
        all_patches = mask_token.expand(len(tokens), bool_masked_pos.shape[1], -1)
        indices = visible.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])  # [B, K, width]
        all_patches = all_patches.scatter(1, indices, patches)
        _, all_patches = self.decoder_positions({}, all_patches, grid_size)

        hidden_states = torch.cat([special_tokens, all_patches], dim=1)
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states)
        decoded = self.decoder_norm(hidden_states)[:, self.num_prefix_tokens :]
        reconstruction = self.decoder(decoded, grid_size)

        loss = compute_masked_pixel_loss(
            reconstruction, pixel_values, bool_masked_pos, self.loss_config
        )
        return MaskedImageModelingOutput(loss=loss, reconstruction=reconstruction)


def keep_patches(
    hidden_states: Tensor,
    mask: Any,
    position_embeddings: Any,
    kept_indices: Tensor,
    num_prefix_tokens: int,
) -> tuple[Tensor, Any, Any]:
    """Keep the special tokens and the patches at `kept_indices` [B, num_kept], in ascending order.

    The patches retain their positions: learned embeddings are already added to the hidden states
    [B, N, D], and rotary embeddings are selected with the patches. Masks and position embeddings
    are each a single value for all layers, a list with one value per layer, or None.
    """
    prefix_indices = torch.arange(num_prefix_tokens, device=hidden_states.device)
    prefix_indices = prefix_indices.expand(len(hidden_states), -1)  # [B, num_prefix_tokens]

    indices = torch.cat([prefix_indices, kept_indices + num_prefix_tokens], dim=1)  # [B, n]
    return (
        torch.take_along_dim(hidden_states, indices.unsqueeze(-1), dim=1),  # [B, n, D]
        map_layers(mask, lambda layer_mask: select_mask(layer_mask, indices)),
        map_layers(
            position_embeddings, lambda cos_sin: select_position_embeddings(cos_sin, kept_indices)
        ),
    )


def map_layers(values: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to the value of each layer, or to a single value for all layers."""
    if values is None:
        return None
    return [function(value) for value in values] if isinstance(values, list) else function(values)


def select_mask(mask: Any, indices: Tensor) -> Any:
    """Select the tokens at `indices` [B, n] in a mask.

    Masks are [B, N] (flash) or [B or 1, heads or 1, N or 1, N] (SDPA, eager). Masks of flex
    attention are not supported.
    """
    if mask.ndim == 2:
        return torch.take_along_dim(mask, indices, dim=1)
    if mask.shape[2] > 1:
        mask = torch.take_along_dim(mask, indices[:, None, :, None], dim=2)
    return torch.take_along_dim(mask, indices[:, None, None, :], dim=3)


def select_position_embeddings(
    position_embeddings: PositionEmbeddings, indices: Tensor
) -> PositionEmbeddings:
    """Select cos and sin [B, heads or 1, n, head_dim] of the patches at `indices` [B, n]."""
    index = indices[:, None, :, None]
    # [1, heads or 1, patches, head_dim] each
    cos, sin = (
        embedding.reshape(1, -1, *embedding.shape[-2:]) for embedding in position_embeddings
    )
    return torch.take_along_dim(cos, index, dim=2), torch.take_along_dim(sin, index, dim=2)


def compute_mae_losses(
    model: nn.Module, batch: Batch, normalize: Normalizer, num_patches: int, mask_ratio: float
) -> Losses:
    """Compute the loss of a batch with random masks of single patches."""
    pixels = normalize(batch["pixels"])
    masks = draw_masks(len(pixels), num_patches, mask_ratio, pixels.device)
    return {"loss": model(pixels, masks).loss}


def draw_masks(
    num_images: int, num_patches: int, mask_ratio: float, device: torch.device
) -> Tensor:
    """Draw random masks [num_images, num_patches], True for masked patches.

    At least one patch of each image stays visible.
    """
    num_visible = max(1, int(num_patches * (1 - mask_ratio)))
    order = torch.rand(num_images, num_patches, device=device).argsort(dim=1)
    return torch.ones_like(order, dtype=torch.bool).scatter(1, order[:, :num_visible], False)
