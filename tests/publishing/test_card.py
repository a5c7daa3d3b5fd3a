"""Cards of model folders: every claim was measured or read from the folder."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.model_folders import write_run_folder
from helpers.source_checkpoints import save_timm_model
from helpers.tiny_models import (
    build_tiny_config,
    raises_one_line,
    save_classifier,
    save_with_processor,
)
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

import modeling_vitcls as vitcls
from modeling_vitcls import (
    ViTCLSForMultiTaskClassification,
)
from modeling_vitcls.conversion.convert import convert_checkpoint
from modeling_vitcls.hub.model_folder import ModelFolder
from modeling_vitcls.publishing.card import render_card
from modeling_vitcls.runtime.files import read_json, write_json


def load_card(folder: Path, name: str | None = None, license_id: str | None = None) -> ModelCard:
    """Return the card of a folder.

    It must be valid Markdown with a title and sections that are not empty.
    """
    card = ModelCard(render_card(ModelFolder(folder), name, license_id=license_id))
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    kinds = [token.type for token in tokens]
    assert kinds.count("heading_open") == card.text.count("\n## ") + 1
    assert kinds.count("table_open") == card.text.count("\n|---")
    for index, kind in enumerate(kinds[:-3]):
        if kind == "heading_open":
            assert kinds[index + 3] != "heading_open", tokens[index + 1].content
    # A class of transformers may have None where the model has a value
    assert "None" not in card.text.replace("instead of None", "")
    assert "{{" not in card.text
    assert "{%" not in card.text
    return card


# Runs ---------------------------------------------------------------------------------------------


def test_the_card_of_a_classifier_shows_what_was_measured(tmp_path: Path) -> None:
    rows = [
        {"name": "dusk", "images": 60, "recall": 0.966667, "precision": 0.42, "f1": 0.585859},
        {"name": "noon|late", "images": 300, "recall": 0.733333, "precision": 0.990991, "f1": 0.85},
    ]
    matrix = [[58, 2], [80, 220]]
    shares = {"dusk": [0.62, 0.4], "noon|late": [0.1, 0.2], "x": [0.2, 0.3]}
    calibration = {"temperature": 0.651, "num_images": 180, "calibration_error_before": 0.0871}
    results = {
        "accuracy": 0.772222,
        "accuracy_interval": [0.726, 0.812],
        "num_right": 278,
        "per_class": rows,
        "confusion_matrix": matrix,
        "calibration_error": 0.0123,
        "calibration": calibration,
        "frozen": {"findings": {"border": {"patches": [0.2, 0.4], "shares": shares}}},
    }

    card = load_card(write_run_folder(tmp_path / "mine", results), "ann/mine")
    text = card.text
    assert "# ann/mine\n" in text
    assert 'revision = "<commit hash>"\nclassify = pipeline(' in text
    assert 'model="ann/mine", revision=revision, trust_remote_code=True' in text
    assert (
        "| Accuracy | 278 of 360 right; about 77% of new photos (73 to 81), no better than" in text
    )
    assert r"always saying `noon\|late`: 300 of 360 |" in text
    assert "\n- dusk: 62% of the score comes from the border of the photos" in text
    assert r"| `noon\|late` | 220 of 300 | 99% | 85% | `dusk` (80) |" in text
    assert f"modeling_vitcls {vitcls.__version__}" in text
    assert "report.html" not in text  # which the folder lacks
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "transformers"
    assert card.data.license is None


def test_values_of_a_folder_are_no_markdown(tmp_path: Path) -> None:
    hostile = "x\n## Free\n![a](https://evil.example/a.png) <b>`code`</b> | \x1b[31mred"
    results = {
        "device": hostile,
        "versions": {hostile: hostile},
        "provenance": {
            "name": "ann/base",
            "license": "other",
            "license_name": hostile,
            "license_link": "javascript:alert(1)",
        },
    }
    text = load_card(write_run_folder(tmp_path / "mine", results, {"model": "ann/base"})).text
    parts = MarkdownIt("commonmark").enable("table").parse(text)
    tokens = [child for part in parts for child in [part, *(part.children or [])]]
    assert not {"html_inline", "image"} & {token.type for token in tokens}
    assert "\n## Free" not in text
    assert text.count("x ## Free") == 4
    assert "javascript" not in text


@pytest.mark.parametrize("results", [{"per_class": 5}, {"versions": "2.15.0"}])
def test_values_of_another_type_are_one_line(results: dict[str, Any], tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "mine", results)
    with raises_one_line("results.json", "Copy"):
        load_card(folder)


def test_the_card_names_all_code_files_to_read(tmp_path: Path) -> None:
    text = load_card(write_run_folder(tmp_path / "mine")).text
    files = (Path(vitcls.__file__).parent / "model").glob("*_vitcls.py")
    assert set(re.findall(r"`(\w+_vitcls\.py)`", text)) == {file.name for file in files}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "transformers' `ViTForImageClassification` computes the same"),
        ({"num_cls_tokens": 2}, "requires its code: .*num_cls_tokens=2"),
    ],
)
def test_the_card_says_whether_the_model_can_be_native(
    tmp_path: Path, fields: dict[str, Any], text: str
) -> None:
    folder = save_classifier(tmp_path / "mine", **{"num_register_tokens": 0} | fields)
    vitcls.write_card(folder)
    assert re.search(text, (folder / "README.md").read_text())


def test_the_card_claims_no_version_for_code_of_another_one(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "mine")
    with (folder / "heads_vitcls.py").open("a") as file:
        file.write("# of another version\n")
    text = load_card(folder).text
    assert "belong to modeling_vitcls" not in text
    assert "heads_vitcls.py differs from modeling_vitcls" in text


def test_results_before_a_class_was_added_are_named_as_such(tmp_path: Path) -> None:
    head = {"labels": ["dawn"], "adds_classes": True}
    config = build_tiny_config(
        num_labels=4,
        id2label={0: "dusk", 1: "noon", 2: "x", 3: "dawn"},
        extra_heads={"added": head},
    )
    record = {
        "kind": "classes",
        "labels": ["dawn"],
        "dataset": "new",
        "reads": "last layer, CLS",
        "relative_flops": 0.00001,
        "num_parameters": 33,
    }
    flags = {"dataset": "ann/photos"}
    before = load_card(write_run_folder(tmp_path / "old", flags=flags))
    folder = write_run_folder(
        tmp_path / "mine", {"additions": {"added": record}}, flags, config=config
    )
    card = load_card(folder)
    assert "before `dawn` was added" not in before.text
    assert "before `dawn` was added" in card.text
    assert before.data.eval_results
    assert not card.data.eval_results


@pytest.mark.parametrize(
    ("dataset", "is_on_hub"), [("acme/photos", True), ("digits", False), ("./photos", False)]
)
def test_the_model_index_names_datasets_of_the_hub_only(
    tmp_path: Path, dataset: str, is_on_hub: bool
) -> None:
    folder = write_run_folder(
        tmp_path / "mine", {"dataset": "photos", "accuracy": 0.98333333}, {"dataset": dataset}
    )
    card = load_card(folder, "ann/mine")
    assert (card.data.datasets == ["acme/photos"]) is is_on_hub

    assert bool(card.data.eval_results) is is_on_hub
    assert "354 of 360 right; about 98% of new photos (96 to 99)" in card.text
    if is_on_hub:
        (result,) = card.data.eval_results
        assert result.dataset_type == "acme/photos"
        assert result.dataset_name == "photos"
        assert result.dataset_split == "test"
        assert result.metric_type == "accuracy"
        assert result.metric_value == 0.983333
        assert card.data.metrics == ["accuracy"]


def test_tasks_have_no_pipeline(tmp_path: Path) -> None:
    tasks = {"species": ["cat", "dog"], "coat": ["short", "long", "none"]}
    config = build_tiny_config(num_cls_tokens=2, tasks=tasks)
    tasks_results = {
        "species": {"accuracy": 0.75, "num_images": 40},
        "coat": {"accuracy": 0.5, "num_images": 20},
    }
    results = {"tasks": tasks_results}
    folder = write_run_folder(
        tmp_path / "mine", results, None, ViTCLSForMultiTaskClassification, config
    )
    card = load_card(folder)

    assert "| species: Accuracy | 30 of 40 right (75%) |" in card.text
    assert "| coat: Accuracy | 10 of 20 right |" in card.text
    assert "pipeline(" not in card.text
    assert card.data.pipeline_tag == "image-feature-extraction"
    save_with_processor(ViTCLSForMultiTaskClassification(config), tmp_path / "by hand")
    assert "species (2 classes)" in load_card(tmp_path / "by hand").text


@pytest.mark.parametrize(
    ("provenance", "flag", "license_id", "words"),
    [
        (None, "mit", "mit", "The weights are licensed under mit."),
        (
            {"name": "ann/base", "base_model": "ann/base", "license": "cc-by-4.0"},
            None,
            "cc-by-4.0",
            "derived from",
        ),
        ({"name": "ann/base", "base_model": "ann/base"}, None, None, "whose license is unknown"),
        (
            {"name": "ann/base", "base_model": "ann/base"},
            "mit",
            "mit",
            "The weights are licensed under mit.",
        ),
    ],
)
def test_the_license_of_the_initial_weights_is_inherited(
    tmp_path: Path,
    provenance: dict[str, Any] | None,
    flag: str | None,
    license_id: str | None,
    words: str,
) -> None:
    flags = {
        "model": "ann/base" if provenance else "vitcls-tiny",
        "teacher": "timm:resnet18",
    }
    results = {
        "provenance": provenance,
        "teacher": "timm:resnet18",
        "teacher_provenance": {"name": "timm:resnet18", "license": "apache-2.0"},
    }
    card = load_card(write_run_folder(tmp_path / "mine", results, flags), license_id=flag)

    assert card.data.license == license_id
    assert words in card.text
    assert "teacher model of the distillation is licensed under apache-2.0" in card.text
    assert card.data.base_model == (provenance and "ann/base")
    assert getattr(card.data, "base_model_relation", None) == ("finetune" if provenance else None)


def test_a_run_without_held_out_images_has_no_results(tmp_path: Path) -> None:
    results = {"num_images": 0, "accuracy": None, "accuracy_interval": None}
    card = load_card(write_run_folder(tmp_path / "mine", results, {"dataset": "acme/photos"}))
    assert "trained without held-out images" in card.text
    assert card.data.eval_results is None


# Other folders ------------------------------------------------------------------------------------


def test_the_card_of_a_converted_model_names_its_source_and_base_model(tmp_path: Path) -> None:
    convert_checkpoint(save_timm_model(tmp_path / "source"), tmp_path / "vit")
    card = load_card(tmp_path / "vit", "ann/vit")
    assert "vitcls finetune --model ann/vit" in card.text
    assert "## Accuracy of the conversion" in card.text

    report = read_json(tmp_path / "vit/parity_report.json")
    for name in (
        report["source"],
        "timm/vit",
        "mine",
    ):  # the source, or a model that was made from the base model
        report["provenance"] = {"name": name, "base_model": "timm/vit"}
        write_json(tmp_path / "vit/parity_report.json", report)
        card = load_card(tmp_path / "vit")
        assert (f"[`{name}`](https://huggingface.co/timm/vit)" in card.text) == (name != "mine")
        assert card.data.base_model == "timm/vit"
        assert getattr(card.data, "base_model_relation", None) is None
