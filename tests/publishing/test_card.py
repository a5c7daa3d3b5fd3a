"""Model cards: every claim was measured, and no section is empty."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.rendered_cards import CONFIG, FLAGS, PER_CLASS, RESULTS, render_card
from helpers.tiny_models import build_tiny_config, randomize, save_with_processor
from huggingface_hub import ModelCard, parse_eval_result_entries
from markdown_it import MarkdownIt
from PIL import Image

from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification
from modeling_vitcls.data.images import LabeledImages, UnreadableImage
from modeling_vitcls.data.labels import LabelSpace
from modeling_vitcls.hub.provenance import Provenance
from modeling_vitcls.inference.metrics import drop_large_matrices
from modeling_vitcls.options import RunOptions
from modeling_vitcls.publishing.card import (
    build_card,
    build_checkpoint_card,
    build_common_metadata,
    build_encoder_card,
    describe_classes,
    format_token_layout,
    get_license,
)
from modeling_vitcls.publishing.card_sections import get_shareable_flags
from modeling_vitcls.training.model_report import (
    build_model_report,
    measure_inference_speed,
    select_samples,
    write_card,
)


ENCODER = RESULTS | {"reconstruction_loss": 0.5, "num_hidden_patches": 10}


@pytest.fixture
def card() -> ModelCard:
    """Return the card as a reader sees it: rendered, and parsed again."""
    return ModelCard(str(build_card("my-model", CONFIG, RESULTS, FLAGS)))


def read_metadata(card: ModelCard) -> dict[str, Any]:
    """Return the YAML header of a card."""
    return yaml.safe_load(str(card).split("---\n")[1])


def test_the_metadata_of_a_classifier() -> None:
    """No license was given, and scikit-learn's digits are not on the Hub."""
    interval = [0.964, 0.9925]
    results = RESULTS | {"accuracy": 0.98333333, "accuracy_interval": interval, "cls_accuracy": 0.0, "macro_f1": None}
    metadata = read_metadata(build_card("ann/mine", CONFIG, results, FLAGS))
    (entry,) = metadata.pop("model-index")
    assert metadata == {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["vision", "vit", "vitcls"],
        "metrics": ["accuracy"],
    }
    (evaluation,) = entry.pop("results")
    assert entry == {"name": "ann/mine"}
    assert evaluation == {
        "task": {"type": "image-classification"},
        "dataset": {
            "name": "digits",
            "type": "digits",
            "split": "20%, stratified, split seed 0",
            "args": {"num_images": 360},
        },
        "metrics": [
            {
                "type": "accuracy",
                "name": "Accuracy",
                "value": 0.983333,
                "args": {"confidence_level": 0.95, "confidence_interval": interval},
            },
            {"type": "cls_accuracy", "name": "Accuracy, CLS head", "value": 0.0},
        ],
    }
    config = ViTCLSConfig(**CONFIG.to_diff_dict() | {"problem_type": "multi_label_classification"})
    flags = FLAGS | {"dataset": "ann/pets", "model": "ann/base"}
    base = Provenance("ann/base", "ann/base", license="mit")
    multi_label = read_metadata(build_card("mine", config, RESULTS | {"teacher": "ann/cnn"}, flags, base))
    assert multi_label["tags"] == ["vision", "vit", "vitcls", "distillation", "multi-label"]
    encoder = read_metadata(build_encoder_card("mine", CONFIG, ENCODER, flags, base))
    assert encoder == {
        "library_name": "transformers",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["vision", "vit", "vitcls", "masked-image-modeling"],
        "datasets": ["ann/pets"],
        "base_model": "ann/base",
        "base_model_relation": "finetune",
        "license": "mit",
    }
    license_text = get_license(flags, base)
    metadata = build_common_metadata(flags, base)
    checkpoint = build_checkpoint_card("ann/x", "steps", 3, "ViTCLSModel", metadata, license_text, False)
    del encoder["pipeline_tag"]
    assert read_metadata(checkpoint) == encoder | {"tags": ["vision", "vit", "vitcls", "checkpoint"]}
    unpublished = read_metadata(build_encoder_card("mine", CONFIG, ENCODER, flags, Provenance("base")))
    assert not {"base_model", "base_model_relation", "license"} & unpublished.keys()


