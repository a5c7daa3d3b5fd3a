"""Statistics of the special tokens over many images, per layer, head and token.

statistics = TokenStatistics(model)
for pixel_values in batches:
    statistics.update(pixel_values)
findings = statistics.compute()        # a `Findings` object, on the CPU
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.configuration_vitcls import TokenLayout
from ..model.token_attention_vitcls import select_mask_rows
from .attribution import RecordedLayer, process_attention_layers


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Statistics of the special tokens over images.

    Unless stated otherwise, values are means over images.

    Shapes: L layers, H attention maps (two per head with differential attention), S special tokens,
    n patches.

    "States" are the L + 1 hidden states before the final norm: the embeddings and the output of
    each layer.

    Attributes:
        num_images: number of images.
        uniform_entropy_by_token: [S], entropy of uniform attention to the tokens that each special
            token may attend to: ln N, or less for CLS tokens that are restricted to a region
            (`config.cls_scopes`).
        entropy: [L, H, S], entropy of the attention of each special token, in nats.
        state_distance: [L + 1, S, S], root mean square distance between the states of two special
            tokens for the same image. Unlike a cosine similarity, it shows differences even if one
            channel is very large in all tokens.
        variation: [L + 1, S], variation between images: root mean square distance between the state
            of a token and the mean state over images, divided by the norm of the mean state.
        channel_variation: [L + 1, S], median over channels of (standard deviation over images) /
            |mean|. One very large channel that is the same for all images makes `variation` small,
            but not `channel_variation`.
        mean_states: [L + 1, S, D], states of the special tokens, averaged over images.
        patch_norms: [L + 1], median norm of the patches of an image.
        patch_ratios: [L + 1, n], norms of all patches, divided by the median of their image (Darcet
            et al. 2023, arXiv 2309.16588, detect artifacts by norm).
        map_selectivity: [L, S], mean total variation distance between the attention maps of a
            special token and uniform attention to all visible tokens.
        map_variation: [L, S], root mean square distance between the attention map of a special
            token (mean over heads) and its mean over images, divided by the distance of this mean
            from uniform attention. 0 means that the map is the same for every image. Infinite if
            the images have different numbers of patches.
        token_norms: [L + 1, S], norms of the special tokens' states.
    """

    num_images: int
    uniform_entropy_by_token: torch.Tensor
    entropy: torch.Tensor
    state_distance: torch.Tensor
    variation: torch.Tensor
    channel_variation: torch.Tensor
    mean_states: torch.Tensor
    patch_norms: torch.Tensor
    patch_ratios: torch.Tensor
    map_selectivity: torch.Tensor
    map_variation: torch.Tensor
    token_norms: torch.Tensor


