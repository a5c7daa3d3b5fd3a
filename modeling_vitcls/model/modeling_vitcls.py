# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""The models, with the data flow of a forward pass:

    pixel_values -> embeddings -> layers -> layernorm -> pooler -> classifier -> loss

    ViTCLSModel                        the encoder; its output contains the tokens of each group
    ViTCLSForImageClassification       one classifier, and a second one for distillation tokens
    ViTCLSForMultiTaskClassification   one CLS token, one classifier and one loss per task
    ViTCLSForMaskedImageModeling       reconstruction of masked patches
    ViTCLSBackbone                     feature maps for dense prediction

blocks_vitcls.py contains the embeddings and layers; heads_vitcls.py contains the poolers,
classifiers and losses. Other files contain optional features: positions_vitcls.py (rotary),
attention_masks_vitcls.py, and adaptation_vitcls.py (different special tokens and sizes).
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    MaskedImageModelingOutput,
)
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .adaptation_vitcls import AdaptableModel
from .attention_masks_vitcls import (
    LayerIndices,
    LearnedGates,
    RelativePositionBias,
    TokenFadeIn,
    build_attention_mask,
    compute_token_attention,
)
from .blocks_vitcls import (
    ATTENTION_CLASSES,
    LAYER_CLASSES,
    LayerScale,
    LearnedPositionEmbeddings,
    RegisterNeurons,
    ViTCLSAttention,
    ViTCLSDifferentialAttention,
    ViTCLSEmbeddings,
    ViTCLSLayer,
    ViTCLSLayers,
    build_norm,
)
from .configuration_vitcls import ViTCLSConfig
from .field_checks_vitcls import Size
from .heads_vitcls import (
    ALL_TOKENS,
    IGNORED_LABEL,
    AttentionPooler,
    ClassDistance,
    ExtraHeads,
    PixelDecoder,
    build_classifier,
    build_pooler,
    compute_classification_loss,
    compute_cross_entropy,
    compute_distillation_loss,
    compute_masked_pixel_loss,
    count_modules,
)
from .positions_vitcls import MixedRotaryEmbeddings, build_rotary_embeddings
from .token_layout_vitcls import COUNT_FIELDS


# Outputs ------------------------------------------------------------------------------------------
@dataclass
class ViTCLSModelOutput(BaseModelOutputWithPooling):
    """Output of `ViTCLSModel`.

    Attributes:
        last_hidden_state: [B, N, D], after the final norm.
        pooler_output: [B, P], the input of a classifier (`config.pooling`, `config.pooled_layers`);
            None if the model has no pooler.
        hidden_states: the embeddings and the output of each layer before the final norm, [B, N, D]
            each, if requested: `hidden_states[1]` is of layer 1.
        attentions: the attention weights [B, heads, N, N] of each layer, if requested; requires
            eager attention. As in transformers, `attentions[0]` is of layer 1.
        tokens: dict that maps "cls", "distillation", "registers" and "patches" to their tokens
            [B, n, D], views of `last_hidden_state`. None while the model is traced or exported,
            because the graph would have these outputs twice: `config.token_layout.split` makes them.
        layer_tokens: dict that maps layers, from 1, to tokens [B, N, D] after the final norm, if
            `output_layers` was passed.

    As a tuple, an output has the four values of transformers' encoders, without `tokens` and
    `layer_tokens`.
    """

    tokens: dict[str, Tensor] | None = None
    layer_tokens: dict[int, Tensor] | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        values = [getattr(self, field.name) for field in fields(BaseModelOutputWithPooling)]
        return tuple(value for value in values if value is not None)


