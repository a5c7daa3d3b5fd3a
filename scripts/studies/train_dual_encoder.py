# /// script
# requires-python = ">=3.11"
# dependencies = ["modeling_vitcls[cli]"]
#
# [tool.uv.sources]
# modeling_vitcls = { path = "../..", editable = true }
# ///
"""Train a small CLIP-style dual encoder (ViT and BERT) on images and captions with class names.

    python scripts/studies/train_dual_encoder.py --dataset digits --folder runs/dual
    python scripts/studies/train_dual_encoder.py --dataset uoft-cs/cifar10 --folder runs/dual \\
        --patch-size 8 --epochs 20 --flip

The model has no classifier. It compares the CLS token of the ViT with the CLS token of BERT. In the
evaluation, each class has one caption, and the predicted class of an image is the class of the most
similar caption. The captions of the evaluation are not used in training, but their words are.
"""

from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    PreTrainedTokenizerFast,
    VisionTextDualEncoderModel,
    VisionTextDualEncoderProcessor,
)

from modeling_vitcls import ViTCLSConfig, ViTCLSImageProcessor, ViTCLSModel
from modeling_vitcls.data.images import LabeledImages
from modeling_vitcls.data.options import DataOptions
from modeling_vitcls.data.splits import divide_images, load_undivided_images


BATCH_SIZE = 64
TRAINING_CAPTIONS = ("a photo of a {}", "a picture of the {}", "the {}", "a {}")
EVALUATION_CAPTION = "a photo of the {}"
ENCODER_FIELDS = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "initializer_range": 0.1,  # narrow models learn slowly with the usual value of 0.02
}


def train_dual_encoder(
    dataset: str,
    folder: Path,
    image_size: int = 32,
    patch_size: int = 4,
    epochs: int = 10,
    flip: bool = False,
    seed: int = 0,
) -> float:
    """Train a ViT and a BERT from scratch, and save the model.

    Return the accuracy on the held-out images.

    Args:
        dataset: Dataset of labeled images, as in `vitcls finetune`.
        folder: Folder in which the model, the image processor and the tokenizer are saved.
        image_size: Height and width to which images are resized, in pixels.
        patch_size: Height and width of a patch, in pixels.
        epochs: Number of passes over the training images.
        flip: Whether to flip images horizontally with a probability of 0.5.
        seed: Seed of the initial weights, the sampling of images and the flips.
    """
    torch.manual_seed(seed)
    images = load_undivided_images(DataOptions(dataset=dataset, num_workers=0))
    data = divide_images(images, held_out_fraction=0.2)
    class_names = data.label_space.names
    tokenizer = build_tokenizer(class_names)
    image_processor = ViTCLSImageProcessor(size={"height": image_size, "width": image_size})
    processor = VisionTextDualEncoderProcessor(image_processor, tokenizer)
    vision_config = ViTCLSConfig(image_size=image_size, patch_size=patch_size, **ENCODER_FIELDS)
    text_config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        **ENCODER_FIELDS,
    )
    model = VisionTextDualEncoderModel(
        vision_model=ViTCLSModel(vision_config), text_model=BertModel(text_config)
    )

    def preprocess(split: LabeledImages) -> tuple[torch.Tensor, torch.Tensor]:
        images = [split.images[index].convert("RGB") for index in range(len(split))]
        return image_processor(images, return_tensors="pt")["pixel_values"], torch.tensor(
            split.labels
        )

    captions = [[caption.format(name) for name in class_names] for caption in TRAINING_CAPTIONS]
    encodings = [
        tokenizer(texts, padding="max_length", max_length=8, return_tensors="pt")
        for texts in captions
    ]
    train_model(
        model, *preprocess(data.train), [dict(encoding) for encoding in encodings], epochs, flip
    )
    accuracy = evaluate_model(model, *preprocess(data.held_out), processor, class_names)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return accuracy


def build_tokenizer(class_names: list[str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token for each distinct word in the captions.

    A caption starts with [CLS], as in BERT.
    """
    texts = [
        caption.format(name)
        for caption in (*TRAINING_CAPTIONS, EVALUATION_CAPTION)
        for name in class_names
    ]
    words = sorted({word for text in texts for word, _ in Whitespace().pre_tokenize_str(text)})
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        "[CLS] $A", special_tokens=[("[CLS]", vocabulary["[CLS]"])]
    )
    special_tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special_tokens)


def train_model(
    model: VisionTextDualEncoderModel,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    captions: list[dict[str, torch.Tensor]],
    epochs: int,
    flip: bool,
) -> None:
    """Train with the contrastive loss of CLIP in both directions.

    The loss is that of Radford et al. (2021), section 2.3. A batch may contain several images of a
    class, so all captions of an image's class are positives, as in UniCL (Yang et al. 2022).

    Args:
        pixel_values: [images, 3, H, W].
        labels: Class of each image, [images].
        captions: Tokenized captions of all classes, [classes, tokens], one dict per template in
            TRAINING_CAPTIONS.
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    num_steps = epochs * (len(labels) // BATCH_SIZE)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-3, total_steps=num_steps, pct_start=0.1
    )
    model.train()
    for step in range(num_steps):
        indices = torch.randint(len(labels), (BATCH_SIZE,))
        images, classes = pixel_values[indices], labels[indices]
        if flip:
            images = torch.where(
                (torch.rand(BATCH_SIZE) < 0.5)[:, None, None, None], images.flip(-1), images
            )
        texts = {name: values[classes] for name, values in captions[step % len(captions)].items()}
        outputs = model(pixel_values=images, **texts)
        targets = (classes[:, None] == classes).float()
        targets /= targets.sum(1, keepdim=True)
        image_loss = nn.functional.cross_entropy(outputs.logits_per_image, targets)
        text_loss = nn.functional.cross_entropy(outputs.logits_per_text, targets)
        loss = (image_loss + text_loss) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 100 == 0 or step == num_steps - 1:
            print(f"step {step + 1} of {num_steps}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def evaluate_model(
    model: VisionTextDualEncoderModel,
    pixel_values: torch.Tensor,
    labels: torch.Tensor,
    processor: VisionTextDualEncoderProcessor,
    class_names: list[str],
) -> float:
    """Return the accuracy.

    An image is right if the caption of its class is the most similar one.
    """
    model.eval()
    texts = [EVALUATION_CAPTION.format(name) for name in class_names]
    tokens = processor(text=texts, padding="max_length", max_length=8, return_tensors="pt")
    num_correct = 0
    for images, classes in zip(
        pixel_values.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True
    ):
        logits = model(pixel_values=images, **tokens).logits_per_image
        num_correct += (logits.argmax(-1) == classes).sum().item()
    return num_correct / len(labels)


if __name__ == "__main__":
    print(f"accuracy with the caption {EVALUATION_CAPTION!r}: {tyro.cli(train_dual_encoder):.2%}")