class TokenStatistics:
    """Accumulates statistics over images, for a classifier or an encoder in evaluation mode."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layout: TokenLayout = model.config.token_layout
        self.num_images = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.patch_ratios: list[torch.Tensor] = []  # one tensor [L + 1, n] per batch

    @torch.no_grad()
    def update(self, pixel_values: torch.Tensor) -> Any:
        """Add a batch of images to the statistics.

        Args:
            pixel_values: [B, C, H, W], on the model's device.

        Returns:
            The output of the model.
        """
        layer_statistics: list[dict[str, torch.Tensor]] = []

        def add_layer(layer: RecordedLayer) -> None:
            layer_statistics.append(self.compute_layer_statistics(layer))

        with process_attention_layers(self.model, add_layer):
            outputs = self.model(pixel_values, output_hidden_states=True)

        names = list(layer_statistics[0])
        # [B, L, ...] each
        statistics = {
            name: torch.stack([layer[name] for layer in layer_statistics], dim=1) for name in names
        }
        # All layers have the same visible tokens, and therefore the same entropy of uniform
        # attention.
        statistics["uniform_entropy_by_token"] = statistics.pop("uniform_entropy_by_token")[:, 0]
        statistics |= self.compute_state_statistics(outputs.hidden_states)

        norms = self.compute_patch_norms(outputs.hidden_states)  # [B, L + 1, P]
        statistics["patch_norms"] = norms.median(dim=-1).values  # [B, L + 1]
        ratios = norms / statistics["patch_norms"].unsqueeze(-1).clamp(min=1e-12)
        self.patch_ratios.append(ratios.transpose(0, 1).flatten(1).cpu())
        for name, value in statistics.items():
            total = value.cpu().double().sum(dim=0)  # some devices do not support double precision
            if name == "maps" and name in self.sums and self.sums[name].shape != total.shape:
                total = torch.full_like(total, torch.nan)  # maps of different sizes have no mean
                self.sums[name] = total
            self.sums[name] = self.sums.get(name, 0) + total

        self.num_images += len(pixel_values)
        return outputs

    def compute(self) -> Findings:
        """Return the statistics over all images, of which there must be at least one."""
        means = {name: total / self.num_images for name, total in self.sums.items()}
        mean_states = means.pop("states")  # [L + 1, S, D]
        # [L + 1, S, D]
        deviations = (means.pop("squares") - mean_states.square()).clamp(min=0).sqrt()

        maps = means.pop("maps")  # [L, S, N]
        map_squares = means.pop("map_squares")  # [L, S]
        map_deviation = (map_squares - maps.square().sum(dim=-1)).clamp(min=0).sqrt()
        map_distance = (maps - maps.mean(dim=-1, keepdim=True)).norm(dim=-1)

        return Findings(
            num_images=self.num_images,
            map_variation=(map_deviation / map_distance.clamp(min=1e-12))
            .nan_to_num(nan=torch.inf)
            .float(),
            mean_states=mean_states.float(),
            variation=(deviations.norm(dim=-1) / mean_states.norm(dim=-1).clamp(min=1e-12)).float(),
            channel_variation=(deviations / mean_states.abs().clamp(min=1e-12))
            .median(dim=-1)
            .values.float(),
            state_distance=means.pop("squared_distances").sqrt().float(),
            patch_ratios=torch.cat(self.patch_ratios, dim=1),
            **{name: mean.float() for name, mean in means.items()},
        )

    # Statistics of one batch, tensors [B, ...]
    # -----------------------------------------------------------------------

    def compute_layer_statistics(self, layer: RecordedLayer) -> dict[str, torch.Tensor]:
        """Return the statistics of one layer's attention maps."""
        num_special_tokens = self.layout.num_prefix_tokens
        rows = layer.compute_weights(num_special_tokens)  # [B, H, S, N]
        is_visible = get_visible_keys(layer, num_special_tokens).float()  # [B, S, N]
        uniform = is_visible / is_visible.sum(dim=-1, keepdim=True)
        maps = rows.mean(dim=1)  # [B, S, N]
        # L1 distance from uniform attention, twice the total variation distance: [B, H, S]
        distance = (rows - uniform.unsqueeze(1)).abs().sum(dim=-1)

        return {
            "uniform_entropy_by_token": is_visible.sum(dim=-1).log(),
            "maps": maps,
            "map_squares": maps.cpu().double().square().sum(dim=-1),
            "map_selectivity": distance.mean(dim=1) / 2,
            "entropy": torch.special.entr(rows).sum(dim=-1),
        }

    def compute_patch_norms(self, hidden_states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the norms [B, L + 1, P] of the patches in the L + 1 hidden states [B, N, D]."""
        return torch.stack(
            [state[:, self.layout.patches].float().norm(dim=-1) for state in hidden_states], dim=1
        )

    def compute_state_statistics(
        self, hidden_states: Sequence[torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the statistics of the special tokens in the L + 1 hidden states [B, N, D]."""
        num_special_tokens = self.layout.num_prefix_tokens
        # [B, L + 1, S, D]
        special_states = torch.stack(
            [state[:, :num_special_tokens] for state in hidden_states], dim=1
        ).float()
        # matrix products in TF32 would cause large rounding errors
        distances = torch.cdist(
            special_states, special_states, compute_mode="donot_use_mm_for_euclid_dist"
        )
        return {
            "squared_distances": distances.square(),
            "states": special_states,
            "squares": special_states.cpu().double().square(),
            "token_norms": special_states.norm(dim=-1),
        }


def get_visible_keys(layer: RecordedLayer, num_rows: int) -> torch.Tensor:
    """Return a mask [B, rows, N] of the keys that the first `num_rows` tokens may attend to."""
    query = layer.query[:, :, :num_rows]
    key = layer.key
    batch, _, num_rows, _ = query.shape
    mask = select_mask_rows(layer.mask, query, key)  # [B or 1, maps or 1, rows or 1, N]

    if mask is None:
        return torch.ones(batch, num_rows, key.shape[-2], dtype=torch.bool, device=key.device)
    if mask.dtype != torch.bool:  # additive mask
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask[:, 0].expand(batch, num_rows, -1)
