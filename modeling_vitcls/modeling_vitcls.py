"""The models. Data flows one way:

    pixel_values -> embeddings -> layers -> layernorm -> pooler -> head -> loss

    ViTCLSModel                        the encoder, with tokens by name
    ViTCLSForImageClassification       one label set; a second head where there is a distillation token
    ViTCLSForMultiTaskClassification   one CLS token, head and loss per task
    ViTCLSForMaskedImageModeling       reconstructs masked patches
    ViTCLSBackbone                     feature maps for dense prediction

Their parts, in the order of the data: embeddings_vitcls.py, rotary_vitcls.py, scopes_vitcls.py,
patch_dropout_vitcls.py, layers_vitcls.py, merging_vitcls.py, attention_vitcls.py, linear_vitcls.py,
last_layer_vitcls.py, heads_vitcls.py, losses_vitcls.py. What tokens attend to is read by token_attention_vitcls.py;
costs_vitcls.py counts operations and bytes.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, MaskedImageModelingOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .adaptation_vitcls import AdaptableModel
from .attention_vitcls import ViTCLSAttention, ViTCLSDifferentialAttention
from .configuration_vitcls import TokenLayout, ViTCLSConfig
from .costs_vitcls import ImageSize, MemoryEstimate, estimate_memory, forward_flops
from .embeddings_vitcls import LearnedPositions, ViTCLSEmbeddings
from .heads_vitcls import LOGIT_CHOICES, AttentionPooler, PixelDecoder, build_head, build_pooler, mean_token
from .last_layer_vitcls import num_tokens_read_by_heads, num_tokens_wanted
from .layers_vitcls import LAYERS, EncoderLayer, LayerScale, drop_path_rates
from .losses_vitcls import IGNORED_LABEL, classification_loss, cross_entropy, masked_pixel_loss
from .merging_vitcls import MergingLayer, run_merging_layers
from .norms_vitcls import build_norm
from .patch_dropout_vitcls import build_patch_dropout, require_all_patches
from .rotary_vitcls import ROTARY_POSITIONS, MixedRotaryPositions, Rotation
from .scopes_vitcls import DistanceView, NoGates, TokenGates, build_view
from .token_attention_vitcls import SPECIAL_TOKENS, Layers, read_token_attention


@dataclass
class ViTCLSModelOutput(BaseModelOutputWithPooling):
    """Output of `ViTCLSModel`.

    Attributes:
        last_hidden_state: [B, N, D], after the final LayerNorm; fewer patches in training with `patch_drop_rate`.
        pooler_output: [B, P], what a head would read (`config.pooling`); None without a pooler.
        hidden_states: on request, the embeddings and the output of each layer, [B, N, D] each, before that norm.
        attentions: on request and with eager attention, [B, heads, N, N] per layer.
        token_counts: numbers of CLS, distillation and register tokens, from which `tokens` is cut.
    """

    token_counts: tuple[int, int, int] | None = None

    @property
    def tokens(self) -> dict[str, torch.Tensor]:
        """`last_hidden_state` by group: "cls", "distillation", "registers", "patches", [B, n, D] each."""
        if self.last_hidden_state is None or self.token_counts is None:
            return {}
        layout = TokenLayout.from_counts(*self.token_counts)
        return {name: self.last_hidden_state[:, group] for name, group in layout.items()}


@dataclass
class ViTCLSImageClassifierOutput(ModelOutput):
    """Output of `ViTCLSForImageClassification`.

    Attributes:
        loss: where labels were given, that of `logits`.
        logits: [B, labels], the model's answer.
        cls_logits: [B, labels], of the class head.
        distillation_logits: [B, labels], of the distillation head, if there is one.
        hidden_states, attentions: as in `ViTCLSModelOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cls_logits: torch.Tensor | None = None
    distillation_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class ViTCLSMultiTaskOutput(ModelOutput):
    """Output of `ViTCLSForMultiTaskClassification`.

    Attributes:
        loss: sum of `losses`, where labels were given.
        losses: loss per task that has labels.
        logits: [B, labels of the task] per task.
        hidden_states, attentions: as in `ViTCLSModelOutput`.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    logits: dict[str, torch.Tensor] | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class ViTCLSPreTrainedModel(AdaptableModel):
    """Loading, saving and initialisation, common to all models here."""

    base_model_prefix = "vitcls"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTCLSEmbeddings", *(layer.__name__ for layer in (*LAYERS.values(), MergingLayer))]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": EncoderLayer, "attentions": ViTCLSAttention}
    _input_embed_layer = "patch_embeddings"

    def __init__(self, config: ViTCLSConfig, *args: Any, **kwargs: Any) -> None:
        if not config._unchecked:
            config.validate()  # fields may have been set since its construction
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Truncated normal weights, zero biases (ViT, DeiT); special tokens by `config.token_init`."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ViTCLSEmbeddings):
            for token in module.special_tokens().values():
                TOKEN_INITS[self.config.token_init](token, std)
            if module.mask_token is not None:
                init.trunc_normal_(module.mask_token, mean=0.0, std=std)
        elif isinstance(module, LearnedPositions):
            for positions in module.parameters(recurse=False):
                init.trunc_normal_(positions, mean=0.0, std=std)
        elif isinstance(module, LayerScale):
            init.constant_(module.lambda1, module.init_value)
        elif isinstance(module, AttentionPooler):
            init.trunc_normal_(module.probe, mean=0.0, std=std)
        elif isinstance(module, MixedRotaryPositions):
            init.copy_(module.frequencies, module.initial_frequencies())
        elif isinstance(module, DistanceView):
            init.zeros_(module.tables)
        elif isinstance(module, ViTCLSDifferentialAttention):
            init.constant_(module.second_share, module.INITIAL_SHARE)
            init.constant_(module.head_norm.weight, 1 - module.INITIAL_SHARE)
        elif isinstance(module, TokenGates):
            init.constant_(module.gates, module.SHUT)
        else:
            super()._init_weights(module)  # norms

    def token_attention(
        self,
        pixel_values: torch.Tensor,
        tokens: Sequence[str] = SPECIAL_TOKENS,
        layers: Layers = "all",
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What special tokens attend to, under any attention implementation, without whole attention maps.

        The same numbers as in those rows of `attentions` with eager attention, without dropout. Costs a forward pass
        and a few rows per layer; gradients flow, so wrap it in `torch.no_grad()` where none are needed.

        Args:
            pixel_values: [B, C, H, W].
            tokens: Groups of special tokens, of "cls", "distillation" and "registers".
            layers: "all", or indices from 0; negative ones count from the last.
            attention_mask: As in `forward`.

        Returns:
            [batch, layer, head, special token, key]: layers as asked for, tokens and keys in the order of
            `config.token_layout`, each row summing to 1. Differential attention has two maps per head, in its turn.
            Without any such token the fourth axis is 0 long.

        Raises:
            ValueError: for unknown groups, layers that do not exist, or images that do not fit the model.
        """
        return read_token_attention(self, pixel_values, attention_mask, tokens, layers)

    def flops(self, image_size: ImageSize = None, batch_size: int = 1) -> int:
        """Floating-point operations of a forward pass, a multiply-add counting as two (costs_vitcls.py).

        Counted are matrix products and the patch projection, as they are computed: the last layer only for the tokens
        that the heads read, all patches even if training drops some, and none of them merged. The backward pass takes
        about twice as many.

        Args:
            image_size: Height and width in pixels, or both in one. Default: the model's own.
            batch_size: Images.

        Raises:
            ValueError: for images smaller than a patch.
        """
        return forward_flops(self, image_size, batch_size)

    def memory_estimate(
        self,
        image_size: ImageSize = None,
        batch_size: int = 1,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> MemoryEstimate:
        """Bytes of a training step with AdamW: weights, gradients, moments, and what autograd keeps (costs_vitcls.py).

        An estimate: what autograd keeps is within a fifth of what was measured. It assumes fused attention unless the
        implementation is "eager", activations that keep their inputs, without what CPUs compute again
        (recomputing_vitcls.py), and one process; left out are what single operations need for a moment, the
        allocator's slack, and the images before they are moved or cast. Frozen parameters and gradient checkpointing
        count as they are set. Patch dropout counts unless embeddings and first layers are frozen.

        Args:
            image_size: Height and width in pixels, or both in one. Default: the model's own.
            batch_size: Images.
            autocast: The dtype of mixed precision, if it is used.
            device: Where the step is made, if the model is still elsewhere: CPUs keep less. Default: where it is.

        Raises:
            ValueError: for images smaller than a patch.
        """
        return estimate_memory(self, image_size, batch_size, autocast, device)


TOKEN_INITS: dict[str, Callable[[torch.Tensor, float], Any]] = {
    "trunc_normal": lambda token, std: init.trunc_normal_(token, mean=0.0, std=std),
    "near_zero": lambda token, std: init.normal_(token, std=1e-6),
    "zeros": lambda token, std: init.zeros_(token),
}


class ViTCLSModel(ViTCLSPreTrainedModel):
    """A Vision Transformer (arXiv 2010.11929) with configurable special tokens, without a classifier."""

    def __init__(self, config: ViTCLSConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        self.embeddings = ViTCLSEmbeddings(config)
        self.rotary_positions = ROTARY_POSITIONS[config.position_embedding_type](config)
        self.view = build_view(config)
        self.gates = TokenGates(config) if config.gated_tokens else NoGates(config)
        self.patch_dropout = build_patch_dropout(config)
        layer_class, self.run_layers = LAYERS[config.layer_type], run_layers
        if config.merged_patches_per_layer:
            layer_class, self.run_layers = MergingLayer, run_merging_layers
        self.layers = nn.ModuleList(
            layer_class(config, index, rate) for index, rate in enumerate(drop_path_rates(config))
        )
        self.layernorm = build_norm(config) if config.final_norm else nn.Identity()
        self.pooler = build_pooler(config) if add_pooling_layer else None
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        num_tokens_read: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViTCLSModelOutput:
        """Encode images.

        Args:
            pixel_values: [B, C, H, W], of any size of at least one patch.
            bool_masked_pos: [B, rows * columns], true for patches to replace by the mask token.
            attention_mask: [B, N] over all tokens, special tokens first; 1 where a token may be attended to.
            num_tokens_read: Compute the last layer only for so many special tokens, from the first on, and return
                only these (last_layer_vitcls.py). Default: all tokens.
            output_hidden_states, output_attentions, return_dict: as everywhere in transformers.

        Raises:
            ValueError: for images or masks that do not fit the model.
            TypeError: for an argument that is not known.
        """
        _reject_unknown_arguments(kwargs)
        pixel_values = pixel_values.to(self.embeddings.patch_embeddings.projection.weight.dtype)
        grid = self.embeddings.patch_embeddings.grid_of(pixel_values)

        hidden_states = self.embeddings(pixel_values, bool_masked_pos)  # [B, N, D]
        masks = self.gates(self.view(hidden_states, attention_mask, grid), hidden_states)  # one per layer
        rotations = self.rotary_positions(grid, hidden_states)  # one per layer
        hidden_states, masks, rotations = self.patch_dropout(hidden_states, masks, rotations)  # [B, n, D] in training
        num_tokens = [*[None] * (len(self.layers) - 1), num_tokens_read]  # per layer; None is all
        hidden_states = self.run_layers(self.layers, hidden_states, masks, rotations, num_tokens, **kwargs)
        sequence = self.layernorm(hidden_states)  # [B, N, D]

        return ViTCLSModelOutput(
            last_hidden_state=sequence,
            pooler_output=self.pooler(sequence) if self.pooler is not None else None,
            token_counts=self.config.token_counts,
        )

    def rebuilt(self, config: ViTCLSConfig) -> Self:
        """A model of the same parts with fresh weights, for another configuration."""
        return type(self)(config, add_pooling_layer=self.pooler is not None)


class ViTCLSForImageClassification(ViTCLSPreTrainedModel):
    """A ViT with a classifier on the pooled tokens, and a second one on the distillation token if there is one."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__(config)
        if config.tasks:
            raise ValueError(
                "config.tasks is for ViTCLSForMultiTaskClassification: use that class, or leave tasks out"
            )
        self.num_labels = config.num_labels
        self.vitcls = ViTCLSModel(config)
        self.classifier = build_head(config, config.pooled_size, config.num_labels)
        self.distillation_classifier = None
        if config.has_distillation_head and config.num_labels:
            self.distillation_classifier = build_head(config, config.hidden_size, config.num_labels)
        self.choose_logits = LOGIT_CHOICES[config.distillation_inference]
        self.num_tokens_read = num_tokens_read_by_heads(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViTCLSImageClassifierOutput:
        """Classify images; `labels` (and `num_items_in_batch`) as in `classification_loss`, the rest as `ViTCLSModel`.

        The loss is that of `logits`; in training, where there are two heads, the mean of theirs, so that both learn.
        Distillation from a teacher is the training loop's.
        """
        wanted = num_tokens_wanted(self.num_tokens_read, self.config, kwargs)
        outputs = self.vitcls(pixel_values, attention_mask=attention_mask, num_tokens_read=wanted, **kwargs)
        logits = cls_logits = self.classifier(outputs.pooler_output)  # [B, labels]
        distillation_logits = None
        if self.distillation_classifier is not None:
            distillation_logits = self.distillation_classifier(mean_token(outputs.tokens["distillation"]))
            logits = self.choose_logits(cls_logits, distillation_logits)
        loss = None
        if labels is not None:
            learning = [logits]
            if self.training and distillation_logits is not None:
                learning = [cls_logits, distillation_logits]
            num_items = kwargs.get("num_items_in_batch")
            losses = [classification_loss(answer, labels, self.config, num_items) for answer in learning]
            loss = torch.stack(losses).mean()
        return ViTCLSImageClassifierOutput(
            loss=loss,
            logits=logits,
            cls_logits=cls_logits,
            distillation_logits=distillation_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ViTCLSForMultiTaskClassification(ViTCLSPreTrainedModel):
    """One CLS token, classifier and loss per task of `config.tasks`, on a shared encoder."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__(config)
        if not config.tasks:
            raise ValueError('ViTCLSForMultiTaskClassification needs config.tasks, such as tasks={"species": 12}')
        self.vitcls = ViTCLSModel(config, add_pooling_layer=False)
        self.classifiers = nn.ModuleDict(
            {
                f"task_{name}": build_head(config, config.hidden_size, len(labels))  # torch reserves "type" and more
                for name, labels in config.task_labels().items()
            }
        )
        self.num_tokens_read = num_tokens_read_by_heads(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: dict[str, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViTCLSMultiTaskOutput:
        """Classify images for every task.

        Args:
            labels: task -> class per image [B]. Tasks may be missing, and so may single labels (-100).

        Raises:
            ValueError: for labels of an unknown task, or beyond a task's classes.
        """
        wanted = num_tokens_wanted(self.num_tokens_read, self.config, kwargs)
        outputs = self.vitcls(pixel_values, attention_mask=attention_mask, num_tokens_read=wanted, **kwargs)
        cls_tokens = outputs.tokens["cls"].unbind(dim=1)
        logits = {
            name: classifier(token)
            for name, classifier, token in zip(
                self.config.task_labels(), self.classifiers.values(), cls_tokens, strict=True
            )
        }
        loss = losses = None
        if labels is not None:
            losses = self.task_losses(logits, labels)
            loss = torch.stack(list(losses.values())).sum()
            losses = {name: losses[name] for name in logits if name in labels}
        return ViTCLSMultiTaskOutput(
            loss=loss,
            losses=losses,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def task_losses(self, logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Cross-entropy of each task; 0 for one without labels, so that distributed training misses no head."""
        if unknown := sorted(set(labels) - set(logits)):
            raise ValueError(f"labels for unknown task {unknown[0]!r}: the tasks are {', '.join(logits)}")
        return {
            name: cross_entropy(answer, self.labels_of(name, answer, labels), task=f"task {name!r}")
            for name, answer in logits.items()
        }

    @staticmethod
    def labels_of(name: str, logits: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """The labels [B] of one task, all to be ignored where there are none."""
        if name not in labels:
            return torch.full((logits.shape[0],), IGNORED_LABEL, device=logits.device)
        return labels[name].to(logits.device)


class ViTCLSForMaskedImageModeling(ViTCLSPreTrainedModel):
    """Pre-training by filling in masked patches: mask token in, linear decoder out (SimMIM, arXiv 2111.09886)."""

    def __init__(self, config: ViTCLSConfig) -> None:
        config = copy.deepcopy(config)  # the caller's stays as it was
        config.use_mask_token = True
        super().__init__(config)
        self.vitcls = ViTCLSModel(config, add_pooling_layer=False)
        self.decoder = PixelDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedImageModelingOutput:
        """Reconstruct images.

        Args:
            bool_masked_pos: [B, rows * columns], true for masked patches. Without it there is no loss.

        Returns:
            loss over the masked pixels, and `reconstruction` [B, C, rows * patch height, columns * patch width], in
            the scale of `pixel_values` (normalised per patch with `config.norm_pixel_target`).
        """
        require_all_patches(self, self.config)
        outputs = self.vitcls(pixel_values, bool_masked_pos=bool_masked_pos, attention_mask=attention_mask, **kwargs)
        grid = self.vitcls.embeddings.patch_embeddings.grid_of(pixel_values)
        reconstruction = self.decoder(outputs.tokens["patches"], grid)
        loss = None
        if bool_masked_pos is not None:
            loss = masked_pixel_loss(reconstruction, pixel_values, bool_masked_pos, self.config)
        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class ViTCLSBackbone(BackboneMixin, ViTCLSModel):
    """Feature maps of chosen layers for dense prediction: the patches alone, on their grid."""

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """Feature maps of `config.out_features`, [B, D, rows, columns] each, or [B, rows * columns, D] with
        `config.reshape_hidden_states=False`; the last stage, and with `config.apply_layernorm` all, normalised.
        """
        require_all_patches(self, self.config)
        outputs = ViTCLSModel.forward(self, pixel_values, attention_mask=attention_mask, **kwargs)
        grid = self.embeddings.patch_embeddings.grid_of(pixel_values)
        feature_maps = [
            self.feature_map(hidden_states, stage, grid)
            for stage, hidden_states in zip(self.stage_names, outputs.hidden_states, strict=True)
            if stage in self.out_features
        ]
        return BackboneOutput(
            feature_maps=tuple(feature_maps),  # type: ignore[arg-type]  # transformers types it as a tuple of one
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def feature_map(self, hidden_states: torch.Tensor, stage: str, grid: tuple[int, int]) -> torch.Tensor:
        """The patches of one stage's hidden states [B, N, D]."""
        if self.config.apply_layernorm or stage == self.stage_names[-1]:
            hidden_states = self.layernorm(hidden_states)
        patches = hidden_states[:, self.config.token_layout.patches]
        if not self.config.reshape_hidden_states:
            return patches
        return patches.transpose(1, 2).unflatten(2, grid).contiguous()  # [B, D, rows, columns]

    def rebuilt(self, config: ViTCLSConfig) -> Self:
        """A backbone with fresh weights, for another configuration."""
        return type(self)(config)


def run_layers(
    layers: Iterable[nn.Module],
    hidden_states: torch.Tensor,
    masks: Sequence[Any],
    rotations: Sequence[Rotation],
    num_tokens: Sequence[int | None],
    **kwargs: Any,
) -> torch.Tensor:
    """Through all layers, [B, N, D] -> [B, N or fewer, D]; masks, rotations and numbers of tokens: one per layer."""
    for layer, mask, rotation, number in zip(layers, masks, rotations, num_tokens, strict=True):
        hidden_states = layer(hidden_states, mask, rotation, number, **kwargs)
    return hidden_states


def _reject_unknown_arguments(kwargs: Mapping[str, Any]) -> None:
    for name in kwargs:
        if name not in TransformersKwargs.__annotations__:
            raise TypeError(f"forward() got an unexpected argument {name!r}")


# Saving copies this file and its siblings beside the weights.
ViTCLSModel.register_for_auto_class("AutoModel")
ViTCLSForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ViTCLSForMultiTaskClassification.register_for_auto_class("AutoModelForImageClassification")
ViTCLSForMaskedImageModeling.register_for_auto_class("AutoModelForMaskedImageModeling")
ViTCLSBackbone.register_for_auto_class("AutoBackbone")

__all__ = [
    "ViTCLSPreTrainedModel",
    "ViTCLSModel",
    "ViTCLSForImageClassification",
    "ViTCLSForMultiTaskClassification",
    "ViTCLSForMaskedImageModeling",
    "ViTCLSBackbone",
]
