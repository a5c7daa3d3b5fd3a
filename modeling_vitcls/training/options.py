"""Flags of `vitcls finetune`.

They do not stand in the files that read them, because the command checks flags before it imports
torch, and those files need torch.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..data.options import AugmentationOptions, DivisionOptions
from ..runtime.flags import Options, check_each, check_minimum


# Flags of the model that are no fields of its configuration
NO_CONFIG_FIELDS = ("model", "resize", "bit_depth", "model_config")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Model. Flags that are not set keep the values of the preset or checkpoint."""

    model: str
    """A preset to train from scratch (`vitcls-tiny`, `vitcls-small`, `vitcls-base`,
    `vitcls-large`), a folder or Hub id of a vitcls model, or another ViT, which is converted
    automatically (`timm:NAME`, `transformers:ID`, a folder, a Hub id, a file). `ID@COMMIT` pins a
    model on the Hub."""
    num_cls_tokens: int | None = None
    """Number of CLS tokens."""
    num_distillation_tokens: int | None = None
    """Number of distillation tokens."""
    num_register_tokens: int | None = None
    """Number of register tokens."""
    token_fade_in_steps: int | None = None
    """Number of training passes over which tokens that are added to a checkpoint are faded in. Default:
    100, or a third of a run of fewer than 300 passes. 0: they are ordinary tokens from the first step."""
    pooling: Literal["cls", "mean", "cls_mean", "max", "attention"] | None = None
    """Pooling of the tokens for the classifier. Default: the pooling of the preset or checkpoint,
    or chosen by cross-validation, with a pre-trained encoder."""
    pooled_layers: tuple[int, ...] | None = None
    """Layers that the classifier reads, such as -4 -3 -2 -1 for the last four; their features are
    concatenated. Default: the last layer, or chosen by cross-validation."""
    cls_scopes: tuple[str, ...] | None = None
    """Image regions that the CLS tokens attend to: `image` adds a CLS token for the whole image,
    and `2x2` adds a CLS token for each cell of a grid of 2 rows and 2 columns."""
    image_size: int | tuple[int, int] | Literal["native"] | None = None
    """Image height and width in pixels; one number sets both. `native` keeps the size of the
    checkpoint. Default: the size of the preset or checkpoint, but fine-tuning uses 224 pixels for
    checkpoints of more than 256 pixels per side."""
    resize: Literal["squash", "crop", "pad"] | None = None
    """How images of other aspect ratios become the input: resize the whole image (`squash`), crop
    the center (`crop`) or add gray (`pad`). Saved in the image processor, for evaluation and
    prediction. Default: as the checkpoint does, or `squash` if cross-validation says that it is
    better."""
    bit_depth: int | None = None
    """Number of bits that 16-bit images use, from 9 to 16. Saved in the image processor. Default:
    as the checkpoint does (16)."""
    patch_size: int | tuple[int, int] | None = None
    """Patch height and width in pixels; one number sets both."""
    hidden_size: int | None = None
    """Embedding dimension."""
    num_hidden_layers: int | None = None
    """Number of layers."""
    num_attention_heads: int | None = None
    """Number of attention heads per layer."""
    intermediate_size: int | None = None
    """Hidden dimension of the MLP."""
    model_config: dict[str, Any] | None = None
    """Other fields of `ViTCLSConfig`, such as
    `drop_path_rate=0.1 head_type=mlp`. Default of `initializer_range`: depends on the width of the
    preset, because narrow models learn slowly with the common value of 0.02."""

    def check(self) -> None:
        super().check()
        parse_cls_scopes(self.cls_scopes or ())  # Raises ValueError if a value is invalid

    def get_config_values(self) -> dict[str, Any]:
        """Select the ViTCLSConfig fields that these options set, with their values."""
        values = {field.name: getattr(self, field.name) for field in fields(ModelOptions)}
        config_values = {
            name: value
            for name, value in values.items()
            if name not in NO_CONFIG_FIELDS and value not in (None, "native")
        }
        config_values |= self.model_config or {}
        if self.pooled_layers:
            config_values["pooled_layers"] = list(self.pooled_layers)
        if self.cls_scopes:
            config_values["cls_scopes"] = parse_cls_scopes(self.cls_scopes)
            config_values.setdefault("num_cls_tokens", len(config_values["cls_scopes"]))
        return config_values


def parse_cls_scopes(values: Sequence[str]) -> list[str | list[int]]:
    """Convert the values of `--cls-scopes` to `ViTCLSConfig.cls_scopes`.

    Each scope (one per CLS token) is "image" or [rows, columns, row, column]. Raise ValueError if a
    value is not `image` or a grid such as `2x2`.
    """
    scopes: list[str | list[int]] = []
    for value in values:
        if value == "image":
            scopes.append(value)
        elif match := re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", value):
            rows = int(match[1])
            columns = int(match[2])
            scopes += [
                [rows, columns, row, column] for row in range(rows) for column in range(columns)
            ]
        else:
            raise ValueError(
                f"`cls_scopes` requires 'image' or ROWSxCOLUMNS, but got {value!r}. Example: "
                "`cls_scopes=('image', '2x2')`"
            )
    return scopes


