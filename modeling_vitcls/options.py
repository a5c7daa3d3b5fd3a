"""Flags of the commands `finetune`, `pretrain`, `evaluate`, `predict`, `inspect`, `look`, `export`, `add-task`,
`add-class` and `verify-unchanged`.

Each field is a flag (`batch_size` is `--batch-size`) and a key of a recipe file. The docstring below a field is the
help text of the flag. This file imports only the standard library, so that `--help` and errors about flags appear
immediately.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


# Flags of other training scripts -> equivalent flags in this package.
EQUIVALENT_FLAGS = {
    "lr": "learning_rate",
    "bs": "batch_size",
    "wd": "weight_decay",
    "per_device_train_batch_size": "batch_size",
    "num_train_epochs": "epochs",
    "data": "dataset",
    "data_dir": "dataset",
    "model_name_or_path": "model",
    "fp16": "mixed_precision",
    "bf16": "mixed_precision",
    "clip_grad": "max_gradient_norm",
}


@dataclass(frozen=True)
class DataOptions:
    """Dataset and held-out split."""

    dataset: str
    """`digits` (scikit-learn), a folder with a subfolder per class, a CSV, JSON Lines or Parquet file, a folder
    written by `save_to_disk`, a folder with MNIST's idx files, or a dataset id on the Hub."""
    image_column: str | None = None
    """Column with images or image paths. By default, the column is detected by type or name."""
    label_column: tuple[str, ...] | None = None
    """Column with the labels; several columns define several tasks. By default, the column is detected by type or
    name."""
    label_separator: str | None = None
    """Separator of the labels in a text column with several labels per image (`cat|dog`)."""
    label_names: tuple[str, ...] | None = None
    """Names of all labels. By default, they are declared by the dataset or collected from the label column; they are
    required for WebDataset shards on the Hub."""
    held_out_fraction: float = 0.2
    """Fraction of the images to hold out for evaluation if the dataset has no evaluation split. Whether an image is
    held out depends only on the fraction, --split-seed and the checksum of the image. 0: train on all images, without
    evaluation."""
    split_seed: int = 0
    """Random seed for the held-out split. Use the same seed for all runs that you compare. Evaluation uses the seed
    of the training run."""
    folds: int | None = None
    """Cross-validation: train one model per fold in OUTPUT_DIR/fold-1, fold-2, ..., and report the mean accuracy."""
    fold: int | None = None
    """With --folds: hold out only this fold (numbered from 1), and write the output to OUTPUT_DIR itself. Default: all
    folds, one after another."""
    streaming: bool = False
    """Stream the dataset during training instead of downloading it. Requires --max-steps."""
    shuffle_buffer: int = 1000
    """Number of images in the shuffle buffer of a streamed dataset. For an image folder, which is streamed class by
    class, set the number of images in the folder."""
    exclude: Path | None = None
    """CSV file of `evaluate --audit`: the training images in it are left out. Held-out images are not left out."""
    max_unreadable_images: int = 100
    """Maximum number of unreadable images, which are reported and skipped. The run stops if more images are
    unreadable."""
    num_workers: int = 2
    """Number of data loading processes per training process. 0: images are loaded in the training process."""

    def __post_init__(self) -> None:
        check_value(
            self, "held_out_fraction", 0 <= self.held_out_fraction < 1, "at least 0 and below 1"
        )
        check_minimum(self, 2, "folds")
        if self.fold is not None:
            check_value(
                self, "fold", 1 <= self.fold <= (self.folds or 0), "from 1 to the value of --folds"
            )
        check_minimum(self, 1, "shuffle_buffer")
        if self.streaming and self.exclude is not None:
            raise ValueError(
                "--exclude requires all image names, which a stream lacks. Remove --streaming"
            )
        check_minimum(self, 0, "split_seed", "max_unreadable_images", "num_workers")


