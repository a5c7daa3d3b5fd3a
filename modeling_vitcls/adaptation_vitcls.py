"""Checkpoints with other tokens, image size or patch size than they were saved with.

    model = ViTCLSModel.from_pretrained(path, image_size=[256, 384], num_register_tokens=4)    # at load
    model = model.adapted(image_size=[256, 384], num_register_tokens=4)                        # on a loaded model

Nothing here needs training; whether the model should be fine-tuned afterwards is the user's call. What becomes of the
weights is a table, `ADAPTERS`, and what was done is logged once, line by line:

    tokens                 kept from the first on; new ones start as `config.token_init` says
    positions of tokens    kept likewise; those of new tokens start at zero
    positions of patches   resampled (`config.position_interpolation`)
    patch projection       resized by FlexiViT's pseudo-inverse
    distillation head      a new one starts as a copy of the classifier
    anything else          whose shape changes starts afresh

With `gate_new_tokens=True` the added tokens have no influence on the others at first, and learn to (`TokenGates`).
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_vitcls import ADAPTABLE_FIELDS, TOKEN_COUNTS, ViTCLSConfig
from .loading_vitcls import load_checkpoint
from .resampling_vitcls import Resampling, resize_patch_kernel
from .scopes_vitcls import resample_distances


logger = logging.get_logger(__name__)


class AdaptableModel(PreTrainedModel):
    """A `PreTrainedModel` whose `from_pretrained` adapts, with `adapted` for loaded models."""

    config: ViTCLSConfig

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, gate_new_tokens: bool = False, **kwargs: Any
    ) -> Any:
        """As `PreTrainedModel.from_pretrained`; values of `ADAPTABLE_FIELDS` other than the checkpoint's adapt it.

        Raises:
            OSError, RuntimeError: in one line, for a checkpoint that is missing or damaged, or does not fit.
            ValueError: for values that do not fit each other.
        """
        wanted = {name: kwargs.pop(name) for name in ADAPTABLE_FIELDS if name in kwargs}
        config = kwargs.get("config")
        # By attribute, not by class: transformers may execute configuration_vitcls.py twice when it comes from the Hub.
        if stored := getattr(config, "stored_values", None):
            # The Auto classes have put the wanted values into the configuration: load with the stored ones first.
            wanted = {name: getattr(config, name) for name in stored} | wanted
            kwargs["config"] = changed_config(config, stored)
        loaded = load_checkpoint(super().from_pretrained, pretrained_model_name_or_path, *model_args, **kwargs)
        if not wanted:
            return loaded
        if isinstance(loaded, tuple):  # output_loading_info=True
            return loaded[0].adapted(gate_new_tokens=gate_new_tokens, **wanted), *loaded[1:]
        return loaded.adapted(gate_new_tokens=gate_new_tokens, **wanted)

    def adapted(self, gate_new_tokens: bool = False, **wanted: Any) -> Self:
        """A new model with other values of `ADAPTABLE_FIELDS` and these weights; itself where nothing changes.

        Args:
            gate_new_tokens: Let added tokens start without influence on the others, so that outputs stay.

        Raises:
            ValueError: for a field that cannot be adapted, or a value that does not fit the others.
        """
        if unknown := sorted(set(wanted) - set(ADAPTABLE_FIELDS)):
            raise ValueError(f"{unknown[0]} cannot be adapted: {', '.join(ADAPTABLE_FIELDS)} can")
        wanted = {name: value for name, value in wanted.items() if value != getattr(self.config, name)}
        if not wanted:
            return self
        config = changed_config(self.config, wanted | gates_after(self.config, wanted, gate_new_tokens))
        model = self.rebuilt(config).train(self.training)
        model.to(device=self.device, dtype=self.dtype)  # type: ignore[call-arg]  # transformers wraps `to` untyped
        transfer(self, model)
        return model

    def rebuilt(self, config: ViTCLSConfig) -> Self:
        """A model of this class with fresh weights, for another configuration."""
        return type(self)(config)


def gates_after(config: ViTCLSConfig, wanted: Mapping[str, Any], gate_new_tokens: bool) -> dict[str, Any]:
    """`gated_tokens` of the new configuration: gates stay with their tokens.

    Gated tokens are the last of their group, so tokens added to a group with gates are gated too.
    """
    if "gated_tokens" in wanted:
        return {}
    gated = {}
    for group, field in TOKEN_COUNTS.items():
        old_count, old_gated = getattr(config, field), (config.gated_tokens or {}).get(group, 0)
        count = wanted.get(field, old_count)
        first_gated = old_count - old_gated if old_gated or gate_new_tokens else count
        if count > first_gated:
            gated[group] = count - first_gated
    return {"gated_tokens": gated or None}


@torch.no_grad()
def transfer(source: AdaptableModel, target: AdaptableModel) -> None:
    """Put the weights of `source` into `target`, adapted where the configuration differs, and log what changed."""
    old_weights = source.state_dict()
    new_weights = target.state_dict()
    for name, fresh in new_weights.items():
        weight, note = follow(name, fresh, old_weights, source.config, target.config)
        fresh.copy_(weight)
        if note:
            logger.warning(f"{name}: {note}")
    for name in old_weights.keys() - new_weights.keys():
        logger.warning(f"{name}: dropped")


def follow(
    name: str,
    fresh: torch.Tensor,
    old_weights: Mapping[str, torch.Tensor],
    old: ViTCLSConfig,
    new: ViTCLSConfig,
) -> tuple[torch.Tensor, str]:
    """The weight `name` of the new model, and a note on what was done to it, empty if it is as it was."""
    for part, adapt in ADAPTERS.items():
        if part in name:
            return adapt(name, fresh, old_weights, old, new)
    weight = old_weights.get(name)
    if weight is None:
        return fresh, "starts afresh"
    return (weight, "") if weight.shape == fresh.shape else (fresh, "starts afresh, its shape has changed")


def adapt_tokens(
    name: str, fresh: torch.Tensor, old_weights: Mapping[str, torch.Tensor], old: ViTCLSConfig, new: ViTCLSConfig
) -> tuple[torch.Tensor, str]:
    """Keep tokens [1, n, D] from the first on, and let further ones start as they were initialised."""
    return keep_first(fresh.clone(), old_weights.get(name), f"start by token_init={new.token_init!r}")


def adapt_token_positions(
    name: str, fresh: torch.Tensor, old_weights: Mapping[str, torch.Tensor], old: ViTCLSConfig, new: ViTCLSConfig
) -> tuple[torch.Tensor, str]:
    """Keep positions [1, n, D] of special tokens from the first on, and let further ones start at zero."""
    return keep_first(torch.zeros_like(fresh), old_weights.get(name), "start at zero")


def keep_first(rows: torch.Tensor, old: torch.Tensor | None, how: str) -> tuple[torch.Tensor, str]:
    """Put the rows of `old` [1, m, D] at the start of `rows` [1, n, D], as many as fit."""
    available = 0 if old is None else old.shape[1]
    kept = min(available, rows.shape[1])
    if old is not None:
        rows[:, :kept] = old[:, :kept]
    if available == kept == rows.shape[1]:
        return rows, ""
    notes = [f"{kept} kept"]
    if available > kept:
        notes.append(f"{available - kept} dropped")
    if rows.shape[1] > kept:
        notes.append(f"{rows.shape[1] - kept} added, which {how}")
    return rows, ", ".join(notes)


def adapt_patch_positions(
    name: str, fresh: torch.Tensor, old_weights: Mapping[str, torch.Tensor], old: ViTCLSConfig, new: ViTCLSConfig
) -> tuple[torch.Tensor, str]:
    """Resample learned positions [1, rows * columns, D] to the new grid."""
    if old.grid_size == new.grid_size:
        return old_weights[name], ""
    resample = Resampling(new.position_interpolation, new.position_antialias, new.position_offset)
    return resample(old_weights[name], old.grid_size, new.grid_size), f"resampled from {_grids(old, new)}"


def adapt_distances(
    name: str, fresh: torch.Tensor, old_weights: Mapping[str, torch.Tensor], old: ViTCLSConfig, new: ViTCLSConfig
) -> tuple[torch.Tensor, str]:
    """Resample biases by distance [tables, distances + 3, heads] to the new grid."""
    if old.grid_size == new.grid_size:
        return old_weights[name], ""
    return resample_distances(old_weights[name], old.grid_size, new.grid_size), f"resampled from {_grids(old, new)}"


def adapt_patch_kernel(
    name: str, fresh: torch.Tensor, old_weights: Mapping[str, torch.Tensor], old: ViTCLSConfig, new: ViTCLSConfig
) -> tuple[torch.Tensor, str]:
    """Resize the patch projection [D, C, height, width]."""
    if old.patch_height_width == new.patch_height_width:
        return old_weights[name], ""
    (height, width), (new_height, new_width) = old.patch_height_width, new.patch_height_width
    resized = resize_patch_kernel(old_weights[name], (new_height, new_width))
    return resized, f"resized from patches of {height} x {width} to {new_height} x {new_width} pixels"


def adapt_distillation_head(
    name: str, fresh: torch.Tensor, old_weights: Mapping[str, torch.Tensor], old: ViTCLSConfig, new: ViTCLSConfig
) -> tuple[torch.Tensor, str]:
    """Keep it, or start as the classifier where that reads vectors of the same width."""
    if name in old_weights:
        return old_weights[name], ""
    classifier = old_weights.get(name.replace("distillation_classifier.head", "classifier"))
    if classifier is None or classifier.shape != fresh.shape:
        return fresh, "starts afresh"
    return classifier, "starts as a copy of the classifier"


def adapt_gates(
    name: str, fresh: torch.Tensor, old_weights: Mapping[str, torch.Tensor], old: ViTCLSConfig, new: ViTCLSConfig
) -> tuple[torch.Tensor, str]:
    """Keep the gates [n] of tokens that stay, and let those of new ones start shut."""
    gates, notes = fresh.clone(), []
    old_first = new_first = 0
    for group in TOKEN_COUNTS:
        old_count, new_count = ((config.gated_tokens or {}).get(group, 0) for config in (old, new))
        kept = min(old_count, new_count)
        if kept:
            gates[new_first : new_first + kept] = old_weights[name][old_first : old_first + kept]
        if old_count != new_count:
            notes.append(f"{group}: {kept} kept, {old_count - kept} dropped, {new_count - kept} shut")
        old_first, new_first = old_first + old_count, new_first + new_count
    return gates, "; ".join(notes)


def _grids(old: ViTCLSConfig, new: ViTCLSConfig) -> str:
    (rows, columns), (new_rows, new_columns) = old.grid_size, new.grid_size
    return f"{rows} x {columns} to {new_rows} x {new_columns} patches"


Adapter = Callable[
    [str, torch.Tensor, Mapping[str, torch.Tensor], ViTCLSConfig, ViTCLSConfig], tuple[torch.Tensor, str]
]

# Part of a parameter's name -> how it follows the configuration.
ADAPTERS: dict[str, Adapter] = {
    "embeddings.cls_token": adapt_tokens,
    "embeddings.distillation_token": adapt_tokens,
    "embeddings.register_tokens": adapt_tokens,
    "position_embeddings.patches": adapt_patch_positions,
    "position_embeddings.": adapt_token_positions,
    "patch_embeddings.projection.weight": adapt_patch_kernel,
    "view.tables": adapt_distances,
    "gates.gates": adapt_gates,
    "distillation_classifier.head": adapt_distillation_head,
}


def changed_config(config: ViTCLSConfig, values: Mapping[str, Any]) -> ViTCLSConfig:
    """A copy with other values, checked as at construction."""
    config = copy.deepcopy(config)
    for name, value in values.items():
        setattr(config, name, value)
    config.stored_values = {}
    config.validate()
    return config