# The fields of the last base class come first.
@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(AugmentationOptions, DivisionOptions, ModelOptions):
    """Train a classifier of labeled images (of a frozen encoder, or with fine-tuning), measure and save it."""

    # Training and evaluation
    epochs: float | None = None
    """Number of passes over the training images; setting it makes the run take training steps.
    Default: 5 for LoRA, tokens, and a start from the classifier of the frozen model; otherwise 30, or
    10 for pre-trained weights and at least 10,000 images.
    Without steps, the encoder stays frozen: that is the default below max(2,000, 50 x classes) images,
    or if five epochs would take more than ten minutes on a CPU."""
    max_steps: int | None = None
    """Number of optimizer steps, instead of --epochs."""
    batch_size: int | None = None
    """Number of training images per process and forward pass. Default: 64, or 32 for fewer than
    10,000 images."""
    gradient_accumulation_steps: int = 1
    """Number of forward and backward passes per optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate. The learning rate increases linearly (--warmup), and then decreases to 0
    with a cosine schedule. Default: depends on the initial weights and the width, for example 5e-4
    for a ViT-Ti with random weights and 5e-5 for a pre-trained ViT-B."""
    layer_decay: float | None = None
    """Layer-wise learning rate decay (BEiT, Bao et al. 2021): ratio of each layer's learning rate
    to the next layer's. Tokens, position embeddings and patch embeddings count as one layer
    before the first layer. 1: the same learning rate for all layers. Default: 0.75 for pre-trained
    weights, otherwise 1."""
    warmup: float = 0.1
    """Fraction of training steps used for learning rate warmup."""
    weight_decay: float = 0.05
    """Weight decay of linear layers and the patch projection. Biases, norms, tokens and position
    embeddings have no weight decay. DeiT uses 0.05."""
    label_smoothing: float = 0.1
    """Label smoothing: probability that is distributed evenly over all classes. DeiT uses 0.1."""
    class_balance: Literal["none", "weights"] = "none"
    """Method for imbalanced classes: with `weights`, classes count equally, in the loss of training steps
    by factors of the images that are inversely proportional to the size of their class."""
    average_with_start: float = 0.5
    """Part of the weights before the first step in the saved weights, if they were trained before;
    the rest comes from the last step (WiSE-FT, Wortsman et al. 2021). 0: the last weights
    alone, as from random weights."""
    trainable: str = "full"
    """Weights to train: `full` (all), `head` (linear probing), `last-N` (last N layers and head),
    `lora` (of rank 8, on queries and values), or `tokens` (the new special tokens, or all of them if none
    is new, and the head)."""
    probe: bool = True
    """Fit a linear classifier to the features of a pre-trained, frozen encoder: a run without steps
    saves it, and steps start from it. --no-probe: start from random values."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass. `auto`: the setting of `accelerate launch` or, without it,
    `bf16` on GPUs and CPUs with bf16 instructions (on CPUs, for models at least as wide as ViT-Ti),
    and otherwise `no`."""
    compile: bool = False
    """Compile the model with torch.compile."""
    seed: int = 0
    """Random seed for the initial weights, image order, augmentation and stochastic depth."""

    # Output, checkpoints, experiment trackers and the Hub
    output_dir: Path
    """Output folder. To continue an earlier run in this folder, set --resume. To replace the
    earlier run, set --overwrite."""
    config: Path | None = None
    """Recipe: a YAML file of flags. Flags on the command line override flags in the recipe."""
    resume: bool = False
    """Resume from the newest checkpoint in --output-dir, or start from the beginning if there is no
    checkpoint."""
    overwrite: bool = False
    """Replace an earlier run in --output-dir and all other files that have the same names as output
    files, which are removed when training starts. With --resume, a run that can be continued is
    continued, not replaced."""
    save_every: int | None = None
    """Number of steps between checkpoints. Default: a checkpoint at each evaluation."""
    keep_checkpoints: int | None = None
    """Number of most recent checkpoints to keep, also after the run. Default: 2, which are removed
    when the run is finished."""
    log_with: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Experiment trackers to log to, in addition to metrics.jsonl."""
    report: bool = True
    """Write report.html (see `vitcls inspect`) and add attention maps to the model card."""
    push_to_hub: bool = False
    """Push the model to the Hub and verify the pushed commit. `vitcls push` also pushes a finished
    run: to a private repository, with a license, or with images of the dataset in its card."""
    hub_model_id: str | None = None
    """Repository to push to. Default: a repository in your account, named after --output-dir."""

    # Distillation
    teacher: str | None = None
    """Teacher, from whose predictions the model learns, as well as from the labels: a folder or Hub
    id of a transformers classifier (`ID@COMMIT` pins the model), or `timm:NAME`. One head learns
    from both (Hinton et al. 2015). With --num-distillation-tokens 1, a second head learns from the
    teacher (DeiT, Touvron et al. 2021). Default: no distillation."""
    distillation: Literal["soft", "hard"] = "soft"
    """Target of the distillation: the class probabilities (soft) or the top-1 class (hard) of
    the teacher."""

    def check(self) -> None:
        super().check()
        check_minimum(self, 1, "max_steps", "batch_size", "gradient_accumulation_steps")
        check_minimum(self, 1, "save_every", "keep_checkpoints")
        check_minimum(self, 0, "weight_decay", "seed")
        check_each(
            self,
            lambda value: 0 < value < math.inf,
            "above 0 and finite",
            "epochs",
            "learning_rate",
        )
        check_each(
            self,
            lambda value: 0 <= value < 1,
            "at least 0 and below 1",
            "warmup",
            "label_smoothing",
            "average_with_start",
        )
        check_each(self, lambda value: 0 < value <= 1, "above 0 and at most 1", "layer_decay")
        check_each(
            self,
            re.compile(r"full|head|lora|tokens|last-[1-9]\d*").fullmatch,
            "full, head, lora, tokens or last-N such as last-2",
            "trainable",
        )
