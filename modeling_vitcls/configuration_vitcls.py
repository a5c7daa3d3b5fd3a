"""The configuration: which tokens a ViT carries, and everything else that decides what is built.

Token order, everywhere in this package:

    [ CLS x k | distillation x d | register x r | patches ]

`config.token_layout` names these groups as slices; no other code counts tokens. All checks of a configuration live
here, so that a model that can be constructed can also run. This file builds no modules.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Any, ClassVar, Literal, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Every Auto class finds its code beside the weights, whichever of our classes was saved.
AUTO_MAP = {
    "AutoConfig": "configuration_vitcls.ViTCLSConfig",
    "AutoModel": "modeling_vitcls.ViTCLSModel",
    "AutoModelForImageClassification": "modeling_vitcls.ViTCLSForImageClassification",
    "AutoModelForMaskedImageModeling": "modeling_vitcls.ViTCLSForMaskedImageModeling",
    "AutoBackbone": "modeling_vitcls.ViTCLSBackbone",
}

# The MLP's part of the tensor-parallel plan; transformers refuses a plan with entries that match nothing.
GLU_TP_PLAN = {
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
MLP_TP_PLANS: dict[str, dict[str, str]] = {
    "mlp": {"layers.*.mlp.fc1": "colwise", "layers.*.mlp.fc2": "rowwise"},
    "swiglu": GLU_TP_PLAN,
    "glu": GLU_TP_PLAN,
}

PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 12, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": 12, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24, "intermediate_size": 4096},
}

# Keywords that are not fields but that transformers passes to, or stores in, any configuration.
TRANSFORMERS_KEYWORDS = frozenset(
    "num_labels output_attentions attn_implementation experts_implementation torch_dtype name_or_path auto_map "
    "model_type task_specific_params quantization_config use_cache tie_word_embeddings torchscript pruned_heads "
    "finetuning_task tokenizer_class prefix use_return_dict out_features out_indices stage_names "
    "gradient_checkpointing per_layer_config tie_last_hidden_states".split()
)

# What `from_pretrained(..., field=value)` changes in the weights of a checkpoint (adaptation_vitcls.py).
ADAPTABLE_FIELDS = (
    "image_size",
    "patch_size",
    "num_cls_tokens",
    "num_distillation_tokens",
    "num_register_tokens",
    "cls_scopes",
    "gated_tokens",
    "register_neurons",
)

# Merging patches needs these: elsewhere the places of single patches matter, or there is more than one set of keys.
MERGING_NEEDS: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("learned", "sincos_2d", "none"),
    "relative_position_bias": ("none",),
    "cls_scopes": (None,),
    "gated_tokens": (None,),
    "register_neurons": (None,),
    "attention_type": ("softmax",),
    "layer_type": ("standard",),
}

# Group of special tokens -> the field that counts them.
TOKEN_COUNTS = {
    "cls": "num_cls_tokens",
    "distillation": "num_distillation_tokens",
    "registers": "num_register_tokens",
}

PROBLEM_TYPES = (None, "single_label_classification", "multi_label_classification", "regression")

Config = TypeVar("Config", bound=type)


@dataclasses.dataclass(frozen=True)
class TokenLayout:
    """Where each kind of token stands in the sequence: a slice per group, in the order of the sequence."""

    cls: slice
    distillation: slice
    registers: slice
    patches: slice
    num_prefix_tokens: int

    @classmethod
    def from_counts(cls, num_cls: int, num_distillation: int, num_registers: int) -> "TokenLayout":
        """The layout of `num_cls` CLS, `num_distillation` distillation and `num_registers` register tokens."""
        after_distillation = num_cls + num_distillation
        num_prefix_tokens = after_distillation + num_registers
        return cls(
            cls=slice(0, num_cls),
            distillation=slice(num_cls, after_distillation),
            registers=slice(after_distillation, num_prefix_tokens),
            patches=slice(num_prefix_tokens, None),
            num_prefix_tokens=num_prefix_tokens,
        )

    def items(self) -> Iterator[tuple[str, slice]]:
        """`(name, slice)` of the four groups, in the order of the sequence."""
        return ((name, getattr(self, name)) for name in ("cls", "distillation", "registers", "patches"))


def report_in_one_line(config_class: Config) -> Config:
    """Make a `@strict` class raise `ValueError` with one line, in place of its own multi-line exception types."""

    def translate(method: Callable) -> Callable:
        @wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except (StrictDataclassError, TypeError) as error:
                cause = error.__cause__ or error
                raise ValueError(" ".join(str(cause).split())) from None

        return call

    for name in ("__init__", "__setattr__", "validate"):
        setattr(config_class, name, translate(getattr(config_class, name)))
    return config_class


@report_in_one_line
@strict
class ViTCLSConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""Configuration of a Vision Transformer with configurable CLS, distillation and register tokens.

    The defaults are ViT-B/16 at 224 pixels (Dosovitskiy et al. 2020, arXiv 2010.11929, table 1): one CLS token, 196
    patches, a sequence of 197 tokens.

    Tokens:
        num_cls_tokens (`int`, defaults to 1): Class tokens, at the start of the sequence. 0 builds a model without.
            Several serve several tasks (`tasks`) or parts of the image (`cls_scopes`).
        num_distillation_tokens (`int`, defaults to 0): Tokens that learn from a teacher (DeiT, arXiv 2012.12877,
            section 4).
        num_register_tokens (`int`, defaults to 0): Tokens without a task, in which the model may keep global
            information that it would else write into patches (Darcet et al. 2023, arXiv 2309.16588).
        use_mask_token (`bool`, defaults to `False`): A learned token that stands in for masked patches
            (`bool_masked_pos`). `ViTCLSForMaskedImageModeling` always has one.
        token_init (`"trunc_normal"`, `"near_zero"` or `"zeros"`, defaults to `"trunc_normal"`): How special tokens
            start: normal with `initializer_range` as in DeiT and DINOv2, normal with 1e-6 as in timm, or zero as in
            the original ViT (refused where it would leave two tokens identical for ever).
        cls_scopes (`list`, *optional*): The part of the image that each CLS token may attend to, one entry per CLS
            token: `"image"`, or `[rows, columns, row, column]` for one cell of a grid of rows x columns over the
            image. Special tokens stay visible to all. Default: the whole image for all.
        gated_tokens (`dict[str, int]`, *optional*): Group -> how many of its last tokens act on the others through a
            learned gate, closed at first (`TokenGates`). Set by `adapted(gate_new_tokens=True)`.
        register_neurons (`list[[layer, neuron]]`, *optional*): MLP neurons whose activations move to the last register
            (Jiang et al. 2025, arXiv 2506.08010). Chosen by `surgery.find_register_neurons`.
        tasks (`dict[str, int | list[str]]`, *optional*): For `ViTCLSForMultiTaskClassification`: task name -> number
            of labels or label names. Tasks are kept in alphabetical order, and task i reads CLS token i.

    Pooling and heads:
        pooling (`str`, defaults to `"cls"`): What the head reads: `"cls"`, `"mean"` (of the patches), `"cls_mean"`
            (both, concatenated), `"max"` (of the patches) or `"attention"` (a learned query over the patches; Zhai et
            al. 2022, arXiv 2106.04560, section 3.3).
        cls_pooling (`"first"`, `"mean"` or `"concat"`, defaults to `"first"`): How several CLS tokens become one
            vector.
        pooled_cls_tokens (`list[int]`, *optional*): Indices of the CLS tokens that are pooled. Default: all.
        head_type (`"linear"` or `"mlp"`, defaults to `"linear"`): `"mlp"` is Linear, GELU, Linear.
        head_hidden_size (`int`, *optional*): Width within the MLP head. Default: `hidden_size`.
        pooled_norm (`bool`, defaults to `False`): The encoder's kind of norm on the pooled vector (timm's `fc_norm`).
        pooled_activation (`str`, *optional*): A linear layer and this activation on the pooled vector, as the base
            models of ViT and DeiT have with `"tanh"`.
        attention_pool_tokens (`"patches"` or `"all"`, defaults to `"patches"`): What `pooling="attention"` attends to.
        attention_pool_heads, attention_pool_intermediate_size (`int`, *optional*): Its heads and the width of its MLP.
            Default: the encoder's.
        attention_pool_mlp (`bool`, defaults to `True`): Whether its norm and MLP follow (AIMv2 has neither).
        distillation_head (`bool`, *optional*): A classifier of its own on the distillation token. Default: present
            where there is such a token.
        distillation_inference (`"mean"`, `"cls"` or `"distillation"`, defaults to `"mean"`): Which head's logits are
            the answer where there are two (DeiT, section 5.2: their mean).

    Image and patches:
        image_size (`int` or `[height, width]`, defaults to 224): Pixels; a multiple of the patch size. It fixes the
            grid of learned positions; images of any other size may be passed at run time.
        patch_size (`int` or `[height, width]`, defaults to 16): Pixels.
        num_channels (`int`, defaults to 3).
        patch_bias (`bool`, defaults to `True`): Bias of the patch projection (CLIP has none).
        patch_norm (`bool`, defaults to `False`): Norm on the projected patches, before positions (AIMv2).

    Positions:
        position_embedding_type (`str`, defaults to `"learned"`): `"learned"`, `"sincos_2d"` (fixed; MoCo v3, arXiv
            2104.02057, and MAE), `"rope_2d"` (rotary on queries and keys of the patches; DINOv3, arXiv 2508.10104),
            `"rope_mixed"` (rotary with learned frequencies per layer and head; RoPE-ViT, arXiv 2403.13298),
            `"learned_rope_2d"`, `"learned_rope_mixed"` (learned and rotary; EVA-02) or `"none"`.
        position_embedding_tokens (`"patches"`, `"cls"` or `"all"`, defaults to `"cls"`): Which tokens have a learned
            position: patches only, CLS and patches (ViT, DINOv2), or all.
        position_interpolation (`"bicubic"`, `"bilinear"` or `"crop"`, defaults to `"bicubic"`): How learned positions
            are resampled for other image sizes; `"crop"` is bilinear to a square that holds the image, then cut
            (RADIO).
        position_antialias (`bool`, defaults to `False`): Whether that resampling low-passes when it shrinks the grid.
        position_offset (`float`, defaults to 0.0): Added to the new grid where it becomes a scale factor, 0.1 in
            DINOv2's own code.
        rope_theta (`float`, defaults to 100.0): Base period of the rotary positions.
        rope_coordinates (`"centered"` or `"grid"`, defaults to `"centered"`): Patch centres from -1 to 1 over the
            image (DINOv3), or patch indices (EVA-02).
        rope_reference_grid (`[rows, columns]`, *optional*): Grid to which `"grid"` coordinates are scaled.
        rope_grid_offset (`float`, defaults to 0.0): Added to each `"grid"` coordinate, in patches.
        rope_axes (`"yx"` or `"xy"`, defaults to `"yx"`): Which axis the first half of the frequencies follows.
        relative_position_bias (`"none"`, `"layer"` or `"shared"`, defaults to `"none"`): A learned bias of attention
            by distance between patches, per layer or one for all (BEiT, arXiv 2106.08254).

    Encoder:
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`): 768, 12, 12, 3072. The width is
            a multiple of the number of heads, unless `attention_head_size` is set.
        attention_head_size (`int`, *optional*): Width of one head. Default: `hidden_size / num_attention_heads`.
        attention_type (`"softmax"` or `"differential"`, defaults to `"softmax"`): `"differential"` subtracts a second
            attention map in each head (Ye et al. 2024, arXiv 2410.05258).
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP; a name that transformers knows.
        mlp_type (`"mlp"`, `"glu"` or `"swiglu"`, defaults to `"mlp"`): `"glu"` gates with the activation, `"swiglu"`
            with SiLU, whatever the activation (Shazeer 2020, arXiv 2002.05202).
        layer_type (`"standard"`, `"post"` or `"parallel"`, defaults to `"standard"`): `x + f(norm(x))` for attention,
            then MLP; `x + norm(f(x))` (EVA-CLIP's largest); or both at once on one norm (ViT-22B, arXiv 2302.05442).
        norm_type (`"layernorm"` or `"rmsnorm"`, defaults to `"layernorm"`): All norms but those named otherwise.
        final_norm (`bool`, defaults to `True`): Norm on the encoded sequence.
        attention_norm, mlp_norm (`bool`, defaults to `False`): Norm before the output projection of attention, and of
            the MLP (NormFormer, arXiv 2110.09456; EVA-02).
        layer_norm_eps (`float`, defaults to 1e-6).
        layer_scale_init_value (`float`, *optional*): Start of a learned scale per channel on each residual branch
            (CaiT, arXiv 2103.17239). Default: no such scale.
        qk_norm (`bool`, defaults to `False`): Norm on queries and keys of each head (ViT-22B, arXiv 2302.05442).
        pre_norm (`bool`, defaults to `False`): Norm on the embedded tokens before the first layer (CLIP).
        qkv_bias (`bool`, defaults to `True`): Biases of the three input projections of attention...
        query_bias, key_bias, value_bias (`bool`, *optional*): ... and of each, where they differ (DINOv3 has no key
            bias).
        projection_bias, mlp_bias (`bool`, defaults to `True`): Biases of attention's output projection and of the MLP.
        hidden_dropout_prob, attention_probs_dropout_prob (`float`, defaults to 0): Dropout of residual branches and
            embeddings, and of attention weights; in [0, 1).
        drop_path_rate (`float`, defaults to 0): Rate of dropped residual branches per image at the last layer, rising
            linearly from 0 at the first, so a single layer drops nothing (Huang et al. 2016, arXiv 1603.09382).
        patch_drop_rate (`float`, defaults to 0): Part of the patches that each image leaves out in training, chosen at
            random (PatchDropout, arXiv 2208.07220; FLIP, arXiv 2212.00794); in [0, 1), and one patch stays.
        merged_patches_per_layer (`int`, defaults to 0): Patches by which each layer shortens the sequence, joining the
            most similar ones, half of them at most (ToMe, arXiv 2210.09461). Faster and inexact, without training.
        initializer_range (`float`, defaults to 0.02): Standard deviation of initial weights.

    Masked image modelling:
        mim_loss (`"l1"` or `"l2"`, defaults to `"l1"`): Loss on masked pixels: SimMIM's (arXiv 2111.09886) or MAE's.
        norm_pixel_target (`bool`, defaults to `False`): Predict pixels normalised per patch (MAE, arXiv 2111.06377,
            section 3).

    Backbone:
        out_features, out_indices (`list`, *optional*): Stages whose feature maps `ViTCLSBackbone` returns: `"stem"`,
            `"stage1"`, ... Default: the last.
        apply_layernorm (`bool`, defaults to `True`): Apply the final LayerNorm to the maps of earlier stages too.
        reshape_hidden_states (`bool`, defaults to `True`): Maps as [batch, channels, rows, columns], else as tokens.

    Raises:
        ValueError: for any field of a wrong type or value, any contradiction between fields, any unknown keyword.

    Example:

    ```python
    >>> from modeling_vitcls import ViTCLSConfig, ViTCLSModel

    >>> config = ViTCLSConfig(num_cls_tokens=1, num_distillation_tokens=1, num_register_tokens=4)
    >>> config.token_layout.registers
    slice(2, 6, None)
    >>> model = ViTCLSModel(config)
    ```
    """

    model_type = "vitcls"
    # True in the copy with which a checkpoint is loaded before it is adapted: its tokens do not fit its other fields.
    _unchecked: ClassVar[bool] = False
    # `num_labels` and the heads' separate logits are not predictions that Trainer should collect.
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "cls_logits",
        "distillation_logits",
        "losses",
        "hidden_states",
        "attentions",
    ]
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_proj": "colwise",
        "layers.*.attention.o_proj": "rowwise",
    }
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "layernorm": "keep_full_weight",
    }

    num_cls_tokens: int = 1
    num_distillation_tokens: int = 0
    num_register_tokens: int = 0
    use_mask_token: bool = False
    token_init: Literal["trunc_normal", "near_zero", "zeros"] = "trunc_normal"
    cls_scopes: list[str | list[int]] | None = None
    gated_tokens: dict[str, int] | None = None
    register_neurons: list[list[int]] | None = None
    tasks: dict[str, int | list[str]] | None = None

    pooling: Literal["cls", "mean", "cls_mean", "max", "attention"] = "cls"
    cls_pooling: Literal["first", "mean", "concat"] = "first"
    pooled_cls_tokens: list[int] | None = None
    head_type: Literal["linear", "mlp"] = "linear"
    head_hidden_size: int | None = None
    pooled_norm: bool = False
    pooled_activation: str | None = None
    attention_pool_tokens: Literal["patches", "all"] = "patches"
    attention_pool_heads: int | None = None
    attention_pool_intermediate_size: int | None = None
    attention_pool_mlp: bool = True
    distillation_head: bool | None = None
    distillation_inference: Literal["mean", "cls", "distillation"] = "mean"

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int | list[int] | tuple[int, int] = 16
    num_channels: int = 3
    patch_bias: bool = True
    patch_norm: bool = False

    position_embedding_type: Literal[
        "learned", "sincos_2d", "rope_2d", "rope_mixed", "learned_rope_2d", "learned_rope_mixed", "none"
    ] = "learned"
    position_embedding_tokens: Literal["patches", "cls", "all"] = "cls"
    position_interpolation: Literal["bicubic", "bilinear", "crop"] = "bicubic"
    position_antialias: bool = False
    position_offset: float | int = 0.0
    rope_theta: float | int = 100.0
    rope_coordinates: Literal["centered", "grid"] = "centered"
    rope_reference_grid: list[int] | tuple[int, int] | None = None
    rope_grid_offset: float | int = 0.0
    rope_axes: Literal["yx", "xy"] = "yx"
    relative_position_bias: Literal["none", "layer", "shared"] = "none"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    attention_head_size: int | None = None
    attention_type: Literal["softmax", "differential"] = "softmax"
    hidden_act: str = "gelu"
    mlp_type: Literal["mlp", "glu", "swiglu"] = "mlp"
    layer_type: Literal["standard", "post", "parallel"] = "standard"
    norm_type: Literal["layernorm", "rmsnorm"] = "layernorm"
    final_norm: bool = True
    attention_norm: bool = False
    mlp_norm: bool = False
    layer_norm_eps: float = 1e-6
    layer_scale_init_value: float | int | None = None
    qk_norm: bool = False
    pre_norm: bool = False
    qkv_bias: bool = True
    query_bias: bool | None = None
    key_bias: bool | None = None
    value_bias: bool | None = None
    projection_bias: bool = True
    mlp_bias: bool = True
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.0
    patch_drop_rate: float | int = 0.0
    merged_patches_per_layer: int = 0
    initializer_range: float | int = 0.02

    mim_loss: Literal["l1", "l2"] = "l1"
    norm_pixel_target: bool = False

    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        self._reject_unknown_keywords(kwargs)
        self.auto_map = kwargs.pop("auto_map", None) or self.local_auto_map()
        # AutoModelForImageClassification chooses between two classes by it, and cannot when it is None.
        self.architectures = self.architectures or []
        # On the instance, as transformers expects it where a plan depends on the configuration.
        setattr(self, "base_model_tp_plan", self._tensor_parallel_plan())  # noqa: B010
        self.stage_names = ["stem", *(f"stage{index}" for index in range(1, self.num_hidden_layers + 1))]
        kwargs.pop("stage_names", None)
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        self._check_labels(kwargs.get("num_labels"))
        super().__post_init__(**kwargs)
        # transformers derives labels from `num_labels`, but leaves `label2id` empty when only `id2label` is given.
        if self.label2id is None:
            self.label2id = {str(label): int(index) for index, label in (self.id2label or {}).items()}

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "ViTCLSConfig":
        """The sizes of a standard ViT, `"tiny"`, `"small"`, `"base"` or `"large"`, with any field overridden.

        Sources: ViT (arXiv 2010.11929, table 1) for base and large; DeiT (arXiv 2012.12877, table 1) for the others.

        Raises:
            ValueError: for an unknown name.
        """
        name = name.removeprefix("vitcls-")
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build from a stored dict, with overrides applied before construction, so that contradictions raise."""
        own_fields = {field.name for field in dataclasses.fields(cls)} - {"dtype"}
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in own_fields}
        for name in kwargs:
            known = sorted(own_fields | TRANSFORMERS_KEYWORDS | {"gate_new_tokens"})
            if name not in known and (hint := _did_you_mean(name, known, cutoff=0.8)):
                raise ValueError(f"unknown field {name!r}{hint}")
        stored = dict(config_dict)
        if "id2label" in overrides or kwargs.get("num_labels") not in (None, len(stored.get("id2label") or ())):
            _forget(stored, "id2label", "label2id")  # the stored names no longer describe the classes
        if overrides.get("num_hidden_layers") not in (None, stored.get("num_hidden_layers")):
            _forget(stored, "out_features", "out_indices")  # nor the stored stages the layers
        if counts := {field: overrides[field] for field in TOKEN_COUNTS.values() if field in overrides}:
            stored_counts = {field: stored.get(field, getattr(cls, field)) for field in TOKEN_COUNTS.values()}
            stored["gated_tokens"] = gates_that_stay(stored.get("gated_tokens"), stored_counts, stored_counts | counts)
        extras = {name: stored.pop(name) for name in list(stored) if not cls._is_known(name)}
        built = super().from_dict({**stored, **overrides}, **kwargs)
        config = built[0] if isinstance(built, tuple) else built
        for name, value in extras.items():  # set by the user before saving, or written by another version
            logger.warning(f"the stored configuration has a field {name!r} that this version does not use")
            setattr(config, name, value)
        return built

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as any transformers configuration; the code is copied beside it, so the Auto classes point there."""
        self.auto_map = self.local_auto_map()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def local_auto_map(self) -> dict[str, str]:
        """Auto class -> file and class beside the weights. A multi-task checkpoint classifies with its own class."""
        if self.tasks is None:
            return dict(AUTO_MAP)
        return AUTO_MAP | {"AutoModelForImageClassification": "modeling_vitcls.ViTCLSForMultiTaskClassification"}

    @property
    def token_layout(self) -> TokenLayout:
        """Named slices into the sequence; the single source of token counts."""
        return TokenLayout.from_counts(*self.token_counts)

    @property
    def token_counts(self) -> tuple[int, int, int]:
        """Numbers of CLS, distillation and register tokens."""
        return self.num_cls_tokens, self.num_distillation_tokens, self.num_register_tokens

    @property
    def image_height_width(self) -> tuple[int, int]:
        """`image_size` as (height, width) in pixels."""
        return _pair(self.image_size)

    @property
    def patch_height_width(self) -> tuple[int, int]:
        """`patch_size` as (height, width) in pixels."""
        return _pair(self.patch_size)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Patches of an image of `image_size` as (rows, columns)."""
        (height, width), (patch_height, patch_width) = self.image_height_width, self.patch_height_width
        return height // patch_height, width // patch_width

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.attention_head_size or self.hidden_size // self.num_attention_heads

    @property
    def pooled_cls_indices(self) -> list[int]:
        """Indices of the CLS tokens that are pooled."""
        return list(range(self.num_cls_tokens)) if self.pooled_cls_tokens is None else self.pooled_cls_tokens

    @property
    def pooled_size(self) -> int:
        """Width of the pooled vector that the head reads."""
        if self.pooling not in ("cls", "cls_mean"):
            return self.hidden_size
        num_vectors = len(self.pooled_cls_indices) if self.cls_pooling == "concat" else 1
        if self.pooling == "cls_mean":
            num_vectors += 1
        return num_vectors * self.hidden_size

    @property
    def has_rotary_positions(self) -> bool:
        """Whether queries and keys are rotated."""
        return "rope" in self.position_embedding_type

    @property
    def has_distillation_head(self) -> bool:
        """Whether a classifier reads the distillation token."""
        return self.num_distillation_tokens > 0 and self.distillation_head is not False

    def validate_numbers(self) -> None:
        """Every count, size and rate within its range."""
        _require_at_least(self, 1, "hidden_size num_hidden_layers num_attention_heads intermediate_size num_channels")
        _require_at_least(self, 0, "num_cls_tokens num_distillation_tokens num_register_tokens")
        _require_at_least(self, 0, "merged_patches_per_layer")
        if self.head_hidden_size is not None:
            _require_at_least(self, 1, "head_hidden_size")
        if self.rope_reference_grid is not None and (
            len(self.rope_reference_grid) != 2 or min(self.rope_reference_grid) < 1
        ):
            raise ValueError(f"rope_reference_grid is {self.rope_reference_grid}: give [rows, columns]")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "patch_drop_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: set a rate of at least 0 and below 1")
        if self.layer_scale_init_value is not None and not math.isfinite(self.layer_scale_init_value):
            raise ValueError(f"layer_scale_init_value is {self.layer_scale_init_value}: set a finite number, or None")
        for name in ("layer_norm_eps", "initializer_range", "rope_theta"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: set a positive number")

    def validate_architecture(self) -> None:
        """transformers' own check, which reads `head_dim`: numbers first."""
        self.validate_numbers()
        super().validate_architecture()

    def validate_problem_type(self) -> None:
        """The kind of labels is one that a loss exists for."""
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"unknown problem_type {self.problem_type!r}: use {', '.join(PROBLEM_TYPES[1:])}")

    def validate_heads(self) -> None:
        """The width divides into heads; rotary and sin-cos positions need a multiple of four."""
        if self.attention_head_size is not None:
            _require_at_least(self, 1, "attention_head_size")
        elif self.hidden_size % self.num_attention_heads:
            divisors = [n for n in range(1, self.hidden_size + 1) if self.hidden_size % n == 0]
            nearest = sorted(divisors, key=lambda n: abs(n - self.num_attention_heads))[:2]
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide hidden_size={self.hidden_size}: "
                f"use {' or '.join(map(str, sorted(nearest)))} heads"
            )
        if self.has_rotary_positions and self.head_dim % 4:
            raise ValueError(
                f"{self.position_embedding_type} needs a head width that is a multiple of 4, and it is "
                f"{self.head_dim}: change hidden_size, num_attention_heads or attention_head_size"
            )
        if self.attention_type == "differential" and self.relative_position_bias != "none":
            raise ValueError(
                'attention_type="differential" has two maps per head and relative_position_bias one: leave one out'
            )
        if self.attention_type == "differential" and (self.head_dim % 2 or self.has_rotary_positions):
            raise ValueError(
                'attention_type="differential" needs an even head width and no rotary positions, and they are '
                f'{self.head_dim} and "{self.position_embedding_type}"'
            )
        if self.position_embedding_type == "sincos_2d" and self.hidden_size % 4:
            raise ValueError(f"sincos_2d needs hidden_size to be a multiple of 4, and it is {self.hidden_size}")

    def validate_activation(self) -> None:
        """The activation is one that transformers knows."""
        for name in ("hidden_act", "pooled_activation"):
            value = getattr(self, name)
            if value is not None and value not in ACT2FN:
                raise ValueError(f"unknown {name} {value!r}{_did_you_mean(value, list(ACT2FN))}")

    def validate_image(self) -> None:
        """Image and patch sizes are positive pairs, and whole patches cover the image."""
        for name in ("image_size", "patch_size"):
            value = getattr(self, name)
            if not isinstance(value, int) and len(value) != 2:
                raise ValueError(f"{name} is {value}: give one number or [height, width]")
            if min(_pair(value)) < 1:
                raise ValueError(f"{name} is {value}: set positive numbers of pixels")
        for axis, pixels, patch in zip(
            ("height", "width"), self.image_height_width, self.patch_height_width, strict=True
        ):
            if pixels % patch:
                below, above = pixels // patch * patch, (pixels // patch + 1) * patch
                nearest = f"{below} or {above}" if below else f"{above}"
                raise ValueError(
                    f"image_size: {axis} {pixels} is not a multiple of the patch {axis} {patch}: use {nearest}"
                )

    def validate_tokens(self) -> None:
        """Pooling, heads, scopes and tasks refer to tokens that exist."""
        if self.pooling in ("cls", "cls_mean") and self.num_cls_tokens == 0:
            raise ValueError(
                f'pooling="{self.pooling}" reads a CLS token and num_cls_tokens is 0: set num_cls_tokens=1, or '
                'pooling="mean", "max" or "attention"'
            )
        for index in self.pooled_cls_tokens or ():
            if not 0 <= index < self.num_cls_tokens:
                raise ValueError(f"pooled_cls_tokens names token {index} and there are {self.num_cls_tokens}, from 0")
        if self.pooled_cls_tokens == []:
            raise ValueError("pooled_cls_tokens is empty: name one or more, or leave it out")
        if self.distillation_head and self.num_distillation_tokens == 0:
            raise ValueError("distillation_head=True without a distillation token: set num_distillation_tokens=1")
        if self.distillation_inference == "distillation" and not self.has_distillation_head:
            raise ValueError(
                'distillation_inference="distillation" without a distillation head: set num_distillation_tokens=1 '
                "and leave distillation_head unset"
            )
        if self.token_init == "zeros" and (group := self._identical_group()):
            raise ValueError(
                f'token_init="zeros" makes the {group} tokens identical, and they would stay so: use "trunc_normal"'
            )

    def validate_attention_pool(self) -> None:
        """The attention pooler's own heads divide the width."""
        pool_heads = self.attention_pool_heads or self.num_attention_heads
        if (self.attention_pool_heads or self.pooling == "attention") and self.hidden_size % pool_heads:
            raise ValueError(f"attention_pool_heads={pool_heads} does not divide hidden_size={self.hidden_size}")
        for name in ("attention_pool_heads", "attention_pool_intermediate_size"):
            if getattr(self, name) is not None:
                _require_at_least(self, 1, name)

    def validate_scopes(self) -> None:
        """One well-formed scope per CLS token."""
        if self.cls_scopes is None:
            return
        if len(self.cls_scopes) != self.num_cls_tokens:
            raise ValueError(
                f"cls_scopes has {len(self.cls_scopes)} entries and num_cls_tokens is {self.num_cls_tokens}: "
                "give one scope per CLS token"
            )
        for scope in self.cls_scopes:
            if scope == "image":
                continue
            if isinstance(scope, str) or len(scope) != 4:
                raise ValueError(f'cls_scopes: {scope!r} is neither "image" nor [rows, columns, row, column]')
            rows, columns, row, column = scope
            if not (0 <= row < rows <= self.grid_size[0] and 0 <= column < columns <= self.grid_size[1]):
                raise ValueError(
                    f"cls_scopes: {scope} names no cell of a {rows} x {columns} grid over {self.grid_size[0]} x "
                    f"{self.grid_size[1]} patches: rows and columns count from 0"
                )

    def validate_gates(self) -> None:
        """Gates stand before tokens that exist."""
        for group, count in (self.gated_tokens or {}).items():
            if group not in TOKEN_COUNTS:
                raise ValueError(f"gated_tokens: unknown group {group!r}: use {', '.join(TOKEN_COUNTS)}")
            if not 0 < count <= getattr(self, TOKEN_COUNTS[group]):
                raise ValueError(
                    f"gated_tokens: {count} of {getattr(self, TOKEN_COUNTS[group])} {group} tokens cannot be gated"
                )

    def validate_register_neurons(self) -> None:
        """Register neurons exist, and a register to move them to."""
        if self.register_neurons is None:
            return
        if self.num_register_tokens == 0:
            raise ValueError("register_neurons move to the last register and num_register_tokens is 0: set it to 1")
        for pair in self.register_neurons:
            if len(pair) != 2 or not (0 <= pair[0] < self.num_hidden_layers and 0 <= pair[1] < self.intermediate_size):
                raise ValueError(f"register_neurons: {pair} is no [layer, neuron] of this model")

    def validate_merging(self) -> None:
        """Nothing is asked for that merged patches cannot have."""
        if self.merged_patches_per_layer == 0:
            return
        for name, possible in MERGING_NEEDS.items():
            if getattr(self, name) not in possible:
                raise ValueError(
                    f"merged_patches_per_layer={self.merged_patches_per_layer} does not go with {name}="
                    f"{getattr(self, name)!r}: set it to 0, or {name} to {' or '.join(map(repr, possible))}"
                )

    def validate_tasks(self) -> None:
        """One CLS token per task, every task with a usable name and labels."""
        if self.tasks is None:
            return
        if len(self.tasks) != self.num_cls_tokens or not self.tasks:
            raise ValueError(
                f"tasks names {len(self.tasks)} tasks and num_cls_tokens is {self.num_cls_tokens}: each task reads "
                f"its own CLS token, so set num_cls_tokens={max(len(self.tasks), 1)}"
            )
        if self.cls_scopes and list(self.tasks) != sorted(self.tasks):
            raise ValueError(
                f"cls_scopes follow the tasks in alphabetical order: list both as {', '.join(sorted(self.tasks))}"
            )
        if self.pooling != "cls":
            raise ValueError(f'tasks read CLS tokens and pooling is "{self.pooling}": set pooling="cls"')
        for name, labels in self.task_labels().items():
            if not name.isidentifier():
                raise ValueError(f"tasks: {name!r} is no valid task name: use letters, digits and underscores")
            if not labels or len(set(labels)) != len(labels):
                raise ValueError(f"tasks: {name!r} needs one or more distinct labels")

    def _identical_group(self) -> str | None:
        """Name of a group with several tokens that nothing tells apart when all start at zero."""
        positioned = {"patches": (), "cls": ("cls",), "all": ("cls", "distillation", "registers")}
        learned = self.position_embedding_type.startswith("learned")
        told_apart = positioned[self.position_embedding_tokens] if learned else ()
        for name, group in self.token_layout.items():
            if name != "patches" and name not in told_apart and group.stop - group.start > 1:
                return name
        return None

    def task_labels(self) -> dict[str, list[str]]:
        """Label names by task, in the order of the CLS tokens: alphabetical, as JSON files are."""
        return {name: _label_names(labels) for name, labels in sorted((self.tasks or {}).items())}

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Parts that can be split; a norm over the split width (`attention_norm`, `mlp_norm`) keeps its part whole."""
        plan: dict[str, str] = {}
        if not self.attention_norm:
            plan |= type(self).base_model_tp_plan
            if self.qk_norm:  # each process sees its own heads, and all share these norms
                plan |= {f"layers.*.attention.{name}_norm": "replicated_with_grad_allreduce" for name in "qk"}
        if not self.mlp_norm:
            plan |= MLP_TP_PLANS[self.mlp_type]
        return plan

    def _check_labels(self, num_labels: Any) -> None:
        for name in ("id2label", "label2id"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict):
                raise ValueError(f"{name} is {value!r}: give a dict")
        if self.id2label is not None and sorted(map(str, self.id2label)) != sorted(
            map(str, range(len(self.id2label)))
        ):
            raise ValueError(f"id2label has the ids {list(self.id2label)}: number the labels from 0 without gaps")
        if num_labels is None:
            return
        if not isinstance(num_labels, int) or num_labels < 0:
            raise ValueError(f"num_labels is {num_labels!r}: set 0 (no classifier) or more")
        if self.id2label is not None and len(self.id2label) != num_labels:
            raise ValueError(f"num_labels is {num_labels} and id2label names {len(self.id2label)}: leave one out")

    @classmethod
    def _is_known(cls, name: str) -> bool:
        fields = {field.name for field in dataclasses.fields(cls)}
        return name in fields or name in TRANSFORMERS_KEYWORDS or name.startswith("_")

    def _reject_unknown_keywords(self, kwargs: dict[str, Any]) -> None:
        for name in kwargs:
            if not self._is_known(name):
                fields = [field.name for field in dataclasses.fields(self)]
                raise ValueError(f"unknown field {name!r}{_did_you_mean(name, [*fields, *TRANSFORMERS_KEYWORDS])}")


def gates_that_stay(
    gated_tokens: dict[str, int] | None, counts: Mapping[str, int], new_counts: Mapping[str, int]
) -> dict[str, int] | None:
    """`gated_tokens` for other counts of tokens, both by the fields of `TOKEN_COUNTS`.

    Gates stay with their tokens. These are the last of their group, so tokens added behind them are gated too.
    """
    staying = {}
    for group, field in TOKEN_COUNTS.items():
        num_gated = (gated_tokens or {}).get(group, 0)
        if num_gated and (num_staying := num_gated + new_counts[field] - counts[field]) > 0:
            staying[group] = num_staying
    return staying or None


def _pair(value: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _label_names(labels: int | list[str]) -> list[str]:
    return [f"LABEL_{index}" for index in range(labels)] if isinstance(labels, int) else labels


def _did_you_mean(name: str, known: list[str], cutoff: float = 0.6) -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f": did you mean {matches[0]}?" if matches else ""


def _forget(stored: dict[str, Any], *names: str) -> None:
    for name in names:
        stored.pop(name, None)


def _require_at_least(config: ViTCLSConfig, minimum: int, names: str) -> None:
    for name in names.split():
        if getattr(config, name) < minimum:
            raise ValueError(f"{name} is {getattr(config, name)}: set {minimum} or more")


ViTCLSConfig.register_for_auto_class()

__all__ = ["ViTCLSConfig", "TokenLayout"]