def test_text_describes_tokens_results_and_loading(card: ModelCard) -> None:
    assert "[ CLS x 1 | register x 2 | patch x 16 ]" in card.text
    assert "An image of 32 x 32 pixels is represented by 19 tokens of width 64." in card.text
    assert "| Accuracy | 98.33% |" in card.text
    assert (
        "with 214,346 parameters for image classification with 2 classes, trained from scratch on `digits`."
        in card.text
    )
    assert "360 images of the held-out split" in card.text
    assert "Top-5" not in card.text  # was not measured
    loading = 'pipeline("image-classification", model="my-model", revision="main", trust_remote_code=True)'
    assert loading in card.text and 'revision = "<commit hash>"' in card.text
    assert card.text.count("from_pretrained(") == card.text.count("revision=revision") == 2
    assert "torch 2.15.0" in card.text
    config = ViTCLSConfig(**CONFIG.to_diff_dict() | {"image_size": [32, 64]})
    other = build_card("my-model", config, RESULTS, FLAGS | {"model": "runs/mine"}).text
    assert "32 x 64 pixels" in other and "fine-tuned from `runs/mine` on `digits`." in other


def test_no_section_is_empty(card: ModelCard) -> None:
    sections = re.split(r"^#+ .*$", card.text, flags=re.MULTILINE)[1:]
    assert len(sections) == 10
    assert all(section.strip() for section in sections)
    assert not re.search(r"More Information Needed|None|\{\{|\{%|\n\n\n", card.text)


def test_the_recipe_contains_set_flags_and_no_local_paths(card: ModelCard, tmp_path: Any) -> None:
    assert "dataset: digits" in card.text
    assert "/home/me" not in card.text
    assert "pooling" not in card.text.split("```yaml")[1]
    local = build_card("my-model", CONFIG, RESULTS, FLAGS | {"dataset": str(tmp_path), "model": str(tmp_path)})
    assert str(tmp_path.parent) not in str(local)
    assert f"path/to/{tmp_path.name}" in str(local)
    published = build_card("my-model", CONFIG, RESULTS, FLAGS | {"dataset": "someone/pictures"})
    assert published.data.datasets == ["someone/pictures"]
    moved = build_card("my-model", CONFIG, RESULTS, FLAGS | {"dataset": "/gone/from/here", "hub_model_id": "me/mine"})
    assert "/gone" not in str(moved) and "me/mine" not in str(moved)
    assert local.data.datasets is None and local.data.base_model is None


def test_a_local_folder_does_not_hide_a_hub_dataset_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("digits", "vitcls-tiny", "someone/pictures"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = build_card("my-model", CONFIG, RESULTS, FLAGS | {"dataset": "someone/pictures"})
    assert card.data.datasets == ["someone/pictures"]
    assert get_shareable_flags(FLAGS) == {"output_dir": "my-model", "model": "vitcls-tiny", "dataset": "digits"}


def render_derived_card(origin: Provenance, model: str = "someone/their-vitcls") -> ModelCard:
    """Return the card of a model that was fine-tuned from another."""
    return ModelCard(str(build_card("my-model", CONFIG, RESULTS, FLAGS | {"model": model}, origin)))


def test_a_derived_model_names_its_base_model_and_no_license() -> None:
    card = render_derived_card(Provenance("someone/their-vitcls", base_model="someone/their-vitcls"))
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/their-vitcls", "finetune")
    assert card.data.license is None
    assert "fine-tuned from `someone/their-vitcls` on `digits`" in card.text
    assert "whose license is unknown" in card.text


def test_the_license_is_inherited(tmp_path: Path) -> None:
    """The model was fine-tuned from a local folder, which was derived from a published model."""
    link = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"
    origin = Provenance(
        tmp_path.name, "timm/their-dinov3", "other", "dinov3-license", link, (tmp_path / "LICENSE.md",)
    )
    card = render_derived_card(origin, str(tmp_path))
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "dinov3-license", link)
    assert card.data.base_model == "timm/their-dinov3"
    derivation = f"fine-tuned from `path/to/{tmp_path.name}`, which is derived from [timm/their-dinov3]("
    assert derivation in card.text
    assert f"remain under its license: [dinov3-license]({link}). The license text is in LICENSE.md." in card.text