@dataclass
class ViTCLSImageClassifierOutput(ModelOutput):
    """Output of `ViTCLSForImageClassification`.

    Attributes:
        loss: the loss (see `ViTCLSForImageClassification.forward`), if labels were given.
        logits: [B, num_labels], the logits selected by `config.distillation_inference`; in training
            mode, the mean of both classifiers.
        cls_logits: [B, num_labels], the output of the classifier on the pooled tokens.
        distillation_logits: [B, num_labels], the output of the distillation classifier, if the
            model has one.
        task_logits: dict that maps the names of `config.extra_heads` to logits [B, labels], if the
            model has any.
        distance: [B], Mahalanobis distance to the nearest class mean, in evaluation mode, if the
            model has class statistics of its present weights.
        hidden_states, attentions: as in `ViTCLSModelOutput`.
        tokens: as in `ViTCLSModelOutput`, if `output_tokens=True` was passed.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cls_logits: Tensor | None = None
    distillation_logits: Tensor | None = None
    task_logits: dict[str, Tensor] | None = None
    distance: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    tokens: dict[str, Tensor] | None = None


@dataclass
class ViTCLSMultiTaskOutput(ModelOutput):
    """Output of `ViTCLSForMultiTaskClassification`.

    Attributes:
        loss: sum of `losses`, if labels were given.
        losses: dict that maps task names to losses, for tasks with labels.
        logits: dict that maps task names to logits [B, num_labels].
        task_logits: as in `ViTCLSImageClassifierOutput`.
        hidden_states, attentions, tokens: as in `ViTCLSImageClassifierOutput`.
    """

    loss: Tensor | None = None
    losses: dict[str, Tensor] | None = None
    logits: dict[str, Tensor] | None = None
    task_logits: dict[str, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    tokens: dict[str, Tensor] | None = None


# Base class ---------------------------------------------------------------------------------------
class ViTCLSPreTrainedModel(AdaptableModel):
    """Base class of all models, with methods for loading, saving and initialization.

    Examples:
        >>> from modeling_vitcls import ViTCLSModel
        >>> model = ViTCLSModel.from_pretrained("runs/photos", num_register_tokens=4)
        >>> model.config.token_counts
        (1, 0, 4)
    """

    base_model_prefix = "vitcls"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViTCLSEmbeddings", *(layer.__name__ for layer in LAYER_CLASSES.values())]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # Special tokens that a classifier computes in the last layer; a packed model sets it (`pack`)
    num_output_tokens: int | None = None
    _can_record_outputs = {"hidden_states": ViTCLSLayer, "attentions": ViTCLSAttention}
    _input_embed_layer = "patch_embeddings"
    # A model without class statistics may be loaded from a file that has them, and the reverse.
    _keys_to_ignore_on_load_unexpected = [r"^class_distance\."]
    _keys_to_ignore_on_load_missing = [r"^class_distance\."]

    def __init__(self, config: ViTCLSConfig, *args: Any, **kwargs: Any) -> None:
        if not config._skip_validation:
            # The configuration was checked when it was built, but its fields may have changed
            # since.
            config.validate()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize weights (truncated normal), biases (0) and tokens (`config.token_init`)."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            init.trunc_normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, ViTCLSEmbeddings):
            stds = {"trunc_normal": std, "near_zero": 1e-6, "zeros": 0.0}
            draw = init.trunc_normal_ if self.config.token_init == "trunc_normal" else init.normal_
            for tokens in module.get_special_tokens().values():
                draw(tokens, std=stds[self.config.token_init])
            if module.mask_token is not None:
                init.trunc_normal_(module.mask_token, std=std)
        elif isinstance(module, LearnedPositionEmbeddings | AttentionPooler):
            for parameter in module.parameters(recurse=False):
                init.trunc_normal_(parameter, std=std)
        elif isinstance(module, LayerScale):
            init.constant_(module.lambda1, module.init_value)
        elif isinstance(module, MixedRotaryEmbeddings):
            init.copy_(module.frequencies, module.get_initial_frequencies())
        elif isinstance(module, RelativePositionBias):
            init.zeros_(module.tables)
        elif isinstance(module, ViTCLSDifferentialAttention):
            init.constant_(module.lambda_full, module.LAMBDA_INIT)
            init.constant_(module.head_norm.weight, 1 - module.LAMBDA_INIT)
        elif isinstance(module, TokenFadeIn):
            init.zeros_(module.progress)
        elif isinstance(module, LearnedGates):
            init.zeros_(module.gates)
        elif isinstance(module, ClassDistance):
            for buffer in module.buffers(recurse=False):
                init.zeros_(buffer)  # a file without statistics has none
        else:
            super()._init_weights(module)  # Norms

    def no_weight_decay(self) -> set[str]:
        """Name the parameters that timm's optimizers do not decay: all but weights of linear and patch layers."""
        layers = [each for each in self.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
        decayed = {id(layer.weight) for layer in layers}
        return {name for name, weight in self.named_parameters() if id(weight) not in decayed}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Describe the depth of parameters, from embeddings to heads, for the layer decay of timm."""
        layers = [(r"^(?:vitcls\.)?layers\.(\d+)", None), (r"^(?:vitcls\.)?layernorm", (99999,))]
        return {"stem": r"^(?:vitcls\.)?embeddings", "blocks": layers[0][0] if coarse else layers}

    def token_attention(
        self,
        pixel_values: Tensor,
        tokens: Sequence[str] = tuple(COUNT_FIELDS),
        layers: LayerIndices = "all",
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Compute what the special tokens attend to, for any attention implementation.

        The values equal the rows of eager attention maps without dropout. One forward pass computes
        only these rows instead of full maps. To disable gradients of the output, use
        `torch.no_grad()`.

        Args:
            pixel_values: [B, C, H, W].
            tokens: one or more of "cls", "distillation" and "registers".
            layers: "all", or a list of layers, from 1 as in `config.pooled_layers`; negative ones count
                from the last layer.
            attention_mask: as in `forward`.

        Returns:
            [batch, layer, head, special token, key], with tokens and keys in the order of
            `config.token_layout`. Each row sums to 1. With differential attention, the head axis
            contains two consecutive maps per head.

        Raises:
            KeyError: if a token group does not exist.
            ValueError: if the images have an unsupported shape, or a layer does not exist, such as 0.
        """
        return compute_token_attention(self, pixel_values, attention_mask, tokens, layers)


# Encoder ------------------------------------------------------------------------------------------
class ViTCLSModel(ViTCLSPreTrainedModel):
    """A Vision Transformer (arXiv 2010.11929) with configurable special tokens, no classifier.

    Examples:
        >>> import torch
        >>> from modeling_vitcls import ViTCLSConfig, ViTCLSModel
        >>> model = ViTCLSModel(ViTCLSConfig.from_preset("tiny", num_register_tokens=4)).eval()
        >>> outputs = model(torch.randn(1, 3, 224, 224))
        >>> {name: tokens.shape[1] for name, tokens in outputs.tokens.items()}
        {'cls': 1, 'distillation': 0, 'registers': 4, 'patches': 196}
    """

    def __init__(self, config: ViTCLSConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config)
        layer_class = LAYER_CLASSES[config.layer_type]  # ViTCLSLayer by default
        attention_class = ATTENTION_CLASSES[config.attention_type]  # ViTCLSAttention by default
        # A model with one layer has no depth over which the drop path rate could grow.
        last_layer_index = max(config.num_hidden_layers - 1, 1)

        self.embeddings = ViTCLSEmbeddings(config)
        self.rotary_positions = build_rotary_embeddings(config)
        has_position_bias = config.relative_position_bias != "none"
        self.relative_position_bias = RelativePositionBias(config) if has_position_bias else None
        self.fade_in = TokenFadeIn(config) if config.fading_tokens else None
        # Of old folders; `from_pretrained` replaces it
        self.gates = LearnedGates(config) if config.gated_tokens else None

        self.layers = ViTCLSLayers(
            layer_class(config, config.drop_path_rate * index / last_layer_index, attention_class)
            for index in range(config.num_hidden_layers)
        )
        for number, neurons in (config.register_neurons or {}).items():
            mlp: Any = self.layers[int(number) - 1].mlp
            mlp.norm = RegisterNeurons(config, neurons)

        self.layernorm = build_norm(config) if config.final_norm else None
        self.pooler = build_pooler(config) if add_pooling_layer else None
        self.post_init()

    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_output_tokens: int | None = None,
        interpolate_pos_encoding: bool = True,
        output_layers: Collection[int] = (),
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViTCLSModelOutput:
        """Encode images.

        Args:
            pixel_values: [B, C, H, W]; images of any size with at least one patch.
            bool_masked_pos: [B, rows * columns]; True for patches that are replaced with the mask
                token.
            attention_mask: [B, N] for all tokens, special tokens first; 1 for visible tokens, 0 for
                hidden tokens. It hides keys from attention; poolings other than CLS still read all patches.
            num_output_tokens: number of special tokens to compute in the last layer and return.
                Default: all tokens, also if hidden states or attentions are requested.
            interpolate_pos_encoding: has no effect, because positions are always interpolated to
                the image size.
            output_layers: indices of layers, from 1 to `num_hidden_layers`, whose tokens after the
                final norm are returned as `layer_tokens` (index -> [B, N, D]), and so are the
                last layer's and those in `config.pooled_layers`. The index -1 is the last layer
                with all tokens: if `num_output_tokens` limits it, it is computed again.
            output_hidden_states, output_attentions, return_dict: as in all transformers models.

        Raises:
            ValueError: if images or masks have an unsupported shape.
            TypeError: if an argument is unknown.
        """
        # transformers' classes accept any keyword, so a misspelled one would be ignored without an
        # error.
        for name, value in kwargs.items():
            # PEFT passes the inputs of language models, which are None
            if value is not None and name not in TransformersKwargs.__annotations__:
                raise TypeError(f"forward() got an unexpected argument {name!r}")
        requested = ("output_hidden_states", "output_attentions")
        if any(kwargs.get(name, getattr(self.config, name)) for name in requested):
            num_output_tokens = None
        pooled_layers = self.pooled_layer_indices if self.pooler is not None else []
        num_layers = len(self.layers)
        read_layers = {num_layers, *pooled_layers, *output_layers}
        if max(read_layers) > num_layers:
            raise ValueError(
                f"the heads read layer {max(read_layers)}, but the model has {num_layers} layers. Set "
                "config.pooled_layers, or remove the heads that read it"
            )

        hidden_states, inputs = self.embed(pixel_values, bool_masked_pos, attention_mask)
        # A person may have replaced the list
        layers = self.layers if isinstance(self.layers, ViTCLSLayers) else ViTCLSLayers(self.layers)
        limited = [*inputs[:-1], (*inputs[-1], num_output_tokens)]
        states = layers(hidden_states, limited, {*read_layers, num_layers - 1}, **kwargs)
        if ALL_TOKENS in output_layers:
            # The last layer again, as the first pass stays as it is: a product of more rows could
            # be rounded differently.
            states[ALL_TOKENS] = states[num_layers]
            if num_output_tokens is not None:
                states[ALL_TOKENS] = layers[-1](states[num_layers - 1], *inputs[-1], **kwargs)
        layer_tokens = {index: self.normalize(states[index]) for index in sorted(read_layers)}

        last_hidden_state = layer_tokens[num_layers]
        has_graph = torch.jit.is_tracing() or torch.compiler.is_exporting()
        return ViTCLSModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=self.pool(layer_tokens),
            tokens=None if has_graph else self.config.token_layout.split(last_hidden_state),
            layer_tokens=layer_tokens if output_layers else None,
        )

    def embed(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[tuple[Any, Any]]]:
        """Compute what the layers read: the tokens [B, N, D], and the mask and rotary positions of each layer.

        The arguments and errors are those of `forward`.
        """
        if not isinstance(pixel_values, Tensor):
            raise ValueError(
                f"pixel_values is a {type(pixel_values).__name__}: pass a tensor [B, C, H, W]"
            )

        # Image processors return float32, also for a model in half precision.
        patch_embeddings = self.embeddings.patch_embeddings
        pixel_values = pixel_values.to(patch_embeddings.projection.weight.dtype)
        grid_size = patch_embeddings.get_grid_size(pixel_values)
        hidden_states = self.embeddings(pixel_values, grid_size, bool_masked_pos)  # [B, N, D]

        # None, a value for all layers, or a list with one value per layer
        mask = position_embeddings = None
        # Without a mask, attention is faster. On a GPU, a small model takes as long as Python does,
        # so the default model also skips the call that would return None.
        fade_in = self.fade_in
        if fade_in is not None and fade_in.is_open:
            fade_in = None
        mask_modules = (self.relative_position_bias, fade_in)
        if attention_mask is not None or any(mask_modules) or self.config.cls_scopes:
            mask = build_attention_mask(
                self.config, hidden_states, attention_mask, grid_size, *mask_modules
            )
        if self.rotary_positions is not None:
            position_embeddings = self.rotary_positions(grid_size, hidden_states)
        columns = [
            each if isinstance(each, list) else [each] * len(self.layers)
            for each in (mask, position_embeddings)
        ]
        return hidden_states, list(zip(*columns, strict=True))

    @property
    def pooled_layer_indices(self) -> list[int]:
        """The pooled layers, from 1; negative ones count from the end of `layers`, also if shortened."""
        return self.config.resolve_layers(self.config.pooled_layers, len(self.layers))

    def pool(self, layer_tokens: Mapping[int, Tensor]) -> Tensor | None:
        """Pool the tokens [B, N, D] of layers to [B, P], if the model has a pooler."""
        if self.pooler is None:
            return None
        inputs = [layer_tokens[index] for index in self.pooled_layer_indices]
        pooled: Tensor = self.pooler(inputs if len(inputs) > 1 else inputs[0])
        return pooled

    def normalize(self, hidden_states: Tensor) -> Tensor:
        """Apply the final norm, if the model has one, to the output of a layer."""
        return hidden_states if self.layernorm is None else self.layernorm(hidden_states)

    def new_like(self, config: ViTCLSConfig) -> Self:
        """Return a new model for another configuration, with a pooler if this model has one."""
        return type(self)(config, add_pooling_layer=self.pooler is not None)


