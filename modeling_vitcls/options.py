"""What a run can be asked for. Each field is a flag (`batch_size` is `--batch-size`) and a key of a recipe file.

This file imports only the standard library, so that `--help` and errors about flags appear without delay.

What scripts/inspect_tokens.py can be asked for. Each field is a flag, as in options.py.

This file imports only the standard library, so that `--help` and errors about flags appear without delay.
"""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class DataOptions:
    """The images."""

    dataset: str
    """`digits` (scikit-learn's), a folder with a sub-folder per class, a CSV or Parquet file, a folder of MNIST's idx
    files, or a Hub data set."""
    image_column: str | None = None
    """Column of images or their paths. Default: found by its type or name."""
    label_column: tuple[str, ...] | None = None
    """Column of labels; several columns are several tasks. Default: found by its type or name."""
    label_separator: str | None = None
    """What stands between the labels of one image, where a text column holds several (`cat|dog`)."""
    label_names: tuple[str, ...] | None = None
    """All labels, where a streamed data set does not declare them."""
    held_out_fraction: float = 0.2
    """Fraction of the images to hold out for evaluation if the data set has no split for it. Each image is held out or
    not by a checksum, so the split stays the same when images are added."""
    split_seed: int = 0
    """Chooses which images are held out. Keep it when comparing runs; evaluation uses that of the model's run."""
    streaming: bool = False
    """Read the data set while training, without downloading or keeping it. Needs --max-steps."""
    shuffle_buffer: int = 1000
    """Images from which a streamed data set draws the next one. A folder streams class by class: make it as large."""
    max_broken_images: int = 100
    """Images that cannot be read are named and skipped; more than these stop the run."""
    num_workers: int = 2
    """Processes that prepare images, for each training process. 0: none besides it."""

    def __post_init__(self) -> None:
        require(self, "held_out_fraction", 0 < self.held_out_fraction < 1, "between 0 and 1")
        require(self, "shuffle_buffer", self.shuffle_buffer >= 1, "1 or more")
        for name in ("split_seed", "max_broken_images", "num_workers"):
            require(self, name, getattr(self, name) >= 0, "0 or more")


@dataclass(frozen=True)
class ModelOptions:
    """The model. Fields left at None keep the preset's or checkpoint's own value."""

    model: str
    """`vitcls-tiny`, `-small`, `-base` or `-large` (from scratch), a folder, or a Hub id of a vitcls model."""
    num_cls_tokens: int | None = None
    """Class tokens."""
    num_distillation_tokens: int | None = None
    """Distillation tokens."""
    num_register_tokens: int | None = None
    """Register tokens."""
    pooling: Literal["cls", "mean", "cls_mean", "max", "attention"] | None = None
    """What the classifier reads."""
    cls_pooling: Literal["first", "mean", "concat"] | None = None
    """How several class tokens become one vector."""
    head_type: Literal["linear", "mlp"] | None = None
    """The classifier."""
    image_size: int | tuple[int, int] | None = None
    """Pixels; two numbers are height and width."""
    patch_size: int | tuple[int, int] | None = None
    """Pixels; two numbers are height and width."""
    position_embedding_type: Literal["learned", "sincos_2d", "rope_2d", "none"] | None = None
    """How patches know their place."""
    hidden_size: int | None = None
    """Width of the tokens."""
    num_hidden_layers: int | None = None
    """Layers."""
    num_attention_heads: int | None = None
    """Attention heads."""
    intermediate_size: int | None = None
    """Width of the MLP."""
    drop_path_rate: float | None = None
    """Rate of dropped residual branches at the last layer."""
    patch_drop_rate: float | None = None
    """Part of the patches that each image leaves out in training, at random: faster, less accurate."""
    initializer_range: float | None = None
    """Standard deviation of fresh weights. Narrow models learn faster with more than the usual 0.02."""

    def config_values(self) -> dict[str, Any]:
        """The fields of ViTCLSConfig that were set."""
        return {name: value for name, value in vars(self).items() if name != "model" and value is not None}


