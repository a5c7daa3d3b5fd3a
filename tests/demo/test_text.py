"""The text of the demo page: its header, the loading code, and reasons for missing outputs."""

from pathlib import Path
from typing import Any

import pytest
from helpers.demo_models import build_classifier_demo
from helpers.tiny_models import build_tiny_config

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.demo.reader import DemoModel
from modeling_vitcls.demo.text import build_header, build_loading_code, explain_missing_output


@pytest.fixture(scope="module")
def demo_model() -> DemoModel:
    return build_classifier_demo()


def test_the_header_links_to_the_commit(
    demo_model: DemoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789" * 4
    published = DemoModel(demo_model.model, None, "ann/vit", commit, None, is_classifier=True)
    assert build_header(published) == (
        f"# ann/vit\n[ann/vit](https://huggingface.co/ann/vit) at commit [`0123456`](https://huggingface.co/ann/vit/tree/"
        f"{commit}). A Vision Transformer with 2 layers and 2 heads per layer; special tokens: CLS, register."
    )
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    local = DemoModel(demo_model.model, None, ".", None, None, is_classifier=True)
    assert build_header(local).startswith("# mine\nA model in a local folder. A Vision Transformer with 2 layers")
    single = ViTCLSForImageClassification(
        build_tiny_config(num_hidden_layers=1, num_attention_heads=1, num_cls_tokens=0, pooling="mean")
    )
    bare = DemoModel(single, None, "mine", None, None, is_classifier=True)
    assert build_header(bare).endswith("with 1 layer and 1 head per layer; no special tokens.")


def test_the_loading_code_pins_the_model_and_its_code(demo_model: DemoModel) -> None:
    def build(is_classifier: bool, commit: str | None, code_revision: str | None) -> str:
        return build_loading_code(DemoModel(demo_model.model, None, "ann/vit", commit, code_revision, is_classifier))

    own, shared, local = build(True, "abc", None), build(False, "abc", "def"), build(True, None, None)
    arguments = '"ann/vit", revision="abc", trust_remote_code=True'
    assert f"model = AutoModelForImageClassification.from_pretrained({arguments})" in own
    assert f"processor = AutoImageProcessor.from_pretrained({arguments})" in own
    assert "runs code from the model's repository at the given commit" in own
    arguments = '"ann/vit", revision="abc", code_revision="def", trust_remote_code=True'
    assert f"model = AutoModel.from_pretrained({arguments})" in shared
    assert "runs code from the code repository named in config.json at the given commit" in shared
    assert 'from_pretrained("ann/vit", trust_remote_code=True)' in local and "given commit" not in local


def test_missing_outputs_are_explained(demo_model: DemoModel) -> None:
    def explain(is_classifier: bool = True, **fields: Any) -> str:
        model = ViTCLSForImageClassification(build_tiny_config(**fields))
        return explain_missing_output(DemoModel(model, None, "mine", None, None, is_classifier))

    assert explain_missing_output(demo_model) == ""
    assert "encoder without a classifier" in explain(is_classifier=False)
    assert "no special tokens" in explain(num_cls_tokens=0, pooling="mean")