# Classifiers --------------------------------------------------------------------------------------
class ViTCLSForImageClassification(ViTCLSPreTrainedModel):
    """A ViT with a classifier on the pooled tokens.

    Models with a distillation head have a second classifier.

    Classifiers of further tasks (`config.extra_heads`) read the tokens of the same forward pass;
    the other outputs have the same bits as without them.

    Examples:
        >>> import torch
        >>> from modeling_vitcls import ViTCLSForImageClassification
        >>> model = ViTCLSForImageClassification.from_pretrained("runs/photos").eval()
        >>> logits = model(torch.randn(2, 3, 32, 32)).logits
        >>> logits.shape, model.config.id2label
        (torch.Size([2, 2]), {0: 'cat', 1: 'dog'})
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__(config)
        if config.tasks:
            raise ValueError(
                "config.tasks requires ViTCLSForMultiTaskClassification: use that class, or omit "
                "tasks"
            )
        self.vitcls = ViTCLSModel(config)
        self.build_classifiers()
        self.loss_function = compute_classification_loss
        self.extra_heads = ExtraHeads(config)
        self.class_distance = None if config.class_statistics is None else ClassDistance(config)
        self.post_init()

    def build_classifiers(self) -> None:
        """Build the classifiers of `config.num_labels` labels; extra heads build their own."""
        self.num_labels = self.config.num_labels
        num_added = sum(map(len, self.config.get_added_classes().values()))
        num_labels = (self.num_labels or 0) - num_added
        self.classifier = build_classifier(self.config, self.config.pooled_size, num_labels)
        self.distillation_classifier = None
        if self.config.has_distillation_head and num_labels:
            size = self.config.hidden_size * len(self.config.pooled_layer_indices)
            self.distillation_classifier = build_classifier(self.config, size, num_labels)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode, as in PyTorch; training ends the use of class statistics."""
        super().train(mode)
        if self.class_distance is not None:
            has_other_modules = count_modules(self.vitcls) != self.class_distance.num_modules
            if mode or has_other_modules:
                self.class_distance.drop("the model is in training mode or has adapters")
        return self

    @property
    def distance_layers(self) -> list[int]:
        """The layers that valid class statistics read in evaluation mode."""
        if self.class_distance is None or self.training:
            return []
        return self.class_distance.layers if self.class_distance.is_valid else []

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        output_tokens: bool = False,
        teacher_logits: Tensor | None = None,
        distillation_loss: str = "hard",
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViTCLSImageClassifierOutput:
        """Classify images.

        The loss is computed from `logits`. During training, a model with two classifiers uses the
        mean of both losses, so that both classifiers are trained. With a teacher, the loss is DeiT's
        (arXiv 2012.12877, section 4): the mean of the label loss of the classifier, and of the loss
        of the distillation classifier or, without one, of the same logits against the teacher. As in
        transformers, another label loss can be set: `model.loss_function = f`, called as
        `f(labels, logits, config, **kwargs)`.

        Args:
            labels, num_items_in_batch: as in `compute_classification_loss`.
            output_tokens: whether the last layer computes all tokens, and `tokens` are returned.
            teacher_logits, distillation_loss: [B, num_labels], and "hard" or "soft", as in
                `compute_distillation_loss`; only with `labels`.
            pixel_values, attention_mask and other arguments: as in `ViTCLSModel.forward`.
        """
        distance_layers = self.distance_layers
        # The distillation head reads its tokens in the layers that the classifier reads.
        has_second_head = self.distillation_classifier is not None
        distillation_layers = self.vitcls.pooled_layer_indices if has_second_head else []
        outputs = self.vitcls(
            pixel_values,
            attention_mask=attention_mask,
            num_output_tokens=None if output_tokens else self.num_output_tokens,
            output_layers={*self.extra_heads.layers, *distance_layers, *distillation_layers},
            **kwargs,
        )
        heads = self.apply_heads(
            outputs.layer_tokens or {}, outputs.pooler_output, has_distance=bool(distance_layers)
        )

        loss = None
        if labels is not None:
            read, second = ["logits"], heads["distillation_logits"]
            if teacher_logits is not None:
                read = ["cls_logits"]
            elif self.training and second is not None:
                read = ["cls_logits", "distillation_logits"]
            losses = [
                self.loss_function(labels, heads[name], self.config, **kwargs) for name in read
            ]
            if teacher_logits is not None:
                student = heads["cls_logits"] if second is None else second
                num_items = kwargs.get("num_items_in_batch")
                losses.append(
                    compute_distillation_loss(student, teacher_logits, distillation_loss, num_items)
                )
            loss = torch.stack(losses).mean()
        elif teacher_logits is not None:
            raise ValueError(
                "teacher_logits require labels, which label_smoothing_factor of Trainer takes away: set it to "
                "0, and a smoothed `model.loss_function`"
            )

        return ViTCLSImageClassifierOutput(
            loss=loss,
            **heads,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            tokens=self.config.token_layout.split(outputs.last_hidden_state)
            if output_tokens
            else None,
        )

    def apply_heads(
        self, layer_tokens: Mapping[int, Tensor], pooler_output: Tensor, has_distance: bool
    ) -> dict[str, Any]:
        """Compute what the heads return for the tokens of an encoder: logits and distance.

        Args:
            layer_tokens: layer index -> tokens [B, N, D] after the final norm.
            pooler_output: [B, P].
            has_distance: whether the class statistics belong to these weights.

        Returns:
            Fields of the output.
        """
        distance = self.class_distance(layer_tokens) if has_distance else None  # type: ignore[misc]
        logits = cls_logits = self.classifier(pooler_output)  # [B, num_labels]
        distillation_logits = None
        if self.distillation_classifier is not None:
            group = self.config.token_layout.distillation
            # [B, n, D] each
            tokens = [layer_tokens[layer][:, group] for layer in self.vitcls.pooled_layer_indices]
            # [B, layers * D]
            pooled = torch.cat([each.mean(dim=1) for each in tokens], dim=-1)
            distillation_logits = self.distillation_classifier(pooled)
            choices = {
                "mean": (cls_logits + distillation_logits) / 2,
                "cls": cls_logits,
                "distillation": distillation_logits,
            }
            # A loss of others, such as Trainer's label smoothing, also trains both classifiers
            logits = choices["mean" if self.training else self.config.distillation_inference]
        elif torch.onnx.is_in_onnx_export():
            # The graph would have the same output twice.
            cls_logits = None

        task_logits = self.extra_heads(layer_tokens)
        added_logits = [task_logits.pop(name) for name in self.extra_heads.added_classes]
        if added_logits:
            # a larger product would change the bits of the others
            own_logits = [] if isinstance(self.classifier, nn.Identity) else [logits]
            logits = torch.cat([*own_logits, *added_logits], dim=-1)
        return {
            "logits": logits,
            "cls_logits": cls_logits,
            "distillation_logits": distillation_logits,
            "task_logits": task_logits or None,
            "distance": distance,
        }


