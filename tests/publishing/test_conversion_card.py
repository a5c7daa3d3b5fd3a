"""Test the card of a converted model: source, accuracy, classifier, images and license."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers.source_checkpoints import NAMES, SIZES, build_vit_classifier, save_checkpoint
from huggingface_hub import ModelCard

from modeling_vitcls import ViTCLSConfig
from modeling_vitcls.commands.convert import ConvertOptions, run
from modeling_vitcls.conversion.random_weights import randomize_weights
from modeling_vitcls.hub.provenance import CONVERTED_WEIGHTS_TEXTS, Provenance, WeightsLicense
from modeling_vitcls.publishing.conversion_card import build_conversion_card, write_conversion_card
from modeling_vitcls.publishing.manifest import collect_model_files


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work offline: sources are folders or have random weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def convert_and_load_card(source: str, output: Path, **options: Any) -> ModelCard:
    """Convert a source and return its card."""
    run(ConvertOptions(output, source, **options))
    return ModelCard.load(output / "README.md")


def save_source(folder: Path, card: str = "") -> str:
    """Save a classifier of transformers with its image processor and optionally a card, and return the source name."""
    source = save_checkpoint(build_vit_classifier(), folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    if card:
        (folder / "README.md").write_text(card)
    return source


def test_a_trained_classifier(tmp_path: Path) -> None:
    source = save_source(tmp_path / "theirs", "---\nlicense: mit\nbase_model: google/vit\n---\n")
    (tmp_path / "theirs" / "LICENSE").write_text("MIT\n")
    card = convert_and_load_card(source, tmp_path / "my-vit")
    text = card.text
    assert text.lstrip().startswith("# my-vit\n")
    assert str(tmp_path) not in text + (tmp_path / "my-vit" / "parity_report.json").read_text()
    assert "`theirs`, converted to a ViTCLS model" in text and "was not trained further" in text
    assert "[ CLS x 1 | patch x 16 ]\n\nAn image of 32 x 32 pixels is represented by 17 tokens of width 32." in text
    assert "![The token sequence: 1 CLS and 16 patch tokens](pictures/token_layout.png)\n" in text
    num_parameters = build_vit_classifier().num_parameters()
    assert (
        f"the same outputs. The converted model has {num_parameters:,} parameters and was not trained further." in text
    )
    assert " Other image sizes are also supported." in text
    assert "| | 32 x 32 pixels | 24 x 48 pixels | largest value |" in text
    for group in ("cls", "patches", "logits"):
        row = next(line for line in text.splitlines() if line.startswith(f"| {group} |"))
        *differences, largest = [float(cell) for cell in row.split("|")[2:-1]]
        assert len(differences) == 2 and max(differences) <= 1e-5 < 0.1 < largest
    assert "has the classifier of the source, with 3 labels." in text
    assert "settings of ViTImageProcessor. On test images, the pixel values differ from those of the source" in text
    assert "by at most 0 gray levels (0 to 255)." in text
    assert 'from_pretrained("my-vit", revision=revision, trust_remote_code=True)' in text
    assert 'pipeline("image-classification", model="my-vit", revision="main", trust_remote_code=True)' in text
    assert "under the license of the source: mit. The license text is in LICENSE." in text
    assert "vitcls convert --source transformers:path/to/theirs --output my-vit\n" in text
    assert f"transformers {transformers.__version__}" in text
    data = card.data.to_dict()
    assert (data["license"], data["base_model"]) == ("mit", "google/vit")
    assert (
        "base_model_relation" not in data and "fine-tuned from" not in text
    )  # the source may be fine-tuned from google/vit
    assert data["pipeline_tag"] == "image-classification" and data["tags"] == ["vision", "vit", "vitcls"]
    assert "--dataset path/to/images" in text
    assert (tmp_path / "my-vit" / "LICENSE").read_text() == "MIT\n"
    assert {"README.md", "LICENSE", "parity_report.json", "pictures/token_layout.png"} <= collect_model_files(
        tmp_path / "my-vit"
    ).keys()


def make_report(folder: Path, **changes: Any) -> dict[str, Any]:
    """Convert a classifier, change fields of its parity report and return the report."""
    run(ConvertOptions(folder / "mine", save_source(folder / "theirs")))
    return json.loads((folder / "mine" / "parity_report.json").read_text()) | changes


def make_provenance(name: str, base_model: str) -> dict[str, Any]:
    return {"name": name, "base_model": base_model, "license_files": []}


def test_other_sizes_are_named_only_if_one_was_compared(tmp_path: Path) -> None:
    report = make_report(tmp_path, not_compared="the source refuses it", num_parameters=12345)
    report["comparisons"].pop()
    (tmp_path / "mine" / "parity_report.json").write_text(json.dumps(report))
    write_conversion_card(tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text()
    assert "Other image sizes" not in text and "second size: the source refuses it." in text
    assert "12,345 parameters" in text


def test_a_source_on_the_hub_is_linked_at_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    report = make_report(tmp_path, source_revision=commit, provenance=make_provenance("google/vit", "google/vit"))
    config = ViTCLSConfig.from_pretrained(tmp_path / "mine")
    for name in ("google/vit", "google/vit@main"):
        text = build_conversion_card("mine", report | {"source": f"transformers:{name}"}, config).text
        assert f"[`google/vit`](https://huggingface.co/google/vit) (at commit `{commit}`)" in text
        assert f"vitcls convert --source transformers:google/vit@{commit} --output mine\n" in text
    # a model that was fine-tuned from google/vit is not linked under this name
    text = build_conversion_card("mine", report | {"provenance": make_provenance("theirs", "google/vit")}, config).text
    assert f"`theirs` (at commit `{commit}`)" in text and "[`theirs`]" not in text


def test_a_relative_path_is_replaced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_source(tmp_path / "secret" / "theirs")
    monkeypatch.chdir(tmp_path / "secret")
    card = convert_and_load_card("transformers:theirs", tmp_path / "mine")
    assert "--source transformers:path/to/theirs --output mine\n" in card.text and "secret" not in card.text


def test_the_names_of_timm_and_non_square_sizes(tmp_path: Path) -> None:
    """A name of timm is linked to its repository, and image sizes are height x width."""
    provenance = make_provenance("timm:test_vit", "timm/test_vit.r160_in1k")
    report = make_report(tmp_path, source="timm:test_vit", family="dino", image_size=[32, 48], provenance=provenance)
    config = ViTCLSConfig.from_pretrained(tmp_path / "mine", image_size=[32, 48])
    card = build_conversion_card("mine", report, config)
    assert "[`timm:test_vit`](https://huggingface.co/timm/test_vit.r160_in1k), converted" in card.text
    assert "[ CLS x 1 | patch x 24 ]\n\nAn image of 32 x 48 pixels" in card.text
    assert "vitcls convert --source timm:test_vit --output mine --family dino\n" in card.text
    card = build_conversion_card("mine", report | {"not_compared": "one size", "is_native": True}, None)
    assert "has the same outputs for images of 32 x 48 pixels." in card.text


def test_an_unknown_license_is_not_invented(tmp_path: Path) -> None:
    card = convert_and_load_card(save_source(tmp_path / "theirs"), tmp_path / "mine")
    assert "No license was found" in card.text
    assert card.data.license is None
    assert card.data.base_model is None


def test_a_custom_license_is_named_and_linked() -> None:
    provenance = Provenance(
        "a/b", license="other", license_name="dinov3-license", license_link="https://example.com/l"
    )
    assert "license of the source: [dinov3-license](https://example.com/l)." in str(
        WeightsLicense(CONVERTED_WEIGHTS_TEXTS, provenance)
    )
    assert "license of the source: mit." in str(
        WeightsLicense(CONVERTED_WEIGHTS_TEXTS, Provenance("a/b", license="mit"))
    )


@pytest.mark.parametrize(
    ("options", "sentence", "remade"),
    [
        (
            {"classifier": "new", "num_labels": 7},
            "with 7 labels, is new and untrained",
            "--classifier new --num-labels 7",
        ),
        ({"classifier": "drop"}, "was dropped", "--classifier drop"),
    ],
)
def test_classifier_choices(options: dict[str, Any], sentence: str, remade: str, tmp_path: Path) -> None:
    card = convert_and_load_card(save_source(tmp_path / "theirs"), tmp_path / "mine", **options)
    assert sentence in card.text
    assert f"--output mine {remade}\n" in card.text
    assert "pipeline(" not in card.text and "| logits |" not in card.text
    assert card.data.pipeline_tag == "image-feature-extraction"
    auto_class = "AutoModelForImageClassification" if options["classifier"] == "new" else "AutoModel"
    assert f"model = {auto_class}.from_pretrained(" in card.text


def test_an_encoder_without_pooler_and_processor(tmp_path: Path) -> None:
    """The card names the missing classifier, image processor and pooler."""
    model = transformers.ViTModel(transformers.ViTConfig(**SIZES, id2label=NAMES), add_pooling_layer=False)
    card = convert_and_load_card(save_checkpoint(randomize_weights(model), tmp_path / "theirs"), tmp_path / "mine")
    assert "an encoder, like its source" in card.text and "lassifier" not in card.text
    assert "image processor are assumed, because the source has no image processor. Check these" in card.text
    assert "Note: the checkpoint has no pooler, so the converted model has no pooler." in card.text


def test_random_weights_have_no_license_and_no_base_model(tmp_path: Path) -> None:
    card = convert_and_load_card("timm:test_vit", tmp_path / "mine", random_init=True)
    assert "\n**All weights are random.** This ViTCLS model has the architecture of" in card.text
    assert "timm/test_vit.r160_in1k" in card.text
    assert "icence" not in card.text and "pipeline(" not in card.text
    assert "--source timm:test_vit --output mine --random-init\n" in card.text
    data = card.data.to_dict()
    assert not {"license", "base_model", "base_model_relation"} & data.keys()
