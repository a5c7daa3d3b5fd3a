# Copyright 2026 The modeling_vitcls maintainers
# SPDX-License-Identifier: Apache-2.0
"""The configuration of a ViT: its special tokens, and all other choices of its architecture.

The token order is the same in the whole package:

    [ CLS x k | distillation x d | register x r | patches ]

`config.token_layout` has a slice for each group. A text below each field explains it;
scripts/tools/make_field_tables.py writes these texts to docs/configuration.md. A model with a valid
configuration can be built and run: the checks of single fields are in field_checks_vitcls.py, and
the checks of fields that depend on one another are at the end of this file.
"""

import transformers


MIN_TRANSFORMERS_VERSION = (5, 4)
if tuple(map(int, transformers.__version__.split(".")[:2])) < MIN_TRANSFORMERS_VERSION:
    raise ImportError(
        f"This checkpoint requires transformers >= {'.'.join(map(str, MIN_TRANSFORMERS_VERSION))}, "
        f"but {transformers.__version__} is installed. Run: pip install -U transformers"
    )

import copy
import dataclasses
import difflib
import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .field_checks_vitcls import (
    MAX_LABELS,
    MAX_PATCH_SIDE,
    MAX_PATCHES,
    Size,
    activation,
    between,
    extent,
    find_checkpoint,
    finite,
    positive,
    probability,
    raise_one_line_errors,
    rate,
    shorten_errors,
    to_pair,
    token_count,
    width,
)
from .token_layout_vitcls import (
    COUNT_FIELDS,
    GROUPS_WITH_POSITIONS,
    TokenGroup,
    TokenLayout,
    check_scopes,
    count_added_tokens,
    keep_fading_tokens,
)


logger = logging.get_logger(__name__)

# Auto class -> file and class. Every checkpoint contains the complete map, so that each Auto class
# finds its code.
AUTO_MAP = {
    "AutoConfig": "configuration_vitcls.ViTCLSConfig",
    "AutoModel": "modeling_vitcls.ViTCLSModel",
    "AutoModelForImageClassification": "modeling_vitcls.ViTCLSForImageClassification",
    "AutoModelForMaskedImageModeling": "modeling_vitcls.ViTCLSForMaskedImageModeling",
    "AutoBackbone": "modeling_vitcls.ViTCLSBackbone",
}

# transformers' remote code loader copies the files that these lines name. As imports, they would
# form a ring.
_COPIED_FILES = """
from .adaptation_vitcls import *
from .attention_masks_vitcls import *
from .blocks_vitcls import *
from .field_checks_vitcls import *
from .heads_vitcls import *
from .image_processing_vitcls import *
from .modeling_vitcls import *
from .positions_vitcls import *
from .token_layout_vitcls import *
"""

# Width and number of layers; a head has 64 channels, and an MLP is four times as wide as the tokens
PRESETS: dict[str, dict[str, int]] = {
    name: {
        "hidden_size": width,
        "num_attention_heads": width // 64,
        "num_hidden_layers": num_layers,
        "intermediate_size": 4 * width,
    }
    for name, width, num_layers in (
        ("tiny", 192, 12),
        ("small", 384, 12),
        ("base", 768, 12),
        ("large", 1024, 24),
    )
}

# Keywords that are not fields of `ViTCLSConfig`, but that transformers passes to every
# configuration or stores in it.
TRANSFORMERS_KEYWORDS = set(
    (
        "num_labels output_attentions attn_implementation _attn_implementation "
        "experts_implementation torch_dtype name_or_path auto_map code_version model_type "
        "quantization_config use_cache tie_word_embeddings out_features out_indices stage_names "
        "gradient_checkpointing per_layer_config tie_last_hidden_states"
    ).split()
)

# The class statistics were fitted to the labels, and to what these fields say about the features.
FEATURE_FIELDS = (
    "cls_pooling pooled_cls_tokens num_hidden_layers hidden_act layer_norm_eps num_attention_heads "
    "layer_type norm_type mlp_type final_norm position_embedding_type rope_theta rope_periods "
    "rope_reference_grid rope_coordinates rope_axes rope_grid_offset"
).split()

# A classifier was fitted to what these fields select, too: other layers, or another vector of a layer.
HEAD_FIELDS = (
    FEATURE_FIELDS
    + ("pooling pooled_layers pooled_activation attention_pool_tokens attention_pool_heads").split()
)

# Fields for which `from_pretrained(..., field=value)` adapts the weights of a checkpoint
# (adaptation_vitcls.py).
ADAPTABLE_FIELDS = [
    *COUNT_FIELDS.values(),
    *(
        "image_size patch_size cls_scopes fading_tokens token_fade_in_steps register_neurons "
        "extra_heads token_init"
    ).split(),
]

# Attention implementations that config.json may name. In transformers, other values may name a
# repository of compiled kernels, and a downloaded file must not choose code to run.
STORED_ATTENTIONS = ("sdpa", "eager", "flex_attention")


# Extra heads --------------------------------------------------------------------------------------
# Names that an extra head cannot have, because exported graphs have outputs with these names.
RESERVED_OUTPUT_NAMES = "logits cls_logits distillation_logits distance cls_attention".split()

ExtraPooling = Literal["cls", "mean", "cls_mean", "max"]


@shorten_errors
@strict
@dataclasses.dataclass
class ExtraHead:
    """An entry of `ViTCLSConfig.extra_heads`, with default values.

    Attributes:
        labels: label names, in the order of the logits.
        pooling: "cls", "mean", "cls_mean" or "max"; or a list with one of them for each of the
            layers.
        pooled_layers: layers whose tokens are pooled, as in `ViTCLSConfig`.
        problem_type: "single_label_classification" or "multi_label_classification".
        threshold: for several labels per image, the probability from which a label is predicted.
        adds_classes: whether the logits are appended to `logits`: the head then adds classes to the
            classifier, and its labels are the last ones of `id2label`.
    """

    labels: list[str]
    pooling: ExtraPooling | list[ExtraPooling] = "cls"
    pooled_layers: list[int] | None = None
    problem_type: Literal["single_label_classification", "multi_label_classification"] = (
        "single_label_classification"
    )
    threshold: float | int | None = probability(default=None)
    adds_classes: bool = False

    def validate_head(self) -> None:
        """Check that each layer has a pooling, and that added classes share a softmax."""
        if len(self.layer_poolings) != len(self.pooled_layers or [-1]):
            raise ValueError("`pooling` must be one, or one for each of `pooled_layers`")
        if self.adds_classes and self.problem_type == "multi_label_classification":
            raise ValueError("`adds_classes` requires the default `problem_type`")

    @property
    def layer_poolings(self) -> list[ExtraPooling]:
        """The pooling of each layer."""
        if isinstance(self.pooling, list):
            return self.pooling
        return [self.pooling] * len(self.pooled_layers or [-1])


