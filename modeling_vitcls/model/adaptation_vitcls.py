# SPDX-License-Identifier: Apache-2.0
"""Change the special tokens, image size or patch size of a model.

    model = ViTCLSModel.from_pretrained(path, num_register_tokens=4)    # while loading
    model = model.adapt(image_size=[256, 384], num_register_tokens=4)   # after loading

No training is required, but fine-tuning may improve the adapted model. The table `ADAPTERS`
determines how each weight is adapted, and every change is logged in one line:

    tokens                 the first are kept; new tokens are initialized by `config.token_init`
    token positions        the first position embeddings are kept; new position embeddings are zero
    patch positions        resampled (`config.position_interpolation`)
    patch projection       resized with FlexiViT's pseudo-inverse
    distillation head      a new head is initialized as a copy of the classifier
    gates                  a gate is kept if the gated token is kept
    other weights          newly initialized if they are missing or their shape changes

Added tokens are gated (`TokenGates`): initially, they do not affect the other tokens.
`gate_new_tokens=False` adds tokens without gates.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .attention_masks_vitcls import (
    ADDITIVE_MASK_IMPLEMENTATIONS,
    TokenGates,
    list_gated_tokens,
    resample_bias_tables,
)
from .configuration_vitcls import ADAPTABLE_FIELDS, COUNT_FIELDS, ViTCLSConfig, update_gated_tokens
from .positions_vitcls import resample_positions, resize_patch_kernel


logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that control how files are loaded, and arguments that
# configurations do not accept.
HUB_KEYWORDS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
MODEL_KEYWORDS = ("dtype", "torch_dtype", "quantization_config", "state_dict")


class AdaptableModel(PreTrainedModel):
    """A `PreTrainedModel` that is adapted while loading (`from_pretrained`) or later (`adapt`)."""

    config: ViTCLSConfig

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        gate_new_tokens: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint, and adapt the model if arguments change its `ADAPTABLE_FIELDS`.

        `gate_new_tokens` is explained in `adapt`; other arguments are passed to
        `PreTrainedModel.from_pretrained`. If training has opened all gates of the checkpoint, the
        gates are removed.

        Raises:
            OSError, RuntimeError: if the checkpoint is missing, damaged or incompatible. The
                message is a single line.
            ValueError: if configuration fields contradict each other.
        """
        source = pretrained_model_name_or_path
        config_class = cast(type[ViTCLSConfig], cls.config_class)
        config, kwargs = resolve_config(config_class, source, kwargs)
        old_fields = {} if config is None else read_adaptable_fields(config_class, source, kwargs)

        changes = {
            name: getattr(config, name)
            for name, value in old_fields.items()
            if getattr(config, name) != value
        }
        if changes:
            # The weights are loaded into the old shapes, and adapted afterwards. The old sizes need
            # not be valid together with the new values of other fields.
            kwargs["config"] = replace_fields(config, old_fields, validate=False)

        model_or_tuple = load_checkpoint(super().from_pretrained, source, *model_args, **kwargs)
        has_loading_info = isinstance(model_or_tuple, tuple)  # output_loading_info=True
        model = model_or_tuple[0] if has_loading_info else model_or_tuple
        # before `adapt`, so that it counts only gates that still do something
        remove_open_gates(model)

        if not changes:
            return model_or_tuple
        model = model.adapt(gate_new_tokens=gate_new_tokens, **changes)
        return (model, *model_or_tuple[1:]) if has_loading_info else model

    def adapt(self, gate_new_tokens: bool | None = None, **changes: Any) -> Self:
        """Build a model with other values of `ADAPTABLE_FIELDS`, and adapt the weights to it.

        If no field changes, this model is returned.

        Args:
            gate_new_tokens: whether to gate the added tokens. Closed gates hide them from the other
                tokens, so outputs stay the same until training, except outputs that read an added
                token directly (pooling over all CLS tokens). Default: True if the attention
                implementation supports gates. A model with random weights does not require gates:
                build it from its configuration, or set False.
            changes: new values of `ADAPTABLE_FIELDS`.

        Raises:
            ValueError: if a field cannot be adapted, or the new values contradict other fields.
        """
        if unknown_names := sorted(set(changes) - set(ADAPTABLE_FIELDS)):
            raise ValueError(
                f"{unknown_names[0]} cannot be adapted. Choose from {', '.join(ADAPTABLE_FIELDS)}"
            )

        changes = {
            name: value for name, value in changes.items() if value != getattr(self.config, name)
        }
        if not changes:
            return self

        if gate_new_tokens is None:
            gate_new_tokens = can_gate_new_tokens(self.config, changes)
        gated_tokens = get_gated_tokens(self.config, changes, gate_new_tokens)

        model = self.new_like(replace_fields(self.config, changes | {"gated_tokens": gated_tokens}))
        # transformers' `to` is untyped
        model.to(device=self.device, dtype=self.dtype)  # type: ignore[call-arg]
        load_adapted_weights(self, model)
        # last: `eval` compares the weights with those that the statistics were fitted to
        model.train(self.training)
        return model

    def new_like(self, config: ViTCLSConfig) -> Self:
        """Build a newly initialized model of this class for another configuration."""
        return type(self)(config)