class ViTCLSForMultiTaskClassification(ViTCLSPreTrainedModel):
    """A ViT with one CLS token, one classifier and one loss for each task in `config.tasks`.

    Classifier i reads CLS token i of the `config.pooled_layers` and, with the pooling "cls_mean", the
    mean of the patches.

    Examples:
        >>> import torch
        >>> from modeling_vitcls import ViTCLSConfig, ViTCLSForMultiTaskClassification
        >>> tasks = {"age": 3, "species": 12}
        >>> config = ViTCLSConfig.from_preset("tiny", num_cls_tokens=2, tasks=tasks)
        >>> outputs = ViTCLSForMultiTaskClassification(config).eval()(torch.randn(1, 3, 224, 224))
        >>> {task: logits.shape[1] for task, logits in outputs.logits.items()}
        {'age': 3, 'species': 12}
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__(config)
        if not config.tasks:
            raise ValueError(
                "ViTCLSForMultiTaskClassification requires config.tasks, such as "
                'tasks={"species": 12}'
            )
        self.vitcls = ViTCLSModel(config, add_pooling_layer=False)
        self.build_classifiers()
        self.extra_heads = ExtraHeads(config)
        self.post_init()

    def build_classifiers(self) -> None:
        """Build the classifiers of `config.tasks`; extra heads build their own."""
        config = self.config
        num_tokens = 2 if config.pooling == "cls_mean" else 1  # In each layer
        size = config.hidden_size * num_tokens * len(config.pooled_layer_indices)
        self.classifiers = nn.ModuleDict(
            {
                # nn.Module has a method `type`
                f"task_{name}": build_classifier(config, size, len(labels))
                for name, labels in config.task_labels().items()
            }
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: dict[str, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        output_tokens: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViTCLSMultiTaskOutput:
        """Classify images for every task.

        Args:
            labels: dict that maps task names to class indices [B]. Tasks may be omitted. Labels of
                -100 are ignored.
            output_tokens: as in `ViTCLSForImageClassification.forward`.

        Raises:
            ValueError: if a task is unknown, or if a label is not a class index of the task.
        """
        pooled_layers = self.vitcls.pooled_layer_indices
        outputs = self.vitcls(
            pixel_values,
            attention_mask=attention_mask,
            num_output_tokens=None if output_tokens else self.num_output_tokens,
            output_layers={*pooled_layers, *self.extra_heads.layers},
            **kwargs,
        )

        heads = self.apply_heads(outputs.layer_tokens)

        loss = losses = None
        if labels is not None:
            losses = self.compute_losses(heads["logits"], labels)
            loss = torch.stack(list(losses.values())).sum()
            losses = {name: losses[name] for name in heads["logits"] if name in labels}

        return ViTCLSMultiTaskOutput(
            loss=loss,
            losses=losses,
            **heads,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            tokens=self.config.token_layout.split(outputs.last_hidden_state)
            if output_tokens
            else None,
        )

    def apply_heads(
        self,
        layer_tokens: Mapping[int, Tensor],
        pooler_output: Tensor | None = None,
        has_distance: bool = False,
    ) -> dict[str, Any]:
        """Compute the logits of all tasks for the tokens of an encoder; it has no pooler."""
        pooled = []
        for index in self.vitcls.pooled_layer_indices:
            tokens = layer_tokens[index]
            pooled.append(tokens[:, self.config.token_layout.cls])  # [B, tasks, D]
            if self.config.pooling == "cls_mean":
                patches = tokens[:, self.config.token_layout.patches]
                pooled.append(patches.mean(dim=1, keepdim=True).expand_as(pooled[-1]))
        features = torch.cat(pooled, dim=-1).unbind(dim=1)  # [B, P] of each task
        classifiers = zip(
            self.config.task_labels(), self.classifiers.values(), features, strict=True
        )
        logits = {name: classifier(values) for name, classifier, values in classifiers}
        return {"logits": logits, "task_logits": self.extra_heads(layer_tokens) or None}

    def compute_losses(
        self, logits: dict[str, Tensor], labels: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Compute the mean cross-entropy of each task over its labeled images.

        training/losses.py averages over all images.
        """
        if unknown_tasks := sorted(set(labels) - set(logits)):
            raise ValueError(
                f"labels contains the unknown task {unknown_tasks[0]!r}: use {', '.join(logits)}"
            )

        losses = {}
        for name, task_logits in logits.items():
            task_labels = labels.get(name)
            if task_labels is None:
                # All parameters must get gradients
                task_labels = torch.full((task_logits.shape[0],), IGNORED_LABEL)
            losses[name] = compute_cross_entropy(task_logits, task_labels, owner=f"task {name!r}")
        return losses


