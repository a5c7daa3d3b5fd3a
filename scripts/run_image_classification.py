# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "..", editable = true }
# ///
"""Fine-tune any ViT, with the special tokens you choose: one training loop, to be copied and changed.

    accelerate launch scripts/run_image_classification.py --model facebook/dinov2-small \
        --num-register-tokens 4 --dataset photos --output-dir runs/registers

The dataset is a folder with one folder per class, one of such folders (train/, validation/), or one of the
Hub. `vitcls finetune` is the full program: it plans its steps, calibrates, keeps photos of a scene
together and can do without steps. Use this file when the loop itself is yours.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from datasets import DatasetDict, Image, load_dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from modeling_vitcls import ViTCLSForImageClassification, ViTCLSImageProcessor, push


Loader = DataLoader[dict[str, Tensor]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a ViT on labeled images.")
    add = parser.add_argument
    add("--model", required=True, help="folder, Hub ID or timm:NAME of any ViT")
    add("--dataset", required=True, help="folder of images, or Hub ID of a dataset")
    add("--image-column", default="image")
    add("--label-column", default="label")
    add("--output-dir", type=Path, required=True)
    # Tokens; None keeps those of the model
    add("--num-cls-tokens", type=int)
    add("--num-register-tokens", type=int)
    add("--num-distillation-tokens", type=int)
    add("--teacher", help="a classifier of the same classes, for the distillation token (DeiT)")
    add("--epochs", type=int, default=5)
    add("--batch-size", type=int, default=32, help="images of a step, of all processes together")
    add("--learning-rate", type=float, default=5e-5)
    add("--weight-decay", type=float, default=0.05)
    add("--warmup", type=float, default=0.1, help="part of the steps")
    add("--no-augmentation", action="store_true", help="train on the crops of the evaluation")
    add("--seed", type=int, default=0)
    # Accelerate; processes and precision are flags of `accelerate launch`
    add("--gradient-accumulation-steps", type=int, default=1)
    add("--tracker", help="tensorboard, wandb, ... or all")
    add("--resume", action="store_true", help="continue after the last whole epoch")
    add("--push-to-hub", action="store_true")
    add("--hub-model-id", help="default: the name of --output-dir, in your account")
    return parser.parse_args()


# Data ---------------------------------------------------------------------------------------------
def load_splits(args: argparse.Namespace) -> DatasetDict:
    """Load "train" and "validation"; a dataset without a validation or test split gives a fifth."""
    if Path(args.dataset).is_dir():
        splits = load_dataset("imagefolder", data_dir=args.dataset)
    else:
        splits = load_dataset(args.dataset)
    if missing := {args.image_column, args.label_column} - {*splits["train"].column_names}:
        raise SystemExit(
            f"error: no column {', '.join(sorted(missing))}: --image-column, --label-column"
        )

    splits = splits.cast_column(args.image_column, Image(mode="RGB"))
    if not hasattr(splits["train"].features[args.label_column], "names"):
        splits = splits.class_encode_column(args.label_column)
    held_out = next((name for name in ("validation", "test") if name in splits), None)
    if held_out is None:
        splits = splits["train"].train_test_split(0.2, stratify_by_column=args.label_column, seed=0)
        held_out = "test"
    return DatasetDict(train=splits["train"], validation=splits[held_out])


def build_loader(
    args: argparse.Namespace, split: Any, processor: ViTCLSImageProcessor, train: bool
) -> Loader:
    """Build the batches of a split: `pixel_values` [B, 3, height, width] and `labels` [B]."""
    augment = v2.Compose([v2.RandomResizedCrop(512, (0.5, 1.0)), v2.RandomHorizontalFlip()])

    def preprocess(rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = rows[args.image_column]
        if train and not args.no_augmentation:
            images = [augment(image) for image in images]
        inputs = processor(images, return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"], "labels": rows[args.label_column]}

    return DataLoader(
        split.with_transform(preprocess),
        batch_size=args.batch_size,
        shuffle=train,
        drop_last=train and len(split) >= args.batch_size,
    )


# Model --------------------------------------------------------------------------------------------
def load_model(args: argparse.Namespace, labels: list[str]) -> ViTCLSForImageClassification:
    """Load any ViT with the requested tokens and a new classifier for the labels."""
    names = ("num_cls_tokens", "num_register_tokens", "num_distillation_tokens")
    tokens = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return ViTCLSForImageClassification.from_pretrained(
        args.model,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        ignore_mismatched_sizes=True,
        **tokens,
    )


def compute_loss(model: nn.Module, batch: dict[str, Tensor], teacher: nn.Module | None) -> Tensor:
    """Compute the loss of the labels and, with a teacher, of its answers (DeiT, equation 3)."""
    if teacher is not None:
        with torch.no_grad():
            batch = batch | {"teacher_logits": teacher(batch["pixel_values"]).logits}
    return model(**batch).loss


def build_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Build AdamW; biases, norms, positions and tokens have no weight decay, as in DeiT."""
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for parameter in model.parameters():
        groups[parameter.ndim not in (2, 4)]["params"].append(parameter)
    return torch.optim.AdamW(groups, lr=args.learning_rate, weight_decay=args.weight_decay)


