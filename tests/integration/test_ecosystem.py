"""The models in other libraries: transformers, PEFT, datasets and accelerate.

Of transformers: pipelines, Trainer and composite models. Real libraries, tiny models, no network.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from helpers.photo_folders import draw_noise
from helpers.tiny_models import (
    CLS,
    IMAGES,
    PROCESSOR,
    build_images,
    build_tiny_config,
    raises_one_line,
    save_encoder,
)
from numpy.random import default_rng
from torch.testing import assert_close
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    Trainer,
    TrainingArguments,
    VisionTextDualEncoderModel,
    pipeline,
)

from modeling_vitcls import (
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSImageProcessorPil,
    ViTCLSModel,
)
from modeling_vitcls.conversion.weight_rules import Fields
from modeling_vitcls.frozen.class_statistics import ClassStatistics
from modeling_vitcls.hub.model_files import hash_weights


LABELS = {0: "cat", 1: "dog", 2: "owl"}
PHOTO = draw_noise((20, 30))[0]
FIELDS = {
    "id2label": LABELS,
    "num_distillation_tokens": 1,
    "num_register_tokens": 2,
}


def build_tiny_classifier(**overrides: Any) -> ViTCLSForImageClassification:
    """Return a classifier with every kind of token, and with reproducible weights."""
    torch.manual_seed(0)
    return ViTCLSForImageClassification(build_tiny_config(**FIELDS, **overrides))


def assert_same_logits(model: Any, wanted: Any = None, **tolerance: float) -> None:
    """Check that a model has the logits of another model, by default of the tiny classifier."""
    wanted = (wanted or build_tiny_classifier()).eval()(IMAGES).logits
    assert_close(model.eval()(IMAGES).logits, wanted, **tolerance)


# Pipelines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [ViTCLSImageProcessor, ViTCLSImageProcessorPil])
@torch.no_grad()
def test_the_feature_extraction_pipeline_has_the_tokens_or_the_pooled_vector(backend: Any) -> None:
    processor = backend(size=32)
    torch.manual_seed(0)
    model = ViTCLSModel(build_tiny_config(**FIELDS)).eval()
    outputs = model(**processor(PHOTO, return_tensors="pt"))
    tokens = pipeline("image-feature-extraction", model=model, image_processor=processor)(PHOTO)
    pooled = pipeline(
        "image-feature-extraction", model=model, image_processor=processor, pool=True
    )(PHOTO)

    assert torch.tensor(tokens).shape == (1, 4 + 16, 16)
    assert_close(torch.tensor(tokens), outputs.last_hidden_state)
    assert_close(torch.tensor(pooled), outputs.pooler_output)


# Trainer ------------------------------------------------------------------------------------------


def test_the_example_of_the_image_classification_page_trains_and_saves(tmp_path: Path) -> None:
    """Metrics, the best model and `predict`, with a model that has class statistics."""

    def compute_metrics(eval_pred: Any) -> dict[str, float]:
        predictions, labels = eval_pred
        predictions = np.argmax(predictions, axis=1)
        return {"accuracy": float((predictions == labels).mean())}

    model = build_tiny_classifier()
    features = default_rng(0).normal(size=(12, model.config.hidden_size))
    ClassStatistics.fit({CLS: features}, np.arange(12) % 3, 3).set_in_model(model)
    data = [
        {"pixel_values": image, "labels": index % 3} for index, image in enumerate(build_images(12))
    ]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=30,
        learning_rate=3e-3,
        per_device_train_batch_size=12,
        per_device_eval_batch_size=5,
        eval_strategy="steps",
        eval_steps=15,
        save_steps=30,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=data,
        processing_class=PROCESSOR,
        compute_metrics=compute_metrics,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before
    predicted = trainer.predict(data)
    assert predicted.predictions.shape == (12, 3)
    assert predicted.metrics["test_accuracy"] == after["eval_accuracy"]
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-30", tmp_path / "final"):
        assert_same_logits(AutoModelForImageClassification.from_pretrained(folder), trainer.model)
        assert (folder / "preprocessor_config.json").is_file()
        assert (folder / "modeling_vitcls.py").is_file()


# PEFT ---------------------------------------------------------------------------------------------


# With a text model --------------------------------------------------------------------------------


BERT_SIZES = {
    "vocab_size": 50,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def test_a_dual_encoder_of_images_and_text_trains_saves_and_loads(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder", **FIELDS)
    BertModel(BertConfig(**BERT_SIZES)).save_pretrained(tmp_path / "text")
    model = VisionTextDualEncoderModel.from_vision_text_pretrained(encoder, tmp_path / "text")
    inputs = {
        "input_ids": torch.tensor([[2, 7, 9, 3], [2, 8, 5, 3]]),
        "attention_mask": torch.ones(2, 4, dtype=torch.long),
        "pixel_values": IMAGES,
    }
    outputs = model(**inputs, return_loss=True)
    outputs.loss.backward()
    assert outputs.logits_per_image.shape == (2, 2)
    assert model.vision_model.embeddings.cls_token.grad.abs().sum() > 0
    assert model.text_model.embeddings.word_embeddings.weight.grad.abs().sum() > 0

    model.eval()
    model.save_pretrained(tmp_path / "both")
    again = VisionTextDualEncoderModel.from_pretrained(tmp_path / "both").eval()
    assert type(again.vision_model) is ViTCLSModel
    assert again.config.vision_config.token_layout == model.config.vision_config.token_layout
    with torch.no_grad():
        assert_close(again(**inputs).logits_per_image, model(**inputs).logits_per_image)
        cls_token = ViTCLSModel.from_pretrained(encoder)(IMAGES).tokens["cls"][:, 0]
        features = model.get_image_features(pixel_values=IMAGES).pooler_output
        assert_close(features, model.visual_projection(cls_token))


# Loading ------------------------------------------------------------------------------------------


def test_a_sharded_checkpoint_has_the_same_logits(tmp_path: Path) -> None:
    build_tiny_classifier().save_pretrained(tmp_path, max_shard_size="10KB")
    names = {file.name for file in tmp_path.glob("model-*.safetensors")}
    assert len(names) > 1
    assert hash_weights(tmp_path).keys() == names
    assert_same_logits(ViTCLSForImageClassification.from_pretrained(tmp_path), rtol=0, atol=0)


def test_a_checkpoint_in_a_subfolder_is_loaded_and_adapted(tmp_path: Path) -> None:
    build_tiny_classifier().save_pretrained(tmp_path / "vision")
    for model_class in (ViTCLSForImageClassification, AutoModelForImageClassification):
        assert_same_logits(
            model_class.from_pretrained(tmp_path, subfolder="vision"), rtol=0, atol=0
        )
    adapted = ViTCLSForImageClassification.from_pretrained(
        tmp_path, subfolder="vision", num_register_tokens=3
    )
    assert adapted.config.num_register_tokens == 3
    assert adapted(IMAGES).logits.shape == (2, 3)


def build_offload_map(model: ViTCLSForImageClassification) -> dict[str, str]:
    """Return a device map with the embeddings and the first layer on disk."""
    blocks = [name for name in dict(model.named_children()) if name != "vitcls"]
    blocks += [f"vitcls.{name}" for name in dict(model.vitcls.named_children()) if name != "layers"]
    blocks += [f"vitcls.layers.{name}" for name in dict(model.vitcls.layers.named_children())]
    return dict.fromkeys(blocks, "cpu") | {"vitcls.embeddings": "disk", "vitcls.layers.0": "disk"}


@pytest.mark.parametrize(
    "fields",
    [
        {"position_embedding_tokens": "all"},
        {"position_embedding_type": "rope_2d", "pooling": "attention"},
    ],
    ids=["learned", "rotary"],
)
def test_offloaded_weights_have_equal_outputs(fields: Fields, tmp_path: Path) -> None:
    model = build_tiny_classifier(**fields)
    model.save_pretrained(tmp_path)
    on_disk = AutoModelForImageClassification.from_pretrained(
        tmp_path, device_map=build_offload_map(model), offload_folder=tmp_path / "offload"
    )
    assert on_disk.vitcls.embeddings.cls_token.device.type == "meta"  # it is on the disk
    assert_same_logits(on_disk, model)
    with raises_one_line("offloaded weights"):
        on_disk.adapt(num_register_tokens=6)
    in_memory = cpu_offload(
        build_tiny_classifier(**fields).eval(), execution_device=torch.device("cpu")
    )
    assert_same_logits(in_memory, model)
