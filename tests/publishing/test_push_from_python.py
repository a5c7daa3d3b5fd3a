"""Models and processors that Python pushes load by AutoModel in a process without the package."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.local_hub import LocalHub, Token
from helpers.model_folders import write_run_folder
from helpers.source_checkpoints import save_large_encoder, save_vit_classifier
from helpers.tiny_models import build_tiny_config, raises_one_line, randomize, save_classifier
from huggingface_hub import HfApi, ModelCard
from pytest import CaptureFixture, MonkeyPatch

from modeling_vitcls import (
    ViTCLSBackbone,
    ViTCLSConfig,
    ViTCLSForImageClassification,
    ViTCLSImageProcessor,
    ViTCLSModel,
    convert,
    export,
    push,
    write_card,
)
from modeling_vitcls.publishing.card_parts import is_edited
from modeling_vitcls.publishing.verification_script import Outputs, collect_outputs
from modeling_vitcls.publishing.verify import compare_outputs, run_verification_script


@pytest.fixture
def hub(hub: LocalHub, monkeypatch: MonkeyPatch, tmp_path: Path) -> LocalHub:
    """Start an empty Hub for this process and its child processes, as ann."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    return hub


def load_without_package(sha: str) -> tuple[Outputs, dict[str, Any]]:
    """Load a commit of ann/vit in a new process that cannot import the package."""
    return run_verification_script("ann/vit", "AutoModelForImageClassification", sha)


@pytest.mark.slow
def test_a_vit_with_registers_is_pushed_and_loaded_elsewhere(hub: LocalHub, tmp_path: Path) -> None:
    source = save_vit_classifier(tmp_path / "source")
    model = ViTCLSForImageClassification.from_pretrained(source, num_register_tokens=4)
    processor = ViTCLSImageProcessor.from_pretrained(source)
    randomize(model)  # as training would

    model.push_to_hub("ann/vit")
    sha = processor.push_to_hub("ann/vit").oid

    outputs, report = load_without_package(sha)
    assert report["classes"]["AutoModelForImageClassification"] == "ViTCLSForImageClassification"
    assert report["missing"] == []
    model.save_pretrained(tmp_path / "mine")
    processor.save_pretrained(tmp_path / "mine")
    expected, _ = collect_outputs(
        str(tmp_path / "mine"),
        "AutoModelForImageClassification",
        {"trust_remote_code": False},
        ViTCLSBackbone,
    )
    compare_outputs("ann/vit", outputs, expected)


def test_push_returns_the_commit_with_a_card(hub: LocalHub, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "mine")
    commit = push(folder, "ann/vit", verify=False)
    assert commit.repo_id == "ann/vit"
    config = ViTCLSConfig.from_pretrained("ann/vit", revision=commit.sha)
    assert config.to_dict() == ViTCLSConfig.from_pretrained(folder).to_dict()
    card = transformers.utils.cached_file("ann/vit", "README.md", revision=commit.sha)
    assert "library_name: transformers" in Path(str(card)).read_text()


def test_convert_writes_a_folder_and_returns_its_report(tmp_path: Path) -> None:
    source = save_large_encoder(tmp_path / "source")
    report = convert(f"transformers:{source}", tmp_path / "converted")
    assert report["comparisons"][0]["image_size"] == (280, 280)
    model = ViTCLSModel.from_pretrained(tmp_path / "converted")
    assert model.config.image_size == 280


@pytest.mark.slow
def test_export_writes_a_graph_and_returns_its_report(
    tmp_path: Path, capsys: CaptureFixture
) -> None:
    folder = save_classifier(tmp_path / "mine")
    report = export(folder, tmp_path / "mine.onnx")
    assert (tmp_path / "mine.onnx").is_file()
    assert report["largest_differences"]["logits"] < 1e-4
    assert torch.get_default_dtype() == torch.float32


def test_a_native_push_publishes_a_class_of_transformers(
    hub: LocalHub, tmp_path: Path, in_this_process: None
) -> None:
    folder = save_classifier(tmp_path / "mine", num_register_tokens=0)
    push(folder, "ann/vit", native=True)
    assert not [name for name in hub.files("ann/vit") if name.endswith(".py")]
    native = transformers.AutoModelForImageClassification.from_pretrained("ann/vit")
    assert type(native).__module__.startswith("transformers.models.")
    size = native.config.image_size
    pixels = torch.randn(1, 3, size, size)
    expected = ViTCLSForImageClassification.from_pretrained(folder).eval()(pixels).logits
    torch.testing.assert_close(native.eval()(pixels).logits, expected, rtol=0, atol=1e-5)


def test_a_model_that_no_class_of_transformers_holds_is_not_pushed(
    hub: LocalHub, tmp_path: Path
) -> None:
    folder = save_classifier(tmp_path / "mine", num_cls_tokens=2)
    with raises_one_line("num_cls_tokens=2"):
        push(folder, "ann/vit", native=True)
    assert not hub.repositories


# Cards --------------------------------------------------------------------------------------------


def read_card(hub: LocalHub) -> ModelCard:
    """Read the card of ann/vit, whose metadata must be valid."""
    card = ModelCard(hub.read("ann/vit", "README.md").decode())
    card.validate()
    return card