def test_a_teacher_is_not_a_base_model() -> None:
    teacher = Provenance("timm:their-teacher", "timm/their-teacher", license="mit")
    flags = FLAGS | {"teacher": "timm:their-teacher", "distillation": "soft"}
    results = RESULTS | {"teacher": "timm:their-teacher"}
    card = ModelCard(str(build_card("my-model", CONFIG, results, flags, teacher_provenance=teacher)))
    sentence = (
        "trained on the predicted probabilities of the teacher `timm:their-teacher`. License of the teacher: mit."
    )
    assert sentence in card.text
    assert card.data.base_model is None and card.data.license is None
    assert "distillation" in card.data.tags
    assert "The teacher model of the distillation is licensed under mit." in card.text.split("## License")[1]
    unknown = build_card("my-model", CONFIG, results, flags, teacher_provenance=Provenance("timm:their-teacher"))
    assert "The teacher model" not in unknown.text


def test_the_license_of_new_weights_is_set_by_flag() -> None:
    flags = FLAGS | {"license": "cc-by-4.0"}
    for built in (build_card("my-model", CONFIG, RESULTS, flags), build_encoder_card("x", CONFIG, ENCODER, flags)):
        card = ModelCard(str(built))
        assert card.data.license == "cc-by-4.0"
        said = card.text.split("## License")[1]
        assert "The weights are licensed under cc-by-4.0. The Python files are licensed under Apache-2.0." in said
        assert "license" not in card.text.split("```yaml")[1].split("```")[0]  # a repeated run sets its own license
    for built in (build_card("my-model", CONFIG, RESULTS, FLAGS), build_encoder_card("x", CONFIG, ENCODER, FLAGS)):
        said = ModelCard(str(built)).text.split("## License")[1]
        assert (
            "did not specify a license for the weights" in said
            and "Python files are licensed under Apache-2.0" in said
        )
    with pytest.raises(ValueError, match="it must be a Hub license identifier, such as apache-2"):
        RunOptions(license="Apache 2")


def test_a_license_flag_does_not_replace_an_inherited_license(tmp_path: Path) -> None:
    flags = FLAGS | {"model": "someone/their-vitcls", "license": "mit"}
    origin = Provenance("someone/their-vitcls", "someone/their-vitcls", license="cc-by-nc-4.0")
    card = ModelCard(str(build_card("my-model", CONFIG, RESULTS, flags, origin)))
    assert card.data.license == "cc-by-nc-4.0" and "remain under its license: cc-by-nc-4.0." in card.text
    warnings: list[str] = []
    for license_named in ("mit", "cc-by-nc-4.0", None):
        write_card(tmp_path, card, origin, RESULTS, RunOptions(license=license_named), warnings.append)
    (warning,) = warnings
    assert "--license mit" in warning and "cc-by-nc-4.0" in warning and "\n" not in warning
    unknown = ModelCard(str(build_card("my-model", CONFIG, RESULTS, flags, Provenance("someone/their-vitcls"))))
    assert unknown.data.license == "mit" and "The weights are licensed under mit." in unknown.text


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.24, "0.2 s"), (9.94, "9.9 s"), (10.4, "10 s"), (12345.6, "12,346 s")]
)
def test_short_runs_took_some_time(seconds: float, words: str) -> None:
    assert f"Training took {words}, including evaluations" in render_card(seconds=seconds).text


def test_results_of_one_label() -> None:
    card = render_card(
        accuracy_interval=[0.964, 0.9925],
        balanced_accuracy=0.97,
        cls_accuracy=0.5,
        distillation_accuracy=0.0,
        calibration_error=0.0123,
        num_unreadable_images=3,
        per_class=PER_CLASS,
    )
    assert "| Accuracy | 98.33% (95% interval: 96.40% to 99.25%) |" in card.text
    assert "| Accuracy, CLS head | 50.00% |\n| Accuracy, distillation head | 0.00% |" in card.text
    assert "3 unreadable images were skipped and not counted." in card.text
    table = card.text.split("Per class:\n\n")[1].split("\n\n")[0].splitlines()
    assert table == [
        "| Class | Images | Recall | Precision | F1 |",
        "|---|---:|---:|---:|---:|",
        "| `dusk` | 200 | 99.00% | 97.50% | 98.25% |",
        "| `noon\\|late` | 160 | – | 100.00% | 50.00% |",
    ]
    assert not re.search(r"None|\n\n\n", card.text)