@dataclass(frozen=True)
class ModelOptions:
    """Model. Flags that are not set keep the values of the preset or checkpoint."""

    model: str
    """A preset to train from scratch (`vitcls-tiny`, `vitcls-small`, `vitcls-base`, `vitcls-large`), a folder or Hub
    id of a vitcls model, or another ViT, which is converted automatically (`timm:NAME`, `transformers:ID`, a
    folder, a Hub id, a file). `ID@COMMIT` pins a model on the Hub."""
    num_cls_tokens: int | None = None
    """Number of CLS tokens."""
    num_distillation_tokens: int | None = None
    """Number of distillation tokens."""
    num_register_tokens: int | None = None
    """Number of register tokens."""
    pooling: Literal["cls", "mean", "cls_mean", "max", "attention"] | None = None
    """Pooling of the tokens for the classifier. Default: the pooling of the preset or checkpoint, or chosen by the
    probe of a pre-trained encoder."""
    pooled_layers: tuple[int, ...] | None = None
    """Layers that the classifier reads, such as -4 -3 -2 -1 for the last four; their features are concatenated.
    Default: the last layer, or chosen by the probe."""
    cls_pooling: Literal["first", "mean", "concat"] | None = None
    """Reduction of several CLS tokens to one vector."""
    cls_scopes: tuple[str, ...] | None = None
    """Image regions that the CLS tokens attend to: `image` adds a CLS token for the whole image, and `2x2` adds a CLS
    token for each cell of a grid of 2 rows and 2 columns."""
    specialized_layers: tuple[str, ...] | None = None
    """Parts of layers in which special tokens have weights of their own: `norm:12 qkv:4` for the norms of the first 12
    layers, and the query, key and value projections of the first 4 layers."""
    head_type: Literal["linear", "mlp"] | None = None
    """Type of the classification head."""
    image_size: int | tuple[int, int] | Literal["native"] | None = None
    """Image height and width in pixels; one number sets both. `native` keeps the size of the checkpoint. Default: the
    size of the preset or checkpoint, but fine-tuning uses 224 pixels for checkpoints of more than 256 pixels per
    side."""
    fit: Literal["squash", "crop", "pad"] | None = None
    """How images of other aspect ratios become the input: resize the whole image (`squash`), crop the center (`crop`)
    or add gray (`pad`). Saved in the image processor, for evaluation and prediction. Default: as the checkpoint does,
    or `squash` if the probe measures that it is better."""
    patch_size: int | tuple[int, int] | None = None
    """Patch height and width in pixels; one number sets both."""
    position_embedding_type: Literal["learned", "sincos_2d", "rope_2d", "none"] | None = None
    """Type of position embeddings."""
    hidden_size: int | None = None
    """Embedding dimension."""
    num_hidden_layers: int | None = None
    """Number of layers."""
    num_attention_heads: int | None = None
    """Number of attention heads per layer."""
    intermediate_size: int | None = None
    """Hidden dimension of the MLP."""
    token_init: Literal["trunc_normal", "near_zero", "zeros"] | None = None
    """Initial values of new CLS, distillation and register tokens."""
    drop_path_rate: float | None = None
    """Stochastic depth rate of the last layer; the rate increases linearly from 0 in the first layer."""
    patch_drop_rate: float | None = None
    """Fraction of patches to drop at random from each training image. Training is faster, but the model is less
    accurate."""
    initializer_range: float | None = None
    """Standard deviation of new weights. Default: depends on the width of the preset (training/defaults.py), because
    narrow models learn slowly with the common value of 0.02."""

    def __post_init__(self) -> None:
        parse_cls_scopes(self.cls_scopes or ())  # raises ValueError if a value is invalid
        parse_specialized_layers(self.specialized_layers or ())

    def get_config_values(self) -> dict[str, Any]:
        """Return the ViTCLSConfig fields that these options set, with their values."""
        config_values = {
            name: value
            for name, value in vars(self).items()
            if name not in ("model", "fit") and value not in (None, "native")
        }
        if self.pooled_layers:
            config_values["pooled_layers"] = list(self.pooled_layers)
        if self.cls_scopes:
            config_values["cls_scopes"] = parse_cls_scopes(self.cls_scopes)
            config_values.setdefault("num_cls_tokens", len(config_values["cls_scopes"]))
        if self.specialized_layers:
            config_values["specialized_layers"] = parse_specialized_layers(self.specialized_layers)
        return config_values


def parse_cls_scopes(values: Sequence[str]) -> list[str | list[int]]:
    """Convert the values of `--cls-scopes` to `ViTCLSConfig.cls_scopes`. Each scope (one per CLS token) is "image"
    or [rows, columns, row, column]. Raise ValueError if a value is not `image` or a grid such as `2x2`."""
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
                f"--cls-scopes requires `image` or ROWSxCOLUMNS, but got {value!r}. Example: --cls-scopes image 2x2"
            )
    return scopes


def parse_specialized_layers(values: Sequence[str]) -> dict[str, list[int]]:
    """Convert the values of `--specialized-layers` to `ViTCLSConfig.specialized_layers`; `norm:2` is {"norm": [0, 1]}.
    Raise ValueError if a value is invalid."""
    layers = {}
    for value in values:
        if not (match := re.fullmatch(r"(norm|qkv):([1-9]\d{0,2})", value)):
            raise ValueError(
                f"--specialized-layers requires norm:N or qkv:N, but got {value!r}. Example: norm:12 qkv:4"
            )
        layers[match[1]] = list(range(int(match[2])))
    return layers


@dataclass(frozen=True)
class AugmentationOptions:
    """Random augmentation of training images."""

    crop_scale: float | None = None
    """Minimum area of a random crop, as a fraction of the image area. 1: resize the whole image. Default: 0.35, or 1
    for images of at most 64 pixels per side."""
    flip: bool = True
    """Flip each image horizontally with a probability of 0.5."""
    rotation: float = 0.0
    """Maximum rotation in degrees."""
    shift: float | None = None
    """Maximum translation along each axis, as a fraction of the image size. Default: 0.04 for images of at most 64
    pixels per side, and 0 for larger images."""
    zoom: float = 0.0
    """Maximum relative change of scale. For example, 0.1 scales images by a random factor from 0.9 to 1.1."""
    auto_augment: Literal["none", "rand", "trivial"] = "none"
    """Automatic augmentation: RandAugment (Cubuk et al. 2020; magnitude 9, as in DeiT) or TrivialAugment (Müller and
    Hutter 2021)."""
    random_erasing: float = 0.0
    """Probability of replacing a random rectangle of an image with noise (Zhong et al. 2020)."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018). 0: off. If --cutmix is also set, each batch uses either mixup or CutMix."""
    cutmix: float = 0.0
    """Alpha of CutMix (Yun et al. 2019). 0: off."""

    def __post_init__(self) -> None:
        check_value(
            self,
            "crop_scale",
            self.crop_scale is None or 0 < self.crop_scale <= 1,
            "above 0 and at most 1",
        )
        check_value(self, "rotation", 0 <= self.rotation <= 180, "from 0 to 180")
        check_value(self, "random_erasing", 0 <= self.random_erasing <= 1, "from 0 to 1")
        check_value(
            self, "shift", self.shift is None or 0 <= self.shift < 1, "at least 0 and below 1"
        )
        check_value(self, "zoom", 0 <= self.zoom < 1, "at least 0 and below 1")
        check_minimum(self, 0, "mixup", "cutmix")


