"""A kind of token is a row: CONTRIBUTING.md's recipe, followed in a copy of the package."""

import shutil
from pathlib import Path

from helpers.doc_pages import PACKAGE
from helpers.fresh_processes import SCRIPT_ENVIRONMENT, run_python


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


def test_a_kind_of_token_is_a_row_and_a_field(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "code/modeling_vitcls")
    for name, edits in EDITS.items():
        file = tmp_path / "code/modeling_vitcls" / name
        text = file.read_text()
        for before, added in edits:
            assert text.count(before) == 1, before
            text = text.replace(before, added + before)
        file.write_text(text)

    environment = SCRIPT_ENVIRONMENT | {"PYTHONPATH": str(tmp_path / "code")}
    done = run_python(
        "-c", USE_PROMPTS, tmp_path / "model", environment=environment, cwd=tmp_path / "code"
    )
    assert "all of it" in done.stdout
