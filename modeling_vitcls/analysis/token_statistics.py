"""What the special tokens do over many images: figures per layer, head and token.

    collected = TokenStatistics(model)
    for pixel_values in batches:
        collected.update(pixel_values)
    found = collected.compute()            # a Findings, on the CPU

Maps of single images are in maps.py and attribution.py, what a token is worth to the answer in ablation.py.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..configuration_vitcls import TokenLayout
from ..token_attention_vitcls import select_mask_rows
from .attention_recorder import RecordedLayer, recorded_attention
from .model_utils import evaluating, plain_model
from .test_time_registers import OUTLIER_RATIO, is_outlier


MOST_NORMS = 200_000  # of patches, kept for histograms


@dataclass(frozen=True)
class Findings:
    """Means over images. L layers, H heads (maps, of differential attention), S special tokens.

    "States" are the embeddings and the output of each layer, L + 1 of them, before the final norm.

    Attributes:
        num_images: over which all is averaged.
        uniform: `entropy` (ln N), `spread` and `patch_distance` where all tokens, or patches, are attended to alike.
        uniform_by_token: `entropy` and `spread`, [S] each, where a special token attends alike to all that it may see;
            other than `uniform` for CLS tokens that see a part of the image (`config.cls_scopes`).
        entropy: [L, H, S], in nats, of what each special token attends to.
        spread: [L, H, S], in pixels: mean distance of the patches that it attends to from their centre of mass.
        patch_distance: [L, H], in pixels: mean distance between a patch and the patches it attends to (mean attention
            distance, Dosovitskiy et al. 2020, section 4.5).
        mass: [L, H, S, 4], the share of its attention to CLS, distillation, register and patch tokens.
        received: [L, H, S], mean share of the patches' attention that goes to it.
        between_tokens: [L + 1, S, S], cosine similarity of the special tokens' states.
        apart: [L + 1, S, S], root mean square distance between two special tokens' states of the same image. Cosines
            do not see what differs beside one channel that is huge in all tokens; this does.
        across_layers: [S, L + 1, L + 1], cosine similarity of a token's states.
        to_patches: [L + 1, S], cosine similarity to the mean of the patches.
        variation: [L + 1, S], how much a token's state differs between images: the root mean square distance from
            its mean over images, divided by the norm of that mean.
        channel_variation: [L + 1, S], the same of a channel, standard deviation over size of the mean, of the median
            channel; one huge channel that is the same for all images makes `variation` small, but not this.
        mean_states: [L + 1, S, D], the means.
        patch_norms: [L + 1, n], norms of patches' states, of at most MOST_NORMS patches.
        outliers: [L + 1], share of patches with a norm beyond 3 times the median of their image (Darcet et al. 2023,
            arXiv 2309.16588, find artifacts by their norm).
        outliers_without_registers: [L + 1], the same while no token may attend to a register; None without registers.
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
    """Collects sums over images; `model` is any of ours."""

    def __init__(self, model: Any) -> None:
        self.model = plain_model(model)
        self.layout: TokenLayout = self.model.config.token_layout
        self.num_images = 0
        self.sums: dict[str, torch.Tensor] = {}
        self.norms: list[torch.Tensor] = []  # [L + 1, n] of a batch

    @torch.no_grad()
    def update(self, pixel_values: torch.Tensor) -> None:
        """Take in a batch [B, C, H, W], on the model's device; a forward pass, and with registers one without them."""
        with evaluating(self.model), recorded_attention(self.model) as layers:
            outputs = self.model.base_model(pixel_values, output_hidden_states=True)
        states = torch.stack(outputs.hidden_states, dim=1).float()  # [B, L + 1, N, D]
        centres = self.patch_centres(pixel_values)  # [P, 2]
        per_layer = [self.of_layer(layer, centres) for layer in layers]
        found = {name: torch.stack([figures[name] for figures in per_layer], dim=1) for name in per_layer[0]}
        found |= self.of_states(states) | self.uniform(centres, states) | self.uniform_by_token(centres, layers[0])
        if self.model.config.num_register_tokens:
            found["outliers_without_registers"] = outliers_without_registers(self.model, pixel_values)
        self.add(found)
        kept = sum(norms.shape[1] for norms in self.norms)
        norms = states[:, :, self.layout.patches].norm(dim=-1).transpose(0, 1).flatten(1)  # [L + 1, B * P]
        self.norms.append(norms[:, : MOST_NORMS - kept].cpu())
        self.num_images += len(pixel_values)

    def compute(self) -> Findings:
        """The means.

        Raises:
            ValueError: if there was no image.
        """
        if not self.num_images:
            raise ValueError("there are no statistics of no images: give one or more")
        means = {name: total / self.num_images for name, total in self.sums.items()}
        mean_states = means.pop("states")  # [L + 1, S, D]
        sizes = mean_states.abs()
        deviations = (means.pop("squares") - mean_states.square()).clamp(min=0).sqrt()  # [L + 1, S, D]
        uniform = {name: means.pop(f"uniform_{name}").item() for name in ("entropy", "spread", "patch_distance")}
        by_token = {name: means.pop(f"token_{name}").float() for name in ("entropy", "spread")}
        without = means.pop("outliers_without_registers", None)
        return Findings(
            num_images=self.num_images,
            mean_states=mean_states.float(),
            variation=(deviations.norm(dim=-1) / mean_states.norm(dim=-1).clamp(min=1e-12)).float(),
            channel_variation=(deviations / sizes.clamp(min=1e-12)).median(dim=-1).values.float(),
            apart=means.pop("squared_distances").sqrt().float(),
            patch_norms=torch.cat(self.norms, dim=1),
            outliers_without_registers=None if without is None else without.float(),
            uniform=uniform,
            uniform_by_token=by_token,
            **{name: mean.float() for name, mean in means.items()},
        )

    def add(self, found: dict[str, torch.Tensor]) -> None:
        """Add figures [B, ...] of a batch to the sums, in double precision."""
        for name, figures in found.items():
            total = figures.cpu().double().sum(dim=0)  # not every device has double precision
            self.sums[name] = self.sums[name] + total if name in self.sums else total

    # Of a batch; everything returned is [B, ...] ---------------------------------------------------------------------

    def of_layer(self, layer: RecordedLayer, centres: torch.Tensor) -> dict[str, torch.Tensor]:
        """What one layer's maps say."""
        layout = self.layout
        weights = layer.weights()  # [B, H, N, N]
        rows = weights[:, :, : layout.num_prefix_tokens]  # [B, H, S, N]
        from_patches = weights[:, :, layout.patches]  # [B, H, P, N]
        return {
            "entropy": torch.special.entr(rows).sum(dim=-1),
            "spread": spread(rows[..., layout.patches], centres),
            "mass": torch.stack([rows[..., group].sum(dim=-1) for _, group in layout.items()], dim=-1),
            "received": from_patches[..., : layout.num_prefix_tokens].mean(dim=2),
            "patch_distance": patch_distance(from_patches[..., layout.patches], centres),
        }

    def of_states(self, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the hidden states [B, L + 1, N, D] say."""
        special, patches = states[:, :, : self.layout.num_prefix_tokens], states[:, :, self.layout.patches]
        directions = torch.nn.functional.normalize(special, dim=-1)  # [B, L + 1, S, D]
        of_patches = torch.nn.functional.normalize(patches.mean(dim=2), dim=-1)  # [B, L + 1, D]
        by_token = directions.transpose(1, 2)  # [B, S, L + 1, D]
        return {
            "between_tokens": directions @ directions.transpose(-1, -2),
            "across_layers": by_token @ by_token.transpose(-1, -2),
            "to_patches": (directions @ of_patches.unsqueeze(-1)).squeeze(-1),
            "squared_distances": distances_between(special).square(),
            "states": special,
            "squares": special.cpu().double().square(),
            "token_norms": special.norm(dim=-1),
            "outliers": shares_of_outliers(patches),
        }

    def uniform(self, centres: torch.Tensor, states: torch.Tensor) -> dict[str, torch.Tensor]:
        """The figures of attention that is the same everywhere, [B] each."""
        batch, _, num_tokens, _ = states.shape
        alike = centres.new_full((1, 1, 1, len(centres)), 1 / len(centres))
        values = {
            "uniform_entropy": torch.tensor(num_tokens).log(),
            "uniform_spread": spread(alike, centres).squeeze(),
            "uniform_patch_distance": distances_between(centres).mean(),
        }
        return {name: value.expand(batch) for name, value in values.items()}

    def uniform_by_token(self, centres: torch.Tensor, layer: RecordedLayer) -> dict[str, torch.Tensor]:
        """The figures where each special token attends alike to all that it may see, [B, S] each."""
        visible = visible_keys(layer, self.layout.num_prefix_tokens)  # [B, S, N]
        return {
            "token_entropy": visible.sum(dim=-1).log(),
            "token_spread": spread(visible[..., self.layout.patches].float(), centres),
        }

    def patch_centres(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Row and column, in pixels, of the middle of each patch, [P, 2]."""
        rows, columns = self.model.base_model.embeddings.patch_embeddings.get_grid_size(pixel_values)
        height, width = self.model.config.patch_height_width
        device = pixel_values.device
        return torch.cartesian_prod(
            (torch.arange(rows, device=device) + 0.5) * height, (torch.arange(columns, device=device) + 0.5) * width
        )


@torch.no_grad()
def outliers_without_registers(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Share of patches whose norm is an outlier, while no token may attend to a register: what registers take in.

    Where test-time registers (test_time_registers.py) get activations of the patches, they still do.

    Args:
        model: any of ours with registers.
        pixel_values: [B, C, H, W], on the model's device.

    Returns:
        [B, L + 1], of the embeddings and after each layer.
    """
    layout: TokenLayout = model.config.token_layout
    rows, columns = model.base_model.embeddings.patch_embeddings.get_grid_size(pixel_values)
    num_tokens = layout.num_prefix_tokens + rows * columns
    mask = torch.ones(len(pixel_values), num_tokens, dtype=torch.long, device=pixel_values.device)
    mask[:, layout.registers] = 0
    with evaluating(model):
        outputs = model.base_model(pixel_values, attention_mask=mask, output_hidden_states=True)
    return shares_of_outliers(torch.stack([state[:, layout.patches] for state in outputs.hidden_states], dim=1))


def shares_of_outliers(patches: torch.Tensor) -> torch.Tensor:
    """Of states [B, L + 1, P, D] -> [B, L + 1]."""
    shares = [is_outlier(state, OUTLIER_RATIO).float().mean(dim=1) for state in patches.unbind(dim=1)]
    return torch.stack(shares, dim=1)


def visible_keys(layer: RecordedLayer, num_rows: int) -> torch.Tensor:
    """Boolean [B, rows, N]: which keys the first tokens may attend to, however little."""
    query, key = layer.query[:, :, :num_rows], layer.key
    batch, _, num_rows, _ = query.shape
    mask = select_mask_rows(layer.mask, query, key)  # [B or 1, maps or 1, rows or 1, N]
    if mask is None:
        return torch.ones(batch, num_rows, key.shape[-2], dtype=torch.bool, device=key.device)
    if mask.dtype != torch.bool:  # added to scores
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask[:, 0].expand(batch, num_rows, -1)


def spread(weights: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Mean distance, in pixels, from the centre of mass: weights [..., P] of patches at `centres` [P, 2] -> [...]."""
    shares = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    middle = shares @ centres  # [..., 2]
    distances = (centres - middle.unsqueeze(-2)).norm(dim=-1)  # [..., P]
    return (shares * distances).sum(dim=-1)


def patch_distance(weights: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Mean distance, in pixels, that patches attend over: weights [B, H, P, P] -> [B, H]."""
    shares = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    return (shares * distances_between(centres)).sum(dim=-1).mean(dim=-1)


def distances_between(points: torch.Tensor) -> torch.Tensor:
    """Of points [..., P, D] from each other, [..., P, P]; not by matrix products, whose rounding is large (TF32)."""
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