@dataclass(frozen=True)
class TrainingOptions:
    """Training and evaluation."""

    epochs: float | None = None
    """Number of passes over the training images. Default: 30, or 10 for pre-trained weights and a large dataset
    (at least 10,000 images, or a stream)."""
    max_steps: int | None = None
    """Number of optimizer steps, instead of --epochs."""
    batch_size: int | None = None
    """Number of training images per process and forward pass. Default: 64, or 32 for fewer than 10,000 images."""
    gradient_accumulation_steps: int = 1
    """Number of forward and backward passes per optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate. The learning rate increases linearly (--warmup), and then decreases to 0 with a cosine
    schedule. Default: depends on the initial weights and the width (training/defaults.py), for example 5e-4 for a
    ViT-Ti with random weights and 5e-5 for a pre-trained ViT-B."""
    layer_decay: float | None = None
    """Layer-wise learning rate decay (BEiT, Bao et al. 2021): ratio of each layer's learning rate to that of the next
    layer. Tokens, position embeddings and patch embeddings count as one layer before the first layer. 1: the same
    learning rate for all layers. Default: 0.75 for pre-trained weights, otherwise 1."""
    warmup: float = 0.1
    """Fraction of training steps used for learning rate warmup."""
    weight_decay: float = 0.05
    """Weight decay of linear layers and the patch projection. Biases, norms, tokens and position embeddings have no
    weight decay. DeiT uses 0.05."""
    label_smoothing: float = 0.1
    """Label smoothing: probability that is distributed evenly over all classes. DeiT uses 0.1."""
    class_balance: Literal["none", "weights"] = "none"
    """Method for imbalanced classes: `weights` multiplies the loss of each image by a factor
    that is inversely proportional to the size of its class."""
    max_gradient_norm: float = 1.0
    """Maximum norm of the gradients; gradients with a larger norm are scaled down. The ViT paper uses 1."""
    ema_decay: float | None = None
    """Decay of an exponential moving average of the weights, which is evaluated and saved instead of the
    weights. 0.999 is suitable for runs of a few thousand steps. Default: no moving average."""
    trainable: str = "full"
    """Weights to train: `full` (all), `head` (linear probing), `last-N` (last N layers and head), or `lora`."""
    probe: bool = True
    """Start the classifier of a pre-trained model from logistic regression on the features of the frozen model, and
    print the accuracy of the frozen model. `--trainable head` then stops. --no-probe: start from random values."""
    lora_rank: int = 8
    """Rank of the LoRA matrices for the query and value projections (Hu et al. 2021)."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass. `auto`: the setting of `accelerate launch` or, without it, `bf16` on GPUs and
    CPUs with bf16 instructions (on CPUs, for models at least as wide as ViT-Ti), and otherwise `no`."""
    compile: bool = False
    """Compile the model with torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass. Training needs less memory, but more time."""
    seed: int = 0
    """Random seed for the initial weights, image order, augmentation and stochastic depth."""
    log_every: int = 10
    """Number of steps between log entries in metrics.jsonl."""
    log_attention_every: int = 100
    """Logged steps whose number is a multiple of this value contain each layer's CLS attention entropy. 0: off."""
    evaluate_every: int = 1
    """Number of epochs between evaluations on held-out images. The model is always evaluated after the last step."""
    early_stopping: int | None = None
    """Stop after this number of evaluations without improvement. Requires --select best. Default: run all steps."""
    select: Literal["last", "best"] | None = None
    """Checkpoint to save and report: the last checkpoint, or the checkpoint with the best metric, which may be the
    frozen model of the probe. The best checkpoint is selected on the validation split if there is also a test split,
    otherwise on additional held-out training images. The reported metrics do not use these images. Default: best for
    pre-trained weights if the dataset has enough images, otherwise last."""

    def __post_init__(self) -> None:
        check_minimum(
            self,
            1,
            "max_steps",
            "batch_size",
            "gradient_accumulation_steps",
            "log_every",
            "evaluate_every",
        )
        check_minimum(self, 1, "lora_rank", "early_stopping")
        if self.early_stopping is not None and self.select == "last":
            raise ValueError(
                "--early-stopping requires --select best. Remove --select last or --early-stopping"
            )
        check_minimum(self, 0, "weight_decay", "seed", "log_attention_every")
        for name in ("epochs", "learning_rate", "max_gradient_norm"):
            check_value(
                self, name, getattr(self, name) is None or getattr(self, name) > 0, "above 0"
            )
        for name in ("warmup", "label_smoothing"):
            check_value(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        check_value(
            self,
            "layer_decay",
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            "above 0 and at most 1",
        )
        check_value(
            self, "ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1"
        )
        is_valid_trainable = bool(re.fullmatch(r"full|head|lora|last-[1-9]\d*", self.trainable))
        check_value(
            self, "trainable", is_valid_trainable, "full, head, lora or last-N such as last-2"
        )

    @property
    def needs_selection(self) -> bool:
        """Return whether evaluations are compared, which requires images that are not reported."""
        return self.select == "best" or self.early_stopping is not None


@dataclass(frozen=True)
class DistillationOptions:
    """Distillation from a teacher (DeiT, Touvron et al. 2021).

    The distillation token is trained on the predictions of the teacher, and the CLS token is trained on the labels. If
    the model has no distillation token, a distillation token is added.
    """

    teacher: str | None = None
    """Teacher: a folder or Hub id of a transformers classifier (`ID@COMMIT` pins the model), `timm:NAME`, or a
    state-dict file. Default: no distillation."""
    distillation: Literal["soft", "hard"] = "hard"
    """Target of the distillation token: the class probabilities (soft) or the top-1 class (hard) of the teacher."""
    distillation_alpha: float = 0.5
    """Weight of the distillation loss. The weight of the label loss is 1 minus this value. DeiT uses 0.5."""
    distillation_tau: float = 3.0
    """Temperature of soft distillation. The DeiT paper uses 3."""
    teacher_views: int = 0
    """Number of augmented views per image. The teacher predictions for each view are computed once and reused in later
    epochs. 0: views and predictions are computed in each step."""

    def __post_init__(self) -> None:
        check_value(
            self, "distillation_alpha", 0 < self.distillation_alpha <= 1, "above 0 and at most 1"
        )
        check_value(self, "distillation_tau", self.distillation_tau > 0, "above 0")
        check_minimum(self, 0, "teacher_views")


@dataclass(frozen=True)
class RunOptions:
    """Output, checkpoints, experiment trackers and the Hub."""

    resume: bool = False
    """Resume from the newest checkpoint in --output-dir, or start from the beginning if there is no checkpoint."""
    overwrite: bool = False
    """Replace an earlier run in --output-dir and all other files that have the same names as output files."""
    save_every: int | None = None
    """Number of steps between checkpoints. Default: a checkpoint at each evaluation, or every 1,000 steps for a
    streamed dataset."""
    keep_checkpoints: int = 2
    """Number of most recent checkpoints to keep. The best checkpoint is always kept."""
    log_with: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Experiment trackers to log to, in addition to metrics.jsonl."""
    report: bool = True
    """Write report.html (see `vitcls inspect`) and add attention maps to the model card."""
    dry_run: bool = False
    """Test the run and estimate the duration: train a few steps, evaluate, save a checkpoint and the model, and check
    the push permission. The output is removed."""
    push_to_hub: bool = False
    """Push the model to the Hub and verify the pushed commit."""
    hub_model_id: str | None = None
    """Repository to push to. Default: a repository in your account, named after --output-dir."""
    hub_private: bool = False
    """If the repository does not exist, create it as a private repository."""
    hub_verify: bool = True
    """Load the model from the pushed commit in a new process, and compare its outputs with the outputs of the saved
    model."""
    hub_checkpoint_branch: str | None = None
    """Push each saved checkpoint to this branch in the background. To resume on another machine, run
    `hf download ID --revision BRANCH --local-dir FOLDER`, then repeat the command with --output-dir FOLDER --resume.
    Default: checkpoints are not pushed. Requires --push-to-hub."""
    license: str | None = None
    """License of the trained weights for the model card: a Hub identifier such as apache-2.0. If the initial weights
    have a license, the card contains the license of the initial weights instead. Default: no license in the card."""
    card_samples: bool = False
    """Show a few held-out images in the model card, even if the repository is public and the images are local files.
    Images of `digits` and of datasets on the Hub are always shown."""

    def __post_init__(self) -> None:
        check_minimum(self, 1, "save_every", "keep_checkpoints")
        is_valid_branch = self.hub_checkpoint_branch not in ("", "main")
        check_value(self, "hub_checkpoint_branch", is_valid_branch, "a branch other than main")
        is_valid_license = self.license is None or bool(
            re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license)
        )
        requirement = "a Hub license identifier, such as apache-2.0 or cc-by-4.0"
        check_value(self, "license", is_valid_license, requirement)
        if self.hub_checkpoint_branch and not self.push_to_hub:
            raise ValueError("--hub-checkpoint-branch requires --push-to-hub. Set --push-to-hub.")


@dataclass(frozen=True)
class CommonOptions:
    """Flags of both fine-tuning and pre-training."""

    output_dir: Path
    """Output folder. To continue an earlier run in this folder, set --resume. To replace the earlier run, set
    --overwrite."""
    data: DataOptions
    model: ModelOptions
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    run: RunOptions = field(default_factory=RunOptions)
    config: Path | None = None
    """Recipe: a YAML file of flags. Flags on the command line override flags in the recipe."""

    def __post_init__(self) -> None:
        if self.output_dir.is_file():
            raise ValueError(
                f"--output-dir {self.output_dir} is a file. Set --output-dir to a folder"
            )


@dataclass(frozen=True)
class FinetuneOptions(CommonOptions):
    """Fine-tune a ViT on labeled images, evaluate the model on held-out images, and save the model and the results."""

    distillation: DistillationOptions = field(default_factory=DistillationOptions)


@dataclass(frozen=True)
class LeJEPAOptions:
    """Views and loss of LeJEPA (Balestriero and LeCun 2025)."""

    global_crops: int = 2
    """Number of large crops of each image."""
    local_crops: int = 6
    """Number of small crops of each image, with 0.43 times the image size."""
    global_crop_scale: float = 0.3
    """Minimum area of global crops and maximum area of local crops, as a fraction of the image area."""
    sigreg_weight: float = 0.05
    """Weight of SIGReg, the loss that keeps the features from collapsing."""
    projector_width: int = 1024
    """Channels of the projector's two hidden layers."""

    def __post_init__(self) -> None:
        check_minimum(self, 1, "global_crops", "projector_width")
        check_minimum(self, 0, "local_crops")
        check_value(
            self,
            "global_crop_scale",
            0.05 < self.global_crop_scale <= 1,
            "above 0.05 and at most 1",
        )
        check_value(self, "sigreg_weight", 0 < self.sigreg_weight < 1, "between 0 and 1")


@dataclass(frozen=True)
class MAEOptions:
    """Masks and decoder of MAE (He et al. 2021)."""

    mask_ratio: float = 0.75
    """Fraction of the patches to mask."""
    decoder_layers: int = 4
    """Layers of the decoder. The paper uses 8 for ViT-B."""

    def __post_init__(self) -> None:
        check_value(self, "mask_ratio", 0 < self.mask_ratio < 1, "between 0 and 1")
        check_minimum(self, 1, "decoder_layers")


@dataclass(frozen=True)
class TeachersOptions:
    """Distillation without labels (UNIC, Sariyildiz et al. 2024): distillation token k imitates teacher k."""

    teachers: tuple[str, ...] = ()
    """Models whose pooled vectors the distillation tokens imitate: vitcls folders, Hub ids, or any other ViT that
    --model accepts. By default, each teacher has its own token; with --num-distillation-tokens 1, all teachers share
    one token, and with 0, the pooled token (CLS) imitates all of them."""
    distill_patches: bool = False
    """The patches also imitate the patches of the teachers, resampled to the same grid."""
    teacher_views: int = 0
    """Number of augmented views per image. The teachers' vectors for each view are computed once and reused in later
    epochs. 0: views and vectors are computed in each step."""

    def __post_init__(self) -> None:
        check_minimum(self, 0, "teacher_views")
        if self.distill_patches and self.teacher_views:
            raise ValueError(
                "--teacher-views stores one vector per image, but --distill-patches requires all patches. Remove one "
                "of the two flags"
            )


@dataclass(frozen=True)
class PretrainOptions(CommonOptions):
    """Pre-train a ViT on images without labels. The pre-trained model can be fine-tuned."""

    method: Literal["lejepa", "mae", "distillation"] | None = None
    """LeJEPA trains the pooled token (CLS), MAE reconstructs masked patches, and distillation imitates --teachers.
    Default: distillation with --teachers, otherwise lejepa."""
    distillation: TeachersOptions = field(default_factory=TeachersOptions)
    lejepa: LeJEPAOptions = field(default_factory=LeJEPAOptions)
    mae: MAEOptions = field(default_factory=MAEOptions)


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a vitcls model on labeled images. Each image is counted exactly once."""

    model: str
    """Folder or Hub id of a vitcls model (`ID@COMMIT` pins the model), or another ViT, which is converted once
    (`timm:NAME`, `transformers:ID`, a folder, a Hub id, a file)."""
    data: DataOptions
    split: str | None = None
    """Dataset split, of which all images are evaluated. Default: `test` or, if there is none, `validation` or the only
    split, without the images that the model was trained on."""
    max_images: int | None = None
    """Maximum number of images to evaluate, drawn at random (--split-seed)."""
    fit: Literal["squash", "crop", "pad"] | None = None
    """How images of other aspect ratios become the input: resize the whole image (`squash`), crop the center (`crop`)
    or add gray (`pad`). Default: the setting of the image processor."""
    batch_size: int | None = None
    """Number of images per process and forward pass. Default: 64 on GPUs. On CPUs, larger batches are not faster and
    need more memory: as many images as have 1,600 tokens, for example 8 images of 224 pixels."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass. `auto`: the setting of `accelerate launch` or, without it, `bf16` on GPUs and
    CPUs with bf16 instructions (on CPUs, for models at least as wide as ViT-Ti), and otherwise `no`."""
    backend: str = "auto"
    """Engine: `torch`, or `onnx` or `openvino` for model.onnx or model.xml in the model's folder, which then
    requires no other weights, or a file that `vitcls export` wrote. `auto`: on CPUs, for many images and if the extra
    `export` is installed, the engine that is measured to be fastest; otherwise `torch`."""
    frozen: Literal["knn", "logreg"] | None = None
    """Evaluate the frozen encoder instead of the classifier of the model: fit `knn` or `logreg` (logistic regression)
    to the features of the training images."""
    output: Path | None = None
    """JSON file for the metrics, including the metrics of each class and the confusion matrix."""
    task: str | None = None
    """Evaluate an added task (`vitcls add-task`) instead of the classifier of the model."""
    unknown_dataset: str | None = None
    """Dataset with images of none of the classes: measures how well the energy separates these images from the
    evaluated images (AUROC)."""
    per_image: Path | None = None
    """Parquet file with one row per image: label, prediction, probabilities and loss."""
    audit: Path | None = None
    """HTML page of likely label errors, near duplicates, outliers and overlapping classes, with a CSV file for
    `finetune --exclude` in the same folder. Checks the labels of held-out images; with --frozen logreg, or if --model
    is the output folder of a run with --folds, all labels."""
    overwrite: bool = False
    """Replace the files of an earlier --audit."""
    config: Path | None = None
    """Recipe: a YAML file of flags. Flags on the command line override flags in the recipe."""

    def __post_init__(self) -> None:
        check_minimum(self, 1, "batch_size", "max_images")
        if self.task is not None and (
            self.frozen or self.audit or self.per_image or self.unknown_dataset
        ):
            raise ValueError(
                "--task only measures a task. Remove --frozen, --audit, --per-image, --unknown-dataset"
            )
        if self.backend not in ("auto", "torch") and (self.frozen or self.audit):
            raise ValueError("--frozen and --audit require --backend torch. Remove --backend")


@dataclass(frozen=True)
class ImageOptions:
    """Model and image flags that prediction and inspection share. Labels are not required."""

    model: str | None
    """Folder or Hub id of a vitcls model (`ID@COMMIT` pins the model), or another ViT, which is converted once
    (`timm:NAME`, `transformers:ID`, a folder, a Hub id, a file)."""
    paths: tuple[str, ...] = ()
    """Image files, folders (including subfolders), or URLs."""
    dataset: str | None = None
    """`digits` (scikit-learn), a folder with a subfolder per class, a CSV, JSON Lines or Parquet file, a folder
    written by `save_to_disk`, a folder with MNIST's idx files, or a dataset id on the Hub."""
    image_column: str | None = None
    """Column with images or image paths. By default, the column is detected by type or name."""
    batch_size: int | None = None
    """Maximum number of images per process and forward pass. To save memory, smaller batches are used if full
    attention maps are computed. Default: 32 on GPUs; on CPUs, as many images as have 1,600 tokens, for example 8
    images of 224 pixels."""


@dataclass(frozen=True)
class PredictOptions(ImageOptions):
    """Predict the labels of images, or compute the features of images.

    The images are selected by PATHS, --list or --dataset, and distributed over all processes. The row of an unreadable
    image contains an error message.
    """

    model: str | None = None
    """Folder or Hub id of a vitcls model (`ID@COMMIT` pins the model), or another ViT, which is converted once
    (`timm:NAME`, `transformers:ID`, a folder, a Hub id, a file)."""
    list: Path | None = None
    """Text file with one image file, folder or URL per line."""
    split: str | None = None
    """Dataset split with the images. Default: the only split."""
    streaming: bool = False
    """Stream the dataset instead of downloading it."""
    output: Path | None = None
    """Output file (.csv, .json, .jsonl or .parquet), or a folder for Parquet files with --shard-size images each. In
    an existing folder, only missing files are written. Default: print a table."""
    shard_size: int = 10_000
    """Number of images per Parquet file, if --output is a folder."""
    shard: str | None = None
    """`i/n`: compute the i-th of n parts (numbered from 1) of the files in the folder --output, for array jobs. The
    jobs do not communicate."""
    merge: Path | None = None
    """Check that a folder of Parquet files is complete, and write all rows to --output if it is set. No images are
    read."""
    top_k: int | None = None
    """Maximum number of predicted labels per image. Default: 1 or, for multi-label models, all labels with a
    probability of at least --threshold."""
    threshold: float = 0.5
    """Minimum probability of a predicted label (multi-label models only)."""
    coverage: float | None = None
    """Add the set of labels that contains the true label with this probability, for example 0.9 (split conformal
    prediction, from the held-out images of the model's run)."""
    features: tuple[str, ...] | None = None
    """Features to write instead of labels: `cls`, `registers`, `distillation` or `patches`, or `mean` for the mean of
    the patch tokens. `cls@6` is the output of layer 6 after the final norm; the default is the last layer. Each of
    several features has a column."""
    feature_dtype: Literal["float32", "float16"] = "float32"
    """Data type of the features."""
    fit: Literal["squash", "crop", "pad"] | None = None
    """How images of other aspect ratios become the input: resize the whole image (`squash`), crop the center (`crop`)
    or add gray (`pad`). Default: the setting of the image processor."""
    backend: str = "auto"
    """Engine: `torch`, or `onnx` or `openvino` for model.onnx or model.xml in the model's folder, which then
    requires no other weights, or a file that `vitcls export` wrote. `auto`: on CPUs, for many images and if the extra
    `export` is installed, the engine that is measured to be fastest; otherwise `torch`."""
    num_workers: int | None = None
    """Number of image loading threads per process. Default: the number of CPU cores, but at most 8."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass. `auto`: the setting of `accelerate launch` or, without it, `bf16` on GPUs and
    CPUs with bf16 instructions (on CPUs, for models at least as wide as ViT-Ti), and otherwise `no`."""

    def __post_init__(self) -> None:
        check_minimum(self, 1, "shard_size", "batch_size", "top_k", "num_workers")
        check_value(self, "threshold", 0 <= self.threshold <= 1, "from 0 to 1")
        check_value(
            self, "coverage", self.coverage is None or 0 < self.coverage < 1, "between 0 and 1"
        )
        if self.coverage is not None and self.features:
            raise ValueError(
                "--coverage requires labels, but --features writes features. Remove one of the two flags"
            )
        if self.merge is None and self.model is None:
            raise ValueError("Set --model to the model, or --merge to a folder of predictions.")
        if self.merge is None and sum(map(bool, (self.paths, self.list, self.dataset))) != 1:
            raise ValueError("Set exactly one of PATHS, --list and --dataset to select the images.")
        if self.dataset is None and (self.split or self.image_column or self.streaming):
            raise ValueError(
                "--split, --image-column and --streaming require --dataset. Set --dataset."
            )
        for name in self.features or ():
            is_feature = bool(
                re.fullmatch(r"(cls|registers|distillation|patches|mean)(@[1-9]\d*)?", name)
            )
            requirement = "cls, registers, distillation, patches or mean, and optionally a layer such as cls@6"
            check_value(self, "features", is_feature, requirement)
        match = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", self.shard or "1/1")
        is_part = match is not None and int(match[1]) <= int(match[2])
        check_value(self, "shard", is_part, "i/n with i from 1 to n, such as 3/16")
        suffix = "" if self.output is None or self.output.is_dir() else self.output.suffix.lower()
        if suffix not in ("", ".csv", ".json", ".jsonl", ".parquet"):
            raise ValueError(
                f"--output {self.output}: set a .csv, .json, .jsonl or .parquet file, or a folder without a suffix"
            )
        if self.shard is not None and (self.output is None or suffix):
            raise ValueError(
                "--shard requires a folder of Parquet files. Set --output to a folder."
            )
        if self.features and (self.output is None or suffix == ".csv"):
            output_text = "a printed table" if self.output is None else "a CSV file"
            raise ValueError(
                f"--features {' '.join(self.features)} cannot be written to {output_text}. Set --output to a "
                "folder, or to a .parquet, .json or .jsonl file."
            )


@dataclass(frozen=True)
class InspectOptions(ImageOptions):
    """Show what the special tokens of a vitcls model do: write an HTML report and print a summary.

    The images are selected by PATHS or --dataset. Subfolder names in PATHS are used as labels if the model has classes
    with these names.
    """

    model: str
    """Folder or Hub id of a vitcls model (`ID@COMMIT` pins the model), or another ViT, which is converted once
    (`timm:NAME`, `transformers:ID`, a folder, a Hub id, a file)."""
    split: str | None = None
    """Dataset split to inspect. Default: `test` or, if there is none, `validation` or the only split, without the
    images that the model was trained on."""
    label_column: tuple[str, ...] | None = None
    """Column with the labels; several columns define several tasks. By default, the column is detected by type or
    name."""
    label_separator: str | None = None
    """Separator of the labels in a text column with several labels per image (`cat|dog`)."""
    output: Path = Path("report.html")
    """HTML file for the report."""
    json: Path | None = None
    """JSON file for the values in the report."""
    num_images: int = 8
    """Number of images in the report: wrong predictions, then the least confident predictions, then typical images."""
    max_images: int = 256
    """Maximum number of images for the statistics. The images are drawn at random and stored in memory."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Precision of the forward pass. `auto`: `bf16` on GPUs and CPUs with bf16 instructions (on CPUs, for models at
    least as wide as ViT-Ti), and otherwise `no`."""

    def __post_init__(self) -> None:
        check_minimum(self, 1, "num_images", "max_images", "batch_size")
        if bool(self.paths) == (self.dataset is not None):
            raise ValueError("Set either PATHS or --dataset to select the images.")
        if self.dataset is None and (
            self.image_column or self.label_column or self.label_separator
        ):
            raise ValueError(
                "--image-column, --label-column and --label-separator require --dataset. Set --dataset."
            )
        if self.output.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--output {self.output}: the file name must end in .html")
        if self.json is not None and self.json.suffix.lower() != ".json":
            raise ValueError(f"--json {self.json}: the file name must end in .json")


@dataclass(frozen=True)
class LookOptions:
    """Draw one sheet per photo: attention of each special token by head and by layer, and features and norms of the
    patches.

    The photos are image files, folders or URLs. Each frame of an animated image has a sheet of its own.
    """

    model: str
    """Folder or Hub id of a vitcls model (`ID@COMMIT` pins the model), or another ViT, which is converted once
    (`timm:NAME`, `transformers:ID`, a folder, a Hub id, a file)."""
    paths: tuple[str, ...] = ()
    """Image files, folders (including subfolders), or URLs."""
    output: Path = Path("look.png")
    """Image file for the sheet, or a folder. For several photos, the name of each photo is appended to the file
    name."""
    json: Path | None = None
    """JSON file for the numbers: attention by head, token and layer, patch norms, and explained variance."""
    image_size: int | tuple[int, int] | None = None
    """Image height and width in pixels; one number sets both. Default: the size of the image processor. Larger images
    have more patches and finer maps."""
    fit: Literal["squash", "crop", "pad"] | None = None
    """How photos of other aspect ratios become the input: resize the whole photo (`squash`), crop the center (`crop`)
    or add gray (`pad`). Default: the setting of the image processor."""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ValueError(
                "Name at least one photo, folder or URL: vitcls look photo.jpg --model M"
            )
        sizes = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,)
        check_value(
            self, "image_size", all(size is None or size >= 1 for size in sizes), "1 or more"
        )
        suffixes = ("", ".png", ".jpg", ".jpeg", ".webp")
        if self.output.suffix.lower() not in suffixes:
            raise ValueError(
                f"--output {self.output}: set a .png, .jpg or .webp file, or a folder without a suffix"
            )
        if self.json is not None and self.json.suffix.lower() != ".json":
            raise ValueError(f"--json {self.json}: the file name must end in .json")