def resolve_config(
    config_class: type[ViTCLSConfig], source: Any, kwargs: dict[str, Any]
) -> tuple[ViTCLSConfig | None, dict[str, Any]]:
    """Take the configuration out of the arguments of `from_pretrained`; return it and the others.

    The configuration is None if the arguments contain neither a ViTCLS configuration nor any of
    `ADAPTABLE_FIELDS`.
    """
    config = kwargs.get("config")
    overrides = [name for name in ADAPTABLE_FIELDS if name in kwargs]

    # Compare model_type, not the class: transformers may execute configuration_vitcls.py from the
    # Hub twice.
    if getattr(config, "model_type", None) == config_class.model_type:
        config = replace_fields(config, {name: kwargs.pop(name) for name in overrides})
        return config, kwargs | {"config": config}

    if not overrides:
        return None, kwargs
    check_checkpoint_folder(
        source, needs_config_file=config is None and not kwargs.get("subfolder")
    )

    model_kwargs = {name: kwargs.pop(name) for name in MODEL_KEYWORDS if name in kwargs}
    hub_kwargs = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
    kwargs.pop("config", None)
    config, kwargs = config_class.from_pretrained(
        config or source, return_unused_kwargs=True, **kwargs
    )
    return config, kwargs | model_kwargs | hub_kwargs | {"config": config}