@dataclass(frozen=True)
class AugmentationOptions:
    """Random changes of training images."""

    crop_scale: float = 0.35
    """Smallest part of the area that a random crop keeps. 1: the whole image, resized."""
    flip: bool = True
    """Mirror half of the images left to right."""
    rotation: float = 0.0
    """Largest rotation, degrees."""
    shift: float = 0.0
    """Largest shift along each axis, as a part of the image."""
    zoom: float = 0.0
    """Largest change of size, as a part of it: 0.1 is from 0.9 to 1.1."""
    auto_augment: Literal["none", "rand", "trivial"] = "none"
    """RandAugment (Cubuk et al. 2020) or TrivialAugment (Müller and Hutter 2021)."""
    rand_augment_operations: int = 2
    """Operations of RandAugment on each image."""
    rand_augment_magnitude: int = 9
    """Strength of RandAugment, 0 to 30."""
    random_erasing: float = 0.0
    """Probability of filling a random rectangle with noise (Zhong et al. 2020)."""
    mixup: float = 0.0
    """Alpha of mixup (Zhang et al. 2018). 0: none. With --cutmix too, each batch gets one of the two."""
    cutmix: float = 0.0
    """Alpha of CutMix (Yun et al. 2019). 0: none."""
    repeated_augmentation: int = 1
    """Differently augmented copies of an image in the same step (Hoffer et al. 2020). DeiT has 3."""

    def __post_init__(self) -> None:
        require(self, "crop_scale", 0 < self.crop_scale <= 1, "above 0 and at most 1")
        require(self, "rotation", 0 <= self.rotation <= 180, "0 to 180")
        require(self, "rand_augment_operations", self.rand_augment_operations >= 1, "1 or more")
        require(self, "rand_augment_magnitude", 0 <= self.rand_augment_magnitude <= 30, "0 to 30")
        require(self, "random_erasing", 0 <= self.random_erasing <= 1, "0 to 1")
        require(self, "repeated_augmentation", self.repeated_augmentation >= 1, "1 or more")
        for name in ("shift", "zoom"):
            require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        for name in ("mixup", "cutmix"):
            require(self, name, getattr(self, name) >= 0, "0 or more")