@dataclass(frozen=True)
class ExportOptions:
    """Export a model. Nothing is written if the outputs of the graph and the model differ by more than the limit."""

    model: str
    """A model folder, the id of a model on the Hub, or a preset (random weights)."""
    format: Literal["onnx", "openvino", "transformers.js"]
    """ONNX (.onnx), OpenVINO (.xml and .bin), or a folder for transformers.js."""
    output: Path
    """Output file, which must not exist yet, or a folder: model.onnx (or model.xml) and all files that
    `predict` and `evaluate` with --backend require. With --format transformers.js: a new or empty folder."""
    int8: bool = False
    """With --format onnx or openvino: quantize the matrix products to int8 (NNCF), calibrated on training images of
    --dataset. The image size is fixed."""
    max_drop: float = 0.5
    """With --int8: largest loss of accuracy, in points. If the images show a larger loss with 95% confidence, nothing
    is written."""
    exclude_layers: tuple[int, ...] = ()
    """With --int8: numbers of the layers, from 1, that stay in float32."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels. With --no-dynamic, the graph accepts only this size; otherwise, the size is used
    only in the comparison. Default: the image size of the model."""
    dynamic: bool = True
    """Accept images of different sizes, not only of --image-size. The batch size is always dynamic."""
    dtype: Literal["float32", "float16"] = "float32"
    """dtype of the weights and computations. Inputs and outputs are always float32."""
    dataset: str | None = None
    """Images, as in `vitcls evaluate`, to measure the accuracy of the file. For images without labels, the outputs of
    file and model are compared."""
    split: str | None = None
    """Split of --dataset, as in `vitcls evaluate`."""

    def __post_init__(self) -> None:
        size = self.image_size
        has_dataset = self.dataset is not None
        is_js = self.format == "transformers.js"
        has_graph_settings = (size, self.dynamic, self.dtype) != (None, True, "float32")
        errors = {
            f"--image-size requires positive numbers, but got {size}. Set --image-size HEIGHT WIDTH": size
            is not None
            and min(size) < 1,
            "--format transformers.js does not support --image-size, --no-dynamic or --dtype. Remove the flag": is_js
            and has_graph_settings,
            "--int8 requires --format onnx or openvino, and --dataset": self.int8
            and (is_js or not has_dataset),
            "--int8 does not support --dtype or --no-dynamic. Remove the flag": self.int8
            and (not self.dynamic or self.dtype != "float32"),
            "--exclude-layers requires --int8": bool(self.exclude_layers) and not self.int8,
            "--split requires --dataset": self.split is not None and not has_dataset,
        }
        for message, is_wrong in errors.items():
            if is_wrong:
                raise ValueError(message)


