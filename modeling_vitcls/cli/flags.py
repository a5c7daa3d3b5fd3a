"""The keyword arguments of the functions in functions.py, for editors and type checkers.

Written by scripts/make_flags.py from the options of the commands; do not edit it. `vitcls finetune
--help-all` describes each flag and its default.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict


class DataFlags(TypedDict, total=False):
    """Flags of `DataOptions`."""

    image_column: str | None
    label_column: str | Sequence[str] | None
    label_separator: str | None
    label_names: str | Sequence[str] | None
    split_column: str | None
    group_column: str | None
    held_out_fraction: float | None
    split_seed: int
    folds: int | None
    fold: int | None
    streaming: bool
    shuffle_buffer: int
    exclude: str | Path | None
    max_unreadable_images: int
    num_workers: int


class ModelFlags(TypedDict, total=False):
    """Flags of `ModelOptions`."""

    num_cls_tokens: int | None
    num_distillation_tokens: int | None
    num_register_tokens: int | None
    pooling: Literal["cls", "mean", "cls_mean", "max", "attention"] | None
    pooled_layers: Sequence[int] | None
    cls_pooling: Literal["first", "mean", "concat"] | None
    cls_scopes: str | Sequence[str] | None
    head_type: Literal["linear", "mlp"] | None
    image_size: int | Sequence[int] | Literal["native"] | None
    fit: Literal["squash", "crop", "pad"] | None
    patch_size: int | Sequence[int] | None
    position_embedding_type: Literal["learned", "sincos_2d", "rope_2d", "none"] | None
    hidden_size: int | None
    num_hidden_layers: int | None
    num_attention_heads: int | None
    intermediate_size: int | None
    token_init: Literal["trunc_normal", "near_zero", "zeros"] | None
    drop_path_rate: float | None
    initializer_range: float | None


class AugmentationFlags(TypedDict, total=False):
    """Flags of `AugmentationOptions`."""

    crop_scale: float | None
    flip: bool
    rotation: float
    shift: float | None
    zoom: float
    auto_augment: Literal["none", "rand", "trivial"]
    random_erasing: float
    mixup: float
    cutmix: float


class TrainingFlags(TypedDict, total=False):
    """Flags of `TrainingOptions`."""

    epochs: float | None
    max_steps: int | None
    batch_size: int | None
    gradient_accumulation_steps: int
    learning_rate: float | None
    layer_decay: float | None
    warmup: float
    weight_decay: float
    label_smoothing: float
    class_balance: Literal["none", "weights"]
    max_gradient_norm: float
    ema_decay: float | None
    trainable: str
    probe: bool
    statistics: bool
    lora_rank: int
    mixed_precision: Literal["auto", "no", "bf16", "fp16"]
    compile: bool
    gradient_checkpointing: bool
    seed: int
    log_every: int
    evaluate_every: int
    early_stopping: int | None
    select: Literal["last", "best"] | None


class RunFlags(TypedDict, total=False):
    """Flags of `RunOptions`."""

    resume: bool
    overwrite: bool
    save_every: int | None
    keep_checkpoints: int | None
    log_with: (
        Literal["tensorboard", "wandb", "trackio"]
        | Sequence[Literal["tensorboard", "wandb", "trackio"]]
    )
    report: bool
    dry_run: bool
    push_to_hub: bool
    hub_model_id: str | None
    hub_private: bool
    hub_verify: bool
    hub_checkpoint_branch: str | None
    license: str | None
    card_samples: bool


class CommonFlags(DataFlags, ModelFlags, AugmentationFlags, TrainingFlags, RunFlags, total=False):
    """Flags of `CommonOptions`."""


class DistillationFlags(TypedDict, total=False):
    """Flags of `DistillationOptions`."""

    teacher: Path | str | None
    distillation: Literal["soft", "hard"]
    distillation_alpha: float
    distillation_tau: float


class FinetuneFlags(CommonFlags, DistillationFlags, total=False):
    """Flags of `FinetuneOptions`."""


class LeJEPAFlags(TypedDict, total=False):
    """Flags of `LeJEPAOptions`."""

    global_crops: int
    local_crops: int
    global_crop_scale: float
    sigreg_weight: float
    projector_width: int


class MAEFlags(TypedDict, total=False):
    """Flags of `MAEOptions`."""

    mask_ratio: float
    decoder_layers: int


class PretrainFlags(CommonFlags, LeJEPAFlags, MAEFlags, total=False):
    """Flags of `PretrainOptions`."""

    method: Literal["lejepa", "mae"]


class EngineFlags(TypedDict, total=False):
    """Flags of `EngineOptions`."""

    fit: Literal["squash", "crop", "pad"] | None
    mixed_precision: Literal["auto", "no", "bf16", "fp16"]
    backend: str


class EvaluateFlags(EngineFlags, DataFlags, total=False):
    """Flags of `EvaluateOptions`."""

    split: str | None
    max_images: int | None
    batch_size: int | None
    frozen: Literal["knn", "logreg"] | None
    output: str | Path | None
    task: str | None
    per_image: str | Path | None
    audit: str | Path | None
    overwrite: bool


class ImageFlags(TypedDict, total=False):
    """Flags of `ImageOptions`."""

    dataset: Any
    image_column: str | None
    batch_size: int | None


class PredictFlags(ImageFlags, EngineFlags, total=False):
    """Flags of `PredictOptions`."""

    list: str | Path | None
    split: str | None
    top_k: int | None
    threshold: float
    features: str | Sequence[str] | None
    feature_dtype: Literal["float32", "float16"]
    num_workers: int | None


class InspectFlags(ImageFlags, total=False):
    """Flags of `InspectOptions`."""

    split: str | None
    label_column: str | Sequence[str] | None
    label_separator: str | None
    output: str | Path
    json: str | Path | None
    num_images: int
    max_images: int
    mixed_precision: Literal["auto", "no", "bf16"]


class LookFlags(TypedDict, total=False):
    """Flags of `LookOptions`."""

    image_size: int | Sequence[int] | None
    fit: Literal["squash", "crop", "pad"] | None