@dataclass(frozen=True)
class TrainingOptions:
    """Optimisation."""

    epochs: float = 30.0
    """Times that each training image is seen."""
    max_steps: int | None = None
    """Optimiser steps, instead of --epochs."""
    batch_size: int = 64
    """Images per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimiser step."""
    learning_rate: float = 5e-4
    """The highest learning rate; it rises to it linearly and falls to 0 along a cosine."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer to the one before it; tokens and positions come before layer 0
    (BEiT, Bao et al. 2021). 1: the same for all; 0.65 to 0.8 are usual for fine-tuning pre-trained models."""
    warmup: float = 0.1
    """Part of the steps over which it rises."""
    weight_decay: float = 0.05
    """On the weights of linear layers and patches; never on biases, norms, tokens and positions."""
    label_smoothing: float = 0.1
    """Probability that is spread over all classes."""
    class_balance: Literal["none", "weights", "sampling"] = "none"
    """For classes of unequal size: weigh the loss by the inverse of their size, or show all classes equally often."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, evaluate and save it (0.999 for a few thousand steps)."""
    trainable: str = "full"
    """What is trained: `full`, `head` (linear probing), `last-N` (the last N layers and the head), or `lora`."""
    feature_views: int = 0
    """With `--trainable head`: so many augmented views of each image are encoded, once. 0: the image as it is."""
    lora_rank: int = 8
    """Rank of LoRA's matrices, on queries and values (Hu et al. 2021)."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of the forward pass. Default: what `accelerate launch` says."""
    compile: bool = False
    """Compile the model with torch.compile."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    seed: int = 0
    """Initial weights, order of the images, augmentation, drop path."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    health_every: int = 100
    """Steps between two measurements of the entropy of CLS attention, per layer. 0: never."""
    evaluate_every: int = 1
    """Epochs between two evaluations on held-out images. There is always one at the end."""

    def __post_init__(self) -> None:
        require(self, "epochs", self.epochs > 0, "above 0")
        require(self, "max_steps", self.max_steps is None or self.max_steps >= 1, "1 or more")
        for name in ("batch_size", "gradient_accumulation_steps", "log_every", "evaluate_every", "lora_rank"):
            require(self, name, getattr(self, name) >= 1, "1 or more")
        for name in ("learning_rate", "max_gradient_norm"):
            require(self, name, getattr(self, name) > 0, "above 0")
        for name in ("warmup", "label_smoothing"):
            require(self, name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        require(self, "layer_decay", 0 < self.layer_decay <= 1, "above 0 and at most 1")
        require(self, "ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1")
        for name in ("weight_decay", "seed", "health_every", "feature_views"):
            require(self, name, getattr(self, name) >= 0, "0 or more")
        is_known = self.trainable in ("full", "head", "lora") or re.fullmatch(r"last-[1-9]\d*", self.trainable)
        require(self, "trainable", bool(is_known), "of full, head, lora, or last-N such as last-2")


@dataclass(frozen=True)
class DistillationOptions:
    """Learning from a teacher (DeiT, Touvron et al. 2021): the distillation token answers as the teacher does, the
    CLS token as the labels say. A model without a distillation token gets one."""

    teacher: str | None = None
    """A classifier: a folder or Hub id of any transformers model, or `timm:NAME`."""
    distillation: Literal["soft", "hard"] = "hard"
    """Against the teacher's probabilities, or its answer."""
    distillation_alpha: float = 0.5
    """Weight of the teacher; the labels have the rest."""
    distillation_tau: float = 3.0
    """Temperature of soft distillation."""
    teacher_views: int = 0
    """Ask the teacher only once about each of so many augmented views of an image, which then recur. 0: always ask."""

    def __post_init__(self) -> None:
        require(self, "distillation_alpha", 0 < self.distillation_alpha <= 1, "above 0 and at most 1")
        require(self, "distillation_tau", self.distillation_tau > 0, "above 0")
        require(self, "teacher_views", self.teacher_views >= 0, "0 or more")


@dataclass(frozen=True)
class RunOptions:
    """Checkpoints, trackers, the Hub."""

    resume: bool = False
    """Go on from the newest checkpoint in --output-dir; start from the beginning where there is none."""
    overwrite: bool = False
    """Replace an earlier run in --output-dir, finished or not, and other files with the names of the output's."""
    save_every: int | None = None
    """Steps between two checkpoints. Default: one at each evaluation; every 1,000 of a stream."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, besides the best one."""
    log_with: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers to log to as well."""
    report: bool = True
    """Draw what the special tokens do: report.html (see scripts/inspect_tokens.py), and pictures in the card."""
    dry_run: bool = False
    """Try a few steps, evaluation, checkpoint, saving and the right to push, remove the result, and print how long the
    run takes."""
    push_to_hub: bool = False
    """Push the result to the Hub, and load it from there in a fresh process to verify it."""
    hub_model_id: str | None = None
    """Repository to push to. Default: the name of --output-dir, under your own name."""
    hub_private: bool = False
    """Make the repository private where it is created."""
    hub_verify: bool = True
    """Verify what was pushed."""
    hub_checkpoint_every: int | None = None
    """Push the model after every so many steps, too, in the background, to a branch. Needs --push-to-hub."""
    hub_checkpoint_branch: str = "checkpoints"
    """That branch, made where it does not exist."""
    hub_push_optimizer: bool = False
    """Also push what --resume needs: the newest checkpoint with the result, and that of the step with each model on
    the branch. To go on elsewhere: `hf download ID --revision BRANCH --local-dir FOLDER`, then the same command with
    --output-dir FOLDER --resume. Needs --push-to-hub."""
    license: str | None = None
    """Licence of the trained weights, by its identifier on the Hub, such as apache-2.0: the card names it. Weights
    that started from a model with a licence keep that one. Default: none is named."""
    card_samples: bool = False
    """Show a few held-out pictures in the card also where a public repository gets it and the data set is of this
    machine. Those of `digits` or of a data set on the Hub are shown anyway."""
    eval_benchmark: str | None = None
    """Benchmark on the Hub (`namespace/name`) whose own test images are those held out here: the result is written for
    its leaderboard (.eval_results/). Needs --eval-task-id."""
    eval_task_id: str | None = None
    """Task of that benchmark, as its eval.yaml names it."""

    def __post_init__(self) -> None:
        require(self, "save_every", self.save_every is None or self.save_every >= 1, "1 or more")
        require(self, "keep_checkpoints", self.keep_checkpoints >= 1, "1 or more")
        every = self.hub_checkpoint_every
        require(self, "hub_checkpoint_every", every is None or every >= 1, "1 or more")
        has_place = self.hub_checkpoint_branch not in ("", "main")
        require(self, "hub_checkpoint_branch", has_place, "other than main, where the result goes")
        is_identifier = self.license is None or bool(re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license))
        require(self, "license", is_identifier, "as the Hub writes it, such as apache-2.0 or cc-by-4.0")
        for name in ("hub_checkpoint_every", "hub_push_optimizer"):
            if getattr(self, name) and not self.push_to_hub:
                raise ValueError(f"--{name.replace('_', '-')} needs --push-to-hub: give both, or leave it out")
        if (self.eval_benchmark is None) != (self.eval_task_id is None):
            raise ValueError("--eval-benchmark and --eval-task-id go together: give both, or neither")
        is_id = self.eval_benchmark is None or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", self.eval_benchmark))
        require(self, "eval_benchmark", is_id, "such as `namespace/name`, a data set on the Hub")


@dataclass(frozen=True)
class FinetuneOptions:
    """Fine-tune a ViT on labelled images, evaluate it on held-out ones, and write model, card and results."""

    output_dir: Path
    """Folder to write. An earlier run in it is continued with --resume, or replaced with --overwrite."""
    data: DataOptions
    model: ModelOptions
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)
    run: RunOptions = field(default_factory=RunOptions)
    config: Path | None = None
    """A recipe: a YAML file of flags. Flags on the command line override it."""


@dataclass(frozen=True)
class MaskingOptions:
    """Which patches are hidden in masked image modelling."""

    mask_ratio: float = 0.6
    """Part of the patches to hide (SimMIM has 0.6, Xie et al. 2021)."""
    mask_block: int = 1
    """Patches along the side of the squares that are hidden together (SimMIM hides 32 x 32 pixels)."""

    def __post_init__(self) -> None:
        require(self, "mask_ratio", 0 < self.mask_ratio < 1, "between 0 and 1")
        require(self, "mask_block", self.mask_block >= 1, "1 or more")


@dataclass(frozen=True)
class PretrainOptions:
    """Pre-train a ViT on images without labels: it learns to fill in hidden patches. Fine-tune its output next."""

    output_dir: Path
    """Folder to write. An earlier run in it is continued with --resume, or replaced with --overwrite."""
    data: DataOptions
    model: ModelOptions
    masking: MaskingOptions = field(default_factory=MaskingOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    run: RunOptions = field(default_factory=RunOptions)
    config: Path | None = None
    """A recipe: a YAML file of flags. Flags on the command line override it."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a vitcls model on labelled images, each exactly once."""

    model: str
    """A folder, or the id of a vitcls model on the Hub."""
    data: DataOptions
    split: str | None = None
    """Split of the data set; for a data set of one split, `test` is the part that fine-tuning holds out, unless that
    split itself is called `test`. Default: what the model's run held out, or `test`."""
    batch_size: int = 64
    """Images per process and forward pass."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of the forward pass. Default: what `accelerate launch` says."""
    frozen: str | None = None
    """Evaluate the frozen encoder instead of the model's classifier: fit `knn`, `logreg` (logistic regression) or
    `few-shot:N` (logistic regression on N images per class) to the features of the training images."""
    frozen_layers: Literal["last", "all"] = "last"
    """With --frozen: layers whose features are evaluated."""
    frozen_repeats: int = 10
    """With --frozen few-shot:N: number of random selections of the N images."""
    output: Path | None = None
    """JSON file for the results: these metrics, those of each class, and the confusion matrix."""
    config: Path | None = None
    """A YAML file of flags. Flags on the command line override it."""

    def __post_init__(self) -> None:
        require(self, "batch_size", self.batch_size >= 1, "1 or more")
        require(self, "frozen_repeats", self.frozen_repeats >= 1, "1 or more")
        is_known = self.frozen in (None, "knn", "logreg") or re.fullmatch(r"few-shot:[1-9]\d*", str(self.frozen))
        require(self, "frozen", bool(is_known), "of knn, logreg, or few-shot:N such as few-shot:5")


@dataclass(frozen=True)
class PredictOptions:
    """Predict the labels of images, or write their features.

    The images are those at PATHS, those of --list, or those of --dataset. An image that cannot be read gets a row with
    its error. Started on several processes, each takes a share.
    """

    model: str
    """A folder, or the id of a vitcls model on the Hub."""
    paths: tuple[str, ...] = ()
    """Image files, folders (with all folders in them), or URLs."""
    list: Path | None = None
    """A text file with one of these in each line."""
    dataset: str | None = None
    """`digits` (scikit-learn's), a folder, a CSV or Parquet file, a folder of MNIST's idx files, or a Hub data set."""
    split: str | None = None
    """Split of the data set. Default: the only one."""
    image_column: str | None = None
    """Column of images or their paths. Default: found by its type or name."""
    streaming: bool = False
    """Read the data set without downloading or keeping it."""
    output: Path | None = None
    """A .csv, .json, .jsonl or .parquet file; or a folder, for Parquet files of --shard-size images each, to which a
    second start adds what is missing. Default: a table on the terminal."""
    shard_size: int = 10_000
    """Images in each Parquet file of a folder."""
    top_k: int | None = None
    """Labels for each image, the most probable first. Default: one; of a multi-label model, all from
    --threshold on."""
    threshold: float = 0.5
    """Probability from which on a multi-label model's label counts."""
    features: Literal["cls", "mean", "registers", "distillation"] | None = None
    """Write these tokens of the last layer (`mean`: the mean of the patches) in place of labels."""
    batch_size: int = 32
    """Images per process and forward pass."""
    num_workers: int | None = None
    """Threads that prepare images, for each process. Default: one per core, 8 at most."""
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None
    """Precision of the forward pass. Default: what `accelerate launch` says."""

    def __post_init__(self) -> None:
        for name in ("shard_size", "batch_size"):
            require(self, name, getattr(self, name) >= 1, "1 or more")
        for name in ("top_k", "num_workers"):
            require(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more")
        require(self, "threshold", 0 <= self.threshold <= 1, "0 to 1")
        if sum(map(bool, (self.paths, self.list, self.dataset))) != 1:
            raise ValueError("give images as PATHS, with --list or with --dataset, in one of these ways")
        if self.dataset is None and (self.split or self.image_column or self.streaming):
            raise ValueError("--split, --image-column and --streaming are about a data set: name it with --dataset")
        self.check_output()

    def check_output(self) -> None:
        """Raise ValueError for an output that cannot hold what is asked for."""
        suffix = "" if self.output is None or self.output.is_dir() else self.output.suffix.lower()
        if suffix not in ("", ".csv", ".json", ".jsonl", ".parquet"):
            raise ValueError(
                f"--output {self.output}: name a .csv, .json, .jsonl or .parquet file, or a folder without a suffix"
            )
        if self.features and (self.output is None or suffix == ".csv"):
            where = "a table" if self.output is None else "CSV"
            raise ValueError(
                f"--features {self.features} are long vectors, which {where} cannot hold well: set --output to a "
                ".parquet, .json or .jsonl file, or a folder"
            )


def require(options: Any, name: str, holds: bool, allowed: str) -> None:
    """Raise ValueError, naming the flag, unless its value is allowed."""
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} is {getattr(options, name)}: set a value {allowed}")


def as_flags(options: Any) -> dict[str, Any]:
    """All flags of a run by name, in values that YAML and JSON know; `--config` is resolved in them."""
    flags: dict[str, Any] = {}
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if dataclasses.is_dataclass(value):
            flags |= as_flags(value)
        elif item.name != "config":
            flags[item.name] = plain(value)
    return flags


def plain(value: Any) -> Any:
    """Paths as text, tuples as lists."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class InspectOptions:
    """See what the special tokens of a vitcls model do: writes a page, and prints what it comes to.

    The images are those at PATHS or those of --dataset. Where the folders at PATHS are named like the model's classes,
    they are the labels.
    """

    model: str
    """A folder, or the id of a vitcls model on the Hub."""
    paths: tuple[str, ...] = ()
    """Image files, folders (with all folders in them), or URLs."""
    dataset: str | None = None
    """`digits` (scikit-learn's), a folder with a sub-folder per class, a CSV or Parquet file, a folder of MNIST's idx
    files, or a Hub data set."""
    split: str | None = None
    """Split of the data set; for a data set of one split, `test` is the part that fine-tuning holds out. Default: what
    the model's run held out, or `test`."""
    image_column: str | None = None
    """Column of images or their paths. Default: found by its type or name."""
    label_column: tuple[str, ...] | None = None
    """Column of labels; several columns are several tasks. Default: found by its type or name."""
    label_separator: str | None = None
    """What stands between the labels of one image, where a text column holds several (`cat|dog`)."""
    revision: str | None = None
    """Commit, branch or tag of a model on the Hub. Default: the newest."""
    output: Path = Path("report.html")
    """The page to write."""
    json: Path | None = None
    """A file for the figures themselves, for programs."""
    num_images: int = 8
    """Images that the page shows, spread evenly over all."""
    max_images: int = 256
    """Images for the statistics, spread evenly over all; they are kept in memory."""
    batch_size: int = 32
    """Images per forward pass at most; fewer where whole attention maps would need much memory."""
    patch_sizes: tuple[int, ...] = ()
    """Patch sizes to compare, such as 8 16 32: sequence length, cost and, with labels, accuracy."""

    def __post_init__(self) -> None:
        for name in ("num_images", "max_images", "batch_size"):
            require(self, name, getattr(self, name) >= 1, "1 or more")
        require(self, "patch_sizes", all(size >= 1 for size in self.patch_sizes), "of 1 or more pixels each")
        if bool(self.paths) == (self.dataset is not None):
            raise ValueError("give images as PATHS or with --dataset, in one of these ways")
        if self.dataset is None and (self.image_column or self.label_column or self.label_separator):
            raise ValueError(
                "--image-column, --label-column and --label-separator are about a data set: name it with --dataset"
            )
        if self.output.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"--output {self.output}: name a .html file")
        if self.json is not None and self.json.suffix.lower() != ".json":
            raise ValueError(f"--json {self.json}: name a .json file")