@dataclass(frozen=True)
class AddTaskOptions:
    """Add a task to a finished model: a classifier that reads the features of the model, whose other outputs stay
    equal to the bit."""

    model: str
    """A classifier, a multi-task model or an encoder: a folder, a Hub id, or another ViT, which is converted once."""
    data: DataOptions
    output_dir: Path
    """Output folder, which must be empty or must not exist."""
    name: str | None = None
    """Name of the task, of letters, digits and underscores: the key of `outputs.task_logits`."""
    overwrite_task: bool = False
    """Replace the added task with this name."""
    remove_task: str | None = None
    """Remove the added task with this name. Without --name, the images of --dataset are only compared."""
    max_images: int | None = None
    """Maximum number of images that the classifier is fitted to, drawn at random. Default: all."""
    batch_size: int = 64
    """Number of images per forward pass."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass, as in `vitcls evaluate`."""

    def __post_init__(self) -> None:
        check_minimum(self, 1, "batch_size", "max_images")
        check_stored_images(self.data)
        if self.name is None and self.remove_task is None:
            raise ValueError(
                "--name is missing. Set --name to the name of the task, or --remove-task"
            )
        if self.name is None and self.overwrite_task:
            raise ValueError(
                "--overwrite-task requires --name. Set --name to the task that is replaced"
            )
        if self.name is not None and not self.name.isidentifier():
            raise ValueError(f"--name {self.name} must consist of letters, digits and underscores")


