"""Checkpoints of earlier releases load without warnings, with the same outputs.

The checkpoints are in fixtures/released/; released_models.py writes the checkpoints of a new
release.
"""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.released_models import ANSWERS, KINDS, RELEASED, compute_outputs
from helpers.tiny_models import get_largest_difference
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

import modeling_vitcls as vitcls
from modeling_vitcls.version import __version__


TOLERANCE = 1e-5

CHECKPOINTS = sorted(path.parent for path in RELEASED.glob("*/*/config.json"))
each_checkpoint = pytest.mark.parametrize(
    "folder", CHECKPOINTS, ids=["/".join(path.parts[-2:]) for path in CHECKPOINTS]
)


def load_model(folder: Path, **values: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model, loaded with the class that saved it, and its loading information."""
    model_class = getattr(vitcls, AutoConfig.from_pretrained(folder).architectures[0])
    return model_class.from_pretrained(folder, output_loading_info=True, **values)


def test_this_version_has_its_checkpoints() -> None:
    found = {folder.name for folder in CHECKPOINTS if folder.parent.name == __version__}
    assert found == set(KINDS), (
        f"version {__version__} has none: run tests/helpers/released_models.py, and commit its "
        "files"
    )


@each_checkpoint
def test_released_models_load_without_warnings_and_outputs_are_unchanged(
    folder: Path,
) -> None:
    with warnings.catch_warnings(), CaptureLogger(logging.get_logger("transformers")) as logs:
        warnings.simplefilter("error")
        model, info = load_model(folder)
        processor = AutoImageProcessor.from_pretrained(folder)
        found = compute_outputs(model, processor)

    assert not logs.out
    assert not any(info.values()), info
    assert {weights.dtype for weights in model.parameters()} == {torch.float32}

    wanted = load_file(folder / ANSWERS)
    assert wanted.keys() <= found.keys()
    for name, value in wanted.items():
        assert get_largest_difference(found[name], value) <= TOLERANCE, name
        assert value.abs().max() > 0.1, name


@each_checkpoint
def test_released_models_can_be_saved_and_adapted(folder: Path, tmp_path: Path) -> None:
    """Saving keeps the model, tokens can be changed, and AutoModel loads the encoder."""
    model, _ = load_model(folder)
    model.save_pretrained(tmp_path)
    again, info = load_model(tmp_path)
    assert not any(info.values())
    processor = vitcls.ViTCLSImageProcessor.from_pretrained(folder)
    wanted = load_file(folder / ANSWERS)
    found = compute_outputs(again, processor)
    for name, value in wanted.items():
        assert get_largest_difference(found[name], value) <= TOLERANCE, name
    adapted, _ = load_model(folder, num_register_tokens=5)
    assert adapted.config.num_register_tokens == 5
    assert type(AutoModel.from_pretrained(folder)) is vitcls.ViTCLSModel
