"""The sections "Use" and "Citation" of all cards. The first code block runs unchanged, without the package."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
from helpers.fresh_processes import run_fresh
from helpers.local_hub import LocalHub, running_hub
from helpers.tiny_models import KINDS, build_tiny_config, save_with_processor

from modeling_vitcls.configuration_vitcls import MIN_TRANSFORMERS_VERSION
from modeling_vitcls.publishing.card_sections import CITATION, build_use_section, insert_onnx_section
from modeling_vitcls.publishing.code_files import READING_ORDER, compute_code_digest
from modeling_vitcls.publishing.shared_code import pin_code_in_card
from modeling_vitcls.version import __version__


ROOT = Path(__file__).parents[2]
PRINTED = {
    "model": "torch.Size([1, 17, 16])",
    "classifier": "[{'label': 'LABEL_",
    "multi_task": "{'age': tensor([[",
    "masked": "torch.Size([1, 3, 32, 32])",
    "backbone": "[torch.Size([1, 16, 4, 4]), torch.Size([1, 16, 4, 4])]",
}


def get_code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def publish(hub: LocalHub, folder: Path, kind: str) -> None:
    """Push a model of a kind to the repository ann/KIND."""
    model_class, fields, _ = KINDS[kind]
    save_with_processor(model_class(build_tiny_config(**fields)), folder)
    hub.create(f"ann/{kind}", private=False, files={file.name: file.read_bytes() for file in folder.iterdir()})


@pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=[pytest.mark.slow] * (name != "classifier")) for name in KINDS]
)
def test_the_first_code_block_runs_and_prints_no_warnings(tmp_path: Path, kind: str) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with running_hub() as hub:
        publish(hub, tmp_path / kind, kind)
        name = KINDS[kind][0].__name__
        section = build_use_section(f"ann/{kind}", name, has_pipeline=kind == "classifier")
        assert section.startswith('## Use\n\n```bash\npip install -U "transformers>=')
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        block = get_code_blocks(section)[0]
        ran = run_fresh("-P", "-c", block, environment=environment, cwd=home)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.startswith(PRINTED[kind]), ran.stdout
    assert "A new version of the following files" not in ran.stderr


def test_the_code_is_named_and_pinned() -> None:
    section = build_use_section("ann/x", "ViTCLSModel", has_pipeline=False)
    assert f"modeling_vitcls {__version__} and have the SHA-256 `{compute_code_digest()}`" in section
    assert ", ".join(f"`{name}`" for name in READING_ORDER) in section
    newest, pinned = get_code_blocks(section)
    assert newest.count('revision="main"') == 2 and "<" not in newest
    assert pinned.startswith("from transformers import") and 'revision = "<commit hash>"' in pinned
    assert section.index("register_auto_classes()") > section.index(pinned)


def test_code_in_another_repository_is_pinned_only_in_the_second_block() -> None:
    section = build_use_section("ann/x", "ViTCLSModel", has_pipeline=False)
    moved = pin_code_in_card(section, "ann/code")
    newest, pinned = get_code_blocks(moved)
    assert newest == get_code_blocks(section)[0]
    assert pinned.count("code_revision=code_revision") == 2
    assert "Python files in `ann/code`" in moved and "is in another repository, `ann/code`" in moved
    assert pin_code_in_card(moved, "bob/code") == pin_code_in_card(section, "bob/code")


def test_a_model_of_transformers_requires_no_remote_code() -> None:
    section = build_use_section("ann/x", "DeiTForImageClassification", has_pipeline=True, is_native=True)
    assert "trust_remote_code" not in section and "contains no code" in section
    for architecture in ("DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"):
        classifier = build_use_section("ann/x", architecture, has_pipeline=False, is_native=True)
        assert "model = AutoModelForImageClassification.from_pretrained(" in classifier
    encoder = build_use_section("ann/x", "ViTModel", has_pipeline=False, is_native=True)
    assert "model = AutoModel.from_pretrained(" in encoder and "outputs.last_hidden_state.shape" in encoder


def test_the_onnx_section_is_inserted_once_before_the_citation() -> None:
    comparisons = [
        {"file": f"onnx/{name}", "largest_difference": difference, "top1_agreement": agreement}
        for name, difference, agreement in (("model.onnx", 2.34e-6, 1.0), ("model_fp16.onnx", 0.0123, 0.984375))
    ]
    card = f"# mine\n\n{CITATION}\n\n## License\n\nmit\n"
    inserted = insert_onnx_section(card, {"comparisons": comparisons, "labeled": None})
    start, section, end = (
        inserted.partition("\n## ONNX files\n")[0],
        *inserted.split("\n## ONNX files\n")[1].split("\n## Citation\n"),
    )
    assert (start, f"## Citation\n{end}") == ("# mine\n", card.partition("# mine\n\n")[2])
    assert "| `model.onnx` |" not in section and "| `onnx/model.onnx` | 2.3e-06 | 100.00% |\n" in section
    assert "| `onnx/model_fp16.onnx` | 1.2e-02 | 98.44% |\n" in section
    assert insert_onnx_section(inserted, {"comparisons": [], "labeled": None}) == inserted
    scores = {"model.onnx": 0.75, "model_fp16.onnx": 0.5}
    labeled = {"dataset": "ann/pets", "split": "test", "num_images": 1234, "metric": "accuracy", "model": 0.75}
    report = {"comparisons": comparisons, "labeled": labeled | {"files": scores}}
    section = insert_onnx_section("# mine\n", report).removeprefix("# mine\n\n## ONNX files\n")
    assert "evaluated on 1,234 images of `ann/pets` (test), one image at a time" in section
    assert "For the PyTorch model, the accuracy is 75.00%." in section
    assert "| `onnx/model_fp16.onnx` | 1.2e-02 | 98.44% | 50.00% |\n" in section
    report["labeled"]["metric"] = "mean_average_precision"
    assert "For the PyTorch model, the mean average precision is 75.00%." in insert_onnx_section("# mine\n", report)


def test_the_citation_equals_the_one_of_the_repository() -> None:
    stated: dict[str, Any] = dict(
        re.findall(r'^(title|version|date-released): "?(.*?)"?$', (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    )
    assert stated["title"] in CITATION and f'version = "{stated["version"]}"' in CITATION
    assert f'year = "{stated["date-released"][:4]}"' in CITATION


def test_the_required_version_is_not_above_the_installed_one() -> None:
    assert tuple(map(int, transformers.__version__.split(".")[:2])) >= MIN_TRANSFORMERS_VERSION