# Training -----------------------------------------------------------------------------------------
def train_epoch(
    accelerator: Accelerator,
    model: nn.Module,
    teacher: nn.Module | None,
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Train on all batches once, and return the mean loss over the processes."""
    model.train()
    losses = []
    for batch in tqdm(loader, "steps", disable=not accelerator.is_main_process):
        with accelerator.accumulate(model):
            loss = compute_loss(model, batch, teacher)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return accelerator.gather(torch.stack(losses)).mean().item()


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: nn.Module, loader: Loader) -> dict[str, float]:
    """Measure accuracy, and its mean over the classes, on the images of all processes."""
    model.eval()
    rows = []
    for batch in loader:
        predicted = model(batch["pixel_values"]).logits.argmax(dim=-1)
        # The last batch may repeat images, so that each process has as many; they are not counted
        rows.append(
            accelerator.gather_for_metrics(torch.stack((predicted, batch["labels"]), dim=1))
        )
    predicted, labels = torch.cat(rows).unbind(dim=1)
    is_right = (predicted == labels).float()
    recalls = [is_right[labels == label].mean() for label in labels.unique()]
    results = {"accuracy": is_right.mean(), "balanced_accuracy": torch.stack(recalls).mean()}
    return {name: value.item() for name, value in results.items()} | {"images": len(is_right)}


def main() -> None:
    """Train, evaluate after each epoch, save, and push."""
    args = parse_args()
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.tracker,
        project_dir=args.output_dir,
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True),
    )
    set_seed(args.seed)

    # Data and model; the first process downloads, and the others read its files
    with accelerator.main_process_first():
        splits = load_splits(args)
        processor = ViTCLSImageProcessor.from_pretrained(args.model)
        model = load_model(args, splits["train"].features[args.label_column].names)
        teacher = None
        if args.teacher:
            teacher = ViTCLSForImageClassification.from_pretrained(args.teacher)
            if teacher.config.id2label != model.config.id2label:
                raise SystemExit("error: --teacher has other classes than the dataset")
            teacher = teacher.eval().requires_grad_(False).to(accelerator.device)

    # As in any loop with Accelerate
    loaders = [build_loader(args, splits[name], processor, name == "train") for name in splits]
    optimizer = build_optimizer(model, args)
    steps_per_epoch = math.ceil(len(loaders[0]) / args.gradient_accumulation_steps)
    num_steps = args.epochs * steps_per_epoch
    schedule = get_cosine_schedule_with_warmup(optimizer, round(args.warmup * num_steps), num_steps)
    model, optimizer, schedule, train_loader, validation_loader = accelerator.prepare(
        model, optimizer, schedule, *loaders
    )
    accelerator.init_trackers("run", {name: str(value) for name, value in vars(args).items()})

    first_epoch = 0
    checkpoints = sorted(args.output_dir.glob("epoch-*"), key=lambda path: int(path.name[6:]))
    if args.resume and checkpoints:
        accelerator.load_state(str(checkpoints[-1]))
        first_epoch = int(checkpoints[-1].name[6:])

    for epoch in range(first_epoch, args.epochs):
        train_loader.set_epoch(epoch)
        loss = train_epoch(accelerator, model, teacher, train_loader, optimizer, schedule)
        results = evaluate(accelerator, model, validation_loader)
        results["loss"] = loss
        accelerator.log(results, step=epoch + 1)
        accelerator.print(", ".join(f"{name} {value:.4g}" for name, value in results.items()))
        accelerator.save_state(str(args.output_dir / f"epoch-{epoch + 1}"))

    accelerator.unwrap_model(model).save_pretrained(
        args.output_dir,
        is_main_process=accelerator.is_main_process,
        state_dict=accelerator.get_state_dict(model),
    )
    if accelerator.is_main_process:
        processor.save_pretrained(args.output_dir)
        if args.push_to_hub:
            print(push(args.output_dir, args.hub_model_id).url)
    accelerator.end_training()


if __name__ == "__main__":
    main()
