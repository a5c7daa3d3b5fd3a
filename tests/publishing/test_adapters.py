"""LoRA adapters: written in the layout of PEFT, pushed without the base model, and loaded with a base model from the
Hub.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.fresh_processes import run_fresh
from helpers.local_hub import LocalHub
from helpers.tiny_models import build_images, build_tiny_config, raises_one_line, randomize, save_with_processor
from huggingface_hub import ModelCard

from modeling_vitcls import ViTCLSForImageClassification
from modeling_vitcls.hub.provenance import Provenance
from modeling_vitcls.publishing.adapters import write_adapter
from modeling_vitcls.publishing.publish import push_folder
from modeling_vitcls.training.model import merge_lora, set_trainable_parameters


pytestmark = pytest.mark.integration


# Runs without the package: loads the adapter as described in its card, and saves the logits.
LOAD = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForImageClassification

{code}
torch.save(model(torch.load(sys.argv[1])).logits, sys.argv[2])
assert "modeling_vitcls" not in sys.modules
"""


def train(base: Path) -> ViTCLSForImageClassification:
    """Return a classifier with other labels and one more register, as after training with LoRA."""
    model = ViTCLSForImageClassification.from_pretrained(
        base, num_labels=5, num_register_tokens=2, ignore_mismatched_sizes=True
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    model = set_trainable_parameters(model, "lora", lora_rank=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
            else:
                assert torch.equal(parameter, before[name.replace(".base_layer", "")])
    return model.eval()


@pytest.mark.parametrize("head_type", ["linear", pytest.param("mlp", marks=pytest.mark.slow)])
def test_an_adapter_is_pushed_separately_and_loaded_as_in_its_card(
    hub: LocalHub, tmp_path: Path, head_type: str
) -> None:
    base = tmp_path / "base"
    config = build_tiny_config(num_register_tokens=1, num_distillation_tokens=1, head_type=head_type)
    save_with_processor(ViTCLSForImageClassification(config), base)
    push_folder(base, "ann/base")
    model = train(base)
    (tmp_path / "LICENSE").write_text("the text")
    provenance = Provenance("ann/base", "ann/base", license="mit", license_files=(tmp_path / "LICENSE",))
    write_adapter(tmp_path / "adapter", model.state_dict(), model.config, 2, "ann/base", provenance)
    (tmp_path / "adapter" / "training_args.bin").touch()
    push_folder(tmp_path / "adapter", "ann/adapter")
    names = set(hub.files("ann/adapter")) - {".gitattributes"}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md", "LICENSE"}

    card = ModelCard(hub.read("ann/adapter", "README.md").decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("ann/base", "adapter")
    assert card.data.license == "mit" and "Python files are licensed" not in card.text
    assert "remain under its license: mit. The license text is in LICENSE." in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    torch.save(build_images(), tmp_path / "images.pt")
    environment = os.environ | {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    (tmp_path / "empty").mkdir()
    words = ["-P", "-c", LOAD.format(code=code), tmp_path / "images.pt", tmp_path / "logits.pt"]
    ran = run_fresh(*words, environment=environment, cwd=tmp_path / "empty")
    assert ran.returncode == 0, ran.stderr[-3000:]
    expected = model(build_images()).logits
    assert (torch.load(tmp_path / "logits.pt") - expected).abs().max() <= 1e-5 * expected.abs().max()
    merged = ViTCLSForImageClassification(model.config).eval()
    merged.load_state_dict(merge_lora(model.state_dict()))
    assert (merged(build_images()).logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_an_adapter_of_a_local_base_model_is_not_pushed(tmp_path: Path) -> None:
    base = tmp_path / "base"
    randomize(ViTCLSForImageClassification(build_tiny_config(num_register_tokens=1))).save_pretrained(base)
    model = train(base)
    write_adapter(tmp_path / "adapter", model.state_dict(), model.config, 2, str(base))
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert str(tmp_path) not in str(card) and card.text.lstrip().startswith("# adapter\n")
    assert not {"base_model", "base_model_relation"} & card.data.to_dict().keys()
    with raises_one_line("requires a base model on the Hub", "base_model_name_or_path"):
        push_folder(tmp_path / "adapter", "ann/adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["inference_mode"]) == (str(base), True)
    settings["base_model_name_or_path"] = None
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with raises_one_line("requires a base model on the Hub, but its base model is None"):
        push_folder(tmp_path / "adapter", "ann/adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with raises_one_line("lacks adapter_model.safetensors"):
        push_folder(tmp_path / "adapter", "ann/adapter")