def test_results_of_several_labels() -> None:
    config = ViTCLSConfig(**CONFIG.to_diff_dict() | {"problem_type": "multi_label_classification"})
    results = {name: value for name, value in RESULTS.items() if name != "accuracy"}
    results |= {"mean_average_precision": 0.75, "exact_match": 0.5, "micro_f1": 0.25, "macro_f1": None}
    results["per_class"] = [row | {"average_precision": 0.125} for row in PER_CLASS]
    card = ModelCard(str(build_card("my-model", config, results, FLAGS)))
    assert card.data.metrics == ["mean_average_precision"]
    assert "for multi-label image classification with 2 classes" in card.text
    assert "| Mean average precision | 75.00% |" in card.text
    assert "F1, macro average" not in card.text  # was not measured
    assert "| `dusk` | 200 | 99.00% | 97.50% | 98.25% | 12.50% |" in card.text
    assert (
        "The model predicts any number of these classes: `dusk`, `noon`. Other image content is not predicted."
        in card.text
    )
    assert "weakest" not in card.text  # all classes have the same average precision
    results["per_class"][1]["average_precision"] = 0.0625
    text = build_card("my-model", config, results | {"confusion_matrix": [[9, 9], [9, 9]]}, FLAGS).text
    assert "weakest class is `noon|late`: average precision 6.25% on 160 images." in text


def test_results_of_several_tasks() -> None:
    tasks = {"light": ["dusk", "noon"], "place": ["sea", "wood", "town"]}
    config = ViTCLSConfig(**CONFIG.to_diff_dict() | {"tasks": tasks, "num_cls_tokens": 2})
    card = render_card(
        config,
        light_accuracy=0.9,
        light_accuracy_interval=[0.8, 0.95],
        place_accuracy=None,
        light_per_class=PER_CLASS,
        place_per_class=[row | {"name": "wood"} for row in PER_CLASS],
    )
    assert "for multi-task image classification: light (2 classes), place (3 classes)" in card.text
    assert "| light: Accuracy | 90.00% (95% interval: 80.00% to 95.00%) |" in card.text
    assert "place: Accuracy" not in card.text
    assert "The classes of light are `dusk`, `noon`." in card.text
    assert "The classes of place are `sea`, `wood`, `town`." in card.text
    weakest = render_card(
        config,
        light_num_images=90,
        light_accuracy_interval=[0.8, 0.95],
        place_per_class=[PER_CLASS[0] | {"name": "wood"}, PER_CLASS[1] | {"recall": 0.25}],
        place_confusion_matrix=[[9, 1], [3, 1]],
    ).text
    assert (
        "The accuracy of light was measured on 90 images. The 95% confidence interval is 80.00% to 95.00%." in weakest
    )
    assert (
        "weakest class of place is `noon|late`: recall 25.00% on 160 images, 3 of which were predicted as" in weakest
    )
    assert "light, per class:" in card.text and "place, per class:" in card.text and "| `wood` | 160 |" in card.text
    assert "pipeline(" not in card.text and card.data.pipeline_tag == "image-feature-extraction"


