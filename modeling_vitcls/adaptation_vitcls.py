"""Checkpoints with other tokens, image size or patch size than they were saved with.

    model = ViTCLSModel.from_pretrained(path, image_size=[256, 384], num_register_tokens=4)    # at load
    model = model.adapted(image_size=[256, 384], num_register_tokens=4)                        # on a loaded model

Nothing here needs training; whether the model should be fine-tuned afterwards is the user's call. What becomes of the
weights is a table, `ADAPTERS`, and what was done is logged once, line by line:

    tokens                 kept from the first on; new ones start as `config.token_init` says
    positions of tokens    kept likewise; those of new tokens start at zero
    positions of patches   resampled (`config.position_interpolation`)
    patch projection       resized by FlexiViT's pseudo-inverse
    decoded patches        resized bilinearly
    distillation head      a new one starts as a copy of the classifier
    gates                  stay with their tokens
    anything else          whose shape changes starts afresh

With `gate_new_tokens=True` the added tokens have no influence on the others at first, and learn to (`TokenGates`).
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .configuration_vitcls import ADAPTABLE_FIELDS, TOKEN_COUNTS, ViTCLSConfig, get_remaining_gates
from .loading_vitcls import check_folder, load_checkpoint
from .resampling_vitcls import Resampling, resize_decoded_patches, resize_patch_kernel
from .scopes_vitcls import TokenGates, resample_distances


logger = logging.get_logger(__name__)

# Keywords of `from_pretrained` that say where to read, and those that a configuration has no use for.
HUB_KEYWORDS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
MODEL_KEYWORDS = ("dtype", "torch_dtype", "quantization_config", "state_dict")


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
        source, config_class = pretrained_model_name_or_path, cast(type[ViTCLSConfig], cls.config_class)
        config, kwargs = wanted_config(config_class, source, kwargs)
        stored = {} if config is None else stored_values(config_class, source, kwargs)
        wanted = {name: getattr(config, name) for name, value in stored.items() if getattr(config, name) != value}
        if wanted:
            kwargs["config"] = with_values(config, stored, unchecked=True)
        loaded = load_checkpoint(super().from_pretrained, source, *model_args, **kwargs)
        if not wanted:
            return loaded
        if isinstance(loaded, tuple):  # output_loading_info=True
            return loaded[0].adapted(gate_new_tokens=gate_new_tokens, **wanted), *loaded[1:]
        return loaded.adapted(gate_new_tokens=gate_new_tokens, **wanted)

    def adapted(self, gate_new_tokens: bool = False, **wanted: Any) -> Self:
        """A new model with other values of `ADAPTABLE_FIELDS` and these weights; itself where nothing changes.

        Args:
            gate_new_tokens: Let added tokens start without influence on the other tokens. Outputs then stay, but
                for those that read the added tokens themselves: pooling over all CLS tokens, a distillation head.

        Raises:
            ValueError: for a field that cannot be adapted, or a value that does not fit the others.
        """
        if unknown := sorted(set(wanted) - set(ADAPTABLE_FIELDS)):
            raise ValueError(f"{unknown[0]} cannot be adapted: {', '.join(ADAPTABLE_FIELDS)} can")
        wanted = {name: value for name, value in wanted.items() if value != getattr(self.config, name)}
        if not wanted:
            return self
        config = with_values(self.config, wanted | {"gated_tokens": gates_after(self.config, wanted, gate_new_tokens)})
        model = self.rebuilt(config).train(self.training)
        model.to(device=self.device, dtype=self.dtype)  # type: ignore[call-arg]  # transformers wraps `to` untyped
        transfer(self, model)
        return model

    def rebuilt(self, config: ViTCLSConfig) -> Self:
        """A model of this class with fresh weights, for another configuration."""
        return type(self)(config)


def wanted_config(
    config_class: type[ViTCLSConfig], source: Any, kwargs: dict[str, Any]
) -> tuple[ViTCLSConfig | None, dict[str, Any]]:
    """The configuration that the caller of `from_pretrained` asks for, and the keywords that are left, with it.

    None where nothing that may need adapting is asked for.
    """
    config = kwargs.get("config")
    named = [name for name in ADAPTABLE_FIELDS if name in kwargs]
    # By model_type, not by class: transformers may execute configuration_vitcls.py twice when it comes from the Hub.
    if getattr(config, "model_type", None) == config_class.model_type:
        config = with_values(config, {name: kwargs.pop(name) for name in named})
        return config, kwargs | {"config": config}
    if not named:
        return None, kwargs
    check_folder(source, config is not None or bool(kwargs.get("subfolder")))
    for_the_model = {name: kwargs.pop(name) for name in MODEL_KEYWORDS if name in kwargs}
    hub_keywords = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
    kwargs.pop("config", None)
    config, kwargs = config_class.from_pretrained(config or source, return_unused_kwargs=True, **kwargs)
    return config, kwargs | for_the_model | hub_keywords | {"config": config}


def stored_values(config_class: type[ViTCLSConfig], source: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's own values of `ADAPTABLE_FIELDS`; empty where it has no configuration."""
    if source is None:  # a state dict is given instead
        return {}
    hub_keywords = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
    try:
        stored, _ = config_class.get_config_dict(source, **hub_keywords)
    except OSError:
        return {}
    return {name: stored.get(name, getattr(config_class, name)) for name in ADAPTABLE_FIELDS} if stored else {}