# Masked image modeling ----------------------------------------------------------------------------
class ViTCLSForMaskedImageModeling(ViTCLSPreTrainedModel):
    """A ViT for pre-training, which reconstructs masked patches (SimMIM, arXiv 2111.09886).

    Examples:
        >>> import torch
        >>> from modeling_vitcls import ViTCLSConfig, ViTCLSForMaskedImageModeling
        >>> model = ViTCLSForMaskedImageModeling(ViTCLSConfig.from_preset("tiny"))
        >>> mask = torch.rand(1, 196) < 0.6
        >>> loss = model(torch.randn(1, 3, 224, 224), bool_masked_pos=mask).loss
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        # The caller may build another model from its configuration, which must not have a mask
        # token then.
        config = copy.deepcopy(config)
        config.use_mask_token = True
        super().__init__(config)
        self.vitcls = ViTCLSModel(config, add_pooling_layer=False)
        self.decoder = PixelDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedImageModelingOutput:
        """Reconstruct images.

        Args:
            bool_masked_pos: [B, rows * columns]; True for masked patches. If None, no loss is
                computed.

        Returns:
            The loss over the masked pixels, and `reconstruction` [B, C, rows * patch height,
            columns * patch width], in the scale of `pixel_values` (normalized per patch if
            `config.norm_pixel_target`).
        """
        outputs = self.vitcls(
            pixel_values, bool_masked_pos=bool_masked_pos, attention_mask=attention_mask, **kwargs
        )
        # [B, rows * columns, D]
        patches = outputs.last_hidden_state[:, self.config.token_layout.patches]
        grid_size = self.vitcls.embeddings.patch_embeddings.get_grid_size(pixel_values)
        reconstruction = self.decoder(patches, grid_size)

        loss = None
        if bool_masked_pos is not None:
            loss = compute_masked_pixel_loss(
                reconstruction, pixel_values, bool_masked_pos, self.config
            )

        return MaskedImageModelingOutput(
            loss=loss,
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# Backbone -----------------------------------------------------------------------------------------
class ViTCLSBackbone(BackboneMixin, ViTCLSModel):
    """A ViT that returns feature maps for dense prediction.

    A feature map consists of the patch tokens of a layer, reshaped to a grid.

    Examples:
        >>> import torch
        >>> from modeling_vitcls import ViTCLSBackbone, ViTCLSConfig
        >>> config = ViTCLSConfig.from_preset("tiny", out_features=["stage6", "stage12"])
        >>> maps = ViTCLSBackbone(config).eval()(torch.randn(1, 3, 224, 224)).feature_maps
        >>> [tuple(feature_map.shape) for feature_map in maps]
        [(1, 192, 14, 14), (1, 192, 14, 14)]
    """

    def __init__(self, config: ViTCLSConfig) -> None:
        super().__init__(config, add_pooling_layer=False)
        if not config.reshape_hidden_states and not config.num_cls_tokens:
            raise ValueError(
                "reshape_hidden_states=False requires a CLS token. Set num_cls_tokens to 1 or more."
            )
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        """Compute the feature maps of `config.out_features`.

        Maps are [B, D, rows, columns], or [B, 1 + patches, D] (first CLS token and patches) if
        `config.reshape_hidden_states` is False. Without `config.apply_layernorm`, none is
        normalized.
        """
        # Since transformers 5.12, the decorator sets this itself; older versions need it here.
        kwargs["output_hidden_states"] = True
        outputs = ViTCLSModel.forward(self, pixel_values, attention_mask=attention_mask, **kwargs)
        # There are fewer if a person has shortened `layers`.
        stages = dict(zip(self.stage_names, outputs.hidden_states, strict=False))
        if missing := sorted(set(self.out_features) - set(stages)):
            raise ValueError(
                f"out_features has {missing[0]}, but the model has {len(self.layers)} layers. Set "
                "out_features of the backbone"
            )
        grid_size = self.embeddings.patch_embeddings.get_grid_size(pixel_values)
        feature_maps = [
            self.get_feature_map(stages[stage], grid_size) for stage in self.out_features
        ]
        return BackboneOutput(
            # Annotated as a tuple of length one
            feature_maps=tuple(feature_maps),  # type: ignore[arg-type]
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def get_feature_map(self, hidden_states: Tensor, grid_size: Size) -> Tensor:
        """Return the feature map of a stage with hidden states [B, N, D]."""
        if self.config.apply_layernorm:
            hidden_states = self.normalize(hidden_states)
        patches: Tensor = hidden_states[:, self.config.token_layout.patches]
        if not self.config.reshape_hidden_states:
            return torch.cat([hidden_states[:, :1], patches], dim=1)
        # [B, D, rows, columns]
        feature_map: Tensor = patches.transpose(1, 2).unflatten(2, grid_size).contiguous()
        return feature_map

    new_like = ViTCLSPreTrainedModel.new_like


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