def test_a_pushed_model_has_the_card_of_the_command(hub: LocalHub, tmp_path: Path) -> None:
    source = save_vit_classifier(tmp_path / "source")
    (source / "README.md").write_text("---\nlicense: mit\nbase_model: ann/base\n---\n# Base\n")
    model = ViTCLSForImageClassification.from_pretrained(source, num_register_tokens=4)
    model.push_to_hub("ann/vit")
    ViTCLSImageProcessor.from_pretrained(source).push_to_hub("ann/vit")

    card = read_card(hub)
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.library_name == "transformers"
    assert card.data.license == "mit"
    assert card.data.base_model == "ann/base"
    assert "vitcls" in card.data.tags
    assert "| register | 4 |" in card.text
    assert 'revision = "' in card.text
    assert "More Information Needed" not in card.text
    assert not is_edited(hub.read("ann/vit", "README.md").decode())


def test_tags_of_a_push_are_in_the_card(hub: LocalHub, tmp_path: Path) -> None:
    model = ViTCLSForImageClassification(build_tiny_config())
    model.push_to_hub("ann/vit", tags=["birds"])
    assert {"birds", "vitcls"} <= set(read_card(hub).data.tags)


def test_a_model_in_memory_replaces_the_numbers_of_other_weights(
    hub: LocalHub, tmp_path: Path
) -> None:
    folder = write_run_folder(tmp_path / "run")
    push(folder, "ann/vit", verify=False)
    assert "354 of 360 right" in read_card(hub).text
    model = ViTCLSForImageClassification.from_pretrained(folder, num_register_tokens=2)
    model.push_to_hub("ann/vit")

    assert "354 of 360 right" not in read_card(hub).text
    assert "| register | 2 |" in read_card(hub).text
    names = set(hub.files("ann/vit"))
    assert not names & {"results.json", "config.resolved.yaml", "splits.parquet"}
    assert "preprocessor_config.json" in names


def test_a_license_set_on_the_hub_keeps_no_numbers_of_other_weights(
    hub: LocalHub, tmp_path: Path
) -> None:
    folder = write_run_folder(tmp_path / "run")
    push(folder, "ann/vit", verify=False)
    text = hub.read("ann/vit", "README.md").decode().replace("---\n", "---\nlicense: mit\n", 1)
    upload = {"path_in_repo": "README.md", "repo_id": "ann/vit"}
    HfApi().upload_file(path_or_fileobj=text.encode(), **upload)
    model = ViTCLSForImageClassification.from_pretrained(folder, num_register_tokens=2)
    model.push_to_hub("ann/vit")
    assert read_card(hub).data.license == "mit"
    assert "354 of 360 right" not in read_card(hub).text


def test_the_same_model_in_memory_keeps_its_numbers(hub: LocalHub, tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run")
    push(folder, "ann/vit", verify=False)
    before = set(hub.files("ann/vit"))
    card = read_card(hub)
    ViTCLSForImageClassification.from_pretrained(folder).push_to_hub("ann/vit")
    assert set(hub.files("ann/vit")) == before
    assert str(read_card(hub)) == str(card)


def test_a_model_in_memory_that_may_not_be_pushed_is_not_saved(
    hub: LocalHub, monkeypatch: MonkeyPatch
) -> None:
    hub.create("ann/vit")
    hub.tokens["hf_read"] = Token("ann", writable=())
    model = ViTCLSForImageClassification(build_tiny_config())
    monkeypatch.setattr(model, "save_pretrained", None)
    with raises_one_line("cannot push to bob/vit", "HTTP 403"):
        model.push_to_hub("bob/vit")
    with raises_one_line("cannot push to ann/vit", "hf auth login"):
        model.push_to_hub("ann/vit", token="hf_read")
    assert set(hub.repositories) == {"ann/vit"}


def test_a_card_of_a_person_survives_a_model_in_memory(hub: LocalHub) -> None:
    hub.create("ann/vit", files={"README.md": b"---\nlicense: mit\n---\n# Ours\n"})
    ViTCLSForImageClassification(build_tiny_config()).push_to_hub("ann/vit")
    assert hub.read("ann/vit", "README.md") == b"---\nlicense: mit\n---\n# Ours\n"


def test_a_model_in_memory_is_pushed_as_a_pull_request(hub: LocalHub) -> None:
    hub.create("ann/vit")
    ViTCLSForImageClassification(build_tiny_config()).push_to_hub("ann/vit", create_pr=True)
    assert "config.json" not in hub.files("ann/vit")
    assert b"vitcls" in hub.read("ann/vit", "README.md", "refs/pr/1")


def test_a_card_for_hf_upload_is_written_to_a_saved_folder(tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "mine")
    write_card(folder, "ann/vit")
    card = ModelCard.load(folder / "README.md")
    assert "# ann/vit\n" in card.text
    assert card.data.pipeline_tag == "image-classification"


def test_trainer_pushes_the_card_if_it_creates_it(hub: LocalHub, tmp_path: Path) -> None:
    class CardTrainer(transformers.Trainer):
        def create_model_card(self, **keywords: Any) -> None:
            write_card(self.args.output_dir, self.hub_model_id)

    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path / "run"), hub_model_id="ann/vit", report_to=[], use_cpu=True
    )
    CardTrainer(ViTCLSForImageClassification(build_tiny_config()), settings).push_to_hub()
    assert read_card(hub).data.pipeline_tag == "image-classification"
