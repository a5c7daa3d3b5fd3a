"""Model cards: what they claim is what was measured, and nothing in them is empty."""

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from modeling_vitcls import ViTCLSConfig
from modeling_vitcls.hub.card import build_card, layout_picture, shareable


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


PER_CLASS = [
    {"name": "dusk", "images": 200, "recall": 0.99, "precision": 0.975, "f1": 0.982456},
    {"name": "noon|late", "images": 160, "recall": None, "precision": 1.0, "f1": 0.5},
]


def rendered(config: ViTCLSConfig = CONFIG, **results: Any) -> ModelCard:
    """The card of other results."""
    return ModelCard(str(build_card("my-model", config, RESULTS | results, FLAGS)))


def test_results_of_one_label() -> None:
    card = rendered(
        accuracy_interval=[0.964, 0.9925],
        balanced_accuracy=0.97,
        cls_accuracy=0.5,
        distillation_accuracy=0.6,
        calibration_error=0.0123,
        num_broken_images=3,
        per_class=PER_CLASS,
    )
    assert "| Accuracy | 98.33% (95 % interval: 96.40% to 99.25%) |" in card.text
    assert "| Accuracy, CLS head | 50.00% |\n| Accuracy, distillation head | 60.00% |" in card.text
    assert "3 more could not be read, and are not counted." in card.text
    table = card.text.split("Per class:\n\n")[1].split("\n\n")[0].splitlines()
    assert table == [
        "| Class | Images | Recall | Precision | F1 |",
        "|---|---:|---:|---:|---:|",
        "| dusk | 200 | 99.00% | 97.50% | 98.25% |",
        "| noon\\|late | 160 | – | 100.00% | 50.00% |",
    ]
    assert not re.search(r"None|\n\n\n", card.text)
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured.keys() == {
        *("accuracy", "balanced_accuracy", "cls_accuracy", "distillation_accuracy", "calibration_error"),
    }


def test_many_classes_get_no_table() -> None:
    for count, has_table in ((20, True), (21, False)):
        card = rendered(per_class=[PER_CLASS[0] | {"name": f"class-{index}"} for index in range(count)])
        assert ("| class-0 |" in card.text) is has_table


def test_results_of_several_labels() -> None:
    config = ViTCLSConfig(**CONFIG.to_diff_dict() | {"problem_type": "multi_label_classification"})
    results = {name: value for name, value in RESULTS.items() if name != "accuracy"}
    results |= {"mean_average_precision": 0.75, "exact_match": 0.5, "micro_f1": 0.25, "macro_f1": None}
    results["per_class"] = [row | {"average_precision": 0.125} for row in PER_CLASS]
    card = ModelCard(str(build_card("my-model", config, results, FLAGS)))
    assert card.data.metrics == ["mean_average_precision"]
    assert "says which of 2 classes an image shows" in card.text
    assert "| Mean average precision | 75.00% |" in card.text
    assert "F1, mean over the classes" not in card.text  # was not measured
    assert "| dusk | 200 | 99.00% | 97.50% | 98.25% | 12.50% |" in card.text


def test_results_of_several_tasks() -> None:
    tasks = {"light": ["dusk", "noon"], "place": ["sea", "wood", "town"]}
    config = ViTCLSConfig(**CONFIG.to_diff_dict() | {"tasks": tasks, "num_cls_tokens": 2})
    card = rendered(
        config,
        light_accuracy=0.9,
        light_accuracy_interval=[0.8, 0.95],
        place_accuracy=None,
        light_per_class=PER_CLASS,
        place_per_class=[row | {"name": "wood"} for row in PER_CLASS],
    )
    assert "that answers several questions about an image: light (2 classes), place (3 classes)" in card.text
    assert "| light: Accuracy | 90.00% (95 % interval: 80.00% to 95.00%) |" in card.text
    assert "place: Accuracy" not in card.text
    assert "light, per class:" in card.text and "place, per class:" in card.text and "| wood | 160 |" in card.text
    assert "pipeline(" not in card.text  # it knows no tasks


def test_layout_leaves_out_groups_without_tokens() -> None:
    assert (
        layout_picture({"cls": 0, "distillation": 1, "registers": 0, "patches": 4})
        == "[ distillation x 1 | patch x 4 ]"
    )


def test_no_path_of_this_machine_is_in_the_recipe(tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"")
    flags = {"model": str(tmp_path), "dataset": "digits", "output_dir": str(tmp_path / "out"), "epochs": None}
    for teacher, expected in {
        str(tmp_path): f"path/to/{tmp_path.name}",
        f"timm:resnet18@{weights}": "timm:resnet18@path/to/weights.safetensors",
        "timm:resnet18": "timm:resnet18",
        "ORG/TEACHER": "ORG/TEACHER",
    }.items():
        shared = shareable(flags | {"teacher": teacher})
        assert shared["teacher"] == expected
        assert str(tmp_path) not in str(shared)