class ExtraHeadsConfig:
    """The part of `ViTCLSConfig` that is about `extra_heads`."""

    def get_extra_heads(self: Any) -> dict[str, ExtraHead]:
        """Build an `ExtraHead` for each entry of `extra_heads`, sorted by name."""
        return {
            name: ExtraHead(**fields) for name, fields in sorted((self.extra_heads or {}).items())
        }

    def get_added_tasks(self) -> dict[str, ExtraHead]:
        """Select the extra heads that do not add classes, sorted by name."""
        return {
            name: head for name, head in self.get_extra_heads().items() if not head.adds_classes
        }

    def get_added_classes(self) -> dict[str, list[str]]:
        """Select the labels of the extra heads that add classes: head -> labels."""
        return {
            name: head.labels for name, head in self.get_extra_heads().items() if head.adds_classes
        }

    def validate_extra_heads(self: Any) -> None:
        """Check the names of the extra heads, and that the model has the tokens that they read."""
        for name, fields in (self.extra_heads or {}).items():
            owner = f"`extra_heads`: {name!r}"
            self._check_head_name(
                "extra_heads", name, (*RESERVED_OUTPUT_NAMES, *(self.tasks or ()))
            )
            with raise_one_line_errors(f"{owner}: "):
                head = ExtraHead(**fields)
            is_binary = head.problem_type == "multi_label_classification" or head.adds_classes
            self._check_label_names(owner, head.labels, min_labels=1 if is_binary else 2)
            self._check_layers(f"{owner}: `pooled_layers`", head.pooled_layers)
            reads_cls = any("cls" in pooling for pooling in head.layer_poolings)
            if reads_cls and not self.num_cls_tokens:
                raise ValueError(
                    f'{owner} requires a CLS token, but the model has none. Set `pooling="mean"`.'
                )

        added_labels = [label for labels in self.get_added_classes().values() for label in labels]
        labels = [label for _, label in sorted((self.id2label or {}).items())]
        last_labels = labels[-len(added_labels) :]
        if added_labels and (self.tasks or last_labels != added_labels):
            raise ValueError(
                "`extra_heads`: the labels of heads with `adds_classes` must be the last ones of "
                f"`id2label`, which are {last_labels[:3]}. Append them, or set `extra_heads={{}}`."
            )

    def _check_head_name(self, field: str, name: str, reserved: Sequence[str] = ()) -> None:
        """Check that the name of a head is free, and can be a part of the names of its weights."""
        if not name.isidentifier() or name in reserved:
            raise ValueError(
                f"`{field}`: {name!r} is not a free name. Use another one, of letters, digits and "
                "underscores."
            )

    def _check_label_names(self, owner: str, labels: Sequence[Any], min_labels: int = 1) -> None:
        """Check the number of label names, and that none repeats."""
        if not min_labels <= len(labels) <= MAX_LABELS or len(set(labels)) != len(labels):
            raise ValueError(f"{owner} requires {min_labels} to {MAX_LABELS:,} distinct labels.")


