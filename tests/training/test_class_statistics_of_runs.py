"""A run stores class statistics, with which a class is added without the old images."""

from pathlib import Path

import pytest
import torch
from helpers.additions import add_class
from helpers.digits_models import STRIPED
from helpers.tiny_models import build_images, raises_one_line
from helpers.tiny_options import build_tiny_options, run_to_folder

from modeling_vitcls import ViTCLSForImageClassification, predict


IMAGES = build_images(4, seed=1)


@pytest.fixture(scope="module")
def trained(module_path: Path) -> Path:
    """Return the folder of a run with steps."""
    return run_to_folder(build_tiny_options(module_path / "trained", "digits", max_steps=3))


@pytest.fixture(scope="module")
def frozen(module_path: Path, trained: Path) -> Path:
    """Return the folder of a frozen run of the trained encoder."""
    flags = {"model": str(trained), "trainable": "head", "probe": True}
    return run_to_folder(build_tiny_options(module_path / "frozen", "digits", **flags))


@pytest.fixture(scope="module")
def adapted(module_path: Path, trained: Path) -> Path:
    """Return the folder of a run with LoRA, whose weights are merged."""
    flags = {"model": str(trained), "trainable": "lora", "max_steps": 2}
    return run_to_folder(build_tiny_options(module_path / "adapted", "digits", **flags))


@pytest.fixture(params=["trained", "frozen", pytest.param("adapted", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@torch.no_grad()
def compute_logits(folder: Path) -> torch.Tensor:
    return ViTCLSForImageClassification.from_pretrained(folder)(build_images(3)).logits


def test_a_class_is_added_without_old_images_and_is_known(folder: Path, tmp_path: Path) -> None:
    record = add_class(folder, STRIPED, tmp_path / "new")
    assert record["result"]["recall"] > 0.9
    assert record["result"]["num_images"] == len(STRIPED)
    assert torch.equal(compute_logits(tmp_path / "new")[:, :10], compute_logits(folder))
    before, after = (predict(each, [STRIPED[0][0]])[0] for each in (folder, tmp_path / "new"))
    assert after["label"] == "stripes"
    assert after["distance"] < before["distance"]


@torch.no_grad()
def test_weights_that_were_saved_in_training_have_no_distance(frozen: Path, tmp_path: Path) -> None:
    """Trainer saves the model in training mode."""
    model = ViTCLSForImageClassification.from_pretrained(frozen).train()
    model.vitcls.layers[0].mlp.fc1.weight.add_(1e-3)
    model.save_pretrained(tmp_path)
    assert ViTCLSForImageClassification.from_pretrained(tmp_path)(IMAGES).distance is None
    assert "distance" not in predict(tmp_path, [STRIPED[0][0]])[0]
    with raises_one_line("class statistics"):
        add_class(tmp_path, STRIPED, tmp_path / "new")


def test_a_trained_classifier_keeps_the_distance(frozen: Path) -> None:
    model = ViTCLSForImageClassification.from_pretrained(frozen)
    model(IMAGES, labels=torch.arange(4)).loss.backward()
    torch.optim.SGD(model.classifier.parameters(), lr=1e-3).step()
    assert model(IMAGES).distance is not None


@torch.no_grad()
def test_any_loop_goes_on_from_calibrated_probabilities(frozen: Path) -> None:
    """The logits of shrinkage LDA are many times too large, so its weights are divided."""
    model = ViTCLSForImageClassification.from_pretrained(frozen)
    images = build_images(8)
    labels = torch.arange(8)
    expected = model(images, labels=labels).loss
    loss = model.train()(images, labels=labels).loss
    assert torch.allclose(loss, expected, rtol=1e-4)
