"""Rendered cards of a small classifier, with the configuration, results and flags of its run."""

from typing import Any

from huggingface_hub import ModelCard

from modeling_vitcls import ViTCLSConfig
from modeling_vitcls.publishing.card import build_card


CONFIG = ViTCLSConfig(
    hidden_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=32,
    patch_size=8,
    num_register_tokens=2,
    id2label={0: "dusk", 1: "noon"},
)
RESULTS: dict[str, Any] = {
    "selection_metric": "accuracy",
    "accuracy": 0.983333,
    "loss": 0.1,
    "num_images": 360,
    "dataset": "digits",
    "split": "20%, stratified, split seed 0",
    "num_training_images": 1437,
    "steps": 1123,
    "epochs": 50.0153,
    "seconds": 58.4,
    "num_parameters": 214346,
    "token_layout": {"cls": 1, "distillation": 0, "registers": 2, "patches": 16},
    "sequence_length": 19,
    "device": "CPU",
    "mixed_precision": "no",
    "num_processes": 1,
    "versions": {"torch": "2.15.0", "transformers": "5.23.0"},
}
FLAGS: dict[str, Any] = {"output_dir": "/home/me/out", "model": "vitcls-tiny", "dataset": "digits", "pooling": None}
PER_CLASS = [
    {"name": "dusk", "images": 200, "recall": 0.99, "precision": 0.975, "f1": 0.982456},
    {"name": "noon|late", "images": 160, "recall": None, "precision": 1.0, "f1": 0.5},
]


def render_card(config: ViTCLSConfig = CONFIG, **results: Any) -> ModelCard:
    """Return the card of other results."""
    return ModelCard(str(build_card("my-model", config, RESULTS | results, FLAGS)))