def read_adaptable_fields(
    config_class: type[ViTCLSConfig], source: Any, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Read the values of `ADAPTABLE_FIELDS` in a checkpoint; {} if it has no configuration."""
    if source is None:  # the caller passes a state dict instead of a checkpoint
        return {}
    hub_kwargs = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
    try:
        config_dict, _ = config_class.get_config_dict(source, **hub_kwargs)
    except OSError:
        return {}
    return {
        name: config_dict.get(name, getattr(config_class, name))
        for name in ADAPTABLE_FIELDS
        if config_dict
    }


def replace_fields(config: Any, values: Mapping[str, Any], validate: bool = True) -> Any:
    """Copy a configuration and replace the fields in `values`, which may be valid only together."""
    config = copy.deepcopy(config)
    for name, value in values.items():
        setattr(config, name, value)

    if validate:
        config.__dict__.pop("_skip_validation", None)
        config.validate()
    else:
        config._skip_validation = True
    return config


def can_gate_new_tokens(config: ViTCLSConfig, changes: Mapping[str, Any]) -> bool:
    """Check whether the attention implementation supports gates.

    Log a line if it does not, and tokens are added.
    """
    if config._attn_implementation in (None, *ADDITIVE_MASK_IMPLEMENTATIONS):
        return True
    if any(changes.get(field, 0) > getattr(config, field) for field in COUNT_FIELDS.values()):
        logger.warning(
            f"new tokens change the outputs, because {config._attn_implementation} does not "
            "support gates: set "
            'attn_implementation="sdpa" to keep the outputs'
        )
    return False


def remove_open_gates(model: AdaptableModel) -> None:
    """Remove the gates of a loaded model if all are open: attention without a bias is faster."""
    encoder: Any = model.base_model
    gates = getattr(encoder, "gates", None)
    if gates is not None and not gates.gates.is_meta and bool((gates.get_gate_values() == 1).all()):
        encoder.gates = None
        model.config.gated_tokens = encoder.config.gated_tokens = None
        logger.info("gates.gates: removed, because all gates are open")


def get_gated_tokens(
    config: ViTCLSConfig, changes: Mapping[str, Any], gate_new_tokens: bool
) -> dict[str, int] | None:
    """Decide which tokens are gated after `changes`; `gate_new_tokens` includes all added tokens."""
    counts = {field: getattr(config, field) for field in COUNT_FIELDS.values()}
    new_counts = {field: changes.get(field, count) for field, count in counts.items()}
    remaining_gated_tokens = update_gated_tokens(config.gated_tokens, counts, new_counts)
    new_gated_tokens = dict(changes.get("gated_tokens", remaining_gated_tokens) or {})

    for group, field in COUNT_FIELDS.items():
        num_added = new_counts[field] - counts[field]
        if gate_new_tokens and num_added > new_gated_tokens.get(group, 0):
            new_gated_tokens[group] = num_added
    return new_gated_tokens or None


# Adapting weights ---------------------------------------------------------------------------------
@torch.no_grad()
def load_adapted_weights(source: AdaptableModel, target: AdaptableModel) -> None:
    """Adapt the weights of `source`, copy the results to `target`, and log the changes.

    Frozen weights stay frozen, unless they are newly initialized.
    """
    old_weights = source.state_dict()
    new_weights = target.state_dict()
    frozen_names = {
        name for name, parameter in source.named_parameters() if not parameter.requires_grad
    }
    parameters = dict(target.named_parameters())
    dropped_names = set(old_weights)

    for name, initial_value in new_weights.items():
        dropped_names.discard(name)
        context = AdaptationContext(
            name=name,
            initial_value=initial_value,
            old_value=old_weights.get(name),
            old_weights=old_weights,
            old_config=source.config,
            new_config=target.config,
        )
        weight, note = adapt_weight(context)
        if name in frozen_names and weight is not initial_value:
            parameters[name].requires_grad_(False)
        initial_value.copy_(weight)
        if note:
            logger.warning(f"{name}: {note}")

    for name in sorted(dropped_names):
        logger.warning(f"{name}: dropped")


class AdaptationContext(NamedTuple):
    """Inputs of an adapter: a weight, the weights of the old model, and both configurations."""

    name: str
    initial_value: Tensor  # the newly initialized weight
    # the weight with this name in the old model; None if there is no such weight
    old_value: Tensor | None
    old_weights: Mapping[str, Tensor]
    old_config: ViTCLSConfig
    new_config: ViTCLSConfig


# the adapted weight, and a description of the change (empty if unchanged)
AdaptedWeight = tuple[Tensor, str]


def adapt_weight(context: AdaptationContext) -> AdaptedWeight:
    """Adapt a weight with the first function in `ADAPTERS` whose key is a part of its name."""
    for substring, adapt in ADAPTERS.items():
        if substring in context.name:
            return adapt(context)
    if context.old_value is None or context.old_value.shape != context.initial_value.shape:
        return context.initial_value, "newly initialized"
    return context.old_value, ""


def adapt_tokens(context: AdaptationContext, are_positions: bool = False) -> AdaptedWeight:
    """Keep the first min(m, n) of m tokens, or their position embeddings, [1, m, D] -> [1, n, D].

    New tokens keep their initial values; the position embeddings of new tokens are zero.
    """
    new_weight = (
        torch.zeros_like(context.initial_value) if are_positions else context.initial_value.clone()
    )
    num_old_tokens = 0 if context.old_value is None else context.old_value.shape[1]
    num_kept = min(num_old_tokens, new_weight.shape[1])
    if context.old_value is not None:
        new_weight[:, :num_kept] = context.old_value[:, :num_kept]

    if num_old_tokens == num_kept == new_weight.shape[1]:
        return new_weight, ""

    num_added = new_weight.shape[1] - num_kept
    initialization = (
        "to zero" if are_positions else f"by token_init={context.new_config.token_init!r}"
    )
    return new_weight, (
        f"{num_kept} kept, {num_old_tokens - num_kept} dropped, {num_added} initialized "
        f"{initialization}"
    )


def adapt_to_grid(resample: Callable[..., Tensor], context: AdaptationContext) -> AdaptedWeight:
    """Resample a weight with one row per patch or relative position, if the patch grid changes."""
    old_grid = context.old_config.grid_size
    new_grid = context.new_config.grid_size
    if old_grid == new_grid:
        return context.old_weights[context.name], ""
    note = f"resampled from {old_grid[0]} x {old_grid[1]} to {new_grid[0]} x {new_grid[1]} patches"
    return resample(context.old_weights[context.name], old_grid, new_grid, context.new_config), note


def adapt_to_patch_size(context: AdaptationContext) -> AdaptedWeight:
    """Resize the kernel of the patch projection, if the patch size changes."""
    old_size = context.old_config.patch_height_width
    new_size = context.new_config.patch_height_width
    if old_size == new_size:
        return context.old_weights[context.name], ""
    note = (
        f"resized from {old_size[0]} x {old_size[1]} to {new_size[0]} x {new_size[1]} pixels "
        "per patch"
    )
    return resize_patch_kernel(context.old_weights[context.name], new_size), note


def adapt_distillation_head(context: AdaptationContext) -> AdaptedWeight:
    """Keep the distillation head.

    Initialize a new head as a copy of the classifier if the shapes are equal.
    """
    if context.old_value is not None:
        return context.old_value, ""
    classifier = context.old_weights[context.name.replace("distillation_classifier", "classifier")]
    if classifier.shape != context.initial_value.shape:
        return context.initial_value, "newly initialized"
    return classifier, "initialized as a copy of the classifier"


def adapt_gates(context: AdaptationContext) -> AdaptedWeight:
    """Keep the gates [n] of kept tokens.

    New gates are closed for new tokens and open for existing tokens.
    """
    gates = context.initial_value.clone()
    old_gate_values = () if context.old_value is None else context.old_value
    old_gates = dict(zip(list_gated_tokens(context.old_config), old_gate_values, strict=True))
    gated_tokens = list_gated_tokens(context.new_config)
    old_counts = {
        group: getattr(context.old_config, field) for group, field in COUNT_FIELDS.items()
    }

    for gate_index, (group, token_index) in enumerate(gated_tokens):
        if token_index < old_counts[group]:
            gates[gate_index] = old_gates.get((group, token_index), TokenGates.OPEN)

    if set(gated_tokens) == set(old_gates):
        return gates, ""
    num_kept = len(old_gates.keys() & set(gated_tokens))
    num_closed = sum(token_index >= old_counts[group] for group, token_index in gated_tokens)
    return gates, f"{num_kept} kept, {len(old_gates) - num_kept} dropped, {num_closed} closed"


# Substring of a parameter's name -> function that adapts the parameter.
ADAPTERS: dict[str, Callable[[AdaptationContext], AdaptedWeight]] = {
    **dict.fromkeys(
        ("embeddings.cls_token", "embeddings.distillation_token", "embeddings.register_"),
        adapt_tokens,
    ),
    # The first key that is part of the name decides, so the patches come before the other
    # positions.
    "position_embeddings.patches": partial(adapt_to_grid, resample_positions),
    "position_embeddings.": partial(adapt_tokens, are_positions=True),
    "patch_embeddings.projection.weight": adapt_to_patch_size,
    "relative_position_bias.tables": partial(
        adapt_to_grid, lambda tables, old, new, _: resample_bias_tables(tables, old, new)
    ),
    "gates.gates": adapt_gates,
    "distillation_classifier": adapt_distillation_head,
}


# Loading ------------------------------------------------------------------------------------------
# Patterns of former parameter names -> current names.
RENAMED_PARAMETERS = {
    r"\bview\.tables": "relative_position_bias.tables",
    r"\.second_share": ".lambda_full",
}


class MismatchedWeightsError(ValueError, RuntimeError):
    """Raised if weights do not match the configuration.

    It is a RuntimeError, as in transformers, and a ValueError, like other errors of files.
    """


def load_checkpoint(load: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `load` (a `from_pretrained` method); raise one-line errors that name the checkpoint.

    Raises:
        OSError: if the folder, config.json or the weights are missing or damaged.
        MismatchedWeightsError: if the weights do not match the configuration.
    """
    check_checkpoint_folder(
        source, needs_config_file=kwargs.get("config") is None and not kwargs.get("subfolder")
    )
    try:
        model_or_tuple = load(source, *args, **{"key_mapping": RENAMED_PARAMETERS, **kwargs})
    except Exception as error:  # raised again below; the error of safetensors is not imported
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
            raise MismatchedWeightsError(
                describe_mismatch(load, source, *args, **kwargs)
            ) from error

        is_damaged = type(error).__name__ == "SafetensorError"
        if is_damaged or (isinstance(error, OSError) and "\n" in str(error)):
            prefix = "the weights in " if is_damaged else ""
            raise OSError(
                f"cannot load {prefix}{source}: {' '.join(str(error).split())}"
            ) from error
        raise

    model = model_or_tuple[0] if isinstance(model_or_tuple, tuple) else model_or_tuple
    # by default, transformers would save the model with the former names
    model._weight_conversions = []
    if isinstance(model, PreTrainedModel):
        align_weights(model)
    return model_or_tuple


def align_weights(model: PreTrainedModel) -> None:
    """Copy weights on the CPU to addresses that are multiples of 64 bytes.

    PyTorch allocates memory at such addresses, but transformers maps files into memory, where the
    address of a weight depends on the length of the file's header. MKL rounds products of one row
    in float32 differently if the address is not a multiple of 16 bytes: a model that is saved with
    one more weight would have different outputs for single images.
    """
    for parameter in model.parameters():
        is_plain = type(parameter) is torch.nn.Parameter and parameter.device.type == "cpu"
        if is_plain and parameter.data_ptr() % 64:
            parameter.data = parameter.data.clone()


def check_checkpoint_folder(source: Any, needs_config_file: bool) -> None:
    """Raise OSError if a local path is not a checkpoint folder.

    Hub ids and None (a state dict) are not checked.
    """
    folder = Path("." if source is None else source)
    if not folder.exists() and (
        folder.is_absolute() or len(folder.parts) > 2 or str(source).startswith((".", "~"))
    ):
        raise OSError(f"there is no folder {source}. Check the path")
    if (
        source is not None
        and folder.is_dir()
        and needs_config_file
        and not (folder / "config.json").is_file()
    ):
        raise OSError(
            f"there is no config.json in {source}. Save the model with save_pretrained to write "
            "this file"
        )


def describe_mismatch(load: Callable[..., Any], source: Any, *args: Any, **kwargs: Any) -> str:
    """Load the checkpoint again, and return a message that names a weight of another shape."""
    _, loading_info = load(
        source, *args, **{**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
    )
    name, saved_shape, expected_shape = min(loading_info["mismatched_keys"])
    return (
        f"the weights in {source} do not match the model: {name} has shape {list(saved_shape)}, "
        f"but the model requires {list(expected_shape)}. Use the checkpoint's configuration, or "
        "set ignore_mismatched_sizes=True"
    )
