"""The reference of a verification: it runs no code of the model folder and loads no pickled weights."""

import json
from pathlib import Path

import pytest
import torch
from helpers.tiny_models import KINDS, build_tiny_config, list_tensors, save_classifier, save_with_processor
from safetensors.torch import load_file

from modeling_vitcls.publishing.verification_reference import PackageLoader
from modeling_vitcls.publishing.verification_script import AUTO_CLASSES, build_pixel_values, collect_outputs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a classifier with its image processor."""
    return save_classifier(tmp_path / "my-run")


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_runs_no_code_of_the_folder(tmp_path: Path, kind: str) -> None:
    model_class, fields, _ = KINDS[kind]
    folder = save_with_processor(model_class(build_tiny_config(**fields)), tmp_path / kind)
    ran = tmp_path / "ran"
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(ran)!r}, 'w')\n" + file.read_text())
    config = json.loads((folder / "config.json").read_text())
    custom = {"image-classification": {"impl": "modeling_vitcls.ViTCLSModel", "pt": ["AutoModel"]}}
    for changed in (config, config | {"custom_pipelines": custom}):
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            answers, report = collect_outputs(PackageLoader(folder))
        except ValueError as error:  # an unknown field
            assert "custom_pipelines" in str(error)
        assert not ran.exists()
    auto_class = AUTO_CLASSES.get(model_class.__name__, "AutoModel")
    assert set(report["models"]) == {"AutoModel", auto_class}
    assert report["models"][auto_class]["class"] == model_class.__name__
    model = model_class.from_pretrained(folder)
    with torch.no_grad():
        tensors = list(list_tensors(model(build_pixel_values(model.config))))
    assert len([name for name in answers if name.startswith(f"{auto_class}/")]) == len(tensors) > 0
    assert {model["module"] for model in report["models"].values()} == {"modeling_vitcls.modeling_vitcls"}


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    loader = PackageLoader(folder)
    with pytest.raises(OSError, match="safetensors"):
        loader.load_model("AutoModel", loader.load_config())
