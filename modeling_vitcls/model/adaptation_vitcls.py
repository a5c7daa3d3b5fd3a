# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""Change the special tokens, image size or patch size of a model.

    model = ViTCLSModel.from_pretrained(path, num_register_tokens=4)    # while loading
    model = model.adapt(image_size=[256, 384], num_register_tokens=4)   # after loading

No training is required, but fine-tuning may improve the adapted model. The table `ADAPTERS`
determines how each weight is adapted, and every change is logged in one line:

    tokens                 the first are kept; a new token that a head reads starts as a twin: the sum of
                           a token that it read before and its position. Others: `config.token_init`
    token positions        the first position embeddings are kept; new position embeddings are zero
    patch positions        resampled (`config.position_interpolation`)
    patch projection       resized with FlexiViT's pseudo-inverse
    classifier             with cls_pooling="concat", new tokens get columns of zeros
    distillation head      a new head is a copy of the classifier, if that reads one CLS token;
                           otherwise, it is random, and `distillation_inference` becomes "cls"
    class statistics       kept if the features have the same width
    fading in              a token that was kept goes on where it was
    other weights          newly initialized if they are missing or their shape changes

Added tokens are faded in (`TokenFadeIn`): before training, they do not affect the other tokens.
`token_fade_in_steps=0` adds ordinary tokens at once.
"""

import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Self, cast

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging

from .attention_masks_vitcls import TokenFadeIn, list_last_tokens, resample_bias_tables
from .configuration_vitcls import ADAPTABLE_FIELDS, ViTCLSConfig
from .field_checks_vitcls import HUB_KEYWORDS, find_checkpoint
from .positions_vitcls import resample_positions, resize_patch_kernel
from .token_layout_vitcls import COUNT_FIELDS, TOKEN_KINDS, count_added_tokens, keep_fading_tokens


logger = logging.get_logger(__name__)

# Arguments of `from_pretrained` that configurations do not accept
MODEL_KEYWORDS = ("dtype", "torch_dtype", "quantization_config", "state_dict")


class AdaptableModel(PreTrainedModel):
    """A `PreTrainedModel` that is adapted while loading (`from_pretrained`) or later (`adapt`)."""

    config: ViTCLSConfig

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint, and adapt the model if arguments change its `ADAPTABLE_FIELDS`.

        The checkpoint is a folder or a Hub id: of a vitcls model or, with the package installed, of
        any ViT that docs/converting.md lists, also `timm:NAME` and a file of weights. Another ViT is
        converted exactly, once.

        `token_fade_in_steps` is explained in `adapt`; other arguments are passed to
        `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: if configuration fields contradict each other, or the checkpoint is of another
                model, and cannot be converted.
        """
        source = find_checkpoint(pretrained_model_name_or_path, kwargs)
        config_class = cast(type[ViTCLSConfig], cls.config_class)
        config, kwargs = resolve_config(config_class, source, kwargs)
        old_fields = {} if config is None else read_adaptable_fields(config_class, source, kwargs)

        changes = {
            name: getattr(config, name)
            for name, value in old_fields.items()
            if getattr(config, name) != value
        }
        if changes:
            if kwargs.get("quantization_config") is not None:
                raise ValueError(
                    f"{next(iter(changes))} cannot be changed while weights are quantized. Load the "
                    "checkpoint without quantization_config, save the adapted model, and quantize that"
                )
            # The weights are loaded into the old shapes, and adapted afterwards. The old sizes need
            # not be valid together with the new values of other fields.
            kwargs["config"] = replace_fields(config, old_fields, validate=False)

        model_or_tuple: Any = super().from_pretrained(source, *model_args, **kwargs)
        has_loading_info = isinstance(model_or_tuple, tuple)  # output_loading_info=True
        model = model_or_tuple[0] if has_loading_info else model_or_tuple
        align_weights(model)
        if source is not pretrained_model_name_or_path:  # Adapters and cards name the source
            model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        # Before `adapt`, so that it counts only tokens that are still faded in
        replace_learned_gates(model)
        remove_open_fade_in(model)

        if getattr(model, "class_distance", None) is not None:
            model.class_distance.check(model.base_model)
        if not changes:
            return model_or_tuple
        model = model.adapt(**changes)
        return (model, *model_or_tuple[1:]) if has_loading_info else model

    def adapt(self, **changes: Any) -> Self:
        """Build a model with other values of `ADAPTABLE_FIELDS`, and adapt the weights to it.

        If no field changes, this model is returned. A new model has no hooks, and plain modules;
        gradient checkpointing stays on.

        Args:
            changes: new values of `ADAPTABLE_FIELDS`. `token_fade_in_steps` is the number of training
                passes over which the added tokens are faded in. Until the first one, they are hidden
                from the other tokens, so the logits stay the same. Set 0 for tokens that act at once:
                for flash and flex attention, which support no fading, and for a model with random
                weights, which requires none.

        Raises:
            ValueError: if a field cannot be adapted, the new values contradict other fields, or the
                model is quantized or has adapters of PEFT.
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
        check_weights_are_plain(self)

        config = replace_fields(self.config, changes | get_fade_in_fields(self.config, changes))
        pools_all = config.pooling == "attention" and config.attention_pool_tokens == "all"
        has_more_tokens = sum(config.token_counts) > sum(self.config.token_counts)
        if config.fading_tokens and pools_all and has_more_tokens:
            raise ValueError(
                '`attention_pool_tokens="all"` would read new tokens, although they are still hidden. '
                "Set `token_fade_in_steps=0` if the logits may change"
            )
        ignore_unready_parts(self.config, config, count_hidden_tokens(self))

        model = self.new_like(config)
        # transformers' `to` is untyped
        model.to(device=self.device, dtype=self.dtype)  # type: ignore[call-arg]
        load_adapted_weights(self, model)
        statistics: Any = getattr(self, "class_distance", None) if config.class_statistics else None
        if statistics is not None and statistics.is_valid:
            # New tokens that are hidden and another size of the positions change no features.
            cast(Any, model).class_distance.claim(model.base_model)
        if hasattr(self, "_loss_function"):
            model.loss_function = self.loss_function
        if any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            model.gradient_checkpointing_enable()
        model.train(self.training)
        return model

    def new_like(self, config: ViTCLSConfig) -> Self:
        """Build a newly initialized model of this class for another configuration."""
        return type(self)(config)

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[Any, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Save as in transformers; tokens that training has faded in completely are ordinary tokens.

        Class statistics of other weights than those that are saved are no longer used. The model in
        memory stays as it is, because the other processes of a run do not save.
        """
        if "--" in str(getattr(self.config, "auto_map", "")):
            # transformers asks whether to save the code, which is in another repository; before 5.24, the
            # class says so
            self._auto_class = None
            self.is_remote_code = bool  # type: ignore[method-assign]
        encoder: Any = self.base_model
        fade_in, fields = encoder.fade_in, dict(vars(self.config))
        remove_open_fade_in(self)
        if state_dict is not None and encoder.fade_in is None:
            state_dict = {
                name: value
                for name, value in state_dict.items()
                if not name.endswith("fade_in.progress")
            }
        statistics: Any = getattr(self, "class_distance", None)
        digests = None if statistics is None else statistics.digests
        if statistics is not None and is_main_process:
            statistics.digests = self.renew_digests(statistics, state_dict)
            if state_dict is not None and "class_distance.digests" in state_dict:
                state_dict = {**state_dict, "class_distance.digests": statistics.digests}
        try:
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
        finally:
            encoder.fade_in = fade_in
            if statistics is not None:
                statistics.digests = digests
            for config in (self.config, encoder.config):
                config.fading_tokens = fields["fading_tokens"]
                config.token_fade_in_steps = fields["token_fade_in_steps"]

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Push the model; if the package is imported, it checks the right to push before."""
        package = sys.modules.get("modeling_vitcls", PreTrainedModel)
        return package.push_to_hub(self, *args, **kwargs)

    def _upload_modified_files(self, *args: Any, **kwargs: Any) -> Any:
        """Upload the folder that `push_to_hub` saved; with the model's card, if the package is imported."""
        package = sys.modules.get("modeling_vitcls", PreTrainedModel)
        return package._upload_modified_files(self, *args, **kwargs)

    def renew_digests(self, statistics: Any, state_dict: Mapping[str, Tensor] | None) -> Tensor:
        """Compute the digests of the weights that are saved; zeros if the statistics are of others."""
        prefix = f"{self.base_model_prefix}."
        weights = {
            name.removeprefix(prefix): weight
            for name, weight in (state_dict or self.state_dict(keep_vars=True)).items()
            if name.startswith(prefix)
        }
        digests: Tensor | None = statistics.renew(weights)
        if digests is not None:
            return digests
        if statistics.digests.any():
            logger.warning(
                "class statistics (`distance`, `unknown`): the saved model does not use them, because its "
                "encoder has other weights"
            )
        return torch.zeros(statistics.digests.shape, dtype=torch.uint8)


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
    if source is None:  # The caller passes a state dict instead of a checkpoint
        return {}
    hub_kwargs = {name: kwargs[name] for name in HUB_KEYWORDS if name in kwargs}
    try:
        config_dict, _ = config_class.get_config_dict(source, **hub_kwargs)
    except OSError:
        return {}
    fields = {
        name: config_dict.get(name, getattr(config_class, name))
        for name in ADAPTABLE_FIELDS
        if config_dict
    }
    if neurons := fields.get("register_neurons"):  # JSON has texts as keys
        fields["register_neurons"] = {int(layer): numbers for layer, numbers in neurons.items()}
    return fields


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


