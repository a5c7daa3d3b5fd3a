"""Model cards: what they claim is what was measured, and nothing in them is empty."""

import re
from typing import Any

import pytest
from huggingface_hub import ModelCard

from modeling_vitcls import ViTCLSConfig
from modeling_vitcls.hub.card import build_card, layout_picture


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


@pytest.fixture
def card() -> ModelCard:
    """The card as a reader gets it: rendered, and parsed again."""
    return ModelCard(str(build_card("my-model", CONFIG, RESULTS, FLAGS)))


def test_metadata_says_what_was_measured(card: ModelCard) -> None:
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.datasets == ["digits"]
    assert card.data.metrics == ["accuracy"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.983333)
    assert result.dataset_args == {"num_images": 360}
    assert card.data.base_model is None


def test_text_says_tokens_results_and_how_to_load(card: ModelCard) -> None:
    assert "[ CLS x 1 | register x 2 | patch x 16 ]" in card.text
    assert "19 tokens of width 64 for an image of 32 x 32 pixels" in card.text
    assert "| Accuracy | 98.33% |" in card.text
    assert "360 held-out images" in card.text
    assert "Top-5" not in card.text  # was not measured
    assert 'pipeline("image-classification", model="my-model", trust_remote_code=True)' in card.text
    assert 'revision="<commit hash>"' in card.text
    assert "torch 2.15.0" in card.text


def test_no_section_is_empty(card: ModelCard) -> None:
    sections = re.split(r"^#+ .*$", card.text, flags=re.MULTILINE)[1:]
    assert len(sections) == 6
    assert all(section.strip() for section in sections)
    assert not re.search(r"More Information Needed|None|\{\{|\{%|\n\n\n", card.text)


def test_recipe_keeps_what_was_set_and_no_path_of_the_machine(card: ModelCard, tmp_path: Any) -> None:
    assert "dataset: digits" in card.text
    assert "/home/me" not in card.text
    assert "pooling" not in card.text.split("```yaml")[1]
    local = build_card("my-model", CONFIG, RESULTS, FLAGS | {"dataset": str(tmp_path), "model": str(tmp_path)})
    assert str(tmp_path.parent) not in str(local)
    assert f"path/to/{tmp_path.name}" in str(local)
    assert local.data.datasets is None and local.data.base_model is None


def test_a_model_that_started_from_another_names_it_and_no_licence() -> None:
    card = ModelCard(str(build_card("my-model", CONFIG, RESULTS, FLAGS | {"model": "someone/their-vitcls"})))
    assert card.data.base_model == "someone/their-vitcls"
    assert card.data.license is None
    assert "fine-tuned from `someone/their-vitcls`" in card.text


def test_layout_leaves_out_groups_without_tokens() -> None:
    assert (
        layout_picture({"cls": 0, "distillation": 1, "registers": 0, "patches": 4})
        == "[ distillation x 1 | patch x 4 ]"
    )