# The configuration --------------------------------------------------------------------------------
@shorten_errors
@strict
class ViTCLSConfig(ExtraHeadsConfig, BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of a Vision Transformer with CLS, distillation and register tokens.

    The defaults describe ViT-B/16 (arXiv 2010.11929, table 1) at 224 x 224 pixels: one CLS token
    and 196 patches. A text below each field explains it, and docs/configuration.md has these texts as
    tables. The last 33 fields are for converted checkpoints.

    **Tokens, and what reads them:** `num_cls_tokens`, `num_distillation_tokens`,
    `num_register_tokens`, `token_init`, `cls_scopes`, `token_fade_in_steps`, `register_neurons`,
    `tasks`, `pooling`, `cls_pooling`, `pooled_cls_tokens`, `pooled_layers`, `distillation_head`,
    `distillation_inference`.

    Raises:
        ValueError: If a field has a wrong type or value, fields contradict each other, or a keyword
            is unknown.

    Examples:
        >>> from modeling_vitcls import ViTCLSConfig
        >>> config = ViTCLSConfig(num_cls_tokens=2, num_register_tokens=4, image_size=224)
        >>> config.token_counts, config.grid_size
        ((2, 0, 4), (14, 14))
    """

    model_type = "vitcls"
    is_registered = False  # Whether transformers' Auto classes know this class
    # Whether to skip validation. True only while loading a checkpoint whose weights are then
    # adapted.
    _skip_validation: ClassVar[bool] = False
    # Outputs that Trainer does not collect as predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cls_logits",
        "distillation_logits",
        "task_logits",
        "distance",
        "losses",
        "hidden_states",
        "attentions",
        "tokens",
    ]
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "layernorm": "keep_full_weight",
    }

    # Fields of transformers, whose types `strict` checks only if they stand in this file
    architectures: list[str] | None = None
    id2label: dict[int, str] | dict[str, str] | None = None
    label2id: dict[str, int] | dict[str, str] | None = None
    problem_type: (
        Literal["regression", "single_label_classification", "multi_label_classification"] | None
    ) = None

    # Tokens, and what reads them
    num_cls_tokens: int = token_count(default=1)
    """Number of CLS tokens, at the start of the sequence. With 0, the model has no CLS token.
    Several CLS tokens can represent tasks (`tasks`) or regions of the image (`cls_scopes`)."""
    num_distillation_tokens: int = token_count(default=0)
    """Number of tokens that learn from a teacher (DeiT, arXiv 2012.12877)."""
    num_register_tokens: int = token_count(default=0)
    """Number of register tokens, which can store global information that the model would otherwise
    store in patches (Darcet et al. 2023, arXiv 2309.16588)."""
    token_init: Literal["trunc_normal", "near_zero", "zeros"] = "trunc_normal"
    """Initial values of the special tokens: truncated normal with standard deviation
    `initializer_range` (DeiT, DINO), normal with standard deviation 1e-6 (timm, DINOv2), or zero
    (ViT). `"zeros"` raises an error if tokens would remain identical during training."""
    cls_scopes: list[Literal["image"] | list[int]] | None = None
    """Image region that each CLS token can attend to, one region per token: `"image"`, or `[rows,
    columns, row, column]` for one cell of a rows x columns grid over the image. Every token can
    attend to all special tokens. Default: the whole image for each CLS token."""
    token_fade_in_steps: int = between(0, 1_000_000)(default=100)
    """Number of training passes over which `model.adapt` and `from_pretrained` fade added tokens in:
    after n passes, the attention to them is multiplied by n / `token_fade_in_steps`. With 0, added
    tokens are ordinary tokens at once, and change the logits."""
    register_neurons: dict[int, list[int]] | dict[str, list[int]] | None = None
    """Layer, from 1 -> MLP neurons whose largest activations move from the patches to the last register
    (test-time registers; Jiang et al. 2025, arXiv 2506.08010). `find_register_neurons` finds them."""
    tasks: dict[str, int | list[str]] | None = None
    """Task name -> number of labels or label names, for `ViTCLSForMultiTaskClassification`. Tasks
    are sorted by name; classifier i reads CLS token i and, with `pooling="cls_mean"`, the patches.
    While loading, a task keeps its place: new names sort last, and only the last tasks can be left
    out. `vitcls add-task` takes any name."""
    pooling: Literal["cls", "mean", "cls_mean", "max", "attention"] = "cls"
    """Input of the head: `"cls"`, `"mean"` (of the patches), `"cls_mean"` (both, concatenated),
    `"max"` (of the patches) or `"attention"` (a learned query over the patches; Zhai et al. 2022,
    arXiv 2106.04560, section 3.3)."""
    cls_pooling: Literal["first", "mean", "concat"] | None = None
    """How several CLS tokens are combined: the first alone, their mean, or their concatenation.
    Default of a new configuration: `"mean"` of several, so the head reads all. A checkpoint keeps
    its value, so a CLS token that is added to it is not read."""
    pooled_cls_tokens: list[int] | None = None
    """Indices of the CLS tokens that are pooled. Default: all."""
    pooled_layers: list[int] | None = None
    """Layers whose tokens are pooled, each after the final norm. The input of the head is the
    concatenation, in this order. Layers are numbered as in `hidden_states` and `out_indices`: 1 is
    the first layer, -1 the last. `[-4, -3, -2, -1]` is the order of DINOv2's linear evaluation
    (`n_last_blocks` in dinov2/eval/linear.py; Oquab et al. 2023, arXiv 2304.07193). Default: the
    last layer."""
    distillation_head: bool | None = None
    """Whether the distillation token has a classifier. Default: `True`."""
    distillation_inference: Literal["mean", "cls", "distillation"] = "mean"
    """Logits that a model with two heads returns: the mean of both heads' logits (DeiT, section
    5.2), or the logits of one head."""

    # Heads
    head_type: Literal["linear", "mlp"] = "linear"
    """Type of the head. `"mlp"` is Linear, GELU, Linear."""
    head_hidden_size: int | None = width(default=None)
    """Hidden size of the MLP head. Default: `hidden_size`."""
    extra_heads: dict[str, dict[str, Any]] | None = None
    """Task name -> fields of `ExtraHead`, for example `{"weather": {"labels": ["rain", "sun"],
    "pooling": "mean", "pooled_layers": [-2, -1]}}`. Extra heads are linear classifiers that only
    read the tokens of the model: they do not change its other outputs."""
    compute_all_tokens: bool = False
    """Whether the last layer of a packed classifier computes all tokens. By default, it computes
    only the tokens that its heads read, which is faster; the logits are the same."""

    # Image and patches
    image_size: int | list[int] | tuple[int, int] = extent(1_000_000)(default=224)
    """Image size in pixels, a multiple of the patch size. The size determines the grid of learned
    position embeddings. The model also accepts other image sizes, of which it reads whole patches."""
    patch_size: int | list[int] | tuple[int, int] = extent(MAX_PATCH_SIDE)(default=16)
    """Patch size in pixels."""
    num_channels: int = between(1, 100_000)(default=3)
    """Number of image channels."""

    # Layers
    hidden_size: int = width(default=768)
    """Width of the tokens: a multiple of `num_attention_heads`, unless `attention_head_size` is
    set."""
    num_hidden_layers: int = between(1, 1_000)(default=12)
    """Number of layers."""
    num_attention_heads: int = width(default=12)
    """Number of attention heads per layer."""
    intermediate_size: int = width(default=3072)
    """Width of the hidden layer of the MLPs."""
    position_embedding_type: Literal[
        "learned",
        "sincos_2d",
        "rope_2d",
        "rope_mixed",
        "learned_rope_2d",
        "learned_rope_mixed",
        "none",
    ] = "learned"
    """`"learned"`, `"sincos_2d"` (fixed; MoCo v3, arXiv 2104.02057, and MAE), `"rope_2d"` (rotary
    on queries and keys of the patches; DINOv3, arXiv 2508.10104), `"rope_mixed"` (rotary with
    learned frequencies per layer and head; RoPE-ViT, arXiv 2403.13298), `"learned_rope_2d"`,
    `"learned_rope_mixed"` (learned and rotary; EVA-02) or `"none"`."""
    attention_type: Literal["softmax", "differential"] = "softmax"
    """`"differential"` subtracts a second attention map in each head (Ye et al. 2024, arXiv
    2410.05258)."""
    qk_norm: bool = False
    """Norm on queries and keys of each head (ViT-22B, arXiv 2302.05442)."""
    mlp_type: Literal["mlp", "glu", "swiglu"] = "mlp"
    """`"glu"` is a gated MLP with `hidden_act`, and `"swiglu"` is a gated MLP with SiLU (Shazeer
    2020, arXiv 2002.05202)."""
    hidden_act: str = activation(default="gelu")
    """Activation of the MLP, any name in transformers' `ACT2FN`."""
    layer_scale_init_value: float | int | None = finite(default=None)
    """Initial value of a learned scale per channel on each residual branch (CaiT, arXiv
    2103.17239). Default: no scale."""
    initializer_range: float | int = positive(default=0.02)
    """Standard deviation of the initial weights."""

    # Regularization
    hidden_dropout_prob: float | int = rate(default=0.0)
    """Dropout rate of residual branches and embeddings, in [0, 1)."""
    attention_probs_dropout_prob: float | int = rate(default=0.0)
    """Dropout rate of attention weights, in [0, 1)."""
    drop_path_rate: float | int = rate(default=0.0)
    """Rate, in [0, 1), at which an image skips a residual branch of the last layer. The rate
    increases linearly from 0 in the first layer (Huang et al. 2016, arXiv 1603.09382)."""

    # Masked image modeling
    use_mask_token: bool = False
    """Whether the model has a learned token that replaces masked patches (`bool_masked_pos`).
    `ViTCLSForMaskedImageModeling` always has a mask token."""
    mim_loss: Literal["l1", "l2"] = "l1"
    """Masked-pixel loss: L1 (SimMIM, arXiv 2111.09886) or L2 (MAE)."""
    norm_pixel_target: bool = False
    """Whether the target pixels are normalized per patch (MAE)."""

    # Backbone
    _out_features: list[str] | None = None
    """Names of the stages whose feature maps `ViTCLSBackbone` returns: `"stem"`, `"stage1"`, ...
    Default: the last stage."""
    _out_indices: list[int] | None = None
    """Indices of these stages; 0 is the stem."""
    apply_layernorm: bool = True
    """Whether the final norm is applied to the feature maps, as in DINOv2."""
    reshape_hidden_states: bool = True
    """Whether feature maps are [batch, channels, rows, columns]."""

    # Fields that the program writes
    class_statistics: dict[str, Any] | None = None
    """`{"tokens": [[layer, kind], ...], "num_classes": K}` of the class means and covariances that
    are stored with the weights. A layer is a negative index, and a kind is "cls" or "mean" (of the
    patches). `outputs.distance` is computed from them."""
    distance_threshold: float | None = finite(default=None)
    """An image above this distance is farther from every class than 95% of the training images, or
    after steps of the held-out images (arXiv 1807.03888)."""
    fading_tokens: dict[TokenGroup, int] | None = None
    """Token group -> number of tokens at the end of the group that are being faded in. The field is
    set when tokens are added, and removed when a model is saved after enough training passes."""
    gated_tokens: dict[TokenGroup, int] | None = None
    """`fading_tokens` of folders that were saved with learned gates; `from_pretrained` renames it."""

    # Positions of converted checkpoints
    position_embedding_tokens: Literal["patches", "cls", "all"] = "cls"
    """Tokens with learned position embeddings: patches only, CLS and patches (ViT, DINOv2), or all
    tokens."""
    position_interpolation: Literal["bicubic", "bilinear", "crop"] = "bicubic"
    """How learned position embeddings are resampled for other image sizes. `"crop"` resamples to a
    square and crops it (RADIO)."""
    position_antialias: bool = False
    """Whether downsampling of learned positions uses antialiasing."""
    position_offset: float | int = 0.0
    """Number added to the new grid size (0.1 in DINO, iBOT and DINOv2)."""
    rope_theta: float | int = positive(default=100.0)
    """Base of the periods of rotary position embeddings."""
    rope_periods: list[float] | None = None
    """`head_dim / 4` rotary periods, for checkpoints that store rounded periods (DINOv3). Default:
    computed in float32 from `rope_theta`."""
    rope_coordinates: Literal["centered", "grid"] = "centered"
    """Rotary coordinates: patch centers from -1 to 1 over the image (DINOv3), or patch indices
    (EVA-02)."""
    rope_reference_grid: list[int] | tuple[int, int] | None = extent(1_000_000)(default=None)
    """Grid to which `"grid"` coordinates are scaled."""
    rope_grid_offset: float | int = 0.0
    """Offset that is added to each `"grid"` coordinate, in patches."""
    rope_axes: Literal["yx", "xy"] = "yx"
    """Axes of the two halves of the rotary frequencies."""
    relative_position_bias: Literal["none", "layer", "shared"] = "none"
    """A learned attention bias per relative position of two patches, for each layer or shared by
    all layers (BEiT, arXiv 2106.08254)."""

    # Layers and norms of converted checkpoints
    attention_head_size: int | None = width(default=None)
    """Size of one head. Default: `hidden_size / num_attention_heads`."""
    layer_type: Literal["standard", "post", "parallel"] = "standard"
    """`x + f(norm(x))` for attention, then MLP; `x + norm(f(x))` (EVA02-CLIP-E); or attention and
    MLP in parallel after one norm (ViT-22B)."""
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Type of all norms except `head_norm`."""
    layer_norm_eps: float = positive(default=1e-6)
    """Epsilon of all norms except `head_norm`."""
    patch_norm: bool = False
    """Norm on the projected patches, before positions are added (AIMv2)."""
    pre_norm: bool = False
    """Norm on the embedded tokens before the first layer (CLIP)."""
    attention_norm: bool = False
    """Norm before the output projection of attention (NormFormer, arXiv 2110.09456; EVA-02)."""
    mlp_norm: bool = False
    """Norm before the output projection of the MLP (NormFormer, arXiv 2110.09456; EVA-02)."""
    final_norm: bool = True
    """Norm on the output of the last layer."""

    # Biases of converted checkpoints
    patch_bias: bool = True
    """Bias of the patch projection (CLIP has none)."""
    qkv_bias: bool = True
    """Biases of the query, key and value projections."""
    query_bias: bool | None = None
    """Bias of the query projection. Default: `qkv_bias`."""
    key_bias: bool | None = None
    """Bias of the key projection. Default: `qkv_bias`."""
    value_bias: bool | None = None
    """Bias of the value projection. Default: `qkv_bias`."""
    projection_bias: bool = True
    """Bias of the output projection of attention."""
    mlp_bias: bool = True
    """Biases of the MLPs."""

    # Pooling of converted checkpoints
    pooled_norm: bool = False
    """Norm of type `norm_type` on the pooled vector (timm's `fc_norm`)."""
    pooled_activation: str | None = activation(default=None)
    """Activation after a linear layer on the pooled vector (`"tanh"` in transformers' `ViTModel`
    and `DeiTModel`). Default: no linear layer and no activation."""
    attention_pool_tokens: Literal["patches", "all"] = "patches"
    """Input tokens of attention pooling."""
    attention_pool_heads: int | None = width(default=None)
    """Number of heads of `pooling="attention"`. Default: `num_attention_heads`."""
    attention_pool_intermediate_size: int | None = width(default=None)
    """MLP width of `pooling="attention"`. Default: `intermediate_size`."""
    attention_pool_mlp: bool = True
    """Whether attention pooling has a norm and MLP (not in AIMv2)."""

    def __post_init__(self, **kwargs: Any) -> None:
        known_names = self._list_keywords()
        for name in kwargs:
            if name not in known_names and not name.startswith("_"):
                raise ValueError(f"Unknown field {name!r}{_format_suggestion(name, known_names)}")

        if self.is_registered:  # The code is installed
            kwargs.pop("code_version", None)
            if "--" not in str(kwargs.get("auto_map")):
                kwargs.pop("auto_map", None)
        # AutoModelForImageClassification selects one of two classes by `architectures`, which must
        # not be None.
        self.architectures = self.architectures or []

        self.stage_names = [
            "stem",
            *(f"stage{index}" for index in range(1, self.num_hidden_layers + 1)),
        ]
        # Before `super`, which would set it as a plain attribute, without deriving anything
        kwargs.pop("stage_names", None)
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None),
            out_indices=kwargs.pop("out_indices", None),
        )

        if self.cls_pooling is None:
            self.cls_pooling = "mean" if self.num_cls_tokens > 1 else "first"
        self._check_labels(kwargs.get("num_labels"))
        if self.register_neurons:  # JSON has texts as keys
            neurons = {int(layer): numbers for layer, numbers in self.register_neurons.items()}
            self.register_neurons = neurons
        super().__post_init__(**kwargs)
        # transformers leaves `label2id` empty if only `id2label` is given, and its indices as text if
        # they were. config.json sorts the ids as text, so 10 comes before 2.
        self.label2id = {
            label: index
            for index, label in sorted(self.id2label.items())  # type: ignore[union-attr]
        }

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        # A stale `label2id` would contradict new labels when the saved folder is loaded
        if name == "id2label" and value and self.label2id:
            self.label2id = {label: index for index, label in value.items()}

    # Building and saving --------------------------------------------------------------------------
    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "ViTCLSConfig":
        """Build the configuration of a `"tiny"`, `"small"`, `"base"` or `"large"` ViT.

        Keyword arguments set fields. Base and large are from ViT (arXiv 2010.11929, table 1), tiny
        and small from DeiT (arXiv 2012.12877, table 1).

        Raises:
            ValueError: If the name is unknown.
        """
        name = name.removeprefix("vitcls-")
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}. Choose one of {', '.join(PRESETS)}.")
        return cls(**PRESETS[name] | overrides)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read config.json of a checkpoint; for another ViT, config.json of its conversion."""
        source = find_checkpoint(pretrained_model_name_or_path, kwargs)
        return super().get_config_dict(source, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration from a stored dict; overrides are applied before validation."""
        # Counted before each of them is checked
        labels = config_dict.get("id2label")
        if isinstance(labels, dict) and len(labels) > MAX_LABELS:
            raise ValueError(f"`id2label` has {len(labels):,} labels, but at most {MAX_LABELS:,}.")
        known_names = cls._list_keywords()
        field_names = known_names - TRANSFORMERS_KEYWORDS - {"dtype"}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in field_names}
        # A misspelled field; transformers checks other keywords.
        for name in sorted(kwargs.keys() - known_names):
            if hint := _format_suggestion(name, known_names, cutoff=0.8):
                raise ValueError(f"Unknown field {name!r}{hint}")
        # Another attention function may be a download.
        for name in ("attn_implementation", "_attn_implementation"):
            if config_dict.get(name) not in (None, *STORED_ATTENTIONS):
                raise ValueError(
                    f"The stored configuration has {name}={config_dict.get(name)!r}, but only "
                    f"{', '.join(STORED_ATTENTIONS)} are read from a file. Remove the field, and "
                    "pass `attn_implementation` to `from_pretrained`."
                )

        unknown_names = config_dict.keys() - known_names - {"custom_pipelines"}
        if reserved_names := [name for name in unknown_names if hasattr(cls, name)]:
            raise ValueError(
                f"The stored configuration sets {reserved_names}, which the class defines. Remove "
                "them from config.json."
            )
        stored = {
            name: copy.deepcopy(value)
            for name, value in config_dict.items()
            if name in known_names or name.startswith("_")
        }
        # A person set them before saving, or another version, whose fields are off by default.
        unknown_fields = {name: config_dict[name] for name in unknown_names - stored.keys()}
        if any(unknown_fields.values()):
            logger.warning(
                "The stored configuration has fields that this version does not use: "
                f"{unknown_fields}"
            )
        stored.setdefault("cls_pooling", "first")  # The default when such a checkpoint was saved
        cls._forget_what_changes(stored, overrides, kwargs.get("num_labels"))
        # The overrides are merged first: alone, the stored values may contradict them.
        config_or_tuple = super().from_dict(stored | overrides, **kwargs)

        config = config_or_tuple[0] if isinstance(config_or_tuple, tuple) else config_or_tuple
        for name, value in unknown_fields.items():
            setattr(config, name, value)
        return config_or_tuple

    @classmethod
    def _forget_what_changes(
        cls, stored: dict[str, Any], overrides: Mapping[str, Any], num_labels: int | None
    ) -> None:
        """Remove from a stored dict what does not apply to the overrides.

        Raise ValueError if a task would read another CLS token than before.
        """
        if "tasks" in overrides:  # A task reads the CLS token whose number is its place
            old, new = sorted(stored.get("tasks") or ()), sorted(overrides["tasks"] or ())
            if moved := [
                name for name in new if name in old and new.index(name) != old.index(name)
            ]:
                raise ValueError(
                    f"`tasks`: {moved[0]!r} would read the CLS token of another task. Keep the tasks that "
                    "sort before it, and give new ones names that sort last."
                )
        head_changes = [
            name
            for name in HEAD_FIELDS
            if name in overrides and overrides[name] != stored.get(name, getattr(cls, name))
        ]
        if stored.get("num_cls_tokens", 1) == 1 and overrides.get("cls_pooling") == "mean":
            # One token is its own mean, and new ones are its twins
            head_changes = [name for name in head_changes if name != "cls_pooling"]
        changes = [name for name in head_changes if name in FEATURE_FIELDS]
        if "num_hidden_layers" in changes:
            stored |= dict.fromkeys(("out_features", "out_indices"))
        # The number first: what is stored is checked with the other fields, and may be no dict.
        if "id2label" in overrides or (
            num_labels is not None and num_labels != len(stored.get("id2label") or {})
        ):
            changes.insert(0, "id2label")
            stored |= dict.fromkeys(("id2label", "label2id"))
        # Whoever drops the statistics fits a classifier anew
        elif (
            head_changes
            and "class_statistics" not in overrides
            and "Classification" in str(stored.get("architectures"))
        ):
            name = head_changes[0]
            logger.warning(
                f"classifier: fitted with {name}={stored.get(name, getattr(cls, name))!r}, but the model has "
                f"{name}={overrides[name]!r} now. Fit it again: `vitcls finetune --model FOLDER`"
            )
        if changes and stored.pop("class_statistics", None):
            stored.pop("distance_threshold", None)
            logger.warning(f"class_statistics: removed, because {changes[0]} is new")

        fading_tokens = stored.get("fading_tokens")
        if isinstance(fading_tokens, dict):  # Another type is an error of the check of the field
            num_added = count_added_tokens({**vars(ViTCLSConfig), **stored}, overrides)
            stored["fading_tokens"] = keep_fading_tokens(fading_tokens, num_added)

    def save_pretrained(
        self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Save the configuration, with an `auto_map` that refers to code in the same folder.

        A configuration that refers to code in another repository keeps its `auto_map`. In memory, only
        such a configuration, and one that remote code has loaded, has an `auto_map`.

        Raises:
            ValueError: if `label2id` contradicts `id2label`.
        """
        self._check_labels(None)
        loaded = getattr(self, "auto_map", {})
        if "--" in str(loaded):  # OWNER/REPOSITORY--FILE.CLASS: no code is saved
            self._auto_class = None  # type: ignore[misc]
        else:
            self.auto_map = AUTO_MAP | loaded  # The class of the model may be a subclass
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.auto_map = loaded
        # `save_pretrained` of a model adds its own class before
        if "AutoConfig" not in loaded:
            del self.auto_map

    def to_diff_dict(self) -> dict[str, Any]:
        """Select the fields to save: all fields of this class, and transformers' fields that are set.

        With the defaults of another version, the architecture would be another one.
        """
        own_fields = {field.name for field in dataclasses.fields(self)}
        own_fields -= {field.name for field in dataclasses.fields(PreTrainedConfig)}
        values = self.to_dict()
        return super().to_diff_dict() | {
            name: values[name] for name in own_fields if not name.startswith("_")
        }

    @property
    def custom_pipelines(self) -> dict[str, Any]:
        """The pipeline that transformers takes from the folder; none for a registered class.

        transformers would refuse `pipeline(...)` without `trust_remote_code`, although the code of
        a registered class is not remote. It changes the dict, which is therefore a new one.
        """
        if self.is_registered:
            return {}
        # Before the --, another repository that has the code
        parts = getattr(self, "auto_map", {}).get("AutoConfig", "").rpartition("--")
        module = f"{parts[0]}{parts[1]}image_processing_vitcls"
        if "ViTCLSForImageClassification" in self.architectures:  # type: ignore[operator]
            code = f"{module}.ViTCLSImageClassificationPipeline"
            return {
                "image-classification": {"impl": code, "pt": ["AutoModelForImageClassification"]}
            }
        code = f"{module}.ViTCLSImageFeatureExtractionPipeline"
        return {"image-feature-extraction": {"impl": code, "pt": ["AutoModel"]}}

    @classmethod
    def register_auto_classes(cls) -> None:
        """Register configuration, models and image processors with transformers' Auto classes.

        Composite models, for example `VisionTextDualEncoderModel`, require this registration. A
        registered class takes precedence over `trust_remote_code` and `revision` in all later loads
        in this process.
        """
        processing = importlib.import_module(".image_processing_vitcls", __package__)
        modeling = importlib.import_module(".modeling_vitcls", __package__)
        model_classes = {
            "AutoModel": modeling.ViTCLSModel,
            # transformers selects the class named in `config.architectures`, or else the first.
            "AutoModelForImageClassification": (
                modeling.ViTCLSForImageClassification,
                modeling.ViTCLSForMultiTaskClassification,
            ),
            "AutoModelForMaskedImageModeling": modeling.ViTCLSForMaskedImageModeling,
            "AutoBackbone": modeling.ViTCLSBackbone,
        }

        transformers.AutoConfig.register(cls.model_type, cls, exist_ok=True)
        for auto_class, classes in model_classes.items():
            getattr(transformers, auto_class).register(cls, classes, exist_ok=True)
        transformers.AutoImageProcessor.register(
            cls,
            image_processor_classes={
                "torchvision": processing.ViTCLSImageProcessor,
                "pil": processing.ViTCLSImageProcessorPil,
            },
            exist_ok=True,
        )
        cls.is_registered = True

    # Derived values -------------------------------------------------------------------------------
    @property
    def token_layout(self) -> TokenLayout:
        """The slices of the token groups in the sequence."""
        return TokenLayout.from_counts(*self.token_counts)

    @property
    def token_counts(self) -> tuple[int, ...]:
        """The numbers of CLS, distillation and register tokens, in sequence order."""
        return attrgetter(*COUNT_FIELDS.values())(self)

    @property
    def image_height_width(self) -> Size:
        """`image_size` as (height, width) in pixels."""
        return to_pair(self.image_size)

    @property
    def patch_height_width(self) -> Size:
        """`patch_size` as (height, width) in pixels."""
        return to_pair(self.patch_size)

    @property
    def grid_size(self) -> Size:
        """The number of patch rows and columns for images of `image_size`."""
        return self.get_grid_size(self.image_height_width)

    def get_grid_size(self, height_width: Size) -> Size:
        """Count the patch rows and columns of images of (height, width) pixels."""
        height, width = height_width
        patch_height, patch_width = self.patch_height_width
        return height // patch_height, width // patch_width

    @property
    def head_dim(self) -> int:
        """The size of one attention head."""
        return self.attention_head_size or self.hidden_size // self.num_attention_heads

    @property
    def pooled_layer_indices(self) -> list[int]:
        """The pooled layers, from 1 to `num_hidden_layers`, in the order of the pooling."""
        return self.resolve_layers(self.pooled_layers)

    def resolve_layers(
        self, layers: Sequence[int] | None, num_layers: int | None = None
    ) -> list[int]:
        """Count layers from 1 to `num_layers` (default: all); -1 and None are the last layer.

        All arguments and fields that name layers are counted so: `pooled_layers`, `output_layers`,
        `layers` of `token_attention` and of interventions, `out_indices` and features such as `cls@6`.
        """
        last = num_layers or self.num_hidden_layers
        return [layer + (last + 1) * (layer < 0) for layer in layers or [-1]]

    @property
    def pooled_size(self) -> int:
        """The size of the pooled vector, the input of the head."""
        return self.compute_pooled_size(self.pooling, len(self.pooled_layer_indices))

    def compute_pooled_size(self, pooling: str, num_layers: int) -> int:
        """Compute the size of the vector that `pooling` makes of `num_layers` layers."""
        num_vectors = 1
        if pooling in ("cls", "cls_mean") and self.cls_pooling == "concat":
            num_vectors = len(self.pooled_cls_tokens or range(self.num_cls_tokens))
        if pooling == "cls_mean":
            num_vectors += 1
        return num_layers * num_vectors * self.hidden_size

    @property
    def has_rotary_positions(self) -> bool:
        """Whether the model has rotary position embeddings."""
        return "rope" in self.position_embedding_type

    @property
    def has_distillation_head(self) -> bool:
        """Whether the distillation tokens have a classifier."""
        return self.num_distillation_tokens > 0 and self.distillation_head is not False

    def task_labels(self) -> dict[str, list[str]]:
        """List the label names of each task, sorted by task name. Task i uses CLS token i."""
        return {
            name: [f"LABEL_{index}" for index in range(each)] if isinstance(each, int) else each
            for name, each in sorted((self.tasks or {}).items())
        }

    # Checks of fields that depend on one another --------------------------------------------------
    def validate_tokens(self) -> None:
        """Check the initial values, fading and scopes of special tokens."""
        has_learned_positions = self.position_embedding_type.startswith("learned")
        distinct_groups = (
            GROUPS_WITH_POSITIONS[self.position_embedding_tokens] if has_learned_positions else ()
        )
        fading_tokens: dict[Any, int] = self.fading_tokens or {}
        for group, field in COUNT_FIELDS.items():
            num_tokens = getattr(self, field)
            if self.token_init == "zeros" and group not in distinct_groups and num_tokens > 1:
                raise ValueError(
                    f'`token_init="zeros"` keeps the tokens of "{group}" identical. '
                    'Set `token_init="trunc_normal"`.'
                )
            if group in fading_tokens and not 0 < fading_tokens[group] <= num_tokens:
                raise ValueError(
                    f"`fading_tokens`: {fading_tokens.get(group)} of {num_tokens} {group!r} tokens. "
                    f"Omit {group!r} for none."
                )
        if self.cls_scopes is not None:
            check_scopes(self.cls_scopes, self.num_cls_tokens, self.grid_size)

    def validate_register_neurons(self) -> None:
        """Check that the neurons exist, and that a register receives their activations."""
        if self.register_neurons and (not self.num_register_tokens or self.mlp_norm):
            raise ValueError(
                "`register_neurons` requires a register, and MLPs without an inner norm. Set "
                "`num_register_tokens=1` and `mlp_norm=False`."
            )
        for layer, neurons in (self.register_neurons or {}).items():
            are_neurons = all(0 <= neuron < self.intermediate_size for neuron in neurons)
            if not (1 <= int(layer) <= self.num_hidden_layers and are_neurons):
                raise ValueError(
                    f"`register_neurons`: {layer}: {neurons[:3]}, but the model has layers 1 to "
                    f"{self.num_hidden_layers} with neurons 0 to {self.intermediate_size - 1}."
                )

    def validate_tasks(self) -> None:
        """Check that every task has its own CLS token, a valid name, and labels."""
        if self.tasks is None:
            return
        if len(self.tasks) != self.num_cls_tokens or not self.tasks:
            raise ValueError(
                "`tasks` requires one CLS token per task. Set "
                f"`num_cls_tokens={max(len(self.tasks), 1)}`."
            )
        if self.cls_scopes is not None and list(self.tasks) != sorted(self.tasks):
            raise ValueError(
                "`cls_scopes` requires `tasks` in alphabetical order. Reorder both fields: "
                f"{', '.join(sorted(self.tasks))}."
            )
        if self.pooling not in ("cls", "cls_mean"):
            raise ValueError(
                f'`tasks` requires CLS pooling, but `pooling` is "{self.pooling}". '
                'Set `pooling="cls"` or "cls_mean".'
            )
        for name, labels in self.tasks.items():
            self._check_head_name("tasks", name)
            self._check_label_names(
                f"`tasks`: {name!r}", range(labels) if isinstance(labels, int) else labels
            )

    def validate_pooling(self) -> None:
        """Check that the tokens and layers that the heads read exist."""
        pooled = self.pooled_cls_tokens
        self._check_layers("`pooled_layers`", self.pooled_layers)
        if self.pooling in ("cls", "cls_mean") and self.num_cls_tokens == 0:
            raise ValueError(
                f'`pooling="{self.pooling}"` requires a CLS token, but `num_cls_tokens` is 0. '
                'Set `num_cls_tokens=1` or pooling="mean", "max" or "attention".'
            )
        if pooled is not None and not (pooled and set(pooled) <= set(range(self.num_cls_tokens))):
            raise ValueError(
                f"`pooled_cls_tokens` is {pooled}. Set indices from 0 to {self.num_cls_tokens - 1}."
            )
        if self.pooling == "attention" and len(self.pooled_layer_indices) > 1:
            raise ValueError(
                '`pooling="attention"` supports one layer, but `pooled_layers` has several. '
                'Set `pooling="cls_mean"` or one layer.'
            )
        if self.distillation_head and self.num_distillation_tokens == 0:
            raise ValueError(
                "`distillation_head=True` requires a distillation token. Set "
                "`num_distillation_tokens=1`."
            )
        if self.distillation_inference == "distillation" and not self.has_distillation_head:
            raise ValueError(
                '`distillation_inference="distillation"` requires a distillation head. '
                "Set `num_distillation_tokens=1`, and leave distillation_head unset."
            )

    def _check_layers(self, owner: str, layers: list[int] | None) -> None:
        """Check that layers exist and differ; the message names the `owner` of the indices."""
        if layers is None:
            return
        indices = self.resolve_layers(layers)
        if (
            not layers
            or len(set(indices)) != len(indices)
            or not set(indices) <= set(range(1, self.num_hidden_layers + 1))
        ):
            raise ValueError(
                f"{owner} must be different layers from 1 to {self.num_hidden_layers}, or from "
                f"-{self.num_hidden_layers} to -1, but it is {layers}."
            )

    def _check_labels(self, num_labels: Any) -> None:
        """Check `num_labels`, `id2label` and `label2id` before transformers builds label names."""
        labels = {str(index): label for index, label in (self.id2label or {}).items()}
        # The names that transformers generates are no contradiction: they remain if a person sets
        # only `id2label`. Labels may repeat.
        contradictions = [
            label
            for label, index in (self.label2id or {}).items()
            if labels and label not in (labels.get(str(index)), f"LABEL_{index}")
        ]
        is_count = type(num_labels) is int and 0 <= num_labels <= MAX_LABELS
        if labels.keys() != set(map(str, range(len(labels)))):
            raise ValueError(
                f"`id2label` has the ids {list(labels)}. Number the labels from 0 without gaps."
            )
        if contradictions:
            raise ValueError(
                f"`label2id` has {contradictions[:1]}, but `id2label` has another label at its "
                "index. Correct one of them, or remove `label2id`."
            )
        if num_labels is not None and not is_count:
            raise ValueError(
                f"`num_labels` must be an int between 0 (no classifier) and {MAX_LABELS:,}, not "
                f"{num_labels!r}."
            )
        if self.id2label is not None and num_labels not in (None, len(labels)):
            raise ValueError(
                f"`num_labels` is {num_labels}, but `id2label` has {len(labels)} labels. Omit "
                "`num_labels`."
            )

    def validate_image(self) -> None:
        """Check that patches divide the image, and that they are not too many."""
        num_patches = math.prod(self.grid_size)
        if num_patches > MAX_PATCHES:
            raise ValueError(
                f"`image_size` {self.image_size} makes {num_patches:,} patches of "
                f"{self.patch_size} pixels, but at most {MAX_PATCHES:,} are supported. Use a "
                "smaller image size."
            )
        for size, patch_size in zip(self.image_height_width, self.patch_height_width, strict=True):
            multiple = max(size // patch_size, 1) * patch_size
            if size % patch_size != 0:
                raise ValueError(
                    f"`image_size`: {size} is not a multiple of the patch size {patch_size}. Use "
                    f"{multiple} or {multiple + patch_size}."
                )

    def validate_attention(self) -> None:
        """Check the size of the heads, and that position embeddings have the fields they need."""
        periods = self.rope_periods
        num_periods = self.head_dim // 4
        num_pool_heads = self.attention_pool_heads or self.num_attention_heads
        has_attention_pool = self.attention_pool_heads or self.pooling == "attention"
        has_other_scores = self.has_rotary_positions or self.relative_position_bias != "none"
        if self.attention_head_size is None and self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}. Set attention_head_size, or another number of "
                "heads."
            )
        if self.has_rotary_positions and self.head_dim % 4 != 0:
            raise ValueError(
                f"{self.position_embedding_type} requires a head size that is a multiple of 4, but "
                f"it is {self.head_dim}. Change hidden_size, num_attention_heads or "
                "attention_head_size."
            )
        if periods is not None and not (
            len(periods) == num_periods and 0 < min(periods) <= max(periods) < math.inf
        ):
            raise ValueError(
                f"`rope_periods` must have head_dim / 4 = {num_periods} positive numbers, not "
                f"{periods}."
            )
        if self.position_embedding_type == "sincos_2d" and self.hidden_size % 4 != 0:
            raise ValueError(
                "sincos_2d requires `hidden_size` to be a multiple of 4, but it is "
                f"{self.hidden_size}."
            )
        if self.attention_type == "differential" and (self.head_dim % 2 != 0 or has_other_scores):
            raise ValueError(
                '`attention_type="differential"` requires an even head size, no rotary positions '
                f'and `relative_position_bias="none"`, but the head size is {self.head_dim}, '
                f'position_embedding_type is "{self.position_embedding_type}" and '
                f'relative_position_bias is "{self.relative_position_bias}".'
            )
        if has_attention_pool and self.hidden_size % num_pool_heads != 0:
            raise ValueError(
                f"attention_pool_heads={num_pool_heads} must divide hidden_size={self.hidden_size}."
            )

    def validate_class_statistics(self) -> None:
        """Check the tokens and the number of classes of the class statistics."""
        if self.class_statistics is None:
            return
        tokens = self.class_statistics.get("tokens")
        num_classes = self.class_statistics.get("num_classes")
        known_tokens = [
            [layer, kind] for layer in range(-self.num_hidden_layers, 0) for kind in ("cls", "mean")
        ]
        if (
            not isinstance(tokens, list)
            or not 0 < len(tokens) <= len(known_tokens)
            or any(token not in known_tokens for token in tokens)
        ):
            raise ValueError(
                f"`class_statistics`: `tokens` must be pairs of a layer from "
                f'-{self.num_hidden_layers} to -1 and "cls" or "mean", such as [[-1, "cls"]], but '
                f"it is {tokens}."
            )
        if num_classes != self.num_labels:
            raise ValueError(
                f"`class_statistics` has num_classes={num_classes}, but the model has "
                f"{self.num_labels} labels. Restore the labels, or set `class_statistics=None`."
            )

    @classmethod
    def _list_keywords(cls) -> set[str]:
        """Return the names of all fields, and of the keywords that transformers passes."""
        return TRANSFORMERS_KEYWORDS | {field.name for field in dataclasses.fields(cls)}


def _format_suggestion(name: str, known_names: Iterable[str], cutoff: float = 0.6) -> str:
    matches = difflib.get_close_matches(name, known_names, n=1, cutoff=cutoff)
    return f": did you mean {matches[0]}?" if matches else ""


ViTCLSConfig.register_for_auto_class()

__all__ = ["ViTCLSConfig"]