def test_groups_without_tokens_are_not_in_the_layout() -> None:
    assert (
        format_token_layout({"cls": 0, "distillation": 1, "registers": 0, "patches": 4})
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
        shared = get_shareable_flags(flags | {"teacher": teacher})
        assert shared["teacher"] == expected
        assert str(tmp_path) not in str(shared)


# Text about measurements ---------------------------------------------------------------------------------------------


def test_only_the_first_classes_are_listed() -> None:
    assert "predicts one of these classes, even if an image shows none of them: `dusk`, `noon`." in render_card().text
    many = ViTCLSConfig(**CONFIG.to_diff_dict() | {"id2label": {index: f"kind-{index}" for index in range(60)}})
    text = render_card(many).text
    assert "`kind-49` and 10 more" in text and "kind-50" not in text
    all_listed = ViTCLSConfig(id2label={index: f"kind-{index}" for index in range(50)})
    assert describe_classes(all_listed)[0].endswith("`kind-48`, `kind-49`.")


def test_classes_are_listed_by_index() -> None:
    (sentence,) = describe_classes(ViTCLSConfig(id2label={2: "cat", 0: "ant", 1: "bee"}))
    assert sentence.endswith("`ant`, `bee`, `cat`.")


def test_settings_with_an_effect_are_in_the_table() -> None:
    flags = FLAGS | {"batch_size": 16, "gradient_accumulation_steps": 2, "mixup": 0.0, "flip": True, "seed": 0}
    text = str(build_card("my-model", CONFIG, RESULTS | {"num_processes": 3}, flags))
    assert "| Images per step | 96 |" in text and "| Random horizontal flip | yes |" in text and "| Seed | 0 |" in text
    assert "Mixup" not in text
    assert "Stochastic depth" not in text
    config = ViTCLSConfig(**CONFIG.to_diff_dict() | {"drop_path_rate": 0.1})
    assert "| Stochastic depth, rate at the last layer | 0.1 |" in build_card("my-model", config, RESULTS, FLAGS).text


@pytest.mark.parametrize(
    ("flags", "is_shown"),
    [
        ({}, True),
        ({"trainable": "lora"}, True),
        ({"trainable": "last-4"}, True),
        ({"trainable": "last-3"}, False),
        ({"trainable": "head"}, False),
        ({"trainable": "head", "teacher": "some/cnn"}, True),
    ],
    ids=str,
)
def test_patch_dropout_is_in_the_table_if_patches_were_dropped(flags: dict[str, Any], is_shown: bool) -> None:
    config = ViTCLSConfig(**CONFIG.to_diff_dict() | {"patch_drop_rate": 0.25})
    row = "| Patch dropout rate | 0.25 |"
    assert (row in str(build_card("my-model", config, RESULTS, FLAGS | flags))) == is_shown
    assert "Patch dropout" not in str(build_card("my-model", CONFIG, RESULTS, FLAGS | flags))


@pytest.mark.parametrize(
    ("kilowatt_hours", "words"),
    [
        (12345.6, "12,346 kWh"),
        (999.6, "1,000 kWh"),
        (1.2345, "1.23 kWh"),
        (0.1, "0.1 kWh"),
        (0.09999, "100 Wh"),
        (0.00345, "3.45 Wh"),
    ],
)
def test_energy_has_a_unit(kilowatt_hours: float, words: str) -> None:
    energy = {"kilowatt_hours": kilowatt_hours, "assumption": "each CPU uses 9 W"}
    assert f"The estimate is {words}, assuming that each CPU uses 9 W." in render_card(energy=energy).text


def test_the_utilization_has_its_peak() -> None:
    measured = {
        "of_training_steps": 0.4321,
        "gemm_peak_flops_per_second": 1.2345e13,
        "gemm_dtype": "bfloat16",
        "training_flops_per_image": 6.6e9,
    }
    text = render_card(utilisation=measured).text
    assert (
        "was 43.2%. The reference is the peak throughput of large matrix multiplications, 12,345 GFLOP/s in bfloat16"
        in text
    )
    assert "require 6,600 million floating-point operations" in text
    unknown = render_card(utilisation=measured | {"of_training_steps": None}).text
    assert "utilization is unknown, because other programs interfered with the measurement" in unknown
    assert "utilization" not in render_card().text


@pytest.mark.parametrize(
    ("distillation", "targets"),
    [("hard", "predicted class"), ("soft", "predicted probabilities"), (None, "predictions")],
)
def test_the_targets_of_the_teacher_are_named(distillation: str | None, targets: str) -> None:
    flags = FLAGS | {"teacher": "/home/me/teacher", "distillation": distillation or ""}
    text = build_card("my-model", CONFIG, RESULTS, flags).text
    assert f"The distillation token was trained on the {targets} of the teacher `path/to/teacher`." in text


@pytest.mark.parametrize(
    ("architecture", "command"),
    [("ViTCLSForMaskedImageModeling", "pretrain"), ("ViTCLSForImageClassification", "finetune")],
)
def test_a_resumable_checkpoint_names_the_command(architecture: str, command: str) -> None:
    license_text = get_license(FLAGS | {"license": "mit"}, None)
    arguments = ("ann/x", "steps", 12000, architecture, build_common_metadata(FLAGS, None), license_text)
    text = build_checkpoint_card(*arguments, with_optimizer=True).text
    assert "# ann/x, step 12,000" in text and 'revision="steps"' in text
    assert f"cli {command} --config runs/mine/config.resolved.yaml" in text
    assert text.rstrip().endswith(f"## License\n\n{license_text}")
    assert "## Resume" not in build_checkpoint_card(*arguments, with_optimizer=False).text


def test_base_models_are_linked() -> None:
    card = render_derived_card(Provenance("mine", ["ann/a", "bob/b"]), "runs/mine")
    links = "[ann/a](https://huggingface.co/ann/a), [bob/b](https://huggingface.co/bob/b)"
    assert f"`runs/mine`, which is derived from {links}," in card.text
    assert card.data.base_model == ["ann/a", "bob/b"]


def test_flags_for_initial_weights_and_publishing_are_not_in_the_recipe() -> None:
    flags = FLAGS | {"push_to_hub": True, "hub_model_id": "ann/x", "eval_benchmark": "a/b", "resume": True, "seed": 3}
    recipe = str(build_card("my-model", CONFIG, RESULTS, flags)).split("```yaml")[1].split("```")[0]
    expected = {"output_dir": "my-model", "model": "vitcls-tiny", "dataset": "digits", "seed": 3}
    assert list(yaml.safe_load(recipe).items()) == list(expected.items())


def test_images_have_alternative_text() -> None:
    names = ("token_layout", "confusion_matrix", "attention")
    pictures = {name: f"pictures/{name}.png" for name in names}
    card = ModelCard(str(build_card("my-model", CONFIG, RESULTS, FLAGS, images=pictures)))
    shown = dict(re.findall(r"!\[(.+)\]\((.+)\)", card.text))
    assert sorted(shown.values()) == sorted(pictures.values())
    assert "The token sequence: 1 CLS, 2 register and 16 patch tokens" in shown
    assert not re.search(r"\n\n\n", card.text)
    assert "## Attention maps" not in render_card().text and "![" not in render_card().text
    config = ViTCLSConfig(
        **CONFIG.to_diff_dict() | {"tasks": {"light": ["dusk", "noon"], "place": ["sea", "wood"]}, "num_cls_tokens": 2}
    )
    images = {"confusion_matrix_place": "pictures/place.png"}
    text = build_card("my-model", config, RESULTS, FLAGS, images=images).text
    assert (
        "![Confusion matrix of place: rows are true classes, columns are predicted classes](pictures/place.png)"
        in text
    )


@pytest.mark.parametrize("flags", [{}, {"dataset": "/gone/scans"}, {"dataset": "/gone/scans", "card_samples": True}])
def test_the_report_is_linked_only_if_it_may_be_published(flags: dict[str, Any]) -> None:
    for build, results in ((build_card, RESULTS), (build_encoder_card, ENCODER)):
        card = build("my-model", CONFIG, results, FLAGS | flags, images={"report": "report.html"})
        assert ("[report.html](report.html)" in card.text) is (flags != {"dataset": "/gone/scans"})


def test_speed_is_given_with_its_measurement() -> None:
    model = randomize(ViTCLSForImageClassification(build_tiny_config()))
    speed = measure_inference_speed(model, torch.device("cpu"))
    assert speed["images_per_second"] > 0 and 1 <= speed["batch_size"] <= 32 and speed["dtype"] == "float32"
    text = render_card(inference=speed | {"images_per_second": 1234.0, "batch_size": 32}).text
    assert "in float32, excluding image loading and resizing, is 1,234 images/s with batches of 32 images" in text


def test_an_encoder_card_describes_its_pretraining() -> None:
    results = ENCODER
    flags = FLAGS | {"mask_ratio": 0.6, "label_smoothing": 0.1}
    card = ModelCard(str(build_encoder_card("my-encoder", CONFIG, results, flags)))
    assert card.data.pipeline_tag == "image-feature-extraction" and card.data.license is None
    assert "| Mask ratio | 0.6 |" in card.text
    assert "smoothing" not in card.text  # there are no labels
    assert "`accelerate launch -m modeling_vitcls.cli pretrain --config recipe.yaml`" in card.text
    assert "vitcls finetune --model my-encoder --dataset path/to/labeled/images --output-dir runs/mine" in card.text
    pictures = build_encoder_card("mine", CONFIG, results, flags, images={"attention": "pictures/attention.png"})
    assert "](pictures/attention.png)" in pictures.text
    unused = {"head_type": "mlp", "pooling": "mean", "trainable": "head"}
    text = str(build_encoder_card("my-encoder", CONFIG, results, flags | unused))
    assert "head" not in re.sub(r"attention heads|heads_vitcls\.py", "", text)
    assert "classifier" not in text and "pooling" not in text
    sections = re.split(r"^#+ .*$", card.text, flags=re.MULTILINE)[1:]
    assert len(sections) == 10 and all(section.strip() for section in sections)
    assert not re.search(r"More Information Needed|None|\{\{|\{%|\n\n\n", card.text)


def build_cards(changes: dict[str, Any], missing: tuple[str, ...] = ()) -> list[ModelCard]:
    """Return the cards of a classifier and an encoder."""
    classifier, encoder = (
        {name: value for name, value in (results | changes).items() if name not in missing}
        for results in (RESULTS, ENCODER)
    )
    cards = (build_card("mine", CONFIG, classifier, FLAGS), build_encoder_card("mine", CONFIG, encoder, FLAGS))
    return [ModelCard(str(card)) for card in cards]


def test_the_evaluated_step_is_named() -> None:
    for card in build_cards({}):
        assert ", after the last training step." in card.text
    for card in build_cards({"selection": {"step": 1100, "num_images": 285}}):
        assert ", after training step 1,100, which was selected on 285 other images." in card.text
        assert "last training step" not in card.text


def test_a_model_without_held_out_images_was_not_evaluated() -> None:
    for card in build_cards({"num_images": 0}, missing=("accuracy", "loss", "reconstruction_loss")):
        assert "No results were measured, because the model was trained without held-out images." in card.text
        assert "valuated on" not in card.text and "| Metric |" not in card.text
        sections = re.split(r"^#+ .*$", card.text, flags=re.MULTILINE)[1:]
        assert all(section.strip() for section in sections) and "\n\n\n" not in card.text


# Files next to the card ----------------------------------------------------------------------------------------------


class UnreadableSecondImage(list):
    """Images, of which the second is unreadable."""

    def __getitem__(self, index: Any) -> Any:
        if index == 1:
            raise UnreadableImage("cannot be read")
        return super().__getitem__(index)


def test_samples_are_of_different_classes() -> None:
    pictures = UnreadableSecondImage(Image.new("L", (4, 4), value) for value in range(7))
    labels = [0, 1, 0, 0, 1, 2, 2]
    space = LabelSpace("single_label_classification", {"label": ["dusk", "noon", "dawn"]})
    samples = select_samples(LabeledImages(pictures, labels), space)
    assert [(picture.getpixel((0, 0)), label) for picture, label in samples] == [
        *((0, "dusk"), (5, "dawn"), (2, "dusk"), (3, "dusk")),
    ]
    tasks = LabelSpace("multi_task", {"light": ["dusk", "noon"], "place": ["sea", "wood"]})
    (sample,) = select_samples(LabeledImages(pictures[:1], [{"light": 1, "place": -100}]), tasks)
    assert sample[1] == "light noon"
    several = LabelSpace("multi_label_classification", {"tags": ["sea", "wood", "town"]})
    (sample,) = select_samples(LabeledImages(pictures[:1], [[1.0, 0.0, 1.0]]), several)
    assert sample[1] == "sea, town"
    (sample,) = select_samples(LabeledImages(pictures[:1], [-100]), LabelSpace("single_label_classification", {}))
    assert sample[1] is None


@pytest.mark.parametrize("benchmark", [None, "org/benchmark"])
def test_the_benchmark_result_is_written_if_a_benchmark_is_named(tmp_path: Path, benchmark: str | None) -> None:
    file = tmp_path / ".eval_results" / "results.yaml"
    file.parent.mkdir()
    file.write_text("of an earlier run")
    options = RunOptions(eval_benchmark=benchmark, eval_task_id=benchmark and "top_1")
    results = RESULTS | {"accuracy_interval": [0.964, 0.9925]}
    write_card(tmp_path, build_card("my-model", CONFIG, results, FLAGS), None, results, options, print)
    assert file.exists() is (benchmark is not None)
    if benchmark:
        (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
        assert (entry.dataset_id, entry.task_id, entry.value) == ("org/benchmark", "top_1", 0.983333)
        assert "360 images of digits" in entry.notes and "0.9640 to 0.9925" in entry.notes


def test_a_benchmark_requires_a_task_and_an_id() -> None:
    with pytest.raises(ValueError, match="--eval-benchmark and --eval-task-id require each other"):
        RunOptions(eval_benchmark="org/benchmark")
    with pytest.raises(ValueError, match=r"--eval-benchmark is benchmark, but it must be a dataset"):
        RunOptions(eval_benchmark="benchmark", eval_task_id="top_1")


HOSTILE_NAMES = [
    "<img src=x onerror=alert(1)>",
    "![a](https://example.org/a.png)",
    "# heading",
    "a\n\n# heading\n\n![a](b.png)",
    "a\r\n---\r\nlicense: mit",
    "`code` ``` and <b>bold</b>",
    "a | b | [link](javascript:1)",
    "\x1b[31mred\x1b[0m \u202etxt.exe",
    "{{ name }} {% for %}",
    "*" * 10_000,
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_of_classes_and_datasets_are_not_markup(name: str) -> None:
    """Rendered as HTML, the card has the same elements as a card with plain names."""

    def build(name: str) -> str:
        labels = {0: name, 1: "noon"}
        rows = [{"name": labels[index], "images": 9, "recall": recall} for index, recall in enumerate((0.5, 1.0))]
        config = ViTCLSConfig(**CONFIG.to_diff_dict() | {"id2label": labels})
        results = RESULTS | {"dataset": name, "per_class": rows, "confusion_matrix": [[1, 8], [0, 9]]}
        flags = FLAGS | {"dataset": name, "label_names": list(labels.values())}
        return str(build_card("me/mine", config, results, flags))

    card, plain = build(name), build("plain")
    assert set(yaml.safe_load(card.split("\n---\n")[0].removeprefix("---"))) == set(
        yaml.safe_load(plain.split("\n---\n")[0].removeprefix("---"))
    )
    body = card.split("\n---\n", maxsplit=1)[1]
    assert not [character for character in body if not character.isprintable() and character != "\n"]
    assert render(card) == render(plain)


def render(card: str) -> list[tuple[str, str, str]]:
    """Return the elements of a card, rendered from Markdown: tag, link and image of each element."""
    text = card.split("\n---\n", maxsplit=1)[1]
    tokens = [
        child
        for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text)
        for child in (token, *(token.children or ()))
    ]
    return [
        (token.type, token.tag, str(token.attrs.get("href") or token.attrs.get("src") or ""))
        for token in tokens
        if token.type not in ("text", "softbreak", "fence")
    ]


def test_large_matrices_are_left_out() -> None:
    metrics = {"accuracy": 1.0, "a_confusion_matrix": [[0]] * 200, "b_confusion_matrix": [[0]] * 201}
    assert drop_large_matrices(metrics).keys() == {"accuracy", "a_confusion_matrix"}


def test_missing_images_do_not_stop_the_card(tmp_path: Path) -> None:
    save_with_processor(ViTCLSForImageClassification(build_tiny_config()), tmp_path)
    (tmp_path / "pictures").touch()  # a file in place of the folder
    results: dict[str, Any] = {}
    none = LabeledImages([], [])
    space = LabelSpace("single_label_classification", {})
    warnings: list[str] = []
    given = (tmp_path, ViTCLSForImageClassification, results, none, space, torch.device("cpu"))
    assert build_model_report(*given, True, warnings.append) == {}
    (warning,) = warnings
    assert "the card has no images" in warning and "\n" not in warning
    assert results["inference"]["images_per_second"] > 0
    (tmp_path / "pictures").unlink()
    assert build_model_report(*given, False, warnings.append) == {} and len(warnings) == 1
    drawn = build_model_report(*given, True, warnings.append)
    assert "report.html could not be written" in warnings[-1]  # not an image
    assert drawn == {"token_layout": "pictures/token_layout.png"} and (tmp_path / drawn["token_layout"]).is_file()


@pytest.mark.integration
def test_trackers_get_no_held_out_images_if_the_card_contains_none(tmp_path: Path) -> None:
    """Trackers may be remote, and local images are not published without consent."""
    fields = {"num_register_tokens": 1, "num_hidden_layers": 1}
    save_with_processor(ViTCLSForImageClassification(build_tiny_config(**fields)), tmp_path)
    noise = torch.randint(256, (3, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    held_out = LabeledImages([Image.fromarray(pixels.numpy()) for pixels in noise], [0, 1, 2])
    space = LabelSpace("single_label_classification", {"label": ["dawn", "dusk", "noon"]})
    results = RESULTS | {"token_movement": {"cls[0]": 0.5, "registers[0]": 0.25}}
    given = (tmp_path, ViTCLSForImageClassification, results, held_out, space, torch.device("cpu"), True)
    warnings: list[str] = []
    tracked: dict[str, Image.Image] = {}
    paths = build_model_report(*given, warnings.append, tracked.update, use_samples=False)
    assert warnings == []
    assert paths == {"token_layout": "pictures/token_layout.png", "report": "report.html"}
    assert "patches: " in results["diagnosis"]
    assert tracked.keys() == {"token_layout", "norms", "patch_distance", "entropy", "mass", "effects"}