def check_weights_are_plain(model: AdaptableModel) -> None:
    """Raise ValueError unless a model has the weights of its configuration, in memory."""
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            "a model with offloaded weights cannot be adapted: load it without device_map, save the "
            "adapted model, and load that with device_map"
        )
    with torch.device("meta"):
        expected = model.new_like(model.config).state_dict()
    missing = expected.keys() - model.state_dict().keys()
    if missing or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "a quantized, pruned or shortened model cannot be adapted, nor one with adapters: adapt it before, "
            "or merge them: `model = peft_model.merge_and_unload()`"
        )


def replace_learned_gates(model: AdaptableModel) -> None:
    """Replace the learned gates of an old folder with a `TokenFadeIn` that goes on from their values."""
    encoder: Any = model.base_model
    gates = getattr(encoder, "gates", None)
    if gates is None:
        return
    for config in (model.config, encoder.config):
        config.fading_tokens = config.gated_tokens or config.fading_tokens
        config.gated_tokens = None
    fade_in = TokenFadeIn(encoder.config)
    if not gates.gates.is_meta:
        fade_in.progress = (gates.get_values() * fade_in.FULL).round().long()
    encoder.fade_in = fade_in.train(encoder.training)
    encoder.gates = None


def remove_open_fade_in(model: AdaptableModel) -> None:
    """Make the tokens of a model ordinary ones, if training has faded all of them in."""
    encoder: Any = model.base_model
    fade_in = getattr(encoder, "fade_in", None)
    if not isinstance(fade_in, TokenFadeIn):  # PEFT has wrapped it
        return
    fade_in.find_open_tokens()
    if fade_in.is_open:
        encoder.fade_in = None
        for config in (model.config, encoder.config):
            config.fading_tokens = None
            config.token_fade_in_steps = type(config).token_fade_in_steps