@dataclass(frozen=True)
class AddClassOptions:
    """Add classes to a finished classifier, whose logits of the old classes stay equal to the bit."""

    model: str
    """A classifier with one label per image: a folder or a Hub id."""
    data: DataOptions
    output_dir: Path
    """Output folder, which must be empty or must not exist."""
    old_dataset: str | None = None
    """Images of the old classes, which --dataset has no images of. Default: the held-out images of the dataset that
    the model was trained on, if it is found."""
    max_old_loss: float = 1.0
    """Largest part of the images of old classes that may be predicted as one of the new classes although they were
    right before, in points."""
    batch_size: int = 64
    """Number of images per forward pass."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Precision of the forward pass, as in `vitcls evaluate`."""

    def __post_init__(self) -> None:
        check_minimum(self, 1, "batch_size")
        check_value(self, "max_old_loss", 0 <= self.max_old_loss <= 100, "from 0 to 100")
        check_stored_images(self.data)


@dataclass(frozen=True)
class VerifyUnchangedOptions:
    """Compare two models: weights and outputs, to the bit. The exit status is 1 if they differ."""

    old: str
    """The model before the change: a folder or a Hub id (`ID@COMMIT` pins the model)."""
    new: str
    """The model after the change."""
    dataset: str | None = None
    """Images to compare the outputs with. If the models differ, their predictions are compared, too. Default: random
    pixels."""
    label_column: tuple[str, ...] | None = None
    """Column with the labels. By default, the column is detected by type or name."""
    split: str | None = None
    """Split of --dataset, as in `vitcls evaluate`."""