def gates_after(config: ViTCLSConfig, wanted: Mapping[str, Any], gate_new_tokens: bool) -> dict[str, int] | None:
    """`gated_tokens` of the new configuration: those asked for, else those that stay, and new ones if so wished."""
    counts = {field: getattr(config, field) for field in TOKEN_COUNTS.values()}
    new_counts = {field: wanted.get(field, count) for field, count in counts.items()}
    staying = get_remaining_gates(config.gated_tokens, counts, new_counts)
    gated = dict(wanted.get("gated_tokens", staying) or {})
    for group, field in TOKEN_COUNTS.items():
        num_added = new_counts[field] - counts[field]
        if gate_new_tokens and num_added > gated.get(group, 0):
            gated[group] = num_added
    return gated or None


@torch.no_grad()
def transfer(source: AdaptableModel, target: AdaptableModel) -> None:
    """Put the weights of `source` into `target`, adapted where the configuration differs, and log what changed.

    What was frozen stays so, but for weights that start afresh.
    """
    old_weights = source.state_dict()
    new_weights = target.state_dict()
    frozen = {name for name, parameter in source.named_parameters() if not parameter.requires_grad}
    parameters = dict(target.named_parameters())
    for name, fresh in new_weights.items():
        weight, note = follow(name, fresh, old_weights, source.config, target.config)
        if name in frozen and weight is not fresh:
            parameters[name].requires_grad_(False)
        fresh.copy_(weight)
        if note:
            logger.warning(f"{name}: {note}")
    for name in sorted(old_weights.keys() - new_weights.keys()):
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
    return resize_patch_kernel(old_weights[name], new.patch_height_width), f"resized from {_patches(old, new)}"


def adapt_distillation_head(
    name: str, fresh: torch.Tensor, old_weights: Mapping[str, torch.Tensor], old: ViTCLSConfig, new: ViTCLSConfig
) -> tuple[torch.Tensor, str]:
    """Keep it, or start as the classifier where that reads vectors of the same width."""
    if name in old_weights:
        return old_weights[name], ""
    classifier = old_weights.get(name.replace("distillation_classifier", "classifier"))
    if classifier is None or classifier.shape != fresh.shape:
        return fresh, "starts afresh"
    return classifier, "starts as a copy of the classifier"


def adapt_gates(
    name: str, fresh: torch.Tensor, old_weights: Mapping[str, torch.Tensor], old: ViTCLSConfig, new: ViTCLSConfig
) -> tuple[torch.Tensor, str]:
    """Gates [n] stay with their tokens; new tokens start shut, and tokens that had no gate open."""
    gates = fresh.clone()
    old_gates = dict(zip(gated_tokens(old), old_weights.get(name, ()), strict=True))
    counts = {group: getattr(old, field) for group, field in TOKEN_COUNTS.items()}
    places = gated_tokens(new)
    for place, (group, index) in enumerate(places):
        if index < counts[group]:
            gates[place] = old_gates.get((group, index), TokenGates.OPEN)
    if set(places) == set(old_gates):
        return gates, ""
    num_kept = len(old_gates.keys() & set(places))
    num_shut = sum(index >= counts[group] for group, index in places)
    return gates, f"{num_kept} kept, {len(old_gates) - num_kept} dropped, {num_shut} shut"


def gated_tokens(config: ViTCLSConfig) -> list[tuple[str, int]]:
    """(group, index within the group) of each gate, in the order of `TokenGates.gates`."""
    gated = config.gated_tokens or {}
    return [
        (group, index)
        for group, field in TOKEN_COUNTS.items()
        for index in range(getattr(config, field) - gated.get(group, 0), getattr(config, field))
    ]


def adapt_pixel_decoder(
    name: str, fresh: torch.Tensor, old_weights: Mapping[str, torch.Tensor], old: ViTCLSConfig, new: ViTCLSConfig
) -> tuple[torch.Tensor, str]:
    """Resize the pixels that the decoder [C * height * width, ...] of masked image modelling gives."""
    if old.patch_height_width == new.patch_height_width:
        return old_weights[name], ""
    resized = resize_decoded_patches(old_weights[name], old.patch_height_width, new.patch_height_width)
    return resized, f"resized from {_patches(old, new)}"


def _patches(old: ViTCLSConfig, new: ViTCLSConfig) -> str:
    (height, width), (new_height, new_width) = old.patch_height_width, new.patch_height_width
    return f"patches of {height} x {width} to {new_height} x {new_width} pixels"


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
    "distillation_classifier": adapt_distillation_head,
    "decoder.projection.": adapt_pixel_decoder,
}


def with_values(config: Any, values: Mapping[str, Any], unchecked: bool = False) -> Any:
    """A copy of a configuration with other values, checked as at construction unless it is `unchecked`."""
    config = copy.deepcopy(config)
    for name, value in values.items():
        setattr(config, name, value)
    if unchecked:
        config._unchecked = True
    else:
        config.__dict__.pop("_unchecked", None)
        config.validate()
    return config
