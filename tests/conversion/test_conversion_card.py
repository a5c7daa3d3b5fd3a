"""The card that conversion writes: what it says about the source, exactness, classifier, images and licence."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers
from huggingface_hub import ModelCard
from source_checkpoints import NAMES, SIZES, saved, vit_classifier

from modeling_vitcls import ViTCLSConfig
from modeling_vitcls.analysis.card_images import write_card_images
from modeling_vitcls.conversion.conversion_card import build_conversion_card
from modeling_vitcls.conversion.convert import take_over
from modeling_vitcls.conversion.random_weights import random_fill
from modeling_vitcls.hub.licenses import CONVERTED, WeightsLicense
from modeling_vitcls.hub.manifest import collect_model_files
from modeling_vitcls.hub.provenance import Provenance


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources here are folders, or have random weights; nobody is asked about them."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def converted(source: str, output: Path, **options: Any) -> ModelCard:
    """The card of a conversion."""
    take_over(source, output, draw_images=write_card_images, **options)
    return ModelCard.load(output / "README.md")


def their_folder(folder: Path, card: str = "") -> str:
    """A classifier of transformers with its image processor, and a card if one is given, as a source."""
    source = saved(vit_classifier(), folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    if card:
        (folder / "README.md").write_text(card)
    return source


def test_what_it_says_of_a_trained_classifier(tmp_path: Path) -> None:
    source = their_folder(tmp_path / "theirs", "---\nlicense: mit\nbase_model: google/vit\n---\n")
    (tmp_path / "theirs" / "LICENSE").write_text("MIT\n")
    card = converted(source, tmp_path / "my-vit")
    text = card.text
    assert text.lstrip().startswith("# my-vit\n")
    assert str(tmp_path) not in text + (tmp_path / "my-vit" / "certificate.json").read_text()
    assert "`theirs` as a ViTCLS model" in text and "was not trained further" in text
    assert "[ CLS x 1 | patch x 16 ]\n\n17 tokens of width 32 for an image of 32 x 32 pixels" in text
    assert "![The token sequence: 1 CLS and 16 patch tokens](pictures/token_layout.png)\n" in text
    num_parameters = vit_classifier().num_parameters()
    assert f"with the same outputs. It has {num_parameters:,} parameters and was not trained further." in text
    assert "heads. Other sizes work as well." in text
    assert "| | 32 x 32 pixels | 24 x 48 pixels | largest value |" in text
    for group in ("cls", "patches", "logits"):
        row = next(line for line in text.splitlines() if line.startswith(f"| {group} |"))
        *differences, largest = [float(cell) for cell in row.split("|")[2:-1]]
        assert len(differences) == 2 and max(differences) <= 1e-5 < 0.1 < largest
    assert "of 3 labels, is kept" in text
    assert "settings of ViTImageProcessor, and differs from it by at most 0 of 255 grey levels" in text
    assert 'from_pretrained("my-vit", revision=revision, trust_remote_code=True)' in text
    assert 'pipeline("image-classification", model="my-vit", revision="main", trust_remote_code=True)' in text
    assert "under the license of the source: mit. The license text is in LICENSE." in text
    assert "convert.py --source transformers:path/to/theirs --output my-vit\n" in text
    assert f"transformers {transformers.__version__}" in text
    data = card.data.to_dict()
    assert (data["license"], data["base_model"]) == ("mit", "google/vit")
    assert "base_model_relation" not in data and "fine-tuned from" not in text  # theirs may be
    assert data["pipeline_tag"] == "image-classification"
    assert (tmp_path / "my-vit" / "LICENSE").read_text() == "MIT\n"
    assert {"README.md", "LICENSE", "certificate.json", "pictures/token_layout.png"} <= collect_model_files(
        tmp_path / "my-vit"
    ).keys()


def test_other_sizes_are_promised_only_where_one_was_compared(tmp_path: Path) -> None:
    certificate = take_over(their_folder(tmp_path / "theirs"), tmp_path / "mine")
    one = replace(certificate, comparisons=certificate.comparisons[:1], not_compared="the source refuses it")
    config = ViTCLSConfig.from_pretrained(tmp_path / "mine")
    text = build_conversion_card("mine", config, 12345, one, Provenance("theirs")).text
    assert "Other sizes" not in text and "There was no comparison at a second size: the source refuses it." in text
    assert "12,345 parameters" in text


def test_a_folder_named_otherwise_than_by_its_path_is_hidden_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    their_folder(tmp_path / "secret" / "theirs")
    monkeypatch.chdir(tmp_path / "secret")
    card = converted("transformers:theirs", tmp_path / "mine")
    assert "--source transformers:path/to/theirs --output mine\n" in card.text and "secret" not in card.text


def test_no_licence_is_made_up(tmp_path: Path) -> None:
    card = converted(their_folder(tmp_path / "theirs"), tmp_path / "mine")
    assert "No license was found" in card.text
    assert card.data.license is None
    assert card.data.base_model is None


def test_a_licence_of_their_own_is_named_and_linked() -> None:
    origin = Provenance("a/b", license="other", license_name="dinov3-license", license_link="https://example.com/l")
    assert "license of the source: [dinov3-license](https://example.com/l)." in str(WeightsLicense(CONVERTED, origin))
    assert "license of the source: mit." in str(WeightsLicense(CONVERTED, Provenance("a/b", license="mit")))


@pytest.mark.parametrize(
    ("options", "sentence", "remade"),
    [
        (
            {"classifier": "new", "num_labels": 7},
            "of 7 labels, is new and untrained",
            "--classifier new --num-labels 7",
        ),
        ({"classifier": "drop"}, "was left out", "--classifier drop"),
    ],
)
def test_what_became_of_the_classifier(options: dict[str, Any], sentence: str, remade: str, tmp_path: Path) -> None:
    card = converted(their_folder(tmp_path / "theirs"), tmp_path / "mine", **options)
    assert sentence in card.text
    assert f"--output mine {remade}\n" in card.text
    assert "pipeline(" not in card.text and "| logits |" not in card.text
    assert card.data.pipeline_tag == "image-feature-extraction"
    auto_class = "AutoModelForImageClassification" if options["classifier"] == "new" else "AutoModel"
    assert f"model = {auto_class}.from_pretrained(" in card.text


def test_an_encoder_of_which_much_is_assumed(tmp_path: Path) -> None:
    """No classifier, no image processor, no pooler: each is said."""
    model = transformers.ViTModel(transformers.ViTConfig(**SIZES, id2label=NAMES), add_pooling_layer=False)
    card = converted(saved(random_fill(model), tmp_path / "theirs"), tmp_path / "mine")
    assert "an encoder, as its source is" in card.text and "lassifier" not in card.text
    assert "image processor is ASSUMED, because the source has no image processor: check it" in card.text
    assert "Note: the checkpoint has no pooler, and so has the converted model." in card.text


def test_random_weights_have_no_licence_and_no_base_model(tmp_path: Path) -> None:
    card = converted("timm:test_vit", tmp_path / "mine", random_init=True)
    assert "\n**Every weight is a random number.** This is the architecture of" in card.text
    assert "timm/test_vit.r160_in1k" in card.text
    assert "icence" not in card.text and "pipeline(" not in card.text
    assert "--source timm:test_vit --output mine --random-init\n" in card.text
    data = card.data.to_dict()
    assert not {"license", "base_model", "base_model_relation"} & data.keys()
