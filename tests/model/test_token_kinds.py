"""A kind of token is a row: CONTRIBUTING.md's recipe, followed in a copy of the package."""

import shutil
from pathlib import Path

import pytest
from helpers.doc_pages import PACKAGE
from helpers.fresh_processes import SCRIPT_ENVIRONMENT, run_python
from helpers.photo_folders import write_unequal_photos


# File -> text, and what is inserted before it.
EDITS = {
    "model/token_layout_vitcls.py": [
        ("]  # Special tokens, in sequence order", ', "prompts"'),
        ("    patches: slice\n", "    prompts: slice\n"),
        (
            ")\n\n# Group of special tokens -> field",
            '    TokenKind("prompts", "num_prompt_tokens", "prompt_tokens", "prompt", "#CC79A7"),\n',
        ),
    ],
    "model/configuration_vitcls.py": [
        (
            "    use_mask_token: bool = False\n",
            "    num_prompt_tokens: int = token_count(default=0)\n",
        )
    ],
}

USE_PROMPTS = """
import sys
import torch
from modeling_vitcls import ViTCLSConfig, ViTCLSForImageClassification, pack
from modeling_vitcls.analysis.sheet import GROUP_COLORS
from modeling_vitcls.inference.prediction_rows import Feature
from modeling_vitcls.inference.token_names import get_token_names

sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
config = ViTCLSConfig(**sizes, image_size=32, patch_size=8, num_register_tokens=1, num_labels=3)
model = ViTCLSForImageClassification(config).eval()
images = torch.randn(2, 3, 32, 32)
prompted = model.adapt(num_prompt_tokens=4).eval()
assert prompted.config.token_layout.prompts == slice(2, 6)
assert prompted.config.fading_tokens == {"prompts": 4}
assert (prompted(images).logits - model(images).logits).abs().max() < 1e-5
assert prompted.vitcls(images).tokens["prompts"].shape == (2, 4, 32)
assert prompted.token_attention(images, tokens=["prompts"]).shape == (2, 2, 2, 4, 22)
assert get_token_names(prompted.config)[-1] == "prompt 4"
assert Feature.from_name("prompts", prompted.config).num_tokens == 4
assert GROUP_COLORS["prompts"] == "#CC79A7"

prompted.save_pretrained(sys.argv[1])
loaded = ViTCLSForImageClassification.from_pretrained(sys.argv[1]).eval()
assert torch.equal(loaded(images).logits, prompted(images).logits)
with torch.no_grad():
    assert torch.allclose(pack(loaded)(images).logits, prompted(images).logits, atol=1e-5)
loaded(images, labels=torch.tensor([0, 1])).loss.backward()
assert loaded.vitcls.embeddings.prompt_tokens.grad is not None
fewer = ViTCLSForImageClassification.from_pretrained(sys.argv[1], num_prompt_tokens=1)
assert fewer.vitcls.embeddings.prompt_tokens.shape == (1, 1, 32)
print("all of it")
"""


# A run on a frozen encoder, the card of its folder, and an inspection
TRAIN_AND_INSPECT = """
import sys
from pathlib import Path
import torch
from modeling_vitcls import ViTCLSConfig, ViTCLSModel, finetune, inspect_tokens

torch.manual_seed(0)
sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
config = ViTCLSConfig(**sizes, image_size=32, patch_size=8, num_cls_tokens=2, num_prompt_tokens=4)
ViTCLSModel(config).save_pretrained("encoder")
results = finetune("encoder", sys.argv[1], "run")
assert results["num_right"] == 24
inspection = inspect_tokens("run", sys.argv[1], output="report.html")
assert {"prompts"} <= {effect["group"] for effect in inspection.effects}, inspection.effects
assert "prompt x 4" in Path("run/README.md").read_text()
print("all of it")
"""


@pytest.fixture(scope="module")
def code(module_path: Path) -> Path:
    """Follow the recipe in a copy of the package, and return the folder of the copy."""
    code = module_path / "code"
    shutil.copytree(PACKAGE, code / "modeling_vitcls")
    for name, edits in EDITS.items():
        file = code / "modeling_vitcls" / name
        text = file.read_text()
        for before, added in edits:
            assert text.count(before) == 1, before
            text = text.replace(before, added + before)
        file.write_text(text)
    return code


def test_a_kind_of_token_is_a_row_and_a_field(code: Path, tmp_path: Path) -> None:
    environment = SCRIPT_ENVIRONMENT | {"PYTHONPATH": str(code)}
    done = run_python("-c", USE_PROMPTS, tmp_path / "model", environment=environment, cwd=code)
    assert "all of it" in done.stdout


@pytest.mark.slow
def test_a_frozen_run_its_card_and_an_inspection_know_a_new_kind(
    code: Path, tmp_path: Path
) -> None:
    photos = write_unequal_photos(tmp_path / "photos")
    environment = SCRIPT_ENVIRONMENT | {"PYTHONPATH": str(code)}
    done = run_python("-c", TRAIN_AND_INSPECT, photos, environment=environment, cwd=tmp_path)
    assert "all of it" in done.stdout