def check_stored_images(data: DataOptions) -> None:
    """Raise ValueError for flags that only training supports."""
    for name in ("streaming", "folds", "exclude"):
        if getattr(data, name):
            raise ValueError(f"--{name} is only for `vitcls finetune`. Remove --{name}")


def check_value(options: Any, name: str, is_valid: bool, requirement: str) -> None:
    """Raise ValueError with the value of a flag and the requirement if `is_valid` is False."""
    if not is_valid:
        raise ValueError(
            f"--{name.replace('_', '-')} is {getattr(options, name)}, but it must be {requirement}"
        )


def check_minimum(options: Any, minimum: int, *names: str) -> None:
    """Raise ValueError if a flag in `names` is set to a value below the minimum."""
    for name in names:
        value = getattr(options, name)
        check_value(options, name, value is None or value >= minimum, f"{minimum} or more")


def get_flag_fields(options_class: Any) -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of an options dataclass and its nested dataclasses, by name, such as `batch_size`."""
    fields: dict[str, dataclasses.Field[Any]] = {}
    for option in dataclasses.fields(options_class):
        fields |= (
            get_flag_fields(option.type)
            if dataclasses.is_dataclass(option.type)
            else {option.name: option}
        )
    return fields


def find_similar_flag(name: str, flag_names: Collection[str]) -> str | None:
    """Return the flag that an unknown name stands for: its equivalent here, or the most similar name; None if there is
    no such flag."""
    equivalent = EQUIVALENT_FLAGS.get(name)
    if equivalent in flag_names:
        return equivalent
    return next(iter(difflib.get_close_matches(name, flag_names, n=1)), None)


def to_flags(options: Any) -> dict[str, Any]:
    """Return a dict of all flags except `--config`. The values can be written to YAML and JSON."""
    flags: dict[str, Any] = {}
    for name, value in vars(options).items():
        if dataclasses.is_dataclass(value):
            flags |= to_flags(value)
        elif isinstance(value, Path):
            flags[name] = str(value)
        else:
            flags[name] = list(value) if isinstance(value, tuple) else value
    flags.pop("config", None)
    return flags


def to_arguments(name: str, value: Any) -> list[str]:
    """Convert a flag and its value to command-line arguments."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