def get_fade_in_fields(config: ViTCLSConfig, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Decide which tokens are faded in after `changes`, and over how many passes."""
    steps = changes.get("token_fade_in_steps", config.token_fade_in_steps)
    if changes.get("register_neurons"):
        steps = 0  # A test-time register is used without training
    num_added = count_added_tokens(vars(config), changes)
    remaining = keep_fading_tokens(config.fading_tokens, num_added)
    fading_tokens = dict(changes.get("fading_tokens", remaining) or {})
    for kind in TOKEN_KINDS:
        added = num_added.get(kind.count_field, 0)
        if kind.is_faded_in and added > fading_tokens.get(kind.group, 0):
            fading_tokens[kind.group] = added

    if not steps or not fading_tokens:
        # Tokens that somebody adds later are faded in, whatever was asked for these
        return {"fading_tokens": None, "token_fade_in_steps": type(config).token_fade_in_steps}
    return {"fading_tokens": fading_tokens, "token_fade_in_steps": steps}


def count_hidden_tokens(model: AdaptableModel) -> dict[str, int]:
    """Count the last tokens of each group that are hidden: without them, nothing changes."""
    fade_in: Any = model.base_model.fade_in
    counts = dict.fromkeys(COUNT_FIELDS, 0)
    if fade_in is None or fade_in.progress.is_meta:
        return counts
    tokens = list_last_tokens(model.config, model.config.fading_tokens)
    for (group, _), progress in zip(tokens, fade_in.progress.tolist(), strict=True):
        counts[group] = 0 if progress else counts[group] + 1
    return counts


def ignore_unready_parts(
    old_config: ViTCLSConfig, config: ViTCLSConfig, hidden_tokens: Mapping[str, int]
) -> None:
    """Set the fields of a new configuration so that it reads nothing random, and log each change.

    `hidden_tokens` is from `count_hidden_tokens`.
    """
    has_new_head = config.has_distillation_head and not old_config.has_distillation_head
    is_random = has_new_head and not can_copy_classifier(old_config)
    if is_random and config.distillation_inference == "mean":
        config.distillation_inference = "cls"
        logger.warning(
            'distillation_inference: "cls", because the new distillation head is random. After '
            'training, set it to "mean" or "distillation"'
        )

    num_old = old_config.num_distillation_tokens
    num_new = config.num_distillation_tokens
    if num_old and num_new > num_old and num_new % num_old:
        raise ValueError(
            f"num_distillation_tokens={num_new} changes the mean of the {num_old} that the head reads. "
            f"Choose {2 * num_old}"
        )

    num_old = old_config.num_cls_tokens
    reads_new_tokens = config.num_cls_tokens > num_old > 0 and config.pooled_cls_tokens is None
    # Twins leave a mean as it is, if each token has equally many; the classifier ignores what is
    # concatenated, but a norm or a linear layer before it mixes all.
    are_mixed: dict[Any, Any] = {
        "first": False,
        "mean": config.num_cls_tokens % max(num_old, 1) or config.cls_scopes,
        "concat": config.pooled_norm or config.pooled_activation,
    }
    if reads_new_tokens and are_mixed[config.cls_pooling]:
        config.pooled_cls_tokens = list(range(num_old))
        logger.warning(
            f"pooled_cls_tokens: {config.pooled_cls_tokens}, so the logits stay the same"
        )
    reads_all = config.pooled_cls_tokens is None and config.cls_pooling != "first"
    if config.num_cls_tokens > num_old and not (
        config.tasks or (reads_all and config.pooling.startswith("cls"))
    ):
        logger.warning(
            "num_cls_tokens: no head reads the new CLS tokens. A head that is trained anew reads all with "
            'pooling="cls" and cls_pooling="mean" or "concat"'
        )

    if config.class_statistics and not keeps_features(old_config, config, hidden_tokens):
        config.class_statistics = config.distance_threshold = None
        logger.warning(
            "class statistics (`distance`, `unknown`): dropped, because only tokens that are still "
            "hidden can be added or removed without another effect on the features"
        )
    elif config.distance_threshold and config.image_height_width != old_config.image_height_width:
        config.distance_threshold = None
        logger.warning("distance_threshold: dropped, because it is of another image size")


def keeps_features(
    old_config: ViTCLSConfig, config: ViTCLSConfig, hidden_tokens: Mapping[str, int]
) -> bool:
    """Tell whether only hidden tokens are new or gone; other sizes are as in a forward pass."""
    counts = {field: getattr(config, field) for field in COUNT_FIELDS.values()}
    has_all_tokens = all(
        getattr(old_config, field) - counts[field] <= hidden_tokens[group]
        for group, field in COUNT_FIELDS.items()
    )
    is_mean = old_config.num_cls_tokens > config.num_cls_tokens and config.cls_pooling == "mean"
    return (
        has_all_tokens
        and not is_mean
        and get_fade_in_fields(old_config, counts)["fading_tokens"] == config.fading_tokens
        and old_config.cls_scopes == config.cls_scopes
        and old_config.patch_height_width == config.patch_height_width
        and old_config.compute_pooled_size("cls", 1) == config.compute_pooled_size("cls", 1)
    )


def can_copy_classifier(config: ViTCLSConfig) -> bool:
    """Tell whether the classifier reads one CLS token, so it can also read that token's twin."""
    num_pooled = len(config.pooled_cls_tokens or range(config.num_cls_tokens))
    reads_one_token = config.cls_pooling == "first" or num_pooled == 1
    has_plain_pooler = not config.pooled_norm and config.pooled_activation is None
    return (
        config.pooling == "cls"
        and reads_one_token
        and has_plain_pooler
        and not config.cls_scopes  # a twin sees the whole image
    )


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

    for name, initial_value in new_weights.items():
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
            note = note and f"{note}; frozen, as before"
        initial_value.copy_(weight)
        if note:
            logger.warning(f"{name}: {note}")

    for name in sorted(old_weights.keys() - new_weights.keys()):
        if not name.startswith("class_distance."):  # `ignore_unready_parts` has said so
            logger.warning(f"{name}: dropped")


class AdaptationContext(NamedTuple):
    """Inputs of an adapter: a weight, the weights of the old model, and both configurations."""

    name: str
    initial_value: Tensor  # The newly initialized weight
    # The weight with this name in the old model; None if there is no such weight
    old_value: Tensor | None
    old_weights: Mapping[str, Tensor]
    old_config: ViTCLSConfig
    new_config: ViTCLSConfig


# The adapted weight, and a description of the change (empty if unchanged)
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

    The position embeddings of new tokens are zero.
    """
    new_weight = (
        torch.zeros_like(context.initial_value) if are_positions else context.initial_value.clone()
    )
    if context.new_config.register_neurons and context.name.endswith("register_tokens"):
        new_weight.zero_()  # A test-time register is not trained (arXiv 2506.08010, section 4)
    twins = None if are_positions else list_twins(context)
    if twins is not None:
        new_weight = twins[:, torch.arange(new_weight.shape[1]) % twins.shape[1]]
    old_weight = new_weight[:, :0] if context.old_value is None else context.old_value
    num_old_tokens = old_weight.shape[1]
    num_kept = min(num_old_tokens, new_weight.shape[1])
    new_weight[:, :num_kept] = old_weight[:, :num_kept]

    if num_old_tokens == num_kept == new_weight.shape[1]:
        return new_weight, ""

    return new_weight, (
        f"{num_kept} kept, {num_old_tokens - num_kept} dropped, {new_weight.shape[1] - num_kept} added"
        f"{' (twins until their losses differ)' if twins is not None and num_kept < new_weight.shape[1] else ''}"
    )


def list_twins(context: AdaptationContext) -> Tensor | None:
    """List the values [1, n, D] with which new tokens have the outputs of the tokens read before.

    The result is None for tokens that no head reads: as copies, they would learn the same.
    """
    config = context.old_config
    kinds = {kind.group: kind for kind in TOKEN_KINDS}
    kind = next(kind for kind in TOKEN_KINDS if context.name.endswith(kind.parameter))
    reads_cls = context.new_config.cls_pooling == "mean" or context.new_config.tasks
    if kind.twin_of is None or (kind.group == "cls" and not reads_cls):
        return None

    tokens = slice(None)
    source = kind
    if not getattr(config, kind.count_field):
        source = kinds[kind.twin_of]
        first = (config.pooled_cls_tokens or [0])[0]
        tokens = slice(first, first + 1)
    prefix = context.name.rpartition(".")[0]
    values = context.old_weights.get(f"{prefix}.{source.parameter}")
    if values is None:
        return None
    positions = context.old_weights.get(f"{prefix}.position_embeddings.{source.group}")
    return values[:, tokens] if positions is None else (values + positions)[:, tokens]


def adapt_to_size(
    field: str, unit: str, resize: Callable[..., Tensor], context: AdaptationContext
) -> AdaptedWeight:
    """Resize a weight if a size of the configuration, (height, width) in `unit`, changes."""
    weight = context.old_weights[context.name]
    old, new = (getattr(each, field) for each in (context.old_config, context.new_config))
    if old == new:
        return weight, ""
    note = f"resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} {unit}"
    return resize(weight, old, new, context.new_config), note


def adapt_distillation_head(context: AdaptationContext) -> AdaptedWeight:
    """Keep the distillation head; a new one is a copy of the classifier, if that reads CLS alone."""
    if context.old_value is not None:
        return context.old_value, ""
    if not can_copy_classifier(context.old_config):
        return context.initial_value, "newly initialized"
    classifier = context.old_weights[context.name.replace("distillation_classifier", "classifier")]
    return classifier, "initialized as a copy of the classifier"


def adapt_classifier(context: AdaptationContext) -> AdaptedWeight:
    """Keep the columns of the tokens that the head read before; columns of new ones are zero."""
    old, new = context.old_config, context.new_config
    weight = context.old_value
    if weight is None or len(weight) != len(context.initial_value):  # Other labels
        return context.initial_value, "newly initialized"
    if weight.shape == context.initial_value.shape:
        return weight, ""
    poolings = [old.pooling] * len(old.pooled_layer_indices)
    task = context.name.partition("task_")[2].removesuffix(".weight")
    if task:
        poolings = list(old.get_extra_heads()[task].layer_poolings)
    sizes = [old.compute_pooled_size(pooling, 1) for pooling in poolings]
    if old.cls_pooling != "concat" or sum(sizes) != weight.shape[-1]:
        return context.initial_value, "newly initialized"

    blocks: list[Tensor] = []
    for pooling, block in zip(poolings, weight.split(sizes, dim=1), strict=True):
        num_columns = old.hidden_size * old.num_cls_tokens * pooling.startswith("cls")
        num_new = new.hidden_size * new.num_cls_tokens * pooling.startswith("cls")
        columns = block[:, : min(num_columns, num_new)]
        zeros = columns.new_zeros(len(weight), num_new - columns.shape[1])
        blocks += [columns, zeros, block[:, num_columns:]]
    return torch.cat(blocks, dim=1), "columns of new tokens are zero"


def adapt_fade_in(context: AdaptationContext) -> AdaptedWeight:
    """Keep the progress [n] of kept tokens.

    New tokens start at 0, and existing tokens that were ordinary ones at 1.
    """
    progress = context.initial_value.clone()
    old_values = () if context.old_value is None else context.old_value
    old_tokens = list_last_tokens(context.old_config, context.old_config.fading_tokens)
    old_progress = dict(zip(old_tokens, old_values, strict=True))
    fading_tokens = list_last_tokens(context.new_config, context.new_config.fading_tokens)
    old_counts = {
        group: getattr(context.old_config, field) for group, field in COUNT_FIELDS.items()
    }

    for row, (group, index) in enumerate(fading_tokens):
        if index < old_counts[group]:
            progress[row] = old_progress.get((group, index), TokenFadeIn.FULL)

    if set(fading_tokens) == set(old_tokens):
        return progress, ""
    num_kept = len(set(old_tokens) & set(fading_tokens))
    num_hidden = sum(index >= old_counts[group] for group, index in fading_tokens)
    return progress, (
        f"{num_kept} kept, {len(old_tokens) - num_kept} dropped, {num_hidden} hidden until training"
    )


# Substring of a parameter's name -> function that adapts the parameter.
ADAPTERS: dict[str, Callable[[AdaptationContext], AdaptedWeight]] = {
    **{f"embeddings.{kind.parameter}": adapt_tokens for kind in TOKEN_KINDS},
    # The first key that is part of the name decides, so the patches come before the other
    # positions.
    "position_embeddings.patches": partial(
        adapt_to_size, "grid_size", "patches", resample_positions
    ),
    "position_embeddings.": partial(adapt_tokens, are_positions=True),
    "patch_embeddings.projection.weight": partial(
        adapt_to_size,
        "patch_height_width",
        "pixels per patch",
        lambda kernel, _old, new, _config: resize_patch_kernel(kernel, new),
    ),
    "relative_position_bias.tables": partial(
        adapt_to_size,
        "grid_size",
        "patches",
        lambda tables, old, new, _config: resample_bias_tables(tables, old, new),
    ),
    "fade_in.progress": adapt_fade_in,
    "distillation_classifier": adapt_distillation_head,
    "classifier.": adapt_classifier,
    "extra_heads.": adapt_classifier,
}


# Loading ------------------------------------------------------------------------------------------
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
