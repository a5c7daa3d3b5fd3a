"""Statistics of the special tokens over many images, per layer, head and token.

    statistics = TokenStatistics(model)
    for pixel_values in batches:
        statistics.update(pixel_values)
    findings = statistics.compute()        # a Findings, on the CPU

Maps of single images are in maps.py and attribution.py, and effects of tokens on predictions in ablation.py.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..configuration_vitcls import TokenLayout
from ..token_attention_vitcls import select_mask_rows
from .attention_recorder import RecordedLayer, record_attention_layers
from .model_utils import evaluation_mode, unwrap_model
from .test_time_registers import OUTLIER_RATIO, is_outlier


MAX_NORMS = 200_000  # maximum number of patch norms stored for histograms


@dataclass(frozen=True)
class Findings:
    """Means over images. L layers, H heads (attention maps, with differential attention), S special tokens.

    "States" are the L + 1 hidden states before the final norm: the embeddings and the output of each layer.

    Attributes:
        num_images: number of images.
        uniform: `entropy` (ln N), `spread` and `patch_distance` of uniform attention to all tokens or patches.
        uniform_by_token: `entropy` and `spread`, [S] each, of uniform attention to all tokens that a special token may
            attend to. Differs from `uniform` for CLS tokens restricted to a region (`config.cls_scopes`).
        entropy: [L, H, S], entropy of the attention of each special token, in nats.
        spread: [L, H, S], in pixels: mean distance of the attended patches from their center of mass.
        patch_distance: [L, H], in pixels: mean distance between a patch and the patches it attends to (mean attention
            distance, Dosovitskiy et al. 2020, section 4.5).
        mass: [L, H, S, 4], fraction of attention to CLS, distillation, register and patch tokens.
        received: [L, H, S], mean fraction of the attention of patches that each special token receives.
        between_tokens: [L + 1, S, S], cosine similarity of the special tokens' states.
        apart: [L + 1, S, S], root mean square distance between the states of two special tokens for the same image.
            It shows differences that cosines hide if one channel is very large in all tokens.
        across_layers: [S, L + 1, L + 1], cosine similarity between the states of a token after two layers.
        to_patches: [L + 1, S], cosine similarity to the mean of the patches.
        variation: [L + 1, S], variation between images: root mean square distance of a token's state from its mean
            over images, divided by the norm of the mean.
        channel_variation: [L + 1, S], median over channels of standard deviation / |mean|. One very large channel that
            is the same for all images makes `variation` small, but not `channel_variation`.
        mean_states: [L + 1, S, D], mean states.
        patch_norms: [L + 1, n], norms of patch states, for at most MAX_NORMS patches.
        outliers: [L + 1], fraction of patches with a norm above 3 times the median of their image (Darcet et al. 2023,
            arXiv 2309.16588, find artifacts by their norm).
        outliers_without_registers: [L + 1], `outliers` with the registers hidden from attention; None without
            registers.
        token_norms: [L + 1, S], norms of the special tokens' states.
    """

    num_images: int
    uniform: dict[str, float]
    uniform_by_token: dict[str, torch.Tensor]
    entropy: torch.Tensor
    spread: torch.Tensor
    patch_distance: torch.Tensor
    mass: torch.Tensor
    received: torch.Tensor
    between_tokens: torch.Tensor
    apart: torch.Tensor
    across_layers: torch.Tensor
    to_patches: torch.Tensor
    variation: torch.Tensor
    channel_variation: torch.Tensor
    mean_states: torch.Tensor
    patch_norms: torch.Tensor
    outliers: torch.Tensor
    outliers_without_registers: torch.Tensor | None
    token_norms: torch.Tensor


class TokenStatistics:
    """Accumulates sums over images for any ViTCLS model."""

    def __init__(self, model: Any) -> None:
        self.model = unwrap_model(model)
        self.layout: TokenLayout = self.model.config.token_layout
        self.num_images = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.norms: list[torch.Tensor] = []  # [L + 1, n] of a batch

    @torch.no_grad()
    def update(self, pixel_values: torch.Tensor) -> None:
        """Add a batch [B, C, H, W] on the model's device. Models with registers run a second forward pass with the
        registers hidden."""
        with evaluation_mode(self.model), record_attention_layers(self.model) as layers:
            outputs = self.model.base_model(pixel_values, output_hidden_states=True)
        states = torch.stack(outputs.hidden_states, dim=1).float()  # [B, L + 1, N, D]
        centers = self.get_patch_centers(pixel_values)  # [P, 2]
        per_layer = [self.compute_layer_statistics(layer, centers) for layer in layers]
        values = {name: torch.stack([layer[name] for layer in per_layer], dim=1) for name in per_layer[0]}
        values |= (
            self.compute_state_statistics(states)
            | self.uniform(centers, states)
            | self.uniform_by_token(centers, layers[0])
        )
        if self.model.config.num_register_tokens:
            values["outliers_without_registers"] = compute_outliers_without_registers(self.model, pixel_values)
        self.add(values)
        num_stored = sum(norms.shape[1] for norms in self.norms)
        norms = states[:, :, self.layout.patches].norm(dim=-1).transpose(0, 1).flatten(1)  # [L + 1, B * P]
        self.norms.append(norms[:, : MAX_NORMS - num_stored].cpu())
        self.num_images += len(pixel_values)

    def compute(self) -> Findings:
        """Return the means over all images.

        Raises:
            ValueError: if there are no images.
        """
        if not self.num_images:
            raise ValueError("Statistics require at least one image, but there are no images. Call update first.")
        means = {name: total / self.num_images for name, total in self.sums.items()}
        mean_states = means.pop("states")  # [L + 1, S, D]
        magnitudes = mean_states.abs()
        deviations = (means.pop("squares") - mean_states.square()).clamp(min=0).sqrt()  # [L + 1, S, D]
        uniform = {name: means.pop(f"uniform_{name}").item() for name in ("entropy", "spread", "patch_distance")}
        by_token = {name: means.pop(f"token_{name}").float() for name in ("entropy", "spread")}
        without = means.pop("outliers_without_registers", None)
        return Findings(
            num_images=self.num_images,
            mean_states=mean_states.float(),
            variation=(deviations.norm(dim=-1) / mean_states.norm(dim=-1).clamp(min=1e-12)).float(),
            channel_variation=(deviations / magnitudes.clamp(min=1e-12)).median(dim=-1).values.float(),
            apart=means.pop("squared_distances").sqrt().float(),
            patch_norms=torch.cat(self.norms, dim=1),
            outliers_without_registers=None if without is None else without.float(),
            uniform=uniform,
            uniform_by_token=by_token,
            **{name: mean.float() for name, mean in means.items()},
        )

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Add values [B, ...] of a batch to the sums, in double precision."""
        for name, value in values.items():
            total = value.cpu().double().sum(dim=0)  # some devices do not support double precision
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    # Values of one batch, [B, ...] each ------------------------------------------------------------------------------

    def compute_layer_statistics(self, layer: RecordedLayer, centers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the statistics of one layer's attention maps."""
        layout = self.layout
        weights = layer.weights()  # [B, H, N, N]
        rows = weights[:, :, : layout.num_prefix_tokens]  # [B, H, S, N]
        from_patches = weights[:, :, layout.patches]  # [B, H, P, N]
        return {
            "entropy": torch.special.entr(rows).sum(dim=-1),
            "spread": compute_spread(rows[..., layout.patches], centers),
            "mass": torch.stack([rows[..., group].sum(dim=-1) for _, group in layout.items()], dim=-1),
            "received": from_patches[..., : layout.num_prefix_tokens].mean(dim=2),
            "patch_distance": compute_patch_distance(from_patches[..., layout.patches], centers),
        }

    def compute_state_statistics(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the statistics of the hidden states [B, L + 1, N, D]."""
        special, patches = states[:, :, : self.layout.num_prefix_tokens], states[:, :, self.layout.patches]
        directions = torch.nn.functional.normalize(special, dim=-1)  # [B, L + 1, S, D]
        patch_direction = torch.nn.functional.normalize(patches.mean(dim=2), dim=-1)  # [B, L + 1, D]
        by_token = directions.transpose(1, 2)  # [B, S, L + 1, D]
        return {
            "between_tokens": directions @ directions.transpose(-1, -2),
            "across_layers": by_token @ by_token.transpose(-1, -2),
            "to_patches": (directions @ patch_direction.unsqueeze(-1)).squeeze(-1),
            "squared_distances": compute_distances(special).square(),
            "states": special,
            "squares": special.cpu().double().square(),
            "token_norms": special.norm(dim=-1),
            "outliers": compute_outlier_fractions(patches),
        }

    def uniform(self, centers: torch.Tensor, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the values of uniform attention, [B] each."""
        batch, _, num_tokens, _ = states.shape
        uniform = centers.new_full((1, 1, 1, len(centers)), 1 / len(centers))
        values = {
            "uniform_entropy": torch.tensor(num_tokens).log(),
            "uniform_spread": compute_spread(uniform, centers).squeeze(),
            "uniform_patch_distance": compute_distances(centers).mean(),
        }
        return {name: value.expand(batch) for name, value in values.items()}

    def uniform_by_token(self, centers: torch.Tensor, layer: RecordedLayer) -> dict[str, torch.Tensor]:
        """Return the values of uniform attention to all tokens that each special token may attend to, [B, S] each."""
        visible = get_visible_keys(layer, self.layout.num_prefix_tokens)  # [B, S, N]
        return {
            "token_entropy": visible.sum(dim=-1).log(),
            "token_spread": compute_spread(visible[..., self.layout.patches].float(), centers),
        }

    def get_patch_centers(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return the center (row, column) of each patch in pixels, [P, 2]."""
        rows, columns = self.model.base_model.embeddings.patch_embeddings.get_grid_size(pixel_values)
        height, width = self.model.config.patch_height_width
        device = pixel_values.device
        return torch.cartesian_prod(
            (torch.arange(rows, device=device) + 0.5) * height, (torch.arange(columns, device=device) + 0.5) * width
        )


@torch.no_grad()
def compute_outliers_without_registers(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the fraction of outlier patches with the registers hidden from attention.

    The difference to the normal forward pass shows what registers absorb. Test-time registers (test_time_registers.py)
    still receive activations of the patches.

    Args:
        model: any ViTCLS model with registers.
        pixel_values: [B, C, H, W], on the model's device.

    Returns:
        [B, L + 1], for the embeddings and after each layer.
    """
    layout: TokenLayout = model.config.token_layout
    num_tokens = layout.get_num_tokens(*model.base_model.embeddings.patch_embeddings.get_grid_size(pixel_values))
    mask = torch.ones(len(pixel_values), num_tokens, dtype=torch.long, device=pixel_values.device)
    mask[:, layout.registers] = 0
    with evaluation_mode(model):
        outputs = model.base_model(pixel_values, attention_mask=mask, output_hidden_states=True)
    return compute_outlier_fractions(torch.stack([state[:, layout.patches] for state in outputs.hidden_states], dim=1))


def compute_outlier_fractions(patches: torch.Tensor) -> torch.Tensor:
    """Return the fraction of outlier patches [B, L + 1] for states [B, L + 1, P, D]."""
    fractions = [is_outlier(state, OUTLIER_RATIO).float().mean(dim=1) for state in patches.unbind(dim=1)]
    return torch.stack(fractions, dim=1)


def get_visible_keys(layer: RecordedLayer, num_rows: int) -> torch.Tensor:
    """Return a boolean mask [B, rows, N] of the keys that the first `num_rows` tokens may attend to."""
    query, key = layer.query[:, :, :num_rows], layer.key
    batch, _, num_rows, _ = query.shape
    mask = select_mask_rows(layer.mask, query, key)  # [B or 1, maps or 1, rows or 1, N]
    if mask is None:
        return torch.ones(batch, num_rows, key.shape[-2], dtype=torch.bool, device=key.device)
    if mask.dtype != torch.bool:  # additive mask
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask[:, 0].expand(batch, num_rows, -1)


def compute_spread(weights: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Return the mean distance [...] in pixels from the center of mass, for weights [..., P] at `centers` [P, 2]."""
    fractions = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    center_of_mass = fractions @ centers  # [..., 2]
    distances = (centers - center_of_mass.unsqueeze(-2)).norm(dim=-1)  # [..., P]
    return (fractions * distances).sum(dim=-1)


def compute_patch_distance(weights: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """Return the mean attention distance [B, H] in pixels, for attention between patches [B, H, P, P]."""
    fractions = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return (fractions * compute_distances(centers)).sum(dim=-1).mean(dim=-1)


def compute_distances(points: torch.Tensor) -> torch.Tensor:
    """Return the pairwise distances [..., P, P] of points [..., P, D], without matrix products, whose rounding errors
    are large with TF32."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
